"""Experts that are multiplied at once compute what they compute one after the other.

A twin in plain torch stands for the Triton kernels (`grouped_twin`); what these compute is tested
against the same tables in `tests/processes/test_grouped_kernels.py`.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_experts import EXPERTS, HIDDEN, blocks_of, layer_of, matrices
from test_experts import KINDS as SIZES_OF
from test_routed_experts import SPARSE
from torch import nn
from transformers import MixtralConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "processes"))

import grouped_twin  # noqa: E402

from llmpq.checkpoint.checkpoint import RandomWeights  # noqa: E402
from llmpq.checkpoint.loader import load_stage  # noqa: E402
from llmpq.checkpoint.packed_cache import PackedCache  # noqa: E402
from llmpq.costs import peak  # noqa: E402
from llmpq.evaluation.calibration import CalibrationMeter  # noqa: E402
from llmpq.expert_kernels import expert_bytes, most_tokens  # noqa: E402
from llmpq.machine import card  # noqa: E402
from llmpq.model_spec import Experts, LinearShape, ModelSpec  # noqa: E402
from llmpq.models.experts import PackedExperts, expert_blocks, pack_experts  # noqa: E402
from llmpq.models.linears import LinearMaker  # noqa: E402
from llmpq.models.live_tensors import PeakMemory  # noqa: E402
from llmpq.models.raw_tensors import held_bytes  # noqa: E402
from llmpq.models.stage_model import LayerRange, StageModel  # noqa: E402
from llmpq.quant import AdoptedLinear, PackedWeight, keep_codes  # noqa: E402
from llmpq.quant.linear import GroupedLinear  # noqa: E402

CPU = torch.device("cpu")
KINDS = ("Mixtral", "Qwen2Moe", "GptOss", "Llama4", "GraniteMoe")


@pytest.fixture(autouse=True)
def as_on_a_card(monkeypatch):
    """The CPU takes the place of an Ampere card with Triton, and the twin that of its kernels."""
    for module in ("quant.make", "quant.base", "quant.adopted", "models.grouped_experts"):
        monkeypatch.setattr(
            f"llmpq.{module}.machine_here", lambda *_: card("8.0", ["triton"]), raising=True
        )
    monkeypatch.setattr("llmpq.quant.grouped.launch", grouped_twin.launch)
    monkeypatch.setattr("llmpq.quant.grouped.capability_of", lambda device: (8, 0))


@pytest.fixture
def one_by_one(monkeypatch):
    """Linears that multiply for one expert use torch alone, as the CPU has no other kernels."""
    monkeypatch.setattr("llmpq.quant.base.machine_here", lambda *_: card("8.0", []))


def packed(layer: nn.Module, precision: str, dtype: torch.dtype) -> PackedExperts:
    """Replaces the experts of a layer by loaded linears."""
    ((path, stacked),) = list(expert_blocks(layer))
    make, weights = LinearMaker(dtype, CPU), matrices(stacked)

    def empty(name: str, *sizes) -> nn.Module:
        return make(precision, *sizes, of_experts=True)

    pack_experts(layer, empty)
    (found,) = [m for m in layer.modules() if isinstance(m, PackedExperts)]
    for index, expert in enumerate(found):
        for own, tensors in weights.items():
            for attribute, tensor in tensors.items():
                getattr(expert, own).load_weight(attribute, tensor[index])
    return found


def routings(tokens: int) -> dict[str, torch.Tensor]:
    """Experts `[T, k]` of each token."""
    torch.manual_seed(tokens)
    two = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(tokens)])
    return {
        "random": two,
        "all to one": torch.full((tokens, 1), EXPERTS - 1),
        "to all": torch.stack([torch.randperm(EXPERTS) for _ in range(tokens)]),
        "some without": torch.tensor([[1, 3]]).expand(tokens, 2).contiguous(),
    }


def both_ways(
    experts: PackedExperts, x: torch.Tensor, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of the experts at once, and one after the other."""
    scores = torch.rand(chosen.shape).to(x.dtype)
    assert not experts.waits_for(len(x))
    at_once = experts(x, chosen, scores)
    return at_once, experts.run_one_by_one(x, chosen, scores)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["16", "8", "4", "3"])
def test_at_once_or_one_after_the_other(kind, precision, one_by_one):
    """All routings, of one token, and of enough for blocks of many rows."""
    layer = layer_of(kind)
    experts = packed(layer, precision, torch.float16)
    for tokens in (1, 3, 130):
        x = torch.randn(tokens, HIDDEN).half() / 4
        for name, chosen in routings(tokens).items():
            at_once, single = both_ways(experts, x, chosen)
            assert at_once.shape == single.shape and at_once.dtype == single.dtype
            error = (at_once - single).float().norm() / single.float().norm()
            assert error < 4e-3, (tokens, name, float(error))


