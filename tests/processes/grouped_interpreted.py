"""What Triton's interpreter makes of the kernels for all experts; `test_grouped_kernels` runs it.

As in `triton_kernels_interpreted`, inputs are fp16.
"""

import pytest
import torch
from grouped_twin import routing_table
from torch import Tensor

from llmpq.machine import Machine
from llmpq.models.experts import Expert, PackedExperts
from llmpq.models.linears import LinearMaker
from llmpq.quant import grouped
from llmpq.quant.grouped import (
    NOTHING,
    SCALED_INPUTS,
    SCALED_OUTPUTS,
    StackedWeight,
    config_for_experts,
    multiply_experts,
    sort_pairs,
)
from llmpq.quant.linear import GroupedLinear, RowLinear
from llmpq.quant.triton_kernels import interpreted

assert interpreted(), "set TRITON_INTERPRET=1"

CPU = torch.device("cpu")
CARDS = [(7, 5), (8, 0)]  # without tensor cores and with
EXPERTS = 5
# bits, outputs, inputs, group (None: the whole row)
WEIGHTS = [
    (3, 70, 512, 64),
    (4, 130, 256, 64),
    (4, 9, 100, None),
    (8, 50, 200, None),
    (16, 33, 104, None),
]


def routings() -> dict[str, Tensor]:
    """Experts `[T, k]` of each token."""
    torch.manual_seed(3)
    draw = [torch.randperm(EXPERTS)[:2] for _ in range(11)]
    return {
        "random": torch.stack(draw),
        "one token": torch.tensor([[3, 0]]),
        "all to one": torch.full((18, 1), 2),
        "each to all": torch.stack([torch.randperm(EXPERTS) for _ in range(4)]),
        "empty ones at the ends": torch.tensor([[1], [3], [1]]),
        "more pairs than are sorted at once": torch.randint(0, EXPERTS, (1100, 1)),
    }


@pytest.mark.parametrize("name", routings())
@pytest.mark.parametrize("block_rows", [16, 64])
def test_the_routing_table(name: str, block_rows: int) -> None:
    chosen = routings()[name]
    got, wanted = (
        sort_pairs(chosen, EXPERTS, block_rows),
        routing_table(chosen, EXPERTS, block_rows),
    )
    assert torch.equal(got.order, wanted.order)
    used = wanted.slots[2] > 0
    assert torch.equal(got.slots[2], wanted.slots[2])
    assert torch.equal(got.slots[:, used], wanted.slots[:, used])


