#!/usr/bin/env python
"""The planner against its targets: speed, proof, other methods, simulation, explanations.

Over the clusters of configs/planner-benchmark.yaml, with spec-sheet times, tensor parallelism
searched, and two kinds of sensitivity: the built-in prior (all layers alike) and one that differs
between layers (more at both ends and at random). One row a plan. Then 60 random rigs with uneven
lengths, as `llmpq-plan` plans them (`--part random`: those alone). `--quick`: one theta, the prior,
two rigs.
"""

import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import _planner_random
import numpy as np
import yaml
from _common import Benchmark, Check, arguments, finish, machine

from llmpq.cluster import load_cluster
from llmpq.costs.latency import device_times
from llmpq.costs.quality import QualityModel, prior_quality
from llmpq.errors import InfeasibleError
from llmpq.model_lookup import load_model_spec
from llmpq.plan_data import Plan
from llmpq.planner.evaluate import evaluate, to_assignment
from llmpq.planner.exact import solve
from llmpq.planner.fixes import fixes
from llmpq.planner.instance import make_instance
from llmpq.planner.planning import Options, make_plan, replan
from llmpq.planner.problem import Problem
from llmpq.planner.simulated import simulate
from llmpq.planner.solver import Solver
from llmpq.planner.value import objective
from llmpq.workload import load_workload, request_lengths

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
PRECISIONS = ("16", "8", "4", "3")
GAP, BIG_GAP = 0.005, 0.02
PLAIN_LIMIT_S, QUICK_PLAIN_LIMIT_S = 30.0, 3.0
SAME_GAP = 1e-7  # both ILPs are solved to it where their objectives are compared
FIX_LIMIT_S = 20.0
NUM_INFEASIBLE = 20
MAX_TENSOR_PARALLEL = 8


@dataclass(frozen=True)
class Case:
    """A cluster with what it is planned for."""

    cluster: str
    model: str
    workload: str
    thetas: tuple[float, ...]

    @property
    def is_paper(self) -> bool:
        """One of LLM-PQ's eleven."""
        return self.cluster[0].isdigit()


def cases() -> list[Case]:
    """Those of the configuration."""
    entries = yaml.safe_load((CONFIGS / "planner-benchmark.yaml").read_text())
    return [Case(**entry | {"thetas": tuple(entry["thetas"])}) for entry in entries]


def problem_of(case: Case, theta: float | None, uneven: bool, **changes: Any) -> Problem:
    """The planning problem; without a theta, within 1 % of perplexity."""
    spec = load_model_spec(str(CONFIGS / "models" / f"{case.model}.json"))
    cluster = load_cluster(CONFIGS / "clusters" / f"{case.cluster}.yaml")
    workload = load_workload(CONFIGS / "workloads" / f"{case.workload}.yaml")
    prior = prior_quality(spec.num_layers)
    quality = uneven_quality(prior) if uneven else prior
    problem = Problem(
        spec=spec,
        cluster=cluster,
        workload=workload,
        lengths=tuple(request_lengths(workload)),
        times={d.type: device_times(cluster, d.type, spec, []) for d in cluster.devices()},
        quality=quality,
        precisions=PRECISIONS,
        budget=quality.budget(1.0) if theta is None else math.inf,
        theta=theta or 0.0,
        max_tensor_parallel=MAX_TENSOR_PARALLEL,
    )
    return replace(problem, **changes)


def uneven_quality(prior: QualityModel) -> QualityModel:
    """The prior, times a factor for each layer: more at both ends, and half as much at random."""
    layers = len(prior.omega["16"])
    depth = np.abs(np.linspace(-1, 1, layers))
    factor = (0.5 + depth**2) * np.exp(np.random.default_rng(0).normal(0, 0.5, layers))
    factor /= factor.mean()
    omega = {
        p: [float(v * f) for v, f in zip(row, factor, strict=True)]
        for p, row in prior.omega.items()
    }
    return QualityModel(omega, prior.scale, "uneven prior")


# ---- 1: proof and speed


def proofs(quick: bool) -> Iterator[dict[str, Any]]:
    """A row for each cluster, theta and kind of sensitivity."""
    for case in cases():
        for theta in case.thetas[1:2] if quick else case.thetas:
            for uneven in (False,) if quick else (False, True):
                yield proof(case, theta, uneven)


def proof(case: Case, theta: float, uneven: bool) -> dict[str, Any]:
    """One full search without simulations: bound and gap are those of the closed form."""
    start = time.monotonic()
    options = Options(gap=GAP, time_limit_s=60, compare=False, simulate=False)
    plan = replan(problem_of(case, theta, uneven), options)
    row = {"cluster": case.cluster, "theta": theta, "uneven": uneven}
    return row | {"seconds": time.monotonic() - start} | figures(plan)


