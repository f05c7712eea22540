"""The offline batch engine against its targets, each by its number.

  1  every request's tokens are those of transformers alone
  2  busy stages; refilling against batch after batch; against the simulator
  3  throughput against transformers with its best static batches
  4  killed and resumed runs lose, repeat and change nothing
  5  the loss of a worker is noticed, and a run goes on with a new plan
  6  memory of a long run
  7  damaged files
  8  stages of several devices

`python scripts/bench/engine.py [--parts 1,2,3] [--minutes 30] [--quick] [--json OUT]`.
Keep the machine quiet: parts 2 and 3 compare times.
"""

import argparse
import importlib
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from _common import Benchmark, arguments, finish, machine
from _engine_common import Part, Settings, say

PARTS = {
    1: ("_engine_tokens", "PART"),
    2: ("_engine_speed", "PART"),
    3: ("_engine_static", "PART"),
    4: ("_engine_faults", "KILLED"),
    5: ("_engine_faults", "LOST"),
    6: ("_engine_memory", "PART"),
    7: ("_engine_faults", "DAMAGED"),
    8: ("_engine_shards", "PART"),
}
QUICK_ORDER = (7, 1, 2, 3, 8, 6, 4, 5)
QUICK_S = 95.0  # no part begins later than that with --quick
NO_DATA = "no data folder: neither $LLMPQ_SHARED nor shared/ in or beside the checkout"
NO_TIME = "no time was left of the two minutes of --quick; run it by --parts"


def main() -> None:
    """Runs the parts one after the other."""
    parser = arguments(str(__doc__).partition("\n")[0])
    parser.add_argument("--parts", type=numbers, default=tuple(PARTS), help="as in 1,2,3")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the run of part 6")
    options = parser.parse_args()
    benchmark, started = Benchmark("engine", machine()), time.monotonic()
    crashed = []
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # of all processes from here on
    with tempfile.TemporaryDirectory(prefix="llmpq-engine-") as folder:
        order = sorted(options.parts, key=QUICK_ORDER.index) if options.quick else options.parts
        for number in order:
            late = options.quick and time.monotonic() - started > QUICK_S
            settings = Settings(options.quick, Path(folder) / str(number), options.minutes)
            settings.folder.mkdir()
            if not run_part(number, settings, benchmark, late):
                crashed.append(str(number))
    benchmark.checks.sort(key=lambda check: check.name[0])  # its part
    finish(benchmark, options.json)
    if crashed:
        sys.exit(f"failed: parts {', '.join(crashed)}")


def numbers(text: str) -> tuple[int, ...]:
    """Of --parts."""
    parts = {int(word) for word in text.split(",") if word.isdecimal()}
    if not parts or len(parts) != len(text.split(",")) or not parts <= PARTS.keys():
        raise argparse.ArgumentTypeError(f"expected some of 1,2,...,{len(PARTS)}, found '{text}'")
    return tuple(sorted(parts))


def run_part(number: int, settings: Settings, benchmark: Benchmark, late: bool) -> bool:
    """Adds a part's checks and rows; False where it crashed: the others must not be lost."""
    start = time.monotonic()
    module, name = PARTS[number]
    part: Part = getattr(importlib.import_module(module), name)
    no_data = part.needs_data and settings.data is None
    if no_data or late:
        why = NO_DATA if no_data else NO_TIME
        benchmark.checks += [target.unknown(why) for target in part.targets]
        return True
    say(f"part {number}")
    try:
        checks, rows = part.run(settings)
    except Exception as error:
        traceback.print_exc()
        why = f"it failed: {type(error).__name__}: {error}"
        benchmark.checks += [target.unknown(why) for target in part.targets]
        return False
    benchmark.checks += checks
    benchmark.rows += [{"part": number} | row for row in rows]
    say(f"part {number}: {time.monotonic() - start:.0f} s")
    return True


if __name__ == "__main__":
    main()
