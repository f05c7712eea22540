"""The whole search against every order of every device, on small clusters of real device types."""

import itertools
import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_planner import CONFIG

from llmpq.cluster import Cluster
from llmpq.costs.latency import device_times
from llmpq.costs.quality import QualityModel
from llmpq.model_lookup import spec_from_config
from llmpq.planner import pool, pool_bounds, search
from llmpq.planner.evaluate import evaluate
from llmpq.planner.exact import solve
from llmpq.planner.instance import make_instance
from llmpq.planner.problem import Assignment, Configuration, Problem, StageDevices
from llmpq.planner.solver import Solver
from llmpq.planner.space import make_space, opened
from llmpq.planner.value import to_assignment
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
    places = [StageDevices(d.node, d.type, d.memory_bytes) for d in problem.cluster.devices()]
    every = {
        order
        for count in range(1, len(places) + 1)
        for order in itertools.permutations(places, count)
        if count <= problem.spec.num_layers
    }
    best = math.inf
    for order, prefill, decode in itertools.product(every, (1, 2, 4), (1, 2, 4)):
        setting = Configuration(order, 4, prefill, decode)
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
        make_space(problem),
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


@pytest.mark.parametrize("budget", [0.0, 0.01, 0.04])
def test_pairs_without_more_room_than_an_infeasible_one_are_infeasible(budget: float) -> None:
    cluster, solver = cluster_of({"t4-16g": 2}, {"v100-32g": 1}, mib=60), Solver()
    problem = problem_on(cluster, 6, 1024, ("16", "8", "4", "3"))
    problem = replace(problem, budget=budget, _known={})
    infeasible = feasible = 0
    tables = [table for p in make_space(problem).parts for table in opened(p, problem, solver)]
    for table in tables:
        pairs = [tuple(pair) for pair in np.argwhere(np.isfinite(table.bounds))]
        alone = {pair: pool_bounds.relaxed(table.pool, *pair, solver)[0] for pair in pairs}
        for pair in pairs:
            if math.isfinite(alone[pair]):
                feasible += 1
                continue
            infeasible += 1
            no_more_room = pool.has_no_more_room(table.pool, pair)
            assert no_more_room[pair]
            assert all(math.isinf(alone[other]) for other in pairs if no_more_room[other])
    assert infeasible
    assert feasible or not budget


def test_a_plan_loses_no_quality_that_speed_does_not_need() -> None:
    """Prefill alone, where precisions differ little in time: the faster ones buy nothing."""
    problem = problem_on(cluster_of({"a100-40g": 1}, mib=4000), 4, 1024, ("16", "8", "4", "3"))
    object.__setattr__(problem, "lengths", ((96, 1),) * 8)
    solver = Solver()
    space = make_space(problem)
    found = search.search(problem, space, solver, gap=0.005, deadline=time.monotonic() + 60)
    assert found.predicted is not None and found.assignment is not None
    for layer, precision in enumerate(found.assignment.precisions):
        changed = list(found.assignment.precisions)
        changed[layer] = "16"
        if precision != "16":
            other = to_assignment_of(found.assignment.configuration, changed)
            assert evaluate(problem, other).objective > found.predicted.objective * (1 - 1e-12)


def to_assignment_of(setting: Configuration, precisions: list[str]) -> Any:

    return Assignment(setting, (tuple(precisions),))
