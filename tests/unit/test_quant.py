"""Quantized linears: what they hold, how far their weights are off, and how they multiply."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmpq import kernel_table, workspace
from llmpq.precision import PRECISIONS, group_size
from llmpq.quant import available_precisions, kernels, linear_factory, machine_here, quantize
from llmpq.quant.linear import GroupedLinear, RowLinear, TiledLinear
from llmpq.quant.packing import expand_nibbles, pack, squeeze_nibbles, unpack

CPU = torch.device("cpu")
BELOW_16 = ("8", "4", "3")
SHAPES = [(64, 64), (100, 172), (256, 704), (704, 256), (96, 192), (7, 64), (130, 72)]
SCALE_ROUNDING = 2**-7  # how much bf16 may raise a scale
needs_int4 = pytest.mark.skipif(not kernels.int4_tiles_work(), reason="no int4 kernel here")
needs_w8a8 = pytest.mark.skipif(not kernels.vnni_works(), reason="no VNNI here")
pytestmark = pytest.mark.usefixtures("one_thread")


def random_weight(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    """Weights whose rows and groups are not centred on zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    return (weight + torch.randn(out_features, 1, generator=generator)) * 0.02


def filled(precision: str, weight: Tensor, dtype=torch.float32, bias: Tensor | None = None):
    out_features, in_features = weight.shape
    layer = linear_factory(
        precision, in_features, out_features, bias=bias is not None, dtype=dtype, device=CPU
    )()
    layer.load_weight("weight", weight)
    if bias is not None:
        layer.load_weight("bias", bias)
    return layer


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


# Packing


@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 300),
    bits=st.sampled_from([3, 4, 8]),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=150)
def test_packing_round_trip_and_size(rows, cols, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, cols), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-cols // 8) * bits)
    assert torch.equal(unpack(packed, bits, cols), codes)


@pytest.mark.parametrize("cols", [32, 64, 704])
def test_tiles_round_trip_at_three_bits(cols):
    codes = torch.randint(0, 8, (192, cols), dtype=torch.uint8)
    tiles = squeeze_nibbles(kernels.tile_nibbles(codes), 3)
    assert tiles.nbytes == 192 * cols * 3 // 8
    assert torch.equal(kernels.untile_nibbles(expand_nibbles(tiles, 3), cols), codes)


@needs_int4
def test_our_tiles_are_those_of_torch():
    codes = torch.randint(0, 16, (192, 96), dtype=torch.uint8)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    assert torch.equal(kernels.tile_nibbles(codes).view(-1), theirs.view(-1))


# Rounding


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("rows", "cols", "group"), [(5, 256, 128), (3, 172, 172), (4, 64, 64)])
def test_no_weight_moves_by_more_than_half_a_scale(bits, rows, cols, group):
    weight = random_weight(rows, cols)
    codes, scales, zeros = quantize(weight, bits, group)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 2**bits
    assert torch.equal(zeros, zeros.round()) and zeros.min() >= 0 and zeros.max() < 2**bits
    scale = scales.float().repeat_interleave(group, 1)
    back = (codes.float() - zeros.float().repeat_interleave(group, 1)) * scale
    assert ((weight - back).abs() <= scale * (0.5 + 1e-4)).all()
    grouped = weight.view(rows, -1, group)
    span = grouped.amax(-1).clamp(min=0) - grouped.amin(-1).clamp(max=0)
    ratio = scales.float() * (2**bits - 1) / span
    assert (ratio >= 1 - 1e-6).all() and (ratio <= 1 + SCALE_ROUNDING).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -3e-5, 1e-42, 1e30])
def test_constant_groups_are_safe(value):
    weight = torch.full((2, 128), value)
    codes, scales, zeros = quantize(weight, 4, 128)
    back = (codes.float() - zeros.float()) * scales.float()
    assert torch.isfinite(back).all()
    assert torch.allclose(back, weight, rtol=SCALE_ROUNDING, atol=1e-37)


def test_a_zero_is_centred_where_that_is_cheap():
    weight = torch.stack((torch.linspace(-1, 1.2, 64), torch.linspace(-0.1, 2, 64)))
    codes, scales, zeros = quantize(weight, 8, 64, centre_up_to=1.5)
    assert zeros[0] == 128 and zeros[1] < 128
    assert ((codes.float() - zeros.float()) * scales.float() - weight).abs().max() <= scales.max()
    tight = quantize(weight, 8, 64)[1]
    assert tight[0] < scales[0] <= 1.5 * tight[0] and tight[1] == scales[1]


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "16"])
def test_weights_that_are_not_finite_are_refused(precision):
    if precision not in available_precisions(CPU, torch.float32):
        pytest.skip("not available here")
    weight = random_weight(64, 64)
    weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        filled(precision, weight)


