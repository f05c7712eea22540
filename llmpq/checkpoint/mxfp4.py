"""Reads MXFP4 weights of experts (gpt-oss), which become 16 bits when they are loaded.

`experts.gate_up_proj_blocks` uint8 `[E, out, in / 32, 16]` holds two values a byte, the first in
the low bits: a sign and an index into 0, 0.5, 1, 1.5, 2, 3, 4, 6 (the format E2M1 of OCP's
Microscaling specification 1.0). `experts.gate_up_proj_scales` uint8 `[E, out, in / 32]` holds the
exponent of each 32 values, plus 127. The products are exact in bf16. A matrix takes 4 bytes a value
until it is loaded; one expert is read at a time.

Not covered: kernels that read this format, which llmpq does not have; other layers than experts.
"""

from typing import Any

import torch
from torch import Tensor

from llmpq.checkpoint.prequantized import Tensors
from llmpq.checkpoint.stored_names import Place, expert_index, stacked_name
from llmpq.families import StackedExperts

METHOD = "mxfp4"
BLOCK = 32  # values that share a scale
EXPONENT_BIAS = 127
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Mxfp4:
    """Reads MXFP4 experts of a checkpoint. `interleaved`: outputs of gate and up take turns."""

    what = "the weights of experts are MXFP4"

    def __init__(self, interleaved: bool) -> None:
        self._layout = StackedExperts(interleaved=interleaved)

    def names(self, linear: str) -> list[str]:
        """The tensors that hold an expert's linear; none for other linears."""
        stacked = stacked_name(linear)
        return [f"{stacked[0]}_{part}" for part in ("blocks", "scales")] if stacked else []

    def holds(self, linear: str, tensors: Tensors) -> bool:
        """Whether this linear is stored so."""
        return any(name in tensors for name in self.names(linear))

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """The bytes of an expert's matrix `[out, in]`."""
        return shape[0] * shape[1] // 2 + shape[0] * shape[1] // BLOCK

    def read(self, linear: str, shape: tuple[int, ...], tensors: Any) -> Tensor:
        """The weight `[out, in]` of an expert's linear in fp32."""
        stacked = stacked_name(linear)
        assert stacked is not None
        _, expert, half = stacked
        blocks, scales = (
            self._part(name, Place(name, expert, half), tensors) for name in self.names(linear)
        )
        wanted = (shape[0], shape[1] // BLOCK)
        if blocks.shape != (*wanted, BLOCK // 2) or scales.shape != wanted or shape[1] % BLOCK:
            found = f"{list(blocks.shape)} with scales {list(scales.shape)}"
            raise tensors.fault(
                self.names(linear)[0],
                f"holds {found} for an expert, which does not fit {list(shape)} of config.json",
            )
        return dequantize(blocks, scales)

    def _part(self, name: str, place: Place, tensors: Any) -> Tensor:
        """The blocks or scales of an expert's matrix."""
        shape = tensors.shape_of(name)
        if len(shape) < 3 or place.expert >= shape[0]:
            raise tensors.fault(name, f"has shape {list(shape)}: no expert {place.expert}")
        part = tensors.tensor(name, index=expert_index(place, shape, self._layout))
        if part.dtype != torch.uint8:
            raise tensors.fault(name, f"is {part.dtype}, expected uint8")
        return part


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """The values fp32 `[out, in]` of blocks uint8 `[out, in / 32, 16]`, scales `[out, in / 32]`."""
    table = torch.tensor([*VALUES, *(-value for value in VALUES)])
    pairs = torch.stack((blocks & 15, blocks >> 4), dim=-1)
    values = table[pairs.flatten(2).int()]
    exponents = scales.to(torch.int32) - EXPONENT_BIAS
    return torch.ldexp(values, exponents[..., None]).flatten(1)
