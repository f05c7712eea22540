"""The counts of `ModelSpec` against transformers' own modules, built on the meta device."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmpq.errors import UserError
from llmpq.families import CUTS, FAMILIES, SHARED
from llmpq.model_lookup import load_model_spec, read_config, spec_from_config
from llmpq.model_spec import ModelSpec, shard_faults, tensor_parallel_degrees

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 256,
}
WIDE = {**LLAMA, "head_dim": 24}  # heads that do not add up to the hidden size
OPT = {
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 120,
    "max_position_embeddings": 256,
    "word_embed_proj_dim": 64,
}
BLOOM = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 120}
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 120, "n_positions": 256}
MPT = {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 120, "max_seq_len": 256}
GEMMA = {**WIDE, "query_pre_attn_scalar": 24}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", OPT),
    "opt without biases": ("opt", {**OPT, "enable_bias": False}),
    "opt with projected embedding": (
        "opt",
        {**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "opt untied": ("opt", {**OPT, "tie_word_embeddings": False}),
    "bloom": ("bloom", BLOOM),
    "llama": ("llama", LLAMA),
    "llama tied": ("llama", {**LLAMA, "tie_word_embeddings": True}),
    "llama with biases": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama wide heads": ("llama", WIDE),
    "llama without kv heads": ("llama", NEOX),
    "mistral": ("mistral", LLAMA),
    "mistral wide heads": ("mistral", WIDE),
    "qwen2": ("qwen2", LLAMA),
    "qwen2 tied": ("qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", WIDE),
    "qwen3 with biases": ("qwen3", {**WIDE, "attention_bias": True}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox without attention biases": ("gpt_neox", {**NEOX, "attention_bias": False}),
    "gemma2": ("gemma2", GEMMA),
    "gemma2 untied": ("gemma2", {**GEMMA, "tie_word_embeddings": False}),
    "gemma3_text": ("gemma3_text", GEMMA),
    "gpt2": ("gpt2", GPT2),
    "gpt2 with a width": ("gpt2", {**GPT2, "n_inner": 96, "tie_word_embeddings": False}),
    "mpt": ("mpt", MPT),
    "phi": ("phi", LLAMA),
    "phi with norms": ("phi", {**NEOX, "qk_layernorm": True}),
    "smollm3": ("smollm3", {**WIDE, "pad_token_id": 0}),
    "smollm3 with biases": (
        "smollm3",
        {**LLAMA, "attention_bias": True, "mlp_bias": True, "pad_token_id": 0},
    ),
}
SHAREABLE = [case for case, (model_type, _) in CASES.items() if model_type in SHARED]


def build(model_type: str, sizes: dict[str, Any]) -> Any:
    """The model of transformers, without storage."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def decoder_layers(model: Any) -> Any:
    """The list of decoder layers, wherever the family keeps it."""
    torch = pytest.importorskip("torch")
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return next(modules for modules in lists if len(modules) == model.config.num_hidden_layers)


def num_params(module: Any) -> int:
    """Parameters of a module, shared ones once."""
    return sum(p.numel() for p in module.parameters())


def after_layers(model: Any) -> list[Any]:
    """What stands between the last layer and the head."""
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    names = {"norm", "ln_f", "norm_f", "final_layer_norm", "final_layernorm", "project_out"}
    return [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in names and id(module) not in inside
    ]


def test_every_family_is_compared() -> None:
    sized = {name for name, row in FAMILIES.items() if row.sizes}
    assert sized == {model_type for model_type, _ in CASES.values()}


@pytest.mark.parametrize("case", CASES)
def test_layer(case: str) -> None:
    torch = pytest.importorskip("torch")
    spec, model = both(case)
    layers = decoder_layers(model)
    assert len(layers) == spec.num_layers
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    kinds = torch.nn.Linear, pytorch_utils.Conv1D  # the latter's weights are [in, out]
    linears = [m for m in layers[0].named_modules() if isinstance(m[1], kinds)]
    ours = sorted((op.name, op.out_features, op.in_features) for op in spec.linears)
    theirs = sorted(
        (n.rpartition(".")[2], *(m.weight if isinstance(m, torch.nn.Linear) else m.weight.T).shape)
        for n, m in linears
    )
    assert ours == theirs
    weights = sum(m.weight.numel() for _, m in linears)
    assert spec.layer_other_params == num_params(layers[0]) - weights
    assert spec.layer_params == num_params(layers[0])


@pytest.mark.parametrize("case", CASES)
def test_rest(case: str) -> None:
    spec, model = both(case)
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    assert spec.tied == tied
    assert spec.head_params == num_params(head)
    rest = num_params(model) - sum(num_params(layer) for layer in decoder_layers(model))
    ours = spec.embedding_params + spec.final_params + (0 if tied else spec.head_params)
    assert ours == rest
    assert spec.final_params == sum(num_params(module) for module in after_layers(model))


