"""The language model inside a model of text and images, as a configuration of its own.

With text alone such a model computes what a text model of the same settings does: no layer of its
language model looks at anything but tokens, and the three positions of Qwen-VL's rotary embedding
(mrope) are equal. So its configuration is read as that text model's, and its checkpoint's names
get another prefix. Images are not served, which planning and running say.

Listed are those for which tests compare tokens with transformers' own class of the whole model.
Not covered: prompts with images, models whose text sees later tokens (PaliGemma).
"""

from collections.abc import Mapping
from typing import Any

# Model type -> type of its language model -> type of the equal text model; the first is the default
LANGUAGE_PARTS: Mapping[str, Mapping[str, str]] = {
    "gemma3": {"gemma3_text": "gemma3_text"},
    "llama4": {"llama4_text": "llama4_text"},
    "mistral3": {"mistral": "mistral", "ministral3": "ministral3"},
    "qwen2_vl": {"qwen2_vl_text": "qwen2"},
    "qwen2_5_vl": {"qwen2_5_vl_text": "qwen2"},
    "qwen3_vl": {"qwen3_vl_text": "qwen3"},
}
# Sizes that files of a text model may leave out: the defaults of its class in transformers 5.23.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
    },
}
OF_THE_WHOLE = ("eos_token_id", "bos_token_id", "pad_token_id", "dtype", "torch_dtype")
TIED = "tie_word_embeddings"
# The names of tensors of the other parts, and the prefixes that the language model's may have.
OTHER_PARTS = r"^(model\.)?(visual|vision_tower|vision_model|multi_modal_projector)\."
PREFIXES = ("model.language_model.", "language_model.model.")
HEAD_PREFIX = "language_model."


def has_other_parts(config: Any) -> bool:
    """Whether this is a model of text and images whose language model is served."""
    return isinstance(config, Mapping) and _type_of_text(config) is not None


def language_part(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the text model that is served; those of any other model unchanged."""
    kind = _type_of_text(config)
    if kind is None:
        return config
    inner = _inner(config)
    own = {**DEFAULTS.get(kind, {}), **inner, "model_type": kind}
    own |= {key: config[key] for key in OF_THE_WHOLE if key in config and own.get(key) is None}
    tied = [held[TIED] for held in (config, inner) if held.get(TIED) is not None]
    if tied:  # the whole model's setting counts, but Qwen-VL's files have it in either place
        own[TIED] = any(tied) if kind.startswith("qwen") else tied[0]
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(own.get(key), dict):
            own[key] = _without_mrope(own[key])
    return own


def names_inside(name: str) -> list[str]:
    """The names that a text model's tensor may have in the checkpoint of the whole model."""
    first, _, rest = name.partition(".")
    if first == "model":
        return [prefix + rest for prefix in PREFIXES]
    return [HEAD_PREFIX + name]


def _type_of_text(config: Mapping[str, Any]) -> str | None:
    """The type of the equal text model, or None."""
    whole = config.get("model_type")
    types = LANGUAGE_PARTS.get(whole) if isinstance(whole, str) else None
    if types is None or not isinstance(config.get("text_config", {}), dict):
        return None
    inner = _inner(config).get("model_type")
    if inner in (None, whole):  # older files have all settings at the top
        return next(iter(types.values()))
    return types.get(inner) if isinstance(inner, str) else None


def _inner(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the language model, which older files have at the top."""
    if "text_config" in config:
        inner: Mapping[str, Any] = config["text_config"]
        return inner
    return {key: value for key, value in config.items() if key != "vision_config"}


def _without_mrope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions without their division into time, height and width."""
    plain = {key: value for key, value in rope.items() if not key.startswith("mrope")}
    return {key: "default" if value == "mrope" else value for key, value in plain.items()}
