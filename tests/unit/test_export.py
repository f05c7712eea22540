"""Exported checkpoints: read back with the library that owns the format, against what is served."""

import json
import re
import stat
from pathlib import Path

import pytest
import torch
from exports import A100, EPYC, T4, V100, plan_of
from safetensors import safe_open
from test_calibration import measured

from llmpq.artifact import write_json
from llmpq.checkpoint.calibration_file import write_calibration
from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.loader import load_stage
from llmpq.checkpoint.roundings import load_roundings
from llmpq.errors import InfeasibleError, UserError
from llmpq.export import checkpoint_writer
from llmpq.export.quantization import Storage, StoredLinear, quantization_config
from llmpq.export.served import served_precisions
from llmpq.export.vllm import export_vllm
from llmpq.model_lookup import load_model_spec
from llmpq.model_spec import ASSETS
from llmpq.models.stage_model import LayerRange, load_config
from llmpq.plan_data import load_plan
from llmpq.quantizer import Quantizer
from llmpq.vllm_support import FUSED, VllmDevice

pytestmark = pytest.mark.library("compressed_tensors")

TINY_TALES = ASSETS / "tiny-tales"
CONFIGS = Path(__file__).parents[2] / "configs" / "models"
MIXED = ["16", "8", "4", "3", "8-w8a8", "4", "16", "3"]
WHOLE = LayerRange(0, 8, 8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "out"
    return folder, export_vllm(plan_of(MIXED[:3], MIXED[3:]), TINY_TALES, folder)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for name in sorted(set(index.values())):
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                assert index[key] == name
                found[key] = file.get_tensor(key)
    assert set(found) == set(index)
    return found


def groups_of(folder: Path) -> list[dict]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["version"]
    return list(config["config_groups"].values())


def matches(name: str, targets: list[str]) -> bool:
    return any(re.match(one.removeprefix("re:"), name) for one in targets if one[:3] == "re:")


def read_back(folder: Path) -> dict[str, torch.Tensor]:
    """Every linear that is stored packed, dequantized by compressed-tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    tensors, found = tensors_of(folder), {}
    for name in tensors:
        linear = name.rpartition(".")[0]
        if not name.endswith("weight_scale"):
            continue
        own = [group for group in groups_of(folder) if matches(linear, group["targets"])]
        assert len(own) == 1, linear
        scheme = QuantizationScheme.model_validate(own[0])
        parts = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{linear}.")}
        compressor = BaseCompressor.get_value_from_registry(own[0]["format"])
        found[linear] = compressor.decompress(parts, scheme)["weight"]
    return found


def served_by_us(precisions, roundings=None) -> dict[str, torch.Tensor]:
    """The weights that a run serves, by the names of their linears."""
    given = {} if roundings is None else {"roundings": roundings}
    config, weights = load_config(TINY_TALES), Checkpoint(TINY_TALES)
    stage = load_stage(
        config, weights, WHOLE, precisions, torch.bfloat16, torch.device("cpu"), **given
    )
    return {
        name.removesuffix(".weight"): linear.dequantized_weight()
        for name, linear in stage.linears().items()
    }


def assert_served(folder: Path, precisions, roundings=None) -> None:
    ours, back = served_by_us(precisions, roundings), read_back(folder)
    packed = [name for name in ours if precisions[int(name.split(".")[2])] != "16"]
    assert sorted(back) == sorted(packed)
    for name in packed:
        assert torch.equal(back[name].to(torch.bfloat16), ours[name]), name


def test_packed_weights_are_those_that_a_run_serves(exported):
    assert_served(exported[0], MIXED)


@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_they_are_rounded_as_the_plan_says(method, tmp_path):
    precisions, quantizer = ["16"] * 4 + ["3"] + ["16"] * 3, Quantizer(method="mse")
    if method == "gptq":
        meter = measured()[0]
        path = tmp_path / "tiny.moments.safetensors"
        write_calibration(path, meter.statistics(), meter.keys, {"model": "tiny", "tokens": "400"})
        quantizer = Quantizer(method="gptq", moments=path.name)
    plan = plan_of(precisions).model_copy(update={"quantizer": quantizer})
    export_vllm(plan, TINY_TALES, tmp_path / "out", plan_path=tmp_path / "plan.json")
    by = load_roundings(quantizer, base=tmp_path / "plan.json")
    assert_served(tmp_path / "out", precisions, by)
    with pytest.raises(AssertionError):
        assert_served(tmp_path / "out", precisions)  # rounded to nearest


def test_what_has_16_bits_is_the_same_bit_for_bit(exported):
    tensors, weights = tensors_of(exported[0]), Checkpoint(TINY_TALES)
    plain = [n for n in tensors if not re.search(r"weight_(packed|scale|shape|zero)", n)]
    plain = [n for n in plain if tensors[n].dtype != torch.int8]
    assert "model.embed_tokens.weight" in plain
    assert "model.layers.0.self_attn.q_proj.weight" in plain and len(plain) > 8 * 2 + 2 * 7
    for name in plain:
        stored = weights.tensor(name)
        assert tensors[name].dtype == stored.dtype and torch.equal(tensors[name], stored)


def test_the_layers_are_as_large_as_planned(exported):
    folder, result = exported
    layers = {n: t for n, t in tensors_of(folder).items() if n.startswith("model.layers.")}
    assert result.layer_bytes == sum(tensor.nbytes for tensor in layers.values())
    assert result.layer_bytes == pytest.approx(result.planned_layer_bytes, rel=0.02)


def test_llmpq_reads_the_same_weights_of_it(exported):
    weights, spec = Checkpoint(exported[0]), load_model_spec("tiny-tales")
    shapes = {op.name: (op.out_features, op.in_features) for op in spec.linears}
    for name, weight in read_back(exported[0]).items():
        found = weights.read(f"{name}.weight", shapes[name.rpartition(".")[2]])
        assert torch.equal(found, weight.to(found.dtype))


def test_shards_are_written_one_by_one(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "SHARD_BYTES", 400_000)
    again = export_vllm(plan_of(MIXED), TINY_TALES, tmp_path / "out")
    one, other = tensors_of(exported[0]), tensors_of(tmp_path / "out")
    assert again.num_shards > 5 and one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    largest = max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert largest < 400_000 + max(t.nbytes for t in one.values()) + 20_000
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").glob("*.safetensors")}
    assert modes == {0o644}


# Groups


def test_every_linear_and_every_fused_matrix_has_one_group(exported):
    config = json.loads((exported[0] / "config.json").read_text())["quantization_config"]
    listed = [group["targets"] for group in groups_of(exported[0])] + [config["ignore"]]
    spec = load_model_spec("tiny-tales")
    for layer in range(spec.num_layers):
        for op in spec.linears:
            part = "mlp" if op.name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            name = f"model.layers.{layer}.{part}.{op.name}"
            own = [number for number, targets in enumerate(listed) if matches(name, targets)]
            assert len(own) == 1, name
            for fused, parts in FUSED.items():
                if op.name in parts:
                    whole = f"model.layers.{layer}.{part}.{fused}"
                    assert [n for n, t in enumerate(listed) if matches(whole, t)] == own


def test_layers_with_similar_numbers_are_told_apart():
    linears = [StoredLinear(n, "mlp.fc1", Storage("4", 64) if n == 1 else None) for n in range(12)]
    config = quantization_config("model.decoder.layers", linears)
    (group,) = config["config_groups"].values()
    names = [f"model.decoder.layers.{n}.mlp.fc1" for n in range(12)]
    assert [n for n, name in enumerate(names) if matches(name, group["targets"])] == [1]
    assert [n for n, name in enumerate(names) if not matches(name, config["ignore"])] == [1]


# What vLLM cannot run


def test_what_a_cpu_has_no_kernel_for_is_raised_and_said():
    served = served_precisions(plan_of(MIXED, device=EPYC))
    assert [set(one.values()) for one in served.layers] == [
        {name} for name in ("16", "16", "4", "4", "8-w8a8", "4", "16", "4")
    ]
    assert any("3-bit becomes 4-bit in layers 3, 7" in note for note in served.notes)
    assert any("8-bit becomes 16-bit in layer 1" in note for note in served.notes)
    assert served_precisions(plan_of(MIXED, device=A100)).notes == (
        "3-bit and 8-bit layers need the humming kernels in vLLM's environment",
    )


def test_matrices_of_odd_sizes_are_raised_alone_with_those_they_are_fused_with():
    spec = load_model_spec("tiny-tales")
    ops = [
        op.model_copy(update={"out_features": 172} if op.name == "up_proj" else {})
        for op in spec.linears
    ]
    odd = spec.model_copy(update={"linears": tuple(ops)})
    served = served_precisions(plan_of(["4"] * 8, model=odd))
    raised = {name for name, one in served.layers[0].items() if one == "16"}
    assert raised == {"gate_proj", "up_proj"}
    assert served.of(0, "q_proj") == "4" and "up_proj [172, 192]" in served.notes[0]


def test_shards_hold_whole_groups():
    # down_proj has 384 inputs, three groups of 128 that two devices cannot share
    spec = load_model_spec(str(CONFIGS / "opt-1.3b.json"))
    narrow = [
        op.model_copy(update={"in_features": 8192 + 128} if op.name == "fc2" else {})
        for op in spec.linears
    ]
    odd = spec.model_copy(update={"linears": tuple(narrow)})
    served = served_precisions(plan_of(["4"] * 24, model=odd, sharing=2))
    assert served.of(0, "fc2") == "16" and served.of(0, "fc1") == "4"


def test_int8_products_are_not_for_the_newest_cards():
    assert "8-w8a8" in VllmDevice("cuda", (9, 0)).precisions
    assert "8-w8a8" not in VllmDevice("cuda", (10, 0)).precisions


def test_the_plan_in_the_export_says_what_is_served(tmp_path):
    plan = plan_of(MIXED, device=EPYC)
    export_vllm(plan, TINY_TALES, tmp_path / "out")
    assert load_plan(tmp_path / "out" / "plan.json").precisions == [
        *("16", "16", "4", "4", "8-w8a8", "4", "16", "4")
    ]


def refusal(tmp_path, plan, model=TINY_TALES, error=UserError) -> str:
    with pytest.raises(error) as caught:
        export_vllm(plan, model, tmp_path / "refused")
    assert not [path for path in tmp_path.iterdir() if "refused" in path.name]
    return str(caught.value)


def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path):
    assert "7.5" in refusal(tmp_path, plan_of(MIXED, device=V100))
    assert served_precisions(plan_of(MIXED, device=T4))
    narrow = load_model_spec("tiny-tales").model_copy(update={"head_dim": 8})
    with pytest.raises(UserError, match="heads of 8"):
        served_precisions(plan_of(MIXED, model=narrow, device=EPYC))
    small = plan_of(MIXED, device=EPYC, memory_gib=1.001)
    message = refusal(tmp_path, small, error=InfeasibleError)
    assert "stage 0" in message and "MiB" in message and "--target vllm" in message
    mixture = load_model_spec(str(CONFIGS / "qwen3-235b-a22b.json"))
    with pytest.raises(UserError, match="experts"):
        served_precisions(plan_of(["16"] * mixture.num_layers, model=mixture))


def test_a_model_that_is_quantized_already_is_refused(exported, tmp_path):
    assert "quantized already" in refusal(tmp_path, plan_of(MIXED), exported[0])


def test_a_folder_with_files_is_not_touched(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="there already"):
        export_vllm(plan_of(MIXED), TINY_TALES, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_command_says_what_to_run(tmp_path, capsys):
    from click.testing import CliRunner

    from llmpq.cli.export import main

    write_json(tmp_path / "plan.json", plan_of(MIXED, device=EPYC))
    words = ["vllm", "--plan", str(tmp_path / "plan.json"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*words, "--json", str(tmp_path / "export.json")])
    assert result.exit_code == 0, result.output
    assert "a batch: python" in result.stdout and "run.sh" in result.stdout
    assert "note: stage 0: 3-bit becomes 4-bit" in result.stderr
    data = json.loads((tmp_path / "export.json").read_text())
    assert data["precisions"][2]["q_proj"] == "4"
