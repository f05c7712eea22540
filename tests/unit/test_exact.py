"""Every ILP, LP and bound of the planner against brute force on small random instances."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpq.costs.timeline import Costs, run_s
from llmpq.planner import counts
from llmpq.planner.exact import allowed, build, is_even, solve, spread
from llmpq.planner.instance import Instance
from llmpq.planner.solver import Solver
from llmpq.planner.value import Choice, count_options, objective, seconds, sum_omega

SOLVER = Solver()


def random_costs(rng: np.random.Generator, *shape: int) -> Costs:
    return Costs(*(rng.integers(1, 9, shape).astype(float) for _ in fields(Costs)))


def random_links(rng: np.random.Generator, stages: int) -> Costs:
    """The last one is the token return path, which is no part of the prefill."""
    links = Costs(*(rng.integers(0, 5, stages).astype(float) for _ in fields(Costs)))
    for part in (links.prefill, links.first, links.bursts, links.others):
        part[-1] = 0.0
    return links


def random_instance(seed: int, layers: int, stages: int, options: int) -> Instance:
    """Small whole numbers; memory and budget are often just enough, or just not."""
    rng = np.random.default_rng(seed)
    layer = random_costs(rng, stages, options)
    if options > 1 and rng.random() < 0.3:
        missing = rng.integers(stages), rng.integers(options)
        for part in fields(Costs):
            getattr(layer, part.name)[missing] = math.inf
    even = rng.random() < 0.3
    omega = rng.integers(0, 6, (1 if even else layers, options)).astype(float)
    return Instance(
        layer=layer,
        fixed=random_costs(rng, stages),
        link=random_links(rng, stages),
        layer_bytes=rng.integers(1, 8, (stages, options)).astype(float),
        capacity=rng.integers(-1, 5 * layers, stages).astype(float),
        unpacked_bytes=rng.integers(0, 4, stages).astype(float),
        packed=rng.random(options) < 0.6,
        omega=np.broadcast_to(omega, (layers, options)).copy(),
        budget=float(rng.integers(0, 4 * layers)) if rng.random() < 0.6 else math.inf,
        theta=float(rng.choice([0.0, 0.5, 3.0])),
    )


INSTANCES = st.builds(
    random_instance,
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 4),
)


def cuts(layers: int, stages: int) -> Iterator[list[tuple[int, int]]]:
    for inner in itertools.combinations(range(1, layers), stages - 1):
        yield list(itertools.pairwise((0, *inner, layers)))


def all_counts(instance: Instance, ranges: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Every way to choose options: [choices, L], and their counts [N, B, choices]."""
    every = itertools.product(range(instance.num_options), repeat=instance.num_layers)
    options = np.array(list(every))
    held = options[:, :, None] == np.arange(instance.num_options)
    return options, np.stack([held[:, a:e].sum(axis=1).T for a, e in ranges])


def brute_force(instance: Instance) -> float:
    """The least objective of all choices, by nothing but the definitions."""
    if instance.num_layers < instance.num_stages:
        return math.inf
    best = math.inf
    for ranges in cuts(instance.num_layers, instance.num_stages):
        options, held = all_counts(instance, ranges)
        value = run_s(totals(instance, held), instance.link.map(lambda a: a[:, None]))
        omega = instance.omega[np.arange(instance.num_layers), options].sum(axis=1)
        value = np.where(fitting(instance, held), value + instance.theta * omega, math.inf)
        best = min(best, float(value[omega <= instance.budget].min(initial=math.inf)))
    return best


def totals(instance: Instance, held: np.ndarray) -> Costs:
    def total(name: str) -> np.ndarray:
        each = np.where(instance.available, getattr(instance.layer, name), 0.0)
        fixed = getattr(instance.fixed, name)
        return np.asarray((each[:, :, None] * held).sum(axis=1) + fixed[:, None])

    return Costs(*(total(part.name) for part in fields(Costs)))


def fitting(instance: Instance, held: np.ndarray) -> np.ndarray:
    used = (held * instance.layer_bytes[:, :, None]).sum(axis=1)
    any_packed = (held * instance.packed[None, :, None]).sum(axis=1) > 0
    used = used + instance.unpacked_bytes[:, None] * any_packed
    offered = ~((held > 0) & ~instance.available[:, :, None]).any(axis=(0, 1))
    return np.asarray((used <= instance.capacity[:, None]).all(axis=0) & offered)


