"""Do runs that are killed lose, repeat or change a result? Kill, resume, kill again, compare.

The reference is one run that nobody disturbs. Kills come at a moment drawn evenly from what a run
still takes, loading included: one worker, all of them with their parent, or the worker that writes
just when its files grow. A run that ends before its kill starts anew under another name.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ONE, ALL, WRITING = "one worker", "all and their parent", "while it writes"
KINDS, WEIGHTS = (ONE, ALL, WRITING), (5, 2, 3)
END_S = 60.0  # no run takes so long to end after a kill
HANGS_S = 600.0


@dataclass(frozen=True)
class KillResult:
    """What became of the requests of all runs. `num_runs`: those that were begun anew."""

    num_kills: int
    num_requests: int
    num_runs: int
    duplicated: int
    missing: int
    different: int
    kinds: dict[str, int]
    longest_end_s: float  # from a kill to the end of all processes


def kill_test(
    folder: Path,
    model: str,
    prompts: Path,
    plan: Path,
    kills: int,
    seed: int,
    on_kill: Callable[[int], None] = lambda _: None,
) -> KillResult:
    """Kills runs of a plan of several stages `kills` times; `folder` is for its files."""
    command = run_command(model, prompts, plan)
    expected, load_s, total_s = _undisturbed(command, folder)
    chance, kinds, done, longest = random.Random(seed), Counter[str](), 0, 0.0
    outputs = [folder / "killed-0.jsonl"]
    while done < kills:
        left = 1 - len(results(outputs[-1])) / len(expected)
        moment = chance.uniform(0, load_s + left * (total_s - load_s))
        kind = chance.choices(KINDS, WEIGHTS)[0]
        run = Run([*command, "--output", str(outputs[-1]), "--resume"])
        if ended := _kill(run, kind, moment, chance, outputs[-1]):
            done += 1
            kinds[kind] += 1
            longest = max(longest, ended)
            on_kill(done)
        elif run.wait() == 0:
            outputs.append(folder / f"killed-{len(outputs)}.jsonl")
        else:
            raise RuntimeError(f"a run that was not killed failed: {run.errors()}")
    _finish([*command, "--output", str(outputs[-1]), "--resume"])
    repeated, missing, different = _compare(expected, outputs)
    return KillResult(
        done, len(expected), len(outputs), repeated, missing, different, dict(kinds), longest
    )


def run_command(model: str, prompts: Path, plan: Path, *more: str) -> list[str]:
    """`llmpq-run` without its output."""
    files = ["--model", model, "--prompts", str(prompts), "--plan", str(plan)]
    # In 32 bits, tokens do not depend on which requests share a micro-batch.
    return [sys.executable, "-m", "llmpq.run", *files, "--dtype", "float32", *more]


class Run:
    """A run under way, with what it says."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
        self.pid = self._process.pid
        self._errors = b""

    @property
    def is_on(self) -> bool:
        """It has not ended."""
        return self._process.poll() is None

    def wait(self, timeout: float = HANGS_S) -> int:
        """Its exit code."""
        self._errors += self._process.communicate(timeout=timeout)[1] or b""
        return self._process.returncode

    def errors(self) -> str:
        """What it said, once it has ended."""
        return self._errors.decode(errors="replace")

    def workers(self) -> dict[int, int]:
        """Process ids by rank, of those that are there."""
        return {rank: pid for pid in descendants(self.pid) if (rank := _rank(pid)) is not None}


def descendants(pid: int) -> list[int]:
    """The ids of a process's children and theirs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [one for child in map(int, children) for one in (child, *descendants(child))]


def send(pid: int, number: int) -> None:
    """A signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_for_end(pids: Sequence[int], seconds: float) -> float:
    """Seconds until none of the processes runs; `TimeoutError` where one still does."""
    start = time.monotonic()
    while any(_runs(pid) for pid in pids):
        if time.monotonic() - start > seconds:
            raise TimeoutError(f"still there {seconds:.0f} s later: {list(filter(_runs, pids))}")
        time.sleep(0.02)
    return time.monotonic() - start


def _kill(run: Run, kind: str, moment: float, chance: random.Random, output: Path) -> float:
    """Seconds until all had ended after the kill; 0 where the run ended before."""
    if not _wait(run, moment):
        return 0.0
    if kind == WRITING and not _wait_for_write(run, output):
        return 0.0
    pids, workers = [run.pid, *descendants(run.pid)], run.workers()
    if kind == ALL or not workers:
        victims = pids  # before there are workers, there is only their parent
    elif kind == WRITING:
        victims = [workers[min(workers)]]
    else:
        victims = [workers[chance.choice(sorted(workers))]]
    if not run.is_on or not any(_runs(pid) for pid in victims):
        return 0.0
    for victim in victims:
        send(victim, signal.SIGKILL)
    seconds = wait_for_end(pids, END_S)
    run.wait()
    return seconds


def _wait(run: Run, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while run.is_on and time.monotonic() < end:
        time.sleep(0.005)
    return run.is_on


def _wait_for_write(run: Run, output: Path) -> bool:
    """Returns at once when the journal or the output grows; whether the run still goes on."""
    paths = (output, output.with_name(f"{output.name}.journal"))
    before = [path.stat().st_size if path.exists() else 0 for path in paths]
    while run.is_on:
        if [path.stat().st_size if path.exists() else 0 for path in paths] != before:
            return True
        time.sleep(0.0005)
    return False


def _undisturbed(command: Sequence[str], folder: Path) -> tuple[dict[str, list[int]], float, float]:
    """Tokens by id, seconds until the first result and until the end."""
    output, start = folder / "reference.jsonl", time.monotonic()
    run = Run([*command, "--output", str(output)])
    while run.is_on and not (output.exists() and output.stat().st_size):
        time.sleep(0.02)
    load_s = time.monotonic() - start
    if run.wait():
        raise RuntimeError(f"the undisturbed run failed: {run.errors()}")
    total_s = time.monotonic() - start
    return {str(line["id"]): line["token_ids"] for line in results(output)}, load_s, total_s


def _finish(command: Sequence[str]) -> None:
    run = Run(command)
    if run.wait():
        raise RuntimeError(f"the last run failed: {run.errors()}")


def results(output: Path) -> list[dict[str, list[int]]]:
    """The whole lines of an output."""
    if not output.exists():
        return []
    whole = output.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def _compare(expected: dict[str, list[int]], outputs: Sequence[Path]) -> tuple[int, int, int]:
    """Requests that came twice, never, or with other tokens, over all outputs."""
    repeated = missing = different = 0
    for output in outputs:
        lines = results(output)
        counts = Counter(str(line["id"]) for line in lines)
        repeated += sum(count - 1 for count in counts.values())
        missing += len(expected.keys() - counts.keys())
        different += sum(line["token_ids"] != expected.get(str(line["id"])) for line in lines)
    return repeated, missing, different


def _rank(pid: int) -> int | None:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    ranks = [int(one[5:]) for one in variables if one.startswith(b"RANK=")]
    return ranks[0] if ranks else None


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
