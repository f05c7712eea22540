"""The whole search against every order of every device, on small clusters of real device types."""

import itertools
import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_exact import cuts, fitting, totals
from test_planner import CONFIG

from llmpq.cluster import Cluster
from llmpq.costs.latency import device_times
from llmpq.costs.quality import QualityModel
from llmpq.costs.timeline import run_s
from llmpq.model_spec import spec_from_config
from llmpq.planner import search
from llmpq.planner.evaluate import evaluate
from llmpq.planner.exact import solve
from llmpq.planner.instance import make_instance
from llmpq.planner.problem import Assignment, Place, Problem, Setting
from llmpq.planner.solver import Solver
from llmpq.planner.value import objective, to_assignment
from llmpq.workload import Workload

INSIDE, BETWEEN = (12, 20), (1.25, 50)
GIB_OF_CONTEXT = 1.0


def link(figures: tuple[float, float]) -> dict[str, float]:
    return {"bandwidth_gbs": figures[0], "latency_us": figures[1]}


def cluster_of(
    *nodes: dict[str, int], mib: float, inside: Any = INSIDE, between: Any = BETWEEN
) -> Cluster:
    """Nodes of devices that have `mib` MiB each for a model."""
    gib = GIB_OF_CONTEXT + mib / 1024
    held = [
        {
            "name": f"n{i}",
            "devices": [{"type": t, "count": n, "memory_gib": gib} for t, n in node.items()],
            "link": link(inside),
        }
        for i, node in enumerate(nodes)
    ]
    return Cluster.model_validate({"nodes": held, "link": link(between)})


def problem_on(
    cluster: Cluster, layers: int, hidden: int, precisions: tuple[str, ...], vocab: int = 8000
) -> Problem:
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 5 // 2, "vocab_size": vocab}
    config = CONFIG | sizes | {"num_hidden_layers": layers, "num_key_value_heads": 4}
    spec = spec_from_config(config | {"tie_word_embeddings": False}, name="test")
    rising = [1 + 3 * i / layers for i in range(layers)]
    nats = {"16": 0.0, "8": 0.001, "4": 0.05, "3": 0.25}
    omega = {p: [n * r / sum(rising) for r in rising] for p, n in nats.items()}
    job = {"prompt_tokens": 96, "new_tokens": 8, "num_requests": 8, "batch": 4}
    return Problem(
        spec=spec,
        cluster=cluster,
        workload=Workload.model_validate(job),
        lengths=((96, 8),) * 8,
        times={d.type: device_times(cluster, d.type, spec, []) for d in cluster.devices()},
        quality=QualityModel(omega, 1.0, "test"),
        precisions=precisions,
        budget=0.04,
    )


def best_of_all_orders(problem: Problem) -> float:
    """Each order of each set of devices, each pair of micro-batches, solved by itself."""
    places = [Place(d.node, d.type, d.memory_bytes) for d in problem.cluster.devices()]
    every = {
        order
        for count in range(1, len(places) + 1)
        for order in itertools.permutations(places, count)
        if count <= problem.spec.num_layers
    }
    best = math.inf
    for order, prefill, decode in itertools.product(every, (1, 2, 4), (1, 2, 4)):
        setting = Setting(order, 4, prefill, decode)
        found = solve(make_instance(problem, setting), Solver())
        if found.choice is not None:
            assignment = to_assignment(problem, setting, found.choice)
            best = min(best, evaluate(problem, assignment).objective)
    return best


