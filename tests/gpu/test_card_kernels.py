"""On one NVIDIA card: every linear multiplies by the weight that it holds."""

import pytest

torch = pytest.importorskip("torch")

from llmpq.quant import make_linear  # noqa: E402

pytestmark = pytest.mark.gpu


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(256, 192), (640, 512)], ids=str)
@pytest.mark.parametrize("precision", ["16", "8", "4", "3"])
def test_linears_multiply_by_what_they_hold(device, precision, shape, dtype) -> None:
    in_features, out_features = shape
    linear = make_linear(
        precision, in_features, out_features, bias=True, dtype=dtype, device=device
    )
    generator = torch.Generator().manual_seed(0)
    linear.swallow("weight", torch.randn(out_features, in_features, generator=generator))
    linear.swallow("bias", torch.randn(out_features, generator=generator))
    held, bias = linear.dequantized_weight().double(), linear.bias.double()
    for rows in (1, 5, 16, 64, 200):
        x = torch.randn(rows, in_features, generator=generator).to(device, dtype)
        assert relative_error(linear(x), x.double() @ held.t() + bias) < 0.01, rows
