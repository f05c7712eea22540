"""All of a checkpoint is served, or what is not is named: one message, before weights are read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.inventory import check_checkpoint
from llmpq.errors import UserError
from llmpq.models.stage_model import load_config

HIDDEN, FFN, VOCAB = 16, 32, 50
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
}
UP = "model.layers.1.mlp.up_proj"


def tensors() -> dict[str, torch.Tensor]:
    square, wide = (HIDDEN, HIDDEN), (FFN, HIDDEN)
    shapes = {f"self_attn.{name}_proj": square for name in "qkvo"}
    shapes |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": wide[::-1]}
    shapes |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (HIDDEN,))
    named = {f"model.layers.{i}.{name}.weight": s for i in range(2) for name, s in shapes.items()}
    named |= {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    named["lm_head.weight"] = (VOCAB, HIDDEN)
    return {name: torch.rand(shape) for name, shape in named.items()}


class Folder:
    """A model directory whose parts are changed before it is checked."""

    def __init__(self, path: Path) -> None:
        self.path, self.config, self.tensors = path, dict(CONFIG), tensors()

    def write(self, **files) -> None:
        """The configuration, and other files by name; `weights`: what to call the weights."""
        (self.path / "config.json").write_text(json.dumps(self.config))
        name = files.pop("weights", "model.safetensors")
        (self.path / name).parent.mkdir(exist_ok=True)
        save_file(self.tensors, self.path / name, {"format": "pt"})

    def check(self) -> list[str]:
        self.write()
        return check_checkpoint(load_config(self.path), Checkpoint(self.path))

    def refused(self) -> str:
        """The message, which is one line of at most 300 characters, paths left out."""
        with pytest.raises(UserError) as caught:
            self.check()
        return short(caught, self.path)


def short(caught, path: Path) -> str:
    message = str(caught.value).replace(f"{path}", "")
    assert "\n" not in message and len(message) <= 250, message
    return message


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


def test_nothing_is_said_of_a_plain_checkpoint(folder):
    assert folder.check() == []


@pytest.mark.parametrize(
    ("ending", "dtype", "what"),
    [
        ("weight_scale_inv", torch.float32, "scales by block"),
        ("weight_scale", torch.float32, "scales that llmpq cannot apply"),
        ("weight_scale_2", torch.float32, "NVFP4"),
        ("weight_packed", torch.int32, "compressed-tensors"),
        ("qweight", torch.int32, "GPTQ or AWQ"),
        ("weight.absmax", torch.float32, "bitsandbytes 4-bit"),
        ("SCB", torch.float32, "bitsandbytes 8-bit"),
        ("W_q", torch.uint8, "HQQ"),
        ("lora_A.weight", torch.float32, "LoRA"),
        ("weight._data", torch.int8, "Quanto"),
        ("codebooks", torch.float32, "AQLM"),
    ],
)
def test_weights_that_are_quantized_without_a_word_are_named_by_format(folder, ending, dtype, what):
    folder.tensors[f"{UP}.{ending}"] = torch.ones(4).to(dtype)
    message = folder.refused()
    assert f"{UP}.{ending}" in message and what in message and "supported are" in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.int8])
def test_numbers_that_are_no_weights(folder, dtype):
    folder.tensors[f"{UP}.weight"] = torch.ones(FFN, HIDDEN).to(dtype)
    assert f"'{UP}.weight' is " in folder.refused()


def test_a_float8_weight_without_scales_says_so(folder):
    folder.tensors[f"{UP}.weight"] = torch.ones(FFN, HIDDEN).to(torch.float8_e4m3fn)
    assert "F8_E4M3, float8 without scales" in folder.refused()


def test_float8_weights_with_scales_say_so(folder):
    folder.tensors[f"{UP}.weight"] = torch.ones(FFN, HIDDEN).to(torch.float8_e4m3fn)
    folder.tensors[f"{UP}.weight_scale"] = torch.ones(())
    message = folder.refused()
    assert f"'{UP}.weight_scale' belongs to weights" in message and "(float8)" in message


def test_a_weight_beside_its_codes(folder):
    folder.config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    codes = {"qweight": (HIDDEN // 8, FFN), "qzeros": (1, FFN // 8), "scales": (1, FFN)}
    folder.tensors |= {f"{UP}.{part}": torch.zeros(s).int() for part, s in codes.items()}
    assert f"'{UP}.weight' is stored beside its codes" in folder.refused()


@pytest.mark.parametrize(
    ("prefix", "what"),
    [
        ("module.", "data-parallel"),
        ("_orig_mod.", "compiled"),
        ("base_model.model.", "merge"),
        ("model.language_model.", "text model alone"),
        ("_fsdp_wrapped_module.", "gather"),
        ("inner.", "which this type of model does not have"),
    ],
)
def test_names_with_a_prefix(folder, prefix, what):
    folder.tensors = {f"{prefix}{name}": t for name, t in folder.tensors.items()}
    message = folder.refused()
    assert f"start with '{prefix}'" in message and what in message


def test_a_missing_tensor_is_no_prefix(folder):
    del folder.tensors[f"{UP}.weight"], folder.tensors["model.norm.weight"]
    assert f"no tensor '{UP}.weight' (and 1 more are missing)" in folder.refused()


def test_a_tensor_under_two_names(folder):
    folder.tensors[f"{UP.removeprefix('model.')}.weight"] = torch.rand(FFN, HIDDEN)
    assert "holds both" in folder.refused()


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_padded_vocabulary(folder, name):
    folder.tensors[name] = torch.rand(64, HIDDEN)
    message = folder.refused()
    assert f"'{name}' has 64 rows" in message and "vocab_size" in message and "is 50" in message


def test_a_tensor_of_another_shape(folder):
    folder.tensors[f"{UP}.weight"] = torch.rand(HIDDEN, FFN)
    assert "[16, 32], but config.json implies [32, 16]" in folder.refused()


@pytest.mark.parametrize("name", [f"{UP}.bias", "model.layers.0.self_attn.q_norm.weight", "extra"])
def test_what_is_no_part_of_the_model_is_named(folder, name):
    folder.tensors[name] = torch.ones(FFN)
    assert f"'{name}' is not part of this model" in folder.refused()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.1.self_attn.k_scale",
        "v_head.summary.weight",
    ],
)
def test_what_is_known_to_be_redundant(folder, name):
    folder.tensors[name] = torch.ones(8)
    assert folder.check() == []


def test_biases_of_zeros_change_nothing(folder):
    folder.tensors[f"{UP}.bias"] = torch.zeros(FFN)
    assert folder.check() == []


def test_layers_beyond_the_last_one(folder):
    name = f"model.layers.2.{UP.removeprefix('model.layers.1.')}.weight"
    folder.tensors[name] = torch.rand(FFN, HIDDEN)
    message = folder.refused()
    assert "tensors of layer 2" in message and "num_hidden_layers" in message
    folder.config["num_nextn_predict_layers"] = 1
    [note] = folder.check()
    assert "multi-token prediction (MTP)" in note


def test_a_head_of_its_own_is_said(folder):
    folder.config["tie_word_embeddings"] = True
    [note] = folder.check()
    assert "'lm_head.weight' differs from the embedding" in note
    folder.tensors["lm_head.weight"] = folder.tensors["model.embed_tokens.weight"].clone()
    assert folder.check() == []
    del folder.tensors["lm_head.weight"]
    assert folder.check() == []
    del folder.tensors["model.embed_tokens.weight"]
    assert "no tensor" in folder.refused()


def test_files_beside_the_ones_that_are_read_are_said(folder):
    (folder.path / "pytorch_model.bin").write_bytes(b"old")
    [note] = folder.check()
    assert "model.safetensors is read" in note and "pytorch_model.bin" in note


# ---- files


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("adapter_model.safetensors", "LoRA adapter; merge"),
        ("gptq_model-4bit-128g.safetensors", "old GPTQ name"),
        ("model-00001-of-00002.safetensors", "but model.safetensors.index.json is missing"),
        ("model.fp16.safetensors", "variant; rename"),
        ("consolidated.safetensors", "own layout"),
        ("original/consolidated.safetensors", "own layout"),
        ("llama-Q4_K_M.gguf", "GGUF"),
        ("weights.safetensors", "rename it to model.safetensors"),
    ],
)
def test_folders_with_something_else(folder, name, what):
    folder.write(weights=name)
    with pytest.raises(UserError) as caught:
        Checkpoint(folder.path)
    message = short(caught, folder.path)
    assert f"no weights here; {name}" in message and what in message


def test_a_link_to_nowhere(folder):
    (folder.path / "model.safetensors").symlink_to(folder.path / "blob")
    with pytest.raises(UserError, match=r"model\.safetensors is a link to a file that is gone"):
        Checkpoint(folder.path)


def test_an_untied_head_that_is_missing(folder):
    del folder.tensors["lm_head.weight"]
    assert "'lm_head.weight'; if its head is the embedding" in folder.refused()


def test_an_adapter_beside_weights_is_not_left_out(folder):
    (folder.path / "adapter_model.safetensors").write_bytes(b"")
    assert "LoRA adapter beside the weights" in folder.refused()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_git_lfs_pointers(folder, name):
    (folder.path / "config.json").write_text(json.dumps(CONFIG))
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder.path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}: a Git LFS pointer.*git lfs pull"):
        Checkpoint(folder.path)


def shards(folder: Folder, second: torch.Tensor | None) -> None:
    """Two shards; the second one also holds `UP.weight`, if it is given."""
    folder.write(weights="a.safetensors")
    more = {} if second is None else {f"{UP}.weight": second}
    save_file({"model.norm.bias": torch.zeros(HIDDEN)} | more, folder.path / "b.safetensors")
    index = {"weight_map": {"model.norm.weight": "a.safetensors", "x": "b.safetensors"}}
    (folder.path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_two_shards_with_one_tensor(folder):
    shards(folder, folder.tensors[f"{UP}.weight"])
    assert torch.equal(
        Checkpoint(folder.path).read(f"{UP}.weight", (FFN, HIDDEN)), folder.tensors[f"{UP}.weight"]
    )
    shards(folder, torch.zeros(FFN, HIDDEN))
    with pytest.raises(UserError) as caught:
        Checkpoint(folder.path)
    message = short(caught, folder.path)
    assert "b.safetensors" in message and f"'{UP}.weight' is also in a.safetensors" in message


@pytest.mark.parametrize("zipped", [False, True])
def test_bin_files_of_any_torch(folder, zipped):
    (folder.path / "config.json").write_text(json.dumps(CONFIG))
    path = folder.path / "pytorch_model.bin"
    torch.save(folder.tensors, path, _use_new_zipfile_serialization=zipped)
    weights = Checkpoint(folder.path)
    assert check_checkpoint(load_config(folder.path), weights) == []
    assert torch.equal(weights.read(f"{UP}.weight", (FFN, HIDDEN)), folder.tensors[f"{UP}.weight"])
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"not readable as plain weights \(it is empty\)"):
        Checkpoint(folder.path)


def test_missing_shards_are_counted(folder):
    shards(folder, None)
    for name in "ab":
        (folder.path / f"{name}.safetensors").unlink()
    with pytest.raises(UserError, match=r"a\.safetensors: missing \(and 1 more\), but .*index"):
        Checkpoint(folder.path)


# ---- side files of quantized weights


def test_old_gptq_settings_are_read_and_others_refused(folder):
    folder.write()
    side = folder.path / "quantize_config.json"
    side.write_text('{"bits": 5, "group_size": 128}')
    with pytest.raises(UserError, match=r"quantize_config\.json: weights of 5 bits"):
        Checkpoint(folder.path)
    side.write_text('{"bits": 4, "group_size": 128}')
    assert folder.check() == []  # none of its linears is quantized
    (folder.path / "quantize_config.json").unlink()
    (folder.path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(UserError, match=r"hf_quant_config\.json: weights .* 'modelopt FP8'"):
        Checkpoint(folder.path)
