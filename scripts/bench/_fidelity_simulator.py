"""The simulator against real runs: random plans of the shipped model on rehearsed clusters.

A profile of this machine first; then plans that nobody optimised: random clusters of 2 to 4
rehearsed devices, cuts, precisions, batches, micro-batches and unequal lengths. Each is run once as
real processes, all tokens generated, and its total time compared with what the simulator and the
closed form say from that profile. More random plans, not run, compare these two with each other.
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from _common import Check
from endtoend import llmpq

from llmpq.artifact import write_json
from llmpq.cluster import Cluster, load_cluster
from llmpq.costs.latency import device_times
from llmpq.costs.quality import prior_quality
from llmpq.model_lookup import DEFAULT_MODEL, load_model_spec
from llmpq.planner.bubbles import find_bubbles
from llmpq.planner.evaluate import evaluate, to_plan
from llmpq.planner.problem import Assignment, Configuration, Problem, StageDevices
from llmpq.planner.simulated import simulate
from llmpq.profile_data import Profile, load_profiles
from llmpq.workload import Workload, request_lengths

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GRID = (
    "--precisions 16,8,4,3 --prefill-micro-batches 1,2,4,8 --decode-micro-batches 1,2,4,8 "
    "--prompt-tokens 16,112 --past-tokens 16,128"
)
PRECISIONS = ("16", "8", "4", "3")
MAX_CORES = 1.6  # that rehearsed workers keep busy, of two
RUN_S = (3.0, 6.0)  # of generation, as simulated
NUM_REQUESTS = (6, 40)
MAX_NEW = 24
MAX_MEDIAN_PERCENT = 10.0
MAX_CLOSED_PERCENT = 15.0  # what `costs.timeline` says of itself for uneven lengths, about
MAX_64_STAGES_S = 10.0
NUM_UNRUN = 40


@dataclass(frozen=True)
class Case:
    """A random plan and its problem."""

    problem: Problem
    assignment: Assignment

    def simulated_s(self) -> float:
        """Seconds of the whole run."""
        return simulate(self.problem, self.assignment).total_s

    def with_busy_times(self, factors: list[float]) -> "Case":
        """The same plan on stages so many times slower; each has a device type of its own."""
        types = [place.type for place in self.assignment.configuration.stage_devices]
        pairs = zip(types, factors, strict=True)
        times = {name: self.problem.times[name].scaled(factor) for name, factor in pairs}
        return Case(replace(self.problem, times=times, _known={}), self.assignment)

    def closed_s(self) -> float:
        """Seconds by the closed form."""
        return evaluate(self.problem, self.assignment).total_s


def run(quick: bool, device: str) -> tuple[list[Check], list[dict[str, Any]]]:
    """The checks of the simulator, and a row a plan."""
    with tempfile.TemporaryDirectory(prefix="llmpq-simulator-") as name:
        folder = Path(name)
        profiles = make_profile(quick, device, folder)
        rng = np.random.default_rng(0)
        cases = [random_case(rng, profiles) for _ in range(2 if quick else 10)]
        rows = [measured_row(case, device, folder) for case in cases]
        rows += [row(random_case(rng, profiles)) for _ in range(NUM_UNRUN)]
    speed = speed_row()
    return [*run_checks(rows), *closed_form_checks(rows), speed_check(speed)], [*rows, speed]


def make_profile(quick: bool, device: str, folder: Path) -> list[Profile]:
    """This machine's layers, measured now."""
    threads = [] if device == "cuda" else ["--threads", "1"]
    where = ["--device", device, "-o", folder / "profiles" / "device.json"]
    budget = "20" if quick else "45"
    llmpq("profile", "layers", *threads, "--budget-s", budget, *GRID.split(), *where)
    return load_profiles(folder / "profiles")


# ---- random plans


def random_case(rng: np.random.Generator, profiles: list[Profile]) -> Case:
    """A plan that takes some seconds to run."""
    while True:
        cluster, requests = random_cluster(rng), int(rng.integers(*NUM_REQUESTS))
        case = with_requests(rng, cluster, profiles, requests)
        if RUN_S[0] <= case.simulated_s() <= RUN_S[1]:
            return case