def test_a_whole_block_computes_what_transformers_does():
    layer = layer_of("GptOss")
    (block,) = blocks_of(layer)
    x = torch.randn(3, 7, HIDDEN)
    expected = block(x)[0]
    experts = packed(layer, "16", torch.float16)
    assert not experts.waits_for(21)
    got = layer.mlp.half()(x.half())[0]
    assert (got - expected).norm() / expected.norm() < 4e-3


def test_a_token_does_not_depend_on_those_beside_it():
    experts = packed(layer_of("Mixtral"), "4", torch.float16)
    x, chosen = torch.randn(9, HIDDEN).half(), routings(9)["random"]
    scores = torch.rand(9, 2).half()
    together = experts(x, chosen, scores)
    for token in range(9):
        some = slice(token, token + 1)
        alone = experts(x[some], chosen[some], scores[some])
        torch.testing.assert_close(alone[0], together[token], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("precision", ["16", "8", "4", "3"])
def test_weights_of_all_experts_are_held_once_and_by_name(precision):
    """Each linear holds a view: its bytes are its own, and nothing else is held."""
    experts = packed(layer_of("GptOss"), precision, torch.float16)
    assert not experts.waits_for(1)
    linears = [linear for expert in experts for linear in expert.children()]
    seen: set[int] = set()
    total = sum(held_bytes(linear, seen) for linear in linears)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for linear in linears
        for tensor in (*linear.parameters(), *linear.buffers())
    }
    assert sum(storages.values()) == total
    names = ("weight", "bias") if precision == "16" else (*linears[0].weight_buffers, "bias")
    assert len(storages) == 2 * len(names)  # of gate and up together, and of down


def test_hooks_on_linears_see_inputs_where_experts_are_kept_one_by_one():
    config = MixtralConfig(**SIZES_OF["Mixtral"])
    where = torch.float16, CPU
    stage = StageModel(config, LayerRange(0, 1, 1), ["16"], *where)
    experts = stage.own_layers[0].mlp.experts
    for linear in stage.linears().values():
        linear.load_weight("weight", torch.randn(linear.out_features, linear.in_features))
    x, chosen = torch.randn(4, HIDDEN).half(), routings(4)["to all"]
    meter = CalibrationMeter(stage)
    experts(x, chosen, torch.rand(chosen.shape).half())
    seen = [name for name, count in meter._tokens.items() if count]
    assert len([name for name in meter.keys if ".experts." in name]) == 3 * EXPERTS and seen


def test_moved_weights_are_looked_for_anew():
    experts = packed(layer_of("Mixtral"), "16", torch.float16)
    assert not experts.waits_for(1)
    experts.to(torch.bfloat16)
    assert experts.waits_for(1), "every linear has a weight of its own now"


def test_experts_that_differ_run_one_after_the_other():
    layer = layer_of("Mixtral")
    make = LinearMaker(torch.float16, CPU)

    def mixed(name: str, *sizes) -> nn.Module:
        return make("4" if name.endswith("3.up_proj") else "16", *sizes, of_experts=True)

    pack_experts(layer, mixed)
    assert layer.mlp.experts.waits_for(1) and layer.mlp.experts[0].up_proj.place is None


def codes_of(linear: GroupedLinear, group: int, dtype: torch.dtype) -> PackedWeight:
    shape = linear.out_features, linear.in_features
    grids = shape[0], shape[1] // group
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    zeros = torch.randint(0, 16, grids, dtype=torch.uint8)
    return PackedWeight(4, codes, (torch.rand(grids) + 0.1).to(dtype), zeros)


def empty_linear(inputs: int, place: bool) -> GroupedLinear:
    from llmpq.quant.grouped import ExpertStack

    linear = LinearMaker(torch.float16, CPU)("4", inputs, 8, False, of_experts=True)
    linear.place = ExpertStack(2, CPU).place(0) if place else None
    return linear


@pytest.mark.parametrize("group", [32, 64])
def test_codes_of_a_checkpoint_are_held_among_those_of_all_experts(group, one_by_one):
    linear = empty_linear(128, place=True)
    weight = codes_of(linear, group, torch.float16)
    assert keep_codes(linear, weight) is linear
    assert torch.equal(linear.dequantized_weight(), weight.dequantized())
    assert isinstance(keep_codes(empty_linear(128, place=False), weight), AdoptedLinear)
    other = codes_of(linear, group, torch.bfloat16)
    assert isinstance(keep_codes(empty_linear(128, place=True), other), AdoptedLinear)


