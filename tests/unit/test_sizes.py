"""Which chunks and batches are tried, and that more requests never decide whether a job fits."""

import random
from collections.abc import Sequence

import pytest
from test_explain import replan, tiny
from test_simulate_run import make_problem

from llmpq.errors import InfeasibleError
from llmpq.plan_data import Plan
from llmpq.planner.evaluate import shortages, to_assignment
from llmpq.planner.layouts import subsets
from llmpq.planner.problem import Problem, Sizes
from llmpq.planner.sizes import (
    MOST_SHORTER,
    all_sizes,
    chunk_options,
    shorter_chunks,
    sizes_near,
    spare_sizes,
)
from llmpq.planner.space import make_space

Lengths = Sequence[tuple[int, int]]


def job(lengths: Lengths, memory_mib: Sequence[float], percent: float = 1e3) -> Problem:
    """These requests on small devices, one stage each."""
    prompts, new = zip(*lengths, strict=True)
    asked = {"prompt_tokens": prompts, "new_tokens": new, "num_requests": len(lengths)}
    return tiny(*memory_mib, percent=percent, job=asked)


def plan_of(problem: Problem) -> Plan | None:
    """None where nothing fits."""
    try:
        return replan(problem)
    except InfeasibleError:
        return None


# ---- what is tried


def test_chunks_are_halves_of_the_longest_prompt_down_to_the_shortest_chunk() -> None:
    assert chunk_options(make_problem([(700, 2), (9, 4)], ["t4-16g"])) == [700, 350, 175, 88, 64]
    assert chunk_options(make_problem([(64, 2)], ["t4-16g"])) == [64]
    assert chunk_options(make_problem([(5, 2)], ["t4-16g"])) == [5]


def test_shorter_chunks_are_tried_only_where_they_leave_much_more_room() -> None:
    lengths = [(1400, 4)] * 9
    ample, tight = job(lengths, [500.0]), job(lengths, [1.5])
    for problem, some in ((ample, False), (tight, True)):
        found, _ = subsets(problem.cluster, [1], problem.spec.num_layers)
        chunks = shorter_chunks(problem, found[0], 8)
        assert bool(chunks) == some and len(chunks) <= MOST_SHORTER
        assert list(chunks) == sorted(chunks)[::-1] and all(chunk < 1400 for chunk in chunks)
        tried = [part.sizes for part in make_space(problem).parts]
        assert [sizes for sizes in tried if sizes.chunk_tokens is None] == all_sizes(problem)
        assert any(sizes.chunk_tokens is not None for sizes in tried) == some


def test_where_nothing_fits_one_request_and_every_chunk_follow() -> None:
    problem = job([(300, 4)] * 30, [1.0])
    assert {sizes.batch for sizes in spare_sizes(problem)} == {1}
    assert [sizes.chunk_tokens for sizes in spare_sizes(problem)] == [300, 150, 75, 64]
    pinned = tiny(1.0, job={"prompt_tokens": 300, "new_tokens": 4, "num_requests": 30, "batch": 6})
    assert {sizes.batch for sizes in spare_sizes(pinned)} == {6}


def test_large_micro_batches_of_unequal_prompts_and_very_many_lanes_are_left_out() -> None:
    unequal = job([(300, 4), (20, 9)] * 300, [1.0])
    largest = all_sizes(unequal)[-1]
    assert largest.batch == 512 and max(largest.prefill) == 16 and min(largest.decode) == 8
    equal = all_sizes(job([(300, 4)] * 600, [1.0]))[-1]
    assert max(equal.prefill) == 512 and min(equal.decode) == 8


def test_sizes_near_those_of_a_plan_have_its_chunk() -> None:
    near = sizes_near(job([(300, 4)] * 600, [1.0]), Sizes(16, (1,), (4,), 150))
    assert [(sizes.batch, sizes.chunk_tokens) for sizes in near] == [(8, 150), (16, 150), (32, 150)]


# ---- what fits


def test_a_long_prompt_that_does_not_fit_whole_fits_in_chunks() -> None:
    problem = job([(700, 8)], [0.8])
    plan = plan_of(problem)
    assert plan is not None and plan.chunk_tokens is not None and plan.chunk_tokens < 700
    whole = to_assignment(plan.model_copy(update={"chunk_tokens": 700}), plan.cluster)
    assert shortages(problem, whole) and not shortages(problem, to_assignment(plan, plan.cluster))
    roomy = plan_of(job([(700, 8)], [8.0]))
    assert roomy is not None and roomy.chunk_tokens == 700


def random_job(seed: int) -> tuple[Lengths, Lengths, list[float], float]:
    """A long request, shorter ones, about as much memory as that takes, and a limit of quality."""
    rng = random.Random(seed)
    prompt, new, devices = rng.randint(40, 1500), rng.randint(2, 60), rng.randint(1, 3)
    shorter = [
        (rng.randint(1, prompt if rng.random() < 0.3 else 20), rng.randint(1, new))
        for _ in range(rng.randint(1, 40))
    ]
    need = 0.25 + prompt / 1200
    memory = [need / devices * rng.uniform(0.6, 1.8) for _ in range(devices)]
    return [(prompt, new)], shorter, memory, rng.choice([0.02, 0.5, 1e3])


def test_requests_that_are_added_never_decide_whether_a_job_fits() -> None:
    """A long one alone, and the same with shorter ones: both have a plan, or neither."""
    fits = []
    for seed in range(40):
        alone, more, *rest = random_job(seed)
        plans = [plan_of(job(lengths, *rest)) for lengths in (alone, [*alone, *more])]
        assert (plans[0] is None) == (plans[1] is None), (seed, alone, more, rest)
        fits.append(plans[0] is not None)
    assert 8 <= sum(fits) <= 32, "some fit, some do not"


@pytest.mark.parametrize("seed", range(6))
def test_short_requests_do_not_shorten_the_chunks_that_may_be_used(seed: int) -> None:
    """Chunks to choose from follow the longest prompt, however small the mean is."""
    alone, more, *_ = random_job(seed)
    options = [chunk_options(make_problem(x, ["t4-16g"])) for x in (alone, [*alone, *more])]
    assert options[0] == options[1]
