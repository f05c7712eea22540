"""Checks the settings in a `config.json`, without torch and transformers.

`is_known` is true only where a model of a family in the table has settings that are known to work;
other models are checked on transformers' own modules. Settings count by their values: a model with
"num_experts": 0 is no mixture, one with "moe_num_experts": 64 is.

Not covered: weights, and settings that no family in the table reads.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

# The settings that each kind of rotary positions needs.
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
ACTIVATIONS = {"silu", "swish", "gelu", "relu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"}
ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")
LAYER_TYPES = {"full_attention", "sliding_attention"}
NUMBERS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "rotary_pct")
NUM_EXPERTS = r"(moe_)?(num|n)_(local_|routed_)?experts"
# Types of models, kinds of layers and settings that only layers with another state than keys and
# values have: state spaces, linear attention, recurrences, convolutions over tokens, and keys of
# an index (sparse attention). Read from the configurations of transformers 5.23 and of files.
STATE_TYPES = (
    r".*(rwkv|xlstm|mamba|jamba|zamba|bamba).*|falcon_h1|nemotron_h|recurrent_gemma|olmo_hybrid"
    r"|qwen3_next|qwen3_5.*|kimi_linear|bailing_hybrid|minimax|deepseek_v32|deepseek_v4|glm_moe_dsa"
)
STATE_LAYERS = r"linear|mamba|conv|recurrent|hybrid|indexed|compressed"
STATE_KEYS = (
    r"((n|use)_)?mamba_.*|ssm_.*|linear_(attn|num|conv|key|value|head)_.*|conv_(kernel.*|L_cache)"
    r"|state_size|lru_width|time_step_rank|attn_layer_(period|indices)|hybrid_override_pattern"
    r"|index_(topk|n_heads|head_dim)"
)
# Settings of layers that need more than the states of the layer before, which stages send.
SHARED_KEYS = {
    "num_kv_shared_layers": "use keys and values of earlier layers",
    "hidden_size_per_layer_input": "have inputs of their own beside the states",
}
EPSILONS = ("_eps", "_epsilon")
SPECIAL = ("Infinity", "-Infinity", "NaN")


def with_floats(value: Any) -> Any:
    """Replaces {"__float__": "Infinity"}, as transformers writes infinity and NaN, by floats."""
    if isinstance(value, dict):
        if len(value) == 1 and value.get("__float__") in SPECIAL:
            return float(value["__float__"])
        return {key: with_floats(each) for key, each in value.items()}
    return [with_floats(each) for each in value] if isinstance(value, list) else value


def odd_number(value: Any, key: str = "") -> tuple[str, Any] | None:
    """Key and value of a setting that no model can have; None where there is none.

    These are NaN, an epsilon that is infinite or below zero, and a base of rotary positions that is
    no positive number. In other settings transformers' classes may use infinity for no limit.
    """
    if isinstance(value, dict):
        found = (odd_number(each, f"{key}.{name}" if key else name) for name, each in value.items())
        return next((one for one in found if one is not None), None)
    name = key.rpartition(".")[2]
    if name == "rope_theta":
        return None if value is None or _is_number(value) else (key, value)
    if not isinstance(value, int | float):
        return None
    is_odd = not 0 <= value < 1e12 if name.endswith(EPSILONS) else value != value  # NaN
    return (key, value) if is_odd else None


def num_experts(config: Any) -> int:
    """The largest number of experts in any setting; 0 or 1 means that there is no mixture."""
    if not isinstance(config, dict):
        return 0
    found = [num_experts(value) for value in config.values()]
    for key, value in config.items():
        if re.fullmatch(NUM_EXPERTS, str(key)):
            values = value if isinstance(value, list) else [value]
            found += [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
    return max(found, default=0)


def state_beside_keys(config: Mapping[str, Any]) -> str | None:
    """The setting that shows layers with another state than keys and values; None without one.

    Where a model lists the kinds of its layers, these count, and not settings of kinds it lacks.
    """
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and kinds:
        found = next((kind for kind in kinds if re.search(STATE_LAYERS, str(kind))), None)
        why = found and f"'layer_types' has '{found}'"
    else:
        keys = (key for key, value in config.items() if value not in (None, False))
        found = next((key for key in keys if re.fullmatch(STATE_KEYS, key)), None)
        why = found and f"it has a '{found}'"
    is_told_by_type = re.fullmatch(STATE_TYPES, str(config.get("model_type")))
    return why or ("as its type says" if is_told_by_type else None)


def needs_other_layers(config: Mapping[str, Any]) -> str | None:
    """What layers need beside the states of the layer before, with the setting that says so."""
    found = next((key for key in SHARED_KEYS if config.get(key)), None)
    return found and f"{SHARED_KEYS[found]} ('{found}')"


def is_known(config: Mapping[str, Any], num_layers: int, heads: tuple[int, int, int]) -> bool:
    """Whether a model of a family in the table has settings that are known to work.

    `heads` holds query heads, key-value heads and the size of a head.
    """
    num_heads, num_kv_heads, size = heads
    acts = [config[key] for key in ACTIVATION_KEYS if config.get(key) is not None]
    hidden, vocab = config.get("hidden_size", 0), config.get("vocab_size", 0)
    pad = config.get("pad_token_id")
    types = config.get("layer_types")
    return (
        num_heads % num_kv_heads == 0
        and size % 2 == 0
        and hidden % num_heads == 0
        and all(_is_number(config[key]) for key in NUMBERS if config.get(key) is not None)
        and all(isinstance(act, str) and act in ACTIVATIONS for act in acts)
        and all(_works(rope) for rope in _ropes(config))
        and (pad is None or (isinstance(pad, int) and -vocab <= pad < vocab))
        and (types is None or _fits(types, num_layers))
        and _is_size(config.get("sliding_window"))
    )


def _ropes(config: Mapping[str, Any]) -> Iterator[Any]:
    """The settings of rotary positions, which may be given for each kind of layer."""
    for key in ("rope_scaling", "rope_parameters"):
        given = config.get(key)
        if isinstance(given, dict) and given and all(isinstance(v, dict) for v in given.values()):
            yield from given.values()
        elif given is not None:
            yield given


def _works(rope: Any) -> bool:
    if not isinstance(rope, dict):
        return False
    kind = rope.get("rope_type", rope.get("type", "default"))
    needed = ROPE_KEYS.get(kind) if isinstance(kind, str) else None
    given = ("rope_theta",) if rope.get("rope_theta") is not None else ()
    return needed is not None and all(_is_number(rope.get(key)) for key in (*needed, *given))


def _fits(types: Any, num_layers: int) -> bool:
    return isinstance(types, list) and len(types) == num_layers and set(types) <= LAYER_TYPES


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12


def _is_size(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)
