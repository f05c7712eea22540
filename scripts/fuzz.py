"""Damages the inputs of every command, one file at a time, and tells what is not a clear message.

    python scripts/fuzz.py --count 2000 --seed 1 [--kind NAME] [--jobs 2] [--case N]

Each case is a file of a kind (`scripts/bench/_fuzz_inputs.py`), a damage to it
(`scripts/bench/_damage.py`) and the command that reads it, in a process of its own, forked where
torch and transformers are imported already. The same seed gives the same cases. A case is sound if
the command computes for less than 20 seconds, ends with one of its exit codes (0, 2, 3, 4, 5) and
without a traceback, and, where it fails, with a message of a few lines of at most 300 characters.

The last part lists what was accepted (exit code 0) although a value was changed: no machine can
tell which of these should have mattered, so that a person looks through it.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

import _common  # noqa: E402,F401  hides scripts/bench/kernels.py from transformers
from _damage import damage_form  # noqa: E402
from _fuzz_inputs import KINDS, Kind, call, make_inputs  # noqa: E402

LIMIT_S = 20  # of computing, so that a busy machine changes nothing
HANGS_S = 90  # by the clock
SLOW_S = 8
CODES = (0, 2, 3, 4, 5)
MOST_CHARACTERS = 300  # of a line of a message
MOST_LINES = 22  # of a message: all faults of a file, and that there are more
PLACES = 0.03  # of all cases: the file is not there, or something else is in its place
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "120",
}


@dataclass(frozen=True)
class Case:
    """One damaged file and the command that reads it."""

    number: int
    kind: Kind
    what: str
    content: bytes | None  # None: a directory is in its place


@dataclass
class Outcome:
    """How a command ended."""

    case: Case
    code: int
    seconds: float
    said: str

    @property
    def faults(self) -> list[str]:
        """What is wrong with it; empty where nothing is."""
        errors = [line for line in self.said.splitlines() if line.startswith("error: ")]
        found = []
        if self.seconds >= LIMIT_S:
            found.append(f"took {self.seconds:.0f} s")
        if self.code not in CODES:
            found.append(f"exit code {self.code}")
        if "Traceback (most recent call last)" in self.said:
            found.append("traceback")
        if self.code == 2 and not errors and "Error: " not in self.said:
            found.append("no message")
        if self.code == 2 and not _is_named(self.case.kind.file, self.said):
            found.append("the file is not named")
        if len(errors) > MOST_LINES:
            found.append(f"{len(errors)} lines")
        if long := [line for line in errors if len(line) > MOST_CHARACTERS + len("error: ")]:
            found.append(f"a line of {len(long[0])} characters")
        return found


def make_case(number: int, seed: int, folder: Path, kinds: list[Kind]) -> Case:
    """Case `number` of the seed."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choices(kinds, [kind.weight for kind in kinds])[0]
    if rng.random() < PLACES:
        return Case(number, kind, "a directory in its place", None)
    content, what = damage_form(rng, (folder / kind.file).read_bytes(), kind.form)
    return Case(number, kind, what, content)


def sound_cases(kinds: list[Kind], folder: Path) -> Iterator[Case]:
    """Every kind without a damage; each must end with 0, or its other cases would mean nothing."""
    for kind in kinds:
        yield Case(-1, kind, "", (folder / kind.file).read_bytes())


def set_up(case: Case, sound: Path, place: Path) -> None:
    """Copies of the sound files, and the damaged one."""
    for name in sorted({*case.kind.needs, case.kind.file}):  # folders before what is in them
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (sound / name).is_dir():
            shutil.copytree(sound / name, target, symlinks=True, dirs_exist_ok=True)
        elif not target.exists():
            shutil.copyfile(sound / name, target)
    damaged = Path(os.path.realpath(place / case.kind.file))
    damaged.unlink()
    if case.content is None:
        damaged.mkdir()
    else:
        damaged.write_bytes(case.content)


