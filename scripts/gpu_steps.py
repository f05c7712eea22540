"""One step of `scripts/gpu.sh` in its own process: imports, waits for its turn, measures, writes.

`gpu_parts.py` starts it, writes to its standard input how many seconds it should take, and ends it
if it takes longer. Each result is written as soon as it is there, so that a step that is ended
leaves what it had. On a CPU all sizes are small: that tries out the steps and measures no card.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT / "scripts" / "bench"))  # of this process, not of those it starts

# What takes long to import is imported here, before the step's turn has come.
import _common  # noqa: E402, F401  hides its neighbour `kernels` from transformers
import gpu_cluster  # noqa: E402
from _kernels_alone import KERNELS, time_alone  # noqa: E402
from _kernels_experts import EXPERT_SHAPE, expert_duels  # noqa: E402
from _kernels_linears import subjects, time_linears  # noqa: E402
from _kernels_place import Deadline, Place, Timer, find_place, measure_ceilings  # noqa: E402
from _kernels_predictions import prediction, profile_layers, profiles_as  # noqa: E402
from _kernels_serving import (  # noqa: E402
    device_type,
    generate_with_transformers,
    plan_for,
    serve,
    traffic_of,
)

from llmpq.artifact import write_text  # noqa: E402

PRECISIONS = ("16", "4", "8", "3")  # the most wanted first
SERVED_AGAIN = ("16", "4")  # by part 2, where part 1 is not at hand
SERVE_S = 12.0  # what one more precision takes at least
PROFILE_S = {"cuda": 60, "cpu": 6}
MOST_OF_STEP = 0.4  # of the step's time for the profile, where that is less


@dataclass
class Step:
    """A step under way: where, until when, what it has found."""

    name: str
    place: Place
    out: Path
    scratch: Path
    deadline: Deadline
    found: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def write(self) -> None:
        """OUT/NAME.json, over what it held before."""
        data = {"device": self.place.name, "failures": self.failures} | self.found
        write_text(self.out / f"{self.name}.json", json.dumps(data, indent=1) + "\n")

    def keep(self, row: dict[str, Any]) -> None:
        """One more row, written at once and told in a line."""
        self.found.setdefault("rows", []).append(row)
        self.write()
        told = {k: v for k, v in row.items() if k not in ("kind", "plan")}
        print(row["kind"], " ".join(f"{k}={_short(v)}" for k, v in told.items()), flush=True)

    def attempt(self, what: str, act: Callable[[], object]) -> None:
        """Does it; a failure is noted, and stops nothing else."""
        try:
            act()
        except (Exception, SystemExit) as error:
            words = " ".join(str(error).split())[-500:]
            self.failures.append(f"{what}: {type(error).__name__}: {words}")
            traceback.print_exc()
            print(f"FAILED {self.failures[-1]}", flush=True)
            self.write()
        self.place.free()

    def earlier(self, name: str) -> list[dict[str, Any]]:
        """The rows that a step before this one wrote, on the same device."""
        path = self.out / f"{name}.json"
        data = json.loads(path.read_text()) if path.is_file() else {}
        return data.get("rows", []) if data.get("device") == self.place.name else []


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- part 1


def kernels(step: Step) -> None:
    """Linears of a layer of Llama-3.3-70B: the largest, single kernels on it, then the others."""
    timer = Timer(step.place)
    ceilings = measure_ceilings(timer)
    step.found["ceilings"] = asdict(ceilings)
    largest, *others = subjects(step.place)
    common = timer, ceilings, step.deadline, step.keep
    step.attempt("the largest matrix", partial(time_linears, largest, *common))
    for name, duels in KERNELS.items() if step.place.on_card else ():
        step.attempt(name, partial(time_alone, duels, largest.shape, *common))
    for subject in others:
        step.attempt(f"{subject.shape}", partial(time_linears, subject, *common))


def serving(step: Step) -> None:
    """The model at four precisions, planned from the spec sheet, and transformers' `generate`."""
    ceilings = measure_ceilings(Timer(step.place))
    step.found["ceilings"] = asdict(ceilings)
    kind = step.found["device_type"] = device_type(step.place)

    def one(precision: str) -> None:
        plan = plan_for(traffic_of(step.place), precision, kind, step.scratch)
        step.keep(serve(traffic_of(step.place), plan, step.place, ceilings))

    def compare() -> None:
        step.keep(generate_with_transformers(traffic_of(step.place), step.place))

    for precision in PRECISIONS:
        if step.deadline.allows(SERVE_S):
            step.attempt(f"{precision} bits", partial(one, precision))
        if precision == "16":
            step.attempt("transformers", compare)


