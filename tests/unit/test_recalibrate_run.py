"""What a real run records of its stages' calls, with the stages as threads of this process."""

import threading

import pytest
import torch

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.model_lookup import load_model_spec
from llmpq.model_spec import ASSETS
from llmpq.models.stage_model import load_config
from llmpq.plan_data import Plan
from llmpq.prompts.request import Request
from llmpq.run_report import StageReport
from llmpq.runtime.engine import StageEngine
from llmpq.runtime.transport import LocalHub, LocalTransport

FOLDER = ASSETS / "tiny-tales"
LENGTHS = (9, 9, 8, 5)  # a batch of three, then one alone
NEW = 6


def two_stage_plan() -> Plan:
    spec = load_model_spec(str(FOLDER))
    device = {"node": "here", "devices": ["t4-16g"]}
    ends = [(0, 3), (3, spec.num_layers)]
    stages = [
        device
        | {
            "rank": rank,
            "first_layer": first,
            "end_layer": end,
            "precisions": ["16"] * (end - first),
        }
        for rank, (first, end) in enumerate(ends)
    ]
    workload = {"prompt_tokens": 9, "new_tokens": NEW, "num_requests": 4, "batch": 3}
    nodes = [{"name": "here", "devices": [{"type": "t4-16g", "count": 2}]}]
    return Plan.model_validate(
        {
            "model": spec.model_dump(),
            "workload": workload,
            "cluster": {"nodes": nodes},
            "method": "hand",
            "batch": 3,
            "prefill_micro_batch": 2,
            "decode_micro_batch": 2,
            "stages": stages,
        }
    )


@pytest.fixture(scope="module")
def stages() -> list[StageReport]:
    """Of a run of both stages to the end."""
    plan, hub = two_stage_plan(), LocalHub(2)
    config, weights = load_config(FOLDER), Checkpoint(FOLDER)
    engines = [
        StageEngine(
            plan, config, weights, LocalTransport(rank, hub), torch.float32, torch.device("cpu")
        )
        for rank in range(2)
    ]
    requests = [Request(i, i, tuple(range(5, 5 + n)), NEW) for i, n in enumerate(LENGTHS)]
    found: dict[int, list[StageReport]] = {}

    def work(engine: StageEngine) -> None:
        engine.start_clock()
        if engine.transport.rank == 0:
            lengths = {i: (n, NEW) for i, n in enumerate(LENGTHS)}
            engine.lead(lengths, requests.__getitem__, lambda _: None)
        else:
            engine.follow()
        found[engine.transport.rank] = engine.measure()

    threads = [threading.Thread(target=work, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
    assert found[0] == found[1]
    return found[0]


def test_every_call_is_counted_once(stages):
    for stage in stages:
        prefills = {
            (m.micro_batch, m.tokens): m.count for m in stage.measured if m.phase == "prefill"
        }
        assert prefills == {(2, 9): 1, (1, 8): 1, (1, 5): 1}
        decodes = [m for m in stage.measured if m.phase == "decode"]
        assert sum(m.count for m in decodes if m.micro_batch == 2) == NEW - 1
        assert sum(m.count for m in decodes if m.micro_batch == 1) == 2 * (NEW - 1)


def test_lengths_are_those_of_the_caches(stages):
    decodes = [m for m in stages[0].measured if m.phase == "decode" and m.micro_batch == 2]
    assert sum(m.tokens * m.count for m in decodes) == sum(range(9, 9 + NEW - 1))


def test_the_parts_add_up_to_the_sums(stages):
    for stage in stages:
        for phase, busy_s in (("prefill", stage.busy_prefill_s), ("decode", stage.busy_decode_s)):
            mine = [m for m in stage.measured if m.phase == phase]
            assert sum(m.total_s for m in mine) == pytest.approx(busy_s)
            assert all(0 < m.median_s <= m.total_s for m in mine)
