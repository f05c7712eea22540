"""Quality of models with experts: GPTQ where tokens suffice, and sensitivities of their own."""

import json

import pytest
import torch
from safetensors import safe_open

from llmpq.checkpoint.calibration_file import CalibrationFile
from llmpq.checkpoint.checkpoint import RandomWeights
from llmpq.checkpoint.loader import load_stage
from llmpq.checkpoint.roundings import NEAREST, load_roundings
from llmpq.errors import UserError
from llmpq.evaluation.calibration import CalibrationMeter
from llmpq.models.family import PartOfLayer, is_of_expert, precision_of
from llmpq.models.stage_model import LayerRange, load_config
from llmpq.profiler.calibration_pass import gather_calibration
from llmpq.profiler.indicators import (
    LoadableModel,
    hessian_rows,
    random_rows,
    sensitivity_cells,
    variance_rows,
)
from llmpq.profiler.sensitivity import gather_input_variance
from llmpq.quant import quantize
from llmpq.quant.gptq import Gptq
from llmpq.quantizer import Quantizer

CPU = torch.device("cpu")
LAYERS, HIDDEN, INNER, EXPERTS = 2, 32, 48, 6
PRECISIONS = ("16", "8", "4", "8+experts@4", "16+experts@3", "3")


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> LoadableModel:
    path = tmp_path_factory.mktemp("moe") / "config.json"
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    kind = {"model_type": "mixtral", "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    config = sizes | kind | {"num_hidden_layers": LAYERS, "vocab_size": 61}
    path.write_text(json.dumps(config))
    return LoadableModel(load_config(path), RandomWeights(scale=0.15), torch.float32, CPU)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(61, (14, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def path(subject, windows, tmp_path_factory):
    path = tmp_path_factory.mktemp("moments") / "moe.moments.safetensors"
    gather_calibration(subject, windows, path, {"model": "moe"})
    return path


@pytest.fixture(scope="module")
def meter(subject, windows) -> CalibrationMeter:
    stage = subject.load(0, LAYERS, ["16"] * LAYERS)
    with torch.inference_mode(), CalibrationMeter(stage) as meter:
        stage.run(stage.embed(windows))
    return meter


def test_gptq_needs_about_twice_as_many_tokens_as_columns():
    torch.manual_seed(0)
    size, bits = 64, 4
    basis, _ = torch.linalg.qr(torch.randn(size, size))
    spread = basis * torch.arange(1, size + 1).float().rsqrt().sqrt()
    weight = torch.randn(48, size) / 8

    def error(codes, scales, zeros) -> float:
        lost = weight - (codes.float() - zeros.float()) * scales.float()
        return float((lost @ spread).square().sum())

    def by_gptq(tokens: int) -> float:
        found = []
        for _ in range(4):
            x = torch.randn(tokens, size) @ spread.t()
            found.append(error(*Gptq((x.t() @ x / tokens)[None])(weight, bits, size)))
        return sum(found) / len(found)

    nearest = error(*quantize(weight, bits, size))
    assert by_gptq(size) > 1.5 * nearest
    assert by_gptq(2 * size) < 1.25 * nearest
    assert by_gptq(8 * size) < 0.9 * nearest


# ---- calibration


def test_an_expert_counts_the_tokens_that_are_routed_to_it(meter, windows):
    seen = {name: meter.seen.get(meter.keys.get(name, ""), 0) for name in meter.keys}
    attention = [count for name, count in seen.items() if not is_of_expert(name)]
    assert set(attention) == {windows.numel()}
    for layer in range(LAYERS):
        for name in ("gate_proj", "down_proj"):
            path = f"model.layers.{layer}.mlp.experts"
            counts = [seen.get(f"{path}.{e}.{name}.weight", 0) for e in range(EXPERTS)]
            assert sum(counts) == 2 * windows.numel()
            assert len(set(counts)) > 1
    gate, up = (f"model.layers.0.mlp.experts.0.{name}_proj.weight" for name in ("gate", "up"))
    assert meter.keys[up] == meter.keys[gate] == gate


def test_experts_with_too_few_tokens_are_named_in_the_file(meter, path):
    file = CalibrationFile(path)
    few = meter.rounded_to_nearest()
    assert file.nearest == set(few)
    assert 0 < len(few) < 3 * EXPERTS * LAYERS
    assert all(is_of_expert(name) for name in few)
    columns = {"gate_proj": HIDDEN, "up_proj": HIDDEN, "down_proj": INNER}
    for name in filter(is_of_expert, meter.keys):
        enough = meter.seen[meter.keys[name]] >= 2 * columns[name.split(".")[-2]]
        assert enough == (name not in few)
    assert file.note is not None and f"{len(few)} of the " in file.note
    assert file.share("model.layers.0.self_attn.q_proj.weight") == 1.0
    assert 0 < file.share("model.layers.0.mlp.experts.0.up_proj.weight") < 1


def test_an_expert_without_tokens_is_rounded_to_nearest(subject):
    stage = subject.load(0, LAYERS, ["16"] * LAYERS)
    with torch.inference_mode(), CalibrationMeter(stage) as meter:
        stage.run(stage.embed(torch.zeros(1, 1, dtype=torch.int64)))
    unseen = [name for name in stage.linears() if name not in meter.keys]
    assert len(unseen) == 3 * (EXPERTS - 2) * LAYERS
    assert set(meter.rounded_to_nearest()) == set(filter(is_of_expert, stage.linears()))


def test_blocks_of_experts_are_smaller_unless_asked_otherwise(subject, windows, monkeypatch):
    monkeypatch.setattr("llmpq.evaluation.calibration.EXPERT_BLOCK", HIDDEN // 2)
    monkeypatch.setattr("llmpq.evaluation.calibration.group_size", lambda bits, size: 16)
    stage = subject.load(0, 1, ["16"])
    shapes = []
    for block in (None, HIDDEN):
        with torch.inference_mode(), CalibrationMeter(stage, block) as meter:
            stage.run(stage.embed(windows))
        found = meter.statistics()
        names = ("self_attn.q_proj", "mlp.experts.0.gate_proj")
        shapes.append([tuple(found[f"model.layers.0.{n}.weight"].shape) for n in names])
    whole, halves = (1, HIDDEN, HIDDEN), (2, HIDDEN // 2, HIDDEN // 2)
    assert shapes == [[whole, halves], [whole, whole]]


def test_only_experts_with_enough_tokens_are_rounded_by_gptq(subject, path):
    file = CalibrationFile(path)
    roundings = load_roundings(Quantizer(method="gptq", moments=str(path)))
    assert roundings.note == file.note and NEAREST.note is None

    def stage(by):
        layers = LayerRange(0, LAYERS, LAYERS)
        more = torch.float32, CPU
        return load_stage(
            subject.config, subject.weights, layers, ["3"] * LAYERS, *more, roundings=by
        )

    nearest, gptq = (stage(by).linears() for by in (NEAREST, roundings))
    for name, linear in gptq.items():
        is_same = torch.equal(linear.dequantized_weight(), nearest[name].dequantized_weight())
        assert is_same == (name in file.nearest), name


def test_faults_of_the_lists_of_experts(path, tmp_path):
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata()
    for key, value in (("tokens_of_keys", '{"a": "b"}'), ("rounded_to_nearest", "{")):
        save_file(tensors, tmp_path / "bad", about | {key: value})
        with pytest.raises(UserError, match="its '(tokens_of_keys|rounded_to_nearest)'"):
            CalibrationFile(tmp_path / "bad")


# ---- sensitivity


def test_names_of_experts():
    assert is_of_expert("mlp.experts.3.gate_proj") and is_of_expert("experts.0.down_proj")
    assert not is_of_expert("mlp.shared_experts.gate_proj")
    assert precision_of("8+experts@4", "mlp.experts.3.up_proj") == "4"
    assert precision_of("8+experts@4", "self_attn.q_proj") == "8"
    assert PartOfLayer("8+experts@4", "ffn")("mlp.experts.3.up_proj") == "4"
    assert PartOfLayer("8+experts@4", "ffn")("self_attn.q_proj") == "16"


@pytest.mark.parametrize("indicator", ["variance", "hessian"])
def test_sensitivities_of_experts_and_of_the_rest_add_up(subject, windows, path, indicator):
    file = CalibrationFile(path)

    def rows(precisions):
        wanted = sensitivity_cells(LAYERS, precisions, apart=True)
        if indicator == "variance":
            found = variance_rows(subject, wanted, gather_input_variance(subject, windows).of)
        else:
            found = hessian_rows(subject, wanted, file.statistics, share=file.share)
        return {(row.layer, row.precision, row.part): row.sensitivity for row in found}

    table = rows(PRECISIONS)
    alone = rows(("8+experts@4",))
    for layer in range(LAYERS):
        assert alone[layer, "8+experts@4", "layer"] == table[layer, "8+experts@4", "layer"]
        # Mixtral's linears beside attention are those of experts.
        for rest, experts in (("8", "4"), ("16", "3")):
            own = {
                part: table[layer, f"{rest}+experts@{experts}", part]
                for part in ("layer", "attention", "ffn")
            }
            assert own["ffn"] == pytest.approx(table[layer, experts, "ffn"])
            expected = 0.0 if rest == "16" else table[layer, rest, "attention"]
            assert own["attention"] == pytest.approx(expected)
            assert own["layer"] == pytest.approx(own["attention"] + own["ffn"])


def test_an_experts_error_counts_for_the_tokens_that_it_sees(subject, windows):
    """As if each expert's linears were one linear with the mean variance over all tokens."""
    variance = gather_input_variance(subject, windows)
    seen = {n: c for n, c in variance._tokens.items() if n.endswith("gate_proj.weight")}
    assert sum(seen.values()) == 2 * LAYERS * windows.numel()
    name = max(seen, key=lambda n: seen[n])
    count, total, squares = variance._sums[name]
    share = seen[name] / windows.numel()
    expected = share * (squares / count - (total / count) ** 2)
    assert variance.of(name) == pytest.approx(expected)
    assert variance.of("model.layers.0.mlp.experts.9.gate_proj.weight") == 0.0


def test_random_sensitivities_follow_the_bits_of_both_parts():
    wanted = sensitivity_cells(1, ("8", "8+experts@4", "4"))
    eight, mixed, four = (row.sensitivity for row in random_rows(wanted, seed=1))
    assert eight < mixed < four
    assert mixed == pytest.approx((eight + four) / 2)
