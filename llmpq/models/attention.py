"""Attention and its masks, as transformers' own models call them in a stage.

transformers looks both up by a name in the configuration. A stage's layers find `attend` under
`DISPATCHED`; models that compute attention themselves (BLOOM) get additive masks, under `ADDITIVE`.
The mask of each row depends on the columns of its query tokens, which the cache gives
(`Cache.get_query_offset`): one number in a prefill, a tensor with a column for each row in a decode
step. transformers composes the rest (sliding windows, chunks of attention) from its own functions.
Of layers with a window the cache also gives the positions of keys, which lie in a ring.

An attention sink (gpt-oss, arXiv 2508.10925) is a learned score of each head that takes part in
the softmax and has no value. Modules of latent attention pass latents (`llmpq.models.latent`).

Shapes: R rows, G query heads for each of H key/value heads, S new tokens, T columns, D head size.
Not covered: learned position biases; a family that passes them is refused.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from llmpq.models import triton_attention
from llmpq.models.latent import attend_to_latents, expanded, keeps_latents
from llmpq.quant.triton_kernels import available

DISPATCHED, ADDITIVE = "llmpq", "llmpq_additive"
# Arguments that a family may pass to attention, and that `attend` does not support.
NOT_SUPPORTED = ("position_bias", "sinks")
SINK_SIZE = 8  # of a head, that hold its sink; fused kernels want sizes that are multiples of this
# Classes whose constructors know transformers' own names alone; `adapt` replaces their attention.
OWN_NAMES_ONLY = ("FalconForCausalLM",)
GROUPED_CAPABILITY = (8, 0)  # the least for CUDA's fused kernels of grouped key heads

MaskFunction = Callable[[Any, Any, Any, Any], Any]


def implementation_for(model_class: type[PreTrainedModel]) -> str:
    """The name under which a class of models finds its masks, and `attend` if it uses that."""
    if model_class.__name__ in OWN_NAMES_ONLY:
        return "sdpa"
    return DISPATCHED if model_class._supports_attention_backend else ADDITIVE


def attend(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    query_scales: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` `[R, G * H, S, D]` over `key`, `value` `[R, H, T, D]`.

    Returns `[R, S, G * H, D]`. `attention_mask` `[R or 1, 1, S, T]` is True where a query sees a
    key; None means causal attention with S = T. `s_aux` `[G * H]` holds attention sinks,
    `query_scales` `[R or 1, S]` factors of the queries.
    """
    if unknown := [name for name in NOT_SUPPORTED if others.get(name) is not None]:
        raise NotImplementedError(
            f"{type(module).__name__} passes {unknown[0]} to attention, which llmpq does not "
            "support"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query_scales is not None:
        query = (query * query_scales[:, None, :, None]).to(query.dtype)
    is_step = query.shape[2] == 1 and attention_mask is not None
    if keeps_latents(module):
        if is_step:
            assert attention_mask is not None
            output = attend_to_latents(module, query, key, value, attention_mask, scale)
            return output.transpose(1, 2), None
        key, value = expanded(module, key, value)
    if is_step:
        assert attention_mask is not None
        output = _decode(query, key, value, attention_mask, scale, softcap, s_aux)
    elif softcap is not None:
        output = _explicit(query, key, value, attention_mask, scale, softcap, s_aux)
    elif s_aux is not None:
        output = _prefill_with_sinks(query, key, value, attention_mask, scale, s_aux)
    else:
        output = _prefill(query, key, value, attention_mask, scale)
    return output.transpose(1, 2), None


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one token a row, `[R, G * H, 1, D]`: a key head's G heads become tokens."""
    has_kernel = _has_kernel(query.device) and mask.dtype == torch.bool
    if has_kernel and triton_attention.supports(query, key, value):
        return triton_attention.decode_attention(query, key, value, mask, scale, softcap, sinks)
    rows, heads, _, size = query.shape
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], size)
    mask = mask.expand(-1, -1, grouped.shape[2], -1)
    if softcap is not None or sinks is not None:
        sinks = None if sinks is None else sinks.view(grouped.shape[1:3])
        output = _explicit(grouped, key, value, mask, scale, softcap, sinks)
    else:
        output = F.scaled_dot_product_attention(grouped, key, value, mask, scale=scale)
    return output.reshape(rows, heads, 1, -1)


