"""How long after the loss of a worker does a run end, and how; and does it go on with a new plan?

Workers are killed or stopped (alive, but hung) at a moment drawn evenly from a run's length,
loading included, under torchrun and without. For new plans, a worker of a run is lost in the same
way, and the run must finish by itself with what is left.
"""

import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from _engine_kill import HANGS_S, Run, descendants, results, run_command, send, wait_for_end

NUMBERS = (signal.SIGKILL, signal.SIGSTOP)
LAUNCHERS = ("alone", "torchrun")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@dataclass(frozen=True)
class Ending:
    """One run that lost a worker. `seconds`: from the loss until no process was left."""

    launcher: str
    signal: str
    rank: int
    moment_s: float
    seconds: float
    exit_code: int
    says: str  # the line that names the worker


@dataclass(frozen=True)
class NewPlan:
    """One run that went on with a plan for fewer workers."""

    signal: str
    rank: int
    num_stages: int
    exit_code: int
    num_missing: int
    seconds: float  # from the loss until the run had finished


@dataclass(frozen=True)
class LossResult:
    """`wasted`: attempts whose run ended before its worker was lost."""

    endings: tuple[Ending, ...]
    new_plans: tuple[NewPlan, ...]
    wasted: int


def loss_test(
    folder: Path,
    model: str,
    prompts: Path,
    plan: Path,
    num_stages: int,
    losses: int,
    new_plans: int,
    seed: int,
    on_loss: Callable[[int], None] = lambda _: None,
) -> LossResult:
    """Loses workers of runs of a plan of `num_stages`; `folder` is for its files."""
    command, chance = run_command(model, prompts, plan), random.Random(seed)
    start, output = time.monotonic(), folder / "reference.jsonl"
    run = Run([*command, "--output", str(output)])
    if run.wait():
        raise RuntimeError(f"the undisturbed run failed: {run.errors()}")
    total_s, num_requests = time.monotonic() - start, len(results(output))
    endings: list[Ending] = []
    plans: list[NewPlan] = []
    attempts = 0
    while len(endings) + len(plans) < losses + new_plans:
        output = folder / f"lost-{attempts}.jsonl"
        attempts += 1
        rank, moment = chance.randrange(num_stages), chance.uniform(0, total_s)
        number = NUMBERS[attempts % 2]
        if len(endings) < losses:
            launcher = LAUNCHERS[attempts // 2 % 2]
            words = _launched(command, launcher, num_stages)
            ending = _lose(words, output, number, rank, moment, num_requests)
            endings += [Ending(launcher, *ending)] if ending else []
        else:
            found = _replan(command, output, number, rank, moment, num_requests)
            plans += [found] if found else []
        on_loss(len(endings) + len(plans))
    return LossResult(tuple(endings), tuple(plans), attempts - len(endings) - len(plans))


def _launched(command: list[str], launcher: str, num_stages: int) -> list[str]:
    if launcher == "alone":
        return command
    return [sys.executable, *TORCHRUN, str(num_stages), *command[1:]]


def _lose(
    command: list[str],
    output: Path,
    number: signal.Signals,
    rank: int,
    moment: float,
    num_requests: int,
) -> tuple[str, int, float, float, int, str] | None:
    run = Run([*command, "--output", str(output)])
    pids = _strike(run, number, rank, moment, output, num_requests)
    if not pids:
        return None
    seconds = wait_for_end(pids, HANGS_S)
    code = run.wait()
    lines = [line for line in run.errors().splitlines() if line.startswith(f"error: worker {rank}")]
    return number.name, rank, moment, seconds, code, lines[0] if lines else ""


def _replan(
    command: list[str],
    output: Path,
    number: signal.Signals,
    rank: int,
    moment: float,
    num_requests: int,
) -> NewPlan | None:
    run = Run([*command, "--output", str(output), "--replan-on-loss"])
    if not _strike(run, number, rank, moment, output, num_requests):
        return None
    start = time.monotonic()
    code = run.wait()
    made = len(list(output.parent.glob(f"{output.name}.replan-*.json")))
    ids = [str(line["id"]) for line in results(output)]
    missing = num_requests - len(set(ids)) if len(set(ids)) == len(ids) else num_requests
    return NewPlan(number.name, rank, made, code, missing, time.monotonic() - start)


def _strike(
    run: Run, number: signal.Signals, rank: int, moment: float, output: Path, num_requests: int
) -> list[int]:
    """Sends the signal to a worker; all of the run's processes, none where it was too late.

    It is where all results are written: then a worker more or less is no loss.
    """
    end = time.monotonic() + moment
    while run.is_on and (time.monotonic() < end or rank not in run.workers()):
        time.sleep(0.01)
    pids, victim = [run.pid, *descendants(run.pid)], run.workers().get(rank)
    is_done = output.exists() and output.read_bytes().count(b"\n") >= num_requests
    if victim is None or not run.is_on or is_done:
        run.wait()
        return []
    send(victim, number)
    return pids
