"""The search against every assignment of 200 small random problems, by enumeration.

All orders of all devices, all micro-batches and partitions; of the ways to choose precisions for a
stage's layers, those of equal numbers of each take equal times, so that the one of least
sensitivity is the best.
"""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from test_exact import cuts, fitting, totals
from test_search import BETWEEN, GIB_OF_CONTEXT, INSIDE, link, problem_on

from llmpq.cluster import Cluster
from llmpq.costs.quality import QualityModel
from llmpq.costs.timeline import run_s
from llmpq.planner import search
from llmpq.planner.evaluate import evaluate
from llmpq.planner.instance import make_instance
from llmpq.planner.layer_options import omega_of
from llmpq.planner.problem import Configuration, Problem, StageDevices
from llmpq.planner.solver import Solver
from llmpq.planner.space import Space, make_space
from llmpq.planner.value import objective, to_assignment
from llmpq.workload import Workload

TYPES = ("t4-16g", "v100-32g", "l4-24g", "a100-40g")


def random_problem(seed: int) -> Problem:
    """2 or 3 devices, 4 to 6 layers, 2 or 3 precisions; memory for some 5 to 20 bits a layer.

    Equal lengths in every third one, equal sensitivities in every other one.
    """
    rng = np.random.default_rng(seed)
    count, layers = int(rng.integers(2, 4)), int(rng.integers(4, 7))
    precisions = [("16", "4"), ("16", "8", "4"), ("8", "3")][rng.integers(3)]
    share = rng.dirichlet(np.full(count, 5.0)) * rng.uniform(0.6, 1.9)
    groups = [
        {"type": str(name), "memory_gib": GIB_OF_CONTEXT + (20 + 24 * layers * float(part)) / 1024}
        for name, part in zip(rng.choice(TYPES, count), share, strict=True)
    ]
    nodes = [groups] if rng.random() < 0.4 else [groups[:1], groups[1:]]
    held = [{"name": f"n{i}", "devices": g, "link": link(INSIDE)} for i, g in enumerate(nodes)]
    cluster = Cluster.model_validate({"nodes": held, "link": link(BETWEEN)})
    problem = problem_on(cluster, layers, 1024, precisions)
    omega = problem.quality.omega
    if seed % 2:
        omega = {p: [sum(each) / layers] * layers for p, each in omega.items()}
    lengths = [(96, 8)] * 20
    if seed % 3:
        ends = rng.integers(2, (200, 40), (20, 2))
        lengths = [(int(prompt), int(new)) for prompt, new in ends]
    job = {"prompt_tokens": 96, "new_tokens": 8, "num_requests": 20}
    return replace(
        problem,
        workload=Workload.model_validate(job | {"batch": int(rng.integers(3, 6))}),
        lengths=tuple(lengths),
        quality=QualityModel(omega, 1.0, "test"),
        budget=float(rng.choice([0.04, 0.15, math.inf])),
        theta=float(rng.choice([0.0, 1.0])),
        _known={},
    )


def ways(problem: Problem, stages: int) -> tuple[np.ndarray, np.ndarray]:
    """All counts [N, B, ways] of any partition, and the least sensitivity of each: all are seen."""
    layers, omega = problem.spec.num_layers, omega_of(problem)
    held, least = [], []
    for ends in cuts(layers, stages):
        each = [least_omegas(omega[begin:end]) for begin, end in ends]
        for way in itertools.product(*each):
            held.append(way)
            least.append(sum(found[one] for found, one in zip(each, way, strict=True)))
    return np.array(held).transpose(1, 2, 0), np.array(least)


def least_omegas(omega: np.ndarray) -> dict[tuple[int, ...], float]:
    """By how many of a stage's layers have each option: the least sum of all ways to choose."""
    layers, width = omega.shape
    found: dict[tuple[int, ...], float] = {}
    own = [np.flatnonzero(np.isfinite(row)).tolist() for row in omega]
    for options in itertools.product(*own):
        counts = tuple(options.count(option) for option in range(width))
        value = float(omega[np.arange(layers), options].sum())
        found[counts] = min(value, found.get(counts, math.inf))
    return found


def configurations_of(space: Space, order: tuple[StageDevices, ...]) -> list[Configuration]:
    """All sizes that the search looks at for these places; it must know every set of places."""
    own = frozenset(counted(order))
    same = [part.sizes for part in space.parts if own in map(frozenset, part.subsets)]
    assert same
    return [
        Configuration(order, sizes.batch, *pair, sizes.chunk_tokens, sizes.lanes)
        for sizes in same
        for pair in itertools.product(sizes.prefill, sizes.decode)
    ]


