"""The differences between families of decoder models: a row of `FAMILIES` for each, without torch.

A row gives the paths of the parts of transformers' module, the numbers of parameters that follow
from a configuration (`llmpq.family_sizes`), the settings that change the memory of a layer, and
peculiarities of the family. All other modules of llmpq ask the row and name no family. A model type
without a row is assumed to be laid out like LLaMA; its sizes are counted on transformers' own
modules (`llmpq.evaluation.judge`).

CONTRIBUTING.md says how to add one. Tests compare the counts with transformers' own modules,
and tokens of pipelines with those of the whole model. assets/activations.json holds the activations
of the families with counts.

Not covered: options of single models, which their settings give.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from llmpq.config_keys import ConfigKeys
from llmpq.family_sizes import (
    ModelSizes,
    alternating_windows,
    bloom_sizes,
    fused_qkv_sizes,
    gpt2_sizes,
    late_windows,
    llama_sizes,
    mpt_sizes,
    opt_sizes,
    phi_sizes,
    sixth_full_windows,
    sliding_windows,
    windows_without_rope,
)

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
        sizes=partial(llama_sizes, windows=sliding_windows),
        is_tested=True,
        variants=({"sliding_window": None}, {"sliding_window": 4096}),
    ),
    "qwen2": Family(
        sizes=partial(llama_sizes, qkv_bias=True, windows=late_windows),
        is_tested=True,
        variants=({}, _SOME_WINDOWS),
    ),
    "qwen3": Family(
        sizes=partial(llama_sizes, qk_norm=True, windows=late_windows),
        is_tested=True,
        variants=({}, _SOME_WINDOWS),
    ),
    "gemma2": Family(
        sizes=partial(
            llama_sizes, norms=4, tied=True, eager_attention=True, windows=alternating_windows
        ),
        is_tested=True,
        overflows_float16=True,
    ),
    "gemma3": Family(overflows_float16=True),  # the nested configuration of text and images
    "gemma3_text": Family(
        sizes=partial(llama_sizes, norms=4, qk_norm=True, tied=True, windows=sixth_full_windows),
        is_tested=True,
        overflows_float16=True,
    ),
    "opt": Family(
        decoder="model.decoder",
        final=("final_layer_norm", "project_out"),
        input=("project_in",),
        positions=("embed_positions",),
        sizes=opt_sizes,
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
        sizes=bloom_sizes,
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
        sizes=partial(fused_qkv_sizes, tied=False),
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
    "deepseek_v2": _WITH_EXPERTS,
    "deepseek_v3": _WITH_EXPERTS,
    "gpt2": Family(
        decoder="transformer",
        layers="h",
        embedding="wte",
        positions=("wpe",),
        final=("ln_f",),
        sizes=gpt2_sizes,
        is_tested=True,
        can_share=False,  # the fused matrix has all queries first
        heads_fill_hidden=True,
    ),
    "falcon": Family(
        decoder="transformer",
        layers="h",
        embedding="word_embeddings",
        final=("ln_f",),
        is_tested=True,
        can_share=False,  # the fused matrix may have one key-value head
    ),
    "mpt": Family(
        decoder="transformer",
        layers="blocks",
        embedding="wte",
        final=("norm_f",),
        sizes=mpt_sizes,
        is_tested=True,
        can_share=False,  # the fused matrix has all queries first
        heads_fill_hidden=True,
    ),
    "phi": Family(
        final=("final_layernorm",),
        sizes=phi_sizes,
        is_tested=True,
        variants=({}, {"qk_layernorm": True}, {"partial_rotary_factor": 1.0}),
        heads_fill_hidden=True,
    ),
    "smollm3": Family(
        sizes=partial(llama_sizes, tied=True, windows=windows_without_rope),
        is_tested=True,
        variants=({}, {"use_sliding_window": True, "sliding_window": 4096}),
    ),
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
