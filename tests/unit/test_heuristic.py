"""Bitwidth transfer: always within memory and budget, never worse than its start, near the best."""

import itertools
import math
import time
from dataclasses import fields, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exact import random_instance

from llmpq.cluster import Cluster
from llmpq.costs.latency import device_times
from llmpq.costs.quality import QualityModel, prior_quality
from llmpq.costs.timeline import Costs, run_s
from llmpq.model_lookup import spec_from_config
from llmpq.planner.exact import first_choice
from llmpq.planner.heuristic import heuristic, start_choice, transfer
from llmpq.planner.instance import Instance, make_instance
from llmpq.planner.moves import assign_layers
from llmpq.planner.problem import OVER, Configuration, Problem, StageDevices
from llmpq.planner.value import (
    Choice,
    count_options,
    fits,
    objective,
    shortage,
    sum_omega,
)
from llmpq.workload import Workload

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
TYPES = ("p100-12g", "t4-16g", "v100-32g", "rtx3090-24g", "a100-40g")
PRECISIONS = ("16", "8", "4", "3")


def soon() -> float:
    """A deadline that is never reached."""
    return time.monotonic() + 60


def is_allowed(instance: Instance, choice: Choice) -> bool:
    offered = all(instance.available[j, o] for j, stage in enumerate(choice) for o in stage)
    whole = sum(map(len, choice)) == instance.num_layers and all(choice)
    within = sum_omega(instance, choice) <= instance.budget * OVER
    return offered and whole and within and fits(instance, choice)


# ---- instances


def cluster_of(types: list[str], memory_gib: np.ndarray) -> Cluster:
    devices = [
        {"type": name, "memory_gib": float(gib)}
        for name, gib in zip(types, memory_gib, strict=True)
    ]
    return Cluster.model_validate({"nodes": [{"name": "box", "devices": devices}]})


def real_problem(seed: int, layers: int, stages: int) -> Problem:
    """A cluster of unequal devices that holds a model at some 4 to 16 bits, some budget."""
    rng = np.random.default_rng(seed)
    spec = spec_from_config(CONFIG | {"num_hidden_layers": layers}, name="test")
    types = [str(name) for name in rng.choice(TYPES, stages)]
    share = rng.dirichlet(np.full(stages, 5.0)) * rng.uniform(0.35, 1.3)
    cluster = cluster_of(types, 1.6 + 0.4 * layers * share)
    omega = {
        name: list(np.array(values) * rng.lognormal(0, 0.7 * (seed % 2), layers))
        for name, values in prior_quality(layers).omega.items()
    }
    quality = QualityModel(omega, 1.0, "test")
    budget = sum(omega["3"]) * float(rng.choice([0.05, 0.1, 0.2, 0.4, 1.0]))
    job = {"prompt_tokens": 256, "new_tokens": 100, "num_requests": 64, "batch": 16}
    return Problem(
        spec=spec,
        cluster=cluster,
        workload=Workload.model_validate(job),
        lengths=((256, 100),) * 64,
        times={name: device_times(cluster, name, spec, []) for name in types},
        quality=quality,
        precisions=PRECISIONS,
        budget=budget,
        theta=float(rng.choice([0.0, 0.0, 100.0])),
    )


def real_setting(problem: Problem, prefill: int, decode: int) -> Configuration:
    places = [StageDevices(d.node, d.type, d.memory_bytes) for d in problem.cluster.devices()]
    return Configuration(tuple(places), 16, prefill, decode)


def real_instance(seed: int, layers: int, stages: int) -> Instance:
    rng = np.random.default_rng([seed, 1])
    problem = real_problem(seed, layers, stages)
    return make_instance(
        problem, real_setting(problem, *(int(2**n) for n in rng.integers(0, 4, 2)))
    )


# ---- brute force


def best_value(instance: Instance) -> float:
    """Of all counts, each with its least sensitivity."""
    cuts = itertools.combinations(range(1, instance.num_layers), instance.num_stages - 1)
    return min((best_of_cut(instance, [0, *c, instance.num_layers]) for c in cuts), default=np.inf)


def best_of_cut(instance: Instance, ends: list[int]) -> float:
    held, omegas = [], []
    for stage, (start, end) in enumerate(itertools.pairwise(ends)):
        counts = [c for c in all_counts(instance, end - start) if stage_fits(instance, stage, c)]
        held.append(np.array(counts).reshape(-1, instance.num_options))
        omegas.append(np.array([least_omega(instance.omega[start:end], c) for c in counts]))
    grid = np.meshgrid(*(np.arange(len(o)) for o in omegas), indexing="ij")
    picked = [axis.ravel() for axis in grid]
    omega = sum(o[i] for o, i in zip(omegas, picked, strict=True))
    totals = np.stack([h[i] for h, i in zip(held, picked, strict=True)])  # [N, M, B]
    value = run_s(many_totals(instance, totals), column(instance.link))
    allowed = omega <= instance.budget * (1 + 1e-12)  # sums of another order round otherwise
    value = np.where(allowed, value + instance.theta * omega, np.inf)
    return float(value.min(initial=np.inf))


