"""Reads float8 weights with scales, which become 16 bits when they are loaded.

The format is transformers' `quant_method: "fp8"` (DeepSeek, Qwen): beside `weight`, float8
`[out, in]`, there is `weight_scale_inv`, by which it is multiplied: one number, or one for each
block of `weight_block_size` rows and columns, the last of which may be smaller. The product is
computed in fp32, as in transformers (`Fp8Dequantize`, 5.23). A weight takes 4 bytes a value until
it is loaded.

Not covered: scales that are powers of two in a byte, scales of activations (which stay at 16 bits),
the float8 formats of compressed-tensors and ModelOpt; those are refused.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from llmpq.artifact import show_value
from llmpq.checkpoint.prequantized import Tensors, settings_of
from llmpq.errors import UserError

METHOD = "fp8"
SCALE = "weight_scale_inv"


class Float8:
    """Reads float8 linears of a checkpoint. `block`: rows and columns of a scale's block."""

    what = "the weights are float8"
    # Names of the tensors of such a linear, beside its bias.
    parts = ("weight", SCALE, "activation_scale", "input_scale")

    def __init__(self, block: tuple[int, int] | None) -> None:
        self.block = block

    def names(self, linear: str) -> list[str]:
        """The names that tensors of a linear may have."""
        return [f"{linear}.{part}" for part in self.parts]

    def holds(self, linear: str, tensors: Tensors) -> bool:
        """Whether this linear has scales."""
        return f"{linear}.{SCALE}" in tensors

    def read(self, linear: str, shape: tuple[int, ...], tensors: Tensors) -> Tensor:
        """The weight `[out, in]` of a linear in fp32."""
        weight = tensors.tensor(f"{linear}.weight", shape)
        if not str(weight.dtype).startswith("torch.float8"):
            raise tensors.fault(f"{linear}.weight", f"is {weight.dtype}, but has scales of float8")
        name = f"{linear}.{SCALE}"
        scales = tensors.tensor(name)
        if not scales.is_floating_point() or scales.element_size() < 2:
            raise tensors.fault(name, f"is {scales.dtype}, expected floats of 16 bits or more")
        if scales.numel() == 1:
            return weight.float().mul_(scales.float().reshape(1, 1))
        rows, cols = self.block or (1, 1)
        blocks = (-(-shape[0] // rows), -(-shape[1] // cols))
        if self.block is None or tuple(scales.shape) != blocks:
            asked = f"weight_block_size {self.block} of config.json"
            raise tensors.fault(name, f"has shape {list(scales.shape)}, which does not fit {asked}")
        spread = scales.float().repeat_interleave(rows, 0)[: shape[0]]
        return weight.float().mul_(spread.repeat_interleave(cols, 1)[:, : shape[1]])


def float8_of(folder: Path) -> Float8 | None:
    """The float8 format of the checkpoint in this directory; None where it has no float8."""
    settings, path = settings_of(folder)
    if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
        return None
    block: Any = settings.get("weight_block_size")
    if block is None:
        return Float8(None)
    sizes = block if isinstance(block, list) else []
    if len(sizes) != 2 or any(type(size) is not int or size <= 0 for size in sizes):
        raise UserError(
            f"{path}: weight_block_size is {show_value(block)}, expected rows and columns"
        )
    return Float8((block[0], block[1]))
