"""Experts are read from every layout in which checkpoints hold them, one slice at a time."""

import json

import pytest
import torch
from safetensors.torch import save_file
from test_prequantized import Codes
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.mxfp4 import dequantize
from llmpq.errors import UserError
from llmpq.quant import TensorPart

HIDDEN, INNER, EXPERTS = 64, 96, 3
SHAPES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def experts() -> dict[str, torch.Tensor]:
    """The matrices of all experts `[E, out, in]`, by the name of a linear."""
    torch.manual_seed(0)
    return {name: torch.randn(EXPERTS, *shape) for name, shape in SHAPES.items()}


def apart(experts, block: str, names=("gate_proj", "up_proj", "down_proj")):
    return {
        f"{LAYER}.{block}.experts.{index}.{name}.weight": tensor[index].contiguous()
        for name, tensor in zip(names, experts.values(), strict=True)
        for index in range(EXPERTS)
    }


def together(experts, up: str, down: str, transposed=False, interleaved=False):
    gate, own, last = experts.values()
    joined = torch.stack((gate, own), 2).flatten(1, 2) if interleaved else torch.cat((gate, own), 1)
    tensors = {f"{LAYER}.{up}": joined, f"{LAYER}.{down}": last}
    return {n: (t.mT if transposed else t).contiguous() for n, t in tensors.items()}


STACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
IN_FEED_FORWARD = ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")
GRANITE = ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight")
LAYOUTS = {
    "apart": ("qwen3_moe", "mlp", lambda e: apart(e, "mlp")),
    "mixtral": ("mixtral", "mlp", lambda e: apart(e, "block_sparse_moe", ("w1", "w3", "w2"))),
    "lfm2": ("lfm2_moe", "feed_forward", lambda e: apart(e, "feed_forward", ("w1", "w3", "w2"))),
    "stacked": ("qwen3_moe", "mlp", lambda e: together(e, *STACKED)),
    "llama4": ("llama4_text", "feed_forward", lambda e: together(e, *IN_FEED_FORWARD, True)),
    "gpt_oss": ("gpt_oss", "mlp", lambda e: together(e, *STACKED, True, True)),
    "granite": ("granitemoe", "block_sparse_moe", lambda e: together(e, *GRANITE)),
}


def write(folder, model_type: str, tensors, **more) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type} | more))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return Checkpoint(folder)


