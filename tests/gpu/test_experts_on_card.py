"""On one NVIDIA card: experts at once are as those one by one, and a graph can hold them."""

import pytest

torch = pytest.importorskip("torch")

from _kernels_experts import captured, exact, packed_experts  # noqa: E402
from _kernels_place import Place  # noqa: E402

pytestmark = pytest.mark.gpu

COUNT, PER_TOKEN, INNER, HIDDEN = 16, 4, 192, 256
MOST_ERROR = 0.02  # three products in 16 bits
ROWS = (1, 3, 33, 500)  # the last of these has blocks of many rows


def routed(place: Place, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, HIDDEN, generator=generator).to(place.device, place.dtype)
    chosen = torch.rand(rows, COUNT, generator=generator).topk(PER_TOKEN).indices
    scores = torch.rand(rows, PER_TOKEN, generator=generator)
    return x, chosen.to(place.device), scores.to(place.device, place.dtype)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["16", "8", "4", "3"])
@torch.inference_mode()
def test_experts_at_once_multiply_by_what_they_hold(device, dtype, precision) -> None:
    """On a CPU, and with bfloat16 on old cards, they run one after the other."""
    place = Place(device, dtype)
    experts = packed_experts(place, precision, COUNT, INNER, HIDDEN)
    for rows in ROWS:
        given = routed(place, rows)
        wanted = exact(experts, *given)
        assert error(experts(*given), wanted) < MOST_ERROR, rows
        assert error(experts.run_one_by_one(*given), wanted) < MOST_ERROR, rows


@pytest.mark.parametrize("precision", ["16", "8", "4", "3"])
@torch.inference_mode()
def test_a_graph_holds_experts_whatever_the_routing(card, precision) -> None:
    """Captured with one routing, and replayed with others."""
    if not pytest.importorskip("llmpq.quant.triton_kernels").available(card):
        pytest.skip("Triton's kernels do not run here")
    place = Place(card, torch.float16)
    experts = packed_experts(place, precision, COUNT, INNER, HIDDEN)
    assert not experts.waits_for(8)
    given = routed(place, 8)
    replay = captured(lambda: experts(*given))
    for chosen in (
        torch.arange(PER_TOKEN).expand(8, PER_TOKEN),
        torch.arange(COUNT - PER_TOKEN, COUNT).expand(8, PER_TOKEN),
        torch.rand(8, COUNT).topk(PER_TOKEN).indices,
    ):
        given[1].copy_(chosen)
        found = replay()
        assert torch.equal(found, experts(*given))
        assert error(found, exact(experts, *given)) < MOST_ERROR
