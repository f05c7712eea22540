"""New plans for what is left of a cluster, without any process."""

from pathlib import Path

import pytest
from test_placement import T4, V100, found
from test_seats import make_plan as seated_plan

from llmpq.cli.run_options import RunOptions, check_options
from llmpq.cluster import Cluster
from llmpq.errors import InfeasibleError, UserError
from llmpq.model_lookup import DEFAULT_MODEL, load_model_spec
from llmpq.plan_data import Plan
from llmpq.planner.input_files import InputFiles
from llmpq.planner.replanning import (
    ReplanInputs,
    absolute_quantizer,
    load_replan_inputs,
    plan_without,
    with_longest,
    without,
)
from llmpq.runtime.cards_here import cards_left, in_workers_order
from llmpq.seats import worker_names, worker_places
from llmpq.workload import Workload, request_lengths

TYPES = ("t4-16g", "v100-32g", "t4-16g")
CLUSTER = {
    "nodes": [
        {"name": "a", "devices": [{"type": "t4-16g", "count": 1}, {"type": "v100-32g"}]},
        {"name": "b", "devices": [{"type": "t4-16g", "count": 2}]},
    ]
}


def make_plan(precision="16", cluster=CLUSTER, **more) -> Plan:
    """Three stages: a t4 and a v100 on node a, a t4 on node b."""
    spec = load_model_spec(DEFAULT_MODEL)
    ends = [0, 3, 6, spec.num_layers]
    stages = [
        {
            "rank": rank,
            "node": node,
            "devices": [device],
            "first_layer": ends[rank],
            "end_layer": ends[rank + 1],
            "precisions": [precision] * (ends[rank + 1] - ends[rank]),
        }
        for rank, (node, device) in enumerate(zip("aab", TYPES, strict=True))
    ]
    values = {
        "model": spec.model_dump(),
        "workload": {"prompt_tokens": 24, "new_tokens": 20, "num_requests": 16},
        "cluster": cluster,
        "method": "hand",
        "batch": 8,
        "prefill_micro_batch": 4,
        "decode_micro_batch": 4,
        "stages": stages,
    }
    return Plan.model_validate(values | more)


def inputs_of(
    plan: Plan, longest: int = 44, max_loss: float | None = None, **files: Path
) -> ReplanInputs:
    """What new plans are made from, read as `llmpq-run` does."""
    quantizer = absolute_quantizer(plan, Path("plan.json"), None)
    return load_replan_inputs(plan, InputFiles(**files), quantizer, longest, max_loss)


def rehearsed(memory_mib: float) -> dict:
    roles = {name: {"slowdown": 2, "memory_mib": memory_mib} for name in set(TYPES)}
    return CLUSTER | {"rehearse": roles}


# ---- what is left


def test_a_lost_device_leaves_the_cluster():
    cluster = Cluster.model_validate(CLUSTER)
    left = without(cluster, [("b", "t4-16g")])
    assert [(d.node, d.type) for d in left.devices()] == [
        ("a", "t4-16g"),
        ("a", "v100-32g"),
        ("b", "t4-16g"),
    ]
    assert [node.name for node in without(left, [("b", "t4-16g")]).nodes] == ["a"]
    every = [(device.node, device.type) for device in cluster.devices()]
    assert without(cluster, every) is None


def test_workers_by_rank():
    plan = make_plan()
    assert worker_places(plan) == [("a", "t4-16g"), ("a", "v100-32g"), ("b", "t4-16g")]
    assert worker_names(plan) == ["t4-16g on a", "v100-32g on a", "t4-16g on b"]


def test_a_card_stays_with_the_kind_of_worker_it_had():
    old = make_plan()
    stages = [
        {"node": "b", "devices": ["t4-16g"], "first_layer": 0, "end_layer": 5},
        {"node": "a", "devices": ["v100-32g"], "first_layer": 5, "end_layer": 8},
    ]
    numbered = [
        stage | {"rank": rank, "precisions": ["16"] * (stage["end_layer"] - stage["first_layer"])}
        for rank, stage in enumerate(stages)
    ]
    new = make_plan(stages=numbered)
    assert cards_left(["0", "1", "2"], old, [0], new) == ["2", "1"]
    # What the old plan left out is the card where nothing ran.
    assert cards_left(["0", "1", "2", "3"], old, [2], new) == ["3", "1", "0"]
    assert cards_left([], old, [0], new) == []