@pytest.mark.parametrize("case", CASES)
def test_sizes(case: str) -> None:
    spec, model = both(case)
    config = model.config
    assert spec.hidden_size == config.hidden_size
    assert spec.num_heads == config.num_attention_heads
    assert spec.vocab_size == config.vocab_size
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert spec.head_dim == dim
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    assert spec.kv_values_per_token == 2 * kv_heads * dim


def both(case: str) -> tuple[ModelSpec, Any]:
    """Our spec and transformers' model of one case."""
    model_type, sizes = CASES[case]
    model = build(model_type, sizes)
    return spec_from_config({"model_type": model_type, **sizes}, name=case), model


@pytest.mark.parametrize("case", ["llama", "gemma2", "bloom", "opt"])
def test_full_configuration_counts_the_same(case: str) -> None:
    """A configuration that transformers writes (every default spelled out) gives the same spec."""
    spec, model = both(case)
    full = spec_from_config(model.config.to_dict(), name=case)
    assert full.model_copy(update={"max_positions": spec.max_positions}) == spec


def test_models_of_text_and_images_are_refused() -> None:
    inner = {"model_type": "gemma3_text", **GEMMA}
    assert spec_from_config(inner | {"text_config": {}}, name="m") == spec_from_config(inner, "m")
    with pytest.raises(UserError, match="c.json: 'llava' is a multimodal model"):
        spec_from_config({"model_type": "llava", "text_config": inner}, "m", "c.json")


