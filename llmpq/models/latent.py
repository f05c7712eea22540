"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) over cached latents.

The cache of a token holds its normalized latent and one rotated key that all heads share.
transformers' modules pass both to `expand_kv`, where `kv_b_proj` makes the keys and values of all
heads of them. That is done here for prefills. In a decode step it would cost more than the
attention itself, so there `kv_b_proj` is applied to the query and to the output (it is absorbed).
Both give the same sums in another order.

`kv_b_proj` keeps 16 bits and is no quantized linear: a decode step needs it as a plain matrix, and
unpacking it in every step would move more bytes than reading it. In DeepSeek-V3 it holds 9 % of
the attention's weights, and 0.15 % of a layer's with experts.

Shapes: R rows, H heads, T columns, N and P the sizes of a head's keys without and with rotary
positions, V that of its values, C the latent's. Not covered: biases of `kv_b_proj`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LatentMatrix(nn.Module):
    """`kv_b_proj`: a matrix `[H * (N + V), C]` that keeps 16 bits."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, latent: Tensor) -> Tensor:
        """`[..., C]` to `[..., H * (N + V)]`."""
        return F.linear(latent, self.weight)


def keep_latents(attention: Any) -> None:
    """Lets a module that has `expand_kv` attend to latents."""
    if attention.kv_b_proj.bias is None:
        attention.kv_b_proj = LatentMatrix(attention.kv_b_proj.weight)
        attention.expand_kv = _unexpanded


def keeps_latents(module: nn.Module | None) -> bool:
    """Whether the keys and values that this module passes to attention are latents."""
    return getattr(module, "expand_kv", None) is _unexpanded


def expanded(module: Any, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Keys `[R, H, T, N + P]` and values `[R, H, T, V]` of the latents `[R, 1, T, C]`."""
    keys, values = type(module).expand_kv(module, latent, rotated)
    return keys, values


def attend_to_latents(
    module: Any, query: Tensor, latent: Tensor, rotated: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Attention of one token a row, `query` `[R, H, 1, N + P]`, without expanding its keys.

    `latent` is `[R, 1, T, C]`, `rotated` `[R, 1, T, P]`, `mask` `[R or 1, 1, 1, T]`, True where a
    column is seen. Returns `[R, H, 1, V]`.
    """
    sizes = module.qk_nope_head_dim, module.v_head_dim
    matrices = module.kv_b_proj.weight.view(query.shape[1], sum(sizes), -1)
    of_keys, of_values = matrices.split(sizes, dim=1)  # [H, N, C], [H, V, C]
    plain, turned = query[:, :, 0].split([sizes[0], rotated.shape[-1]], dim=-1)
    latent, rotated = latent[:, 0], rotated[:, 0]
    absorbed = torch.bmm(plain.transpose(0, 1), of_keys).transpose(0, 1)  # [R, H, C]
    scores = torch.matmul(absorbed, latent.mT)
    scores += torch.matmul(turned, rotated.mT)
    scores = (scores * scale).masked_fill_(~mask[:, 0], torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    attended = torch.matmul(weights, latent)  # [R, H, C]
    return torch.bmm(attended.transpose(0, 1), of_values.mT).transpose(0, 1)[:, :, None]


def _unexpanded(latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces `expand_kv`: attention gets the latents as they are."""
    return latent, rotated
