"""Linears that hold and multiply their weights with bitsandbytes, where that is installed.

    Nf4Linear      16 levels spaced like normal weights, a scale each 64 weights of a row (QLoRA)
    LlmInt8Linear  int8 weights and inputs; inputs of 6.0 and above stay at 16 bits (LLM.int8)

Plans use both by their names ("nf4", "8-bnb"). bitsandbytes rounds the weights, whatever rounding
is given.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmpq.precision import NF4_BLOCK
from llmpq.quant import kernels
from llmpq.quant.base import QuantizedLinear
from llmpq.quant.part import columns_of, input_part
from llmpq.quant.rounding import Rounding, check_finite
from llmpq.workspace import LARGE_COLUMNS

OUTLIER = 6.0  # the threshold of the LLM.int8 paper
# Weights rounded to 4 bits at a time: bitsandbytes compares each with all 16 levels.
ROUNDED_WEIGHTS = 2**16


class Nf4Linear(QuantizedLinear):
    """4 bits, `level[code] * scale`; rows are padded with zeros to whole blocks of 64."""

    weight_buffers = ("packed", "scales")
    layout = "nf4"
    packed: Tensor  # uint8 [out, in padded / 2]
    scales: Tensor  # fp32 [out, in padded / 64], the largest weight of each block

    def store(self, weight: Tensor, rounding: Rounding) -> None:
        """Rounds and packs some rows at a time. A part of the inputs must hold whole blocks."""
        cols, cut = self._padded, input_part(self.part)
        if cut is not None and (cut.start % NF4_BLOCK or cut.size % NF4_BLOCK):
            raise ValueError(
                f"nf4 has one scale per {NF4_BLOCK} inputs; a part with inputs {cut.start} to "
                f"{cut.stop} would split such a block"
            )
        self.make_room()
        for rows in _parts(self.out_features, max(1, ROUNDED_WEIGHTS // cols)):
            raw = F.pad(weight[rows].to(self.home, torch.float32), (0, cols - self.in_features))
            codes, scales = _ops().quantize_4bit(raw, NF4_BLOCK, "nf4", torch.uint8)
            check_finite(scales)
            self.packed[rows] = codes.view(-1, cols // 2)
            self.scales[rows] = scales.view(-1, cols // NF4_BLOCK)

    def make_room(self) -> None:
        """Allocates two codes a byte, and a scale a block."""
        self.packed = self._empty(self.out_features, self._padded // 2, dtype=torch.uint8)
        blocks = self._padded // NF4_BLOCK
        self.scales = self._empty(self.out_features, blocks, dtype=torch.float32)

    def rounds_alone(self, rounding: Rounding) -> bool:
        """True, as a part holds whole blocks."""
        return True

    def multiply(self, x: Tensor) -> Tensor:
        """Dequantizes and multiplies chunk by chunk."""
        missing = self._padded - self.in_features
        return super().multiply(F.pad(x, (0, missing)) if missing else x)

    def dequantized_weight(self) -> Tensor:
        """The weight `[out, in]`."""
        return super().dequantized_weight()[:, : self.in_features].contiguous()

    @property
    def _padded(self) -> int:
        return -(-self.in_features // NF4_BLOCK) * NF4_BLOCK

    def _weight_rows(self, start: int, stop: int) -> Tensor:
        """Rows of the dequantized weight, `[rows, in padded]`."""
        packed, scales = self.packed[start:stop].flatten(), self.scales[start:stop].flatten()
        shape = (stop - start, self._padded)
        return _ops().dequantize_4bit(packed, scales, NF4_BLOCK, "nf4", shape, self.dtype)


class LlmInt8Linear(QuantizedLinear):
    """int8 weights with a scale a row, int8 inputs with a scale a token; large inputs in 16 bits.

    bitsandbytes separates the columns in which any token of the batch has an input of 6.0 or above,
    so that a token's result depends on the other tokens. Here each such input is separated by
    itself, and summed in 64-bit floats, whose rounding does not show the order of the sum: a
    token's result does not depend on the others.
    """

    weight_buffers = ("codes", "scales")
    layout = "8-bnb"
    waits_for_device = True
    codes: Tensor  # int8 [out, in]
    scales: Tensor  # fp32 [out], the largest weight of each row

    def store(self, weight: Tensor, rounding: Rounding) -> None:
        """Rounds some rows at a time."""
        self.make_room()
        for rows in _parts(self.out_features, kernels.chunk_rows(self.row_length, self.home)):
            raw = weight[rows].to(self.home, torch.float16)
            codes, scales, _ = _ops().int8_vectorwise_quant(raw)
            check_finite(scales)
            self.codes[rows], self.scales[rows] = columns_of(codes, self.part), scales

    def make_room(self) -> None:
        """Allocates a byte a code, and a scale a row."""
        self.codes = self._empty(self.out_features, self.in_features, dtype=torch.int8)
        self.scales = self._empty(self.out_features, dtype=torch.float32)

    def multiply(self, x: Tensor) -> Tensor:
        """The product fp32 `[M, out]`: exact integer sums, plus those of the large inputs."""
        if not x.shape[0]:
            return x.new_empty(0, self.out_features)
        large = x.abs() >= OUTLIER
        codes, scales, _ = _ops().int8_vectorwise_quant(x.masked_fill(large, 0).half())
        out = _ops().int8_linear_matmul(codes, self.codes).mul(scales[:, None] / 127)
        out.mul_(self.scales / 127)
        columns = large.any(dim=0).nonzero()[:, 0]
        if len(columns):
            out += self._large_part(x.masked_fill(~large, 0), columns)
        return out

    def dequantized_weight(self) -> Tensor:
        """The weight `[out, in]`."""
        return (self.codes * (self.scales / 127)[:, None]).to(self.dtype)

    def _large_part(self, x: Tensor, columns: Tensor) -> Tensor:
        """The product fp64 `[M, out]` of `x`, which is zero outside of `columns`."""
        out = torch.zeros(x.shape[0], self.out_features, dtype=torch.float64, device=x.device)
        for part in columns.split(LARGE_COLUMNS):
            out.addmm_(x[:, part].double(), self.codes[:, part].double().t())
        return out.mul_(self.scales / 127)


def _parts(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def _ops() -> Any:
    """bitsandbytes' operators; the import registers them."""
    import bitsandbytes  # noqa: F401

    return torch.ops.bitsandbytes
