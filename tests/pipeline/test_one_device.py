"""No tensor of main memory meets one of the stage's device, on any path of a prefill or a step.

No card is needed: the `meta` device, whose tensors have sizes and no values, takes its place. There
as on a card, torch refuses to compute with tensors of two devices, and whatever asks for a tensor's
values fails. A stage is loaded, quantized and warmed up there with jobs of each kind. Experts run
one by one there, and by the kernels for all of them, which are noted and not launched.
Not covered: kernels that only a card has, and indices in main memory, which torch lets pass.
"""

import pytest
import torch
from families import FAMILIES, WITH_EXPERTS, config_of, hand_made_plan, spec_of

from llmpq.checkpoint.checkpoint import RandomWeights
from llmpq.machine import card
from llmpq.model_spec import ModelSpec
from llmpq.models.experts import PackedExperts
from llmpq.models.stage_model import load_config
from llmpq.runtime import steps
from llmpq.runtime.engine import StageEngine
from llmpq.runtime.sampler import Sampling
from llmpq.runtime.transport import LocalHub, LocalTransport

META, CPU = torch.device("meta"), torch.device("cpu")
MIXED = ["16", "8", "4", "3"]


@pytest.fixture(autouse=True)
def as_on_a_card(monkeypatch):
    """Steps of few sizes, as a card has them, and no look at the values of scales."""
    monkeypatch.setattr("llmpq.runtime.steps._rounds_up", lambda device: True)
    monkeypatch.setattr("llmpq.quant.rounding.check_finite", lambda scales: None)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A folder with a family's configuration, and no weights."""
    config = config_of(request.param)
    config.architectures = [f"{FAMILIES[request.param][0]}ForCausalLM"]
    path = tmp_path_factory.mktemp(request.param)
    config.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def spec(folder) -> ModelSpec:
    """The model's sizes, counted with experts one by one."""
    return spec_of(folder)


def warmed_up(folder, spec: ModelSpec, rank: int = 0, **how) -> StageEngine:
    """The engine of one of two stages, after its jobs of each kind."""
    plan = hand_made_plan(spec, [1, spec.num_layers], MIXED)
    transport = LocalTransport(rank, LocalHub(2))
    weights = RandomWeights(device=CPU)
    config = load_config(folder)
    return StageEngine(plan, config, weights, transport, torch.bfloat16, META, **how)


@pytest.mark.parametrize(("rank", "temperature"), [(0, 0.0), (1, 0.7)])
def test_all_jobs_of_a_stage_compute_on_its_device(folder, spec, rank, temperature) -> None:
    warmed_up(folder, spec, rank, sampling=Sampling(temperature=temperature, top_p=0.9, top_k=5))


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of the programs for all experts that would be launched on an Ampere card.

    Whatever asks for the number of tokens of an expert fails.
    """
    names: list[str] = []
    for module in ("quant.make", "models.grouped_experts"):
        monkeypatch.setattr(f"llmpq.{module}.machine_here", lambda *_: card("8.0", ["triton"]))
    monkeypatch.setattr("llmpq.quant.grouped.capability_of", lambda device: (8, 0))
    monkeypatch.setattr(
        "llmpq.quant.grouped.launch", lambda *given: names.append(given[-1].program)
    )

    def asked(*_: object) -> None:
        raise AssertionError("the host asks how many tokens each expert has")

    monkeypatch.setattr(PackedExperts, "_by_expert", asked)
    return names


@pytest.mark.parametrize("folder", WITH_EXPERTS, indirect=True)
def test_experts_at_once_ask_the_device_nothing(folder, spec, launched) -> None:
    engine = warmed_up(folder, spec, rank=1)
    stage = engine.worker.stage
    experts = [module for module in stage.modules() if isinstance(module, PackedExperts)]
    assert experts and launched
    assert steps._what_waits(stage, 8) is None
    tables = launched.count("sort_pairs")
    assert launched.count("multiply_experts_by_dots") == 2 * tables
    assert tables % len(experts) == 0


@pytest.mark.parametrize("folder", ["qwen3_moe"], indirect=True)
def test_the_check_finds_what_asks_for_numbers_of_tokens(
    folder, spec, launched, monkeypatch
) -> None:
    """The control: weights that lie elsewhere, so that experts run one by one."""
    monkeypatch.setattr("llmpq.models.grouped_experts._Projection.weight", lambda self: None)
    with pytest.raises(AssertionError, match="how many tokens each expert has"):
        warmed_up(folder, spec, 1)


@pytest.mark.parametrize("folder", ["llama", "bloom", "qwen3_moe"], indirect=True)
def test_a_buffer_that_stays_in_main_memory_is_found(folder, spec, monkeypatch) -> None:
    """The control: what a stage embeds is left in main memory."""
    from llmpq.models.stage_model import StageModel

    embed = StageModel.embed

    def misplaced(self: StageModel, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(embed(self, ids).shape, dtype=self.dtype)

    monkeypatch.setattr(StageModel, "embed", misplaced)
    with pytest.raises(Exception, match="same device|expected device|out of meta tensor"):
        warmed_up(folder, spec)
