"""Models with experts and with layers of several kinds, counted on transformers' own modules."""

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from llmpq.evaluation.verify import small_copy  # noqa: E402
from llmpq.model_spec import ModelSpec  # noqa: E402
from llmpq.models.count_model import count_model, layer_kinds  # noqa: E402
from llmpq.models.stage_model import load_config  # noqa: E402

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 120,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
# Model type -> (its own settings, experts, the kinds of its four layers)
FAMILIES: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "mixtral": ({"num_local_experts": 4}, 4, ["experts"] * 4),
    "qwen3_moe": (
        {"num_experts": 8, "mlp_only_layers": [2]},
        8,
        ["experts", "experts", "dense", "experts"],
    ),
    "glm4_moe": (
        {"n_routed_experts": 8, "first_k_dense_replace": 2},
        8,
        ["dense", "dense", "experts", "experts"],
    ),
    "llama4_text": (
        {"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 128},
        4,
        ["dense", "experts", "dense", "experts"],
    ),
}


def folder_of(model_type: str, folder: Path) -> Path:
    config = AutoConfig.for_model(model_type, **SIZES, **FAMILIES[model_type][0])
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder / "config.json"


def total_params(spec: ModelSpec) -> int:
    layers = sum(spec.kind_specs[kind].layer_params for kind in spec.kind_of_layers)
    head = 0 if spec.tied else spec.head_params
    return layers + spec.embedding_params + spec.final_params + head


@pytest.mark.parametrize("model_type", FAMILIES)
def test_layers_of_every_kind_are_counted(model_type: str, tmp_path: Path) -> None:
    path = folder_of(model_type, tmp_path)
    _, count, names = FAMILIES[model_type]
    spec = count_model(path)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(load_config(path))
    buffers = sum(b.numel() for n, b in whole.named_buffers() if n.endswith("correction_bias"))
    # Buffers have 32 bits, as two values.
    assert total_params(spec) == sum(p.numel() for p in whole.parameters()) + 2 * buffers
    found = ["dense" if one.experts is None else "experts" for one in spec.kind_specs]
    assert [found[kind] for kind in spec.kind_of_layers] == names
    assert len({one.model_key for one in spec.kind_specs}) == len(spec.kind_specs)
    for one in spec.kind_specs:
        assert one.kv_values is None and (one.num_kv_heads, one.head_dim) == (2, 16)
        if one.experts is not None:
            assert (one.experts.count, one.experts.per_token) == (count, 2)
            assert {op.name for op in one.experts.linears} == {"gate_proj", "up_proj", "down_proj"}
    assert ModelSpec.model_validate_json(spec.model_dump_json(exclude_defaults=True)) == spec


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {"num_hidden_layers": 30, "mlp_only_layers": [20]}),
        ("glm4_moe", {"n_group": 4, "topk_group": 2}),
        ("llama4_text", {"interleave_moe_layer_step": 2}),
        ("ernie4_5_moe", {"moe_layer_start_index": 3}),
        ("deepseek_v3", {}),
    ],
)
def test_a_small_copy_has_few_experts_and_all_kinds(
    model_type: str, changes: dict[str, Any]
) -> None:
    config = AutoConfig.for_model(model_type, **changes)
    small = small_copy(config)
    assert len(layer_kinds(small)[0]) == len(layer_kinds(config)[0])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small)
    assert model.num_parameters() < 30e6
    stacks = [p for n, p in model.named_parameters() if n.endswith("experts.down_proj")]
    assert stacks and all(len(stack) == 4 for stack in stacks)
    names = ("num_experts_per_tok", "moe_k")
    (per_token,) = {getattr(small, n) for n in names if getattr(small, n, None) is not None}
    assert 1 <= per_token <= 2
