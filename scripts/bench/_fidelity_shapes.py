"""Layer times at points that were not profiled, against measurements and the paper's regression.

A model is profiled as a user would (`llmpq-profile layers`), within a budget. Then random points
within its range and at its edges, none of them in the profile, are measured by the same timers, in
rounds, for the same speed of the machine (llmpq.profiler.drift), and compared with what the
planner would predict and with the regression of LLM-PQ (arXiv 2403.01136) fitted to the same rows.
"""

import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import Check, shared_data

from llmpq.artifact import read_json
from llmpq.costs.fits import cross_validate, fit_all
from llmpq.costs.recipes import RECIPES, REGRESSION, Model, grouped, points_of
from llmpq.model_lookup import config_path, load_model_spec
from llmpq.models.stage_model import load_config
from llmpq.precision import PRECISIONS
from llmpq.profile_data import Candidate, Phase, Profile, ProfileRow
from llmpq.profiler.cells import SLOW_MS, Cell, Cells, profile_rows
from llmpq.profiler.drift import MachineSpeed
from llmpq.profiler.grid import STAGE_PHASE
from llmpq.profiler.layers import stacked
from llmpq.profiler.stacks import Bench, stack_depth, stacked_layers

ROOT = Path(__file__).parents[2]
SMALL = (shared_data() or ROOT) / "models"
CONFIGS = ROOT / "configs" / "models"
MODELS = {
    "cpu": [SMALL / "tale-llama-11m", CONFIGS / "opt-1.3b.json"],
    "cuda": [CONFIGS / f"{name}.json" for name in ("opt-30b", "llama-3.3-70b", "qwen2.5-32b")],
}
TARGETS = {"cpu": 6.0, "cuda": 3.0}  # percent
NUM_POINTS, QUICK_POINTS = 50, 12  # a phase
BUDGET_S = {"cpu": 240.0, "cuda": 120.0}
QUICK_BUDGET_S = 25.0
MOST_PROFILE_S = 300.0
ROUNDS = 4
SLICE_S = 0.3  # of a cell in a round
LEAST_SAMPLES, MOST_SAMPLES = 3, 12
EDGE = 0.2  # of the points lie at an edge of the range
PHASES: tuple[Phase, ...] = ("prefill", "decode")


def run(quick: bool, device: str) -> tuple[list[Check], list[dict[str, Any]]]:
    """Checks of every model and phase."""
    checks, rows = [], []
    models = [path for path in MODELS[device] if path.exists()]
    for path in ["tiny-tales"] if quick else [str(path) for path in models] or ["tiny-tales"]:
        found, more = _model(path, quick, device)
        checks += found
        rows += more
    return checks, rows


def _model(model: str, quick: bool, device: str) -> tuple[list[Check], list[dict[str, Any]]]:
    name = Path(model).stem
    profile, seconds = _profiled(model, QUICK_BUDGET_S if quick else BUDGET_S[device], device)
    limit = f"<= {MOST_PROFILE_S:.0f}"
    checks = [_check(f"{name}: profile", seconds, "s", limit, seconds <= MOST_PROFILE_S, 1)]
    points = _held_out(profile.rows, QUICK_POINTS if quick else NUM_POINTS)
    usual = profile.device.reference_ms
    measured = _measure(model, points, device, MachineSpeed(usual or 1.0, scales=usual is not None))
    fits = fit_all(profile.rows)
    papers = {key: RECIPES[REGRESSION](points_of(g)) for key, g in grouped(profile.rows).items()}
    rows = []
    print(f"{name}: {len(profile.rows)} rows profiled in {seconds:.0f} s", flush=True)
    for phase in PHASES:
        some = [row for row in measured if row.phase == phase]
        ours = [_error(fits[row.precision, phase], row) for row in some]
        theirs = [_error(papers[row.precision, phase], row) for row in some]
        noise = statistics.fmean((r.time_ms_p90 - r.time_ms_p10) / r.time_ms for r in some)
        said = [
            100 * fits[r.precision, phase].accuracy(r.micro_batch, r.tokens).error for r in some
        ]
        error, paper = statistics.fmean(ours), statistics.fmean(theirs)
        target, count = TARGETS[device], len(some)
        print(f"{name}, {phase}: {error:.1f} %, the paper's {paper:.1f} %", flush=True)
        what = f"{name}, {phase}"
        checks += [
            _check(f"{what}: error", error, "%", f"<= {target:g}", error <= target, count),
            _check(
                f"{what}: the paper's error over ours",
                paper / error,
                "x",
                "> 1",
                paper > error,
                count,
            ),
        ]
        rows.append(
            {"model": name, "phase": phase, "error_percent": error, "paper_error_percent": paper}
            | {"median_percent": statistics.median(ours), "worst_percent": max(ours)}
            | {"error_said_percent": statistics.fmean(said), "p10_to_p90_share": noise}
            | {"won": {p: f.name for (p, ph), f in fits.items() if ph == phase}}
            | {"cross_validation_percent": _table(profile.rows, phase)}
        )
        for row, one, other in zip(some, ours, theirs, strict=True):
            shape = {"micro_batch": row.micro_batch, "tokens": row.tokens}
            rows.append(
                {"model": name, "phase": phase, "precision": row.precision, **shape}
                | {"time_ms": row.time_ms, "error_percent": one, "paper_error_percent": other}
            )
    return checks, rows


def _check(
    name: str, value: float, unit: str, target: str, holds: bool | None, samples: int
) -> Check:
    return Check(name, value, unit, target, holds, samples)


