"""Times of linear layers on one device: every precision beside 16 bits, a copy and arithmetic.

The layers are those that `make_linear` gives, with whatever kernel serves them there. Each cell is
a shape, a precision and a number of rows: milliseconds, its weight's bytes a second as a share of a
copy's, its arithmetic as a share of a large product's, its speed against torch's own 16-bit product
(cuBLAS on a card) of the same run, and how far its answer is from the product in 32 bits with the
weight that the layer holds. Cells come most wanted first, as time may run out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from _kernels_place import Ceilings, Deadline, Timer

from llmpq.model_spec import load_model_spec
from llmpq.quant import PlainLinear, QuantizedLinear, available_precisions, make_linear

ROWS = (1, 8, 16, 64, 256, 2048)
WEIGHT_SCALE = 0.02
LAYER_S = 3.0  # what building a layer and its first cell may take, beside compiling

Shape = tuple[int, int]  # out, in
Keep = Callable[[dict[str, Any]], None]
Layer = PlainLinear | QuantizedLinear


@dataclass(frozen=True)
class Subject:
    """What is timed."""

    shapes: Sequence[Shape]
    rows: Sequence[int] = ROWS
    precisions: Sequence[str] = ("16", "4", "3", "8")


def layer_shapes(model: str) -> list[Shape]:
    """The different linears of a model's layer, `[out, in]`; large and tall ones first."""
    found = {(linear.out_features, linear.in_features) for linear in load_model_spec(model).linears}
    return sorted(found, key=lambda shape: (-shape[0] * shape[1], -shape[0]))


@torch.inference_mode()
def time_linears(
    timer: Timer, subject: Subject, ceilings: Ceilings, deadline: Deadline, keep: Keep
) -> bool:
    """Gives each cell to `keep`; whether all were measured."""
    for shape in subject.shapes:
        for row in _of_shape(timer, shape, subject, ceilings, deadline):
            keep(row)
        if not deadline.allows(LAYER_S):
            return False
    return True


def _of_shape(
    timer: Timer, shape: Shape, subject: Subject, ceilings: Ceilings, deadline: Deadline
) -> Iterator[dict[str, Any]]:
    """The cells of one shape; the weight is the same at every precision."""
    place = timer.place
    weight = torch.randn(shape, device=place.device).mul_(WEIGHT_SCALE).to(place.dtype)
    inputs = {
        rows: torch.randn(rows, shape[1], device=place.device).to(place.dtype)
        for rows in subject.rows
    }
    base = {rows: _plain_ms(timer, x, weight) for rows, x in inputs.items()}
    offered = available_precisions(place.device, place.dtype)
    for precision in subject.precisions:
        if precision not in offered or not deadline.allows(LAYER_S):
            continue
        layer = _filled(timer, precision, weight)
        held = layer.dequantized_weight().float()
        for rows, x in inputs.items():
            if deadline.allows():
                cell = _cell(timer, layer, held, x, ceilings)
                yield cell | _told(precision, shape, rows, base[rows], cell["ms"])


def _plain_ms(timer: Timer, x: torch.Tensor, weight: torch.Tensor) -> float:
    return timer.median_ms(lambda: F.linear(x, weight))


def _filled(timer: Timer, precision: str, weight: torch.Tensor) -> Layer:
    """A layer that has taken in the weight `[out, in]`."""
    place = timer.place
    out_features, in_features = weight.shape
    layer = make_linear(
        precision, in_features, out_features, bias=False, dtype=place.dtype, device=place.device
    )
    layer.swallow("weight", weight)
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