def counted(order: tuple[StageDevices, ...]) -> list[tuple[StageDevices, int]]:
    return list(Counter(order).items())


def brute_force(problem: Problem, space: Space) -> float:
    """The least objective of all orders, pairs of micro-batches, partitions and precisions."""
    places = [StageDevices(d.node, d.type, d.memory_bytes) for d in problem.cluster.devices()]
    best = math.inf
    for count in range(1, len(places) + 1):
        held, omega = ways(problem, count)
        allowed = omega <= problem.budget * (1 + 1e-12)
        held, omega = held[:, :, allowed], omega[allowed]
        for order in set(itertools.permutations(places, count)):
            for setting in configurations_of(space, order):
                instance = make_instance(problem, setting)
                fits = fitting(instance, held)
                stage = totals(instance, held[:, :, fits])
                value = run_s(stage, instance.link.map(lambda array: array[:, None]))
                value = value + problem.theta * omega[fits]
                best = min(best, float(value.min(initial=math.inf)))
    return best


def check_search(problem: Problem, seed: int) -> None:
    """No order, pair of micro-batches, partition or choice is better than what the search finds."""
    solver = Solver()
    space = make_space(problem)
    best = brute_force(problem, space)
    assert space.bound <= best * (1 + 1e-7), seed
    found = search.search(problem, space, solver, gap=0.0, deadline=math.inf)
    assert not found.timed_out
    if math.isinf(best):
        assert found.assignment is None, seed
        return
    assert found.best == pytest.approx(best, rel=1e-6), seed
    assert best * (1 - 1e-4) <= found.lower_bound <= best * (1 + 1e-7), seed


def test_no_plan_of_a_batch_is_below_the_bound_that_knows_no_jobs() -> None:
    """By enumeration."""
    shares = []
    for seed in range(0, 200, 10):
        problem = random_problem(seed)
        space = make_space(problem)
        usual = [part for part in space.parts if part.sizes.chunk_tokens is None]
        for part in usual:
            best = brute_force(problem, replace(space, parts=[part]))
            assert part.bound <= best * (1 + 1e-9), seed
            shares.append(part.bound / best)
    assert max(shares) > 0.15  # it says something


@pytest.mark.parametrize("tens", range(20))
def test_the_search_finds_the_least_objective_of_all_assignments(tens: int) -> None:
    """By enumeration."""
    for seed in range(10 * tens, 10 * tens + 10):
        check_search(random_problem(seed), seed)


def test_most_of_the_small_problems_have_a_plan_and_they_differ() -> None:
    """Else the enumeration would say little."""
    found = []
    for seed in range(0, 200, 8):
        problem, solver = random_problem(seed), Solver()
        space = make_space(problem)
        one = search.search(problem, space, solver, gap=0.0, deadline=math.inf)
        found.append(one.assignment)
    plans = [one for one in found if one is not None]
    assert len(plans) > 0.6 * len(found)
    assert len({len(one.stages) for one in plans}) == 3
    assert len({one.configuration.decode_micro_batch for one in plans}) > 2
    assert sum(len(set(one.precisions)) > 1 for one in plans) > 0.2 * len(plans)


@pytest.mark.parametrize("seed", range(20))
def test_an_instance_has_the_objective_of_the_plan(seed: int) -> None:
    """The price that is optimised is the price that plans are compared by."""
    problem, rng = random_problem(seed), np.random.default_rng(seed)
    places = [StageDevices(d.node, d.type, d.memory_bytes) for d in problem.cluster.devices()]
    space, layers = make_space(problem), problem.spec.num_layers
    every = configurations_of(space, tuple(places))
    for _ in range(5):
        setting = every[rng.integers(len(every))]
        options = [int(n) for n in rng.integers(0, len(problem.precisions), layers)]
        partitions = list(cuts(layers, len(places)))
        ends = partitions[rng.integers(len(partitions))]
        choice = tuple(tuple(options[begin:end]) for begin, end in ends)
        plan = to_assignment(problem, setting, choice)
        value = objective(make_instance(problem, setting), choice)
        assert evaluate(problem, plan).objective == pytest.approx(value, rel=1e-9)
