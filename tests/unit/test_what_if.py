"""What would change a plan, changed problems as values, and the frontier of speed and quality."""

import math
import time
from dataclasses import replace

import pytest
from test_explain import LONG, real, replan, tiny

from llmpq.cluster import GIB, MIB
from llmpq.errors import InfeasibleError
from llmpq.plan_data import Plan
from llmpq.planner import what_if as w
from llmpq.planner.frontier import budgets, frontier, round_up
from llmpq.planner.problem import Problem
from llmpq.workload import request_lengths

NEVER = math.inf


def texts(problem: Problem, plan: Plan) -> list[str]:
    return [text for text, _ in w.changes(problem, plan)]


def faked(plan: Plan, tokens_per_s: float, gap: float = 0.0) -> Plan:
    """The same plan with another speed."""
    assert plan.predicted is not None
    total = 1000 / tokens_per_s
    figures = {"tokens_per_s": tokens_per_s, "total_s": total, "closed_form_s": None, "gap": gap}
    return plan.model_copy(update={"predicted": plan.predicted.model_copy(update=figures)})


# ---- changed problems


def test_memory_of_real_devices_is_of_one_node() -> None:
    problem = real("opt-30b", "03-opt30b-3xt4-1xv100")
    before = {d.type: d.memory_bytes for d in problem.cluster.devices()}
    after = w.with_memory(problem, "t4", "t4-16g", 2 * GIB).cluster.devices()
    assert {d.memory_bytes - before[d.type] for d in after if d.type == "t4-16g"} == {2 * GIB}
    assert {d.memory_bytes - before[d.type] for d in after if d.type == "v100-32g"} == {0}


def test_memory_of_rehearsed_devices_is_of_the_type() -> None:
    problem = tiny(1.0, 2.0)
    after = w.with_memory(problem, "box", "d1", MIB / 2).cluster.devices()
    assert [d.memory_bytes for d in after] == [MIB, 2.5 * MIB]


def test_what_a_changed_problem_still_knows_is_what_it_would_compute() -> None:
    problem = tiny(1.0, 1.0)
    replan(problem)
    assert problem._known
    changed = [
        w.with_memory(problem, "box", "d0", 1.0),
        w.with_device(problem, "d0"),
        w.with_devices(problem, {("box", "d0"): 1}),
        w.with_links(problem, 2, "inside"),
        w.with_links(problem, 2, "between"),
        w.with_budget(problem, 2),
        w.with_precisions(problem, ["16"]),
        w.with_batch(problem, 2),
        w.with_lengths(problem, 8),
    ]
    for other in changed:
        fresh = replan(replace(other, _known={})).predicted
        again = replan(other).predicted
        assert fresh is not None and again is not None
        assert again.objective == fresh.objective and again.lower_bound == fresh.lower_bound


def test_devices_are_added_to_their_node_and_taken_away() -> None:
    problem = real("opt-30b", "03-opt30b-3xt4-1xv100")
    more = w.with_device(problem, "v100-32g", 2).cluster
    assert [(d.node, d.type) for d in more.devices()].count(("v100", "v100-32g")) == 3
    fewer = w.with_devices(problem, {("t4", "t4-16g"): 2}).cluster
    assert [(d.node, d.type) for d in fewer.devices()] == [("t4", "t4-16g")] * 2


def test_links_between_and_inside_nodes_are_apart() -> None:
    problem = real("opt-30b", "03-opt30b-3xt4-1xv100")
    between = w.with_links(problem, 2, "between").cluster
    assert between.link.bandwidth_gbs == 2 * problem.cluster.link.bandwidth_gbs
    assert between.nodes == problem.cluster.nodes
    inside = w.with_links(problem, 2, "inside").cluster
    assert inside.link == problem.cluster.link
    assert inside.nodes[0].link.bandwidth_gbs == 2 * problem.cluster.nodes[0].link.bandwidth_gbs


def test_a_budget_takes_the_place_of_theta() -> None:
    changed = w.with_budget(tiny(1.0, budget=math.inf, theta=3.0), 2.0)
    assert changed.theta == 0 and changed.quality.percent(changed.budget) == pytest.approx(2.0)


def test_lengths_are_cut_in_the_workload_too() -> None:
    job = LONG | {"prompt_tokens": {"min": 8, "max": 96}}
    changed = w.with_lengths(tiny(1.0, job=job), 32, 10)
    assert changed.max_prompt_tokens == 32 and {new for _, new in changed.lengths} == {10}
    assert request_lengths(changed.workload) == list(changed.lengths)
    assert w.with_lengths(tiny(1.0), 16).workload.prompt_tokens == 16


# ---- what if


def test_what_is_asked_depends_on_the_cluster_and_the_plan() -> None:
    one = tiny(2.0)
    assert texts(one, replan(one)) == [
        "one more d0 on box",
        "a quality loss of 1.5 % instead of 1 %",
        "0.2 MiB more on each d0",
    ]
    two = tiny(0.3, 0.3, percent=5)
    assert "2 times the bandwidth inside nodes" in texts(two, replan(two))


def test_real_clusters_are_asked_about_gibibytes_and_links_between_nodes() -> None:
    problem = real("opt-30b", "03-opt30b-3xt4-1xv100")
    asked = texts(problem, replan(problem))
    assert "2 times the bandwidth between nodes" in asked
    assert "1 GiB more on each t4-16g of t4" in asked and "one more v100-32g on v100" in asked


def test_theta_is_halved_where_there_is_no_budget() -> None:
    problem = tiny(2.0, budget=math.inf, theta=3.0)
    asked = dict(w.changes(problem, replan(problem)))
    assert asked["theta 1.5 instead of 3"].theta == 1.5


