"""Float8 weights come out as transformers' own dequantization has them, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.inventory import check_checkpoint
from llmpq.checkpoint.loader import load_stage
from llmpq.errors import UserError
from llmpq.models.stage_model import LayerRange, load_config
from llmpq.quant import TensorPart

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
UP = "model.layers.1.mlp.up_proj"


def write(folder, block, change=lambda tensors: None):
    """A LLaMA whose linears are float8; its tensors by name."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        out, cols = tensors[name].shape
        grid = (1,) if block is None else (-(-out // block[0]), -(-cols // block[1]))
        tensors[name] = (100 * tensors[name]).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(grid) + 0.5
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": block}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("block", [None, [16, 8], [48, 32]])
def test_weights_are_those_of_transformers(tmp_path, block):
    tensors = write(tmp_path, block)
    weights, shape = Checkpoint(tmp_path), (48, 32)
    scales = tensors[f"{UP}.weight_scale_inv"].reshape(-1, 1) if block is None else None
    wanted = Fp8Dequantize(None)._dequantize_one(
        tensors[f"{UP}.weight"],
        tensors[f"{UP}.weight_scale_inv"] if scales is None else scales,
        torch.float32,
    )
    assert torch.equal(weights.read(f"{UP}.weight", shape), wanted)
    part = TensorPart(0, 3, 20, 48)
    assert torch.equal(weights.read_part(f"{UP}.weight", shape, part), wanted[3:20])
    assert weights.packed(f"{UP}.weight", shape) is None
    assert check_checkpoint(load_config(tmp_path), weights) == []
    assert "float8" in weights.note(["16"])


def test_blocks_that_are_cut_off(tmp_path):
    tensors = write(tmp_path, [32, 20])
    found = Checkpoint(tmp_path).read(f"{UP}.weight", (48, 32))
    weight, scales = tensors[f"{UP}.weight"].float(), tensors[f"{UP}.weight_scale_inv"]
    for row, col in ((0, 0), (31, 19), (32, 20), (47, 31)):
        assert found[row, col] == weight[row, col] * scales[row // 32, col // 20]


def test_a_stage_is_loaded(tmp_path):
    write(tmp_path, [16, 8])
    config, weights = load_config(tmp_path), Checkpoint(tmp_path)
    stage = load_stage(
        config, weights, LayerRange(1, 2, 2), ["16"], torch.bfloat16, torch.device("cpu")
    )
    held = stage.linears()[f"{UP}.weight"].get_parameter("weight")
    assert torch.equal(held, weights.read(f"{UP}.weight", (48, 32)).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{UP}.weight_scale_inv": torch.ones(2, 2)}, "does not fit weight_block_size"),
        ({f"{UP}.weight_scale_inv": torch.ones(3, 4).byte()}, "expected floats"),
        ({f"{UP}.weight": torch.ones(48, 32)}, "but has scales of float8"),
    ],
)
def test_what_does_not_fit(tmp_path, change, message):
    write(tmp_path, [16, 8], lambda tensors: tensors.update(change))
    with pytest.raises(UserError, match=message):
        Checkpoint(tmp_path).read(f"{UP}.weight", (48, 32))


def test_blocks_of_another_size_are_found_before_loading(tmp_path):
    write(tmp_path, [16, 8])
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("[16, 8]", "[9, 9]"))
    with pytest.raises(UserError, match="does not fit weight_block_size"):
        check_checkpoint(load_config(tmp_path), Checkpoint(tmp_path))


def test_a_weight_that_has_no_scales_is_found_before_loading(tmp_path):
    write(tmp_path, [16, 8], lambda tensors: tensors.pop(f"{UP}.weight_scale_inv"))
    with pytest.raises(UserError, match="float8 without scales"):
        check_checkpoint(load_config(tmp_path), Checkpoint(tmp_path))
