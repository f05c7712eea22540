"""No tensor of main memory meets one of the stage's device, on any path of a prefill or a step.

No card is needed: the `meta` device, whose tensors have sizes and no values, takes its place. There
as on a card, torch refuses to compute with tensors of two devices, and whatever asks for a tensor's
values fails. A stage is loaded, quantized and warmed up there with jobs of each kind.
Not covered: kernels that only a card has, and indices in main memory, which torch lets pass.
"""

import pytest
import torch
from families import FAMILIES, config_of, hand_made_plan, spec_of

from llmpq.checkpoint.checkpoint import RandomWeights
from llmpq.models.stage_model import load_config
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


def warmed_up(folder, rank: int = 0, **how) -> StageEngine:
    """The engine of one of two stages, after its jobs of each kind."""
    spec = spec_of(folder)
    plan = hand_made_plan(spec, [1, spec.num_layers], MIXED)
    transport = LocalTransport(rank, LocalHub(2))
    weights = RandomWeights(device=CPU)
    config = load_config(folder)
    return StageEngine(plan, config, weights, transport, torch.bfloat16, META, **how)


@pytest.mark.parametrize(("rank", "temperature"), [(0, 0.0), (1, 0.7)])
def test_all_jobs_of_a_stage_compute_on_its_device(folder, rank, temperature) -> None:
    warmed_up(folder, rank, sampling=Sampling(temperature=temperature, top_p=0.9, top_k=5))


@pytest.mark.parametrize("folder", ["llama", "bloom", "qwen3_moe"], indirect=True)
def test_a_buffer_that_stays_in_main_memory_is_found(folder, monkeypatch) -> None:
    """The control: what a stage embeds is left in main memory."""
    from llmpq.models.stage_model import StageModel

    embed = StageModel.embed

    def misplaced(self: StageModel, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(embed(self, ids).shape, dtype=self.dtype)

    monkeypatch.setattr(StageModel, "embed", misplaced)
    with pytest.raises(Exception, match="same device|expected device|out of meta tensor"):
        warmed_up(folder)
