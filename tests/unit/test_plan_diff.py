"""The difference of two plans: what it says, and that it accounts for every changed layer once."""

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpq.cluster import GIB, Cluster
from llmpq.model_lookup import spec_from_config
from llmpq.model_spec import ModelSpec
from llmpq.plan_data import Plan, Predicted, PredictedStage, Stage, diff
from llmpq.plan_diff import LayerRangeChange, PlanDiff, changes, layer_ranges
from llmpq.workload import Workload

NUM_LAYERS = 8
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}
CLUSTER = {
    "nodes": [
        {"name": "a", "devices": [{"type": "t4-16g", "count": 3}, {"type": "v100-32g"}]},
        {"name": "b", "devices": [{"type": "t4-16g"}]},
    ]
}
T4, V100, FAR = ("a", "t4-16g"), ("a", "v100-32g"), ("b", "t4-16g")
Part = tuple[tuple[str, str], list[str]]  # (node, device type), precisions of the layers there


def model(**changed: Any) -> ModelSpec:
    return spec_from_config({**CONFIG, **changed}, name="m")


def make_plan(*parts: Part, **changed: Any) -> Plan:
    """A plan whose stages hold so many layers, on these devices."""
    stages, layer = [], 0
    for rank, ((node, kind), precisions) in enumerate(parts):
        end = layer + len(precisions)
        one = Stage(
            rank=rank,
            node=node,
            devices=[kind],
            first_layer=layer,
            end_layer=end,
            precisions=precisions,
        )
        stages.append(one)
        layer = end
    values: dict[str, Any] = {
        "model": model(),
        "workload": Workload(prompt_tokens=8, new_tokens=4, num_requests=4),
        "cluster": Cluster.model_validate(CLUSTER),
        "method": "manual",
        "batch": 4,
        "prefill_micro_batch": 2,
        "decode_micro_batch": 4,
        "stages": stages,
    }
    return Plan(**{**values, **changed})


def prediction(tokens_per_s: float, percent: float, *gib: float) -> Predicted:
    numbers = dict.fromkeys(Predicted.model_fields.keys() - {"stages"}, 1.0)
    numbers |= {"tokens_per_s": tokens_per_s, "quality_loss_percent": percent}
    stages = [
        PredictedStage(
            prefill_s=1,
            decode_step_s=1,
            peak_memory_bytes=int(amount * GIB),
            memory_capacity_bytes=16 * GIB,
            provenance="",
        )
        for amount in gib
    ]
    return Predicted(**numbers, stages=stages)


def test_a_plan_does_not_differ_from_itself() -> None:
    plan = make_plan((T4, ["8"] * 4), (V100, ["16"] * 4), predicted=prediction(9, 1, 2, 3))
    nothing = diff(plan, plan)
    assert not nothing and nothing == PlanDiff()
    assert str(nothing) == "no difference"


def test_what_is_not_compared() -> None:
    plan = make_plan((T4, ["8"] * 8), predicted=prediction(9, 1, 2))
    assert plan.predicted is not None
    slower = plan.predicted.model_copy(update={"planning_s": 50.0})
    assert not diff(plan, plan.model_copy(update={"predicted": slower}))


def test_every_kind_of_change_is_one_short_line() -> None:
    a = make_plan(
        (T4, ["16", "16", "8"]), (V100, ["8"] * 5), predicted=prediction(10.0, 0.5, 3.0, 4.0)
    )
    b = make_plan(
        (T4, ["16", "8", "4", "4", "4"]),
        (V100, ["8"] * 3),
        batch=2,
        prefill_micro_batch=1,
        decode_micro_batch=2,
        method="ilp",
        predicted=prediction(12.5, 1.0, 2.5, 4.0),
    )
    assert str(diff(a, b)).splitlines() == [
        "method: manual -> ilp",
        "batch: 4 -> 2",
        "prefill micro-batch: 2 -> 1",
        "decode micro-batch: 4 -> 2",
        "cache lanes: 1 of 4 x 12 -> 1 of 2 x 12",
        "layers 3-4: v100-32g on a (stage 1) -> t4-16g on a (stage 0)",
        "layer 1: 16 -> 8",
        "layers 2-4: 8 -> 4",
        "tokens/s: 10 -> 12.5",
        "quality loss, %: 0.5 -> 1",
        "memory of stage 0, GiB: 3 -> 2.5",
    ]


def test_another_order_moves_layers_between_devices() -> None:
    a = make_plan((T4, ["8"] * 3), (V100, ["8"] * 5))
    b = make_plan((V100, ["8"] * 5), (T4, ["8"] * 3))
    assert str(diff(a, b)).splitlines() == [
        "devices: t4-16g on a, v100-32g on a -> v100-32g on a, t4-16g on a",
        "layers 0-2: t4-16g on a (stage 0) -> v100-32g on a (stage 0)",
        "layers 5-7: v100-32g on a (stage 1) -> t4-16g on a (stage 1)",
    ]


def test_a_device_in_front_moves_only_the_layers_it_takes() -> None:
    """The other layers stay where they are, in a stage of another rank."""
    a = make_plan((V100, ["8"] * 8))
    b = make_plan((FAR, ["8"] * 2), (V100, ["8"] * 6))
    (move,) = diff(a, b).moves
    assert (move.first_layer, move.end_layer) == (0, 2)
    assert str(move) == "layers 0-1: v100-32g on a (stage 0) -> t4-16g on b (stage 0)"


