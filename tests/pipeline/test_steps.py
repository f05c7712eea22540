"""Decode steps as a CUDA graph would hold them: the same tokens, and nothing that a graph cannot.

No card is needed: `_compute` is the function that is captured, and it runs here as it is.
"""

import pytest
import torch
from families import FAMILIES, WITH_EXPERTS, config_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmpq import kernel
from llmpq.job import LaneShape
from llmpq.models.lanes import LaneCache
from llmpq.models.stage_model import LayerRange, StageModel, load_config
from llmpq.runtime import engine, steps
from llmpq.runtime.sampler import Sampling
from llmpq.runtime.steps import DecodeStepRunner, graph_width

META = torch.device("meta")
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def as_on_a_card(monkeypatch):
    """Steps of whole lanes at few widths; a stage alone starts one before the tokens are back."""
    monkeypatch.setattr(steps, "_rounds_up", lambda device: True)
    monkeypatch.setattr(kernel, "LEAST_GRAPH_TOKENS", 4)
    monkeypatch.setattr(engine, "_steps_ahead", lambda device, stages: 2 if stages == 1 else 1)


@every_family
def test_steps_of_few_sizes_give_the_tokens_of_transformers(family_model, family, as_on_a_card):
    model = family_model(family)
    for ends, sizes in (([4], {}), ([1, 4], {"batch": 7, "p": 2, "q": 3})):
        for how in ({}, {"chunk": 16}, {"refill": False}):
            assert model.generate(ends, how=how, **sizes) == model.expected, (ends, how)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_draws_do_not_depend_on_steps_started_early(family_model, family, as_on_a_card):
    model = family_model(family)
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=7)
    early = model.generate([4], sampling=sampling)
    assert early == model.generate([1, 4], sampling=sampling) != model.expected


def test_few_sizes_hold_all():
    shape = LaneShape(24, 700)
    widths = {graph_width(width, shape) for width in range(1, 701)}
    assert widths == {256, 384, 512, 700}
    assert all(width <= graph_width(width, shape) for width in range(1, 701))


class OnTheDevice(TorchDispatchMode):
    """Refuses what waits for the device, looks at values, or brings tensors from elsewhere.

    Tensors without values make all but the last fail by themselves. A number may be a tensor of
    the CPU without dimensions, but copying one to the device would wait.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                is_number = leaf.dim() == 0 and not copies
                assert leaf.device == META or is_number, f"{func} takes {leaf.device} tensors"
        return func(*args, **(kwargs or {}))


ALL = LayerRange(0, 4, 4)


def compute(folder, spoil=None, layers=ALL):
    """One step of some layers without values, as it would be captured."""
    config, count = load_config(folder), layers.end - layers.first
    stage = StageModel(config, layers, ["16"] * count, torch.bfloat16, META)
    if spoil is not None:
        stage.model.register_forward_pre_hook(spoil)
        next(stage.model.children()).register_forward_hook(spoil)
    cache = LaneCache(count, [LaneShape(4, 40)])
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9)
    made = DecodeStepRunner(stage, cache, sampling)
    with torch.inference_mode():
        made._compute(0, range(4), 32)  # makes the buffers of the cache
        with OnTheDevice():
            return made._compute(0, range(4), 32)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in WITH_EXPERTS])
def test_a_step_waits_for_nothing_and_looks_at_no_value(family_model, family):
    folder = family_model(family).folder
    assert compute(folder).shape == (4,)
    for layers in (LayerRange(0, 2, 4), LayerRange(1, 3, 4)):
        assert compute(folder, layers=layers).shape[:2] == (4, 1)
    assert compute(folder, layers=LayerRange(2, 4, 4)).shape == (4,)


DENSE = {  # layers without experts
    "qwen2_moe": [1],
    "glm4_moe": [0],
    "ernie4_5_moe": [0],
    "llama4": [0, 2],
    "deepseek_v2-experts": [0],
    "deepseek_v3-experts": [0],
}


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_a_stage_with_experts_looks_at_values_and_is_not_captured(family):
    config = config_of(family)
    stages = (
        StageModel(config, LayerRange(n, n + 1, 4), ["16"], torch.bfloat16, META) for n in range(4)
    )
    waits = [steps._what_waits(stage, 1) for stage in stages]
    assert waits == [
        None if layer in DENSE.get(family, ()) else "PackedExperts" for layer in range(4)
    ]


@pytest.mark.parametrize(
    "look",
    [
        lambda states: states.sum().item(),
        lambda states: states.cpu(),
        lambda states: states[states > 0],
        lambda states: states + torch.ones(states.shape[-1]),
    ],
    ids=["item", "cpu", "shape", "elsewhere"],
)
def test_what_a_graph_cannot_hold_would_be_found(family_model, look):
    def spoil(module, args, output=None):
        if output is not None:
            look(output.last_hidden_state)

    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        compute(family_model("llama").folder, spoil)
