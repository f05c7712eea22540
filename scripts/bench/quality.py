"""What lower precisions cost in quality: quantizers, indicators, plans, budgets, measured.

A part for each target:
  quantizers  GPTQ and clipping against round to nearest, and against gptqmodel's own GPTQ
  indicators  the order of layers by each indicator against the exact one; seconds and memory
  plans       plans of equal bits by each indicator
  budget      plans for quality budgets, measured on held-out text
  pipeline    one process against a pipeline of processes, and lm-eval's own model class
  served      the weights of a run against those of an evaluation

`python scripts/bench/quality.py [--only PART ...] [--windows N] [--gptqmodel PYTHON] [--quick]
[--json OUT]`. gptqmodel wants versions of its own: give the Python of an environment that has it.
"""

import importlib
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from _common import Benchmark, arguments, finish, machine
from _quality_common import QUICK_WINDOWS, Settings

PARTS = ("quantizers", "indicators", "plans", "budget", "pipeline", "served")


def main() -> None:
    """Runs the parts one after the other."""
    parser = arguments(str(__doc__).partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--windows", type=int, default=100, help="of a text, at most")
    parser.add_argument(
        "--gptqmodel",
        metavar="PYTHON",
        default=os.environ.get("LLMPQ_GPTQMODEL_PYTHON"),
        help="of an environment with gptqmodel; default: $LLMPQ_GPTQMODEL_PYTHON",
    )
    options = parser.parse_args()
    benchmark = Benchmark("quality", machine())
    with tempfile.TemporaryDirectory(prefix="llmpq-quality-") as folder:
        windows = QUICK_WINDOWS if options.quick else options.windows
        other = None if options.quick else options.gptqmodel
        settings = Settings(options.quick, Path(folder), windows, other)
        crashed = [part for part in options.only if not run_part(part, settings, benchmark)]
    finish(benchmark, options.json)
    if crashed:
        sys.exit(f"failed: {', '.join(crashed)}")


def run_part(part: str, settings: Settings, benchmark: Benchmark) -> bool:
    """Adds a part's checks and rows; False where it crashed: the others must not be lost."""
    start = time.monotonic()
    try:
        checks, rows = importlib.import_module(f"_quality_{part}").run(settings)
    except Exception:
        traceback.print_exc()
        return False
    benchmark.checks += checks
    benchmark.rows += [{"part": part} | row for row in rows]
    print(f"{part}: {time.monotonic() - start:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    main()
