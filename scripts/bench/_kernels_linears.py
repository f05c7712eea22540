"""Times of linear layers on one device: every precision beside 16 bits, a copy and arithmetic.

The layers are those that `linear_factory` makes, with whatever kernel serves them. Each cell is
a shape, a precision and a number of rows: milliseconds, its weight's bytes a second as a share of a
copy's, its arithmetic as a share of a large product's, its speed against torch's own 16-bit product
(cuBLAS on a card) of the same run, and how far its answer is from the product in 32 bits with the
weight that the layer holds. Cells come most wanted first, as time may run out.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _kernels_place import Ceilings, Deadline, Place, Timer
from torch import nn

from llmpq.model_lookup import load_model_spec
from llmpq.quant import PlainLinear, QuantizedLinear, available_precisions, linear_factory

LLAMA_70B = str(Path(__file__).resolve().parents[2] / "configs/models/llama-3.3-70b.json")
TINY_SHAPE = (384, 192)  # where a CPU stands in for a card
ROWS = (1, 8, 16, 64, 256, 2048)
TINY_ROWS = (1, 8, 64)
WEIGHT_SCALE = 0.02
LAYERS_S = 15.0  # what one matrix may take at all precisions, compiling included

Shape = tuple[int, int]  # out, in
Keep = Callable[[dict[str, Any]], None]
Layer = PlainLinear | QuantizedLinear


@dataclass(frozen=True)
class Subject:
    """What is timed: one matrix, at every precision and number of rows."""

    shape: Shape
    rows: Sequence[int] = ROWS
    precisions: Sequence[str] = ("16", "4", "3", "8")


def subjects(place: Place) -> list[Subject]:
    """On a card the linears of Llama-3.3-70B, large and tall ones first; else a small one."""
    if not place.on_card:
        return [Subject(TINY_SHAPE, TINY_ROWS)]
    linears = load_model_spec(LLAMA_70B).linears
    shapes = {(linear.out_features, linear.in_features) for linear in linears}
    return [Subject(shape) for shape in sorted(shapes, key=lambda s: (-s[0] * s[1], -s[0]))]


@torch.inference_mode()
def time_linears(
    subject: Subject, timer: Timer, ceilings: Ceilings, deadline: Deadline, keep: Keep
) -> None:
    """Gives each cell to `keep`. All layers hold the same weight, and are made ready together."""
    if not deadline.allows(LAYERS_S):
        return
    shape = subject.shape
    place = timer.place
    weight = torch.randn(shape, device=place.device).mul_(WEIGHT_SCALE).to(place.dtype)
    inputs = {
        rows: torch.randn(rows, shape[1], device=place.device).to(place.dtype)
        for rows in subject.rows
    }
    offered = available_precisions(place.device, place.dtype)
    layers = {p: filled(place, p, weight) for p in subject.precisions if p in offered}
    held = {precision: layer.dequantized_weight() for precision, layer in layers.items()}
    make_ready(layers.values(), subject.rows, place)
    base = {rows: _plain_ms(timer, x, weight) for rows, x in inputs.items()}
    for precision, layer in layers.items():
        exact = held.pop(precision).float()
        for rows, x in inputs.items():
            if deadline.allows():
                cell = _cell(timer, layer, exact, x, ceilings)
                keep(cell | _told(precision, shape, rows, base[rows], cell["ms"]))


def make_ready(layers: Iterable[nn.Module], rows: Sequence[int], place: Place) -> None:
    """Compiles, at once and in parallel, what layers need for these numbers of rows."""
    if not place.on_card:
        return
    from llmpq.quant.humming import HummingLinear, serve

    served = [layer for layer in layers if isinstance(layer, HummingLinear)]
    left = serve(served, rows, place.device)
    assert not left, f"not compiled: {set(left.values())}"


def _plain_ms(timer: Timer, x: torch.Tensor, weight: torch.Tensor) -> float:
    return timer.median_ms(lambda: F.linear(x, weight))


def filled(place: Place, precision: str, weight: torch.Tensor) -> Layer:
    """A layer that has taken in the weight `[out, in]`."""
    out_features, in_features = weight.shape
    layer = linear_factory(
        precision, in_features, out_features, bias=False, dtype=place.dtype, device=place.device
    )()
    layer.load_weight("weight", weight)
    return layer


def _cell(
    timer: Timer, layer: Layer, held: torch.Tensor, x: torch.Tensor, ceilings: Ceilings
) -> dict[str, Any]:
    """What one layer does with one input. `held`: its weight in 32 bits."""
    first_s = timer.first_s(lambda: layer(x))
    wanted = F.linear(x.float(), held)
    error = float((layer(x).float() - wanted).norm() / wanted.norm())
    ms = timer.median_ms(lambda: layer(x))
    gb_per_s = layer.weight_bytes / ms / 1e6
    tflops = 2 * len(x) * held.numel() / ms / 1e9
    return {
        "layer": type(layer).__name__,
        "ms": ms,
        "weight_gb_per_s": gb_per_s,
        "share_of_copy": gb_per_s / ceilings.copy_gb_per_s,
        "tflops": tflops,
        "share_of_matmul": tflops / ceilings.matmul_tflops,
        "error": error,
        "first_call_s": first_s,
    }


def _told(precision: str, shape: Shape, rows: int, plain_ms: float, ms: float) -> dict[str, Any]:
    """Which cell it is, and its speed against the 16-bit product."""
    return {
        "kind": "linear",
        "precision": precision,
        "out_features": shape[0],
        "in_features": shape[1],
        "rows": rows,
        "plain_ms": plain_ms,
        "against_plain": plain_ms / ms,
    }
