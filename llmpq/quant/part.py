"""A part of a tensor along one dimension, as devices that share a layer hold it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

OUTPUTS, INPUTS = 0, 1  # dimensions of a weight `[out, in]`


@dataclass(frozen=True)
class TensorPart:
    """The elements `start` up to but not including `stop`, of `whole`, along dimension `dim`."""

    dim: int
    start: int
    stop: int
    whole: int

    @property
    def size(self) -> int:
        """The number of elements of the part along `dim`."""
        return self.stop - self.start

    @property
    def index(self) -> tuple[slice, ...]:
        """The index that selects the part of a tensor."""
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
    """The part where it cuts the inputs of a matrix, so that rows are cut; else None."""
    return part if part is not None and part.dim == INPUTS else None


def row_length(in_features: int, part: TensorPart | None) -> int:
    """The inputs of the whole matrix, of which a part has `in_features`."""
    cut = input_part(part)
    return cut.whole if cut else in_features


def columns_of(tensor: Tensor, part: TensorPart | None) -> Tensor:
    """The columns of whole rows `[rows, in]` that a part holds."""
    cut = input_part(part)
    return cut.of(tensor).contiguous() if cut else tensor


def part_group(group: int, part: TensorPart | None) -> int:
    """The largest group with which a part can hold the grids of a whole matrix of group `group`.

    Its groups are inside groups of the whole; it is `group` where that divides the part.
    """
    cut = input_part(part)
    return math.gcd(group, cut.start, cut.size) if cut else group


def grids_of(grids: Tensor, group: int, part: TensorPart | None) -> Tensor:
    """The scales or zeros of a part's groups, from those of whole rows `[rows, groups]`."""
    cut = input_part(part)
    if cut is None:
        return grids
    starts = torch.arange(cut.start, cut.stop, part_group(group, cut), device=grids.device)
    return grids[:, starts // group]