CASES = {
    "alike nodes used unequally": problem_on(
        cluster_of({"t4-16g": 2}, {"t4-16g": 2}, mib=66), 3, 1024, ("16",)
    ),
    "slower links inside": problem_on(
        cluster_of({"v100-32g": 2}, {"t4-16g": 2}, mib=780, between=(25, 5)), 4, 4096, ("16",)
    ),
    "two types on alike nodes": problem_on(
        cluster_of({"t4-16g": 1, "l4-24g": 1}, {"t4-16g": 1, "l4-24g": 1}, mib=66),
        4,
        1024,
        ("16", "8"),
    ),
    "rising sensitivity": problem_on(
        cluster_of({"t4-16g": 2}, {"v100-32g": 1}, mib=60), 6, 1024, ("16", "8", "4", "3")
    ),
    "nothing fits": problem_on(cluster_of({"t4-16g": 2}, mib=20), 3, 1024, ("16",)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_search_is_as_good_as_every_order_solved_by_itself(case: str) -> None:
    problem = CASES[case]
    best = best_of_all_orders(problem)
    solver = Solver()
    found = search.search(
        problem,
        search.make_space(problem, solver),
        solver,
        gap=0.0,
        deadline=time.monotonic() + 120,
    )
    assert math.isinf(best) == (case == "nothing fits")
    if math.isinf(best):
        assert found.assignment is None
        return
    assert found.best == pytest.approx(best, rel=1e-6)
    assert found.lower_bound <= best * (1 + 1e-7)
    assert found.lower_bound >= best * (1 - 1e-4)


# ---- every assignment of small random problems


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
        workload=Workload.model_validate(job | {"batch": int(rng.integers(4, 9))}),
        lengths=tuple(lengths),
        quality=QualityModel(omega, 1.0, "test"),
        budget=float(rng.choice([0.04, 0.15, math.inf])),
        theta=float(rng.choice([0.0, 1.0])),
        _known={},
    )


TYPES = ("t4-16g", "v100-32g", "l4-24g", "a100-40g")


def ways(problem: Problem, stages: int) -> tuple[np.ndarray, np.ndarray]:
    """All counts [N, B, ways] of any partition, and the least sensitivity of each: all are seen."""
    layers = problem.spec.num_layers
    omega = np.array([problem.quality.omega[p] for p in problem.precisions]).T
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
    for options in itertools.product(range(width), repeat=layers):
        counts = tuple(options.count(option) for option in range(width))
        value = float(omega[np.arange(layers), options].sum())
        found[counts] = min(value, found.get(counts, math.inf))
    return found


def brute_force(problem: Problem) -> float:
    """The least objective of all orders, pairs of micro-batches, partitions and precisions."""
    places = [Place(d.node, d.type, d.memory_bytes) for d in problem.cluster.devices()]
    batch, best = problem.workload.batch, math.inf
    assert isinstance(batch, int)
    pairs = list(itertools.product(search.micro_batch_options(batch), repeat=2))
    for count in range(1, len(places) + 1):
        held, omega = ways(problem, count)
        allowed = omega <= problem.budget * (1 + 1e-12)
        held, omega = held[:, :, allowed], omega[allowed]
        for order, pair in itertools.product(set(itertools.permutations(places, count)), pairs):
            instance = make_instance(problem, Setting(order, batch, *pair))
            fits = fitting(instance, held)
            stage = totals(instance, held[:, :, fits])
            value = run_s(stage, instance.link.map(lambda array: array[:, None]))
            value = value + problem.theta * omega[fits]
            best = min(best, float(value.min(initial=math.inf)))
    return best


@pytest.mark.parametrize("tens", range(20))
def test_the_search_finds_the_least_objective_of_all_assignments(tens: int) -> None:
    """By enumeration: no order, pair of micro-batches, partition or choice is better."""
    for seed in range(10 * tens, 10 * tens + 10):
        problem, solver = random_problem(seed), Solver()
        best = brute_force(problem)
        space = search.make_space(problem, solver)
        bounds = [float(table.bounds.min()) for table in space.tables]
        assert min(bounds, default=math.inf) <= best * (1 + 1e-7)
        found = search.search(problem, space, solver, gap=0.0, deadline=math.inf)
        assert not found.timed_out
        if math.isinf(best):
            assert found.assignment is None, seed
            continue
        assert found.best == pytest.approx(best, rel=1e-6), seed
        assert best * (1 - 1e-4) <= found.lower_bound <= best * (1 + 1e-7), seed


def test_most_of_the_small_problems_have_a_plan_and_they_differ() -> None:
    """Else the enumeration would say little."""
    found = []
    for seed in range(0, 200, 8):
        problem, solver = random_problem(seed), Solver()
        space = search.make_space(problem, solver)
        one = search.search(problem, space, solver, gap=0.0, deadline=math.inf)
        found.append(one.assignment)
    plans = [one for one in found if one is not None]
    assert len(plans) > 0.6 * len(found)
    assert len({len(one.stages) for one in plans}) == 3
    assert len({one.setting.decode_micro_batch for one in plans}) > 2
    assert sum(len(set(one.precisions)) > 1 for one in plans) > 0.2 * len(plans)


@pytest.mark.parametrize("seed", range(20))
def test_an_instance_has_the_objective_of_the_plan(seed: int) -> None:
    """The price that is optimised is the price that plans are compared by."""
    problem, rng = random_problem(seed), np.random.default_rng(seed)
    places = [Place(d.node, d.type, d.memory_bytes) for d in problem.cluster.devices()]
    batch, layers = problem.workload.batch, problem.spec.num_layers
    assert isinstance(batch, int)
    for _ in range(5):
        sizes = (int(rng.choice(search.micro_batch_options(batch))) for _ in range(2))
        setting = Setting(tuple(places), batch, *sizes)
        options = [int(n) for n in rng.integers(0, len(problem.precisions), layers)]
        every = list(cuts(layers, len(places)))
        ends = every[rng.integers(len(every))]
        choice = tuple(tuple(options[begin:end]) for begin, end in ends)
        plan = to_assignment(problem, setting, choice)
        value = objective(make_instance(problem, setting), choice)
        assert evaluate(problem, plan).objective == pytest.approx(value, rel=1e-9)


def test_a_plan_loses_no_quality_that_speed_does_not_need() -> None:
    """Prefill alone, where precisions differ little in time: the faster ones buy nothing."""
    problem = problem_on(cluster_of({"a100-40g": 1}, mib=4000), 4, 1024, ("16", "8", "4", "3"))
    object.__setattr__(problem, "lengths", ((96, 1),) * 8)
    solver = Solver()
    space = search.make_space(problem, solver)
    found = search.search(problem, space, solver, gap=0.005, deadline=time.monotonic() + 60)
    assert found.predicted is not None and found.assignment is not None
    for layer, precision in enumerate(found.assignment.precisions):
        changed = list(found.assignment.precisions)
        changed[layer] = "16"
        if precision != "16":
            other = to_assignment_of(found.assignment.setting, changed)
            assert evaluate(problem, other).objective > found.predicted.objective * (1 - 1e-12)


def to_assignment_of(setting: Setting, precisions: list[str]) -> Any:

    return Assignment(setting, (tuple(precisions),))