def test_rounding_takes_no_second_copy_of_the_weight():
    """The largest tensor made on the way is at most the packed weight of 8 bits."""
    weight = torch.randn(4096, 1024).to(torch.bfloat16)
    largest = 0
    raw = weight.untyped_storage().data_ptr()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != raw:
                largest = max(largest, out.nbytes)
            return out

    for precision in BELOW_16:
        layer = linear_factory(
            precision, 1024, 4096, bias=False, dtype=torch.bfloat16, device=CPU
        )()
        largest = 0
        with Watch():
            layer.load_weight("weight", weight)
        assert 0 < largest <= weight.nbytes // 2, precision


# Layers


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layers_hold_the_bytes_that_plans_count(out_features, in_features, dtype):
    weight = random_weight(out_features, in_features)
    for precision in available_precisions(CPU, dtype):
        if precision == "16" and dtype == torch.float32:
            continue  # "16" is the model's own dtype
        layer = filled(precision, weight, dtype)
        expected = PRECISIONS[precision].weight_bytes(out_features, in_features)
        assert layer.weight_bytes == expected, precision


def test_nothing_is_held_before_the_weight_is_loaded():
    for precision in available_precisions(CPU, torch.bfloat16):
        layer = linear_factory(precision, 64, 64, bias=True, dtype=torch.bfloat16, device=CPU)()
        assert layer.weight_bytes == 0
        assert all(p.is_meta for p in itertools.chain(layer.parameters(), layer.buffers()))


def test_layers_do_not_keep_the_raw_tensor():
    for precision in available_precisions(CPU, torch.bfloat16):
        weight, bias = random_weight(64, 64).to(torch.bfloat16), torch.ones(64).to(torch.bfloat16)
        layer = filled(precision, weight, torch.bfloat16, bias)
        before = layer(torch.ones(2, 64).to(torch.bfloat16))
        weight.zero_(), bias.zero_()
        assert torch.equal(layer(torch.ones(2, 64).to(torch.bfloat16)), before)


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fewer_bits_err_more(out_features, in_features, dtype):
    weight = random_weight(out_features, in_features)
    errors = [
        relative_error(filled(p, weight, dtype).dequantized_weight(), weight) for p in BELOW_16
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.02 and errors[-1] < 0.4


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantized_weight_is_codes_times_scales(bits, dtype):
    """Tiles and plain nibbles stand for exactly the same weight."""
    weight = random_weight(128, 256)
    codes, scales, zeros = quantize(weight, bits, group_size(bits, 256))
    steps = codes.float() - zeros.float().repeat_interleave(128, 1)
    expected = (steps * scales.float().repeat_interleave(128, 1)).to(dtype)
    assert torch.equal(filled(str(bits), weight, dtype).dequantized_weight(), expected)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (40,), (2, 3, 20), (300,), (0,)])