def all_counts(instance: Instance, layers: int) -> list[np.ndarray]:
    width = instance.num_options
    all_ways = itertools.combinations_with_replacement(range(width), layers)
    return [np.bincount(way, minlength=width) for way in all_ways]


def stage_fits(instance: Instance, stage: int, counts: np.ndarray) -> bool:
    alone = np.zeros((instance.num_stages, instance.num_options), dtype=int)
    alone[stage] = counts
    offered = not counts[~instance.available[stage]].any()
    return offered and bool(shortage(instance, alone)[stage] <= 0)


def least_omega(omega: np.ndarray, counts: np.ndarray) -> float:
    return float(omega[np.arange(len(omega)), assign_layers(omega, counts)].sum())


def many_totals(instance: Instance, counts: np.ndarray) -> Costs:
    def total(name: str) -> np.ndarray:
        layer = np.where(instance.available, getattr(instance.layer, name), 0.0)
        fixed = getattr(instance.fixed, name)[:, None]
        return np.asarray((counts * layer[:, None]).sum(axis=2) + fixed)

    return Costs(*(total(cost.name) for cost in fields(Costs)))


def column(costs: Costs) -> Costs:
    return costs.map(lambda array: array[:, None])


# ---- the least sensitivity of some counts


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 4))
def test_layers_get_the_options_of_least_sensitivity(seed: int, layers: int, options: int) -> None:
    rng = np.random.default_rng(seed)
    omega = rng.integers(0, 9, (layers, options)).astype(float)
    counts = np.bincount(rng.integers(0, options, layers), minlength=options)
    found = assign_layers(omega, counts)
    assert (np.bincount(found, minlength=options) == counts).all()
    ways = set(itertools.permutations(found.tolist()))
    assert omega[np.arange(layers), found].sum() == min(
        sum(omega[layer, option] for layer, option in enumerate(way)) for way in ways
    )


# ---- what comes out


INSTANCES = st.builds(
    random_instance,
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 4),
)


@settings(max_examples=200, deadline=None)
@given(INSTANCES)
def test_a_start_is_within_memory_and_budget(instance: Instance) -> None:
    start = start_choice(instance)
    assert start is None or is_allowed(instance, start)


@settings(max_examples=200, deadline=None)
@given(INSTANCES)
def test_a_transfer_is_allowed_and_never_worse(instance: Instance) -> None:
    start = start_choice(instance)
    if start is None:
        return
    found = transfer(instance, start, soon())
    assert is_allowed(instance, found)
    assert objective(instance, found) <= objective(instance, start) * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(INSTANCES)
def test_nothing_is_found_where_nothing_is_allowed(instance: Instance) -> None:
    small = replace(instance, capacity=np.minimum(instance.capacity, 0.0))
    assert start_choice(small) is None


@settings(max_examples=60, deadline=None)
@given(INSTANCES)
def test_a_start_above_the_budget_fits_still_and_comes_nearer(instance: Instance) -> None:
    start = start_choice(replace(instance, budget=math.inf))
    if start is None:
        return
    found = transfer(instance, start, soon())
    assert fits(instance, found)
    before, after = sum_omega(instance, start), sum_omega(instance, found)
    assert after <= max(before, instance.budget) * OVER


def test_without_time_the_start_comes_back() -> None:
    instance = real_instance(3, 12, 3)
    start = start_choice(instance)
    assert start is not None
    found = transfer(instance, start, time.monotonic() - 1)
    assert (count_options(instance, found) == count_options(instance, start)).all()


def test_it_is_near_the_best_of_all_choices() -> None:
    ratios = []
    for seed in range(24):
        instance = real_instance(seed, 6, 3)
        best = best_value(instance)
        start = start_choice(instance)
        if math.isinf(best):
            assert start is None
            continue
        if start is None:
            ratios.append(math.inf)
            continue
        ratios.append(objective(instance, transfer(instance, start, soon())) / best)
    assert len(ratios) >= 12
    assert min(ratios) >= 1 - 1e-9
    assert np.median(ratios) <= 1.03


# ---- several configurations


def test_the_best_of_several_configurations_is_kept() -> None:
    problem = replace(real_problem(3, 12, 3), budget=math.inf)
    every = [real_setting(problem, 2**n, 2 ** (4 - n)) for n in range(5)]
    starts = {one: start_choice(make_instance(problem, one)) for one in every}
    tried = [one for one, start in starts.items() if start is not None]  # others do not fit
    assert len(tried) >= 3
    found = heuristic(problem, [(0.0, setting) for setting in tried], soon(), first_choice)
    assert found is not None
    setting, choice = found
    values = []
    for one in tried:
        instance, start = make_instance(problem, one), starts[one]
        assert start is not None
        values.append(objective(instance, transfer(instance, start, soon())))
    assert objective(make_instance(problem, setting), choice) == min(values)
    assert is_allowed(make_instance(problem, setting), choice)


def test_no_setting_that_fits_gives_nothing() -> None:
    problem = real_problem(3, 12, 3)
    small = [replace(p, memory_bytes=1) for p in real_setting(problem, 1, 16).stage_devices]
    assert (
        heuristic(problem, [(0.0, Configuration(tuple(small), 16, 1, 16))], soon(), first_choice)
        is None
    )
