"""Precisions by name, and how many bytes a weight matrix takes at each.

A precision is a string, as plans write it: "16", "8", "4", "3" are weight-only; "8-w8a8" stores
8-bit weights per output channel and quantizes activations per token to 8 bits as it multiplies.
"nf4" and "8-bnb" are bitsandbytes': optional, there where that library is, and used only where
they are asked for by name. "nf4" has 16 levels spaced as normal weights are and a scale each 64
weights of a row. "8-bnb" is LLM.int8: like "8-w8a8", but inputs of 6.0 and above stay at 16 bits.

Weight-only precisions below 16 bits are asymmetric: a weight is `(code - zero) * scale`, one scale
and one zero a group of consecutive weights of a row. 3 and 4 bits use groups of 128, or of 64
where 128 does not divide the row, or else the whole row; 8 bits use the whole row.
The byte counts here are what `llmpq.quant` really holds; a test compares the two.

Layers with routed experts may hold the experts at another precision than the rest:
"8+experts@4". `layer_precision` takes such names apart; a name without experts is of both.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

SCALE_BYTES = 2  # scales and zeros are kept in a 16-bit float each
CHANNEL_SCALE_BYTES = 4  # w8a8, 8-bnb: one fp32 scale an output channel
NF4_BLOCK = 64  # weights of a row that share a scale, in fp32; rows are padded to whole blocks
NF4_SCALE_BYTES = 4


@dataclass(frozen=True)
class Precision:
    """One way to store the weights of a layer; `library`: the optional one that does it."""

    name: str
    weight_bits: int
    weight_only: bool = True
    library: str | None = None

    def weight_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of one `[out_features, in_features]` matrix, scales and zeros included."""
        if self.weight_bits == 16:
            return 2 * out_features * in_features
        if not self.weight_only:
            return out_features * (in_features + CHANNEL_SCALE_BYTES)
        if self.library is not None:
            num_blocks = -(-in_features // NF4_BLOCK)
            return out_features * num_blocks * (NF4_BLOCK // 2 + NF4_SCALE_BYTES)
        num_groups = in_features // group_size(self.weight_bits, in_features)
        packed_row = -(-in_features // 8) * self.weight_bits
        return out_features * (packed_row + 2 * SCALE_BYTES * num_groups)


PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("16", 16),
        Precision("8", 8),
        Precision("8-w8a8", 8, weight_only=False),
        Precision("4", 4),
        Precision("3", 3),
        Precision("nf4", 4, library="bitsandbytes"),
        Precision("8-bnb", 8, weight_only=False, library="bitsandbytes"),
    )
}
KNOWN_NAMES = f"{', '.join(PRECISIONS)}, and two of them for layers with experts, as in 8+experts@4"
# What is measured and planned with unless other precisions are asked for by name.
STANDARD = tuple(name for name, p in PRECISIONS.items() if p.library is None)


def group_size(weight_bits: int, in_features: int) -> int:
    """How many consecutive weights of a row share a scale and a zero."""
    if weight_bits < 8:
        for size in (128, 64):
            if in_features % size == 0:
                return size
    return in_features


# ---- layers with experts

EXPERTS_AT = "+experts@"


class LayerPrecision(NamedTuple):
    """The precisions of one layer: of its experts' matrices, and of all its others."""

    rest: str
    experts: str

    @property
    def name(self) -> str:
        """As plans write it."""
        return self.rest if self.rest == self.experts else f"{self.rest}{EXPERTS_AT}{self.experts}"


def layer_precision(name: str) -> LayerPrecision:
    """The precisions that a name of a plan stands for, known or not."""
    rest, _, experts = name.partition(EXPERTS_AT)
    return LayerPrecision(rest, experts or rest)


def variance_of_errors(precision: str) -> float:
    """The variance of errors at the bits of a layer's precision, on average of its two parts."""
    return sum(4.0 ** -PRECISIONS[part].weight_bits for part in layer_precision(precision)) / 2


def is_layer_precision(name: str) -> bool:
    """Whether plans may have this name."""
    held = layer_precision(name)
    return held.name == name and set(held) <= set(PRECISIONS)


def bits_text(name: str) -> str:
    """A layer precision as reports name it: "4-bit", "8-bit+experts@4"; others keep their names."""
    rest, experts = layer_precision(name)
    text = f"{rest}-bit" if rest.isdigit() else rest
    return text if rest == experts else f"{text}{EXPERTS_AT}{experts}"


def is_optional(name: str) -> bool:
    """Whether a layer of this precision needs an optional library."""
    return any(PRECISIONS[part].library is not None for part in layer_precision(name))


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Layer precisions, each once, in the order of `PRECISIONS`: of the rest, then of experts."""
    places = {name: place for place, name in enumerate(PRECISIONS)}
    return tuple(sorted(set(names), key=lambda name: [places[p] for p in layer_precision(name)]))


def with_fewer_for_experts(precisions: Iterable[str]) -> tuple[str, ...]:
    """These precisions, and all pairs of them of which the experts have the fewer bits."""
    alone = [name for name in dict.fromkeys(precisions) if is_layer_precision(name)]
    plain = [name for name in alone if name in PRECISIONS]
    pairs = (LayerPrecision(rest, experts) for rest in plain for experts in plain)
    fewer = [
        p.name for p in pairs if PRECISIONS[p.experts].weight_bits < PRECISIONS[p.rest].weight_bits
    ]
    return in_order([*alone, *fewer])
