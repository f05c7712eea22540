"""Plans for quality budgets, and what they do to the perplexity of text that nobody has seen.

Random clusters in which the model fits at 3 bits but not at 16, of devices on which fewer bits are
mostly faster, on each to another degree: so either memory or the budget decides. Each is planned
for every budget by the real planner with one sensitivity file a model, measured on its calibration
text. Where no plan keeps memory and budget, another cluster is drawn.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from _common import Check
from _quality_common import (
    PRECISIONS,
    Measured,
    Mixed,
    Settings,
    Subject,
    sensitivity_path,
    stated,
)

from llmpq.checkpoint.roundings import load_roundings
from llmpq.cluster import MIB, Cluster
from llmpq.costs.latency import device_times
from llmpq.costs.memory import RunSizes, stage_memory
from llmpq.costs.quality import QualityModel, measured_quality
from llmpq.errors import InfeasibleError
from llmpq.job import LaneShape
from llmpq.model_spec import ModelSpec
from llmpq.plan_data import Plan
from llmpq.planner.planning import Options, replan
from llmpq.planner.problem import Problem
from llmpq.precision import PRECISIONS as KNOWN
from llmpq.profile_data import Profile, load_sensitivity
from llmpq.workload import Workload, request_lengths

BUDGETS = (0.5, 1.0, 2.0, 5.0)  # percent of perplexity
SLACK = 0.2  # points
NUM_PLANS = 20
LEAST_SHARE = 0.95  # 19 of 20
JOB = {"prompt_tokens": 64, "new_tokens": 32, "num_requests": 16, "batch": 8}
QUICK = Options(gap=0.05, time_limit_s=5.0, compare=False)
MAX_DRAWS = 2000
SPREAD = 0.4  # of the speed of a precision, as a logarithm


@dataclass(frozen=True)
class Planned:
    """A plan that was made for a budget, in percent; `expected`: the rise it shows."""

    budget: float
    plan: Plan
    expected: float
    held: float
    method: str


def run(settings: Settings) -> tuple[list[Check], list[dict[str, Any]]]:
    """The checks, and a row a plan and text."""
    rows = [row for subject in settings.subjects() for row in rows_of(settings, subject)]
    return [*budget_checks(rows), *error_checks(rows)], rows


def rows_of(settings: Settings, subject: Subject) -> list[dict[str, Any]]:
    """Every plan of a model on each of its held-out texts."""
    path = sensitivity_path(settings, subject)
    sensitivity = load_sensitivity(path)
    quality = measured_quality(sensitivity, subject.spec, str(path))
    count = 4 if settings.quick else NUM_PLANS
    planned = [p for budget in BUDGETS for p in plans_for(subject, quality, budget, count)]
    mixed = Mixed(subject, load_roundings(sensitivity.quantizer, None, path))
    rows = []
    for text in subject.evaluation:
        windows = subject.windows(text, settings.num_windows)
        base, found = mixed.measure([one.plan.precisions for one in planned], windows)
        told = partial(row, subject, text.name, base)
        rows += [told(one, measured) for one, measured in zip(planned, found, strict=True)]
    return rows


def row(
    subject: Subject, text: str, base: Measured, planned: Planned, measured: Measured
) -> dict[str, Any]:
    """What was promised of a plan, and what it does."""
    return {
        "model": subject.name,
        "text": text,
        "budget_percent": planned.budget,
        "predicted_percent": planned.expected,
        "held_percent": planned.held,
        "stages": len(planned.plan.stages),
        "precisions": " ".join(planned.plan.precisions),
        **measured.figures(base),
    }


# ---- random problems


def plans_for(subject: Subject, quality: QualityModel, budget: float, count: int) -> list[Planned]:
    """So many plans for one budget, each for another cluster."""
    rng = np.random.default_rng(int(100 * budget))
    found: list[Planned] = []
    for _ in range(MAX_DRAWS):
        problem = random_problem(rng, subject.spec, quality, budget)
        try:
            plan = replan(problem, QUICK)
        except InfeasibleError:
            continue
        omega = quality.sum_omega(plan.precisions)
        expected, held = quality.expected_percent(omega), quality.percent(omega)
        found.append(Planned(budget, plan, expected, held, plan.method))
        if len(found) == count:
            return found
    raise RuntimeError(f"{subject.name}: only {len(found)} of {MAX_DRAWS} clusters have a plan")


def random_problem(
    rng: np.random.Generator, spec: ModelSpec, quality: QualityModel, budget: float
) -> Problem:
    """2 to 4 unequal devices whose memory together lies between 3 and 16 bits' need."""
    cluster = random_cluster(rng, spec)
    workload = Workload.model_validate(JOB)
    types = [device.type for device in cluster.devices()]
    profiles = [Profile.model_validate(random_profile(rng, spec, name)) for name in types]
    return Problem(
        spec=spec,
        cluster=cluster,
        workload=workload,
        lengths=tuple(request_lengths(workload)),
        times={name: device_times(cluster, name, spec, profiles) for name in types},
        quality=quality,
        precisions=tuple(p for p in PRECISIONS if p in quality.omega),
        budget=quality.budget(budget),
    )


