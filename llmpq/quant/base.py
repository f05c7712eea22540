"""What the linear layers share, whatever way they store a weight.

A layer is built empty. `load_weight("weight", tensor)` rounds and packs the raw weight, some rows
at a time, so the raw tensor may be freed afterwards and no second copy of it ever exists. Callers
need not know how many bits a layer has: every class offers `load_weight`, `weight_bytes`,
`dequantized_weight` and `forward`.

    PlainLinear      holds 16 bits
    QuantizedLinear  holds fewer bits; shares the bias, the checks, the shapes and the byte counts
    GridLinear       holds `(code - zero) * scale`; the kernel table says which kernel multiplies
                     how many rows

A layer may hold a part of a matrix (`TensorPart`), with the codes and grids of the whole matrix;
its sizes are those of the part. `part_to_read` says which part of the raw tensor it needs: whole
rows, which it cuts after rounding, where grids or GPTQ depend on more of a row than it keeps.

Not covered: training; weights have no gradients.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from llmpq.kernel import Kernel, Layout
from llmpq.kernel_table import FEW_ROWS, FUSED_UNPACKING, by_rows, choices
from llmpq.precision import group_size
from llmpq.quant import kernels, triton_kernels
from llmpq.quant.grouped import StackPlace
from llmpq.quant.here import machine_here
from llmpq.quant.part import (
    TensorPart,
    columns_of,
    grids_of,
    input_part,
    part_group,
    row_length,
)
from llmpq.quant.rounding import (
    Rounding,
    quantize,
    quantize_mse,
)

# 8 bits: the factor by which a scale may widen to have its zero in the middle. With inputs that are
# never negative, zeros beside the middle doubled the error of the int8 kernel (1.7 % to 0.9 %).
CENTRE_UP_TO = 1.5
BY_GROUP = (quantize, quantize_mse)  # roundings that depend on one group alone
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # tensors' types and shapes by name


class PlainLinear(nn.Linear):
    """16 bits: an `nn.Linear` whose weight is loaded later."""

    is_transposed = False  # whether checkpoints hold the weight as [in, out]
    place: StackPlace | None = None  # in the weights of all experts, where it is an expert's

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

    def reset_parameters(self) -> None:
        """Draws no first values, as the weight is loaded."""

    @property
    def raw_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors to load, by name; those of the whole where this is a part."""
        shapes = _raw_shapes(self.out_features, self.in_features, self.bias is not None, self.part)
        return _transposed(shapes) if self.is_transposed else shapes

    def part_to_read(self, name: str, rounding: Rounding = quantize) -> TensorPart | None:
        """The part to load of the whole "weight" or "bias"; None for all of it."""
        return None if name == "bias" and input_part(self.part) else self.part

    def load_weight(self, name: str, tensor: Tensor, rounding: Rounding = quantize) -> None:
        """Copies the raw "weight" `[out, in]` or "bias" `[out]`."""
        _check(name, tensor, self.raw_shapes.get(name), self.part_to_read(name))
        tensor = tensor.t() if name == "weight" and self.is_transposed else tensor
        if self.place is None:
            own = tensor.detach().to(device=self.home, dtype=self.weight.dtype, copy=True)
        else:
            own = self.place.room(name, tensor.shape, self.weight.dtype).copy_(tensor.detach())
        setattr(self, name, nn.Parameter(own.contiguous(), requires_grad=False))

    @property
    def weight_bytes(self) -> int:
        """Bytes held for the weight; 0 until it is loaded."""
        return 0 if self.weight.is_meta else self.weight.nbytes

    def dequantized_weight(self) -> Tensor:
        """The weight `[out, in]`."""
        return self.weight