def test_grids_that_no_kernel_reads_are_not():
    weight = codes_of(empty_linear(40, place=True), 8, torch.float16)
    assert isinstance(keep_codes(empty_linear(40, place=True), weight), AdoptedLinear)


@pytest.mark.parametrize("precision", ["8", "4", "3"])
def test_a_restored_weight_is_among_those_of_all_experts(precision):
    """As the cache of packed weights restores it."""
    source, target = (packed(layer_of("Mixtral"), precision, torch.float16) for _ in range(2))
    for expert in target:
        for linear in expert.children():
            for name in linear.weight_buffers:
                getattr(linear, name).zero_()
    for one, other in zip(source, target, strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):
            state = {k: v.clone() for k, v in getattr(one, name).packed_state().items()}
            getattr(other, name).restore(state)
    assert not target.waits_for(1)
    x, chosen = torch.randn(5, HIDDEN).half(), routings(5)["random"]
    scores = torch.rand(5, 2).half()
    assert torch.equal(target(x, chosen, scores), source(x, chosen, scores))


@pytest.mark.parametrize("capability", ["7.0", "7.5", "8.0", "9.0"])
@pytest.mark.parametrize("precision", ["16", "8", "4", "3"])
def test_runtime_and_planner_decide_alike(capability, precision, monkeypatch):
    machine = replace(card(capability), dtype="float16")
    for module in ("quant.make", "models.grouped_experts"):
        monkeypatch.setattr(f"llmpq.{module}.machine_here", lambda *_: machine)
    experts = packed(layer_of("Mixtral"), precision, torch.float16)
    most = most_tokens(machine, spec_of(experts), precision)
    for tokens in (1, 64, 65, 4096):
        assert experts.waits_for(tokens) == (tokens > most)
    held = sum(one.weight_bytes for one in experts[0].children())
    shapes = [(op.out_features, op.in_features) for op in spec_of(experts).experts.linears]
    assert held == sum(expert_bytes(machine, precision, *shape) for shape in shapes)


def spec_of(experts: PackedExperts) -> ModelSpec:
    """A model of which these are the experts."""
    linears = tuple(
        LinearShape(name=name, out_features=one.out_features, in_features=one.in_features)
        for name, one in experts[0].named_children()
    )
    other = sum(one.out_features for one in linears if experts[0].up_proj.bias is not None)
    held = Experts(count=EXPERTS, per_token=2, linears=linears, other_params=other)
    return SPARSE.model_copy(update={"experts": held})


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss", "GraniteMoe"])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_the_memory_of_experts_at_once_is_counted(kind, capability, monkeypatch):
    """Nothing is launched here: the tensors that are made for it are those of any device."""
    machine = card(f"{capability[0]}.{capability[1]}", ["triton"])
    monkeypatch.setattr("llmpq.models.grouped_experts.machine_here", lambda *_: machine)
    monkeypatch.setattr("llmpq.quant.grouped.launch", lambda *_: None)
    monkeypatch.setattr("llmpq.quant.grouped.capability_of", lambda device: capability)
    experts, tokens = packed(layer_of(kind), "16", torch.float16), 60
    assert not experts.waits_for(tokens)
    x, chosen = torch.zeros(tokens, HIDDEN).half(), routings(tokens)["random"]
    scores = torch.ones(chosen.shape).half()
    with torch.inference_mode(), PeakMemory() as watch:
        experts(x, chosen, scores)
    batch = peak.MicroBatch(tokens, 1, tokens, machine)
    counted = peak._experts_bytes(spec_of(experts), batch, "16")
    assert 0.7 * counted < watch.peak <= counted + x.nbytes  # the sum is counted elsewhere


@pytest.mark.parametrize("precision", ["16", "8+experts@4", "4+experts@3"])
def test_a_loaded_stage_computes_alike_both_ways(precision, tmp_path, one_by_one):
    """Packed as it is loaded, and from the cache of packed weights."""
    config = MixtralConfig(**SIZES_OF["Mixtral"] | {"num_hidden_layers": 2})
    weights = RandomWeights(scale=0.2, device=CPU)
    layers, where = LayerRange(0, 2, 2), (torch.float16, CPU)
    x = torch.randn(2, 5, HIDDEN).half()
    found = []
    for _ in range(2):
        cache = PackedCache(tmp_path, "made up", "rtn", print)
        stage = load_stage(config, weights, layers, [precision] * 2, *where, cache=cache)
        assert not any(layer.mlp.experts.waits_for(10) for layer in stage.own_layers)
        with torch.inference_mode():
            found.append(stage.run(x))
    assert torch.equal(*found)
    stage.keep_experts_one_by_one()
    with torch.inference_mode():
        single = stage.run(x)
    assert (found[0] - single).norm() / single.norm() < 4e-3
