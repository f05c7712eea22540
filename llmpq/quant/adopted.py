"""Layers for weights that are quantized already, with their own codes and grids.

`PackedWeight` is one matrix of a quantized checkpoint. `keep_codes` loads it into a layer that was
built for the same bits: the layer itself where its own format can hold the grids without rounding
them, otherwise an `AdoptedLinear`, which holds grids of any group size, scales of any float type,
and columns that belong to groups in any order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmpq.expert_kernels import expert_choices
from llmpq.kernel_table import choices
from llmpq.quant import kernels
from llmpq.quant.base import GridLinear, QuantizedLinear
from llmpq.quant.here import machine_here
from llmpq.quant.humming import HummingLinear
from llmpq.quant.linear import GroupedLinear, RowLinear, TiledLinear, TokenInt8Linear
from llmpq.quant.packing import pack, padded_columns, unpack
from llmpq.quant.part import INPUTS, TensorPart
from llmpq.quant.rounding import BLOCK_WEIGHTS, SCALE_DTYPE


@dataclass(frozen=True)
class PackedWeight:
    """A weight `(code - zero) * scale`, computed in the scales' own float type."""

    bits: int
    codes: Tensor  # uint8 [out, in]
    scales: Tensor  # fp16, bf16 or fp32 [out, groups]
    zeros: Tensor  # uint8 [out, groups]
    group_of: Tensor | None = None  # int32 [in], the group of each column; None: equal runs

    def dequantized(self) -> Tensor:
        """The weight `[out, in]` in the float type of the scales."""
        weight = torch.empty(self.codes.shape, dtype=self.scales.dtype)
        step = max(1, BLOCK_WEIGHTS // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            grids = self.scales[rows], self.zeros[rows], self.group_of
            weight[rows] = _dequantize(self.codes[rows], *grids)
        return weight

    def cut(self, part: TensorPart | None) -> "PackedWeight":
        """The part of the weight that a layer holds; None returns all of it."""
        if part is None:
            return self
        codes = part.of(self.codes)
        if part.dim != INPUTS:
            scales, zeros = part.of(self.scales).clone(), part.of(self.zeros).clone()
            return PackedWeight(self.bits, codes, scales, zeros, self.group_of)
        used, group_of = self._groups()[part.start : part.stop].unique(return_inverse=True)
        runs = torch.arange(part.size) * len(used) // part.size
        plain = part.size % len(used) == 0 and torch.equal(group_of, runs)
        grids = self.scales[:, used], self.zeros[:, used]
        return PackedWeight(self.bits, codes, *grids, None if plain else group_of.int())

    def _groups(self) -> Tensor:
        """The group of each column, `[in]`."""
        cols = self.codes.shape[1]
        runs = torch.arange(cols) // (cols // self.scales.shape[1])
        return runs if self.group_of is None else self.group_of

    @property
    def is_symmetric_by_row(self) -> bool:
        """Whether it has 8 bits, one scale a row, and every zero in the middle."""
        rows = self.bits == 8 and self.scales.shape[1] == 1 and self.group_of is None
        return rows and bool((self.zeros == kernels.BYTE_MIDDLE).all())


class AdoptedLinear(QuantizedLinear):
    """3, 4 or 8 bits in the grids of a checkpoint, dequantized some rows at a time."""

    weight_buffers = ("packed", "scales", "zeros", "group_of")
    packed: Tensor  # uint8 [out, bits * ceil(in / 8)]
    scales: Tensor  # [out, groups]
    zeros: Tensor  # uint8 [out, groups]
    group_of: Tensor | None  # int32 [in]

    def __init__(self, like: GridLinear, weight: PackedWeight) -> None:
        sizes = like.in_features, like.out_features
        super().__init__(*sizes, like.has_bias, like.dtype, like.home, like.bits, like.part)
        self.bias = like.bias
        row_bytes = padded_columns(self.in_features) // 8 * self.bits
        self.packed = self._empty(self.out_features, row_bytes, dtype=torch.uint8)
        for rows in self._chunks():
            self.packed[rows] = pack(weight.codes[rows].to(self.home), self.bits)
        self.scales, self.zeros = weight.scales.to(self.home), weight.zeros.to(self.home)
        if weight.group_of is not None:
            self.group_of = weight.group_of.to(self.home)

    def _weight_rows(self, start: int, stop: int) -> Tensor:
        rows = slice(start, stop)
        codes = unpack(self.packed[rows], self.bits, self.in_features)
        weight = _dequantize(codes, self.scales[rows], self.zeros[rows], self.group_of)
        return weight.to(self.dtype)


def keep_codes(layer: nn.Module, weight: PackedWeight) -> QuantizedLinear | None:
    """`layer` with these codes, or a layer with the same bias that replaces it; None: neither fits.

    `layer` may have a bias, but no weight. It does not fit where it has other bits, or a format
    without room for these grids (8-bit activations need one scale a row, and no zeros). Where it
    holds a part of the matrix, it keeps that part.
    """
    weight = weight.cut(layer.part) if isinstance(layer, QuantizedLinear) else weight
    if isinstance(layer, TokenInt8Linear):
        if not weight.is_symmetric_by_row:
            return None
        signed = (weight.codes ^ kernels.BYTE_MIDDLE).view(torch.int8)
        layer.adopt(signed, weight.scales[:, 0].float())
        return layer
    if not isinstance(layer, GridLinear) or layer.bits != weight.bits:
        return None
    if not _holds_exactly(layer, weight):
        return AdoptedLinear(layer, weight)
    layer.adopt(weight.codes, weight.scales, weight.zeros)
    return layer


def _holds_exactly(layer: GridLinear, weight: PackedWeight) -> bool:
    """Whether the layer's own format holds these grids, and computes in their float type."""
    if isinstance(layer, HummingLinear):
        return weight.group_of is None and layer.adopts(weight.scales)
    if weight.group_of is not None or weight.scales.dtype != layer.dtype:
        return False
    group = layer.in_features // weight.scales.shape[1]
    if isinstance(layer, GroupedLinear) and layer.place is not None:
        shape = layer.out_features, layer.in_features, group
        machine = machine_here(layer.home, layer.dtype)
        return expert_choices(machine, str(layer.bits), *shape).grouped is not None
    if layer.dtype != SCALE_DTYPE:
        return False
    if isinstance(layer, TiledLinear):
        shape = layer.out_features, layer.in_features, group
        machine = machine_here(layer.home, layer.dtype)
        suits = bool(choices(machine, str(layer.bits), *shape, layout=layer.layout))
        return suits and bool((weight.scales > 0).all())  # its zeros are kept times the scales
    return isinstance(layer, RowLinear) and group == layer.in_features


def _dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor | None) -> Tensor:
    """`(code - zero) * scale` in the type of the scales, where only the product rounds."""
    if group_of is not None:
        scales, zeros = scales[:, group_of], zeros[:, group_of]
    return kernels.dequantize_bytes(codes, scales, zeros)