@settings(max_examples=300, deadline=None)
@given(INSTANCES)
def test_the_optimum_and_the_verdict_are_those_of_brute_force(instance: Instance) -> None:
    best = brute_force(instance)
    found = solve(instance, SOLVER)
    assert found.bound <= best * (1 + 1e-6)
    if math.isinf(best):
        assert found.status == "infeasible" and found.choice is None
        return
    assert found.status == "optimal" and found.choice is not None
    assert allowed(instance, found.choice)
    assert objective(instance, found.choice) == pytest.approx(best, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(INSTANCES)
def test_the_plain_programme_has_the_same_optimum(instance: Instance) -> None:
    ours, plain = solve(instance, SOLVER), solve(instance, SOLVER, plain=True)
    assert ours.status == plain.status
    if ours.choice is not None and plain.choice is not None:
        values = objective(instance, ours.choice), objective(instance, plain.choice)
        assert values[0] == pytest.approx(values[1], rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(INSTANCES)
def test_relaxations_are_never_above_the_optimum(instance: Instance) -> None:
    best = brute_force(instance)
    if instance.num_layers < instance.num_stages:
        return
    for program in (
        build(instance),
        counts.build(instance),
        counts.build(instance, any_order=True),
    ):
        assert SOLVER.relaxed(program).objective <= best * (1 + 1e-6)


@settings(max_examples=60, deadline=None)
@given(INSTANCES)
def test_a_bound_for_any_order_holds_for_every_order_of_the_middle(instance: Instance) -> None:
    """With links alike, as orders that cross as many of them have it."""
    if instance.num_stages < 3 or instance.num_layers < 3:
        return
    same = instance.link.map(lambda a: np.array([*(a[:1].tolist() * (len(a) - 1)), a[-1]]))
    instance = replace(instance, link=same)
    bound = SOLVER.integers(counts.build(instance, any_order=True)).bound
    assert bound <= brute_force(instance) * (1 + 1e-6)


def test_four_stages_in_every_order_are_above_the_bound_for_any_order() -> None:
    for seed in range(12):
        instance = random_instance(seed, 5, 4, 2)
        alike = instance.link.map(lambda a: np.array([*(a[:1].tolist() * 3), a[-1]]))
        instance = replace(instance, link=alike, capacity=instance.capacity + 9)
        bound = SOLVER.integers(counts.build(instance, any_order=True)).bound
        for middle in ((1, 2), (2, 1)):
            assert bound <= brute_force(reordered(instance, [0, *middle, 3])) * (1 + 1e-6)


def reordered(instance: Instance, order: list[int]) -> Instance:
    return replace(
        instance,
        layer=instance.layer.map(lambda a: a[order]),
        fixed=instance.fixed.map(lambda a: a[order]),
        layer_bytes=instance.layer_bytes[order],
        capacity=instance.capacity[order],
        unpacked_bytes=instance.unpacked_bytes[order],
    )


@settings(max_examples=40, deadline=None)
@given(INSTANCES, st.floats(0.5, 1.5))
def test_a_cutoff_finds_only_what_is_below_it(instance: Instance, share: float) -> None:
    best = brute_force(instance)
    if math.isinf(best):
        return
    found = solve(instance, SOLVER, cutoff=best * share)
    if share < 0.999:
        assert found.status == "infeasible"
    elif share > 1.001:
        assert found.choice is not None
        assert objective(instance, found.choice) == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(INSTANCES)
def test_seconds_of_counts_are_those_of_the_choice(instance: Instance) -> None:
    if instance.num_layers < instance.num_stages or not instance.available.all():
        return
    choice: Choice = tuple(
        (j % instance.num_options,) * (1 if j else instance.num_layers - instance.num_stages + 1)
        for j in range(instance.num_stages)
    )
    held = count_options(instance, choice)
    value = seconds(instance, held) + instance.theta * sum_omega(instance, choice)
    assert objective(instance, choice) == pytest.approx(value)
    lowest = spread(instance, held)
    assert (count_options(instance, lowest) == held).all()
    assert sum_omega(instance, lowest) <= sum_omega(instance, choice) + 1e-9


def test_a_solve_without_time_is_not_called_infeasible() -> None:
    instance = random_instance(1, 6, 3, 3)
    roomy = replace(instance, capacity=np.full(3, 1e6), budget=math.inf)
    big = replace(roomy, omega=np.random.default_rng(0).random((60, 3)), theta=1.0)
    assert not is_even(big)
    assert solve(big, SOLVER, time_limit=0.01).status != "infeasible"
    assert solve(big, SOLVER, time_limit=0.0).status in ("unknown", "feasible")
    assert solve(big, SOLVER, time_limit=0.0, plain=True).status == "unknown"
