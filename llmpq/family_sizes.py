"""The numbers of parameters that follow from a configuration, for families of `llmpq.families`.

Each function takes the settings of a configuration, adds what is wrong with them to the settings'
faults, and returns `ModelSizes`. They are read from the classes of transformers 5.23. Tests compare
them with transformers' own modules.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from llmpq.config_keys import ConfigKeys
from llmpq.windows import FULL, SLIDING, windows_of

# Under which names configurations hold the same size.
FFN_KEYS = ("intermediate_size", "ffn_dim", "n_inner")
POSITION_KEYS = ("max_position_embeddings", "seq_length", "n_positions", "max_seq_len")


class Matrix(NamedTuple):
    """A weight matrix `[out_features, in_features]` of a layer."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class ModelSizes:
    """The sizes that follow from a configuration: counts of parameters, as in `ModelSpec`."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    linears: tuple[Matrix, ...] = ()
    layer_other_params: int = 0
    embedding_params: int = 0
    head_params: int = 0
    final_params: int = 0
    tied: bool = False
    eager_attention: bool = False
    windows: tuple[int | None, ...] = ()  # of every layer; none: all attend to all tokens


def _common(keys: ConfigKeys, ffn_factor: int | None = None) -> ModelSizes:
    """The sizes that every family's configuration gives under some key; others are missing."""
    hidden = keys.count("hidden_size", "n_embed", "n_embd", "d_model")
    heads = keys.count("num_attention_heads", "n_head", "n_heads")
    ffn_default = ffn_factor * hidden if ffn_factor else None
    return ModelSizes(
        num_layers=keys.count("num_hidden_layers", "n_layer", "n_layers"),
        hidden_size=hidden,
        ffn_size=keys.count(*FFN_KEYS, default=ffn_default),
        num_heads=heads,
        num_kv_heads=keys.count("num_key_value_heads", default=heads),
        head_dim=keys.count("head_dim", default=max(1, hidden // heads)),
        vocab_size=keys.count("vocab_size"),
        max_positions=keys.count(*POSITION_KEYS, default=2048),
    )


def llama_sizes(
    keys: ConfigKeys,
    *,
    qkv_bias: bool | None = None,
    norms: int = 2,
    qk_norm: bool = False,
    tied: bool = False,
    eager_attention: bool = False,
    windows: Callable[[ConfigKeys, int], tuple[int | None, ...]] | None = None,
) -> ModelSizes:
    """Sizes of models with gated feed-forward, rotary positions, RMS norms, grouped queries.

    `windows`: of so many layers, where some have any.
    """
    spec = _common(keys)
    hidden, ffn, dim = spec.hidden_size, spec.ffn_size, spec.head_dim
    query, key_value = spec.num_heads * dim, spec.num_kv_heads * dim
    attention_bias = keys.flag("attention_bias", False)
    biased_qkv = attention_bias if qkv_bias is None else qkv_bias
    other = norms * hidden + (2 * dim if qk_norm else 0)
    other += (query + 2 * key_value) if biased_qkv else 0
    other += hidden if attention_bias else 0
    other += (2 * ffn + hidden) if keys.flag("mlp_bias", False) else 0
    linears = (
        Matrix("q_proj", query, hidden),
        Matrix("k_proj", key_value, hidden),
        Matrix("v_proj", key_value, hidden),
        Matrix("o_proj", hidden, query),
        Matrix("gate_proj", ffn, hidden),
        Matrix("up_proj", ffn, hidden),
        Matrix("down_proj", hidden, ffn),
    )
    return replace(
        spec,
        linears=linears,
        layer_other_params=other,
        embedding_params=spec.vocab_size * hidden,
        head_params=spec.vocab_size * hidden,
        final_params=hidden,
        tied=keys.flag("tie_word_embeddings", tied),
        eager_attention=eager_attention,
        windows=windows(keys, spec.num_layers) if windows else (),
    )


# ---- windows of attention, with what transformers' configurations take where a key is missing


def sliding_windows(keys: ConfigKeys, num_layers: int) -> tuple[int | None, ...]:
    """Of Mistral, whose layers all have the window, if there is one."""
    return windows_of([SLIDING] * num_layers, _window(keys))


def alternating_windows(keys: ConfigKeys, num_layers: int) -> tuple[int | None, ...]:
    """Of Gemma 2: each second layer attends to all tokens."""
    return _every_nth_full(keys, num_layers, 2)


def sixth_full_windows(keys: ConfigKeys, num_layers: int) -> tuple[int | None, ...]:
    """Of Gemma 3: each sixth layer attends to all tokens, unless the settings have a pattern."""
    return _every_nth_full(keys, num_layers, _size(keys, "sliding_window_pattern", 6) or 1)


def late_windows(keys: ConfigKeys, num_layers: int) -> tuple[int | None, ...]:
    """Of Qwen: the layers from "max_window_layers" on, if windows are switched on."""
    window = _window(keys) if keys.data.get("use_sliding_window") else None
    first = keys.data.get("max_window_layers", 28)
    from_here = first if isinstance(first, int) else num_layers
    kinds = [SLIDING if i >= from_here else FULL for i in range(num_layers)]
    return windows_of(_layer_types(keys, kinds), window)


def windows_without_rope(keys: ConfigKeys, num_layers: int) -> tuple[int | None, ...]:
    """Of SmolLM3: the layers without rotary positions, if windows are switched on."""
    interval = _size(keys, "no_rope_layer_interval", 4) or 1
    listed = keys.data.get("no_rope_layers")
    has_rope = [(i + 1) % interval for i in range(num_layers)]
    if isinstance(listed, list) and len(listed) == num_layers:
        has_rope = listed
    switched_on = bool(keys.data.get("use_sliding_window"))
    kinds = [FULL if rope or not switched_on else SLIDING for rope in has_rope]
    return windows_of(_layer_types(keys, kinds), _window(keys, None))


def _every_nth_full(keys: ConfigKeys, num_layers: int, n: int) -> tuple[int | None, ...]:
    kinds = [SLIDING if (i + 1) % n else FULL for i in range(num_layers)]
    return windows_of(_layer_types(keys, kinds), _window(keys))


def _window(keys: ConfigKeys, default: int | None = 4096) -> int | None:
    """The tokens of a sliding window; null is none, a missing key the default."""
    return _size(keys, "sliding_window", default)


def _size(keys: ConfigKeys, name: str, default: int | None) -> int | None:
    """A size, or None where the value is none: such a model is judged on its modules."""
    value = keys.data.get(name, default)
    is_size = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return value if is_size else None


def _layer_types(keys: ConfigKeys, default: Sequence[str]) -> Sequence[str]:
    """The kinds of layers, as listed for so many layers, or else these."""
    listed = keys.data.get("layer_types")
    if isinstance(listed, list) and len(listed) == len(default):
        return [str(kind) for kind in listed]
    return default


def opt_sizes(keys: ConfigKeys) -> ModelSizes:
    """Sizes of OPT: learned positions, and maybe a projected embedding."""
    spec = _common(keys)
    hidden, ffn = spec.hidden_size, spec.ffn_size
    embed = keys.count("word_embed_proj_dim", default=hidden)
    bias = 4 * hidden + ffn + hidden if keys.flag("enable_bias", True) else 0
    positions = (spec.max_positions + 2) * hidden
    project = embed * hidden if embed != hidden else 0
    final_norm = 2 * hidden if keys.flag("do_layer_norm_before", True) else 0
    attention = tuple(Matrix(f"{n}_proj", hidden, hidden) for n in ("q", "k", "v", "out"))
    return replace(
        spec,
        linears=(*attention, Matrix("fc1", ffn, hidden), Matrix("fc2", hidden, ffn)),
        layer_other_params=4 * hidden + bias,
        embedding_params=spec.vocab_size * embed + positions + project,
        head_params=spec.vocab_size * embed,
        final_params=final_norm + project,
        tied=keys.flag("tie_word_embeddings", True),
    )


def fused_qkv_sizes(keys: ConfigKeys, tied: bool) -> ModelSizes:
    """Sizes of BLOOM and GPT-NeoX: one matrix for query, key and value; biases everywhere."""
    spec = _common(keys, ffn_factor=4)
    hidden, ffn = spec.hidden_size, spec.ffn_size
    attention_bias = 4 * hidden if keys.flag("attention_bias", True) else 0
    return replace(
        spec,
        linears=(
            Matrix("query_key_value", 3 * hidden, hidden),
            Matrix("dense", hidden, hidden),
            Matrix("dense_h_to_4h", ffn, hidden),
            Matrix("dense_4h_to_h", hidden, ffn),
        ),
        layer_other_params=4 * hidden + attention_bias + ffn + hidden,
        embedding_params=spec.vocab_size * hidden,
        head_params=spec.vocab_size * hidden,
        final_params=2 * hidden,
        tied=keys.flag("tie_word_embeddings", tied),
    )


def bloom_sizes(keys: ConfigKeys) -> ModelSizes:
    """Sizes of BLOOM, which has a norm behind the embedding."""
    sizes = fused_qkv_sizes(keys, tied=True)
    norm = 2 * sizes.hidden_size  # the weight and bias of the embedding's norm
    return replace(sizes, embedding_params=sizes.embedding_params + norm, eager_attention=True)


def gpt2_sizes(keys: ConfigKeys) -> ModelSizes:
    """Sizes of GPT-2: one matrix for query, key and value, biases, learned positions."""
    sizes = _common(keys, ffn_factor=4)
    hidden, ffn, tokens = sizes.hidden_size, sizes.ffn_size, sizes.vocab_size * sizes.hidden_size
    if keys.flag("add_cross_attention", False):
        keys.faults.append(f"{keys.source}: layers that attend to an encoder are not supported")
    return replace(
        sizes,
        linears=(
            Matrix("c_attn", 3 * hidden, hidden),
            Matrix("c_proj", hidden, hidden),
            Matrix("c_fc", ffn, hidden),
            Matrix("c_proj", hidden, ffn),
        ),
        layer_other_params=9 * hidden + ffn,  # biases 3, 1, 1 and ffn; two norms
        embedding_params=tokens + sizes.max_positions * hidden,
        head_params=tokens,
        final_params=2 * hidden,
        tied=keys.flag("tie_word_embeddings", True),
    )


def phi_sizes(keys: ConfigKeys) -> ModelSizes:
    """Sizes of Phi and Phi-2: biases everywhere, one norm a layer."""
    sizes = _common(keys)
    hidden, ffn, dim = sizes.hidden_size, sizes.ffn_size, sizes.head_dim
    key_value, tokens = sizes.num_kv_heads * dim, sizes.vocab_size * hidden
    norms = 2 * hidden + (4 * dim if keys.flag("qk_layernorm", False) else 0)
    return replace(
        sizes,
        linears=(
            Matrix("q_proj", hidden, hidden),
            Matrix("k_proj", key_value, hidden),
            Matrix("v_proj", key_value, hidden),
            Matrix("dense", hidden, hidden),
            Matrix("fc1", ffn, hidden),
            Matrix("fc2", hidden, ffn),
        ),
        layer_other_params=norms + 3 * hidden + 2 * key_value + ffn,
        embedding_params=tokens,
        head_params=tokens + sizes.vocab_size,  # it has a bias
        final_params=2 * hidden,
        tied=keys.flag("tie_word_embeddings", False),
    )


def mpt_sizes(keys: ConfigKeys) -> ModelSizes:
    """Sizes of MPT: one matrix for query, key and value, no biases."""
    sizes = _common(keys, ffn_factor=4)
    hidden = sizes.hidden_size
    return replace(
        sizes,
        ffn_size=4 * hidden,  # transformers' class ignores other factors, and adds no biases
        linears=(
            Matrix("Wqkv", 3 * hidden, hidden),
            Matrix("out_proj", hidden, hidden),
            Matrix("up_proj", 4 * hidden, hidden),
            Matrix("down_proj", hidden, 4 * hidden),
        ),
        layer_other_params=2 * hidden,
        embedding_params=sizes.vocab_size * hidden,
        head_params=sizes.vocab_size * hidden,
        final_params=hidden,
        tied=keys.flag("tie_word_embeddings", True),
        eager_attention=True,
    )