class QuantizedLinear(nn.Module):
    """The base of quantized layers, with bias, checks, shapes and byte counts."""

    weight_buffers: tuple[str, ...]  # the names of the buffers that hold the weight
    is_transposed = False  # whether checkpoints hold the weight as [in, out]
    waits_for_device = False  # the product looks at values, so that no CUDA graph can hold it
    layout: Layout  # the layout of the weight in the kernel table
    place: StackPlace | None = None  # in the weights of all experts, where it is an expert's
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
        """Shapes of the tensors to load, by name; those of the whole where this is a part."""
        shapes = _raw_shapes(self.out_features, self.in_features, self.has_bias, self.part)
        return _transposed(shapes) if self.is_transposed else shapes

    @property
    def row_length(self) -> int:
        """The inputs of the whole matrix, which are rounded together."""
        return row_length(self.in_features, self.part)

    def part_to_read(self, name: str, rounding: Rounding = quantize) -> TensorPart | None:
        """The part to load of the whole "weight" or "bias"; None for all of it."""
        if input_part(self.part) is None or (name == "weight" and self.rounds_alone(rounding)):
            return self.part
        return None

    def rounds_alone(self, rounding: Rounding) -> bool:
        """Whether a part of the inputs gets the codes of whole rows without the other inputs."""
        return False

    def load_weight(self, name: str, tensor: Tensor, rounding: Rounding = quantize) -> None:
        """Rounds and packs the raw "weight" `[out, in]`, or copies the "bias" `[out]`."""
        _check(name, tensor, self.raw_shapes.get(name), self.part_to_read(name, rounding))
        if name == "bias":
            self.bias = self._room(name, *tensor.shape, dtype=self.dtype).copy_(tensor.detach())
        else:
            with torch.no_grad():
                raw = tensor.detach()
                self.store(raw.t().contiguous() if self.is_transposed else raw, rounding)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` to `[..., out]`."""
        out = self.multiply(x.reshape(-1, self.in_features).contiguous())
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    @property
    def weight_bytes(self) -> int:
        """Bytes held for the weight: packed codes, scales and zeros; 0 until it is loaded."""
        held = (getattr(self, name) for name in self.weight_buffers)
        return sum(buffer.nbytes for buffer in held if buffer is not None)

    def extra_repr(self) -> str:
        """Shape, bits and bias, as `nn.Linear` prints them."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={self.bits}, bias={self.has_bias}"

    def packed_state(self) -> dict[str, Tensor]:
        """The packed weight as plain tensors, which `restore` of a similar layer takes."""
        return {name: getattr(self, name) for name in self.weight_buffers}

    def packed_shapes(self) -> Shapes:
        """The data type and shape of each tensor of `packed_state`, after rounding."""
        sizes = self.in_features, self.out_features, False, self.dtype, torch.device("meta")
        like = type(self)(*sizes, self.bits, self.part)
        like.make_room()
        return {name: (one.dtype, tuple(one.shape)) for name, one in like.packed_state().items()}

    def make_room(self) -> None:
        """Allocates the buffers of a weight that is rounded here."""
        raise NotImplementedError

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Copies a packed weight instead of rounding it again."""
        for name in self.weight_buffers:
            held = state[name]
            setattr(self, name, self._room(name, *held.shape, dtype=held.dtype).copy_(held))

    def store(self, weight: Tensor, rounding: Rounding) -> None:
        """Rounds and packs the raw weight, in whole rows unless it `rounds_alone`."""
        raise NotImplementedError

    def multiply(self, x: Tensor) -> Tensor:
        """Multiplies `x [M, in]`, contiguous, to `[M, out]` without bias, by dequantized chunks."""
        return kernels.linear_by_chunks(x, self.out_features, self._weight_rows)

    def dequantized_weight(self) -> Tensor:
        """The weight `[out, in]` that the stored codes represent, in the layer's dtype."""
        return self._weight_rows(0, self.out_features)

    def _weight_rows(self, start: int, stop: int) -> Tensor:
        """Rows of the dequantized weight."""
        raise NotImplementedError

    def _room(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        """An empty buffer, which is a view of the weights of all experts for one of these."""
        if self.place is None:
            return self._empty(*shape, dtype=dtype)
        return self.place.room(name, shape, dtype)

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.home)

    def _chunks(self, at_least: int = 0) -> Iterator[slice]:
        """Output rows to pack at a time."""
        step = max(at_least, kernels.chunk_rows(self.row_length, self.home))
        for start in range(0, self.out_features, step):
            yield slice(start, min(start + step, self.out_features))


class GridLinear(QuantizedLinear):
    """The base of layers with weights `(code - zero) * scale`, with a scale and a zero a group.

    On a card, `triton_kernels` reads or unpacks the tensors that a layer names in `triton_weight`,
    where the kernel table says so.
    """

    @property
    def centre_up_to(self) -> float:
        """The factor by which a scale may widen to have its zero in the middle."""
        return 1.0

    @cached_property
    def table_kernels(self) -> tuple[Kernel, ...]:
        """The kernels for this weight, once it is loaded, by rising numbers of rows."""
        machine = machine_here(self.home, self.dtype)
        shape = self.out_features, self.in_features, self.group
        return choices(machine, str(self.bits), *shape, layout=self.layout)

    @property
    def group(self) -> int:
        """The number of weights of a row that share a scale."""
        return part_group(group_size(self.bits, self.row_length), self.part)

    @property
    def triton_weight(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Packed codes, scales and zeros, where Triton kernels read them, else None."""
        return None

    def kernel(self, rows: int) -> str:
        """The name of the kernel for this number of rows."""
        return by_rows(self.table_kernels, rows).name

    def multiply(self, x: Tensor) -> Tensor:
        """Multiplies a few rows by the packed weight, where a kernel can; else part by part."""
        weight = self.triton_weight
        if weight is not None and len(x) and self.kernel(len(x)) == FEW_ROWS:
            return triton_kernels.multiply_few_rows(x, *weight, self.bits)
        return super().multiply(x)

    def _weight_rows(self, start: int, stop: int) -> Tensor:
        weight = self.triton_weight
        if weight is None or self.table_kernels[-1].name != FUSED_UNPACKING:
            return self.torch_rows(start, stop)
        sizes = self.bits, self.in_features, self.dtype
        return triton_kernels.dequantize(*weight, *sizes, rows=slice(start, stop))

    def torch_rows(self, start: int, stop: int) -> Tensor:
        """Rows of the dequantized weight, by torch's operators."""
        raise NotImplementedError

    def store(self, weight: Tensor, rounding: Rounding) -> None:
        """Rounds and packs some rows at a time: `rounding.rows_at_once`, if it has that."""
        group = group_size(self.bits, self.row_length)
        part = None if self.rounds_alone(rounding) else self.part
        self.make_room()
        for rows in self._chunks(getattr(rounding, "rows_at_once", 0)):
            raw = weight[rows].to(self.home)
            codes, *grids = rounding(raw, self.bits, group, self.centre_up_to)
            scales, zeros = (grids_of(grid, group, part) for grid in grids)
            self.keep(rows, columns_of(codes, part), scales, zeros)

    def rounds_alone(self, rounding: Rounding) -> bool:
        """Whether every group of the whole matrix is inside or outside of the part."""
        group = group_size(self.bits, self.row_length)
        return rounding in BY_GROUP and part_group(group, self.part) == group

    def adopt(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Packs codes uint8 `[out, in]` with their own grids, bf16 `[out, groups]`."""
        self.reserve(self.in_features // scales.shape[1])
        for rows in self._chunks():
            self.keep(rows, *(t[rows].to(self.home) for t in (codes, scales, zeros)))

    def make_room(self) -> None:
        """Allocates the weight for the layer's own grids, not for adopted ones."""
        self.reserve(part_group(group_size(self.bits, self.row_length), self.part))

    def reserve(self, group: int) -> None:
        """Allocates the weight, with `group` weights of a row to a scale."""
        raise NotImplementedError

    def keep(self, rows: slice, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Packs some rows: codes uint8 `[rows, in]`, grids `[rows, groups]`."""
        raise NotImplementedError


def _raw_shapes(
    out_features: int, in_features: int, has_bias: bool, part: TensorPart | None
) -> dict[str, tuple[int, ...]]:
    weight: tuple[int, ...] = (out_features, in_features)
    weight = part.whole_shape(weight) if part else weight
    shapes: dict[str, tuple[int, ...]] = {"bias": weight[:1]} if has_bias else {}
    return shapes | {"weight": weight}


def _transposed(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes with that of the weight turned round."""
    return shapes | {"weight": shapes["weight"][::-1]}


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...] | None, part: TensorPart | None
) -> None:
    """Raises `ValueError` for a tensor that this layer cannot load."""
    if shape is None:
        raise ValueError(f"unknown tensor {name!r}: a linear has a weight, and maybe a bias")
    shape = part.of_shape(shape) if part else shape
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the layer expects {shape}")
