"""Rounds one matrix as a run of the plan does, and packs it as compressed-tensors stores it.

The codes come from the layers that a run fills (`llmpq.quant`), so that they are those that
`llmpq-run` serves. compressed-tensors' codes and zero points are signed: ours less 2^(bits - 1).

    pack-quantized (3, 4, 8 bits)  weight_packed int32 [out, words], weight_scale bf16 [out, G],
                                   weight_zero_point int32, packed along the outputs, weight_shape
    int-quantized (8-w8a8)         weight int8 [out, in], weight_scale fp32 [out, 1]
"""

import torch
from torch import Tensor

from llmpq.precision import PRECISIONS
from llmpq.quant import Rounding
from llmpq.quant.linear import GroupedLinear, RowLinear
from llmpq.quant.packing import unpack
from llmpq.quant.rounding import SCALE_DTYPE, quantize_symmetric

ROWS_AT_ONCE = 4096  # rows that are packed at a time: packing takes 4 bytes a code


def packed_tensors(
    linear: str, weight: Tensor, precision: str, rounding: Rounding
) -> dict[str, Tensor]:
    """The tensors that stand for the raw weight `[out, in]` of a linear of this name.

    Raises `ValueError` where the weight cannot be rounded.
    """
    if precision == "8-w8a8":
        codes, row_scales = quantize_symmetric(weight)
        return {f"{linear}.weight": codes, f"{linear}.weight_scale": row_scales[:, None]}
    bits = PRECISIONS[precision].weight_bits
    codes, scales, zeros = _signed(weight, bits, rounding)
    return {
        f"{linear}.weight_packed": _packed_rows(codes, bits),
        f"{linear}.weight_scale": scales,
        f"{linear}.weight_zero_point": _packed_columns(zeros, bits),
        f"{linear}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def _signed(weight: Tensor, bits: int, rounding: Rounding) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 `[out, in]`, scales bf16 and zeros int8 `[out, groups]` of a served weight."""
    rows, cols = weight.shape
    sizes = cols, rows, False, SCALE_DTYPE, torch.device("cpu")
    if bits == 8:
        row_linear = RowLinear(*sizes)
        row_linear.load_weight("weight", weight, rounding)
        zeros = row_linear.zeros[:, None].to(torch.int8)
        return row_linear.codes[:, :cols].contiguous(), row_linear.scales[:, None], zeros
    grouped = GroupedLinear(*sizes, bits=bits)
    grouped.load_weight("weight", weight, rounding)
    middle = 2 ** (bits - 1)
    codes = unpack(grouped.packed, bits, cols).to(torch.int8).sub_(middle)
    return codes, grouped.scales, (grouped.zeros - middle).to(torch.int8)


def _packed_rows(codes: Tensor, bits: int) -> Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return torch.cat([pack_to_int32(part, bits) for part in codes.split(ROWS_AT_ONCE)])


def _packed_columns(zeros: Tensor, bits: int) -> Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return pack_to_int32(zeros, bits, packed_dim=0)
