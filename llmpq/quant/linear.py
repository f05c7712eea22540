"""The linear layers: one class for each way to store a weight.

A layer is built empty. `swallow("weight", tensor)` rounds and packs the raw weight, some rows at a
time, so the raw tensor may be freed afterwards and nothing near a second copy of it ever exists.
Callers never ask how many bits a layer has: every class offers `swallow`, `weight_bytes`,
`dequantized_weight` and `forward`, and the checkpoint loop has no `if`.

    PlainLinear      16 bits
    GroupedLinear    3, 4 bits in plain nibbles: any device, dtype and shape
    TiledLinear      3, 4 bits in tiles of the CPU's int4 kernel: bf16, whole tiles
    RowLinear        8 bits, a scale and a zero a row
    TokenInt8Linear  8-bit weights and, as it multiplies, 8-bit activations

A layer may hold a part of a matrix (`TensorPart`), with the codes and grids of the whole one; its
sizes are its own. `part_to_read` says what it must be given: where grids or GPTQ look at more of a
row than is kept, whole rows, which it cuts after rounding. 8-bit activations get the scale of their
own part.

Inference only: weights take no gradient.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from llmpq.precision import group_size
from llmpq.quant import kernels
from llmpq.quant.packing import pack, pad_columns, padded_columns, squeeze_nibbles, unpack
from llmpq.quant.part import (
    TensorPart,
    columns_of,
    grids_of,
    input_part,
    part_group,
    row_length,
)
from llmpq.quant.rounding import (
    SCALE_DTYPE,
    Rounding,
    quantize,
    quantize_mse,
    quantize_symmetric,
)

# 8 bits: how much wider a scale may get to have its zero in the middle. With inputs that are never
# negative, zeros merely near it doubled the error of the int8 kernel (1.7 % against 0.9 %).
CENTRE_UP_TO = 1.5
BY_GROUP = (quantize, quantize_mse)  # roundings that look at nothing but a group


class PlainLinear(nn.Linear):
    """16 bits: `nn.Linear` whose weight arrives later."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        part: TensorPart | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        self.requires_grad_(False)
        self.home, self.part = device, part

    @property
    def raw_shapes(self) -> dict[str, tuple[int, ...]]:
        """What it must swallow, by name; of a part, the shapes of the whole."""
        return _raw_shapes(self.out_features, self.in_features, self.bias is not None, self.part)

    def part_to_read(self, name: str, rounding: Rounding = quantize) -> TensorPart | None:
        """The part that it must be given of the whole "weight" or "bias"; None: all."""
        return None if name == "bias" and input_part(self.part) else self.part

    def swallow(self, name: str, tensor: Tensor, rounding: Rounding = quantize) -> None:
        """Copy the raw "weight" `[out, in]` or "bias" `[out]`."""
        _check(name, tensor, self.raw_shapes.get(name), self.part_to_read(name))
        own = tensor.detach().to(device=self.home, dtype=self.weight.dtype, copy=True)
        setattr(self, name, nn.Parameter(own.contiguous(), requires_grad=False))

    @property
    def weight_bytes(self) -> int:
        """Bytes held for the weight; 0 until it is swallowed."""
        return 0 if self.weight.is_meta else self.weight.nbytes

    def dequantized_weight(self) -> Tensor:
        """The weight `[out, in]`."""
        return self.weight


