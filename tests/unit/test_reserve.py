"""A plan says how long chunks are and how the cache is cut into lanes; all that reads it obeys.

Plans that say neither get both from their workload.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from test_dry_run import make_plan
from test_nouns import plan_data
from test_planner import files, run

from llmpq.costs.memory import run_sizes
from llmpq.dry_run import memory_of
from llmpq.errors import UserError
from llmpq.job import LaneShape
from llmpq.plan_data import Lane, Plan, diff, lanes_of, load_plan, reserve_of, shapes_of
from llmpq.planner.evaluate import to_assignment
from llmpq.workload import Reserve, chunk_tokens, lanes, planned_lengths

__all__ = ["files"]  # a fixture
UNEVEN = {"prompt_tokens": [10] * 29 + [900], "new_tokens": [4], "num_requests": 30}


def edited(**changes: Any) -> Plan:
    """Four layers over two devices, batch 4, decode micro-batches of 4, with some keys changed."""
    return Plan.model_validate(plan_data() | changes)


def test_both_keys_are_written_and_read(tmp_path: Path) -> None:
    shapes = [{"rows": 3, "tokens": 12}, {"rows": 1, "tokens": 30}]
    plan = edited(chunk_tokens=5, lanes=shapes)
    path = tmp_path / "plan.json"
    path.write_text(plan.model_dump_json())
    data = json.loads(path.read_text())
    assert (data["chunk_tokens"], data["lanes"]) == (5, shapes)
    again = load_plan(path)
    assert again == plan and again.lanes == lanes_of(shapes_of(again.lanes))
    assert reserve_of(again) == Reserve((LaneShape(3, 12), LaneShape(1, 30)), 5, 8)


@pytest.mark.parametrize("workload", [{}, UNEVEN])
def test_plans_without_them_get_them_from_the_workload(workload: dict[str, Any]) -> None:
    data = plan_data()
    data = {k: v for k, v in data.items() if k not in ("chunk_tokens", "lanes")}
    plan = Plan.model_validate(data | {"workload": data["workload"] | workload})
    lengths, found = planned_lengths(plan.workload), reserve_of(plan)
    assert (plan.chunk_tokens, plan.lanes) == (None, None)
    assert found.lanes == lanes(lengths, 4, 4)
    assert found.chunk_tokens == chunk_tokens(lengths) == (80 if workload else 8)
    assert found.prompt_tokens == (900 if workload else 8)


def test_one_of_them_alone_leaves_the_other_to_the_workload() -> None:
    assert reserve_of(edited(chunk_tokens=3)) == Reserve((LaneShape(4, 12),), 3, 8)
    shorter = [{"rows": 1, "tokens": n} for n in (12, 6, 6, 6)]
    found = reserve_of(edited(lanes=shorter))
    assert [lane.tokens for lane in found.lanes] == [12, 6, 6, 6] and found.chunk_tokens == 8


def test_no_more_than_the_longest_prompt_is_computed_at_once() -> None:
    assert reserve_of(edited(chunk_tokens=10**6)).chunk_tokens == 8


def test_lanes_too_short_for_the_workload_become_longer_ones_of_no_more_tokens() -> None:
    """As in a run whose requests are longer than foreseen."""
    found = reserve_of(edited(lanes=[{"rows": 4, "tokens": 7}]))  # requests take 12
    assert found.longest == 12 and found.tokens <= 4 * 7
    with pytest.raises(UserError, match="needs 12 tokens of KV cache, but the plan reserves 8"):
        reserve_of(edited(lanes=[{"rows": 4, "tokens": 2}]))


def test_a_class_that_lacks_a_part_of_a_lane_gets_a_whole_one() -> None:
    """Long lanes serve short requests too; short lanes would be empty while long ones run on."""
    long, short = [(1, 100)] * 7, [(1, 40)] * 33  # 1.39 of 4 lanes, and 2.61
    shapes = lanes(long + short, 16, 4)
    assert [shape.tokens for shape in shapes] == [101, 101, 51, 51]
    just_one = lanes([(1, 100)] * 5 + [(1, 40)] * 36, 16, 4)  # 1.03 lanes
    assert [shape.tokens for shape in just_one] == [101, 51, 51, 51]


def test_memory_is_that_of_the_plans_chunk_and_lanes() -> None:
    plan = make_plan(predicted=False)
    before = [memory_of(plan, rank) for rank in range(2)]
    larger = [Lane(rows=2, tokens=900), Lane(rows=2, tokens=100)]
    changed = plan.model_copy(update={"chunk_tokens": 2, "lanes": larger})
    after = [memory_of(changed, rank) for rank in range(2)]
    sizes = run_sizes(changed)
    assert (sizes.chunk_tokens, sizes.prompt_tokens, sizes.lanes[0]) == (2, 8, (2, 900))
    slots = [cache.rows * cache.tokens for cache in reserve_of(plan).lanes]
    for one, other in zip(before, after, strict=True):
        assert other.cache * sum(slots) == one.cache * 2000
        assert other.buffers < one.buffers


def test_an_assignment_keeps_the_plans_chunk_and_lanes() -> None:
    plan = edited(chunk_tokens=5, lanes=[{"rows": 1, "tokens": 12}] * 4)
    setting = to_assignment(plan, plan.cluster).configuration
    assert (setting.chunk_tokens, setting.lanes) == (5, (LaneShape(1, 12),) * 4)
    other = setting.resized(decode_micro_batch=2)
    assert (other.chunk_tokens, other.lanes) == (5, None)


def test_a_difference_is_told() -> None:
    plan = edited()
    assert not diff(plan, edited(chunk_tokens=8, lanes=[{"rows": 4, "tokens": 12}]))
    lines = str(diff(plan, edited(chunk_tokens=4, lanes=[{"rows": 2, "tokens": 12}] * 2)))
    assert lines.splitlines() == [
        "prompt chunk, tokens: 8 -> 4",
        "cache lanes: 1 of 4 x 12 -> 2 of 2 x 12",
    ]


# ---- the commands


def test_a_plan_that_was_made_says_both_and_evaluating_obeys(files: Path) -> None:
    output, priced = files / "plan.json", files / "priced.json"
    run(files, "-o", str(output), "-q")
    plan = load_plan(output)
    assert plan.chunk_tokens == reserve_of(plan).chunk_tokens and plan.lanes is not None
    assert sum(lane.rows for lane in plan.lanes) == plan.batch
    wider = [lane.model_copy(update={"tokens": 4 * lane.tokens}) for lane in plan.lanes]
    changed = plan.model_copy(update={"lanes": wider, "chunk_tokens": 7})
    output.write_text(changed.model_dump_json())
    run(files, "--evaluate", str(output), "--json", str(priced))
    after = load_plan(priced)
    assert (after.lanes, after.chunk_tokens) == (wider, 7)
    assert plan.predicted is not None and after.predicted is not None
    bytes_of = [[s.peak_memory_bytes for s in p.predicted.stages] for p in (plan, after)]
    assert sum(bytes_of[1]) > sum(bytes_of[0])
    assert after.predicted.total_s > plan.predicted.total_s  # chunks of 7 tokens


def test_evaluating_an_earlier_plan_writes_what_a_run_of_it_would_do(files: Path) -> None:
    output, priced = files / "plan.json", files / "priced.json"
    run(files, "-o", str(output), "-q")
    plan = load_plan(output)
    data = json.loads(output.read_text())
    del data["lanes"], data["chunk_tokens"]
    output.write_text(json.dumps(data))
    assert run(files, "--evaluate", str(output), "--json", str(priced)).exit_code == 0
    after = load_plan(priced)
    assert (after.lanes, after.chunk_tokens) == (plan.lanes, plan.chunk_tokens)
