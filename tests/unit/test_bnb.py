"""bitsandbytes' precisions: what they hold, how they multiply, and who is offered them."""

import sys

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from llmpq.cli.profile import main as profile
from llmpq.costs import peak
from llmpq.costs.latency import measured_times, spec_sheet_times
from llmpq.costs.quality import prior_quality
from llmpq.devices import device_library
from llmpq.machine import INT4_TILES, cpu
from llmpq.model_lookup import load_model_spec
from llmpq.model_spec import LinearShape
from llmpq.precision import NF4_BLOCK, PRECISIONS, STANDARD
from llmpq.profile_data import ProfileRow
from llmpq.quant import available_precisions, here, linear_factory, why_unavailable
from llmpq.runtime.rehearsal import peak_bytes

CPU = torch.device("cpu")
OPTIONAL = ("nf4", "8-bnb")
SHAPES = [(64, 64), (100, 172), (256, 704), (7, 64), (130, 72)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_library = pytest.mark.skipif(not here.has_bitsandbytes(), reason="no bitsandbytes here")
pytestmark = pytest.mark.usefixtures("one_thread")


def filled(precision: str, weight: Tensor, dtype=torch.float32, bias: Tensor | None = None):
    out_features, in_features = weight.shape
    layer = linear_factory(
        precision, in_features, out_features, bias=bias is not None, dtype=dtype, device=CPU
    )()
    layer.load_weight("weight", weight)
    if bias is not None:
        layer.load_weight("bias", bias)
    return layer


def random_weight(out_features: int, in_features: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(out_features, in_features, generator=generator) * 0.02


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


# Layers


@needs_library
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", OPTIONAL)
def test_layers_hold_the_bytes_that_plans_count(precision, shape, dtype):
    layer = filled(precision, random_weight(*shape), dtype)
    assert layer.weight_bytes == PRECISIONS[precision].weight_bytes(*shape)


@needs_library
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 17, 70])
def test_nf4_multiplies_by_the_weight_that_it_holds(shape, dtype, rows):
    weight, bias = random_weight(*shape), torch.randn(shape[0])
    layer = filled("nf4", weight, dtype, bias)
    held = layer.dequantized_weight()
    assert held.shape == weight.shape and held.dtype == dtype
    assert 0.05 < relative_error(held, weight) < 0.12
    x = torch.randn(rows, shape[1]).to(dtype)
    out = layer(x)
    assert out.shape == (rows, shape[0]) and out.dtype == dtype
    if rows:
        wanted = x.double() @ held.double().t() + bias.to(dtype).double()
        assert relative_error(out, wanted) < (1e-5 if dtype == torch.float32 else 1e-2)