def test_cards_are_those_that_the_workers_take():
    """A card that is lost with its worker must be the one that is left out."""
    plan = seated_plan(("a", "t4-16g"), ("a", "v100-32g"))
    assert in_workers_order(["5", "6", "7"], plan, found(V100, T4, T4)) == ["6", "5", "7"]
    assert in_workers_order(["5"], plan, found(T4)) == ["5"]


# ---- what must fit


def test_the_longest_request_is_planned_for_and_the_default_output_stays():
    workload = Workload(prompt_tokens=24, new_tokens=20, num_requests=16)
    assert with_longest(workload, 44) is workload
    longer = request_lengths(with_longest(workload, 100))
    assert len(longer) == 17
    assert max(map(sum, longer)) == 100 and max(new for _, new in longer) == 20


# ---- new plans


def test_plans_for_one_device_less_again_and_again():
    plan = make_plan()
    inputs = inputs_of(plan)
    lost = []
    for left in (3, 2, 1):
        lost.append(worker_places(plan)[0])
        plan, notes = plan_without(inputs, plan, [0])
        assert len(plan.cluster.devices()) == left
        assert all(device in {"t4-16g", "v100-32g"} for _, device in worker_places(plan))
        assert plan.model.num_layers == len(plan.precisions)
        assert any("spec sheet" in note for note in notes)
    with pytest.raises(InfeasibleError, match="no device is left"):
        plan_without(inputs, plan, range(len(plan.stages)))


def test_precision_drops_only_where_it_must_and_that_is_said():
    roomy = make_plan(cluster=rehearsed(30))
    plan, notes = plan_without(inputs_of(roomy), roomy, [0, 1])
    assert set(plan.precisions) == {"16"}
    assert not any("keeps the quality" in note for note in notes)

    tight = make_plan(cluster=rehearsed(4.5))
    inputs = inputs_of(tight)
    plan, notes = plan_without(inputs, tight, [0, 1, 2])
    assert set(plan.precisions) != {"16"}
    assert any("no plan for what is left keeps the quality loss of 0 %" in note for note in notes)


def test_a_quality_limit_is_kept():
    tight = make_plan(cluster=rehearsed(4.5))
    inputs = inputs_of(tight, max_loss=0.0)
    with pytest.raises(InfeasibleError, match="at most 0 %"):
        plan_without(inputs, tight, [0, 1, 2])


def test_a_request_that_fits_no_more_is_no_plan():
    tight = make_plan(cluster=rehearsed(2.0))
    inputs = inputs_of(tight, longest=120)
    with pytest.raises(InfeasibleError, match="short"):
        plan_without(inputs, tight, [0, 1, 2])


# ---- bad input


def test_bad_files_are_told_at_once(tmp_path):
    plan = make_plan()
    cluster, sensitivity = tmp_path / "c.yaml", tmp_path / "s.json"
    cluster.write_text("nodes: [{name: a, devices: [{type: t4-16g}]}]\n")
    sensitivity.write_text("{}")
    with pytest.raises(UserError) as caught:
        inputs_of(plan, cluster=cluster, sensitivity=sensitivity)
    assert str(sensitivity) in str(caught.value)
    with pytest.raises(UserError, match="stage 1 asks for a v100-32g on a"):
        inputs_of(plan, cluster=cluster)


def test_an_unknown_rehearsed_device_needs_a_profile():
    roles = {name: {"slowdown": 2, "memory_mib": 30} for name in ("t4-16g", "v100-32g", "mine")}
    nodes = [*CLUSTER["nodes"], {"name": "c", "devices": [{"type": "mine"}]}]
    plan = make_plan(cluster={"nodes": nodes, "rehearse": roles})
    with pytest.raises(UserError, match="'mine' is rehearsed .*--profiles"):
        inputs_of(plan)


def test_options_without_effect_are_refused():
    files = {name: Path(name) for name in ("plan", "prompts", "output")}
    with pytest.raises(UserError, match="--max-quality-loss: only with --replan-on-loss"):
        check_options(RunOptions(**files, max_quality_loss=1.0))
    check_options(RunOptions(**files, max_quality_loss=1.0, replan_on_loss=True))
