"""Plans are chosen by their simulated runs: chains, layers, sizes, and samples of many requests."""

import math
from dataclasses import replace

import numpy as np
import pytest
from test_simulate_run import assign, make_problem, random_lengths, random_plan

from llmpq.planner import confirm, planning
from llmpq.planner.confirm import Confirmed
from llmpq.planner.evaluate import bounded, evaluate
from llmpq.planner.planning import Options, make_plan
from llmpq.planner.simulated import run_s, sample_of
from llmpq.workload import PLANNED, Workload, planned_lengths, request_lengths

UNLIMITED = math.inf


# ---- sizes and candidates


def test_other_sizes_make_runs_shorter_and_never_longer() -> None:
    gains = []
    for seed in range(4):
        problem = make_problem(random_lengths(seed, 150, 100, 120), ["t4-16g"] * 3)
        plan = assign(problem, 24, 2, 12)  # two lanes for three stages
        confirmed = Confirmed(problem, UNLIMITED)
        found = confirmed.improved(plan)
        gains.append(run_s(problem, plan) / run_s(problem, found))
    assert min(gains) >= 1 and max(gains) > 1


def test_other_chunks_make_runs_shorter_and_never_longer() -> None:
    """Tiny chunks become longer; where all prompts are short and alike nothing is tried."""
    problem = make_problem([(600, 9)] * 8 + [(60, 40)] * 40, ["t4-16g"] * 3)
    plan = assign(problem, 8, 2, 2)
    small = replace(plan, configuration=replace(plan.configuration, chunk_tokens=64))
    confirmed = Confirmed(problem, UNLIMITED)
    found = confirmed.improved(small)
    assert problem.chunk_tokens(found.configuration) > 64
    assert run_s(problem, found) < 0.9 * run_s(problem, small)
    assert run_s(problem, confirmed.improved(plan)) <= run_s(problem, plan)
    alike = make_problem([(200, 9)] * 24, ["t4-16g"] * 3)
    assert confirm._chunk(alike, assign(alike, 8, 2, 2).configuration, 0.5) is None


def test_the_candidate_with_the_shortest_run_is_taken_whatever_its_price() -> None:
    problem = make_problem(random_lengths(1, 150, 100, 120), ["t4-16g"] * 3)
    few, many = assign(problem, 24, 2, 12), assign(problem, 24, 2, 4)
    expected = min((few, many), key=lambda one: run_s(problem, one))
    for candidates in ([few, many], [many, few]):
        assert Confirmed(problem, UNLIMITED).best_of(candidates) == expected


def test_a_candidate_that_does_not_fit_is_never_taken() -> None:
    problem = make_problem([(16, 9)] * 24, ["t4-16g", "t4-16g"])
    plan = assign(problem, 8, 2, 4)
    places = tuple(replace(place, memory_bytes=1) for place in plan.configuration.stage_devices)
    tight = replace(plan, configuration=replace(plan.configuration, stage_devices=places))
    confirmed = Confirmed(problem, UNLIMITED)
    assert confirmed.value(tight) == math.inf
    assert confirmed.best_of([tight, plan]) == plan


def test_no_plan_is_slower_than_another_method_within_the_budget() -> None:
    for seed in range(3):
        problem = make_problem(random_lengths(seed, 200, 60, 40), ["t4-16g", "v100-32g"])
        problem = replace(problem, precisions=("16", "8", "4"), budget=problem.quality.budget(1.0))
        plan = make_plan(problem, Options(), ("16", "8", "4")).plan
        assert plan.predicted is not None
        rivals = [
            baseline.tokens_per_s
            for baseline in plan.baselines
            if baseline.tokens_per_s
            and baseline.method != "flexgen"
            and baseline.quality_loss_percent is not None
            and baseline.quality_loss_percent <= 1.0
        ]
        assert rivals and plan.predicted.tokens_per_s >= max(rivals) * (1 - 1e-9)


# ---- bounds of printed times


@pytest.mark.parametrize(
    "total, closed, bound, expected",
    [
        (100.0, None, 90.0, 0.1),  # not simulated
        (100.0, 95.0, 94.0, 0.06),  # the simulation is above the closed form
        (100.0, 130.0, 117.0, 0.1),  # below it: nothing is proven of 100 seconds
        (100.0, 100.0, 0.0, 1.0),
    ],
)
def test_the_gap_is_of_the_printed_time(total, closed, bound, expected) -> None:
    problem, assignment = random_plan(1, equal=True)
    figures = {"total_s": total, "objective": total, "closed_form_s": closed}
    found = bounded(evaluate(problem, assignment).model_copy(update=figures), bound, 0.0)
    assert found.gap == pytest.approx(expected)
    assert found.lower_bound == pytest.approx(total * (1 - expected))


