"""Indicators of sensitivity, the plans that a fit goes through, and the fit itself."""

import json
import math

import pytest
import torch

from llmpq.checkpoint.checkpoint import Checkpoint, RandomWeights
from llmpq.checkpoint.loader import load_stage
from llmpq.errors import UserError
from llmpq.evaluation.perplexity import evaluate
from llmpq.model_spec import ASSETS
from llmpq.models.stage_model import LayerRange, load_config
from llmpq.precision import group_size
from llmpq.profile_data import MeasuredPlan
from llmpq.profiler.calibration_pass import gather_calibration
from llmpq.profiler.indicators import (
    LoadableModel,
    SensitivityCell,
    hessian_rows,
    mean_square_step,
    output_error,
    random_rows,
    sensitivity_cells,
    top_eigenvalue,
    variance_rows,
)
from llmpq.profiler.quality_fit import OTHER_TEXT, draw_plans, fit_quality, notes_on_fit
from llmpq.profiler.sensitivity import (
    InputStatistics,
    MeasurementOptions,
    gather_input_variance,
    measure_sensitivity,
)
from llmpq.quant import quantize

CPU = torch.device("cpu")
NUM_LAYERS, HIDDEN, FFN = 3, 32, 64


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> LoadableModel:
    """A tiny LLaMA with random weights, large enough to tell tokens apart."""
    path = tmp_path_factory.mktemp("tiny") / "config.json"
    sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": 4}
    config = sizes | {"model_type": "llama", "num_hidden_layers": NUM_LAYERS, "vocab_size": 61}
    path.write_text(json.dumps(config))
    return LoadableModel(load_config(path), RandomWeights(scale=0.15), torch.float32, CPU)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(61, (6, 16), generator=torch.Generator().manual_seed(3))


def inputs_of(subject, windows) -> dict[str, torch.Tensor]:
    """The inputs `[tokens, in]` of every linear at 16 bits, by the weight's name."""
    stage = subject.load(0, NUM_LAYERS, ["16"] * NUM_LAYERS)
    seen = {}
    for name, linear in stage.linears().items():
        linear.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0].flatten(0, 1)})
        )
    evaluate([stage], windows)
    return seen


# ---- what is measured


def test_cells_are_layers_and_their_parts_below_sixteen_bits():
    plain = sensitivity_cells(2, ("16", "4", "3"))
    assert plain == [
        SensitivityCell(0, "4"),
        SensitivityCell(1, "4"),
        SensitivityCell(0, "3"),
        SensitivityCell(1, "3"),
    ]
    apart = sensitivity_cells(2, ("16", "4"), apart=True)
    assert len(apart) == 6 and {cell.part for cell in apart} == {"layer", "attention", "ffn"}
    assert SensitivityCell(1, "3").variant(3) == ["16", "3", "16"]


def test_fast_and_exact_agree(subject, windows):
    found = {
        method: measure_sensitivity(
            subject, MeasurementOptions(("16", "8", "3"), method=method, apart=True), windows
        )
        for method in ("fast", "exact")
    }
    fast, exact = found["fast"], found["exact"]
    assert [(r.layer, r.precision, r.part) for r in fast.rows] == [
        (c.layer, c.precision, c.part)
        for c in sensitivity_cells(NUM_LAYERS, ("8", "3"), apart=True)
    ]
    for one, other in zip(fast.rows, exact.rows, strict=True):
        assert one.sensitivity == pytest.approx(other.sensitivity, rel=1e-3, abs=1e-8)
        assert one.sensitivity > 0
    assert fast.base.total == pytest.approx(exact.base.total, rel=1e-6)
    assert [p.precisions for p in fast.fit.plans] == [p.precisions for p in exact.fit.plans]
    assert fast.fit.scale == pytest.approx(exact.fit.scale, rel=1e-3)


def test_fewer_bits_lose_more_in_every_layer_and_part(subject, windows):
    rows = measure_sensitivity(subject, MeasurementOptions(("8", "3"), apart=True), windows).rows
    at = {(r.layer, r.part, r.precision): r.sensitivity for r in rows}
    for layer in range(NUM_LAYERS):
        for part in ("layer", "attention", "ffn"):
            assert at[layer, part, "3"] > at[layer, part, "8"]
        assert at[layer, "layer", "3"] > max(at[layer, p, "3"] for p in ("attention", "ffn")) / 2


def test_steps_are_counted(subject, windows):
    for method, total in (
        ("fast", NUM_LAYERS),
        ("exact", 1 + NUM_LAYERS + len(draw_plans(NUM_LAYERS, ("4",)))),
    ):
        steps = []
        recipe = MeasurementOptions(("16", "4"), method=method)
        measure_sensitivity(subject, recipe, windows, on_step=lambda *step, s=steps: s.append(step))
        assert steps[-1] == (total, total)


# ---- indicators that are calculated


