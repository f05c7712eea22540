"""Runs the steps of `scripts/gpu.sh` one after the other, each in a process and a time of its own.

A fresh process takes long before its first kernel where libraries lie on a cold disk. So all steps
of a part start at once, import what they need, and wait for their turn; only one of them computes.
A step may take `most_s`, less what later steps need at least; when its time is over, it and what it
started are ended, and its results so far stay. What happened goes to OUT/run.json after each step.

A trial runs all steps at the same time: it finds what fails and compiles kernels, and none of its
times is a measurement.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_environment import describe, environment, missing

ROOT = Path(__file__).resolve().parents[1]
TOTAL_S = 290.0
LEAST_S = 10.0  # a step that would get less is left out
OWN_END = 0.92  # the share of its time after which a step should end of its own accord
SCRATCH_BYTES = 12 * 2**30
RAM_DISK = Path("/dev/shm")


@dataclass(frozen=True)
class Slot:
    """A step's time: what is kept for it, and what it may take."""

    name: str
    least_s: float
    most_s: float


PARTS = {
    "1": (Slot("kernels", 50, 85), Slot("serving", 95, 135), Slot("tests", 70, 140)),
    "2": (Slot("experts", 25, 45), Slot("predictions", 120, 160), Slot("cluster", 100, 180)),
}
STEPS = {slot.name: slot for slots in PARTS.values() for slot in slots}
TRIAL = "trial"
AFTER = {"cluster": "predictions"}  # which step needs another one's result
WRITES = {name: [f"{name}.json"] for name in STEPS} | {
    "predictions": ["predictions.json", "profile.json"]
}


@dataclass(frozen=True)
class Outcome:
    """How a step ended. `code`: its exit code, negative for a signal; None: it did not run."""

    name: str
    code: int | None
    seconds: float
    limit_s: float
    note: str = ""


def slots_of(words: Sequence[str]) -> list[Slot]:
    """The steps that the command line asks for; raises `ValueError` for a word that is neither."""
    if TRIAL in words:
        return [Slot(name, 0.0, float("inf")) for name in STEPS]
    slots: list[Slot] = []
    for word in words:
        if word in PARTS:
            slots += PARTS[word]
        elif word in STEPS:
            slots.append(Slot(word, 0.0, float("inf")))
        else:
            raise ValueError(f"{word}: expected 1, 2, {TRIAL} or a step: {', '.join(STEPS)}")
    return slots


def limit_s(slots: Sequence[Slot], number: int, left_s: float) -> float:
    """Seconds for a step when `left_s` are left, so that each later one gets its least."""
    later = sum(slot.least_s for slot in slots[number + 1 :])
    return min(slots[number].most_s, max(left_s - later, min(left_s, slots[number].least_s)))


class StepProcess:
    """A step that waits for its turn."""

    def __init__(self, name: str, out: Path, scratch: Path, device: str) -> None:
        self.name = name
        own = scratch / name
        own.mkdir()
        words = [name, "--out", out, "--scratch", own, "--device", device]
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "gpu_steps.py"), *map(str, words)],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that it can be ended with all that it starts
        )

    def run(self, limit_s: float) -> Outcome:
        """Gives it its turn and waits for its end, or ends it."""
        start, note = time.monotonic(), ""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has failed already
            self._process.stdin.write(f"{OWN_END * limit_s}\n")
            self._process.stdin.close()
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            note = "its time was over"
        self.end()
        return Outcome(self.name, self._process.returncode, time.monotonic() - start, limit_s, note)

    def end(self) -> None:
        """Ends it and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def run_steps(
    slots: Sequence[Slot],
    steps: Sequence[StepProcess],
    until: float,
    record: Callable[[list[Outcome]], None],
) -> list[Outcome]:
    """Every step in its turn; `record` is called with all outcomes after each."""
    outcomes: list[Outcome] = []
    for number, step in enumerate(steps):
        seconds = limit_s(slots, number, until - time.monotonic())
        if seconds < LEAST_S:
            step.end()
            outcomes.append(Outcome(step.name, None, 0.0, seconds, "no time was left"))
        else:
            print(f"== {step.name}: {seconds:.0f} s at most", flush=True)
            outcomes.append(step.run(seconds))
        record(outcomes)
    return outcomes


def run_at_once(
    steps: Sequence[StepProcess], until: float, record: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """All steps at the same time, except those that need another one's result (`AFTER`)."""
    outcomes: list[Outcome] = []
    lock, ended = threading.Lock(), {step.name: threading.Event() for step in steps}

    def run(step: StepProcess) -> None:
        if before := AFTER.get(step.name):
            ended[before].wait()
        try:
            outcome = step.run(max(LEAST_S, until - time.monotonic()))
        finally:
            ended[step.name].set()  # else who waits for it would wait for ever
        with lock:
            outcomes.append(outcome)
            record(outcomes)

    with ThreadPoolExecutor(len(steps)) as pool:
        list(pool.map(run, steps))
    return outcomes


def write_run(path: Path, found: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """run.json: the environment, and each step's last outcome.

    Outcomes of earlier calls stay where they were of the same card; else they are left out.
    """
    before: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        old = json.loads(path.read_text())
        if all(old["environment"][key] == found[key] for key in ("device", "card", "cpu")):
            before = old["steps"]
    steps = before | {outcome.name: asdict(outcome) for outcome in outcomes}
    path.write_text(json.dumps({"environment": found, "steps": steps}, indent=1) + "\n")


def scratch_folder() -> Path:
    """$SCRATCH, or a new folder in main memory where that has room."""
    named = os.environ.get("SCRATCH")
    if named:
        Path(named).mkdir(parents=True, exist_ok=True)
    roomy = RAM_DISK.is_dir() and shutil.disk_usage(RAM_DISK).free > SCRATCH_BYTES
    where = named or (str(RAM_DISK) if roomy else None)
    return Path(tempfile.mkdtemp(prefix="llmpq-gpu-", dir=where))


def main() -> int:
    """The exit code: 0 if all steps succeeded, 1 if one did not, 2 if none could start."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("words", nargs="+", metavar="PART|STEP|trial")
    options = parser.parse_args()
    try:
        slots = slots_of(options.words)
    except ValueError as error:
        print(error)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends steps too
    scratch = scratch_folder()
    try:
        outcomes = run_here(slots, options.out, scratch, TRIAL in options.words)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for outcome in outcomes:
        code = "-" if outcome.code is None else outcome.code
        print(f"{outcome.name}: exit {code}, {outcome.seconds:.0f} s {outcome.note}".rstrip())
    return int(any(outcome.code != 0 for outcome in outcomes)) if outcomes else 2


def run_here(slots: Sequence[Slot], out: Path, scratch: Path, trial: bool) -> list[Outcome]:
    """Says what is here and runs the steps; none where something needed is missing."""
    until = time.monotonic() + float(os.environ.get("TOTAL_S", TOTAL_S))
    device = os.environ.get("DEVICE", "cuda")
    steps = [StepProcess(slot.name, out, scratch, device) for slot in slots]
    try:
        found = environment(device)
        print(describe(found), flush=True)
        if faults := missing(found):
            print("\n".join(faults))
            return []
        for path in (out / file for slot in slots for file in WRITES[slot.name]):
            path.unlink(missing_ok=True)  # of an earlier call, which this one stands for

        def record(outcomes: Sequence[Outcome]) -> None:
            write_run(out / "run.json", found, outcomes)

        if trial:
            return run_at_once(steps, until, record)
        return run_steps(slots, steps, until, record)
    finally:
        for step in steps:
            step.end()


if __name__ == "__main__":
    sys.exit(main())