def _error(model: Model, row: ProfileRow) -> float:
    """Percent, of one point."""
    predicted = float(model.seconds(row.micro_batch, row.tokens)) * 1000
    return 100 * abs(predicted / row.time_ms - 1)


def _table(rows: Sequence[ProfileRow], phase: str) -> dict[str, float]:
    """Percent by recipe: cross-validated on the profile itself, the mean over precisions."""
    groups = [points_of(g) for (_, p), g in grouped(rows).items() if p == phase]
    return {
        name: 100 * statistics.fmean(float(cross_validate(name, g).mean()) for g in groups)
        for name in RECIPES
    }


def _profiled(model: str, budget_s: float, device: str) -> tuple[Profile, float]:
    """A user's profile, and the seconds the command took."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        command = [sys.executable, "-m", "llmpq.cli.profile", "layers", "--model", model]
        command += ["--device", device, "--budget-s", str(budget_s), "-o", str(path), "-q"]
        command += ["--threads", "1"] if device == "cpu" else []
        start = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return read_json(path, Profile), time.monotonic() - start


# ---- the points


def _held_out(rows: Sequence[ProfileRow], count: int) -> list[Candidate]:
    """Random points of each phase in the profile's range, some at its edge, none in the profile."""
    draw = random.Random(20261121)
    return [point for phase in PHASES for point in _of_phase(rows, phase, count, draw)]


def _of_phase(
    rows: Sequence[ProfileRow], phase: Phase, count: int, draw: random.Random
) -> list[Candidate]:
    known = [row for row in rows if row.phase == phase]
    seen = {_candidate(row) for row in known}
    precisions = sorted({row.precision for row in known})
    batches = [row.micro_batch for row in known]
    lengths = [row.tokens for row in known]
    most = max(_work(phase, row.micro_batch, row.tokens) for row in known)
    points: list[Candidate] = []
    while len(points) < count:
        batch, length = _log_uniform(batches, draw), _log_uniform(lengths, draw)
        if len(points) < EDGE * count:
            batch, length = _at_edge(batch, length, batches, lengths, draw)
        point = Candidate(draw.choice(precisions), phase, batch, length)
        if point not in seen and _work(phase, batch, length) <= most:
            seen.add(point)
            points.append(point)
    return points


def _candidate(row: ProfileRow) -> Candidate:
    return Candidate(row.precision, row.phase, row.micro_batch, row.tokens)


def _work(phase: Phase, batch: int, length: int) -> int:
    """Ranges are cut where both sizes are large."""
    return batch * length if phase == "prefill" else 0


def _log_uniform(sizes: Sequence[int], draw: random.Random) -> int:
    return round(math.exp(draw.uniform(math.log(min(sizes)), math.log(max(sizes)))))


def _at_edge(
    batch: int, length: int, batches: Sequence[int], lengths: Sequence[int], draw: random.Random
) -> tuple[int, int]:
    """One of the sizes at the least or the most that was profiled."""
    pick = draw.choice((min, max))
    return (pick(batches), length) if draw.random() < 0.5 else (batch, pick(lengths))


# ---- measuring them


@torch.inference_mode()
def _measure(
    model: str, points: Sequence[Candidate], device: str, usual: MachineSpeed
) -> list[ProfileRow]:
    """In rounds, so that a slow moment of the machine touches no point alone.

    Given for the machine's `usual` speed, as the profile is.
    """
    where = torch.device(device)
    dtype = torch.bfloat16
    if device == "cpu":
        torch.set_num_threads(1)
    spec = load_model_spec(model)
    precisions = tuple(p for p in PRECISIONS if p in {point.precision for point in points})
    layer_bytes = 2 * spec.layer_params
    config, depth = load_config(config_path(model)), stack_depth(layer_bytes)
    per_request = {point: 1 if point.phase == "decode" else point.tokens for point in points}
    most_rows = max(point.micro_batch * tokens for point, tokens in per_request.items())
    layers = stacked_layers(spec.kind_of_layers, 0, depth)
    bench = Bench(config, precisions, layers, dtype, where, most_rows)
    cells = Cells(precisions[0])
    for point in points:
        stage = point._replace(precision=precisions[0], phase=STAGE_PHASE[point.phase])
        for key in (stage, point):
            cells.setdefault(key, Cell(key))
    for _ in range(ROUNDS):
        for cell in cells.values():
            _visit(bench, cell)
    rows = profile_rows(cells, spec.model_key, usual)
    wanted = set(points)
    return [row for row in rows if _candidate(row) in wanted]


def _visit(bench: Bench, cell: Cell) -> None:
    """Some samples; the first visit finds how many layers to stack, as the profiler does."""
    probe = bench.open(cell.key)
    if not cell.num_visits:
        start = time.monotonic()
        probe.warm_up(min(1, probe.max_depth))
        cell.call_s = time.monotonic() - start
        cell.depth = stacked(probe.max_depth, cell.call_s) if probe.max_depth else 0
    cell.num_visits += 1
    is_slow = 1000 * cell.call_s > SLOW_MS
    if not is_slow:
        probe.warm_up(cell.depth)
    end = time.monotonic() + SLICE_S
    for count in range(MOST_SAMPLES):
        if count >= (1 if is_slow else LEAST_SAMPLES) and time.monotonic() > end:
            break
        cell.times_ms.append(probe.time_ms(cell.depth))
        cell.levels_ms.append(bench.reference_ms())
