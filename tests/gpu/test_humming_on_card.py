"""Linears multiplied by humming's kernels on one NVIDIA card."""

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")

from llmpq import workspace  # noqa: E402
from llmpq.kernel_table import choices  # noqa: E402
from llmpq.quant import humming_support, machine_here  # noqa: E402
from llmpq.quant.humming import HummingLinear, grid_inputs, serve  # noqa: E402

pytestmark = pytest.mark.gpu
SHAPES = [(512, 1024), (520, 328), (130, 100)]
ROWS = (8, 64, 512)


@pytest.fixture(scope="module")
def card() -> Iterator["torch.device"]:
    """The card, where humming can be compiled for it."""
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := humming_support.why_not_here(device):
        pytest.skip(reason)
    yield device


def filled(card, bits, shape, dtype, batch_invariant=False):
    out_features, in_features = shape
    group = grid_inputs(bits, in_features, None)
    found = choices(machine_here(card, dtype), str(bits), out_features, in_features, group)
    if found[0].name != "humming":
        pytest.skip("humming does not serve this matrix here")
    generator = torch.Generator().manual_seed(bits)
    layer = HummingLinear(in_features, out_features, False, dtype, card, bits)
    layer.batch_invariant = batch_invariant
    layer.load_weight("weight", torch.randn(out_features, in_features, generator=generator) * 0.02)
    return layer


def served(layer):
    assert serve([layer], ROWS, layer.home) == {}
    return layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_multiply_by_the_weights_that_were_packed(card, bits, shape, dtype):
    layer = filled(card, bits, shape, dtype)
    weight = layer.dequantized_weight()
    served(layer)
    assert torch.equal(layer.dequantized_weight(), weight)
    for rows in (1, 8, 17, 64, 700):
        x = torch.randn(rows, shape[1], device=card, dtype=dtype)
        wanted = x.float() @ weight.float().t()
        assert (layer(x).float() - wanted).norm() < 1e-2 * wanted.norm(), rows


@pytest.mark.parametrize("bits", [4, 8])
def test_float16_answers_do_not_overflow_on_the_way(card, bits):
    """Codes times these inputs add up to more than the largest float16; the answers do not."""
    layer = served(filled(card, bits, (512, 1024), torch.float16))
    x = torch.full((4, 1024), 200.0, device=card, dtype=torch.float16)
    wanted = x.float() @ layer.dequantized_weight().float().t()
    assert torch.isfinite(layer(x)).all()
    assert (layer(x).float() - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_answers_may_be_made_independent_of_the_batch(card, bits):
    dtype = torch.float16
    layer = served(filled(card, bits, (512, 1024), dtype, batch_invariant=True))
    x = torch.randn(600, 1024, device=card, dtype=dtype)
    together = layer(x)
    for rows in (1, 8, 60):
        assert torch.equal(layer(x[:rows]), together[:rows])


def test_it_is_captured_in_a_graph(card):
    layer = served(filled(card, 4, (520, 328), torch.float16))
    x = torch.zeros(8, 328, device=card, dtype=torch.float16)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    wanted = x.float() @ layer.dequantized_weight().float().t()
    assert (out.float() - wanted).norm() < 1e-2 * wanted.norm()


def test_a_weight_is_held_once(card):
    layer = filled(card, 4, (4096, 4096), torch.float16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    served(layer)
    held = torch.cuda.memory_allocated() - before
    assert held < 4 * workspace.HUMMING_LOCKS + 2**20
