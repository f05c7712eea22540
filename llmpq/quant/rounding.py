"""Round to nearest: each group of a row gets the grid that just covers its weights.

The grid of `2^bits` points always holds 0 exactly (the zero is itself a code), so a weight of 0
stays 0. A scale is rounded *up* to the 16-bit float it is stored as before any code is computed:
codes are rounded with the scale that will be used, and the grid never falls short of the range, so
no weight moves by more than half a scale. bf16 holds a scale at every model dtype: it has the
exponent range of fp32 (no scale underflows), and the codes do not depend on the dtype.

Not covered: choosing codes with the help of data (GPTQ, AWQ).
"""

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16
BLOCK_WEIGHTS = 2**18  # weights rounded at a time: fp32 temporaries stay at a few MiB
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantize(
    weight: Tensor, bits: int, group: int, centre_up_to: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 `[out, in]`, scales and zeros bf16 `[out, in / group]` of a weight `[out, in]`.

    `(code - zero) * scale` is within half a scale of the weight. Temporaries beyond the answer are
    a few MiB whatever the size of the weight. The zero is put in the middle of the grid where that
    widens the scale by no more than a factor of `centre_up_to`.
    """
    rows, cols = weight.shape
    if cols % group:
        raise ValueError(f"groups of {group} do not divide rows of {cols} weights")
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, cols // group, dtype=SCALE_DTYPE, device=weight.device)
    zeros = torch.empty_like(scales)
    step = max(1, BLOCK_WEIGHTS // cols)
    for start in range(0, rows, step):
        block = slice(start, start + step)
        grouped = weight[block].float().reshape(-1, cols // group, group)
        scale, zero = _grid(grouped, bits, centre_up_to)
        scales[block], zeros[block] = scale, zero
        grouped = torch.round(grouped / scale[..., None]).add_(zero[..., None])
        codes[block] = grouped.clamp_(0, 2**bits - 1).reshape(-1, cols)
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
        _check_finite(scale)
        scale[scale < SMALLEST_SCALE] = 1.0
        scales[start : start + step] = scale
        codes[start : start + step] = torch.round(block / scale[:, None]).clamp_(-127, 127)
    return codes, scales


def _grid(grouped: Tensor, bits: int, centre_up_to: float) -> tuple[Tensor, Tensor]:
    """fp32 scales (exact in bf16) and integer zeros `[rows, groups]` of `[rows, groups, group]`."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    lowest = grouped.amin(dim=-1).clamp_(max=0)
    highest = grouped.amax(dim=-1).clamp_(min=0)
    tight = highest / top - lowest / top
    centred = torch.maximum(highest / (top - middle), -lowest / middle)
    centre = centred <= tight * centre_up_to
    scale = _round_up_to_bf16(torch.where(centre, centred, tight))
    _check_finite(scale)
    scale[scale < SMALLEST_SCALE] = 1.0  # a group of zeros: any scale will do
    zero = torch.round(-lowest / scale).clamp_(0, top)
    return scale, torch.where(centre, torch.full_like(zero, middle), zero)


def _round_up_to_bf16(values: Tensor) -> Tensor:
    """The smallest bf16 numbers not below these positive fp32 values, as fp32."""
    bits = (values.view(torch.int32) + 0xFFFF) & ~0xFFFF
    return torch.where(torch.isfinite(values), bits.view(torch.float32), values)


def _check_finite(scale: Tensor) -> None:
    if not torch.isfinite(scale).all():
        raise ValueError("the weight holds NaN or infinite values: it cannot be quantised")
