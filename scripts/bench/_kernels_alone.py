"""Times of kernels that are called by themselves, each beside another way to the same result.

On a card that humming serves, layers never meet the project's own kernels in Triton; here they are
timed all the same, as they serve older cards. A row says what, how long, the bytes that it has to
move as a share of a copy's bandwidth, the other way and the speed against it, and how far the
answer is from one in 32 bits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from _kernels_linears import Shape, make_ready
from _kernels_place import Call, Ceilings, Deadline, Place, Timer

from llmpq.quant import QuantizedLinear
from llmpq.quant.linear import GroupedLinear, RowLinear

BITS = (4, 3, 8)  # the most wanted first
FEW_ROWS = (1, 8, 16)
INVARIANT_ROWS = (16, 256)
LLAMA_8B_HEADS = (32, 8, 128)  # query heads, key heads, their size
LANES = ((32, 640), (32, 2048), (1, 8192))  # rows, columns
KERNEL_S = 2.0  # what one row may take, compiling included
WEIGHT_SCALE = 0.02

Packed = GroupedLinear | RowLinear
Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Duel:
    """Two ways to one result. `num_bytes`: what has to be read and written."""

    what: str
    shape: str
    call: Call
    num_bytes: int
    beside: str
    other: Call
    exact: torch.Tensor  # fp32

    def row(self, timer: Timer, ceilings: Ceilings) -> dict[str, Any]:
        """Both timed."""
        error = relative_error(self.call(), self.exact)
        ms, other_ms = timer.median_ms(self.call), timer.median_ms(self.other)
        share = self.num_bytes / ms / 1e6 / ceilings.copy_gb_per_s
        told = {"kind": "kernel", "what": self.what, "shape": self.shape, "ms": ms}
        more = {"beside": self.beside, "against": other_ms / ms, "error": error}
        return told | {"share_of_copy": share} | more


Duels = Callable[[Place, Shape], Iterator[Duel]]  # of a weight of this shape, where it has one


def relative_error(found: Any, exact: torch.Tensor) -> float:
    """Of the norm."""
    return float((found.float() - exact).norm() / exact.norm())


@torch.inference_mode()
def time_alone(
    duels: Duels, shape: Shape, timer: Timer, ceilings: Ceilings, deadline: Deadline, keep: Keep
) -> None:
    """One kind of kernel at all its sizes, as long as there is time."""
    for duel in duels(timer.place, shape):
        if not deadline.allows(KERNEL_S):
            return
        keep(duel.row(timer, ceilings))


def packed_layer(place: Place, bits: int, shape: Shape) -> Packed:
    """A random layer in the layout that the Triton kernels read, whatever serves here."""
    out_features, in_features = shape
    make = RowLinear if bits == 8 else GroupedLinear
    layer = make(in_features, out_features, False, place.dtype, place.device, bits)
    layer.load_weight("weight", _random(place, *shape).mul_(WEIGHT_SCALE))
    return layer


def packed_arguments(layer: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zeros as the Triton kernels take them."""
    codes = layer.codes if isinstance(layer, RowLinear) else layer.packed
    return codes, layer.scales, layer.zeros


def triton_multiply(place: Place, shape: Shape) -> Iterator[Duel]:
    """Few rows times packed weights, beside torch's product with the same weight in 16 bits."""
    from llmpq.quant.triton_kernels import available, multiply_few_rows

    if not available(place.device):
        return
    for bits in BITS:
        layer = packed_layer(place, bits, shape)
        weight, arguments = layer.dequantized_weight(), packed_arguments(layer)
        for rows in FEW_ROWS:
            x = _random(place, rows, shape[1])
            yield Duel(
                f"Triton few-row multiply, {bits} bits",
                f"{_text(shape)}, {rows} rows",
                lambda x=x, a=arguments, b=bits: multiply_few_rows(x, *a, b),
                layer.weight_bytes,
                "16-bit product",
                lambda x=x, w=weight: F.linear(x, w),
                F.linear(x.float(), weight.float()),
            )


