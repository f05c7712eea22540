"""A plan and a run say where a family is known to overflow in float16."""

import pytest
from test_seats import make_plan

from llmpq.cluster import Cluster
from llmpq.costs.float16 import planned_overflow, run_overflow
from llmpq.plan_data import Plan


def plan_of(model_type: str, *types: str) -> Plan:
    plan = make_plan(*(("a", name) for name in types))
    model = plan.model.model_copy(update={"model_type": model_type})
    return plan.model_copy(update={"model": model})


def test_a_plan_names_the_cards_that_force_float16():
    note = planned_overflow(plan_of("gemma3_text", "t4-16g", "a100-80g", "v100-32g"))
    assert note is not None and note.startswith("t4-16g, v100-32g lack bfloat16")
    assert "gemma3_text" in note and note.endswith("or plan without them")


@pytest.mark.parametrize(
    "model_type, types",
    [("gemma3_text", ["a100-80g", "rtx3090-24g"]), ("llama", ["t4-16g"]), ("gemma2", ["mi50-32g"])],
)
def test_a_plan_without_that_danger_says_nothing(model_type, types):
    assert planned_overflow(plan_of(model_type, *types)) is None


def test_a_rehearsed_card_computes_as_the_cpu_does():
    plan = plan_of("gemma2", "t4-16g")
    node = {"name": "a", "devices": [{"type": "t4-16g", "count": 1}]}
    play = {"slowdown": 2.0, "memory_mib": 64}
    cluster = Cluster.model_validate({"nodes": [node], "rehearse": {"t4-16g": play}})
    assert planned_overflow(plan.model_copy(update={"cluster": cluster})) is None


def test_a_run_warns_by_what_it_computes_in():
    assert "gemma2" in (run_overflow("gemma2", "float16") or "")
    assert run_overflow("gemma2", "bfloat16") is None
    assert run_overflow("qwen2", "float16") is None
