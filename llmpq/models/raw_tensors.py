"""The tensors of a checkpoint that the modules of a stage need, and the bytes that modules hold.

A linear of llmpq says itself which raw tensors it packs. Any other module needs its parameters,
and the buffers that transformers stores beside weights (`buffers`). Parameters take the stage's
data type, unless transformers keeps them at 32 bits whatever the others have.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmpq.models.buffers import stored_buffers
from llmpq.quant import PlainLinear, QuantizedLinear, Rounding, TensorPart, quantize


@dataclass(frozen=True)
class RawTensor:
    """A tensor of the checkpoint, and the module that needs it or a part of it."""

    name: str  # its name in the whole model's checkpoint
    module: nn.Module
    attribute: str
    shape: tuple[int, ...]  # the whole tensor's shape
    is_float32: bool = False  # whether it has 32 bits whatever the stage's data type is

    def part(self, rounding: Rounding = quantize) -> TensorPart | None:
        """The part that the module needs, if weights are rounded so; None: all of it."""
        if isinstance(self.module, PlainLinear | QuantizedLinear):
            return self.module.part_to_read(self.attribute, rounding)
        return None if self.is_buffer else held_part(self.module)

    @property
    def is_buffer(self) -> bool:
        """Whether it is a constant that transformers stores beside the weights, and no weight."""
        return self.attribute in self.module._buffers


def float32_names(model: Any) -> re.Pattern[str] | None:
    """The names of tensors that transformers keeps at 32 bits: biases that choose experts."""
    names = getattr(model, "_keep_in_fp32_modules_strict", None)
    return re.compile(rf"(^|\.)({'|'.join(sorted(names))})(\.|$)") if names else None


def raw_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the whole tensors that a loader must fill in a module."""
    if isinstance(module, PlainLinear | QuantizedLinear):
        return module.raw_shapes
    part = held_part(module)
    own = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    whole = {name: part.whole_shape(s) if part else s for name, s in own.items()}
    return whole | {name: tuple(b.shape) for name, b in stored_buffers(module).items()}


def held_part(module: nn.Module) -> TensorPart | None:
    """The part of a matrix that a module holds; None for all of it."""
    part: TensorPart | None = getattr(module, "part", None)
    return part


def held_bytes(module: nn.Module, seen: set[int]) -> int:
    """Bytes of a module's own weights, without computed constants (rotary frequencies)."""
    if isinstance(module, PlainLinear | QuantizedLinear):
        packed = module.weight_bytes
        shared = _is_seen(getattr(module, "weight", None), seen)
        bias = getattr(module, "bias", None)
        return (0 if shared else packed) + (0 if bias is None else _num_bytes(bias))
    held = [*module.parameters(recurse=False), *stored_buffers(module).values()]
    return sum(_num_bytes(t) for t in held if not t.is_meta and not _is_seen(t, seen))


def _is_seen(tensor: object, seen: set[int]) -> bool:
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        return False
    known = tensor.data_ptr() in seen
    seen.add(tensor.data_ptr())
    return known


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
