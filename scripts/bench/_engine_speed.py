"""How busy a pipeline is, what refilling gains, how near the prediction is.

The pipeline is rehearsed: three unequal devices, simulated by CPU processes. A profile of this
machine is measured first, `llmpq-plan` makes the plan from it, and the same requests then run with
and without refill in turn, all tokens generated.

Order of requests: with refill longest outputs first, as far as the schedule looks ahead; without,
batches of like prompts, longest first, each run until its last request has ended.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from _common import Check
from _engine_common import Part, Rows, Settings, Target, llmpq, run_plan, say, workload_of

from llmpq.plan_data import Plan, load_plan
from llmpq.prompts.request import Request

BUSY = Target("2: busiest stage computing, of the run's time", "%", ">= 90")
REFILL = Target("2: throughput over the same engine without refill", "x", ">= 1.5")
PREDICTED = Target("2: throughput over the simulator's prediction", "x", ">= 0.95")
MODEL = "tale-llama-11m"
SLOWDOWNS = {"fast": 1.6, "medium": 2.5, "slow": 4.0}  # 1.3 cores
ORDERS = {True: "longest outputs first", False: "batches of like prompts, longest first"}


@dataclass(frozen=True)
class Scale:
    """How much is run. `most_tokens`: of the longest request, None: as the model allows.

    `memory_mib` of each device: too little for the whole model with many requests on one of them.
    `batch`: requests in flight, where the planner shall not choose.
    """

    requests: int
    most_tokens: int | None
    rounds: int
    memory_mib: tuple[float, ...]
    batch: int | str
    profile: str


FULL_GRID = "--budget-s 120 --prompt-tokens 16,128,512,1024 --past-tokens 16,256,1024,1600"
QUICK_GRID = "--budget-s 8 --prompt-tokens 16,64 --past-tokens 16,96"
FULL = Scale(500, None, 3, (96, 64, 48), "auto", FULL_GRID)
QUICK = Scale(24, 96, 1, (14, 11, 8), 8, QUICK_GRID)


def run(settings: Settings) -> tuple[list[Check], Rows]:
    """Profile, plan, then the runs in turn."""
    scale = QUICK if settings.quick else FULL
    requests = settings.requests(MODEL, scale.requests, scale.most_tokens)
    path = make_plan(settings, scale, requests)
    reports = run_in_turn(settings.folder, path, requests, scale.rounds)
    return checks(reports), [plan_row(load_plan(path)), *(run_row(*r) for r in reports)]


def make_plan(settings: Settings, scale: Scale, requests: Sequence[Request]) -> Path:
    """By llmpq-plan, from a profile of now."""
    folder, model = settings.folder, ["--model", settings.model(MODEL)]
    say("profiling")
    profiles = folder / "profiles"
    grid = ["--precisions", "16,8", "--prefill-micro-batches", "1,2,4,8"]
    grid += ["--decode-micro-batches", "1,4,8,16,32", *scale.profile.split()]
    where = ["--device", "cpu", "--threads", "1", "-o", profiles / "cpu.json"]
    llmpq("profile layers", *model, *grid, *where)
    say("planning")
    cluster = write_yaml(folder / "cluster.yaml", cluster_of(scale.memory_mib))
    batch = {"batch": scale.batch}
    workload = write_yaml(folder / "workload.yaml", workload_of(requests) | batch)
    inputs = ["--cluster", cluster, "--workload", workload, "--profiles", profiles]
    plan = folder / "planned.json"
    llmpq("plan", *model, *inputs, "--no-compare", "--no-what-if", "-o", plan)
    return plan


def cluster_of(memory_mib: Sequence[float]) -> dict[str, Any]:
    """cluster.yaml of one machine with a rehearsed device of each type."""
    devices = zip(SLOWDOWNS.items(), memory_mib, strict=True)
    link = {"bandwidth_gbs": 1.0, "latency_us": 800}  # gloo between processes that wait for a core
    return {
        "name": "rehearsal",
        "nodes": [{"name": "here", "devices": [{"type": t} for t in SLOWDOWNS], "link": link}],
        "rehearse": {
            name: {"slowdown": factor, "memory_mib": mib} for (name, factor), mib in devices
        },
    }


def write_yaml(path: Path, value: dict[str, Any]) -> Path:
    """Any of the inputs."""
    path.write_text(yaml.safe_dump(value))
    return path


def run_in_turn(
    folder: Path, plan: Path, requests: Sequence[Request], rounds: int
) -> list[tuple[bool, dict[str, Any]]]:
    """(with refill, its report) of every run; the order changes from round to round."""
    reports = []
    for number in range(rounds):
        for refill in (True, False) if number % 2 == 0 else (False, True):
            flags = ["--ignore-eos", *([] if refill else ["--no-refill"])]
            report = run_plan(folder, plan, requests, *flags).report
            expected = sum(request.new_tokens for request in requests)
            assert report["num_new_tokens"] == expected, "other tokens than asked for"
            say(f"refill {refill}: {report['tokens_per_s']:.1f} tokens/s")
            reports.append((refill, report))
    return reports


def checks(reports: Sequence[tuple[bool, dict[str, Any]]]) -> list[Check]:
    """The three targets, from medians over rounds."""
    refilled = [report for refill, report in reports if refill]
    plain = [report for refill, report in reports if not refill]
    rounds, speed = len(refilled), median(refilled, "tokens_per_s")
    busy = 100 * statistics.median(busiest_share(report) for report in refilled)
    gain = speed / median(plain, "tokens_per_s")
    predicted = speed / refilled[0]["predicted"]["tokens_per_s"]
    return [
        BUSY.check(busy, busy >= 90, rounds),
        REFILL.check(gain, gain >= 1.5, rounds),
        PREDICTED.check(predicted, predicted >= 0.95, rounds),
    ]


def busiest_share(report: dict[str, Any]) -> float:
    """Of the stage that computes longest, of the time from the first prefill to the last token."""
    return max(float(stage["busy_share"]) for stage in report["stages"])


def median(reports: Sequence[dict[str, Any]], key: str) -> float:
    """Of a number that every report has."""
    return statistics.median(float(report[key]) for report in reports)


def plan_row(plan: Plan) -> dict[str, Any]:
    """What was planned."""
    predicted = plan.predicted
    assert predicted is not None
    return {
        "stages": [[s.devices[0], s.first_layer, s.end_layer, s.precisions] for s in plan.stages],
        "batch": plan.batch,
        "micro_batches": [plan.prefill_micro_batch, plan.decode_micro_batch],
        "predicted_tokens_per_s": predicted.tokens_per_s,
        "slowdowns": SLOWDOWNS,
    }


def run_row(refill: bool, report: dict[str, Any]) -> dict[str, Any]:
    """A run."""
    times = ("busy_prefill_s", "busy_decode_s", "idle_s", "comm_s", "busy_share")
    return {
        "refill": refill,
        "order": ORDERS[refill],
        "requests": report["num_requests"],
        "new_tokens": report["num_new_tokens"],
        "tokens_per_s": report["tokens_per_s"],
        "total_s": report["total_s"],
        "stages": [{key: stage[key] for key in times} for stage in report["stages"]],
    }


PART = Part((BUSY, REFILL, PREDICTED), run, needs_data=True)