def random_cluster(rng: np.random.Generator, spec: ModelSpec) -> Cluster:
    """Shares of the memory are unequal, so that stages differ."""
    count = int(rng.integers(2, min(4, spec.num_layers - 1) + 1))
    least, most = (needed_mib(spec, precision, count) for precision in ("3", "16"))
    shares = rng.uniform(least, most) * rng.dirichlet([4.0] * count)
    return Cluster.model_validate(
        {
            "name": "random",
            "nodes": [{"name": "here", "devices": [{"type": f"d{i}"} for i in range(count)]}],
            "rehearse": {
                f"d{i}": {"slowdown": 1, "memory_mib": float(share)}
                for i, share in enumerate(shares)
            },
        }
    )


def needed_mib(spec: ModelSpec, precision: str, num_stages: int) -> float:
    """Of all stages together, about: layers are shared out evenly."""
    per_stage = -(-spec.num_layers // num_stages)
    prompt, lane = JOB["prompt_tokens"], LaneShape(1, JOB["prompt_tokens"] + JOB["new_tokens"])
    sizes = RunSizes((lane,) * JOB["batch"], 1, prompt, prompt, num_stages)
    needs = [
        stage_memory(
            spec,
            [precision] * per_stage,
            first=rank == 0,
            last=rank == num_stages - 1,
            sizes=sizes,
        ).total
        for rank in range(num_stages)
    ]
    return sum(needs) / MIB


def random_profile(rng: np.random.Generator, spec: ModelSpec, name: str) -> dict[str, Any]:
    """A device on which fewer bits are mostly faster; by how much, and its speed, is drawn."""
    power, speed = rng.uniform(0.2, 1.0), rng.uniform(1, 8)
    bits = {p: KNOWN[p].weight_bits for p in PRECISIONS}
    factors = {p: speed * (b / 16) ** power * rng.lognormal(0, SPREAD) for p, b in bits.items()}
    rows = [
        _profile_row(spec, phase, precision, size, length, float(factor))
        for size, length in itertools.product((1, 4, 16), (8, 128))
        for phase in ("prefill", "decode")
        for precision, factor in factors.items()
    ]
    device = {"name": name, "type": name, "memory_bytes": 2**33}
    return {"schema_version": 1, "kind": "profile", "device": device, "rows": rows}


def _profile_row(
    spec: ModelSpec, phase: str, precision: str, size: int, length: int, factor: float
) -> dict[str, Any]:
    ms = factor * (0.2 + 0.001 * size * length)
    return {
        "model_key": spec.model_key,
        "precision": precision,
        "phase": phase,
        "micro_batch": size,
        "prompt_tokens": length if phase == "prefill" else 0,
        "past_tokens": length if phase == "decode" else 0,
        "time_ms": ms,
        "time_ms_p10": ms,
        "time_ms_p90": ms,
        "num_samples": 5,
    }


# ---- checks


def budget_checks(rows: Sequence[dict[str, Any]]) -> list[Check]:
    """The share of plans within their budget, for each model, text and budget."""
    return [budget_check(name, group) for name, group in grouped(rows, budget=True)]


def grouped(rows: Sequence[dict[str, Any]], budget: bool) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows by model and text (and budget), and what to call them."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in rows:
        name = f"{one['model']}, {one['text']}"
        name += f", budget {one['budget_percent']:g} %" if budget else ""
        groups.setdefault(name, []).append(one)
    return list(groups.items())


def budget_check(name: str, rows: Sequence[dict[str, Any]]) -> Check:
    """How many keep within the budget and a little more."""
    within = sum(one["rise_percent"] <= one["budget_percent"] + SLACK for one in rows)
    least = int(np.ceil(LEAST_SHARE * len(rows) - 1e-9))
    target = f">= {least} of {len(rows)} within budget + {SLACK:g}"
    return Check(f"{name}: plans within", within, "plans", target, within >= least, len(rows))


def error_checks(rows: Sequence[dict[str, Any]]) -> list[Check]:
    """Predicted against measured rise, in points of percent: how far off, and to which side.

    Beside it how many plans the budget held back at all: where even 3 bits everywhere lose less
    than the budget, plans within it prove little.
    """
    checks = []
    for name, group in grouped(rows, budget=False):
        errors = np.array([one["predicted_percent"] - one["rise_percent"] for one in group])
        off, bias = float(np.abs(errors).mean()), float(errors.mean())
        used = sum(one["held_percent"] > one["budget_percent"] / 2 for one in group)
        checks += [
            stated(f"{name}: mean |predicted - measured rise|", off, "points", len(group)),
            stated(f"{name}: mean predicted - measured rise", bias, "points", len(group)),
            stated(f"{name}: plans that use half their budget", used, "plans", len(group)),
        ]
    return checks
