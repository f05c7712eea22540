"""How fast each precision multiplies, on the card that is here or else on this CPU.

On a CPU: every precision against bf16 `linear`, and what can be told of a card's kernels without
one (they compute the right thing, costs and layers name the same kernel). On a card: linear layers
of Llama-3.3-70B against cuBLAS and a copy, Llama-3.1-8B served at several precisions against its
plan and against transformers, a profile's predictions, and the tokens of different ways to run.
`scripts/gpu.sh` measures the same in steps of limited time.

    python scripts/bench/kernels.py [--quick] [--json OUT.json] [--threads N] [--device cpu]
"""

import tempfile
from pathlib import Path

import _kernels_agree
import _kernels_card
import _kernels_cpu
import torch
from _common import Benchmark, arguments, finish, machine
from _kernels_checks import NO_CARD, linear_checks, prediction_checks, serving_checks, token_checks
from _kernels_place import find_place
from _kernels_tokens import GRAPHS, SEVERAL


def main() -> None:
    """Measures and prints."""
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    card = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    with tempfile.TemporaryDirectory(prefix="llmpq-kernels-") as folder:
        benchmark = (on_card if card else on_cpu)(options.quick, Path(folder))
    finish(benchmark, options.json)


def on_cpu(quick: bool, folder: Path) -> Benchmark:
    """The CPU's table, and a check for each target: some can be told without a card."""
    info, rows = _kernels_cpu.measure(quick)
    _kernels_cpu.render(info, rows)
    checks = [
        *_kernels_cpu.weight_checks(),
        *_kernels_agree.checks(folder),
        *linear_checks([], NO_CARD),
        *serving_checks([], "", NO_CARD),
        *prediction_checks([], [], NO_CARD),
        *token_checks(dict.fromkeys((GRAPHS, SEVERAL)), NO_CARD),
    ]
    return Benchmark("kernels", machine() | info, checks, rows)


def on_card(quick: bool, folder: Path) -> Benchmark:
    """The card's tables, and a check for each of its targets."""
    found = _kernels_card.measure(find_place("cuda"), quick, folder)
    _kernels_card.render(found)
    checks = [*_kernels_agree.checks(folder), *_kernels_card.checks(found)]
    return Benchmark("kernels", machine() | found.machine, checks, found.rows)


if __name__ == "__main__":
    main()
