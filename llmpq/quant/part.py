"""A part of a tensor along one dimension: what one of several devices that share a layer holds."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

OUTPUTS, INPUTS = 0, 1  # dimensions of a weight `[out, in]`


@dataclass(frozen=True)
class TensorPart:
    """`start` up to but not including `stop`, of `whole`, along dimension `dim`."""

    dim: int
    start: int
    stop: int
    whole: int

    @property
    def size(self) -> int:
        """How long the part is."""
        return self.stop - self.start

    @property
    def index(self) -> tuple[slice, ...]:
        """Between brackets it takes the part."""
        return (*[slice(None)] * self.dim, slice(self.start, self.stop))

    def of(self, tensor: Tensor) -> Tensor:
        """The part, as a view."""
        return tensor.narrow(self.dim, self.start, self.size)

    def of_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the part of a tensor of this shape."""
        return (*shape[: self.dim], self.size, *shape[self.dim + 1 :])

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the whole tensor, of which a part has this shape."""
        return (*shape[: self.dim], self.whole, *shape[self.dim + 1 :])


def input_part(part: TensorPart | None) -> TensorPart | None:
    """The part where it is one of a matrix's inputs, so that rows are cut; else None."""
    return part if part is not None and part.dim == INPUTS else None


def row_length(in_features: int, part: TensorPart | None) -> int:
    """Inputs of the whole matrix, of which a part has `in_features`."""
    cut = input_part(part)
    return cut.whole if cut else in_features


def columns_of(tensor: Tensor, part: TensorPart | None) -> Tensor:
    """The columns of whole rows `[rows, in]` that a part holds."""
    cut = input_part(part)
    return cut.of(tensor).contiguous() if cut else tensor


def part_group(group: int, part: TensorPart | None) -> int:
    """The largest group in which a part can hold the grids of a whole matrix, a scale each `group`.

    Its groups lie within the whole's; it is `group` where that divides the part.
    """
    cut = input_part(part)
    return math.gcd(group, cut.start, cut.size) if cut else group


def grids_of(grids: Tensor, group: int, part: TensorPart | None) -> Tensor:
    """A scale or zero for each group of a part, from those of whole rows `[rows, groups]`."""
    cut = input_part(part)
    if cut is None:
        return grids
    starts = torch.arange(cut.start, cut.stop, part_group(group, cut), device=grids.device)
    return grids[:, starts // group]
