"""The linear layers below 16 bits: one class for each layout of a weight.

    GroupedLinear    3, 4 bits in plain nibbles: any device, dtype and shape
    TiledLinear      3, 4 bits in tiles of the CPU's int4 kernel: bf16, whole tiles
    RowLinear        8 bits, a scale and a zero a row
    TokenInt8Linear  8-bit weights, and activations that are quantized to 8 bits

`llmpq.kernel_table` says which kernel multiplies how many rows. 8-bit activations of a part of a
matrix get the scale of that part.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmpq.kernel_table import FEW_ROWS, FUSED_UNPACKING, INT4_READ, INT8_READ
from llmpq.quant import kernels
from llmpq.quant.base import CENTRE_UP_TO, GridLinear, QuantizedLinear, Shapes
from llmpq.quant.packing import (
    expand_nibbles,
    pack,
    pad_columns,
    padded_columns,
    squeeze_nibbles,
    unpack,
)
from llmpq.quant.part import columns_of
from llmpq.quant.rounding import SCALE_DTYPE, Rounding, quantize_symmetric
from llmpq.workspace import TILE_ROWS


class GroupedLinear(GridLinear):
    """3 or 4 bits, `(code - zero) * scale` a group, dequantized some rows at a time."""

    weight_buffers = ("packed", "scales", "zeros")
    layout = "grouped"
    packed: Tensor  # uint8 [out, bits * ceil(in / 8)]
    scales: Tensor  # [out, groups], bf16 unless they were adopted
    zeros: Tensor  # the same, integers
    scale_dtype = SCALE_DTYPE

    def adopt(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Packs codes uint8 `[out, in]` with their own grids `[out, groups]`, of one float type."""
        self.scale_dtype = scales.dtype
        super().adopt(codes, scales, zeros)

    def reserve(self, group: int) -> None:
        """Make room for the weight."""
        row_bytes = padded_columns(self.in_features) // 8 * self.bits
        num_groups = self.in_features // group
        self.packed = self._room("packed", self.out_features, row_bytes, dtype=torch.uint8)
        grids = self.out_features, num_groups
        self.scales = self._room("scales", *grids, dtype=self.scale_dtype)
        self.zeros = self._room("zeros", *grids, dtype=self.scale_dtype)

    def keep(self, rows: slice, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Pack and keep some rows."""
        self.packed[rows] = pack(codes, self.bits)
        self.scales[rows], self.zeros[rows] = scales, zeros

    @property
    def triton_weight(self) -> tuple[Tensor, Tensor, Tensor]:
        """The buffers of the weight."""
        return self.packed, self.scales, self.zeros

    @property
    def group(self) -> int:
        """The weights that share a scale: by the scales, once the weight is loaded."""
        return super().group if self.scales is None else self.in_features // self.scales.shape[1]

    def torch_rows(self, start: int, stop: int) -> Tensor:
        """Rows of the dequantized weight, by torch's operators."""
        rows = slice(start, stop)
        codes = unpack(self.packed[rows], self.bits, self.in_features).contiguous()
        return kernels.dequantize(codes, self.scales[rows], self.zeros[rows], self.dtype)


class TiledLinear(GridLinear):
    """3 or 4 bits in tiles of the CPU's int4 kernel, which are unpacked where rows are many."""

    weight_buffers = ("tiles", "scale_and_zero")
    layout = "tiled"
    tiles: Tensor  # uint8 [out / 64, in * 8 * bits]
    scale_and_zero: Tensor  # bf16 [groups, out, 2]

    def reserve(self, group: int) -> None:
        """Make room for the weight."""
        num_tiles = self.out_features // TILE_ROWS
        tile_bytes = self.in_features * TILE_ROWS // 8 * self.bits
        grid_shape = (self.in_features // group, self.out_features, 2)
        self.tiles = self._empty(num_tiles, tile_bytes, dtype=torch.uint8)
        self.scale_and_zero = self._empty(*grid_shape, dtype=SCALE_DTYPE)

    def keep(self, rows: slice, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Packs some tiles."""
        self.tiles[_tiles(rows)] = squeeze_nibbles(kernels.tile_nibbles(codes), self.bits)
        self.scale_and_zero[:, rows] = kernels.pack_scale_and_zero(scales, zeros)

    @property
    def group(self) -> int:
        """The weights that share a scale: by the scales, once the weight is loaded."""
        grids = self.scale_and_zero
        return super().group if grids is None else self.in_features // grids.shape[0]

    def multiply(self, x: Tensor) -> Tensor:
        """Multiplies few rows by the int4 kernel, and many by dequantized chunks."""
        if len(x) and self.kernel(len(x)) == INT4_READ:
            return kernels.int4_linear(x, self.tiles, self.bits, self.scale_and_zero)
        return super().multiply(x)

    def torch_rows(self, start: int, stop: int) -> Tensor:
        """Rows of the dequantized weight, by torch's operators."""
        rows = slice(start, stop)
        nibbles = expand_nibbles(self.tiles[_tiles(rows)], self.bits)
        codes = kernels.untile_nibbles(nibbles, self.in_features)
        scales, zeros = kernels.unpack_scale_and_zero(self.scale_and_zero[:, rows])
        return kernels.dequantize(codes, scales, zeros, self.dtype)


class RowLinear(GridLinear):
    """8 bits, a scale and a zero a row; 128 is subtracted from codes and zeros.

    Most rows then have a zero of 0. Other zeros are added back as a term that grows with the mean
    of the input, and cost precision in the kernel's bf16 result (see `CENTRE_UP_TO`).
    """

    weight_buffers = ("codes", "scales", "zeros")
    layout = "rows"
    codes: Tensor  # int8 [out, in padded to a multiple of 8]
    scales: Tensor  # bf16 [out]
    zeros: Tensor  # bf16 [out], integers

    @property
    def centre_up_to(self) -> float:
        """The factor by which a scale may widen to have its zero in the middle."""
        return CENTRE_UP_TO

    def reserve(self, group: int) -> None:
        """Allocates the weight; a group is a row."""
        cols = padded_columns(self.in_features)
        self.codes = self._room("codes", self.out_features, cols, dtype=torch.int8)
        self.scales = self._room("scales", self.out_features, dtype=SCALE_DTYPE)
        self.zeros = self._room("zeros", self.out_features, dtype=SCALE_DTYPE)

    def keep(self, rows: slice, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Stores some rows."""
        self.codes[rows] = (pad_columns(codes) ^ kernels.BYTE_MIDDLE).view(torch.int8)
        self.scales[rows] = scales[:, 0]
        self.zeros[rows] = zeros[:, 0].to(SCALE_DTYPE) - kernels.BYTE_MIDDLE

    def multiply(self, x: Tensor) -> Tensor:
        """Multiplies few rows by a packed kernel, else by dequantized or (bf16) unscaled chunks."""
        name = self.kernel(len(x))
        if len(x) and name == INT8_READ:
            return kernels.int8_linear(x, self.codes, self.scales, self.zeros)
        if self.dtype != torch.bfloat16 or name in (FEW_ROWS, FUSED_UNPACKING):
            return super().multiply(x)
        out = kernels.linear_by_chunks(x, self.out_features, self._integer_rows)
        return out * self.scales

    @property
    def triton_weight(self) -> tuple[Tensor, Tensor, Tensor]:
        """The buffers of the weight."""
        return self.codes, self.scales, self.zeros

    def torch_rows(self, start: int, stop: int) -> Tensor:
        """Rows of the dequantized weight, by torch's operators."""
        return self._integer_rows(start, stop).mul_(self.scales[start:stop, None].to(self.dtype))

    def _integer_rows(self, start: int, stop: int) -> Tensor:
        """`code - zero`: integers up to 255, which bf16 holds exactly."""
        codes = self.codes[start:stop, : self.in_features].to(self.dtype)
        return codes.sub_(self.zeros[start:stop, None].to(self.dtype))


class TokenInt8Linear(QuantizedLinear):
    """int8 weights with a scale a row, int8 activations with a scale a token, exact integer sums.

    The packed weight is opaque: the kernel keeps it in blocks of 64 by 64 with 4 more bytes a row,
    which torch does not count, so that real memory is a little above `weight_bytes`.
    """

    weight_buffers = ("packed", "scales")
    layout = "token int8"
    packed: Tensor  # int8, opaque, reads as [in, out]
    scales: Tensor  # fp32 [out]

    def store(self, weight: Tensor, rounding: Rounding) -> None:
        """Rounds to nearest, whatever `rounding` is, and packs as the kernel expects."""
        codes, scales = quantize_symmetric(weight.to(self.home))
        self.adopt(columns_of(codes, self.part), scales)

    def adopt(self, codes: Tensor, scales: Tensor) -> None:
        """Stores codes int8 `[out, in]` and their scales fp32 `[out]` unchanged."""
        self.scales = scales.to(self.home)
        self.packed = torch.ops.onednn.qlinear_prepack(codes.to(self.home), None)

    def packed_state(self) -> dict[str, Tensor]:
        """Codes int8 `[out, in]` and scales, from which the kernel's packing is made again."""
        return {"codes": self.packed.to_dense().t().contiguous(), "scales": self.scales}

    def packed_shapes(self) -> Shapes:
        """The data types and shapes of the codes and the scales."""
        codes = torch.int8, (self.out_features, self.in_features)
        return {"codes": codes, "scales": (torch.float32, (self.out_features,))}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Packs the codes as the kernel expects."""
        self.adopt(state["codes"], state["scales"].clone())

    def multiply(self, x: Tensor) -> Tensor:
        """Multiplies any number of rows; a row's result does not depend on the others."""
        return kernels.token_int8_linear(x, self.packed, self.scales)

    def dequantized_weight(self) -> Tensor:
        """The weight `[out, in]`."""
        codes = self.packed.to_dense().t().float()
        return (codes * self.scales[:, None]).to(self.dtype)


def _tiles(rows: slice) -> slice:
    return slice(rows.start // TILE_ROWS, rows.stop // TILE_ROWS)