def start(case: Case, sound: Path, place: Path) -> int:
    """Forks a process that runs the command in `place`; its id."""
    set_up(case, sound, place)
    child = os.fork()
    if child:
        return child
    os.setsid()
    os.chdir(place)
    handle = os.open("said", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(handle, stream)
    code = 70
    try:
        code = call(case.kind.command)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_cases(cases: Iterator[Case], sound: Path, jobs: int) -> Iterator[Outcome]:
    """Runs `jobs` at a time; ends those that take too long."""
    live: dict[int, tuple[Case, float, Path]] = {}
    more = True
    while live or more:
        while more and len(live) < jobs:
            case = next(cases, None)
            more = case is not None
            if case is not None:
                place = Path(tempfile.mkdtemp(dir=sound.parent, prefix="case-"))
                live[start(case, sound, place)] = case, time.monotonic(), place
        for child in list(live):
            case, started, place = live[child]
            seconds = time.monotonic() - started
            if seconds > HANGS_S:
                os.killpg(child, signal.SIGKILL)
            ended, status, used = os.wait4(child, 0 if seconds > HANGS_S else os.WNOHANG)
            if ended:
                said = (place / "said").read_text(errors="replace")
                code, computed_s = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
                yield Outcome(case, code, max(computed_s, seconds * (seconds > HANGS_S)), said)
                shutil.rmtree(place)
                del live[child]
        time.sleep(0.005)


def _is_named(file: str, said: str) -> bool:
    """Whether a message names the file, or the folder that it belongs to."""
    text = "".join(said.split())
    return any(part in text for part in (file, Path(file).parts[0], Path(file).name))


def tell(outcome: Outcome) -> None:
    """Shows a case that is not sound."""
    case = outcome.case
    print(f"\n== case {case.number}: {case.kind.name}: {case.what}: {'; '.join(outcome.faults)}")
    print("   " + "\n   ".join(line[:400] for line in outcome.said.splitlines()[-12:]), flush=True)


def main() -> None:
    """The command line; the exit code is 1 where a case was not sound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="cases")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", default="", help="only kinds whose name holds this")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--case", type=int, help="only this case, and all that it says")
    flags = parser.parse_args()
    os.environ.update(QUIET)
    kinds = [kind for kind in KINDS if flags.kind in kind.name]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        sound = Path(name) / "sound"
        sound.mkdir()
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"
        make_inputs(sound)
        for outcome in run_cases(sound_cases(kinds, sound), sound, flags.jobs):
            if outcome.code:
                tell(outcome)
                sys.exit(f"{outcome.case.kind.name}: fails with a sound file")
        numbers = range(flags.count) if flags.case is None else [flags.case]
        cases = (make_case(number, flags.seed, sound, kinds) for number in numbers)
        if not show(run_cases(cases, sound, flags.jobs), flags.case is not None):
            sys.exit(1)


def show(outcomes: Iterator[Outcome], whole: bool) -> bool:
    """Prints all that is not sound, and what was accepted; whether all was sound."""
    codes: Counter[int] = Counter()
    accepted: dict[str, set[str]] = {}
    num_bad, longest = 0, 0.0
    for outcome in outcomes:
        codes[outcome.code] += 1
        longest = max(longest, outcome.seconds)
        if outcome.faults:
            num_bad += 1
            tell(outcome)
        elif whole:
            print(outcome.case.what, outcome.code, outcome.said, sep="\n")
        if outcome.seconds > SLOW_S:
            case = outcome.case
            print(
                f"slow, {outcome.seconds:.0f} s: case {case.number}: {case.kind.name}: {case.what}"
            )
        if outcome.code == 0 and " -> " in outcome.case.what:
            accepted.setdefault(outcome.case.kind.name, set()).add(outcome.case.what)
    for kind, changes in sorted(accepted.items()):
        print(f"\naccepted, {kind}:", *sorted(changes), sep="\n   ")
    total = ", ".join(f"{count} with {code}" for code, count in sorted(codes.items()))
    print(f"\n{codes.total()} cases ({total}), the longest {longest:.1f} s; not sound: {num_bad}")
    return not num_bad


if __name__ == "__main__":
    main()
