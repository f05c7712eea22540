"""How far the numbers under a plan can be trusted: times, memory, simulator, links, and the loop.

A part for each target:
  shapes     layer times at points that were not profiled, beside the paper's regression
  gpus       layer times of GPUs that were left out of the spec-sheet fit
  memory     predicted against measured peaks of every stage of random plans
  simulator  simulated against measured time of plans on rehearsed clusters
  loop       a wrong profile, corrected from one run's report
  links      fitted bandwidth against a plain ping-pong

`python scripts/bench/fidelity.py [--only PART ...] [--device cpu|cuda] [--quick] [--json OUT]`.
Keep the machine quiet: times of the CPU are compared with times of the same CPU minutes later.
"""

import importlib
import sys
import time
import traceback

from _common import Benchmark, arguments, finish, machine

PARTS = ("shapes", "gpus", "memory", "simulator", "loop", "links")


def main() -> None:
    """Runs the parts one after the other."""
    parser = arguments(str(__doc__).partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    benchmark = Benchmark("fidelity", machine())
    crashed: list[str] = []
    for part in options.only:
        start = time.monotonic()
        try:
            module = importlib.import_module(f"_fidelity_{part}")
            checks, rows = module.run(options.quick, options.device)
        except Exception:  # what the other parts measured must not be lost
            traceback.print_exc()
            crashed.append(part)
            continue
        benchmark.checks += checks
        benchmark.rows += [{"part": part} | row for row in rows]
        print(f"{part}: {time.monotonic() - start:.0f} s", flush=True)
    finish(benchmark, options.json)
    if crashed:
        sys.exit(f"failed: {', '.join(crashed)}")


if __name__ == "__main__":
    main()
