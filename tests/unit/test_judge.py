"""What planning says of models: served, or refused with one line, as running does."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmpq import model_lookup
from llmpq.errors import UserError
from llmpq.model_known import is_known, num_experts, state_beside_keys, with_floats
from llmpq.model_lookup import load_model_spec, spec_from_config
from llmpq.model_spec import shard_faults

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 97,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def known(**changes: Any) -> bool:
    config = LLAMA | changes
    spec = spec_from_config(config, "m")
    return is_known(config, spec.num_layers, (spec.num_heads, spec.num_kv_heads, spec.head_dim))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": None, "sliding_window": None, "pad_token_id": 0},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"full_attention": LLAMA3}},
        {"hidden_act": "gelu", "layer_types": ["full_attention", "sliding_attention"]},
        {"num_experts": 0, "num_local_experts": 1},
    ],
)
def test_settings_that_are_known_to_work(changes: dict[str, Any]) -> None:
    assert known(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": LLAMA3 | {"factor": "8"}},
        {"rope_scaling": "linear"},
        {"rope_parameters": {"full_attention": {"rope_type": "su"}}},
        {"hidden_act": "xielu"},
        {"hidden_act": ["silu"]},
        {"num_key_value_heads": 3},
        {"hidden_size": 34},
        {"layer_types": ["full_attention"]},
        {"layer_types": ["full_attention", "chunked_attention"]},
        {"pad_token_id": 97},
        {"rms_norm_eps": "1e-5"},
        {"sliding_window": "4096"},
    ],
)
def test_settings_that_must_be_judged(changes: dict[str, Any]) -> None:
    assert not known(**changes)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"moe_num_experts": 64}, 64),
        ({"ffn_config": {"moe_num_experts": 16}}, 16),
        ({"num_experts": [8, 16]}, 16),
        ({"n_routed_experts": None, "num_experts": 0, "num_experts_per_tok": 8}, 0),
        ({"num_experts": True, "experts": 5}, 0),
    ],
)
def test_experts_count_by_value(config: dict[str, Any], count: int) -> None:
    assert num_experts(config) == count
    if count > 1:
        with pytest.raises(UserError, match=f"names {count} experts, whose sizes in .new. models"):
            spec_from_config({"model_type": "new", **config}, "m")


# As the files of these models have them: Qwen3-Next, Kimi-Linear, Nemotron-H, Jamba, Falcon-H1,
# Mamba 2, LFM2, DeepSeek-V3.2, and a model of text and images with such a text model inside.
STATES = [
    ({"model_type": "qwen3_next", "linear_num_key_heads": 16}, "it has a 'linear_num_key_heads'"),
    (
        {"model_type": "kimi_linear", "linear_attn_config": {"x": 1}},
        "it has a 'linear_attn_config'",
    ),
    ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-*"}, "'hybrid_override_pattern'"),
    ({"model_type": "jamba"}, "as its type says"),
    ({"model_type": "falcon_h1", "mamba_d_state": 256}, "it has a 'mamba_d_state'"),
    ({"model_type": "mamba2", "state_size": 128}, "it has a 'state_size'"),
    ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "has 'conv'"),
    ({"model_type": "deepseek_v32", "index_topk": 2048}, "it has a 'index_topk'"),
    (
        {"model_type": "new_vl", "text_config": {"layer_types": ["linear_attention"]}},
        "has 'linear",
    ),
]


@pytest.mark.parametrize(("config", "why"), STATES, ids=lambda each: str(each)[:40])
def test_layers_with_another_state_are_refused_without_transformers(
    config: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_lookup, "find_spec", lambda _: pytest.fail("it needs no more"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, **config}))
    with pytest.raises(UserError, match=f"keep a state that is not keys and values.*{why}"):
        load_model_spec(str(path))


@pytest.mark.parametrize("key", ["num_kv_shared_layers", "hidden_size_per_layer_input"])
def test_layers_that_need_more_than_the_states_before_are_refused(key: str) -> None:
    """As in Gemma 3n, whose text model has both."""
    for config in ({key: 15}, {"text_config": {key: 15}}):
        with pytest.raises(UserError, match=rf"layers of this 'gemma3n' model .* \('{key}'\)"):
            spec_from_config(LLAMA | {"model_type": "gemma3n"} | config, "m")
    assert spec_from_config(LLAMA | {key: 0}, "m") == spec_from_config(LLAMA, "m")


def test_layers_that_are_listed_count_and_not_settings_of_others() -> None:
    """As in Granite 4's models without Mamba layers, whose files have its settings."""
    config = {"model_type": "granitemoehybrid", "mamba_d_state": 128, "layer_types": ["attention"]}
    assert state_beside_keys(config) is None
    assert state_beside_keys({"model_type": "llama", "use_mamba_kernels": False}) is None


def test_special_numbers_are_read_as_transformers_reads_them() -> None:
    given = {"a": [0.0, {"__float__": "Infinity"}], "b": {"__float__": "-Infinity"}, "c": {"x": 1}}
    assert with_floats(given) == {"a": [0.0, float("inf")], "b": float("-inf"), "c": {"x": 1}}


def test_without_transformers_what_is_not_known_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_lookup, "find_spec", lambda _: None)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    assert load_model_spec(str(path)).model_type == "llama"
    for changes in ({"model_type": "falcon"}, {"rope_scaling": {"type": "su"}}):
        path.write_text(json.dumps(LLAMA | changes))
        with pytest.raises(UserError, match=r"pip install 'llmpq\[run\]'") as caught:
            load_model_spec(str(path))
        assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


def test_devices_share_layers_of_tested_families_only() -> None:
    spec = spec_from_config(LLAMA | {"model_type": "falcon"}, "m")
    assert shard_faults(spec, 2) == ["how devices share the layers of 'falcon' models is not known"]
    assert shard_faults(spec_from_config(LLAMA, "m"), 2) == []
