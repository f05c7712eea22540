"""Placeholder until the kernels are merged."""

import torch
from torch import Tensor


def available(device: torch.device) -> bool:
    """Whether the kernel serves this device."""
    return False


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Replaced."""
    raise NotImplementedError
