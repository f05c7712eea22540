"""What Triton's interpreter makes of the kernels for packed weights; `test_triton_kernels` runs it.

The interpreter cuts fp32 off to bf16 where cards round, and multiplies bf16 wrongly: inputs are
fp16 here, and bf16 is checked before its rounding.
"""

import pytest
import torch
from torch import Tensor

from llmpq.quant import triton_kernels
from llmpq.quant.linear import GroupedLinear, RowLinear
from llmpq.quant.triton_kernels import Config, config_for, dequantize, multiply_few_rows, supports

assert triton_kernels.interpreted(), "set TRITON_INTERPRET=1"

CPU = torch.device("cpu")
CARDS = [(7, 5), (8, 0)]  # without tensor cores and with
# bits, outputs, inputs, group (None: the whole row)
WEIGHTS = [
    (3, 70, 512, 64),
    (3, 9, 768, 32),
    (3, 5, 100, None),
    (4, 130, 256, 64),
    (4, 33, 640, 128),
    (4, 9, 100, None),
    (8, 50, 200, None),
    (8, 7, 13, None),
]
ODD_GROUPS = [(3, 6, 24, 8), (3, 6, 36, 12), (4, 6, 40, 8)]


def layer_of(bits: int, out: int, columns: int, group: int | None, dtype: torch.dtype):
    """A layer of random codes whose grids reach both ends, one scale subnormal in fp16."""
    kind = RowLinear if bits == 8 else GroupedLinear
    layer = kind(columns, out, False, dtype, CPU, bits)
    torch.manual_seed(out + columns)
    codes = torch.randint(0, 2**bits, (out, columns), dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (out, columns // (group or columns)))
    scales = torch.rand(zeros.shape) * 0.02 + 0.001
    scales[0, 0] = 1.1e-6
    layer.adopt(codes, scales.bfloat16(), zeros.bfloat16())
    return layer


def parts(layer) -> tuple[Tensor, Tensor, Tensor, int]:
    packed = layer.codes if layer.bits == 8 else layer.packed
    return packed, layer.scales, layer.zeros, layer.bits


def config_of(layer, card: tuple[int, int]) -> Config:
    groups = layer.scales.shape[1] if layer.scales.dim() == 2 else 1
    assert supports(layer.bits, layer.in_features, groups)
    return config_for(
        card, torch.float16, layer.bits, layer.out_features, layer.in_features, groups
    )


@pytest.mark.parametrize("weight", WEIGHTS + ODD_GROUPS)
def test_dequantized_bit_for_bit(weight) -> None:
    for dtype in (torch.float16, torch.float32):
        layer = layer_of(*weight, dtype)
        got = dequantize(*parts(layer), layer.in_features, dtype)
        assert torch.equal(got, layer.dequantized_weight())
    # In fp32 nothing rounds, and one rounding of that is the weight in bf16.
    rounded = layer_of(*weight, torch.bfloat16).dequantized_weight()
    assert torch.equal(got.bfloat16(), rounded)


def test_some_rows_into_a_workspace() -> None:
    layer = layer_of(4, 33, 640, 128, torch.float16)
    workspace = torch.full((8 * 640,), torch.nan, dtype=torch.float16)
    some = dequantize(*parts(layer), 640, torch.float16, rows=slice(30, 33), out=workspace)
    assert some.data_ptr() == workspace.data_ptr()
    assert torch.equal(some, layer.dequantized_weight()[30:33])
    assert workspace[3 * 640 :].isnan().all()


# 1 to 33 rows over the weights, each with tensor cores and without.
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(
    ("weight", "rows"), list(zip(WEIGHTS, (3, 33, 16, 17, 5, 1, 31, 2), strict=True))
)
def test_products(weight, rows: int, card: tuple[int, int]) -> None:
    layer = layer_of(*weight, torch.float16)
    config = config_of(layer, card)
    assert config.program == ("multiply_by_dots" if card >= (8, 0) else "multiply_by_sums")
    x = torch.randn(rows, layer.in_features).half()
    bias = torch.randn(layer.out_features).half()
    got = multiply_few_rows(x, *parts(layer), bias, config)
    wanted = x.double() @ layer.dequantized_weight().double().t() + bias.double()
    assert ((got.double() - wanted).norm() / wanted.norm()).item() < 1e-3
    plain = multiply_few_rows(x, *parts(layer), config=config)
    assert torch.allclose(plain.float() + bias.float(), got.float(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("weight", [(3, 7, 2048, 128), (4, 7, 2048, 64), (8, 7, 1200, None)])
def test_a_row_is_the_same_in_any_company(weight, card: tuple[int, int]) -> None:
    """Over several chunks: alone, and as one of 33."""
    layer = layer_of(*weight, torch.float16)
    config = config_of(layer, card)
    assert config.chunks > 1
    x = torch.randn(33, layer.in_features).half()
    together = multiply_few_rows(x, *parts(layer), config=config)
    for row in (0, 20):
        alone = multiply_few_rows(x[row : row + 1], *parts(layer), config=config)
        assert torch.equal(alone[0], together[row])
    wanted = x.double() @ layer.dequantized_weight().double().t()
    assert ((together.double() - wanted).norm() / wanted.norm()).item() < 1e-3


def test_available() -> None:
    assert triton_kernels.available(CPU)