class QuantizedLinear(nn.Module):
    """What all quantised layers share: bias, checks, shapes, bytes."""

    weight_buffers: tuple[str, ...]  # the names of the buffers that hold the weight
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        bits: int = 8,
        part: TensorPart | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.dtype, self.home, self.has_bias, self.part = dtype, device, bias, part
        for name in (*self.weight_buffers, "bias"):
            self.register_buffer(name, None)

    @property
    def raw_shapes(self) -> dict[str, tuple[int, ...]]:
        """What it must swallow, by name; of a part, the shapes of the whole."""
        return _raw_shapes(self.out_features, self.in_features, self.has_bias, self.part)

    @property
    def row_length(self) -> int:
        """Inputs of the whole matrix, which are rounded together."""
        return row_length(self.in_features, self.part)

    def part_to_read(self, name: str, rounding: Rounding = quantize) -> TensorPart | None:
        """The part that it must be given of the whole "weight" or "bias"; None: all."""
        if input_part(self.part) is None or (name == "weight" and self.rounds_alone(rounding)):
            return self.part
        return None

    def rounds_alone(self, rounding: Rounding) -> bool:
        """Whether a part of the inputs gets the codes of whole rows without the rest of them."""
        return False

    def swallow(self, name: str, tensor: Tensor, rounding: Rounding = quantize) -> None:
        """Take in the raw "weight" `[out, in]` (rounded and packed) or "bias" `[out]`."""
        _check(name, tensor, self.raw_shapes.get(name), self.part_to_read(name, rounding))
        if name == "bias":
            self.bias = tensor.detach().to(device=self.home, dtype=self.dtype, copy=True)
        else:
            with torch.no_grad():
                self.store(tensor.detach(), rounding)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` to `[..., out]`."""
        out = self.multiply(x.reshape(-1, self.in_features).contiguous())
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    @property
    def weight_bytes(self) -> int:
        """Bytes held for the weight: packed codes, scales and zeros; 0 until it is swallowed."""
        held = (getattr(self, name) for name in self.weight_buffers)
        return sum(buffer.nbytes for buffer in held if buffer is not None)

    def extra_repr(self) -> str:
        """Shape, bits and bias, as `nn.Linear` prints them."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={self.bits}, bias={self.has_bias}"

    def packed_state(self) -> dict[str, Tensor]:
        """The packed weight as plain tensors: what `restore` of a like layer takes."""
        return {name: getattr(self, name) for name in self.weight_buffers}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Copy a packed weight, in place of rounding it anew."""
        for name in self.weight_buffers:
            setattr(self, name, state[name].to(self.home, copy=True))

    def store(self, weight: Tensor, rounding: Rounding) -> None:
        """Round, pack and keep the raw weight, in whole rows unless it `rounds_alone`."""
        raise NotImplementedError

    def multiply(self, x: Tensor) -> Tensor:
        """`x [M, in]`, contiguous, to `[M, out]` without the bias: dequantised chunk by chunk."""
        return kernels.linear_by_chunks(x, self.out_features, self._weight_rows)

    def dequantized_weight(self) -> Tensor:
        """The weight `[out, in]` in the layer's dtype, as the stored codes stand for it."""
        return self._weight_rows(0, self.out_features)

    def _weight_rows(self, start: int, stop: int) -> Tensor:
        """Rows of the dequantised weight."""
        raise NotImplementedError

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.home)

    def _chunks(self, at_least: int = 0) -> Iterator[slice]:
        """Output rows to pack at a time."""
        step = max(at_least, kernels.chunk_rows(self.row_length, self.home))
        for start in range(0, self.out_features, step):
            yield slice(start, min(start + step, self.out_features))


class GridLinear(QuantizedLinear):
    """What layers share whose weights are `(code - zero) * scale`, a scale and a zero a group."""

    centre_up_to = 1.0  # how much wider a scale may get to have its zero in the middle

    def store(self, weight: Tensor, rounding: Rounding) -> None:
        """Round, pack and keep, some rows at a time; as many as `rounding` asks for, if it does."""
        group = group_size(self.bits, self.row_length)
        part = None if self.rounds_alone(rounding) else self.part
        self.reserve(part_group(group, self.part))
        for rows in self._chunks(getattr(rounding, "rows_at_once", 0)):
            raw = weight[rows].to(self.home)
            codes, *grids = rounding(raw, self.bits, group, self.centre_up_to)
            scales, zeros = (grids_of(grid, group, part) for grid in grids)
            self.keep(rows, columns_of(codes, part), scales, zeros)

    def rounds_alone(self, rounding: Rounding) -> bool:
        """Where every group of the whole lies inside the part or outside."""
        group = group_size(self.bits, self.row_length)
        return rounding in BY_GROUP and part_group(group, self.part) == group

    def adopt(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Pack and keep codes uint8 `[out, in]` in their own grids, bf16 `[out, groups]`."""
        self.reserve(self.in_features // scales.shape[1])
        for rows in self._chunks():
            self.keep(rows, *(t[rows].to(self.home) for t in (codes, scales, zeros)))

    def reserve(self, group: int) -> None:
        """Make room for the weight, `group` weights of a row to a scale."""
        raise NotImplementedError

    def keep(self, rows: slice, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Pack and keep some rows: codes uint8 `[rows, in]`, grids `[rows, groups]`."""
        raise NotImplementedError


class GroupedLinear(GridLinear):
    """3 or 4 bits, `(code - zero) * scale` a group; dequantised some rows at a time."""

    weight_buffers = ("packed", "scales", "zeros")
    packed: Tensor  # uint8 [out, bits * ceil(in / 8)]
    scales: Tensor  # bf16 [out, groups]
    zeros: Tensor  # bf16 [out, groups], integers

    def reserve(self, group: int) -> None:
        """Make room for the weight."""
        row_bytes = padded_columns(self.in_features) // 8 * self.bits
        num_groups = self.in_features // group
        self.packed = self._empty(self.out_features, row_bytes, dtype=torch.uint8)
        self.scales = self._empty(self.out_features, num_groups, dtype=SCALE_DTYPE)
        self.zeros = torch.empty_like(self.scales)

    def keep(self, rows: slice, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Pack and keep some rows."""
        self.packed[rows] = pack(codes, self.bits)
        self.scales[rows], self.zeros[rows] = scales, zeros

    def _weight_rows(self, start: int, stop: int) -> Tensor:
        rows = slice(start, stop)
        codes = unpack(self.packed[rows], self.bits, self.in_features).contiguous()
        return kernels.dequantize(codes, self.scales[rows], self.zeros[rows], self.dtype)


class TiledLinear(GridLinear):
    """3 or 4 bits as the CPU's int4 kernel reads them; taken apart again where rows are many."""

    weight_buffers = ("tiles", "scale_and_zero")
    tiles: Tensor  # uint8 [out / 64, in * 8 * bits]
    scale_and_zero: Tensor  # bf16 [groups, out, 2]

    def reserve(self, group: int) -> None:
        """Make room for the weight."""
        num_tiles = self.out_features // kernels.TILE_ROWS
        tile_bytes = self.in_features * kernels.TILE_ROWS // 8 * self.bits
        grid_shape = (self.in_features // group, self.out_features, 2)
        self.tiles = self._empty(num_tiles, tile_bytes, dtype=torch.uint8)
        self.scale_and_zero = self._empty(*grid_shape, dtype=SCALE_DTYPE)

    def keep(self, rows: slice, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Pack and keep some tiles."""
        self.tiles[_tiles(rows)] = squeeze_nibbles(kernels.tile_nibbles(codes), self.bits)
        self.scale_and_zero[:, rows] = kernels.pack_scale_and_zero(scales, zeros)

    def multiply(self, x: Tensor) -> Tensor:
        """The int4 kernel for few rows, dequantised chunks for many."""
        if 0 < x.shape[0] <= kernels.INT4_MAX_ROWS:
            return kernels.int4_linear(x, self.tiles, self.bits, self.scale_and_zero)
        return super().multiply(x)

    def _weight_rows(self, start: int, stop: int) -> Tensor:
        rows = slice(start, stop)
        nibbles = kernels.expand_nibbles(self.tiles[_tiles(rows)], self.bits)
        codes = kernels.untile_nibbles(nibbles, self.in_features)
        scales, zeros = kernels.unpack_scale_and_zero(self.scale_and_zero[:, rows])
        return kernels.dequantize(codes, scales, zeros, self.dtype)


class RowLinear(GridLinear):
    """8 bits, a scale and a zero a row; codes and zeros are kept less 128.

    Most rows get a zero of 0 that way: one beside it is put back as a term that grows with the
    mean of the input, and takes the kernel's bf16 answer with it (see `CENTRE_UP_TO`).
    """

    weight_buffers = ("codes", "scales", "zeros")
    codes: Tensor  # int8 [out, in padded to a multiple of 8]
    scales: Tensor  # bf16 [out]
    zeros: Tensor  # bf16 [out], integers
    centre_up_to = CENTRE_UP_TO

    def reserve(self, group: int) -> None:
        """Make room for the weight; a group is a row."""
        cols = padded_columns(self.in_features)
        self.codes = self._empty(self.out_features, cols, dtype=torch.int8)
        self.scales = self._empty(self.out_features, dtype=SCALE_DTYPE)
        self.zeros = torch.empty_like(self.scales)

    def keep(self, rows: slice, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Keep some rows."""
        self.codes[rows] = (pad_columns(codes) ^ kernels.BYTE_MIDDLE).view(torch.int8)
        self.scales[rows] = scales[:, 0]
        self.zeros[rows] = zeros[:, 0].to(SCALE_DTYPE) - kernels.BYTE_MIDDLE

    def multiply(self, x: Tensor) -> Tensor:
        """The int8 kernel for few rows in bf16; else chunks, dequantised or scaled afterwards."""
        if self.dtype != torch.bfloat16:
            return super().multiply(x)
        suits = kernels.int8_kernel_suits(self.in_features, x.dtype, x.device)
        if suits and 0 < x.shape[0] <= kernels.INT8_MAX_ROWS:
            return kernels.int8_linear(x, self.codes, self.scales, self.zeros)
        out = kernels.linear_by_chunks(x, self.out_features, self._integer_rows)
        return out * self.scales

    def _weight_rows(self, start: int, stop: int) -> Tensor:
        return self._integer_rows(start, stop).mul_(self.scales[start:stop, None].to(self.dtype))

    def _integer_rows(self, start: int, stop: int) -> Tensor:
        """`code - zero`: integers within 255, exact even in bf16."""
        codes = self.codes[start:stop, : self.in_features].to(self.dtype)
        return codes.sub_(self.zeros[start:stop, None].to(self.dtype))


class TokenInt8Linear(QuantizedLinear):
    """int8 weights with a scale a row, int8 activations with a scale a token, exact integer sums.

    The packed weight is opaque: the kernel keeps it in blocks of 64 by 64 with 4 more bytes a row,
    which torch does not count, so real memory is a little above `weight_bytes`.
    """

    weight_buffers = ("packed", "scales")
    packed: Tensor  # int8, opaque, reads as [in, out]
    scales: Tensor  # fp32 [out]

    def store(self, weight: Tensor, rounding: Rounding) -> None:
        """Round to nearest, whatever `rounding`, and hand over to the kernel's own packing."""
        codes, scales = quantize_symmetric(weight.to(self.home))
        self.adopt(columns_of(codes, self.part), scales)

    def adopt(self, codes: Tensor, scales: Tensor) -> None:
        """Keep codes int8 `[out, in]` and their scales fp32 `[out]` as they are."""
        self.scales = scales.to(self.home)
        self.packed = torch.ops.onednn.qlinear_prepack(codes.to(self.home), None)

    def packed_state(self) -> dict[str, Tensor]:
        """Codes int8 `[out, in]` and scales: the kernel's own packing is made again."""
        return {"codes": self.packed.to_dense().t().contiguous(), "scales": self.scales}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Hand the codes over to the kernel's own packing."""
        self.adopt(state["codes"], state["scales"].clone())

    def multiply(self, x: Tensor) -> Tensor:
        """One kernel at any number of rows; a row's answer does not depend on the others."""
        return kernels.token_int8_linear(x, self.packed, self.scales)

    def dequantized_weight(self) -> Tensor:
        """The weight `[out, in]`."""
        codes = self.packed.to_dense().t().float()
        return (codes * self.scales[:, None]).to(self.dtype)


def _raw_shapes(
    out_features: int, in_features: int, has_bias: bool, part: TensorPart | None
) -> dict[str, tuple[int, ...]]:
    weight: tuple[int, ...] = (out_features, in_features)
    weight = part.whole_shape(weight) if part else weight
    shapes: dict[str, tuple[int, ...]] = {"bias": weight[:1]} if has_bias else {}
    return shapes | {"weight": weight}


def _tiles(rows: slice) -> slice:
    return slice(rows.start // kernels.TILE_ROWS, rows.stop // kernels.TILE_ROWS)


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...] | None, part: TensorPart | None
) -> None:
    """Refuse a tensor that this layer has no place for."""
    if shape is None:
        raise ValueError(f"no place for {name!r}: a linear takes a weight, and a bias if built so")
    shape = part.of_shape(shape) if part else shape
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the layer expects {shape}")