def test_equal_devices_are_interchangeable_but_not_those_of_another_node() -> None:
    a = make_plan((T4, ["8"] * 4), (T4, ["8"] * 4))
    b = make_plan((T4, ["8"] * 4), (FAR, ["8"] * 4))
    (move,) = diff(a, b).moves
    assert (move.first_layer, move.end_layer) == (4, 8)
    fewer = diff(a, make_plan((T4, ["8"] * 8)))
    assert [str(change) for change in fewer.settings] == [
        "devices: t4-16g on a, t4-16g on a -> t4-16g on a",
        "tensor parallelism: 1, 1 -> 1",
    ]
    assert [str(move) for move in fewer.moves] == [
        "layers 4-7: t4-16g no. 2 on a (stage 1) -> t4-16g on a (stage 0)"
    ]


def test_devices_that_share_a_stage() -> None:
    single = make_plan((T4, ["8"] * 8))
    shared = {"tensor_parallel": 2, "devices": ["t4-16g"] * 2}
    both = single.model_copy(update={"stages": [single.stages[0].model_copy(update=shared)]})
    assert str(diff(single, both)).splitlines() == [
        "tensor parallelism: 1 -> 2",
        "layers 0-7: t4-16g on a (stage 0) -> 2 x t4-16g on a (stage 0)",
    ]


def test_a_plan_without_prediction() -> None:
    bare = make_plan((T4, ["8"] * 8))
    priced = bare.model_copy(update={"predicted": prediction(10.0, 0.5, 3.0)})
    assert str(diff(bare, priced)).splitlines() == [
        "tokens/s: none -> 10",
        "quality loss, %: none -> 0.5",
        "memory of stage 0, GiB: none -> 3",
    ]


def test_inputs_that_differ_are_named() -> None:
    plan = make_plan((T4, ["8"] * 8))
    work = Workload(prompt_tokens=8, new_tokens=4, num_requests=5)
    found = diff(plan, plan.model_copy(update={"workload": work}))
    assert found and found.inputs == ("workload",)
    assert str(found) == "another workload"


def test_plans_of_different_models_have_no_difference() -> None:
    plan = make_plan((T4, ["8"] * 8))
    wider = plan.model_copy(update={"model": model(intermediate_size=256)})
    with pytest.raises(ValueError, match="different models .* m and m differ in ffn_size, linears"):
        diff(plan, wider)


def test_changes_tells_names_that_only_one_side_has() -> None:
    found = changes({"x": 1, "y": 2, "z": 3}, {"x": 1, "y": 5, "w": 4})
    assert [str(change) for change in found] == ["y: 2 -> 5", "z: 3 -> none", "w: none -> 4"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), max_size=12))
def test_ranges_are_as_few_as_can_be(layers: list[tuple[str, str]]) -> None:
    before, after = [old for old, _ in layers], [new for _, new in layers]
    ranges = layer_ranges(before, after)
    for one, other in pairwise(ranges):
        touch = one.end_layer == other.first_layer
        assert one.end_layer <= other.first_layer
        assert not (touch and (one.before, one.after) == (other.before, other.after))


# -- random plans -------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Random devices in a random order, random cuts, random precisions."""
    devices = draw(st.permutations([T4, T4, T4, V100, FAR]))
    count = draw(st.integers(1, len(devices)))
    cuts = draw(st.sets(st.integers(1, NUM_LAYERS - 1), min_size=count - 1, max_size=count - 1))
    names = st.sampled_from(["16", "8", "4", "3"])
    precisions = draw(st.lists(names, min_size=NUM_LAYERS, max_size=NUM_LAYERS))
    bounds = pairwise([0, *sorted(cuts), NUM_LAYERS])
    held = [precisions[first:end] for first, end in bounds]
    return make_plan(*zip(devices, held, strict=False))


def homes(plan: Plan) -> list[tuple[str, str, int]]:
    """For every layer: node, type, and which of the equal devices in the plan's order."""
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for stage in plan.stages:
        kind = stage.node, stage.devices[0]
        found += [(*kind, seen[kind])] * stage.num_layers
        seen[kind] += 1
    return found


def replayed(ranges: tuple[LayerRangeChange[Any], ...], layers: list[Any], read: Any) -> list[Any]:
    """`layers` with all ranges applied; each layer is changed at most once, from what it was."""
    result: list[Any] = list(layers)
    touched: Counter[int] = Counter()
    for one in ranges:
        for layer in range(one.first_layer, one.end_layer):
            assert layers[layer] == read(one.before) != read(one.after)
            result[layer] = read(one.after)
            touched[layer] += 1
    assert set(touched.values()) <= {1}
    return result


def home(place: Any) -> tuple[str, str, int]:
    (number,) = place.numbers
    return place.node, place.device_type, number


@given(plans(), plans())
def test_reading_a_difference_makes_one_plan_of_the_other(a: Plan, b: Plan) -> None:
    found = diff(a, b)
    assert replayed(found.moves, homes(a), home) == homes(b)
    assert replayed(found.precisions, a.precisions, str) == b.precisions
    assert bool(found) == (a != b)
    assert len(str(found).splitlines()) <= 2 + 2 * NUM_LAYERS
    assert all(str(move.before) != str(move.after) for move in found.moves)


@given(plans(), plans())
def test_the_way_back_is_the_same_the_other_way_round(a: Plan, b: Plan) -> None:
    there, back = diff(a, b), diff(b, a)
    assert [(m.first_layer, m.end_layer, m.before, m.after) for m in there.moves] == [
        (m.first_layer, m.end_layer, m.after, m.before) for m in back.moves
    ]
    assert [(c.name, c.before, c.after) for c in there.settings] == [
        (c.name, c.after, c.before) for c in back.settings
    ]
