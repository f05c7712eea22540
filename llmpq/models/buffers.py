"""Constants of modules beside their weights, whether checkpoints hold them or not.

A buffer that transformers calls persistent (xIELU's beta, the scale of a layer in Gemma 4) is saved
and loaded with the weights. Other buffers (rotary frequencies, scales of an embedding) follow from
the configuration, and transformers' own initializer computes them.
"""

import torch
from torch import nn

from llmpq.errors import UserError
from llmpq.quant import PlainLinear, QuantizedLinear


def stored_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of a module itself that checkpoints hold (xIELU's, scales of layers)."""
    if isinstance(module, PlainLinear | QuantizedLinear):
        return {}
    unstored = module._non_persistent_buffers_set
    return {n: b for n, b in module.named_buffers(recurse=False) if n not in unstored}


def compute_buffers(model: nn.Module, device: torch.device) -> None:
    """Computes on `device` the buffers that no checkpoint holds.

    Buffers of checkpoints get memory when they are loaded. Each other buffer is computed in memory
    of zeros and in memory of ones: where the results differ, values were never written, and
    `UserError` is raised.
    """
    for path, module in model.named_modules():
        buffers = {n: b for n, b in module._buffers.items() if b is not None and b.is_meta}
        own = {n: b for n, b in buffers.items() if n in module._non_persistent_buffers_set}
        if not own:
            continue
        zeros, ones = (_computed(model, module, own, value) for value in (0, 1))
        for name, buffer in zeros.items():
            if not torch.equal(buffer, ones[name]):
                raise UserError(
                    f"'{type(model).__name__}' computes the buffer '{path}.{name}' in a "
                    "way that llmpq does not support"
                )
            module.register_buffer(name, buffer.to(device), persistent=False)


def _computed(
    model: nn.Module, module: nn.Module, buffers: dict[str, torch.Tensor], value: int
) -> dict[str, torch.Tensor]:
    """The buffers that transformers' initializer computes in memory full of `value`."""
    for name, buffer in buffers.items():
        full = torch.full_like(buffer, value, device="cpu")
        module.register_buffer(name, full, persistent=False)
    model._init_weights(module)  # type: ignore[operator]
    return {name: module.get_buffer(name) for name in buffers}