def figures(plan: Plan) -> dict[str, Any]:
    """What a row says of a plan."""
    predicted = plan.predicted
    assert predicted is not None
    return {
        "gap": predicted.gap,
        "objective": predicted.objective,
        "tokens_per_s": predicted.tokens_per_s,
        "quality_loss_percent": predicted.quality_loss_percent,
        "batch": plan.batch,
        "micro_batches": [plan.prefill_micro_batch, plan.decode_micro_batch],
        "stages": [f"{s.tensor_parallel}x{s.devices[0]}:{s.num_layers}" for s in plan.stages],
    }


def proof_checks(rows: list[dict[str, Any]]) -> list[Check]:
    """Median and worst over the eleven, and whether the gap was always proven."""
    paper = [row for row in rows if row["cluster"][0].isdigit()]
    seconds = [row["seconds"] for row in paper]
    worst = max(row["gap"] for row in paper)
    count = len(paper)
    return [
        Check(
            "1a gap, worst of the eleven", 100 * worst, "%", "<= 0.5", worst <= GAP + 1e-9, count
        ),
        Check("1b search, median", median(seconds), "s", "<= 2", median(seconds) <= 2, count),
        Check("1c search, worst", max(seconds), "s", "<= 15", max(seconds) <= 15, count),
    ]


def large(quick: bool) -> list[dict[str, Any]]:
    """64 devices of 4 types, 80 layers; batch chosen and pinned."""
    case = Case("64-gpus-4-types", "llama-3.3-70b", "paper-512-100", (30.0,))
    rows = []
    for batch in (64,) if quick else ("auto", 64):
        base = problem_of(case, case.thetas[0], uneven=False)
        job = base.workload.model_copy(update={"num_requests": 1000, "batch": batch})
        problem = replace(base, workload=job, lengths=tuple(request_lengths(job)), _known={})
        start = time.monotonic()
        options = Options(gap=BIG_GAP, time_limit_s=60, compare=False, simulate=False)
        plan = replan(problem, options)
        row = {
            "cluster": f"{case.cluster}, batch {batch}",
            "theta": case.thetas[0],
            "uneven": False,
        }
        rows.append(row | {"seconds": time.monotonic() - start} | figures(plan))
    return rows


def large_checks(rows: list[dict[str, Any]]) -> list[Check]:
    """Time, gap, and how many groups the plans have."""
    seconds, gap = max(r["seconds"] for r in rows), max(r["gap"] for r in rows)
    groups = min(len(r["stages"]) for r in rows)
    return [
        Check("1d 64 devices, search", seconds, "s", "<= 60", seconds <= 60, len(rows)),
        Check("1e 64 devices, gap", 100 * gap, "%", "<= 2", gap <= BIG_GAP + 1e-9, len(rows)),
        Check("1f 64 devices, groups in the plan", groups, "", ">= 16", groups >= 16, len(rows)),
    ]


# ---- 2: the plain ILP


def against_plain(quick: bool) -> list[dict[str, Any]]:
    """Both ILPs on the same instance: the order and micro-batches of our plan."""
    rows = []
    for case in cases():
        for uneven in (False,) if quick else (False, True):
            rows.append(beside_plain(case, uneven, QUICK_PLAIN_LIMIT_S if quick else PLAIN_LIMIT_S))
    return rows


def beside_plain(case: Case, uneven: bool, limit: float) -> dict[str, Any]:
    """Seconds, status and objective of both."""
    problem = problem_of(case, case.thetas[1], uneven=uneven, max_tensor_parallel=1)
    plan = replan(problem, Options(gap=GAP, time_limit_s=20, compare=False))
    instance = make_instance(problem, to_assignment(plan, problem.cluster).configuration)
    row: dict[str, Any] = {"plain_programme": case.cluster, "uneven": uneven}
    for name, plain in (("ours", False), ("plain", True)):
        start = time.monotonic()
        found = solve(instance, Solver(), gap=SAME_GAP, time_limit=limit, plain=plain)
        row[f"{name}_s"] = time.monotonic() - start
        row[f"{name}_status"] = found.status
        row[f"{name}_objective"] = objective(instance, found.choice) if found.choice else math.inf
    return row


def plain_checks(rows: list[dict[str, Any]]) -> list[Check]:
    """Never worse, and how many times faster; a plain solve that ended early counts its limit."""
    over = max(r["ours_objective"] / r["plain_objective"] - 1 for r in rows)
    ratio = median(r["plain_s"] / r["ours_s"] for r in rows)
    count = len(rows)
    return [
        Check(
            "2a objective above the plain one's", over, "relative", "<= 1e-6", over <= 1e-6, count
        ),
        Check("2b times faster, median", ratio, "x", ">= 10", ratio >= 10, count),
    ]