# ---- any number of requests


def workload(count: int, prompt: object, new: object, batch: object = "auto") -> Workload:
    return Workload.model_validate(
        {"prompt_tokens": prompt, "new_tokens": new, "num_requests": count, "batch": batch}
    )


@pytest.mark.parametrize(
    "prompt, new",
    [
        (128, 20),
        ({"min": 5, "max": 500}, {"min": 5, "max": 100}),
        (list(range(1, 1900)), 7),
        (list(range(1, 998)), {"min": 1, "max": 9}),
        ([3, 900, 40], [5, 6, 700, 8, 9]),
    ],
)
def test_equal_lengths_are_planned_for_alike_whatever_their_number(prompt, new) -> None:
    many, more = (planned_lengths(workload(n, prompt, new)) for n in (20_000, 10_000_000))
    assert many == more and len(many) <= PLANNED
    every = request_lengths(workload(20_000, prompt, new))
    for place in (0, 1):
        of_all, of_some = [each[place] for each in every], [each[place] for each in many]
        assert max(of_some) == max(of_all)
        assert np.mean(of_some) == pytest.approx(np.mean(of_all), rel=0.03)
    assert max(map(sum, many)) >= max(map(sum, every))


def test_few_requests_are_planned_for_as_they_are() -> None:
    few = workload(100, {"min": 5, "max": 500}, 9)
    assert planned_lengths(few) == request_lengths(few)


def test_a_large_batch_is_planned_for_with_several_waves() -> None:
    assert len(planned_lengths(workload(100_000, 9, 9, batch=5000))) >= 4 * 5000


@pytest.mark.parametrize("new", [9, {"min": 5, "max": 12}])
def test_ten_million_requests_get_the_plan_of_twenty_thousand(
    monkeypatch: pytest.MonkeyPatch, new: object
) -> None:
    """As long as no time limit ends the comparison of runs early.

    A run looks 100,000 requests ahead: of more than that, prompts of like length are found less
    often where lengths differ, so that a request takes longer; never less than in proportion.
    """
    for limit in ("CONFIRM_S", "MOVES_S"):
        monkeypatch.setattr(planning, limit, math.inf)
    options, plans = Options(compare=False, time_limit_s=600), []
    for count in (20_000, 10_000_000):
        job = workload(count, 24 if new == 9 else {"min": 5, "max": 50}, new)
        problem = make_problem(planned_lengths(job), ["t4-16g", "v100-32g"])
        problem = replace(problem, workload=job, num_requests=count)
        plans.append(make_plan(problem, options, ("16",)).plan)
    sizes = [(p.batch, p.prefill_micro_batch, p.decode_micro_batch, p.stages) for p in plans]
    assert sizes[0] == sizes[1]
    first, second = (plan.predicted for plan in plans)
    assert first is not None and second is not None
    assert 485 < second.total_s / first.total_s < (515 if new == 9 else 1000)


def test_a_sample_costs_its_part_of_the_sensitivity() -> None:
    problem = replace(make_problem([(16, 9)] * 2000, ["t4-16g"]), theta=10.0)
    sample = sample_of(problem, assign(problem, 8, 2, 4).configuration, 100)
    assert sample.theta == pytest.approx(10.0 * len(sample.lengths) / 2000)


def test_lists_that_hardly_recur_are_planned_for_as_they_are_served() -> None:
    some = planned_lengths(workload(20_000, list(range(1, 9000)), 7))
    every = request_lengths(workload(20_000, list(range(1, 9000)), 7))
    assert len(some) <= PLANNED and max(some) == max(every)
    assert np.mean([p for p, _ in some]) == pytest.approx(np.mean([p for p, _ in every]), rel=0.01)


def test_a_sample_has_no_more_waves_than_the_run() -> None:
    lengths = random_lengths(1, 160, 50, 20)
    problem = replace(make_problem(lengths, ["t4-16g"]), num_requests=180)
    sample = sample_of(problem, assign(problem, 64, 2, 16).configuration, 10**6)
    assert len(sample.lengths) == 3 * 64  # 160 listed ones would be 2 waves, and a part of one