@pytest.mark.parametrize(("out_features", "in_features"), [(256, 704), (100, 172), (130, 72)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_matches_the_dequantized_weight(shape, out_features, in_features, with_bias):
    weight = random_weight(out_features, in_features)
    bias = torch.randn(out_features) if with_bias else None
    x = torch.randn(*shape, in_features)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for precision in ("16", *BELOW_16):
            layer = filled(precision, weight, dtype, bias)
            out = layer(x.to(dtype))
            wanted = x.to(dtype).float() @ layer.dequantized_weight().float().t()
            wanted = wanted if bias is None else wanted + bias.to(dtype).float()
            assert out.shape == wanted.shape and out.dtype == dtype
            if out.numel():
                assert relative_error(out, wanted) < tolerance, (precision, dtype)


def test_many_chunks_match_one(monkeypatch):
    weight, x = random_weight(320, 256), torch.randn(100, 256)
    for precision in BELOW_16:
        for dtype in (torch.float32, torch.bfloat16):
            whole = filled(precision, weight, dtype)
            small = 128 * 256
            monkeypatch.setattr(workspace, "CPU_PART_WEIGHTS", small)
            monkeypatch.setattr(workspace, "EXPANDED_WEIGHTS", small)
            parts = filled(precision, weight, dtype)
            assert torch.equal(parts.dequantized_weight(), whole.dequantized_weight())
            in_parts = [parts(rows.to(dtype)) for rows in (x[:2], x)]
            monkeypatch.undo()
            for got, rows in zip(in_parts, (x[:2], x), strict=True):
                assert relative_error(got, whole(rows.to(dtype))) < 5e-3


@needs_int4
def test_tiles_where_they_fit_and_plain_nibbles_elsewhere(monkeypatch):
    def kind(out_features, in_features, dtype=torch.bfloat16):
        return type(
            linear_factory("4", in_features, out_features, bias=False, dtype=dtype, device=CPU)()
        )

    assert kind(256, 704) is TiledLinear
    assert kind(100, 704) is GroupedLinear  # not whole tiles
    assert kind(64, 172) is GroupedLinear  # a group the kernel does not know
    assert kind(256, 704, torch.float32) is GroupedLinear
    monkeypatch.setattr(kernels, "int4_tiles_work", lambda: False)
    assert kind(256, 704) is GroupedLinear


@pytest.mark.parametrize("precision", ["4", "3"])
@needs_int4
def test_tiled_kernel_keeps_its_zeros_accurate(precision):
    """bf16 zero points cost far less than rounding the weights, whatever the input's mean."""
    weight = random_weight(256, 1024)
    layer = filled(precision, weight, torch.bfloat16)
    exact = filled(precision, weight, torch.float32).dequantized_weight()
    for x in (torch.randn(8, 1024), torch.randn(8, 1024).relu()):
        x = x.to(torch.bfloat16)
        rounding = relative_error(x.float() @ exact.t(), x.float() @ weight.t())
        assert relative_error(layer(x), x.float() @ exact.t()) < max(0.2 * rounding, 5e-3)


def test_int8_kernel_is_accurate_on_inputs_that_are_never_negative():
    weight = torch.randn(256, 2048, generator=torch.Generator().manual_seed(0)) * 0.02
    x = torch.randn(4, 2048).relu().to(torch.bfloat16)
    layer, exact = filled("8", weight, torch.bfloat16), filled("8", weight)
    assert relative_error(layer(x), x.float() @ exact.dequantized_weight().t()) < 5e-3


def test_int8_kernel_is_never_given_rows_it_overruns():
    """torch's kernel reads (and can crash) past rows that are no multiple of 16."""
    for in_features, suits in ((704, True), (172, True), (72, False)):  # 172 are padded to 176
        layer = filled("8", random_weight(8, in_features), torch.bfloat16)
        assert isinstance(layer, RowLinear)
        assert (layer.kernel(1) == kernel_table.INT8_READ) == suits


def few_row_kernels():
    """The kernels of the table that this CPU has for few rows."""
    kernels_here = (k for k in kernel_table.TABLE if k.kind == "cpu" and k.max_rows is not None)
    return [k for k in kernels_here if k.why_not_here(machine_here(CPU, torch.bfloat16)) is None]


@pytest.mark.parametrize("kernel", few_row_kernels(), ids=lambda k: f"{k.name}, {k.precision}")
def test_layers_call_the_kernels_of_the_table_for_few_rows(kernel, monkeypatch):
    """They do not unpack the weight instead, which gives the same result, but slower."""
    monkeypatch.delattr(kernels, "linear_by_chunks")
    layer = filled(kernel.precision, random_weight(256, 704), torch.bfloat16)
    assert layer.kernel(kernel.max_rows) == kernel.name
    x = torch.randn(kernel.max_rows, 704).to(torch.bfloat16)
    assert relative_error(layer(x), x.float() @ layer.dequantized_weight().float().t()) < 1e-2


@needs_w8a8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_w8a8_rows_do_not_see_each_other(dtype):
    layer = filled("8-w8a8", random_weight(256, 704), dtype, torch.randn(256))
    x = torch.randn(70, 704).to(dtype)
    x[5] *= 1000
    x[7] = 0
    together = layer(x)
    for row in (0, 5, 7, 69):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])
    assert torch.equal(layer(x[3:20]), together[3:20])
    assert torch.equal(layer(x.view(2, 35, 704)).view(70, 256), together)


@needs_w8a8
def test_w8a8_is_near_the_exact_product():
    weight = random_weight(100, 172)
    layer = filled("8-w8a8", weight)
    assert relative_error(layer.dequantized_weight(), weight) < 0.01
    x = torch.randn(33, 172)
    assert relative_error(layer(x), x @ layer.dequantized_weight().t()) < 0.02


@pytest.mark.parametrize("num_rows", [1, 20, 100])
def test_same_input_same_bits(num_rows):
    weight, x = random_weight(256, 704), torch.randn(num_rows, 704)
    for dtype in (torch.bfloat16, torch.float32):
        for precision in available_precisions(CPU, dtype):
            first, second = filled(precision, weight, dtype), filled(precision, weight, dtype)
            wanted = first(x.to(dtype))
            assert torch.equal(wanted, first(x.to(dtype)))
            assert torch.equal(wanted, second(x.to(dtype)))


# Asking for what is not there


def test_unavailable_precisions_say_what_would_work():
    with pytest.raises(ValueError, match="'5'.*use one of 16, 8"):
        linear_factory("5", 64, 64, bias=False, dtype=torch.bfloat16, device=CPU)()
    cuda = torch.device("cuda")
    assert available_precisions(cuda, torch.float16) == ("16", "8", "4", "3")
    with pytest.raises(ValueError, match="use one of 16, 8, 4, 3"):
        linear_factory("8-w8a8", 64, 64, bias=False, dtype=torch.float16, device=cuda)()


@pytest.mark.parametrize("precision", ["16", "4"])
def test_tensors_without_a_place_are_refused(precision):
    layer = linear_factory(precision, 64, 32, bias=False, dtype=torch.float32, device=CPU)()
    with pytest.raises(ValueError, match=r"\(64, 32\).*\(32, 64\)"):
        layer.load_weight("weight", torch.zeros(64, 32))
    for name in ("bias", "running_mean"):
        with pytest.raises(ValueError, match=name):
            layer.load_weight(name, torch.zeros(32))
