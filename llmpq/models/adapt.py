"""Changes transformers' modules where a stage cannot run them as they are.

    Conv1D          (GPT-2) becomes a linear whose matrix is stored transposed
    latent attention         attends to latents (`llmpq.models.latent`)
    Falcon's attention       stores each key-value head once; transformers' stores all query heads'
    Llama 4's attention      scales a query by its position in its own row's text; transformers
                             knows one position for all rows

Classes are recognized by their names, as importing every family takes long.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmpq.models.attention import DISPATCHED, attend
from llmpq.models.family import find, replace
from llmpq.models.latent import keep_latents
from llmpq.quant import PlainLinear, QuantizedLinear

FALCON, LLAMA4 = "FalconAttention", "Llama4TextAttention"


def adapt(model: nn.Module) -> list[str]:
    """Changes a model, which is on the meta device.

    Returns the paths of the linears whose matrices checkpoints hold as `[in, out]`.
    """
    transposed = []
    for path, module in list(model.named_modules()):
        kind = type(module).__name__
        if isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            replace(model, path, _as_linear(in_features, out_features, module))
            transposed.append(path)
        elif kind == "FalconLinear":
            replace(model, path, _as_linear(module.in_features, module.out_features, module))
        elif kind == FALCON:
            _attend_as_in_falcon(module)
        elif kind == LLAMA4 and module.attn_temperature_tuning:
            module.forward = partial(_attend_in_llama4, module)  # type: ignore[assignment]
            module.attn_temperature_tuning = False  # type: ignore[assignment]
        elif hasattr(module, "expand_kv"):
            keep_latents(module)
    return transposed


def mark_transposed(model: nn.Module, paths: Iterable[str]) -> None:
    """Tells the linears at these paths, where this stage has them, how checkpoints hold them."""
    for path in paths:
        linear = find(model, path)
        if isinstance(linear, PlainLinear | QuantizedLinear):
            linear.is_transposed = True


def _as_linear(in_features: int, out_features: int, like: Any) -> nn.Linear:
    """A plain linear of these sizes, with the data type of another module and a bias if it has."""
    has_bias, dtype = like.bias is not None, like.weight.dtype
    return nn.Linear(in_features, out_features, has_bias, device="meta", dtype=dtype)


# ---- Falcon


def _attend_as_in_falcon(module: Any) -> None:
    """Replaces the forward of a Falcon attention module, and lets its model make our masks."""
    group = module.num_heads // module.num_kv_heads
    module.forward = partial(_attend_in_falcon, module, group)
    module.config._attn_implementation = DISPATCHED


def _attend_in_falcon(
    module: Any,
    group: int,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention of Falcon, old and new, for states `[R, S, H]`.

    The fused matrix gives, for each key-value head, its query heads, the key and the value.
    """
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    rows, tokens = hidden_states.shape[:2]
    fused = module.query_key_value(hidden_states)
    heads = fused.view(rows, tokens, -1, group + 2, module.head_dim)
    query, key, value = (
        states.flatten(2, 3).transpose(1, 2) for states in heads.split([group, 1, 1], dim=3)
    )
    if alibi is None:
        assert position_embeddings is not None
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    output, _none = attend(module, query, key, value, attention_mask)
    return module.dense(output.reshape(rows, tokens, -1)), None


# ---- Llama 4


def _attend_in_llama4(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **others: Any,
) -> Any:
    """The attention of Llama 4, whose layers without rotary positions scale their queries.

    The scale grows with the token's position in its own text (arXiv 2501.19399).
    """
    scales = None
    if not module.use_rope:
        first = 0 if past_key_values is None else past_key_values.get_query_offset()
        first = first.view(-1, 1) if isinstance(first, Tensor) else first
        places = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None] + first
        steps = torch.floor((places.float() + 1.0) / module.floor_scale)
        scales = torch.log1p(steps) * module.attn_scale + 1.0
    given = hidden_states, position_embeddings, attention_mask, past_key_values
    return type(module).forward(module, *given, query_scales=scales, **others)