@needs_library
def test_nf4_is_what_bitsandbytes_makes_of_the_rows():
    """Blocks of 64 along a row, each level times the largest weight of its block."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = random_weight(96, 4 * NF4_BLOCK)
    packed, state = quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    layer = filled("nf4", weight)
    assert torch.equal(layer.packed.flatten(), packed.flatten())
    assert torch.equal(layer.scales.flatten(), state.absmax)
    assert torch.equal(layer.dequantized_weight(), dequantize_4bit(packed, state))
    largest = weight.view(96, 4, NF4_BLOCK).abs().amax(-1)
    assert torch.equal(layer.scales, largest)


@needs_library
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_llm_int8_is_near_the_exact_product(shape, dtype):
    weight, bias = random_weight(*shape), torch.randn(shape[0])
    layer = filled("8-bnb", weight, dtype, bias)
    assert relative_error(layer.dequantized_weight(), weight) < 0.01
    x = torch.randn(20, shape[1]).to(dtype)
    x[3, 2], x[4], x[5, ::7] = 900.0, 0, -40.0
    wanted = x.double() @ layer.dequantized_weight().double().t() + bias.double()
    out = layer(x)
    assert out.dtype == dtype and relative_error(out, wanted) < 0.01
    for row in (3, 4, 5):
        assert relative_error(out[row], wanted[row]) < 0.01


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_llm_int8_rows_do_not_see_each_other(dtype):
    """Also where a neighbour has large inputs, in few columns or in more than fit at a time."""
    layer = filled("8-bnb", random_weight(256, 704), dtype, torch.randn(256))
    x = torch.randn(70, 704).to(dtype)
    x[5, 3], x[7], x[9, ::2] = 1000.0, 0, 30.0
    x[11, 2] = 6.0  # large from here on
    together = layer(x)
    for row in range(70):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])
    assert torch.equal(layer(x[3:20]), together[3:20])
    assert torch.equal(layer(x.view(2, 35, 704)).view(70, 256), together)


@needs_library
def test_large_inputs_are_kept_at_their_own_precision():
    layer = filled("8-bnb", random_weight(64, 128))
    x = torch.zeros(1, 128)
    x[0, 5] = 1234.5
    held = layer.dequantized_weight()[:, 5] * 1234.5
    assert relative_error(layer(x)[0], held) < 1e-6


@needs_library
@pytest.mark.parametrize("precision", OPTIONAL)
def test_rows_of_zeros_and_weights_that_are_not_finite(precision):
    weight = random_weight(64, 64)
    weight[3] = 0
    layer = filled(precision, weight)
    assert not layer.dequantized_weight()[3].any()
    assert torch.isfinite(layer(torch.randn(5, 64))).all()
    weight[4, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        filled(precision, weight)


@needs_library
@pytest.mark.parametrize("shape", [(256, 256), (704, 256), (256, 704), (64, 172), (2304, 512)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_takes_no_more_than_is_predicted(shape, biased):
    """With large inputs in every column, as plans assume."""
    out, cols = shape
    op = LinearShape(name="x", out_features=out, in_features=cols)
    for precision in OPTIONAL:
        bias = torch.randn(out) if biased else None
        layer = filled(precision, random_weight(*shape), torch.bfloat16, bias)
        for rows in (1, 17, 65, 300):
            x = torch.randn(1, rows, cols).to(torch.bfloat16)
            x[:, ::3] = 20
            with torch.inference_mode():
                layer(x)
                measured = peak_bytes(lambda layer=layer, x=x: layer(x), CPU)
            predicted = peak.linear_bytes(
                precision, op, rows, biased=biased, machine=cpu({INT4_TILES})
            )
            assert measured <= predicted <= 1.15 * measured, (precision, rows)


# Only for those who ask


def test_they_are_offered_to_nobody_by_default():
    assert STANDARD == ("16", "8", "8-w8a8", "4", "3")
    assert not set(OPTIONAL) & set(available_precisions(CPU, torch.bfloat16))
    spec = load_model_spec("tiny-tales")
    times = spec_sheet_times(device_library()["t4-16g"], spec)
    assert not set(OPTIONAL) & set(times.precisions)
    assert set(OPTIONAL) <= prior_quality(spec.num_layers).omega.keys()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_they_are_there_for_those_who_ask(dtype):
    offered = available_precisions(CPU, dtype, optional=True)
    assert offered == (*available_precisions(CPU, dtype), *OPTIONAL)
    assert why_unavailable("nf4", CPU, dtype) is None
    assert "use one of 16, 8" in str(why_unavailable("nf4", CPU, torch.float64))


@pytest.mark.parametrize("precision", OPTIONAL)
def test_without_the_library_it_is_named(precision, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    here.has_bitsandbytes.cache_clear()
    try:
        assert available_precisions(CPU, torch.bfloat16, optional=True) == available_precisions(
            CPU, torch.bfloat16
        )
        message = rf"'{precision}' needs bitsandbytes: pip install 'llmpq\[bnb\]'"
        with pytest.raises(ValueError, match=message):
            linear_factory(precision, 8, 8, bias=False, dtype=torch.float32, device=CPU)()
        result = CliRunner().invoke(profile, ["layers", "--precisions", precision])
        assert result.exit_code == 2 and f"'{precision}' needs bitsandbytes" in result.output
    finally:
        here.has_bitsandbytes.cache_clear()


def test_plans_use_what_was_profiled_only_where_it_is_asked_for():
    from llmpq.planner.inputs import offered_precisions

    sizes = {"micro_batch": 1, "prompt_tokens": 8, "past_tokens": 8, "time_ms": 1.0}
    spread = {"time_ms_p10": 1.0, "time_ms_p90": 1.0, "num_samples": 3, "model_key": "x"}
    rows = [
        ProfileRow(precision=precision, phase=phase, **sizes, **spread)
        for precision in ("16", "nf4")
        for phase in ("prefill", "decode")
    ]
    times = {"t4-16g": measured_times(rows, "test")}
    assert times["t4-16g"].precisions == ("16", "nf4")
    assert offered_precisions(times) == ["16"]
    assert offered_precisions(times, ["nf4"]) == ["16", "nf4"]