@pytest.mark.parametrize("is_bare", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_matrices(tmp_path, experts, layout, is_bare):
    model_type, block, make = LAYOUTS[layout]
    tensors = {n.removeprefix("model." if is_bare else ""): t for n, t in make(experts).items()}
    weights = write(tmp_path, model_type, tensors)
    assert not weights.stores(f"{LAYER}.{block}.experts.0.gate_proj.bias")
    for index in range(EXPERTS):
        for name, tensor in experts.items():
            own = f"{LAYER}.{block}.experts.{index}.{name}.weight"
            assert weights.stores(own)
            assert torch.equal(weights.read(own, SHAPES[name]), tensor[index]), own
            assert weights.stored_bytes(own, SHAPES[name]) == tensor[index].nbytes
            part = TensorPart(1, 2, 7, SHAPES[name][1])
            assert torch.equal(weights.read_part(own, SHAPES[name], part), tensor[index][:, 2:7])
            assert set(weights.sources(own)) <= set(tensors)


def test_files_of_torch_are_read_alike(tmp_path, experts):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    torch.save(together(experts, *STACKED, True, True), tmp_path / "pytorch_model.bin")
    own = f"{LAYER}.mlp.experts.2.up_proj.weight"
    assert torch.equal(Checkpoint(tmp_path).read(own, SHAPES["up_proj"]), experts["up_proj"][2])


def test_biases_of_stacked_experts(tmp_path, experts):
    joined, last = torch.randn(EXPERTS, 2 * INNER), torch.randn(EXPERTS, HIDDEN)
    path = f"{LAYER}.mlp.experts"
    tensors = {f"{path}.gate_up_proj_bias": joined, f"{path}.down_proj_bias": last}
    weights = write(tmp_path, "gpt_oss", tensors | together(experts, *STACKED, True, True))
    assert torch.equal(weights.read(f"{path}.1.gate_proj.bias", (INNER,)), joined[1, ::2])
    assert torch.equal(weights.read(f"{path}.1.up_proj.bias", (INNER,)), joined[1, 1::2])
    assert torch.equal(weights.read(f"{path}.1.down_proj.bias", (HIDDEN,)), last[1])


RENAMED = {
    "mixtral": ("mlp.gate.weight", "block_sparse_moe.gate.weight"),
    "phimoe": ("mlp.router.weight", "block_sparse_moe.gate.weight"),
    "granitemoe": ("block_sparse_moe.router.weight", "block_sparse_moe.router.layer.weight"),
    "ernie4_5_moe": (
        "mlp.gate.moe_statics.e_score_correction_bias",
        "mlp.moe_statics.e_score_correction_bias",
    ),
}


@pytest.mark.parametrize("model_type", RENAMED)
def test_routers_are_found_by_the_names_of_files(tmp_path, model_type):
    own, stored = RENAMED[model_type]
    tensor = torch.randn(EXPERTS, HIDDEN)
    weights = write(tmp_path, model_type, {f"{LAYER}.{stored}": tensor})
    assert torch.equal(weights.read(f"{LAYER}.{own}", (EXPERTS, HIDDEN)), tensor)


def test_faults_of_stacked_experts_name_the_file_and_the_tensor(tmp_path, experts):
    weights = write(tmp_path, "qwen3_moe", together(experts, *STACKED))
    path = f"{LAYER}.mlp.experts"
    with pytest.raises(UserError, match=r"safetensors: tensor .*gate_up_proj.* no expert 3"):
        weights.read(f"{path}.3.up_proj.weight", SHAPES["up_proj"])
    with pytest.raises(UserError, match=r"has shape \[96, 64\] for an expert, .* \[64, 64\]"):
        weights.read(f"{path}.1.up_proj.weight", (64, 64))
    with pytest.raises(UserError, match="no tensor 'model.layers.1"):
        weights.read("model.layers.1.mlp.experts.0.up_proj.weight", SHAPES["up_proj"])


# ---- MXFP4


def random_mxfp4(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = torch.randint(0, 256, (EXPERTS, rows, columns // 32, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (EXPERTS, rows, columns // 32), dtype=torch.uint8)
    return blocks, scales


def write_mxfp4(folder) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    tensors = {}
    for name, rows, columns in (("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
        blocks, scales = random_mxfp4(rows, columns)
        tensors[f"{LAYER}.mlp.experts.{name}_blocks"] = blocks
        tensors[f"{LAYER}.mlp.experts.{name}_scales"] = scales
    settings = {"quantization_config": {"quant_method": "mxfp4"}}
    return write(folder, "gpt_oss", tensors, **settings), tensors


def test_mxfp4_is_dequantized_as_transformers_does(tmp_path):
    weights, tensors = write_mxfp4(tmp_path)
    path = f"{LAYER}.mlp.experts"
    up, down = (
        convert_moe_packed_tensors(
            tensors[f"{path}.{name}_blocks"], tensors[f"{path}.{name}_scales"]
        ).float()
        for name in ("gate_up_proj", "down_proj")
    )
    for index in range(EXPERTS):
        expected = {"gate_proj": up[index, :, ::2].t(), "up_proj": up[index, :, 1::2].t()}
        expected["down_proj"] = down[index].t()
        for name, matrix in expected.items():
            own = f"{path}.{index}.{name}.weight"
            assert weights.stores(own)
            assert torch.equal(weights.read(own, SHAPES[name]), matrix), own
            assert weights.stored_bytes(own, SHAPES[name]) == matrix.numel() * 17 // 32
    assert "MXFP4; they are converted to 16 bits" in weights.note({"16"})


def test_mxfp4_of_another_shape_is_refused(tmp_path):
    weights, _ = write_mxfp4(tmp_path)
    with pytest.raises(UserError, match="gate_up_proj_blocks' holds .* does not fit"):
        weights.read(f"{LAYER}.mlp.experts.0.up_proj.weight", (INNER, 32))
    with pytest.raises(UserError, match="no expert 3"):
        weights.read(f"{LAYER}.mlp.experts.3.up_proj.weight", SHAPES["up_proj"])


def test_all_values_of_mxfp4():
    """The 16 values of the format, at scales of 1 and 1/4."""
    codes = torch.arange(32, dtype=torch.uint8) % 16
    blocks = (codes[0::2] | (codes[1::2] << 4)).view(1, 1, 16).repeat(2, 1, 1)
    found = dequantize(blocks, torch.tensor([[127], [125]], dtype=torch.uint8))
    positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    expected = torch.cat((positive, -positive)).repeat(2)
    assert torch.equal(found, torch.stack((expected, expected / 4)))


# ---- experts that are quantized one by one, under the names of the stage or of Mixtral's files


NAMES = {
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "block_sparse_moe": ("w1", "w3", "w2"),
}


@pytest.mark.parametrize("block", NAMES)
def test_gptq_codes_of_experts_are_found(tmp_path, block):
    codes = {
        (index, name): Codes(SHAPES[name], 4, 32, torch.float16, seed=index)
        for index in range(EXPERTS)
        for name in SHAPES
    }
    stored = dict(zip(SHAPES, NAMES[block], strict=True))
    tensors = {}
    for (index, name), one in codes.items():
        tensors |= one.gptq(f"{LAYER}.{block}.experts.{index}.{stored[name]}", v2=False)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    weights = write(tmp_path, "mixtral", tensors, quantization_config=settings)
    for (index, name), one in codes.items():
        own = f"{LAYER}.mlp.experts.{index}.{name}.weight"
        assert weights.stores(own) and len(weights.sources(own)) == 4
        packed = weights.packed(own, SHAPES[name])
        assert torch.equal(packed.codes, one.codes)
        assert torch.equal(weights.read(own, SHAPES[name]), one.weight)


@pytest.mark.parametrize("block", NAMES)
def test_float8_experts_are_found(tmp_path, experts, block):
    stored = dict(zip(SHAPES, NAMES[block], strict=True))
    tensors, expected = {}, {}
    for name, matrices in experts.items():
        for index, matrix in enumerate(matrices):
            held, scales = matrix.to(torch.float8_e4m3fn), torch.rand(matrix.shape[0] // 16, 2)
            file_name = f"{LAYER}.{block}.experts.{index}.{stored[name]}.weight"
            tensors |= {file_name: held, f"{file_name}_scale_inv": scales}
            spread = scales.repeat_interleave(16, 0).repeat_interleave(matrix.shape[1] // 2, 1)
            expected[f"{LAYER}.mlp.experts.{index}.{name}.weight"] = held.float() * spread
    for name, shape in SHAPES.items():
        settings = {"quant_method": "fp8", "weight_block_size": [16, shape[1] // 2]}
        weights = write(tmp_path, "mixtral", tensors, quantization_config=settings)
        for own in (f"{LAYER}.mlp.experts.{index}.{name}.weight" for index in range(EXPERTS)):
            assert torch.equal(weights.read(own, shape), expected[own])
            assert len(weights.sources(own)) == 2


def test_a_note_takes_precisions_of_experts_apart(tmp_path):
    one = Codes(SHAPES["up_proj"], 4, 32, torch.float16)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    tensors = one.gptq(f"{LAYER}.mlp.experts.0.up_proj", v2=False)
    weights = write(tmp_path, "qwen3_moe", tensors, quantization_config=settings)
    assert weights.note({"4"}) is None
    assert "already quantized (gptq, 4)" in weights.note({"8+experts@4"})