def test_more_quality_loss_helps_where_memory_is_short() -> None:
    problem = tiny(0.36, 0.3, percent=0.1)
    plan = replan(problem)
    found = w.what_if(problem, plan, replan, NEVER).changes
    assert plan.predicted is not None and found
    assert [c.gain for c in found] == sorted((c.gain for c in found), reverse=True)
    for change in found:
        expected = plan.predicted.tokens_per_s + change.gain
        assert change.gain >= 0 and change.tokens_per_s == pytest.approx(expected)
        assert change.gain_percent == pytest.approx(100 * change.gain / plan.predicted.tokens_per_s)


def test_a_gain_within_the_gap_is_marked() -> None:
    problem = tiny(2.0)
    plan = faked(replan(problem), 100.0, gap=0.1)
    for speed, within in ((90.0, True), (111.0, True), (112.0, False)):

        def again(changed: Problem, speed: float = speed) -> Plan:
            return plan if changed is problem else faked(plan, speed)

        found = w.what_if(problem, plan, again, NEVER).changes
        assert {change.within_gap for change in found} == {within}
        assert {round(change.gain, 9) for change in found} == {max(0.0, speed - 100)}
    unknown = faked(plan, 100.0, gap=1.0)

    def much_faster(changed: Problem) -> Plan:
        return unknown if changed is problem else faked(plan, 1e6)

    assert w.what_if(problem, unknown, much_faster, NEVER).changes[0].within_gap


def test_changes_are_compared_in_closed_form_and_not_with_the_simulated_run() -> None:
    """A plan chosen by its run may be dear in closed form; that is no gain of any change."""
    problem = tiny(2.0)
    best = replan(problem)
    assert best.predicted is not None
    closed = 2 * best.predicted.priced_s
    run = best.predicted.model_copy(update={"closed_form_s": closed})
    chosen = best.model_copy(update={"predicted": run})
    found = w.what_if(problem, chosen, lambda _: best, NEVER).changes
    assert found and all(change.gain == 0 for change in found)


def test_no_more_than_the_most_promising_changes_are_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(w, "MOST_CHANGES", 2)
    problem = tiny(2.0)
    plan = replan(problem)
    found = w.what_if(problem, plan, lambda _: plan, NEVER)
    assert {change.text for change in found.changes} == set(texts(problem, plan)[:2])
    assert found.num_left_out == len(texts(problem, plan)) - 2 > 0


def test_changes_without_a_plan_or_time_are_left_out() -> None:
    def never(problem: Problem) -> Plan:
        raise InfeasibleError("no")

    problem = tiny(2.0)
    plan = replan(problem)
    assert w.what_if(problem, plan, never, NEVER) == w.WhatIf()
    late = w.what_if(problem, plan, replan, time.monotonic() - 1)
    assert late == w.WhatIf((), len(list(w.changes(problem, plan))))


# ---- the frontier


def test_the_frontier_rises_and_keeps_every_budget() -> None:
    points = frontier(real("opt-13b", "01-opt13b-1xv100"), replan)
    failed = [point for point in points if point.plan is None]
    planned = points[len(failed) :]
    assert failed and all("no plan" in point.why_not for point in failed)
    assert failed[0].max_loss_percent == 0 and failed[0].quality_loss_percent is None
    assert len(planned) >= 3
    speeds = [point.tokens_per_s for point in planned]
    assert speeds == sorted(set(speeds))
    for point in planned:
        assert point.quality_loss_percent is not None
        assert point.quality_loss_percent <= point.max_loss_percent * (1 + 1e-6)


def test_the_frontier_asks_for_the_budgets_it_is_given_and_no_plan_twice() -> None:
    asked: list[Problem] = []

    def note(problem: Problem) -> Plan:
        asked.append(problem)
        return replan(problem)

    points = frontier(tiny(4.0), note, [0.0, 5.0, 1.0])
    # 16 bits are fastest on this device: the plan of the largest budget loses nothing.
    assert len(asked) == 1 and [point.max_loss_percent for point in points] == [0.0]


def test_a_larger_budget_is_never_slower() -> None:
    """A search that ended early may find less; then the plan of a smaller budget stands."""
    problem = tiny(0.5, 0.5)
    plan = replan(problem)
    speeds = {0.1: 50.0, 1.0: 80.0, 10.0: 60.0}

    def early(changed: Problem) -> Plan:
        percent = changed.quality.percent(changed.budget)
        speed = next(s for asked, s in speeds.items() if math.isclose(asked, percent))
        found = faked(plan, speed)
        assert found.predicted is not None
        lossy = found.predicted.model_copy(update={"quality_loss_percent": percent})
        return found.model_copy(update={"predicted": lossy})

    points = frontier(problem, early, list(speeds))
    assert [point.tokens_per_s for point in points] == [50.0, 80.0]


def test_budgets_run_up_to_the_lowest_precision_everywhere() -> None:
    problem = tiny(1.0)
    found = budgets(problem)
    most = problem.quality.percent(problem.quality.sum_omega(["3"] * 4))
    assert found[0] == 0 and found == sorted(found) and most <= found[-1] <= most * 1.1
    assert 8 <= len(found) <= 12
    assert budgets(replace(problem, precisions=("16",))) == [0.0]


@pytest.mark.parametrize(("value", "rounded"), [(0.01234, 0.013), (28.4, 29.0), (0.1, 0.1)])
def test_rounding_up(value: float, rounded: float) -> None:
    assert round_up(value, 2) == rounded
