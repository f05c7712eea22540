"""The closed form is scaled to simulated runs; bounds, ILPs and plans hold the same scale."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
from test_simulate_run import assign, make_problem, random_lengths

from llmpq.planner import value
from llmpq.planner.confirm import CLOSE, Confirmed
from llmpq.planner.evaluate import closed_form_s, evaluate
from llmpq.planner.instance import make_instance
from llmpq.planner.planning import Options, replan
from llmpq.planner.problem import Assignment, Problem
from llmpq.planner.scaling import ScaledSizes
from llmpq.planner.search import search
from llmpq.planner.simulated import run_s
from llmpq.planner.solver import make_solver
from llmpq.planner.space import make_space, opened, rescaled


def scaled(problem: Problem, assignment: Assignment, scale: float) -> Problem:
    """With a scale for the sizes of an assignment."""
    setting = assignment.configuration
    return problem.scaled({(problem.scaled_sizes(setting), len(setting.stage_devices)): scale})


def unequal(types: list[str], count: int = 120) -> Problem:
    return make_problem(random_lengths(3, count, 150, 60), types)


def test_seconds_grow_by_the_scale_of_their_sizes_and_stages_stay_as_they_are() -> None:
    problem = unequal(["t4-16g", "v100-32g"])
    plan, other = assign(problem, 8, 2, 4), assign(problem, 8, 4, 4)
    changed = scaled(problem, plan, 1.25)
    before, after = evaluate(problem, plan), evaluate(changed, plan)
    assert after.total_s == pytest.approx(1.25 * before.total_s)
    assert closed_form_s(changed, plan) == pytest.approx(after.total_s)
    assert (before.closed_form_scale, after.closed_form_scale) == (None, 1.25)
    assert after.stages == before.stages
    assert evaluate(changed, other) == evaluate(problem, other)


def test_the_ilps_arrays_have_the_same_scale() -> None:
    problem = unequal(["t4-16g", "v100-32g"])
    plan = assign(problem, 8, 2, 4)
    changed = scaled(problem, plan, 0.8)
    index = {name: number for number, name in enumerate(problem.precisions)}
    choice = tuple(tuple(index[name] for name in stage) for stage in plan.stages)
    found = value.objective(make_instance(changed, plan.configuration), choice)
    assert found == pytest.approx(evaluate(changed, plan).objective)


def test_a_number_of_stages_without_a_scale_has_that_of_the_nearest() -> None:
    problem = unequal(["t4-16g"] * 3)
    sizes = ScaledSizes(8, 2, 4, problem.chunk_tokens(assign(problem, 8, 2, 4).configuration))
    changed = problem.scaled({(sizes, 1): 1.1, (sizes, 4): 1.4})
    table = replace(assign(problem, 8, 2, 4).configuration.sizes, prefill=(1, 2), decode=(4, 8))
    each = [changed.scales_of(stages, table)[1, 0] for stages in (1, 2, 3, 4, 9)]
    assert each == [1.1, 1.1, 1.4, 1.4, 1.4]
    assert changed.scales_of(2, table)[0].tolist() == [1.0, 1.0]


def test_a_problem_of_very_many_requests_scales_what_is_planned() -> None:
    problem = replace(unequal(["t4-16g"]), num_requests=50_000)
    plan = assign(problem, 8, 2, 4)
    assert problem.unit is not problem
    assert scaled(problem, plan, 1.5).unit.scale_of(plan.configuration) == 1.5


@pytest.mark.parametrize("theta", [0.0, 5.0])
def test_bounds_of_a_rescaled_space_are_never_above_those_made_anew(theta: float) -> None:
    problem = replace(unequal(["t4-16g", "v100-32g"]), theta=theta)
    solver = make_solver("highs")
    space = make_space(problem)
    for part in space.parts:
        opened(part, problem, solver)
    changed = scaled(problem, assign(problem, 8, 2, 4), 1.3)
    changed = scaled(changed, assign(problem, 16, 1, 4), 0.7)
    again = rescaled(space, problem, changed)
    anew = make_space(changed)
    for part in anew.parts:
        opened(part, changed, solver)
    moved = 0
    for old, table, fresh in zip(space.tables, again.tables, anew.tables, strict=True):
        finite = np.isfinite(fresh.bounds)
        if not theta:
            factors = table.bounds[finite] / old.bounds[finite]
            assert set(np.round(factors, 6)) <= {1.0, 1.3, 0.7}
            moved += int((np.abs(factors - 1) > 0.1).sum())
        for prefill, decode in np.argwhere(finite)[::7]:
            place = int(prefill), int(decode)
            value_of, _ = search_bound(fresh, place)
            assert table.bounds[place] <= value_of * (1 + 1e-6)
    assert theta or moved
    for before, after, own in zip(space.parts, again.parts, anew.parts, strict=True):
        assert after.bound == own.bound == pytest.approx(0.7 * before.bound)


def search_bound(table, place):
    from llmpq.planner import pool_bounds

    return pool_bounds.relaxed(table.pool, *place, make_solver("highs"))


def test_runs_that_are_far_from_the_closed_form_tell_its_scale() -> None:
    """Tried with a closed form that was scaled wrongly on purpose."""
    problem = unequal(["t4-16g"] * 2, 40)
    plan = assign(problem, 8, 2, 4)
    right = run_s(problem, plan) / closed_form_s(problem, plan)
    wrong = scaled(problem, plan, 2 * right)
    found = Confirmed(wrong, math.inf).scales([plan])
    key = problem.scaled_sizes(plan.configuration), 2
    assert found[key] == pytest.approx(right)
    mended = wrong.scaled(found)
    assert closed_form_s(mended, plan) == pytest.approx(run_s(mended, plan), rel=CLOSE)
    assert key not in Confirmed(mended, math.inf).scales([plan])


def test_a_plan_that_was_made_is_near_its_closed_form() -> None:
    """Two lanes of many stages, where the closed form alone is far off."""
    for types in (["t4-16g"] * 4, ["t4-16g", "v100-32g", "v100-32g"]):
        problem = unequal(types, 60)
        predicted = replan(problem, Options(compare=False)).predicted
        assert predicted is not None and predicted.closed_form_s is not None
        assert predicted.closed_form_s == pytest.approx(predicted.total_s, rel=2 * CLOSE)
        assert predicted.gap < 2 * CLOSE


def test_a_later_search_relaxes_nothing_that_an_earlier_one_has() -> None:
    problem, solver = unequal(["t4-16g", "v100-32g"]), make_solver("highs")
    space = make_space(problem)
    until = time.monotonic() + 60
    first = search(problem, space, solver, gap=0.02, deadline=until)
    again = replace(space, floor=first.lower_bound)
    second = search(problem, again, solver, gap=0.02, deadline=until, seeds=first.finalists)
    assert first.num_relaxed > 0 and second.num_relaxed == 0
    assert second.best <= first.best
    assert first.lower_bound <= second.lower_bound <= second.best
    exact = search(problem, again, solver, gap=0.0, deadline=until, seeds=first.finalists)
    assert second.lower_bound <= exact.best * (1 + 1e-7)


@pytest.mark.parametrize("scale", [0.7, 1.3])
def test_bounds_that_searches_have_learned_hold_for_the_rescaled_problem(scale: float) -> None:
    problem, solver = unequal(["t4-16g", "v100-32g"]), make_solver("highs")
    until = time.monotonic() + 60
    space = make_space(problem)
    found = search(problem, space, solver, gap=0.02, deadline=until)
    assert found.assignment is not None
    sizes = problem.scaled_sizes(found.assignment.configuration)
    changed = problem.scaled({(sizes, len(found.assignment.stages)): scale})
    moved = rescaled(replace(space, floor=found.lower_bound), problem, changed)
    assert moved.floor == pytest.approx(found.lower_bound * min(scale, 1.0))
    known = search(changed, moved, solver, gap=0.0, deadline=until, seeds=found.finalists)
    anew = search(changed, make_space(changed), solver, gap=0.0, deadline=until)
    assert known.best == pytest.approx(anew.best, rel=1e-6)
    assert known.lower_bound <= anew.best * (1 + 1e-6)


def test_of_plans_of_the_same_sizes_the_fastest_run_says_the_scale() -> None:
    problem = unequal(["t4-16g"] * 2, 40)
    plan = assign(problem, 8, 2, 4)
    wrong = scaled(problem, plan, 2 * run_s(problem, plan) / closed_form_s(problem, plan))
    runs = Confirmed(wrong, math.inf)
    key = problem.scaled_sizes(plan.configuration), 2
    assert key in runs.scales([plan])
    runs.fastest[key] /= 2  # as if another plan of these sizes had run in half the time
    assert key not in runs.scales([plan])
