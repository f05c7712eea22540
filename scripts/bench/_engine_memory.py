"""Does a long run's memory grow, and does any stage use more than its plan says?

Two stages of one process each run for `--minutes`; their resident memory is read every second from
the first result on. Growth: the median of the last tenth of the run over that of its second tenth
(the first one is for warming up), less one, of the process that grew most; the process that starts
the workers counts too. The caps are what the planner predicts for the plan and 5 %, as near as
predictions are meant to be; the report tells what each stage has had at most.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from _common import Check
from _engine_common import (
    ROOT,
    CommandError,
    Part,
    Rows,
    Settings,
    Sizes,
    Target,
    command_line,
    environment,
    hand_plan,
    last_words,
    llmpq,
    outcome,
    run_files,
    run_plan,
    say,
)

from llmpq.artifact import write_json
from llmpq.cluster import MIB
from llmpq.plan_data import Plan
from llmpq.prompts.request import Request

GROWTH = Target("6: growth of resident memory after warming up", "%", "<= 1")
PEAK = Target("6: most memory that a stage accounts for, of its plan's cap", "%", "<= 100")
MODEL, MOST_TOKENS = "tale-llama-11m", 256
SIZES = Sizes(stages=2, batch=16, prefill=4, decode=8)
TRIAL_REQUESTS, QUICK_TRIAL_REQUESTS = 400, 60
QUICK_TIMES = 4  # that so many requests are served
CAP_FACTOR = 1.05  # over what is predicted
EVERY_S, SAY_EVERY = 1.0, 30
LEAST_SAMPLES = 10


@dataclass
class Samples:
    """Resident bytes of each process over time; `names` says who is who."""

    of: dict[int, list[int]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)

    def add(self, process: psutil.Process) -> None:
        """Now; a process that has just ended is left out."""
        try:
            resident = process.memory_info().rss
            if process.pid not in self.of:
                rank = process.environ().get("RANK")
                self.names[process.pid] = "parent" if rank is None else f"worker {rank}"
                self.of[process.pid] = []
        except psutil.Error:
            return
        self.of[process.pid].append(resident)


def run(settings: Settings) -> tuple[list[Check], Rows]:
    """A trial to know the speed, then the long run."""
    trial = settings.requests(
        MODEL, QUICK_TRIAL_REQUESTS if settings.quick else TRIAL_REQUESTS, MOST_TOKENS
    )
    plan = capped_plan(settings, trial)
    times = QUICK_TIMES if settings.quick else times_in(settings, plan, trial)
    samples, report = watched_run(settings.folder, plan, repeated(trial, times))
    return checks(plan, samples, report), [
        *(process_row(samples, pid) for pid in samples.of),
        {"total_s": report["total_s"], "requests": report["num_requests"]},
        *(stage_row(*pair) for pair in zip(plan.stages, report["stages"], strict=True)),
    ]


def times_in(settings: Settings, plan: Plan, requests: Sequence[Request]) -> int:
    """How often the requests are served in the minutes asked for."""
    say("a trial, for the speed")
    report = run_plan(settings.folder, plan, requests, "--ignore-eos").report
    times = max(1, round(60 * settings.minutes / float(report["total_s"])))
    say(f"{times * len(requests)} requests, about {settings.minutes:g} minutes")
    return times


def repeated(requests: Sequence[Request], times: int) -> list[Request]:
    """The same lengths again and again."""
    count = len(requests)
    return [
        Request(
            number, number, requests[number % count].prompt, requests[number % count].new_tokens
        )
        for number in range(times * count)
    ]


def capped_plan(settings: Settings, requests: Sequence[Request]) -> Plan:
    """Two stages that may have little more than is predicted for them."""
    model, folder = settings.model(MODEL), settings.folder
    plan = hand_plan(model, requests, SIZES)  # on cards, so that no profile is needed
    paths = {name: folder / f"{name}.json" for name in ("uncapped", "priced")}
    cluster = folder / "uncapped.yaml"
    write_json(paths["uncapped"], plan)
    cluster.write_text(plan.cluster.model_dump_json())
    workload = folder / "uncapped-workload.yaml"
    workload.write_text(plan.workload.model_dump_json())
    inputs = ["--model", model, "--cluster", cluster, "--workload", workload]
    llmpq("plan", *inputs, "--evaluate", paths["uncapped"], "--json", paths["priced"])
    stages = json.loads(paths["priced"].read_text())["predicted"]["stages"]
    caps = [CAP_FACTOR * stage["peak_memory_bytes"] / MIB for stage in stages]
    return hand_plan(model, requests, SIZES, memory_mib=caps)


def watched_run(
    folder: Path, plan: Plan, requests: Sequence[Request]
) -> tuple[Samples, dict[str, Any]]:
    """Runs the plan; memory every second from the first result on, and the report."""
    (folder / "out.jsonl").unlink(missing_ok=True)
    files = run_files(folder, plan, requests)
    line = command_line("run", *files, "--ignore-eos")
    with (folder / "errors.txt").open("w+") as errors:
        process = subprocess.Popen(line, cwd=ROOT, env=environment(1), stderr=errors)
        samples = watch(process, folder / "out.jsonl")
        if process.wait():
            errors.seek(0)
            raise CommandError(last_words(errors.read()))
    return samples, outcome(folder).report


def watch(process: "subprocess.Popen[bytes]", output: Path) -> Samples:
    """Until the run ends; what is read while it ends is left out."""
    samples, parent = Samples(), psutil.Process(process.pid)
    taken = 0
    while process.poll() is None:
        time.sleep(EVERY_S)
        if not output.exists() or not output.stat().st_size or process.poll() is not None:
            continue
        for one in (parent, *parent.children(recursive=True)):
            samples.add(one)
        taken += 1
        if taken % SAY_EVERY == 0:
            resident = sum(values[-1] for values in samples.of.values()) / MIB
            print(f"{taken} s: {resident:.1f} MiB resident", file=sys.stderr, flush=True)
    for values in samples.of.values():
        del values[-1:]
    return samples


# ---- what it comes to


def growth_percent(values: Sequence[float]) -> float:
    """Of the median of the last tenth over that of the second tenth."""
    tenth = max(1, len(values) // 10)
    before = statistics.median(values[tenth : 2 * tenth])
    return 100 * (statistics.median(values[-tenth:]) / before - 1)


def checks(plan: Plan, samples: Samples, report: dict[str, Any]) -> list[Check]:
    """Both targets."""
    shares = [100 * share for share in cap_shares(plan, report)]
    peak = PEAK.check(max(shares), max(shares) <= 100, len(shares))
    long = [values for values in samples.of.values() if len(values) >= LEAST_SAMPLES]
    if len(long) <= SIZES.stages:
        return [GROWTH.unknown("the run was too short"), peak]
    most = max(growth_percent(values) for values in long)
    return [GROWTH.check(most, most <= 1, min(map(len, long))), peak]


def cap_shares(plan: Plan, report: dict[str, Any]) -> list[float]:
    """Each stage's peak over its cap."""
    caps = [plan.cluster.rehearse[stage.devices[0]].memory_mib * MIB for stage in plan.stages]
    peaks = [stage["peak_memory_bytes"] for stage in report["stages"]]
    return [peak / cap for peak, cap in zip(peaks, caps, strict=True)]


def process_row(samples: Samples, pid: int) -> dict[str, Any]:
    """One process."""
    values = samples.of[pid]
    found = {"process": samples.names[pid], "samples": len(values)}
    if len(values) < LEAST_SAMPLES:
        return found
    marks = [round(values[len(values) * part // 10] / MIB, 2) for part in range(10)]
    ends = {"resident_mib_each_tenth": marks, "resident_mib_at_end": round(values[-1] / MIB, 2)}
    return found | {"growth_percent": growth_percent(values)} | ends


def stage_row(stage: Any, report: dict[str, Any]) -> dict[str, Any]:
    """One stage's account."""
    parts = ("weights_bytes", "cache_bytes", "activation_bytes", "buffer_bytes")
    peak = {"stage": stage.rank, "peak_memory_bytes": report["peak_memory_bytes"]}
    return peak | {part: report[part] for part in parts}


PART = Part((GROWTH, PEAK), run, needs_data=True)