def random_cluster(rng: np.random.Generator) -> Cluster:
    """2 to 4 rehearsed devices, the links those of the shipped rehearsal."""
    count = int(rng.integers(2, 5))
    while True:
        slowdowns = rng.uniform(3, 10, count)
        if (1 / slowdowns).sum() <= MAX_CORES:
            break
    shipped = load_cluster(CONFIGS / "clusters" / "rehearsal-3.yaml")
    roles = [{"slowdown": round(float(s), 2), "memory_mib": 256} for s in slowdowns]
    return Cluster.model_validate(
        {
            "name": "random",
            "nodes": [
                {
                    "name": "here",
                    "devices": [{"type": f"d{i}"} for i in range(count)],
                    "link": shipped.nodes[0].link.model_dump(),
                }
            ],
            "rehearse": {f"d{i}": role for i, role in enumerate(roles)},
        }
    )


def with_requests(
    rng: np.random.Generator, cluster: Cluster, profiles: list[Profile], requests: int
) -> Case:
    """Random sizes, cuts, precisions and lengths."""
    spec = load_model_spec(DEFAULT_MODEL)
    prompts, new = (rng.integers(4, high, requests).tolist() for high in (113, MAX_NEW + 1))
    workload = Workload(
        name="random",
        prompt_tokens=tuple(prompts),
        new_tokens=tuple(new),
        num_requests=requests,
    )
    devices = cluster.devices()
    problem = Problem(
        spec=spec,
        cluster=cluster,
        workload=workload,
        lengths=tuple(request_lengths(workload)),
        times={d.type: device_times(cluster, d.type, spec, profiles) for d in devices},
        quality=prior_quality(spec.num_layers),
        precisions=PRECISIONS,
    )
    batch = min(requests, int(rng.integers(3, 17)))
    prefill, decode = (min(batch, int(2 ** rng.integers(0, most))) for most in (4, 4))
    places = tuple(StageDevices(d.node, d.type, d.memory_bytes) for d in devices)
    cuts = sorted(rng.choice(np.arange(1, spec.num_layers), len(places) - 1, replace=False))
    bits = [str(p) for p in rng.choice(PRECISIONS, spec.num_layers)]
    stages = tuple(tuple(bits[a:b]) for a, b in pairwise((0, *map(int, cuts), spec.num_layers)))
    return Case(problem, Assignment(Configuration(places, batch, prefill, decode), stages))


# ---- one plan


def row(case: Case) -> dict[str, Any]:
    """What is predicted of a plan."""
    setting = case.assignment.configuration
    return {
        "stages": len(setting.stage_devices),
        "requests": len(case.problem.lengths),
        "batch": setting.batch,
        "micro_batches": [setting.prefill_micro_batch, setting.decode_micro_batch],
        "simulated_s": case.simulated_s(),
        "closed_form_s": case.closed_s(),
        "simulated_without_refill_s": simulate(case.problem, case.assignment, refill=False).total_s,
    }


def measured_row(case: Case, device: str, folder: Path) -> dict[str, Any]:
    """The same, and what a real run of it took."""
    write_json(folder / "plan.json", case_plan(case))
    write_prompts(case, folder / "prompts.jsonl")
    files = ["--plan", folder / "plan.json", "--prompts", folder / "prompts.jsonl"]
    files += ["--output", folder / "out.jsonl", "--report", folder / "report.json"]
    llmpq("run", *files, "--ignore-eos", "--device", device)
    report = json.loads((folder / "report.json").read_text())
    expected = case.problem.num_new_tokens
    assert report["num_new_tokens"] == expected, "the run generated other lengths than planned"
    stages = report["stages"]
    busy = [stage["busy_prefill_s"] + stage["busy_decode_s"] for stage in stages]
    whole = simulate(case.problem, case.assignment)
    factors = (np.array(busy) / whole.busy_s[::2]).tolist()
    return row(case) | {
        "simulated_with_busy_times_s": case.with_busy_times(factors).simulated_s(),
        "measured_s": report["total_s"],
        "measured_busy_s": busy,
        "simulated_busy_s": whole.busy_s[::2].tolist(),
        "measured_prefill_s": report["prefill_s"],
        "simulated_prefill_s": whole.prefill_s,
    }


def case_plan(case: Case) -> Any:
    """As a plan file."""
    predicted = evaluate(case.problem, case.assignment)
    return to_plan(case.problem, case.assignment, "random", predicted)