def test_input_variance_is_over_tokens_and_features(subject, windows):
    gathered = gather_input_variance(subject, windows)
    seen = inputs_of(subject, windows)
    assert len(seen) == 7 * NUM_LAYERS
    for name, x in seen.items():
        assert gathered.of(name) == pytest.approx(float(x.var(correction=0)), rel=1e-3)


def test_variance_is_dimension_times_step_times_variance(subject, windows):
    gathered = gather_input_variance(subject, windows)
    wanted = [
        SensitivityCell(1, "4"),
        SensitivityCell(1, "4", "attention"),
        SensitivityCell(1, "4", "ffn"),
        SensitivityCell(2, "3"),
    ]
    layer, attention, ffn, _ = variance_rows(subject, wanted, gathered.of)
    expected = {"attention": 0.0, "ffn": 0.0}
    for name, shape in shapes(subject, 1).items():
        step = mean_square_step(subject.weights.read(name, shape), 4)
        part = "attention" if "self_attn" in name else "ffn"
        expected[part] += shape[1] * step * gathered.of(name)
    assert attention.sensitivity == pytest.approx(expected["attention"], rel=1e-5)
    assert ffn.sensitivity == pytest.approx(expected["ffn"], rel=1e-5)
    assert layer.sensitivity == pytest.approx(sum(expected.values()), rel=1e-5)


def test_a_step_is_that_of_each_group():
    weight = torch.zeros(1, 256)
    weight[0, 0], weight[0, 1], weight[0, 200] = -3.0, 4.5, 1.5  # spans of 7.5 and 1.5
    assert mean_square_step(weight, 4) == pytest.approx((0.5**2 + 0.1**2) / 2)


def test_hessian_is_the_error_of_outputs_times_the_top_eigenvalue(subject, windows, tmp_path):
    file = gather_calibration(subject, windows, tmp_path / "m.safetensors", {"model": "tiny"})
    [row] = hessian_rows(subject, [SensitivityCell(0, "3")], file.statistics)
    expected = 0.0
    for name, x in inputs_of(subject, windows).items():
        if ".layers.0." in name:
            weight = subject.weights.read(name, shapes(subject, 0)[name])
            codes, scales, zeros = quantize(weight, 3, group_size(3, weight.shape[1]))
            lost = weight - dequantized(codes, scales, zeros)
            moved = (x @ lost.t()).square().sum() / len(x)
            top = torch.linalg.eigvalsh(x.t() @ x / len(x))[-1]
            expected += float(moved * top)
    assert row.sensitivity == pytest.approx(expected, rel=0.01)  # moments are stored in 16 bits


def dequantized(codes, scales, zeros):
    size = codes.shape[1] // scales.shape[1]
    wide = [part.float().repeat_interleave(size, 1) for part in (scales, zeros)]
    return (codes.float() - wide[1]) * wide[0]


def shapes(subject, layer) -> dict[str, tuple[int, int]]:
    stage = subject.load(layer, layer + 1, ["16"])
    return {n: (m.out_features, m.in_features) for n, m in stage.linears().items()}


def test_top_eigenvalue_and_output_error():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    moments = x.t() @ x / 50
    assert top_eigenvalue(moments) == pytest.approx(
        float(torch.linalg.eigvalsh(moments)[-1]), rel=1e-3
    )
    assert top_eigenvalue(torch.zeros(4, 4)) == 0
    lost = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    expected = float((x @ lost.t()).square().sum() / 50)
    assert output_error(lost, moments[None]) == pytest.approx(expected, rel=1e-5)
    blocks = torch.stack([moments[:4, :4], moments[4:, 4:]])
    apart = sum(
        float((x[:, s] @ lost[:, s].t()).square().sum() / 50) for s in (slice(4), slice(4, 8))
    )
    assert output_error(lost, blocks) == pytest.approx(apart, rel=1e-5)


def test_random_is_seeded_and_dearer_at_fewer_bits():
    wanted = sensitivity_cells(4, ("8", "4", "3"))
    one, same, other = (random_rows(wanted, seed) for seed in (1, 1, 2))
    assert one == same != other
    at = {(r.layer, r.precision): r.sensitivity for r in one}
    assert all(at[i, "8"] < at[i, "4"] < at[i, "3"] for i in range(4))


@pytest.mark.parametrize("indicator", ["variance", "hessian", "random"])
def test_calculated_indicators_are_fitted_to_measured_plans(subject, windows, tmp_path, indicator):
    inputs = InputStatistics(
        gather_calibration(subject, windows, tmp_path / "m.safetensors", {}),
        gather_input_variance(subject, windows),
    )
    recipe = MeasurementOptions(("16", "4", "3"), indicator=indicator)
    found = measure_sensitivity(subject, recipe, windows, inputs)
    reference = measure_sensitivity(subject, MeasurementOptions(("16", "4", "3")), windows)
    assert [p.rise for p in found.fit.plans] == pytest.approx(
        [p.rise for p in reference.fit.plans], rel=1e-4
    )
    assert found.fit.scale > 0 and len(found.rows) == 2 * NUM_LAYERS