def triton_dequantize(place: Place, shape: Shape) -> Iterator[Duel]:
    """A packed weight written in 16 bits, beside a copy of as many bytes."""
    from llmpq.quant.triton_kernels import available, dequantize

    if not available(place.device):
        return
    for bits in BITS:
        layer = packed_layer(place, bits, shape)
        out = torch.empty(shape, dtype=place.dtype, device=place.device)
        arguments = (*packed_arguments(layer), bits, shape[1], place.dtype)
        num_bytes = layer.weight_bytes + out.nbytes
        source, target = torch.empty(2, num_bytes // 2, dtype=torch.uint8, device=place.device)
        yield Duel(
            f"Triton dequantize, {bits} bits",
            _text(shape),
            lambda a=arguments, o=out: dequantize(*a, out=o),
            num_bytes,
            "copy of as many bytes",
            lambda s=source, t=target: t.copy_(s),
            layer.dequantized_weight().float(),
        )


def humming_invariant(place: Place, shape: Shape) -> Iterator[Duel]:
    """humming's answers that do not depend on the other rows, beside its usual ones."""
    from llmpq.quant.humming import HummingLinear
    from llmpq.quant.humming_support import why_not_here

    if why_not_here(place.device) is not None:
        return
    out_features, in_features = shape
    weight = _random(place, *shape).mul_(WEIGHT_SCALE)
    for bits in BITS:
        layers = []
        for invariant in (True, False):
            where = place.dtype, place.device
            layer = HummingLinear(in_features, out_features, False, *where, bits)
            layer.batch_invariant = invariant
            layer.load_weight("weight", weight)
            layers.append(layer)
        held = layers[0].dequantized_weight().float()
        make_ready(layers, INVARIANT_ROWS, place)
        for rows in INVARIANT_ROWS:
            yield _invariant_duel(layers, held, _random(place, rows, in_features))


def _invariant_duel(layers: list[QuantizedLinear], held: torch.Tensor, x: torch.Tensor) -> Duel:
    invariant, usual = layers
    return Duel(
        f"humming, batch-invariant, {invariant.bits} bits",
        f"{_text((invariant.out_features, invariant.in_features))}, {len(x)} rows",
        lambda: invariant(x),
        invariant.weight_bytes,
        "humming",
        lambda: usual(x),
        F.linear(x.float(), held),
    )


def attention(place: Place, shape: Shape) -> Iterator[Duel]:
    """One query a row over a full lane of Llama-3.1-8B's keys, beside torch's own attention."""
    from llmpq.models.triton_attention import decode_attention
    from llmpq.quant.triton_kernels import available

    if not available(place.device):
        return
    query_heads, key_heads, size = LLAMA_8B_HEADS
    for rows, columns in LANES:
        query = _random(place, rows, query_heads, 1, size)
        keys, values = (_random(place, rows, key_heads, columns, size) for _ in range(2))
        mask = torch.ones(rows, 1, 1, columns, dtype=torch.bool, device=place.device)
        inputs = query, keys, values, mask
        yield Duel(
            "Triton decode attention",
            f"{rows} rows of {columns} columns",
            lambda i=inputs: decode_attention(*i, size**-0.5),
            keys.nbytes + values.nbytes,
            "torch's attention",
            lambda i=inputs: F.scaled_dot_product_attention(*i, enable_gqa=True),
            F.scaled_dot_product_attention(*(t.float() for t in inputs[:3]), mask, enable_gqa=True),
        )


def _random(place: Place, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=place.device).to(place.dtype)


def _text(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]}"


KERNELS: dict[str, Duels] = {
    "Triton multiply": triton_multiply,
    "Triton dequantize": triton_dequantize,
    "decode attention": attention,
    "batch-invariant humming": humming_invariant,
}
