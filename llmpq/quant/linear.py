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

Inference only: weights take no gradient.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llmpq.precision import PRECISIONS, group_size
from llmpq.quant import kernels
from llmpq.quant.packing import pack, pad_columns, padded_columns, squeeze_nibbles, unpack
from llmpq.quant.rounding import SCALE_DTYPE, quantize, quantize_symmetric

# 8 bits: how much wider a scale may get to have its zero in the middle. With inputs that are never
# negative, zeros merely near it doubled the error of the int8 kernel (1.7 % against 0.9 %).
CENTRE_UP_TO = 1.5


def available_precisions(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The precisions that layers of `dtype` on this device can be built with."""
    if not dtype.is_floating_point:
        return ()
    token_int8 = kernels.token_int8_works(torch.device(device))
    return tuple(p.name for p in PRECISIONS.values() if p.weight_only or token_int8)


def make_linear(
    precision: str,
    in_features: int,
    out_features: int,
    *,
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> "PlainLinear | QuantizedLinear":
    """An empty linear layer that will hold its weight at `precision`."""
    device = torch.device(device)
    available = available_precisions(device, dtype)
    if precision not in available:
        raise ValueError(
            f"precision {precision!r} is not available for {dtype} on {device.type}: "
            f"use one of {', '.join(available) or 'none (the dtype must be a float)'}"
        )
    if precision == "16":
        return PlainLinear(in_features, out_features, bias, dtype, device)
    if precision == "8":
        return RowLinear(in_features, out_features, bias, dtype, device)
    if not PRECISIONS[precision].weight_only:
        return TokenInt8Linear(in_features, out_features, bias, dtype, device)
    bits = PRECISIONS[precision].weight_bits
    tiled = (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and kernels.int4_tiles_suit(out_features, group_size(bits, in_features))
    )
    layer = TiledLinear if tiled else GroupedLinear
    return layer(in_features, out_features, bias, dtype, device, bits)


class PlainLinear(nn.Linear):
    """16 bits: `nn.Linear` whose weight arrives later."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        self.requires_grad_(False)
        self.home = device

    @property
    def raw_shapes(self) -> dict[str, tuple[int, ...]]:
        """What it must swallow, by name."""
        return _raw_shapes(self.out_features, self.in_features, self.bias is not None)

    def swallow(self, name: str, tensor: Tensor) -> None:
        """Copy the raw "weight" `[out, in]` or "bias" `[out]`."""
        _check(name, tensor, self.raw_shapes.get(name))
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
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.dtype, self.home, self.has_bias = dtype, device, bias
        for name in (*self.weight_buffers, "bias"):
            self.register_buffer(name, None)

    @property
    def raw_shapes(self) -> dict[str, tuple[int, ...]]:
        """What it must swallow, by name."""
        return _raw_shapes(self.out_features, self.in_features, self.has_bias)

    def swallow(self, name: str, tensor: Tensor) -> None:
        """Take in the raw "weight" `[out, in]` (rounded and packed) or "bias" `[out]`."""
        _check(name, tensor, self.raw_shapes.get(name))
        if name == "bias":
            self.bias = tensor.detach().to(device=self.home, dtype=self.dtype, copy=True)
        else:
            with torch.no_grad():
                self.store(tensor.detach())

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

    def store(self, weight: Tensor) -> None:
        """Round, pack and keep the raw weight `[out, in]`."""
        raise NotImplementedError

    def multiply(self, x: Tensor) -> Tensor:
        """`x [M, in]`, contiguous, to `[M, out]` without the bias."""
        raise NotImplementedError

    def dequantized_weight(self) -> Tensor:
        """The weight `[out, in]` in the layer's dtype, as the stored codes stand for it."""
        raise NotImplementedError

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.home)

    def _quantized_chunks(
        self, weight: Tensor, group: int, centre_up_to: float = 1.0
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Rows, and the codes, scales and zeros of those rows, on the layer's own device."""
        step = kernels.chunk_rows(self.in_features, self.home)
        for start in range(0, self.out_features, step):
            rows = slice(start, min(start + step, self.out_features))
            raw = weight[rows].to(self.home)
            yield rows, *quantize(raw, self.bits, group, centre_up_to)


class GroupedLinear(QuantizedLinear):
    """3 or 4 bits, `(code - zero) * scale` a group; dequantised some rows at a time."""

    weight_buffers = ("packed", "scales", "zeros")
    packed: Tensor  # uint8 [out, bits * ceil(in / 8)]
    scales: Tensor  # bf16 [out, groups]
    zeros: Tensor  # bf16 [out, groups], integers

    def store(self, weight: Tensor) -> None:
        """Round and pack, some rows at a time."""
        group = group_size(self.bits, self.in_features)
        row_bytes = padded_columns(self.in_features) // 8 * self.bits
        num_groups = self.in_features // group
        self.packed = self._empty(self.out_features, row_bytes, dtype=torch.uint8)
        self.scales = self._empty(self.out_features, num_groups, dtype=SCALE_DTYPE)
        self.zeros = torch.empty_like(self.scales)
        for rows, codes, scales, zeros in self._quantized_chunks(weight, group):
            self.packed[rows] = pack(codes, self.bits)
            self.scales[rows], self.zeros[rows] = scales, zeros

    def multiply(self, x: Tensor) -> Tensor:
        """Dequantise and multiply, chunk by chunk."""
        return kernels.linear_by_chunks(x, self.out_features, self._weight_rows)

    def dequantized_weight(self) -> Tensor:
        """The weight `[out, in]`."""
        return self._weight_rows(0, self.out_features)

    def _weight_rows(self, start: int, stop: int) -> Tensor:
        rows = slice(start, stop)
        codes = unpack(self.packed[rows], self.bits, self.in_features).contiguous()
        return kernels.dequantize(codes, self.scales[rows], self.zeros[rows], self.dtype)


class TiledLinear(QuantizedLinear):
    """3 or 4 bits as the CPU's int4 kernel reads them; taken apart again where rows are many."""

    weight_buffers = ("tiles", "scale_and_zero")
    tiles: Tensor  # uint8 [out / 64, in * 8 * bits]
    scale_and_zero: Tensor  # bf16 [groups, out, 2]

    def store(self, weight: Tensor) -> None:
        """Round and pack, some tiles at a time."""
        group = group_size(self.bits, self.in_features)
        num_tiles = self.out_features // kernels.TILE_ROWS
        tile_bytes = self.in_features * kernels.TILE_ROWS // 8 * self.bits
        grid_shape = (self.in_features // group, self.out_features, 2)
        self.tiles = self._empty(num_tiles, tile_bytes, dtype=torch.uint8)
        self.scale_and_zero = self._empty(*grid_shape, dtype=SCALE_DTYPE)
        for rows, codes, scales, zeros in self._quantized_chunks(weight, group):
            self.tiles[_tiles(rows)] = squeeze_nibbles(kernels.tile_nibbles(codes), self.bits)
            self.scale_and_zero[:, rows] = kernels.pack_scale_and_zero(scales, zeros)

    def multiply(self, x: Tensor) -> Tensor:
        """The int4 kernel for few rows, dequantised chunks for many."""
        if 0 < x.shape[0] <= kernels.INT4_MAX_ROWS:
            return kernels.int4_linear(x, self.tiles, self.bits, self.scale_and_zero)
        return kernels.linear_by_chunks(x, self.out_features, self._weight_rows)

    def dequantized_weight(self) -> Tensor:
        """The weight `[out, in]`."""
        return self._weight_rows(0, self.out_features)

    def _weight_rows(self, start: int, stop: int) -> Tensor:
        rows = slice(start, stop)
        nibbles = kernels.expand_nibbles(self.tiles[_tiles(rows)], self.bits)
        codes = kernels.untile_nibbles(nibbles, self.in_features)
        scales, zeros = kernels.unpack_scale_and_zero(self.scale_and_zero[:, rows])
        return kernels.dequantize(codes, scales, zeros, self.dtype)


class RowLinear(QuantizedLinear):
    """8 bits, a scale and a zero a row; codes and zeros are kept less 128.

    Most rows get a zero of 0 that way: one beside it is put back as a term that grows with the
    mean of the input, and takes the kernel's bf16 answer with it (see `CENTRE_UP_TO`).
    """

    weight_buffers = ("codes", "scales", "zeros")
    codes: Tensor  # int8 [out, in padded to a multiple of 8]
    scales: Tensor  # bf16 [out]
    zeros: Tensor  # bf16 [out], integers

    def store(self, weight: Tensor) -> None:
        """Round, some rows at a time."""
        cols = padded_columns(self.in_features)
        self.codes = self._empty(self.out_features, cols, dtype=torch.int8)
        self.scales = self._empty(self.out_features, dtype=SCALE_DTYPE)
        self.zeros = torch.empty_like(self.scales)
        chunks = self._quantized_chunks(weight, self.in_features, CENTRE_UP_TO)
        for rows, codes, scales, zeros in chunks:
            self.codes[rows] = (pad_columns(codes) ^ kernels.BYTE_MIDDLE).view(torch.int8)
            self.scales[rows] = scales[:, 0]
            self.zeros[rows] = zeros[:, 0] - kernels.BYTE_MIDDLE

    def multiply(self, x: Tensor) -> Tensor:
        """The int8 kernel for few rows in bf16; else chunks, dequantised or scaled afterwards."""
        if self.dtype != torch.bfloat16:
            return kernels.linear_by_chunks(x, self.out_features, self._weight_rows)
        suits = kernels.int8_kernel_suits(self.in_features, x.dtype, x.device)
        if suits and 0 < x.shape[0] <= kernels.INT8_MAX_ROWS:
            return kernels.int8_linear(x, self.codes, self.scales, self.zeros)
        out = kernels.linear_by_chunks(x, self.out_features, self._integer_rows)
        return out * self.scales

    def dequantized_weight(self) -> Tensor:
        """The weight `[out, in]`."""
        return self._weight_rows(0, self.out_features)

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

    def store(self, weight: Tensor) -> None:
        """Round and hand over to the kernel's own packing."""
        codes, self.scales = quantize_symmetric(weight.to(self.home))
        self.packed = torch.ops.onednn.qlinear_prepack(codes, None)

    def multiply(self, x: Tensor) -> Tensor:
        """One kernel at any number of rows; a row's answer does not depend on the others."""
        return kernels.token_int8_linear(x, self.packed, self.scales)

    def dequantized_weight(self) -> Tensor:
        """The weight `[out, in]`."""
        codes = self.packed.to_dense().t().float()
        return (codes * self.scales[:, None]).to(self.dtype)


def _raw_shapes(out_features: int, in_features: int, has_bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"weight": (out_features, in_features)}
    return shapes | ({"bias": (out_features,)} if has_bias else {})


def _tiles(rows: slice) -> slice:
    return slice(rows.start // kernels.TILE_ROWS, rows.stop // kernels.TILE_ROWS)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...] | None) -> None:
    """Refuse a tensor that this layer has no place for."""
    if shape is None:
        raise ValueError(f"no place for {name!r}: a linear takes a weight, and a bias if built so")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the layer expects {shape}")
