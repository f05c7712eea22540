"""The CPU's part of the kernels benchmark: how fast each precision multiplies there.

Every precision of `llmpq.quant` is timed against bf16 `linear`, shape by shape and number of rows
by number of rows, in turns, so that a ratio survives a machine whose speed drifts; of each, the
fastest turn counts. Also counts how many bytes whole decoder layers take, which no machine changes.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from _common import Check
from rich.console import Console
from rich.table import Table

from llmpq.quant import available_precisions, linear_factory
from llmpq.quant import kernels as quant_kernels
from llmpq.quant.base import PlainLinear, QuantizedLinear

DTYPE, DEVICE = torch.bfloat16, torch.device("cpu")
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
QUICK_ROWS = (1, 8, 64, 256)
SHAPES = ((256, 704), (2048, 5504), (5504, 2048), (4096, 11008))  # (out, in)
QUICK_SHAPES = ((256, 704), (2048, 5504))
LLAMA_LIKE = {"llama-256x704": (256, 704), "llama-4096x11008": (4096, 11008)}
LARGEST_RATIO = {"4": 0.30, "3": 0.24}  # of the bytes of 16 bits, that a layer may take
POOL_BYTES = 2**26  # rotate over copies of a weight of this many bytes: no weight stays in cache

Call = Callable[[], object]
Call1 = Callable[[torch.Tensor], object]
Layer = PlainLinear | QuantizedLinear


def fastest(calls: dict[str, Call], budget_s: float) -> dict[str, tuple[float, int]]:
    """Seconds of the fastest turn of each call and the number of turns, taken in turns."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    end = time.perf_counter() + budget_s
    while len(times[next(iter(times))]) < 3 or time.perf_counter() < end:
        order = order[1:] + order[:1]  # nobody always follows the same neighbour
        for name in order:
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return {name: (min(t), len(t)) for name, t in times.items()}


def filled(precision: str, weight: torch.Tensor) -> Layer:
    """A layer of this precision that holds `weight [out, in]`."""
    out_features, in_features = weight.shape
    layer = linear_factory(
        precision, in_features, out_features, bias=False, dtype=DTYPE, device=DEVICE
    )()
    layer.load_weight("weight", weight)
    return layer


def ceilings(budget_s: float) -> dict[str, Any]:
    """This machine's measured bandwidth and bf16 matmul peak."""
    source, target = torch.ones(2**26), torch.empty(2**26)
    a = torch.randn(1024, 1024).to(DTYPE)
    seconds = fastest(
        {"copy": lambda: target.copy_(source), "read": source.sum, "matmul": lambda: a @ a},
        budget_s,
    )
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "read_gb_per_s": source.nbytes / seconds["read"][0] / 1e9,
        "copy_gb_per_s": 2 * source.nbytes / seconds["copy"][0] / 1e9,
        "bf16_matmul_gflop_per_s": 2 * 1024**3 / seconds["matmul"][0] / 1e9,
    }


def in_turn(layers: Sequence[Call1], x: torch.Tensor) -> Call:
    """A call of the next of these layers each time."""
    ring = cycle(layers)
    return lambda: next(ring)(x)


def bench_shape(
    out_features: int, in_features: int, rows: tuple[int, ...], budget_s: float
) -> list[dict[str, Any]]:
    """One row of the table for each precision and number of rows; the layers are built once."""
    weight = torch.randn(out_features, in_features).mul_(0.02).to(DTYPE)
    copies = max(1, min(8, POOL_BYTES // weight.nbytes))
    layers: dict[str, list[Layer]] = {}
    for name in available_precisions(DEVICE, DTYPE):
        layers[name] = [filled(name, weight) for _ in range(copies)]
    plain = [partial(F.linear, weight=weight.clone()) for _ in range(copies)]
    table = []
    for num_rows in rows:
        x = torch.randn(num_rows, in_features).to(DTYPE)
        calls = {name: in_turn(copies_of, x) for name, copies_of in layers.items()}
        seconds = fastest({"linear": in_turn(plain, x)} | calls, budget_s)
        base, turns = seconds.pop("linear")
        for name, (time_s, _) in seconds.items():
            table.append(
                {
                    "precision": name,
                    "out_features": out_features,
                    "in_features": in_features,
                    "rows": num_rows,
                    "time_ms": time_s * 1e3,
                    "speed_against_bf16_linear": base / time_s,
                    "weight_gb_per_s": layers[name][0].weight_bytes / time_s / 1e9,
                    "gflop_per_s": 2 * num_rows * weight.numel() / time_s / 1e9,
                    "samples": turns,
                }
            )
    return table


def measure(quick: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is told of the machine, and the rows of the table."""
    budget_s = 0.4 if quick else 1.0
    shapes, counts = (QUICK_SHAPES, QUICK_ROWS) if quick else (SHAPES, ROWS)
    with torch.inference_mode():
        info = ceilings(1.0) | {"int4_tiles": quant_kernels.int4_tiles_work()}
        return info, [row for shape in shapes for row in bench_shape(*shape, counts, budget_s)]


def weight_checks() -> list[Check]:
    """Bytes of the seven linears of a LLaMA-like layer against 16 bits, from real layers."""
    checks = []
    for label, (hidden, inner) in LLAMA_LIKE.items():
        shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
        held = dict.fromkeys(("16", *LARGEST_RATIO), 0)
        for shape in shapes:
            weight = torch.zeros(shape, dtype=DTYPE)
            for name in held:
                held[name] += filled(name, weight).weight_bytes
        for name, target in LARGEST_RATIO.items():
            ratio = held[name] / held["16"]
            check = Check(
                name=f"weight bytes of {label} at {name} bits",
                value=ratio,
                unit="of 16 bits",
                target=f"<= {target:.2f}",
                holds=ratio <= target,
                samples=len(shapes),
            )
            checks.append(check)
    return checks


def render(info: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The ceilings and the times as tables."""
    console = Console(highlight=False)
    console.print(
        f"{info['capability']}, {info['threads']} threads: read {info['read_gb_per_s']:.1f} GB/s, "
        f"copy {info['copy_gb_per_s']:.1f} GB/s, "
        f"bf16 matmul {info['bf16_matmul_gflop_per_s']:.0f} GFLOP/s; "
        f"int4 kernel tiles {'work' if info['int4_tiles'] else 'do not work'}"
    )
    table = Table("precision", "out x in", "M", "ms", "x bf16 linear", "GB/s", "GFLOP/s")
    for row in rows:
        table.add_row(
            row["precision"],
            f"{row['out_features']}x{row['in_features']}",
            str(row["rows"]),
            f"{row['time_ms']:.3f}",
            f"{row['speed_against_bf16_linear']:.2f}",
            f"{row['weight_gb_per_s']:.1f}",
            f"{row['gflop_per_s']:.0f}",
        )
    console.print(table)