# ---- calibration statistics


def test_moments_are_those_of_the_inputs(subject, windows, tmp_path):
    path = tmp_path / "m.safetensors"
    file = gather_calibration(subject, windows, path, {"model": "tiny"})
    variance = gather_input_variance(subject, windows)
    assert file.about["model"] == "tiny"
    for name, x in inputs_of(subject, windows).items():
        expected = x.t() @ x / len(x)
        assert torch.allclose(file.statistics(name)[0], expected, atol=float(expected.max()) * 1e-3)
        assert variance.of(name) == pytest.approx(float(x.var(correction=0)), rel=1e-3)


# ---- plans and the fit


def test_plans_are_uniform_ones_and_mixed_ones_from_mild_to_severe():
    plans = draw_plans(12, ("16", "8", "4", "3"))
    assert plans[:3] == [[p] * 12 for p in ("8", "4", "3")]
    assert plans == draw_plans(12, ("16", "8", "4", "3"))
    assert len({tuple(plan) for plan in plans}) == len(plans) >= 12
    variance = {"16": 0.0, "8": 4.0**-8, "4": 4.0**-4, "3": 4.0**-3}
    severity = [sum(variance[p] for p in plan) for plan in plans]
    mixed = severity[3:]
    assert mixed == sorted(mixed)
    assert mixed[0] < severity[2] / 30 and mixed[-1] > severity[2] / 2


@pytest.mark.parametrize("num_layers", [1, 2])
def test_few_layers_have_few_plans(num_layers):
    plans = draw_plans(num_layers, ("16", "4"))
    assert plans[0] == ["4"] * num_layers
    assert all(len(plan) == num_layers for plan in plans)
    assert len({tuple(plan) for plan in plans}) == len(plans)


def test_no_plans_where_nothing_is_below_sixteen_bits():
    assert draw_plans(3, ("16",)) == []
    assert fit_quality([]).scale == 0


def plan(total, rise):
    return MeasuredPlan(precisions=["4"], sum_sensitivity=total, rise=rise)


def test_the_fit_finds_the_line():
    fit = fit_quality([plan(x, 3 * x) for x in (0.001, 0.005, 0.02)])
    assert fit.scale == pytest.approx(3)
    assert fit.upper_scale == pytest.approx(3 * OTHER_TEXT)
    assert fit.mean_abs_error_percent == pytest.approx(0, abs=1e-9)
    assert notes_on_fit(fit) == []


def test_budgets_are_held_above_nearly_all_plans():
    draw = torch.Generator().manual_seed(0)
    factors = torch.exp(0.2 * torch.randn(400, generator=draw)).tolist()
    measured = [plan(0.01, 0.01 * factor) for factor in factors[:15]]
    fit = fit_quality(measured)
    assert fit.scale == pytest.approx(1, abs=0.2)
    assert fit.upper_scale is not None
    below = sum(factor <= fit.upper_scale for factor in factors[15:])
    assert below >= 0.9 * 385
    assert fit.upper_scale < 2 * fit.scale


def test_plans_beyond_any_budget_do_not_bend_the_line():
    mild = [plan(x, x) for x in (0.001, 0.01, 0.1)]
    assert fit_quality([*mild, plan(0.5, 2.0)]).scale == pytest.approx(1)
    assert fit_quality([plan(0.5, 2.0)]).scale == pytest.approx(4)


def test_where_sums_fail_is_said():
    fit = fit_quality([*(plan(x, x) for x in (0.001, 0.01, 0.1)), plan(0.5, 2.0)])
    [note] = notes_on_fit(fit)
    assert f"{100 * math.expm1(0.5):.2f} %" in note and f"{100 * math.expm1(2.0):.2f} %" in note


def test_the_shipped_model_adds_up(windows):
    """Sums of what single layers lose are what plans lose, on real weights."""
    folder = ASSETS / "tiny-tales"
    real = LoadableModel(load_config(folder), Checkpoint(folder), torch.float32, CPU)
    found = measure_sensitivity(real, MeasurementOptions(("16", "3")), windows[:4])
    for measured in found.fit.plans:
        assert measured.rise == pytest.approx(measured.sum_sensitivity, rel=0.5)
    layers = LayerRange(0, 8, 8)
    stage = load_stage(real.config, real.weights, layers, ["16"] * 8, torch.float32, CPU)
    assert found.base.total == pytest.approx(evaluate([stage], windows[:4]).total, rel=1e-5)


def test_a_missing_tensor_is_named(subject, windows):
    class Empty(RandomWeights):
        def read(self, name, shape):
            raise UserError(f"no tensor '{name}'")

    broken = LoadableModel(subject.config, Empty(), torch.float32, CPU)
    with pytest.raises(UserError, match="embed_tokens"):
        measure_sensitivity(broken, MeasurementOptions(("16", "4")), windows)
