"""Rounding for the least error: cut grids, and codes chosen with second moments."""

import pytest
import torch
from torch import Tensor

from llmpq.quant import gptq, linear_factory
from llmpq.quant.gptq import Gptq
from llmpq.quant.rounding import quantize, quantize_mse

CPU = torch.device("cpu")


def random_weight(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Weights with some far out, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    return (weight + 0.2 * weight**3) * 0.02


def random_moments(cols: int, blocks: int = 1, seed: int = 0) -> Tensor:
    """Of inputs that correlate and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    size = cols // blocks
    mix = torch.randn(blocks, size, size // 4, generator=generator)
    noise = torch.rand(blocks, size, generator=generator) ** 3
    return mix @ mix.transpose(1, 2) / size + torch.diag_embed(noise)


def back(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    group = codes.shape[1] // scales.shape[1]
    steps = codes.float() - zeros.float().repeat_interleave(group, 1)
    return steps * scales.float().repeat_interleave(group, 1)


def row_losses(weight: Tensor, found: tuple[Tensor, Tensor, Tensor], moments: Tensor) -> Tensor:
    """`d H d^T` of every row, in fp64."""
    off = (weight.float() - back(*found)).double()
    return ((off @ torch.block_diag(*moments.double())) * off).sum(dim=1)


# Cut grids


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [64, 128, 192])
@pytest.mark.parametrize("centre_up_to", [1.0, 1.5])
def test_a_cut_grid_never_errs_more_than_one_that_covers_all(bits, group, centre_up_to):
    weight = random_weight(20, 384).to(torch.bfloat16)
    plain = back(*quantize(weight, bits, group, centre_up_to))
    found = quantize_mse(weight, bits, group, centre_up_to)
    errors = [
        (weight.float() - tried).view(20, -1, group).square().sum(-1)
        for tried in (plain, back(*found))
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    if bits < 8:
        assert errors[1].sum() < 0.97 * errors[0].sum()


def test_a_cut_grid_is_a_grid():
    codes, scales, zeros = quantize_mse(random_weight(9, 256), 3, 64)
    assert codes.dtype == torch.uint8 and scales.dtype == zeros.dtype == torch.bfloat16
    assert int(codes.max()) < 8 and (zeros >= 0).all() and (zeros < 8).all()
    assert torch.equal(zeros, zeros.round()) and (scales > 0).all()


def test_important_columns_err_less():
    weight = random_weight(30, 128)
    importance = torch.ones(128)
    importance[:20] = 1000.0
    errors = [
        (weight - back(*quantize_mse(weight, 3, 128, importance=which)))[:, :20].square().sum()
        for which in (importance, None)
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("value", [0.0, 1.0, -3e-5, 1e-42, 1e30])
def test_constant_groups_are_safe(value):
    weight = torch.full((2, 128), value)
    assert torch.allclose(back(*quantize_mse(weight, 4, 64)), weight, rtol=2**-7, atol=1e-37)
    by_gptq = back(*Gptq(random_moments(128))(weight, 4, 64))  # makes up for the scale's rounding
    assert torch.allclose(by_gptq, weight, rtol=2 / 15, atol=1e-37)


# GPTQ


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(
    ("cols", "group", "blocks"), [(256, 128, 1), (192, 64, 1), (172, 172, 1), (256, 64, 4)]
)
def test_no_row_moves_its_output_more_than_by_rounding_to_nearest(bits, cols, group, blocks):
    weight, moments = random_weight(70, cols), random_moments(cols, blocks)
    plain = row_losses(weight, quantize(weight, bits, group), moments)
    losses = row_losses(weight, Gptq(moments)(weight, bits, group), moments)
    assert (losses <= plain * (1 + 1e-5)).all()
    assert losses.sum() < 0.6 * plain.sum()


def test_every_step_helps():
    weight, moments = random_weight(64, 256), random_moments(256)
    importance = moments[0].diagonal()
    tried = [
        quantize(weight, 3, 128),
        quantize_mse(weight, 3, 128, importance=importance),
        *(Gptq(moments, sweeps=sweeps)(weight, 3, 128) for sweeps in (0, 1, 2)),
    ]
    losses = [float(row_losses(weight, found, moments).sum()) for found in tried]
    assert losses == sorted(losses, reverse=True)


def test_rows_keep_codes_to_nearest_where_those_are_better():
    """A weight that is on the grid already cannot gain, whatever the moments."""
    codes = torch.randint(0, 8, (5, 64), generator=torch.Generator().manual_seed(0))
    codes[:, 0], codes[:, 1] = 0, 7
    weight = (codes - 3.0) * 0.5
    found = Gptq(random_moments(64))(weight, 3, 64)
    assert torch.equal(back(*found), weight)


@pytest.mark.parametrize(("step", "threads"), [(1, 1), (30, 1), (64, 2)])
def test_codes_do_not_depend_on_how_rows_are_cut_or_on_threads(step, threads, monkeypatch):
    weight, moments = random_weight(70, 192).to(torch.bfloat16), random_moments(192)
    wanted = Gptq(moments)(weight, 3, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    monkeypatch.setattr(gptq, "ROWS", 48)
    rounding = Gptq(moments)
    parts = [rounding(weight[start : start + step], 3, 64) for start in range(0, 70, step)]
    torch.set_num_threads(before)
    for got, whole in zip(zip(*parts, strict=True), wanted, strict=True):
        assert torch.equal(torch.cat(got), whole)


def test_grids_are_those_of_the_format():
    found = Gptq(random_moments(128))(random_weight(40, 128), 3, 64)
    codes, scales, zeros = found
    assert codes.dtype == torch.uint8 and int(codes.max()) < 8
    assert scales.dtype == zeros.dtype == torch.bfloat16 and (scales > 0).all()
    assert torch.equal(zeros, zeros.round()) and (zeros >= 0).all() and (zeros < 8).all()


def test_eight_bits_are_rounded_to_nearest():
    weight = random_weight(8, 64)
    ours, plain = (which(weight, 8, 64, 1.5) for which in (Gptq(random_moments(64)), quantize))
    assert all(map(torch.equal, ours, plain))


@pytest.mark.parametrize("kind", ["zero", "dead", "rank one", "slightly negative"])
def test_poor_moments_are_damped_until_they_serve(kind):
    weight, moments = random_weight(20, 64), random_moments(64)
    if kind == "zero":
        moments.zero_()
    elif kind == "dead":
        moments[:, :10], moments[:, :, :10] = 0, 0
    elif kind == "rank one":
        moments[:] = 1.0
    else:
        moments[0] -= 0.05 * torch.eye(64)
    found = Gptq(moments)(weight, 4, 64)
    assert torch.isfinite(back(*found)).all()


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (torch.ones(64, 64), r"\[64, 64\].*\[blocks, B, B\]"),
        (torch.ones(1, 32, 32), "32 inputs, but the weight has 64"),
        (torch.full((1, 64, 64), float("nan")), "NaN"),
        (torch.eye(32).repeat(2, 1, 1), "block size 32 .* group size 64"),
    ],
)
def test_moments_that_do_not_fit_are_refused(moments, message):
    with pytest.raises(ValueError, match=message):
        Gptq(moments)(random_weight(3, 64), 4, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["4", "3"])
def test_a_layer_rounds_by_gptq_and_moves_its_output_less(precision, dtype):
    inputs = torch.randn(500, 256) @ torch.randn(256, 256).mul_(0.1).add_(torch.eye(256))
    weight, moments = random_weight(128, 256), (inputs.t() @ inputs / 500)[None]
    outputs = []
    for rounding in (quantize, Gptq(moments)):
        layer = linear_factory(precision, 256, 128, bias=False, dtype=dtype, device=CPU)()
        layer.load_weight("weight", weight, rounding)
        off = layer.dequantized_weight().float() - weight
        outputs.append((inputs @ off.t()).norm())
    assert outputs[1] < 0.8 * outputs[0]