def tests(step: Step) -> None:
    """The tests that need a card, in this process; each outcome is kept as it comes."""
    import pytest  # last: the other steps do without

    if not step.place.on_card:
        os.environ["LLMPQ_GPU_TESTS"] = "cpu"
    words = ["-q", "-p", "no:cacheprovider", "-m", "gpu", str(ROOT / "tests" / "gpu")]
    code = pytest.main(words, plugins=[_Outcomes(step)])
    if code != pytest.ExitCode.OK:
        step.failures.append(f"pytest: {pytest.ExitCode(code).name}")
    step.write()


class _Outcomes:
    """A plugin of pytest: notes outcomes, and begins no test when time is over."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Of each part of a test: what is not a mere set-up that went well is kept."""
        if report.when == "call" or report.outcome != "passed":
            row = {"kind": "test", "name": report.nodeid, "outcome": report.outcome}
            row["seconds"] = report.duration
            if report.failed:
                row["why"] = str(report.longrepr)[-2000:]
            self._step.keep(row)

    def pytest_runtest_logfinish(self) -> None:
        """Between tests."""
        import pytest

        if not self._step.deadline.allows():
            raise pytest.exit.Exception("out of time", returncode=pytest.ExitCode.INTERRUPTED)


# ---- part 2


def experts(step: Step) -> None:
    """The experts of a layer at once, beside one after the other, and the bytes that they read."""
    timer = Timer(step.place)
    ceilings = measure_ceilings(timer)
    step.found["ceilings"] = asdict(ceilings)
    common = timer, ceilings, step.deadline, step.keep
    step.attempt("experts", partial(time_alone, expert_duels, EXPERT_SHAPE, *common))


def predictions(step: Step) -> None:
    """A profile of the model's layers, and what it predicts of the runs."""
    kind = step.found["device_type"] = device_type(step.place)
    output = step.out / "profile.json"
    budget_s = min(PROFILE_S[step.place.device.type], MOST_OF_STEP * step.deadline.left_s)
    profile_layers(traffic_of(step.place), step.place, kind, budget_s, output)
    profiles = profiles_as(kind, output, step.scratch)
    served = [row for row in step.earlier("serving") if row["kind"] == "serving"]
    if not served:
        served = _served_again(step, kind, profiles)
    for row in served:
        what = f"predicting {row['precision']} bits"
        step.attempt(what, partial(_predict, step, row, profiles))


def _served_again(step: Step, kind: str, profiles: Path) -> list[dict[str, Any]]:
    """Runs to compare with, where part 1 is not at hand: with plans from the profile."""
    ceilings = measure_ceilings(Timer(step.place))
    served: list[dict[str, Any]] = []

    def one(precision: str) -> None:
        plan = plan_for(traffic_of(step.place), precision, kind, step.scratch, profiles)
        served.append(serve(traffic_of(step.place), plan, step.place, ceilings))

    for precision in SERVED_AGAIN:
        if step.deadline.allows(SERVE_S):
            step.attempt(f"{precision} bits", partial(one, precision))
    return served


def _predict(step: Step, row: dict[str, Any], profiles: Path) -> None:
    step.keep(prediction(row, profiles, step.scratch))


def cluster(step: Step) -> None:
    """A mixed cluster of processes that share the device: llmpq's plan and other methods'."""
    gpu_cluster.rehearse(step)


STEPS: dict[str, Callable[[Step], None]] = {
    act.__name__: act for act in (kernels, serving, tests, experts, predictions, cluster)
}


def main() -> int:
    """The exit code: 0 if nothing failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=STEPS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    options = parser.parse_args()
    turn = sys.stdin.readline()
    if not turn:  # whoever waited for this step is gone
        return 1
    if options.device == "cpu":
        torch.set_num_threads(1)
    deadline = Deadline.after(float(turn))
    place = find_place(options.device)
    step = Step(options.name, place, options.out, options.scratch, deadline)
    step.attempt(options.name, partial(STEPS[options.name], step))
    return int(bool(step.failures))


if __name__ == "__main__":
    sys.exit(main())