def test_a_language_model_is_planned_alone(tmp_path: Path) -> None:
    """As in Gemma 3's files, which leave out what is the default of their class."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}
    text |= {"num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}}
    (tmp_path / "config.json").write_text(json.dumps(whole | {"eos_token_id": [1, 106]}))
    spec = load_model_spec(str(tmp_path))
    assert (spec.model_type, spec.num_layers, spec.vocab_size) == ("gemma3_text", 34, 262208)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.tied) == (8, 4, 256, True)
    assert spec.has_other_parts and not load_model_spec("tiny-tales").has_other_parts
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec
    assert read_config(tmp_path / "config.json")["eos_token_id"] == [1, 106]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (5, "'text_config' must be an object"),
        ({"model_type": "new"}, "'gemma3' is a multimodal model"),
        ({"model_type": ["gemma3_text"]}, "'gemma3' is a multimodal model"),
        ({}, "'hidden_size' is missing"),
    ],
)
def test_language_models_that_are_not_known_are_refused(
    text: Any, words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    with pytest.raises(UserError, match=words):
        load_model_spec(str(tmp_path))


@pytest.mark.parametrize(
    ("whole", "text", "tied"),
    [(None, None, False), (True, None, True), (None, True, True), (False, True, True)],
)
def test_qwens_files_say_in_either_place_that_the_head_is_tied(
    whole: bool | None, text: bool | None, tied: bool, tmp_path: Path
) -> None:
    config = {"model_type": "qwen2_vl", "tie_word_embeddings": whole, "vision_config": {}}
    inner = {"model_type": "qwen2_vl_text", "tie_word_embeddings": text, **LLAMA}
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": inner}))
    assert load_model_spec(str(tmp_path)).tied == tied


def test_unknown_family_is_a_guess() -> None:
    spec = spec_from_config({"model_type": "new-model", **LLAMA}, name="m")
    assert spec.guessed and spec.layer_params == llama_spec().layer_params


def llama_spec() -> ModelSpec:
    return spec_from_config({"model_type": "llama", **LLAMA}, name="m")


def test_model_key_tells_layer_shapes_apart() -> None:
    wide = spec_from_config({"model_type": "llama", **WIDE}, name="m")
    deep = spec_from_config({"model_type": "llama", **LLAMA, "num_hidden_layers": 9}, name="m")
    assert llama_spec().model_key != wide.model_key
    assert llama_spec().model_key == deep.model_key


# ---- several devices that share every layer


def spec_of(case: str) -> ModelSpec:
    """Our spec of one case."""
    model_type, sizes = CASES[case]
    return spec_from_config({"model_type": model_type, **sizes}, name=case)


def weights_of(spec: ModelSpec, name: str) -> int:
    """The size of one matrix."""
    return next(op.out_features * op.in_features for op in spec.linears if op.name == name)


def test_it_is_known_how_to_cut_every_matrix_of_every_family() -> None:
    assert {op.name for case in SHAREABLE for op in spec_of(case).linears} <= set(CUTS)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("case", SHAREABLE)
def test_shards_add_up_to_the_model(case: str, degree: int) -> None:
    spec = spec_of(case)
    shard = spec.shard(degree)
    copies = max(1, degree // spec.num_kv_heads)  # of a key-value head
    for op in spec.linears:
        times = copies if op.name in ("k_proj", "v_proj") else 1
        assert degree * weights_of(shard, op.name) == times * weights_of(spec, op.name), op.name
    assert degree * shard.num_heads == spec.num_heads
    assert degree * shard.kv_values_per_token == copies * spec.kv_values_per_token
    assert degree * shard.ffn_size == spec.ffn_size
    assert degree * shard.vocab_size == spec.vocab_size
    assert degree * shard.head_params == spec.head_params
    token_params = min(spec.embedding_params, spec.head_params)  # positions and norms are whole
    others = spec.embedding_params - token_params
    assert degree * (shard.embedding_params - others) == token_params
    whole = ("name", "model_type", "num_layers", "hidden_size", "head_dim", "layer_other_params")
    assert all(getattr(shard, key) == getattr(spec, key) for key in (*whole, "final_params"))


@pytest.mark.parametrize("case", SHAREABLE)
def test_the_matrices_of_a_shard_fit_each_other(case: str) -> None:
    """What comes in and what goes out is as wide as the model; what lies between is cut."""
    shard = spec_of(case).shard(4)
    attention = shard.num_heads * shard.head_dim
    inner = {op.in_features for op in shard.linears} | {op.out_features for op in shard.linears}
    kv = shard.num_kv_heads * shard.head_dim
    assert inner <= {shard.hidden_size, attention, kv, 3 * attention, shard.ffn_size}
    ends = {op.name: op for op in shard.linears if op.out_features == shard.hidden_size}
    assert {op.in_features for op in ends.values()} == {attention, shard.ffn_size}
    assert all(op.in_features == shard.hidden_size for op in shard.linears if op.name not in ends)


def test_a_shard_by_hand() -> None:
    """Four devices, heads of 16: a query head each, and each key-value head on two devices."""
    shard = llama_spec().shard(4)
    assert [(op.name, op.out_features, op.in_features) for op in shard.linears] == [
        ("q_proj", 16, 64),
        ("k_proj", 16, 64),
        ("v_proj", 16, 64),
        ("o_proj", 64, 16),
        ("gate_proj", 24, 64),
        ("up_proj", 24, 64),
        ("down_proj", 64, 24),
    ]
    assert (shard.num_heads, shard.num_kv_heads, shard.vocab_size) == (1, 1, 30)
    assert llama_spec().shard(1) == llama_spec()
    assert shard.model_key == "llama-h64-f24-a1-kv1-d16-v30"
    odd = spec_from_config({"model_type": "llama", **LLAMA, "vocab_size": 101}, "m").shard(2)
    assert (odd.vocab_size, odd.head_params) == (51, 101 * 32)


def test_degrees(repo_root: Path) -> None:
    opt = load_model_spec(str(repo_root / "configs/models/opt-30b.json"))
    assert tensor_parallel_degrees(opt, 64) == (1, 2, 4, 8), "56 heads"
    assert tensor_parallel_degrees(opt, 7) == (1, 2, 4)
    assert tensor_parallel_degrees(opt, 1) == (1,)
    llama = load_model_spec(str(repo_root / "configs/models/llama-3.3-70b.json"))
    assert tensor_parallel_degrees(llama, 32) == (1, 2, 4, 8, 16, 32), "8 key-value heads"


@pytest.mark.parametrize(
    ("changes", "degree", "fault"),
    [
        ({}, 8, "attention heads 4 cannot be cut into 8 equal parts"),
        ({"intermediate_size": 98}, 4, "feed-forward width 98 cannot be cut into 4"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, 2, "3 key-value heads can be"),
    ],
)
def test_models_that_cannot_be_cut(changes: dict[str, Any], degree: int, fault: str) -> None:
    spec = spec_from_config({"model_type": "llama", **LLAMA, **changes}, name="m")
    with pytest.raises(UserError, match=f"^m: .*{fault}"):
        spec.shard(degree)
    assert degree not in tensor_parallel_degrees(spec, degree)


def test_a_matrix_that_no_rule_cuts_is_a_fault() -> None:
    strange = llama_spec().linears[0].model_copy(update={"name": "mixer"})
    spec = llama_spec().model_copy(update={"linears": (strange,)})
    assert shard_faults(spec, 2) == ["how to cut the matrix 'mixer' is not known"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ["model_type"]),
        ({"model_type": 3}, ["model_type"]),
        ({"model_type": "llama"}, ["hidden_size", "num_attention_heads", "vocab_size"]),
        ({"model_type": "opt", **OPT, "ffn_dim": -1, "vocab_size": "9"}, ["ffn_dim", "vocab_size"]),
        ({"model_type": "llama", **LLAMA, "num_hidden_layers": True}, ["num_hidden_layers"]),
        ({"model_type": "mixtral", **LLAMA, "num_local_experts": 8}, ["8 experts", "mixtral"]),
        ({"model_type": "gpt2", **GPT2, "add_cross_attention": True}, ["attend to an encoder"]),
        ({"text_config": None, "model_type": "llama"}, ["text_config"]),
        ({"text_config": 5, "model_type": "llava"}, ["text_config"]),
    ],
)
def test_bad_configurations(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        spec_from_config(config, name="m", source="c.json")
    lines = str(caught.value).splitlines()
    assert all(line.startswith("c.json: ") for line in lines)
    assert all(word in str(caught.value) for word in words)
    assert len(set(lines)) == len(lines), "each fault once"
