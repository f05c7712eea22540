"""Times of a layer's routed experts: all at once, beside one after the other.

The experts are `PackedExperts` with random weights and random routing. At once they run as a CUDA
graph, as in a decode step; one after the other they cannot. The bytes of a row are those of the
different experts that its tokens use, which is what memory bandwidth limits.
"""

from collections.abc import Iterator
from functools import partial

import torch
from _kernels_alone import WEIGHT_SCALE, Duel
from _kernels_linears import Shape
from _kernels_place import Call, Place

from llmpq.models.experts import Expert, PackedExperts
from llmpq.models.linears import LinearMaker

EXPERT_SHAPE: Shape = (1024, 2048)  # of gate and up: inner, hidden
TINY_SHAPE: Shape = (64, 128)  # where a CPU stands in for a card
EXPERTS, PER_TOKEN, TINY_EXPERTS = 64, 8, 16
ROWS = (1, 4, 16, 64)
PRECISIONS = ("4", "8", "16")


def expert_duels(place: Place, shape: Shape) -> Iterator[Duel]:
    """Each number of tokens at each precision. On a CPU both ways are one after the other."""
    inner, hidden = shape if place.on_card else TINY_SHAPE
    count = EXPERTS if place.on_card else TINY_EXPERTS
    for precision in PRECISIONS:
        experts = packed_experts(place, precision, count, inner, hidden)
        for rows in ROWS:
            x = torch.randn(rows, hidden, device=place.device).to(place.dtype)
            chosen = torch.rand(rows, count, device=place.device).topk(PER_TOKEN).indices
            scores = torch.rand(rows, PER_TOKEN, device=place.device).to(place.dtype)
            given = x, chosen, scores
            run = partial(experts, *given)
            is_graph = place.on_card and not experts.waits_for(rows)
            yield Duel(
                f"experts at once, {precision} bits",
                f"{count} of {inner} x {hidden}, {PER_TOKEN} for each of {rows} rows",
                captured(run) if is_graph else run,
                bytes_used(experts, chosen),
                "one after the other",
                partial(experts.run_one_by_one, *given),
                exact(experts, *given),
            )


def packed_experts(
    place: Place, precision: str, count: int, inner: int, hidden: int
) -> PackedExperts:
    """Experts with random weights, in the layout that kernels for all of them read."""
    make = LinearMaker(place.dtype, place.device)

    def linear(out_features: int, in_features: int) -> torch.nn.Module:
        return make(precision, in_features, out_features, False, of_experts=True)

    experts = PackedExperts(
        Expert(
            linear(inner, hidden),
            linear(inner, hidden),
            linear(hidden, inner),
            lambda gate, up: torch.nn.functional.silu(gate) * up,
        )
        for _ in range(count)
    )
    for expert in experts:
        for one in expert.children():
            weight = torch.randn(one.out_features, one.in_features, device=place.device)
            one.load_weight("weight", weight.mul_(WEIGHT_SCALE).to(place.dtype))
    return experts


def captured(call: Call) -> Call:
    """A call as a CUDA graph, whose result the next call overwrites."""
    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def bytes_used(experts: PackedExperts, chosen: torch.Tensor) -> int:
    """The bytes of the weights of the different experts that are used."""
    one = sum(linear.weight_bytes for linear in experts[0].children())
    return len(chosen.unique()) * one


def exact(
    experts: PackedExperts, x: torch.Tensor, chosen: torch.Tensor, scores: torch.Tensor
) -> torch.Tensor:
    """The weighted sums in 32 bits, with the weights that are held."""
    total = torch.zeros_like(x, dtype=torch.float32)
    for index in chosen.unique().tolist():
        token, slot = (chosen == index).nonzero(as_tuple=True)
        gate, up, down = (
            linear.dequantized_weight().float() for linear in experts[index].children()
        )
        rows = x[token].float()
        inner = torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)
        total.index_add_(0, token, inner @ down.T * scores[token, slot].float()[:, None])
    return total
