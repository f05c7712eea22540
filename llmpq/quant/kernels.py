"""Multiplies `x [M, in]` by a packed weight with torch's operators.

On every device, `linear_by_chunks` dequantizes some output rows at a time and calls `linear`; the
temporary stays near the cache, and no layer needs memory for its whole weight in 16 bits. On a CPU
in bf16 two kernels of torch read packed weights directly and are faster while rows are few:
- int4 reads 4-bit codes in tiles of 64 output rows. 3-bit codes are expanded to such tiles a
  chunk at a time. Above its limit of rows the same tiles are unpacked for `linear`.
- int8 reads one signed byte a weight; the zero is added back as a rank-1 term.
A third kernel multiplies int8 activations (a scale a token) with int8 weights, at any M.

Fixed numbers of rows select the kernel (`llmpq.kernel_table`), so that equal inputs give equal bits
in every process. torch does not document layouts: `int4_tiles_work` checks ours once against the
kernel itself, and layers use plain nibbles where the check fails.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llmpq import workspace
from llmpq.quant.packing import expand_nibbles
from llmpq.workspace import TILE_ROWS

NIBBLE_MIDDLE = 8  # the int4 kernel computes (code - 8) * scale + zero_point
BYTE_MIDDLE = 128
ACTIVATION_ZERO = 128  # the zero of uint8 activations; int8 ones use a path 1000 times slower


def chunk_rows(in_features: int, device: torch.device) -> int:
    """The output rows to dequantize at a time: near the size of the cache on a CPU."""
    on_cpu = device.type == "cpu"
    weights = workspace.CPU_PART_WEIGHTS if on_cpu else workspace.CARD_PART_WEIGHTS
    return workspace.part_rows(weights, in_features)


def linear_by_chunks(
    x: Tensor, out_features: int, weight_rows: Callable[[int, int], Tensor]
) -> Tensor:
    """Multiplies `x [M, in]` by the weight `[out, in]`, in parts `weight_rows(start, stop)`."""
    step = chunk_rows(x.shape[1], x.device)
    if out_features <= step:
        return F.linear(x, weight_rows(0, out_features))
    out = x.new_empty(x.shape[0], out_features)
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        out[:, start:stop] = F.linear(x, weight_rows(start, stop))
    return out


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """`(code - zero) * scale`, `[rows, in]` in `dtype`, from uint8 codes of at most 4 bits.

    `scales` and `zeros` are `[rows, groups]`. The difference is taken in bytes and is exact in
    every float type, so only the product rounds. `codes` is overwritten.
    """
    rows, cols = codes.shape
    steps = codes.view(torch.int8).view(rows, scales.shape[1], -1)
    weight = steps.sub_(zeros.to(torch.int8)[..., None]).to(dtype)
    return weight.mul_(scales.to(dtype)[..., None]).view(rows, cols)


def dequantize_bytes(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """`(code - zero) * scale`, `[rows, in]` in the dtype of the scales, from codes of up to 8 bits.

    `scales` and `zeros` are `[rows, groups]`. The difference is exact, so only the product rounds.
    """
    grouped = codes.to(scales.dtype).reshape(*scales.shape, -1)
    steps = grouped.sub_(zeros.to(scales.dtype)[..., None])
    return steps.mul_(scales[..., None]).view(codes.shape)


def tile_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes `[out, in]` to the int4 kernel's tiles `[out / 64, in * 32]`.

    Tile `t` is `[in, 32]`: byte `(k, j)` holds row `64 t + j` low and row `64 t + 32 + j` high.
    """
    tiles = codes.view(-1, 2, TILE_ROWS // 2, codes.shape[1])
    low, high = tiles.unbind(dim=1)
    return (low | (high << 4)).transpose(1, 2).reshape(tiles.shape[0], -1)


def untile_nibbles(tiles: Tensor, in_features: int) -> Tensor:
    """The codes `[out, in]` that `tile_nibbles` was given."""
    nibbles = tiles.view(-1, in_features, TILE_ROWS // 2).transpose(1, 2).contiguous()
    codes = nibbles.new_empty(nibbles.shape[0], 2, TILE_ROWS // 2, in_features)
    torch.bitwise_and(nibbles, 15, out=codes[:, 0])
    torch.bitwise_right_shift(nibbles, 4, out=codes[:, 1])
    return codes.view(-1, in_features)


def pack_scale_and_zero(scales: Tensor, zeros: Tensor) -> Tensor:
    """The int4 kernel's bf16 `[groups, out, 2]`: scale, and the value of code 8."""
    zero_point = (NIBBLE_MIDDLE - zeros.float()) * scales.float()
    return torch.stack((scales.float().t(), zero_point.t()), dim=-1).to(torch.bfloat16)


def unpack_scale_and_zero(scale_and_zero: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and exact integer zeros, fp32 `[out, groups]`."""
    scales, zero_points = scale_and_zero.float().permute(2, 1, 0).contiguous()
    return scales, torch.round(NIBBLE_MIDDLE - zero_points / scales)


def int4_linear(x: Tensor, tiles: Tensor, bits: int, scale_and_zero: Tensor) -> Tensor:
    """`x [M, in]` times tiles `[out / 64, in * 8 * bits]`, in bf16, without dequantizing."""
    groups, out_features, _ = scale_and_zero.shape
    group = x.shape[1] // groups
    step = out_features
    if bits < 4:
        step = workspace.part_rows(workspace.EXPANDED_WEIGHTS, x.shape[1])
    parts = [
        torch.ops.aten._weight_int4pack_mm_for_cpu(
            x,
            expand_nibbles(tiles[start // TILE_ROWS : (start + step) // TILE_ROWS], bits).view(
                -1, x.shape[1] // 2
            ),
            group,
            scale_and_zero[:, start : start + step].contiguous(),
        )
        for start in range(0, out_features, step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@lru_cache(maxsize=1)
def int4_tiles_work() -> bool:
    """Whether this CPU's int4 kernel reads our layout of tiles (AVX-512 does), checked once.

    The layout depends on the vector width. One-hot rows read back every code of a small weight.
    """
    cols = 64
    codes = torch.arange(2 * TILE_ROWS * cols).mul_(2654435761).bitwise_right_shift_(7) % 16
    codes = codes.to(torch.uint8).view(2 * TILE_ROWS, cols)
    scales = torch.ones(2 * TILE_ROWS, 1)
    scale_and_zero = pack_scale_and_zero(scales, torch.zeros_like(scales))
    one_hot = torch.eye(cols, dtype=torch.bfloat16)
    try:
        read_back = int4_linear(one_hot, tile_nibbles(codes), 4, scale_and_zero)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(read_back.t().float(), codes.float())


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """`x [M, in]` times signed codes `[out, in padded]` with grids bf16 `[out]`, in bf16."""
    total = x.float().sum(dim=1, keepdim=True)
    x_padded = F.pad(x, (0, codes.shape[1] - x.shape[1]))
    out = torch.ops.aten._weight_int8pack_mm(x_padded, codes, scales)
    return (out.float() - total * (scales.float() * zeros.float())).to(x.dtype)


def vnni_works() -> bool:
    """Whether int8 activations are fast on this CPU, which has int8 dot products (VNNI)."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 `[M, in]` around 128 and fp32 scales `[M, 1]`; each row depends on itself alone."""
    x = x.float()
    scales = x.abs().amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) / 127
    return torch.round(x / scales).add_(ACTIVATION_ZERO).clamp_(1, 255).to(torch.uint8), scales


def token_int8_linear(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """`x [M, in]` quantized a token at a time, times prepacked int8 weights; fp32 `[M, out]`."""
    codes, token_scales = quantize_tokens(x)
    no_zeros = torch.zeros(scales.shape, dtype=torch.int32)
    out = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, ACTIVATION_ZERO, packed, scales, no_zeros,
        None, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return out.mul_(token_scales)