# ---- 3, 4: brute force


def brute_force_checks() -> list[Check]:
    """Runs the property test: 300 random instances, optimum, verdict and bound."""
    names = "test_the_optimum_and_the_verdict_are_those_of_brute_force"
    command = [sys.executable, "-m", "pytest", "-q", "tests/unit/test_exact.py", "-k", names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    held = done.returncode == 0
    why = "" if held else done.stdout[-300:]
    return [
        Check("3 brute force: optimum and verdict", float(held), "", "300 of 300", held, 300, why),
        Check("4 bound never above the optimum", float(held), "", "300 of 300", held, 300, why),
    ]


# ---- 5: moves


def moves(found: dict[str, float]) -> list[dict[str, Any]]:
    """The heuristic beside the proven optimum, at the middle theta. `found`: objectives."""
    rows = []
    for case in cases():
        problem = problem_of(case, case.thetas[1], uneven=False)
        start = time.monotonic()
        options = Options(method="heuristic", compare=False, time_limit_s=1.0)
        plan = make_plan(problem, options, PRECISIONS).plan
        seconds = time.monotonic() - start
        assert plan.predicted is not None
        above = plan.predicted.objective / found[case.cluster] - 1
        rows.append({"heuristic": case.cluster, "seconds": seconds, "above": above})
    return rows


def moves_checks(rows: list[dict[str, Any]]) -> list[Check]:
    """Median distance and worst time."""
    above, worst = median(r["above"] for r in rows), max(r["seconds"] for r in rows)
    return [
        Check(
            "5a heuristic above the optimum, median",
            100 * above,
            "%",
            "<= 3",
            above <= 0.03,
            len(rows),
        ),
        Check("5b heuristic, slowest", worst, "s", "< 1", worst < 1, len(rows)),
    ]


# ---- 6: simulation


def simulations(quick: bool) -> list[dict[str, Any]]:
    """Closed form against simulated seconds: our plans, and those with other micro-batches.

    Of as many requests as are in flight: what refilling changes is in the fidelity benchmark.
    """
    rows = []
    for case in cases():
        problem = problem_of(case, case.thetas[1], uneven=True)
        plan = replan(problem, Options(gap=0.02, time_limit_s=10, compare=False))
        assignment = to_assignment(plan, problem.cluster)
        sizes = [
            (plan.prefill_micro_batch, plan.decode_micro_batch),
            (3, 5),
            (2, plan.batch),
            (1, 1),
        ]
        for prefill, decode in sizes[:1] if quick else sizes:
            if max(prefill, decode) > plan.batch:
                continue
            pair = {"prefill_micro_batch": prefill, "decode_micro_batch": decode}
            setting = assignment.configuration.resized(**pair)
            changed = replace(assignment, configuration=setting)
            predicted = evaluate(problem, changed).total_s
            simulated = simulate(problem, changed).total_s
            rows.append(
                {
                    "simulated": case.cluster,
                    "micro_batches": [prefill, decode],
                    "stages": len(setting.stage_devices),
                    "predicted_s": predicted,
                    "simulated_s": simulated,
                    "error": predicted / simulated - 1,
                }
            )
    return rows


def simulation_checks(rows: list[dict[str, Any]]) -> list[Check]:
    """The largest error."""
    worst = max(abs(r["error"]) for r in rows)
    return [
        Check("6 predicted against simulated", 100 * worst, "%", "<= 1", worst <= 0.01, len(rows))
    ]


# ---- 7: the command


def command_checks(profile_s: int) -> list[Check]:
    """Process time of `llmpq-plan` on the quickstart's cluster, from a profile made here."""
    name, target = "7 llmpq-plan, process time", "< 1.5"
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profiles" / "cpu.json"
        command = [sys.executable, "-m", "llmpq.cli.profile", "layers", "--device", "cpu"]
        command += ["--threads", "1", "--budget-s", str(profile_s), "--precisions", "16,8,4,3"]
        made = subprocess.run([*command, "-q", "-o", str(profile)], cwd=ROOT, capture_output=True)
        if made.returncode:
            return [Check(name, None, "s", target, None, 0, "no profile: llmpq[run] is missing")]
        seconds = [plan_seconds(profile.parent) for _ in range(3)]
    return [Check(name, median(seconds), "s", target, median(seconds) < 1.5, len(seconds))]


def plan_seconds(profiles: Path) -> float:
    """User and system seconds of one run of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "llmpq.cli.plan", "--profiles", str(profiles)]
    command += ["--cluster", str(CONFIGS / "clusters" / "rehearsal-3.yaml")]
    command += ["--workload", str(CONFIGS / "workloads" / "quickstart.yaml")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# ---- 8: nothing fits


def infeasible_problems() -> Iterator[tuple[str, Problem]]:
    """Too large a model, too many requests, too tight a quality, too few precisions."""
    paper = [case for case in cases() if case.is_paper]
    for case in paper:
        base = problem_of(case, None, uneven=False, max_tensor_parallel=1)
        nodes = [
            n.model_copy(update={"devices": [smaller(g) for g in n.devices]})
            for n in base.cluster.nodes
        ]
        cluster = base.cluster.model_copy(update={"nodes": nodes})
        yield f"{case.cluster}: a fifth of the memory", replace(base, cluster=cluster, _known={})
    for case in paper:
        base = problem_of(case, None, uneven=False, max_tensor_parallel=1)
        crowd = base.workload.model_copy(update={"batch": 4096, "num_requests": 4096})
        lengths = tuple(request_lengths(crowd))
        yield (
            f"{case.cluster}: 4096 in flight",
            replace(base, workload=crowd, lengths=lengths, _known={}),
        )


def smaller(group: Any) -> Any:
    """The same devices with a fifth of their memory."""
    from llmpq.devices import device_library

    gib = group.memory_gib or device_library()[group.type].memory_gib
    return group.model_copy(update={"memory_gib": gib / 5})


def infeasible_rows(quick: bool) -> list[dict[str, Any]]:
    """For each that does not fit: its fixes, each planned again."""
    rows: list[dict[str, Any]] = []
    options = Options(gap=0.05, time_limit_s=3.0, compare=False)
    for name, problem in infeasible_problems():
        if quick and len(rows) >= 4:
            break
        if fits(problem, options):
            continue
        start = time.monotonic()
        found = fixes(
            problem, PRECISIONS, lambda changed: replan(changed, options), start + FIX_LIMIT_S
        )
        seconds = time.monotonic() - start
        verified = sum(fits(fix.problem, options) for fix in found)
        rows.append(
            {
                "infeasible": name,
                "fixes": [str(fix) for fix in found],
                "verified": verified,
                "seconds": seconds,
            }
        )
    return rows


def fits(problem: Problem, options: Options) -> bool:
    """There is a plan."""
    try:
        replan(problem, options)
    except InfeasibleError:
        return False
    return True


def infeasible_checks(rows: list[dict[str, Any]]) -> list[Check]:
    """Every case has fixes and every fix plans."""
    good = sum(bool(r["fixes"]) and r["verified"] == len(r["fixes"]) for r in rows)
    name, few = "8 infeasible cases with verified fixes", len(rows) < NUM_INFEASIBLE
    holds = None if few and good == len(rows) else good == len(rows)
    why = f"only {len(rows)} cases looked at" if few else ""
    return [Check(name, good, f"of {len(rows)}", "all of 20", holds, len(rows), why)]


def main() -> None:
    """Runs all checks."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--part", choices=("all", "random"), default="all")
    parser.add_argument("--rigs", type=int, default=60, help="random ones")
    given = parser.parse_args()
    result = Benchmark("planner", machine())
    if given.part == "all":
        configured(result, given.quick)
    found = list(_planner_random.rows(2 if given.quick else given.rigs))
    same = [] if given.quick else list(_planner_random.same_plan_rows())
    result.rows += found + same
    result.checks += _planner_random.checks(found, same)
    finish(result, given.json)


def configured(result: Benchmark, quick: bool) -> None:
    """Everything that is asked of the configured clusters."""
    proven = list(proofs(quick))
    result.rows += proven
    result.checks += proof_checks(proven)
    big = large(quick)
    result.rows += big
    result.checks += large_checks(big)
    plain = against_plain(quick)
    result.rows += plain
    result.checks += plain_checks(plain)
    result.checks += brute_force_checks()
    middle = {c.cluster: c.thetas[1] for c in cases()}
    best = {
        row["cluster"]: row["objective"]
        for row in proven
        if row["theta"] == middle[row["cluster"]] and not row["uneven"]
    }
    moved = moves(best)
    result.rows += moved
    result.checks += moves_checks(moved)
    simulated = simulations(quick)
    result.rows += simulated
    result.checks += simulation_checks(simulated)
    result.checks += command_checks(10 if quick else 30)
    stuck = infeasible_rows(quick)
    result.rows += stuck
    result.checks += infeasible_checks(stuck)


if __name__ == "__main__":
    main()