def _prefill(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention of many query tokens, `[R, G * H, S, D]`."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and not _takes_groups(query, mask):
        key, value = (_repeated(states, query.shape[1]) for states in (key, value))
        grouped = False
    size = value.shape[3]
    if size != key.shape[3] and query.device.type != "cuda":
        value = F.pad(value, (0, key.shape[3] - size))  # CPUs fuse equal sizes alone
    output = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return output[..., :size]


def _prefill_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, sinks: Tensor
) -> Tensor:
    """Attention of many tokens, with a sink `[G * H]` for each query head.

    The sink is a key before the first one, whose value is 0. Heads grow by `SINK_SIZE`: there
    queries hold `sink / scale`, and that key alone is not 0. So fused kernels compute it. Where
    attention is causal, a query before the first one, which is left out, keeps it so.
    """
    before, size = int(mask is None), query.shape[3]
    query, key, value = (
        F.pad(states, (0, SINK_SIZE, first, 0))
        for states, first in ((query, before), (key, 1), (value, 1))
    )
    exact = (sinks / scale).to(torch.float32)[:, None]
    query[..., size] = exact
    query[..., size + 1] = exact - exact.to(query.dtype)  # what 16 bits have rounded off
    key[:, :, 0, size : size + 2] = 1
    mask = None if mask is None else F.pad(mask, (1, 0), value=True)
    return _prefill(query, key, value, mask, scale)[:, :, before:, : value.shape[3] - SINK_SIZE]


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention without a fused kernel, with scores `softcap * tanh(score / softcap)` (Gemma 2).

    `sinks` has the heads' sinks, `[G * H]` or one for each query too, `[G * H, S]`.
    """
    key, value = (_repeated(states, query.shape[1]) for states in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.view(sinks.shape[0], -1, 1).to(scores.dtype)
        scores = torch.cat((scores, column.expand(*scores.shape[:-1], 1)), dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights[..., : key.shape[2]], value)


def _repeated(states: Tensor, heads: int) -> Tensor:
    """Keys or values `[R, H, T, D]`, with each head repeated for its query heads."""
    if states.shape[1] == heads:
        return states
    return states.repeat_interleave(heads // states.shape[1], dim=1)


@lru_cache
def _has_kernel(device: torch.device) -> bool:
    """Whether this device has our kernel, which reads each slot up to its own length."""
    return device.type == "cuda" and available(device)


def _takes_groups(query: Tensor, mask: Tensor | None) -> bool:
    """Whether fused attention takes grouped heads without repeating them, and is fast.

    On cards only FlashAttention is, which takes 16 bits and no masks.
    """
    if query.device.type != "cuda":
        return True
    return mask is None and query.dtype != torch.float32 and _has_flash(query.device)


@lru_cache
def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= GROUPED_CAPABILITY


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int | Tensor = 0,
    mask_function: MaskFunction = lambda *_: True,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """The mask `[R or 1, 1, S, T]`, True where a query sees a key; None for causal attention.

    `q_offset` is the place in the text of the first query token, or `[R]` of each row's;
    `kv_offset` that of the first key, or `[R, T]` of all keys, below 0 where there is none.
    `local_size` is the most keys that a query sees. Padding is on the right, where no query sees
    it, and needs no mask.
    """
    assert attention_mask is None, "stages pad on the right and pass no padding masks"
    within = local_size is None or kv_length <= local_size
    if allow_is_causal_skip and isinstance(q_offset, int) and q_offset == 0 and within:
        return None
    first = q_offset.view(-1, 1, 1, 1) if isinstance(q_offset, Tensor) else q_offset
    rows = torch.arange(batch_size, device=device).view(-1, 1, 1, 1)
    heads = torch.zeros((), dtype=torch.int64, device=device)
    queries = torch.arange(q_length, device=device).view(1, 1, -1, 1) + first
    if isinstance(kv_offset, Tensor):
        keys = kv_offset[:, None, None]
        ring: Tensor = mask_function(rows, heads, queries, keys) & (keys >= 0)
        return ring
    keys = torch.arange(kv_length, device=device).view(1, 1, 1, -1) + kv_offset
    mask: Tensor = mask_function(rows, heads, queries, keys)
    return mask


def make_additive_mask(*, dtype: torch.dtype, **inputs: Any) -> Tensor:
    """The mask as numbers of `dtype` to add to scores: 0, or the least for a hidden key."""
    mask = make_mask(**inputs | {"allow_is_causal_skip": False})
    assert mask is not None
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=mask.device)
    return torch.where(mask, torch.zeros_like(hidden), hidden)


for _name, _make in ((DISPATCHED, make_mask), (ADDITIVE, make_additive_mask)):
    AttentionInterface.register(_name, attend)
    AttentionMaskInterface.register(_name, _make)
