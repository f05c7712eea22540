"""The differences between families of decoder models: a row of `FAMILIES` for each, without torch.

A row gives the paths of the parts of transformers' module, the numbers of parameters that follow
from a configuration, the settings that change the memory of a layer, and peculiarities of the
family. All other modules of llmpq ask the row and name no family. A model type without a row is
assumed to be laid out like LLaMA; its sizes are counted on transformers' own modules
(`llmpq.evaluation.judge`).

CONTRIBUTING.md says how to add one. Tests compare the counts with transformers' own modules,
and tokens of pipelines with those of the whole model. assets/activations.json holds the activations
of the families with counts.

Not covered: options of single models, which their settings give.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

from llmpq.config_keys import ConfigKeys

# How devices that share a layer cut its matrices: by output features, by input features (their
# results are then summed), or by output features a key-value head at a time ("kv"): where there
# are fewer of these heads than devices, several devices hold the same one.
Cut = Literal["out", "in", "kv"]
CUTS: dict[str, Cut] = {
    "q_proj": "out",
    "k_proj": "kv",
    "v_proj": "kv",
    "query_key_value": "out",
    "gate_proj": "out",
    "up_proj": "out",
    "fc1": "out",
    "dense_h_to_4h": "out",
    "o_proj": "in",
    "out_proj": "in",
    "dense": "in",
    "down_proj": "in",
    "fc2": "in",
    "dense_4h_to_h": "in",
}


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


# ---- the sizes that follow from a configuration


def _common(keys: ConfigKeys, ffn_factor: int | None = None) -> ModelSizes:
    """The sizes that every family's configuration gives under some key; others are missing."""
    hidden = keys.count("hidden_size", "n_embed")
    heads = keys.count("num_attention_heads", "n_head")
    ffn_default = ffn_factor * hidden if ffn_factor else None
    return ModelSizes(
        num_layers=keys.count("num_hidden_layers", "n_layer"),
        hidden_size=hidden,
        ffn_size=keys.count("intermediate_size", "ffn_dim", default=ffn_default),
        num_heads=heads,
        num_kv_heads=keys.count("num_key_value_heads", default=heads),
        head_dim=keys.count("head_dim", default=max(1, hidden // heads)),
        vocab_size=keys.count("vocab_size"),
        max_positions=keys.count("max_position_embeddings", "seq_length", default=2048),
    )


def llama_sizes(
    keys: ConfigKeys,
    *,
    qkv_bias: bool | None = None,
    norms: int = 2,
    qk_norm: bool = False,
    tied: bool = False,
    eager_attention: bool = False,
) -> ModelSizes:
    """Sizes of models with gated feed-forward, rotary positions, RMS norms, grouped queries."""
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
    )


def _opt_sizes(keys: ConfigKeys) -> ModelSizes:
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


def _fused_qkv_sizes(keys: ConfigKeys, tied: bool) -> ModelSizes:
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


def _bloom_sizes(keys: ConfigKeys) -> ModelSizes:
    sizes = _fused_qkv_sizes(keys, tied=True)
    norm = 2 * sizes.hidden_size  # the weight and bias of the embedding's norm
    return replace(sizes, embedding_params=sizes.embedding_params + norm, eager_attention=True)


# ---- the families


@dataclass(frozen=True)
class StackedExperts:
    """How checkpoints lay out the matrices of all experts of a layer in one tensor, if they do.

    `transposed`: matrices are `[in, out]`. `interleaved`: outputs of gate and up take turns.
    """

    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class Family:
    """One family. Paths of `layers` to `positions` are relative to `decoder`, the module whose
    `forward` runs the layers; `decoder` and `head` are relative to the model.

    `sizes`: the sizes of its configurations; None: counted on transformers' own modules.
    `is_tested`: tests show that its pipelines give the tokens of the whole model, and so do devices
    that share its layers, where it `can_share` them.
    `variants`: settings that change the memory of a layer, such as a window of attention that is
    off by default; the table of activations covers each of them.
    `heads_fill_hidden`: the hidden size is heads times head size, which the table must respect.
    `per_head`: keyword arguments of a layer with values for each head, `[B * heads, ...]`, which
    are cut for devices that share the layer.
    `logit_cap`, `logit_factor`, `logit_divisor`: the settings by which logits are changed.
    `overflows_float16`: its activations are known to be too large for float16. vLLM refuses it for
    the same families (`_FLOAT16_NOT_SUPPORTED_MODELS` of vllm/config/model.py, 0.11: "numerical
    instability"); for Gemma 3 see also transformers' issue 39972.
    """

    decoder: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    final: tuple[str, ...] = ("norm",)  # act on the last layer's output
    input: tuple[str, ...] = ()  # act on the embedded input
    positions: tuple[str, ...] = ()  # learned positions, added to the embedded input
    head_in_files: str = "lm_head"  # what checkpoints call the head
    sizes: Callable[[ConfigKeys], ModelSizes] | None = None
    is_tested: bool = False
    can_share: bool = True
    variants: tuple[Mapping[str, Any], ...] = ({},)
    heads_fill_hidden: bool = False
    per_head: tuple[str, ...] = ()
    logit_cap: str = "final_logit_softcapping"
    logit_factor: str = "logit_scale"
    logit_divisor: str = "logits_scaling"
    overflows_float16: bool = False
    stacked: StackedExperts = StackedExperts()


_WITH_EXPERTS = Family(is_tested=True, can_share=False)
_SOME_WINDOWS: Mapping[str, Any] = {"use_sliding_window": True, "max_window_layers": 3}

FAMILIES: dict[str, Family] = {
    "llama": Family(sizes=llama_sizes, is_tested=True),
    "mistral": Family(
        sizes=llama_sizes,
        is_tested=True,
        variants=({"sliding_window": None}, {"sliding_window": 4096}),
    ),
    "qwen2": Family(
        sizes=partial(llama_sizes, qkv_bias=True),
        is_tested=True,
        variants=({}, _SOME_WINDOWS),
    ),
    "qwen3": Family(
        sizes=partial(llama_sizes, qk_norm=True),
        is_tested=True,
        variants=({}, _SOME_WINDOWS),
    ),
    "gemma2": Family(
        sizes=partial(llama_sizes, norms=4, tied=True, eager_attention=True),
        is_tested=True,
        overflows_float16=True,
    ),
    "gemma3": Family(overflows_float16=True),  # the nested configuration of text and images
    "gemma3_text": Family(
        sizes=partial(llama_sizes, norms=4, qk_norm=True, tied=True),
        is_tested=True,
        overflows_float16=True,
    ),
    "opt": Family(
        decoder="model.decoder",
        final=("final_layer_norm", "project_out"),
        input=("project_in",),
        positions=("embed_positions",),
        sizes=_opt_sizes,
        is_tested=True,
        variants=({}, {"enable_bias": False}),
        heads_fill_hidden=True,
    ),
    "bloom": Family(
        decoder="transformer",
        layers="h",
        embedding="word_embeddings",
        final=("ln_f",),
        input=("word_embeddings_layernorm",),
        sizes=_bloom_sizes,
        is_tested=True,
        variants=({}, {"apply_residual_connection_post_layernorm": True}),
        heads_fill_hidden=True,
        per_head=("alibi",),
    ),
    "gpt_neox": Family(
        decoder="gpt_neox",
        embedding="embed_in",
        final=("final_layer_norm",),
        head_in_files="embed_out",
        sizes=partial(_fused_qkv_sizes, tied=False),
        is_tested=True,
        variants=({}, {"use_parallel_residual": False}, {"rotary_pct": 1.0}),
        heads_fill_hidden=True,
    ),
    "granite": Family(is_tested=True),
    "mixtral": _WITH_EXPERTS,
    "qwen2_moe": _WITH_EXPERTS,
    "qwen3_moe": _WITH_EXPERTS,
    "olmoe": _WITH_EXPERTS,
    "glm4_moe": _WITH_EXPERTS,
    "ernie4_5_moe": _WITH_EXPERTS,
    "granitemoe": _WITH_EXPERTS,
    "granitemoeshared": _WITH_EXPERTS,
    "llama4_text": Family(
        is_tested=True,
        can_share=False,
        stacked=StackedExperts(transposed=True),
    ),
    "gpt_oss": Family(
        is_tested=True,
        can_share=False,
        stacked=StackedExperts(transposed=True, interleaved=True),
    ),
    "phi": Family(final=("final_layernorm",)),
    "glm4": Family(overflows_float16=True),
    "plamo2": Family(overflows_float16=True),
}
LIKE_LLAMA = Family()
TESTED = frozenset(model_type for model_type, row in FAMILIES.items() if row.is_tested)
SHARED = frozenset(model_type for model_type in TESTED if FAMILIES[model_type].can_share)


def family_for(model_type: str) -> Family:
    """The row of a model type; one without a row is assumed to be laid out like LLaMA."""
    return FAMILIES.get(model_type, LIKE_LLAMA)


def has_sizes(model_type: str) -> bool:
    """Whether configurations of this type are counted by a row, without transformers."""
    return family_for(model_type).sizes is not None