def write_prompts(case: Case, path: Path) -> None:
    """Prompts of the workload's lengths, tokens at random."""
    rng = np.random.default_rng(1)
    vocab = case.problem.spec.vocab_size
    lines = [
        {
            "id": number,
            "prompt_token_ids": rng.integers(3, vocab, prompt).tolist(),
            "max_new_tokens": new,
        }
        for number, (prompt, new) in enumerate(case.problem.lengths)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---- checks


def percent_off(rows: list[dict[str, Any]], key: str, against: str) -> list[float]:
    """|key / against - 1| in percent, of the rows that have both."""
    return [100 * abs(r[key] / r[against] - 1) for r in rows if key in r and against in r]


def run_checks(rows: list[dict[str, Any]]) -> list[Check]:
    """Simulator and closed form against the runs."""
    errors = percent_off(rows, "simulated_s", "measured_s")
    closed = percent_off(rows, "closed_form_s", "measured_s")
    schedule = percent_off(rows, "simulated_with_busy_times_s", "measured_s")
    median = statistics.median(errors)
    target = f"<= {MAX_MEDIAN_PERCENT:g}"
    holds = median <= MAX_MEDIAN_PERCENT
    return [
        Check("simulator against runs, median", median, "%", target, holds, len(errors)),
        stated("simulator against runs, worst", max(errors), len(errors)),
        stated(
            "the same with the stages' busy times as measured, median",
            statistics.median(schedule),
            len(schedule),
        ),
        stated("closed form against runs, median", statistics.median(closed), len(closed)),
    ]


def closed_form_checks(rows: list[dict[str, Any]]) -> list[Check]:
    """The closed form against the simulator, which predicts runs; and what refilling saves."""
    whole = percent_off(rows, "closed_form_s", "simulated_s")
    saved = [100 * (1 - r["simulated_s"] / r["simulated_without_refill_s"]) for r in rows]
    median = statistics.median(whole)
    target, holds = f"<= {MAX_CLOSED_PERCENT:g}", median <= MAX_CLOSED_PERCENT
    return [
        Check("closed form against simulator, median", median, "%", target, holds, len(whole)),
        stated("the same, worst", max(whole), len(whole)),
        stated("refilling places saves, simulated, median", statistics.median(saved), len(saved)),
        stated("the same, least", min(saved), len(saved)),
    ]


def stated(name: str, value: float, samples: int) -> Check:
    """A figure without a target."""
    return Check(name, value, "%", "stated", None, samples, why="no target; the figure is stated")


def speed_row() -> dict[str, Any]:
    """1,000 requests of unequal lengths on 64 stages."""
    spec = load_model_spec(str(CONFIGS / "models" / "opt-66b.json"))
    cluster = load_cluster(CONFIGS / "clusters" / "64-gpus-4-types.yaml")
    workload = Workload(
        prompt_tokens={"min": 256, "max": 512},
        new_tokens={"min": 50, "max": 100},
        num_requests=1000,
    )
    devices = cluster.devices()[:64]
    problem = Problem(
        spec=spec,
        cluster=cluster,
        workload=workload,
        lengths=tuple(request_lengths(workload)),
        times={d.type: device_times(cluster, d.type, spec, []) for d in devices},
        quality=prior_quality(spec.num_layers),
        precisions=PRECISIONS,
    )
    places = tuple(StageDevices(d.node, d.type, d.memory_bytes) for d in devices)
    setting = Configuration(places, 64, 8, 8)
    assignment = Assignment(setting, (("8",),) * spec.num_layers)
    start = time.perf_counter()
    simulated = simulate(problem, assignment)
    find_bubbles(simulated)
    seconds = time.perf_counter() - start
    spans = simulated.start_s.size
    return {"stages": 64, "requests": 1000, "spans": spans, "simulation_s": seconds}


def speed_check(row: dict[str, Any]) -> Check:
    """Seconds to simulate a large run."""
    seconds = row["simulation_s"]
    name = f"1,000 requests on 64 stages simulated ({row['spans'] / 1e6:.1f} M spans)"
    return Check(name, seconds, "s", f"< {MAX_64_STAGES_S:g}", seconds < MAX_64_STAGES_S, 1)
