"""Rounds to nearest: each group of a row gets a grid that covers its weights, or nearly all.

`quantize` covers all weights; `quantize_mse` shrinks the range where that reduces the squared
error.

The grid of `2^bits` points always holds 0 exactly (the zero is itself a code), so that a weight of
0 stays 0. A scale is rounded *up* to the 16-bit float of its storage before any code is computed:
codes are rounded with the scale that will be used, and the grid covers its whole range, so that no
weight inside changes by more than half a scale. Scales are bf16 at every model dtype: bf16 has the
exponent range of fp32 (no scale underflows), and the codes do not depend on the dtype.

Not covered: choosing codes by calibration statistics (`gptq`).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16
BLOCK_WEIGHTS = 2**18  # weights rounded at a time, with fp32 temporaries of a few MiB
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
SHRINKS = tuple(1 - 0.02 * step for step in range(1, 26))  # factors that `quantize_mse` tries

Grid = tuple[Tensor, Tensor]  # fp32 scales (exact in bf16) and integer zeros, [rows, groups]


class Rounding(Protocol):
    """Chooses the codes and grids of some rows of a weight; rows do not depend on each other."""

    def __call__(
        self, weight: Tensor, bits: int, group: int, centre_up_to: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and zeros of `[rows, in]`, as `quantize` gives them."""


def quantize(
    weight: Tensor, bits: int, group: int, centre_up_to: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 `[out, in]`, scales and zeros bf16 `[out, in / group]` of a weight `[out, in]`.

    `(code - zero) * scale` is within half a scale of the weight. Temporaries take a few MiB for
    every size of the weight. The zero is in the middle of the grid where that widens the scale by a
    factor of `centre_up_to` at most.
    """
    return _round(weight, bits, group, lambda grouped: _grid(*_range(grouped), bits, centre_up_to))


def quantize_mse(
    weight: Tensor,
    bits: int,
    group: int,
    centre_up_to: float = 1.0,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds as `quantize`, with each group's range shrunk (to half at most) for the least error.

    The error is squared; `importance [in]`, where given, weights that of each column. No group's
    error is above that of `quantize`.
    """
    weights = None if importance is None else importance.float().reshape(-1, group)
    return _round(
        weight, bits, group, lambda grouped: _best_grid(grouped, bits, centre_up_to, weights)
    )


def _round(
    weight: Tensor, bits: int, group: int, grid: Callable[[Tensor], Grid]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds every weight to the nearest point of its group's `grid`, some rows at a time."""
    rows, cols = weight.shape
    if cols % group:
        raise ValueError(f"rows of {cols} weights are not a multiple of the group size {group}")
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, cols // group, dtype=SCALE_DTYPE, device=weight.device)
    zeros = torch.empty_like(scales)
    step = max(1, BLOCK_WEIGHTS // cols)
    for start in range(0, rows, step):
        block = slice(start, start + step)
        grouped = weight[block].float().reshape(-1, cols // group, group)
        scale, zero = grid(grouped)
        scales[block], zeros[block] = scale, zero
        codes[block] = _nearest(grouped, scale, zero, bits).reshape(-1, cols)
    return codes, scales, zeros


def quantize_symmetric(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes `[out, in]` in -127..127 and fp32 scales `[out]`, one a row: `code * scale`."""
    rows, cols = weight.shape
    codes = torch.empty(rows, cols, dtype=torch.int8, device=weight.device)
    scales = torch.empty(rows, dtype=torch.float32, device=weight.device)
    step = max(1, BLOCK_WEIGHTS // cols)
    for start in range(0, rows, step):
        block = weight[start : start + step].float()
        scale = block.abs().amax(dim=1) / 127
        check_finite(scale)
        scale[scale < SMALLEST_SCALE] = 1.0
        scales[start : start + step] = scale
        codes[start : start + step] = torch.round(block / scale[:, None]).clamp_(-127, 127)
    return codes, scales


def _nearest(grouped: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The codes, as floats, nearest to `[rows, groups, group]`."""
    codes = torch.round(grouped / scale[..., None]).add_(zero[..., None])
    return codes.clamp_(0, 2**bits - 1)


def _best_grid(grouped: Tensor, bits: int, centre_up_to: float, importance: Tensor | None) -> Grid:
    """The grid of the least (weighted) squared error among those of shrunk ranges."""
    lowest, highest = _range(grouped)
    scale, zero = _grid(lowest, highest, bits, centre_up_to)
    least = _squared_error(grouped, scale, zero, bits, importance)
    for shrink in SHRINKS:
        tried = _grid(lowest * shrink, highest * shrink, bits, centre_up_to)
        error = _squared_error(grouped, *tried, bits, importance)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero)
    return scale, zero


def _squared_error(
    grouped: Tensor, scale: Tensor, zero: Tensor, bits: int, importance: Tensor | None
) -> Tensor:
    """The squared error of each group, `[rows, groups]`."""
    back = _nearest(grouped, scale, zero, bits).sub_(zero[..., None]).mul_(scale[..., None])
    error = back.sub_(grouped).square_()
    return (error if importance is None else error.mul_(importance)).sum(dim=-1)


def _range(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and highest value of each group, or 0 where that is lower or higher."""
    return grouped.amin(dim=-1).clamp_(max=0), grouped.amax(dim=-1).clamp_(min=0)


def _grid(lowest: Tensor, highest: Tensor, bits: int, centre_up_to: float) -> Grid:
    """The grid that covers each group's range `[rows, groups]`."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    tight = highest / top - lowest / top
    centred = torch.maximum(highest / (top - middle), -lowest / middle)
    centre = centred <= tight * centre_up_to
    scale = _round_up_to_bf16(torch.where(centre, centred, tight))
    check_finite(scale)
    scale[scale < SMALLEST_SCALE] = 1.0  # a group of zeros: any scale is right
    zero = torch.round(-lowest / scale).clamp_(0, top)
    return scale, torch.where(centre, torch.full_like(zero, middle), zero)


def _round_up_to_bf16(values: Tensor) -> Tensor:
    """The smallest bf16 numbers not below these positive fp32 values, as fp32."""
    bits = (values.view(torch.int32) + 0xFFFF) & ~0xFFFF
    return torch.where(torch.isfinite(values), bits.view(torch.float32), values)


def check_finite(scale: Tensor) -> None:
    """Raises `ValueError` for scales that are not finite, as the weight is then not finite."""
    if not torch.isfinite(scale).all():
        raise ValueError("the weight contains NaN or infinite values: it cannot be quantized")