def stacked(bits: int, out: int, columns: int, group: int | None) -> tuple[StackedWeight, Tensor]:
    """Random weights of all experts with biases, and the same in 64 bits `[E, out, in]`."""
    torch.manual_seed(out + columns)
    bias = torch.randn(EXPERTS, out).half()
    if bits == 16:
        weight = torch.randn(EXPERTS, out, columns).half()
        return StackedWeight(weight, None, None, bias, 16, columns), weight.double()
    kind = RowLinear if bits == 8 else GroupedLinear
    layers = []
    for _ in range(EXPERTS):
        layer = kind(columns, out, False, torch.float16, CPU, bits)
        codes = torch.randint(0, 2**bits, (out, columns), dtype=torch.uint8)
        zeros = torch.randint(0, 2**bits, (out, columns // (group or columns)))
        scales = torch.rand(zeros.shape) * 0.02 + 0.001
        layer.adopt(codes, scales.bfloat16(), zeros.bfloat16())
        layers.append(layer)
    buffers = (torch.stack([getattr(one, n) for one in layers]) for n in kind.weight_buffers)
    held = torch.stack([one.dequantized_weight() for one in layers]).double()
    return StackedWeight(*buffers, bias, bits, columns), held


def expected(x: Tensor, held: Tensor, bias: Tensor | None, chosen: Tensor) -> Tensor:
    """Rows by token, `[pairs, out]`, of inputs that are given by token too."""
    flat = chosen.reshape(-1)
    outputs = torch.einsum("pi,poi->po", x.double(), held[flat])
    return outputs if bias is None else outputs + bias[flat].double()


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(
    ("weight", "name", "block_rows"),
    [
        (WEIGHTS[0], "random", 16),
        (WEIGHTS[1], "all to one", 16),
        (WEIGHTS[1], "random", 64),
        (WEIGHTS[2], "each to all", 16),
        (WEIGHTS[3], "empty ones at the ends", 16),
        (WEIGHTS[4], "random", 16),
        (WEIGHTS[4], "one token", 64),
    ],
)
def test_products(weight, name: str, block_rows: int, card: tuple[int, int]) -> None:
    own, held = stacked(*weight)
    chosen = routings()[name]
    tokens, per_token = chosen.shape
    config = config_for_experts(card, own.bits, own.in_features, own.groups, block_rows)
    table = sort_pairs(chosen, EXPERTS, block_rows)
    x = torch.randn(tokens, own.in_features).half()
    of_pairs = x.repeat_interleave(per_token, 0)
    factors = torch.rand(tokens * per_token).half()
    scaled = of_pairs.double() * factors.double()[:, None]
    order = table.order.long()

    got = multiply_experts(x, own, table, True, factors, SCALED_INPUTS, config)
    assert error(got, expected(scaled, held, own.bias, chosen)[order]) < 1e-3
    got = multiply_experts(of_pairs[order], own, table, False, factors, SCALED_OUTPUTS, config)
    wanted = expected(of_pairs, held, own.bias, chosen) * factors.double()[:, None]
    assert error(got, wanted) < 1e-3
    plain = StackedWeight(own.packed, own.scales, own.zeros, None, own.bits, own.in_features)
    got = multiply_experts(x, plain, table, True, None, NOTHING, config)
    assert error(got, expected(of_pairs, held, None, chosen)[order]) < 1e-3


@pytest.mark.parametrize("card", CARDS)
def test_a_row_is_the_same_in_any_company(card: tuple[int, int]) -> None:
    own, _ = stacked(*WEIGHTS[1])
    chosen = routings()["random"]
    config = config_for_experts(card, own.bits, own.in_features, own.groups, 16)
    x = torch.randn(len(chosen), own.in_features).half()
    together = by_pair(x, chosen, own, config)
    for token in (0, 10):
        alone = by_pair(x[token : token + 1], chosen[token : token + 1], own, config)
        assert torch.equal(alone, together[2 * token : 2 * token + 2])


def by_pair(x: Tensor, chosen: Tensor, own: StackedWeight, config: grouped.Config) -> Tensor:
    """Products `[pairs, out]` by token."""
    table = sort_pairs(chosen, EXPERTS, 16)
    found = multiply_experts(x, own, table, True, config=config)
    return found[table.order.argsort()]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("precision", ["16", "8", "4", "3"])
def test_a_layer_of_experts(precision: str, card: tuple[int, int], monkeypatch) -> None:
    """The whole of it, beside its experts one after the other."""
    for module in ("quant.make", "models.grouped_experts"):
        machine = Machine("cuda", "float16", card, libraries=frozenset({"triton"}))
        monkeypatch.setattr(f"llmpq.{module}.machine_here", lambda *_, m=machine: m)
    monkeypatch.setattr("llmpq.quant.grouped.capability_of", lambda device: card)
    make, inner, hidden = LinearMaker(torch.float16, CPU), 48, 64

    def linear(out_features: int, in_features: int) -> torch.nn.Module:
        return make(precision, in_features, out_features, True, of_experts=True)

    experts = PackedExperts(
        Expert(
            linear(inner, hidden),
            linear(inner, hidden),
            linear(hidden, inner),
            lambda gate, up: torch.nn.functional.silu(gate) * up,
        )
        for _ in range(EXPERTS)
    )
    torch.manual_seed(1)
    for expert in experts:
        for one in expert.children():
            one.load_weight("weight", torch.randn(one.out_features, one.in_features) / 8)
            one.load_weight("bias", torch.randn(one.out_features))
    assert not experts.waits_for(11)
    assert experts.waits_for(65) == (card < (8, 0))
    for experts.scales_inputs in (False, True) if precision == "4" else (False,):
        for name in ("random", "one token"):
            chosen = routings()[name]
            x = torch.randn(len(chosen), hidden).half()
            scores = torch.rand(chosen.shape).half()
            wanted = experts.run_one_by_one(x, chosen, scores)
            assert error(experts(x, chosen, scores), wanted.double()) < 4e-3
