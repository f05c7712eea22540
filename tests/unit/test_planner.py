"""The planner: against brute force, its baselines, what it says when nothing fits, the command."""

import itertools
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpq.cli.plan import main
from llmpq.cluster import Cluster, DeviceGroup, Link
from llmpq.costs.latency import device_times
from llmpq.costs.quality import prior_quality
from llmpq.costs.timeline import Costs
from llmpq.errors import InfeasibleError, UserError
from llmpq.model_lookup import spec_from_config
from llmpq.model_spec import ModelSpec
from llmpq.plan_data import Plan, load_plan
from llmpq.planner import baselines, search, sizes
from llmpq.planner.evaluate import evaluate, shortages, to_assignment, to_plan
from llmpq.planner.exact import solve
from llmpq.planner.instance import Instance, make_instance
from llmpq.planner.layouts import canonical, ends, num_devices, num_stages, orders, subsets
from llmpq.planner.planning import Options, make_plan, replan
from llmpq.planner.problem import Assignment, Configuration, Problem, StageDevices
from llmpq.planner.simulated import with_run
from llmpq.planner.solver import Solver
from llmpq.planner.space import make_space, opened
from llmpq.planner.value import Choice, count_options, fits, objective, shortage, sum_omega
from llmpq.planner.value import to_assignment as from_choice
from llmpq.profile_data import Profile
from llmpq.workload import Workload
from tests.unit.test_exact import random_instance

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
SLOWER = {"16": 1.0, "8": 1.2, "4": 1.5, "3": 1.7}


# ---- other methods on small random instances

INSTANCES = st.builds(
    random_instance,
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 3),
)


def all_choices(instance: Instance) -> Iterator[Choice]:
    layers, stages = instance.num_layers, instance.num_stages
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        ends = list(itertools.pairwise((0, *cuts, layers)))
        for options in itertools.product(range(instance.num_options), repeat=layers):
            yield tuple(options[a:b] for a, b in ends)


def is_allowed(instance: Instance, choice: Choice) -> bool:
    offered = all(instance.available[j, o] for j, stage in enumerate(choice) for o in stage)
    return offered and fits(instance, choice)


@settings(max_examples=60, deadline=None)
@given(INSTANCES)
def test_adabits_has_the_least_sensitivity_that_memory_allows(instance: Instance) -> None:
    omegas = [sum_omega(instance, c) for c in all_choices(instance) if is_allowed(instance, c)]
    choice = baselines.adabits(instance, baselines.FrontCache())
    if not omegas:
        assert choice is None
        return
    assert choice is not None and is_allowed(instance, choice)
    assert sum_omega(instance, choice) == pytest.approx(min(omegas))


@settings(max_examples=60, deadline=None)
@given(INSTANCES)
def test_pipeedge_has_the_least_busy_bottleneck(instance: Instance) -> None:
    option = 0
    if instance.num_layers < instance.num_stages or not instance.available[:, option].all():
        return

    def busiest(choice: Choice) -> float:
        per_layer = instance.layer.busy[:, option]
        busy = [len(s) * per_layer[j] + instance.fixed.busy[j] for j, s in enumerate(choice)]
        return max(busy)

    uniform = (c for c in all_choices(instance) if {o for s in c for o in s} == {option})
    best = min((busiest(c) for c in uniform if is_allowed(instance, c)), default=math.inf)
    choice = baselines.pipeedge(instance, [option] * instance.num_layers)
    assert sum(map(len, choice)) == instance.num_layers and all(choice)
    if math.isfinite(best):
        assert is_allowed(instance, choice) and busiest(choice) == pytest.approx(best)
    else:
        assert not fits(instance, choice)


# ---- whole problems


def profile_data(spec: ModelSpec) -> dict[str, Any]:
    """A one-thread CPU whose packed layers are slower, as they are on CPUs."""
    rows: list[dict[str, Any]] = []

    def add(phase: str, batch: int, length: int, ms: float, precision: str = "16") -> None:
        decode = phase == "decode"
        rows.append(
            {
                "model_key": spec.model_key,
                "precision": precision,
                "phase": phase,
                "micro_batch": batch,
                "prompt_tokens": 0 if decode else length,
                "past_tokens": length if decode else 0,
                "time_ms": ms,
                "time_ms_p10": ms,
                "time_ms_p90": ms,
                "num_samples": 5,
            }
        )

    for size, length in itertools.product((1, 2, 4, 8, 16), (8, 32, 64)):
        for precision, factor in SLOWER.items():
            tokens = size * length
            add("prefill", size, length, factor * (0.2 + 0.004 * tokens), precision)
            add("decode", size, length, factor * (0.2 + 0.01 * size + 1e-5 * tokens), precision)
        add("embedding", size, length, 0.01 + 1e-4 * size * length)
    for size in (1, 2, 4, 8, 16):
        add("head", size, 0, 0.05 + 0.01 * size)
    for call in ("stage_prefill", "stage_decode"):
        add(call, 1, 8, 1e-6)
    device = {"name": "Test CPU", "type": "cpu", "memory_bytes": 2**33, "num_threads": 1}
    return {"schema_version": 1, "kind": "profile", "device": device, "rows": rows}


def cluster_data(*memory_mib: float) -> dict[str, Any]:
    names = [f"d{i}" for i in range(len(memory_mib))]
    return {
        "name": "test",
        "nodes": [{"name": "box", "devices": [{"type": name} for name in names]}],
        "rehearse": {
            name: {"slowdown": 1 + i, "memory_mib": mib}
            for i, (name, mib) in enumerate(zip(names, memory_mib, strict=True))
        },
    }


def make_problem(
    *memory_mib: float, layers: int = 4, percent: float = 1.0, workload: Any = None, **changes: Any
) -> Problem:
    spec = spec_from_config(CONFIG | {"num_hidden_layers": layers}, name="test")
    cluster = Cluster.model_validate(cluster_data(*memory_mib))
    profile = Profile.model_validate(profile_data(spec))
    quality = prior_quality(layers)
    job = workload or {"prompt_tokens": 32, "new_tokens": 8, "num_requests": 8}
    lengths = job.pop("lengths", None) or ((32, 8),) * job["num_requests"]
    types = [device.type for device in cluster.devices()]
    problem = Problem(
        spec=spec,
        cluster=cluster,
        workload=Workload.model_validate(job),
        lengths=lengths,
        times={t: device_times(cluster, t, spec, [profile]) for t in types},
        quality=quality,
        precisions=tuple(SLOWER),
        budget=quality.budget(percent),
    )
    return replace(problem, **changes)


def full_configurations(problem: Problem) -> list[Configuration]:
    """Those that use all devices."""
    count = len(problem.cluster.devices())
    return [s for s in every_setting(problem) if len(s.stage_devices) == count]


def every_setting(problem: Problem) -> list[Configuration]:
    """Every order of every subset at every pair of micro-batches."""
    space = make_space(problem)
    return [
        replace(configuration, stage_devices=order)
        for _, configuration in space.configurations(problem, Solver())
        for order in orders(configuration.stage_devices)[0]
    ]


def all_assignments(problem: Problem) -> Iterator[Assignment]:
    for configuration in every_setting(problem):
        for choice in all_choices(make_instance(problem, configuration)):
            yield from_choice(problem, configuration, choice)


@pytest.mark.parametrize("percent", [0.3, 1.0, 30.0])
def test_the_search_finds_the_best_of_all_plans(percent: float) -> None:
    problem = make_problem(0.5, 0.33, layers=3, percent=percent)
    problem = replace(problem, precisions=("16", "8", "4"))
    allowed = (
        a
        for a in all_assignments(problem)
        if not shortages(problem, a)
        and problem.quality.sum_omega(a.precisions) <= problem.budget * (1 + 1e-9)
    )
    best = min(evaluate(problem, a).objective for a in allowed)
    plan = make_plan(problem, Options(gap=0.0, simulate=False), tuple(SLOWER)).plan
    assert plan.predicted is not None
    assert plan.predicted.objective == pytest.approx(best, rel=1e-6)
    assert plan.predicted.gap <= 1e-6
    assert plan.predicted.quality_loss_percent <= percent


def mixed_lengths() -> tuple[tuple[int, int], ...]:
    return tuple((8 + 3 * i, 4 + (7 * i) % 11) for i in range(13))


def test_the_instance_never_exceeds_the_exact_time() -> None:
    """Unequal batches and a smaller last one: a bound; equal ones: all but the same number."""
    job = {"prompt_tokens": 8, "new_tokens": 4, "num_requests": 13, "batch": 5}
    mixed = make_problem(1, 1, 1, workload=job | {"lengths": mixed_lengths()})
    equal = make_problem(1, 1, 1)
    for problem, tolerance in ((mixed, 0.3), (equal, 1e-3)):
        for configuration in full_configurations(problem)[::5]:
            instance = make_instance(problem, configuration)
            for choice in (((0, 1), (2,), (0,)), ((3,), (1, 1), (0,))):
                value = objective(instance, choice)
                exact = evaluate(problem, from_choice(problem, configuration, choice)).objective
                assert value <= exact * (1 + 1e-9)
                assert value >= exact * (1 - tolerance)


def test_instance_memory_is_the_plans_memory_or_a_little_more() -> None:
    """A packed stage is given room for any of the packed precisions, and for a layer before."""
    problem = make_problem(1, 1, 1)
    configuration = full_configurations(problem)[7]
    instance = make_instance(problem, configuration)
    for choice in (((0, 0), (0,), (0,)), ((0, 1), (0,), (3,))):
        short = shortage(instance, count_options(instance, choice))
        assignment = from_choice(problem, configuration, choice)
        predicted = evaluate(problem, assignment)
        exact = [s.peak_memory_bytes - s.memory_capacity_bytes for s in predicted.stages]
        assert (short >= exact).all()
        held = [s.peak_memory_bytes for s in predicted.stages]
        assert (short - exact <= 0.3 * np.array(held)).all()


def test_tokens_per_second_count_generated_tokens_only() -> None:
    job = {"prompt_tokens": 8, "new_tokens": 4, "num_requests": 13}
    problem = make_problem(1, 1, workload=job | {"lengths": mixed_lengths()})
    plan = make_plan(problem, Options(), tuple(SLOWER)).plan
    assert plan.predicted is not None
    asked = sum(new for _, new in mixed_lengths())
    assert plan.predicted.tokens_per_s == pytest.approx(asked / plan.predicted.total_s)


def test_theta_prices_quality_in_seconds() -> None:
    dear = make_problem(0.4, 0.4, budget=math.inf, theta=1e6)
    cheap = make_problem(0.4, 0.4, budget=math.inf, theta=0.0)
    plans = [make_plan(p, Options(), tuple(SLOWER)).plan.predicted for p in (dear, cheap)]
    assert plans[0] is not None and plans[1] is not None
    assert plans[0].sum_sensitivity <= plans[1].sum_sensitivity
    assert plans[1].total_s <= plans[0].total_s * 1.005
    expected = plans[0].total_s + 1e6 * plans[0].sum_sensitivity
    assert plans[0].objective == pytest.approx(expected)


def test_the_time_limit_still_gives_a_plan_and_a_true_bound() -> None:
    problem = make_problem(0.5, 0.4, 0.4, layers=8)
    start = time.process_time()
    rushed = make_plan(problem, Options(gap=0.0, time_limit_s=0.05), tuple(SLOWER))
    assert time.process_time() - start < 60
    best = make_plan(problem, Options(gap=0.0), tuple(SLOWER)).plan.predicted
    assert rushed.plan.predicted is not None and best is not None
    assert rushed.plan.predicted.lower_bound <= best.objective * (1 + 1e-9)
    assert rushed.plan.predicted.objective >= best.objective * (1 - 1e-9)


def cluster_of(*nodes: dict[str, int]) -> Cluster:
    held = [
        {"name": f"n{i}", "devices": [{"type": t, "count": n} for t, n in node.items()]}
        for i, node in enumerate(nodes)
    ]
    return Cluster.model_validate({"nodes": held})


def test_every_mix_of_a_small_cluster_is_there_once() -> None:
    found, notes = subsets(cluster_of({"t4-16g": 3}, {"v100-32g": 1}), (1,), 40)
    assert not notes and len(found) == len(set(found)) == 4 * 2 - 1
    joined, notes = subsets(cluster_of({"a100-40g": 4}), (1, 2, 4), 40)
    cuts = {tuple((p.tensor_parallel, n) for p, n in subset) for subset in joined}
    assert not notes and cuts == {
        *{((1, n),) for n in (1, 2, 3, 4)},
        *{((2, 1),), ((2, 2),), ((2, 1), (1, 1)), ((2, 1), (1, 2)), ((4, 1),)},
    }


def test_devices_of_unequal_memory_are_joined_too() -> None:
    groups = [{"type": "t4-16g", "count": n, "memory_gib": gib} for n, gib in ((2, 8), (1, 4))]
    groups.append({"type": "l4-24g", "count": 1})
    cluster = Cluster.model_validate({"nodes": [{"name": "box", "devices": groups[:2]}]})
    found, notes = subsets(cluster, (1, 2), 40)
    cuts = {
        tuple((p.memory_bytes >> 30, p.tensor_parallel, n) for p, n in subset) for subset in found
    }
    equal = {(), ((7, 1, 1),), ((7, 1, 2),), ((7, 2, 1),)}
    alone = {(*cut, (3, 1, 1)) for cut in equal}
    assert not notes and len(found) == len(cuts)
    assert cuts == (equal | alone | {((3, 2, 1),), ((7, 1, 1), (3, 2, 1))}) - {()}
    other = Cluster.model_validate({"nodes": [{"name": "box", "devices": groups[1:]}]})
    assert all(
        p.tensor_parallel == 1 for subset in subsets(other, (1, 2), 40)[0] for p, _ in subset
    )


def test_nodes_that_are_alike_are_not_told_apart() -> None:
    found, _ = subsets(cluster_of({"t4-16g": 1}, {"t4-16g": 1}, {"t4-16g": 1}), (1,), 40)
    assert [num_stages(subset) for subset in found] == [3, 2, 1]


def test_what_is_left_out_of_a_large_cluster_is_said() -> None:
    kinds = ("t4-16g", "v100-32g", "a100-40g", "l4-24g")
    found, notes = subsets(cluster_of(*({kind: 8} for kind in kinds for _ in range(2))), (1, 2), 80)
    assert notes and len(found) <= 2000
    assert max(num_devices(subset) for subset in found) == 64
    many = cluster_of(*({kind: n} for kind in kinds for n in (1, 2, 3, 5, 6)))
    few, notes = subsets(many, (1,), 80)
    assert len(few) == 21 and "at most one kind" in " ".join(notes)


def test_no_mix_has_more_stages_than_layers() -> None:
    found, _ = subsets(cluster_of({"t4-16g": 2, "v100-32g": 1}), (1,), 2)
    assert {num_stages(subset) for subset in found} == {1, 2}
    found, _ = subsets(cluster_of({"t4-16g": 4096}), (1,), 40)
    assert max(num_stages(subset) for subset in found) == 40


def test_an_order_crosses_as_few_links_as_can_be() -> None:
    cluster = cluster_of({"t4-16g": 3}, {"v100-32g": 2}, {"a100-40g": 1})
    subset = subsets(cluster, (1,), 40)[0][0]
    for first, last in ends(cluster, subset):
        order = canonical(subset, first, last)
        assert Counter(order) == Counter(dict(subset))
        assert (order[0], order[-1]) == (first, last)
        crossed = sum(a.node != b.node for a, b in itertools.pairwise(order))
        assert crossed == (3 if first.node == last.node else 2)
        others, complete = orders(order)
        assert order == others[0] and len(set(others)) == len(others)
        assert complete == (len(others) < 24)


@pytest.mark.parametrize("memory", [(2.0, 0.001), (2.0, 2.0)])
def test_a_device_that_only_hinders_is_left_out(memory: tuple[float, ...]) -> None:
    """The second one holds no layer at all, or is behind a link that takes seconds."""
    problem = make_problem(*memory)
    node = problem.cluster.nodes[0]
    slow = node.model_copy(update={"link": Link(bandwidth_gbs=1, latency_us=1e6)})
    problem = replace(problem, cluster=problem.cluster.model_copy(update={"nodes": [slow]}))
    planned = make_plan(problem, Options(), tuple(SLOWER))
    assert [stage.devices for stage in planned.plan.stages] == [["d0"]]
    assert any(note.startswith("left out: d1 on box") for note in planned.notes)
    assert all(outcome.feasible for outcome in planned.outcomes)


def test_what_the_time_limit_leaves_out_keeps_the_bound_of_its_batch() -> None:
    problem = make_problem(0.5, 0.4, 0.4, layers=8)
    solver = Solver()
    within = time.monotonic() + 60
    found = search.search(problem, make_space(problem), solver, gap=0.01, deadline=within)
    assert found.lower_bound > 0 and not found.timed_out and found.assignment is not None
    space = make_space(problem)
    now = time.monotonic()
    cut = search.search(problem, space, solver, gap=0.01, deadline=now, seeds=[found.assignment])
    assert cut.timed_out and not space.tables
    assert 0 < cut.lower_bound == space.bound <= found.lower_bound
    search.search(problem, space, solver, gap=0.01, deadline=within, seeds=[found.assignment])
    assert space.tables


def test_a_part_whose_opening_was_cut_short_is_opened_to_its_end_later() -> None:
    problem, solver = make_problem(0.5, 0.4, 0.4, layers=8), Solver()
    cut, whole = (make_space(problem).parts[0] for _ in range(2))
    tables = opened(cut, problem, solver, time.monotonic())
    assert len(tables) == 1 and not cut.is_open
    tables += opened(cut, problem, solver)
    assert cut.is_open and cut.tables == tables
    assert [t.subset for t in tables] == [t.subset for t in opened(whole, problem, solver)]


def test_a_search_tells_how_far_it_is() -> None:
    seen: list[search.Progress] = []
    make_plan(make_problem(0.5, 0.4), Options(progress=seen.append), tuple(SLOWER))
    phases = list(dict.fromkeys(p.phase for p in seen))
    assert phases == [
        "configurations",
        "configurations by other methods",
    ]


@pytest.mark.parametrize("seed", range(4))
def test_the_bound_of_a_mix_is_below_every_plan_of_it(seed: int) -> None:
    """Also with prices from another pair of micro-batches."""
    rng = np.random.default_rng(seed)
    memory = rng.uniform(0.35, 0.7, 3)
    problem = make_problem(*memory, layers=5, percent=float(rng.choice([0.5, 2.0, 30.0])))
    tables = [t for part in make_space(problem).parts for t in opened(part, problem, Solver())]
    for table in tables:
        pairs = [p for p in ((0, 0), (1, 2), (3, 1)) if max(p) < len(table.bounds)]
        for pair in pairs:
            for configuration in search.configurations_of(problem, table, pair):
                found = solve(make_instance(problem, configuration), Solver())
                if found.choice is None:
                    continue
                plan = evaluate(problem, from_choice(problem, configuration, found.choice))
                assert table.bounds[pair] <= plan.objective * (1 + 1e-9)


def test_a_plan_never_takes_a_byte_too_much() -> None:
    """The solver may overstep a row by a millionth; that plan is not taken."""
    one = Costs(*(np.ones((1, 2)) for _ in fields(Costs)))
    instance = replace(
        random_instance(1, 1, 1, 2),
        layer=replace(one, bursts=np.array([[1.0, 2.0]])),
        layer_bytes=np.array([[1e10 + 1, 1e9]]),
        capacity=np.array([1e10]),
        packed=np.array([False, False]),
        omega=np.zeros((1, 2)),
        budget=math.inf,
    )
    found = solve(instance, Solver())
    assert found.choice == ((1,),) and fits(instance, found.choice)
    assert not fits(instance, ((0,),))


def test_batches_and_micro_batches_that_are_tried() -> None:
    job = {"prompt_tokens": 32, "new_tokens": 8, "num_requests": 48}
    auto = make_problem(1, workload=dict(job))
    assert sizes.batch_options(auto) == [1, 2, 4, 8, 16, 32, 48]
    assert sizes.batch_options(make_problem(1, workload=job | {"batch": 12})) == [12]
    assert sizes.batch_options(make_problem(1, workload=job | {"num_requests": 3})) == [1, 2, 3]
    assert sizes.micro_batch_options(12) == (1, 2, 4, 8, 12)


def test_fewer_than_eight_requests_in_flight_are_tried_before_nothing_is_said_to_fit() -> None:
    job = {"prompt_tokens": 32, "new_tokens": 8, "num_requests": 8}
    pinned = make_problem(0.36, 0.3, workload=job | {"batch": 8}, percent=0.01)
    with pytest.raises(InfeasibleError):
        replan(pinned, Options(compare=False))
    plan = replan(make_problem(0.36, 0.3, workload=dict(job), percent=0.01), Options(compare=False))
    assert plan.batch < 8


# ---- baselines


EIGHT_AT_ONCE = {"prompt_tokens": 32, "new_tokens": 8, "num_requests": 8, "batch": 8}


def outcomes_of(problem: Problem) -> dict[str, baselines.Outcome]:
    space = make_space(problem)
    found = baselines.run_baselines(
        problem,
        space.configurations(problem, Solver()),
        math.inf,
        baselines.BASELINES,
        space.smallest(problem),
    )
    return {outcome.method: outcome for outcome in found}


@pytest.mark.parametrize("memory", [(2.0, 2.0), (0.5, 0.33), (0.36, 0.3)])
def test_baselines_fit_and_none_beats_the_plan_within_the_budget(
    memory: tuple[float, ...],
) -> None:
    problem = make_problem(*memory)
    planned = make_plan(problem, Options(), tuple(SLOWER))
    assert planned.plan.predicted is not None
    for outcome in planned.outcomes:
        if outcome.assignment is None or outcome.predicted is None:
            assert outcome.why_not or outcome.offload
            continue
        assert not shortages(problem, outcome.assignment)
        if outcome.within_budget:
            assert outcome.predicted.quality_loss_percent <= 1.0 + 1e-6
            assert outcome.predicted.objective >= planned.plan.predicted.objective * (1 - 1e-9)


def test_a_method_that_is_not_listed_is_refused() -> None:
    problem = make_problem(1, 1)
    with pytest.raises(UserError, match="'pipeedg'; known: uniform, pipeedge, adabits"):
        baselines.run_baselines(problem, [], math.inf, ["uniform", "pipeedg"])
    with pytest.raises(UserError, match="'best'; known: auto, ilp, heuristic, uniform"):
        make_plan(problem, Options(method="best"), [])


def without_a_layer(instance: Instance, options: Sequence[int]) -> Choice:
    first, *others = baselines.uniform(instance, options)
    return (first[1:], *others)


def without_a_stage(instance: Instance, options: Sequence[int]) -> Choice:
    return (tuple(options), *((),) * (instance.num_stages - 1))


@pytest.mark.parametrize("make", [without_a_layer, without_a_stage])
def test_a_method_that_leaves_out_a_layer_or_a_stage_is_a_fault(
    make: Callable[[Instance, Sequence[int]], Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    proposer = baselines._of_each_precision(make)
    monkeypatch.setitem(baselines.PROPOSERS, "uniform", proposer)
    with pytest.raises(AssertionError, match="every layer: uniform"):
        outcomes_of(make_problem(2, 2))


def test_a_choice_has_only_options_that_are_on_offer() -> None:
    problem = make_problem(2, 2)
    configuration = next(make_space(problem).configurations(problem, Solver()))[1]
    instance = make_instance(problem, configuration)
    choice = baselines.uniform(instance, [0] * instance.num_layers)
    costs = replace(instance.layer, bursts=np.full_like(instance.layer.bursts, np.inf))
    assert baselines.is_whole(instance, choice)
    assert not baselines.is_whole(replace(instance, layer=costs), choice)


def test_uniform_splits_evenly_with_one_precision() -> None:
    problem = make_problem(2, 2, 2, layers=8)
    uniform = outcomes_of(problem)["uniform"]
    assert uniform.assignment is not None
    counts = [len(stage) for stage in uniform.assignment.stages]
    assert max(counts) - min(counts) <= 1
    assert len(set(uniform.assignment.precisions)) == 1


def test_adabits_keeps_16_bits_where_they_fit() -> None:
    adabits = outcomes_of(make_problem(3, 3))["adabits"]
    assert adabits.assignment is not None and set(adabits.assignment.precisions) == {"16"}


def test_adabits_at_several_batches() -> None:
    """The cache of a layer differs between batches; what was kept from one must not mislead."""
    job = {"prompt_tokens": 32, "new_tokens": 8, "num_requests": 64}
    adabits = outcomes_of(make_problem(0.45, 0.4, layers=4, workload=job))["adabits"]
    assert adabits.feasible


def test_a_baseline_that_cannot_run_says_what_is_short() -> None:
    problem = make_problem(0.5, 0.5, 0.12, layers=8, workload=dict(EIGHT_AT_ONCE))
    problem = replace(problem, precisions=("16",))
    outcome = outcomes_of(problem)["uniform"]
    assert not outcome.feasible
    assert re.search(r"16 bits: \d+\.\d\d MiB short on d\d#\d", outcome.why_not)


def test_a_baseline_over_the_budget_says_so() -> None:
    problem = make_problem(0.36, 0.3, percent=0.01, workload=dict(EIGHT_AT_ONCE))
    outcome = outcomes_of(problem)["pipeedge"]
    assert outcome.feasible and not outcome.within_budget
    assert "over the quality budget" in outcome.why_not


def test_more_devices_than_layers() -> None:
    problem = make_problem(1, layers=2)
    group = DeviceGroup(type="d0", count=4096)
    node = problem.cluster.nodes[0].model_copy(update={"devices": [group]})
    many = replace(problem, cluster=problem.cluster.model_copy(update={"nodes": [node]}))
    plan = make_plan(many, Options(), tuple(SLOWER)).plan
    assert 1 <= len(plan.stages) <= 2


# ---- plans as values


def test_a_plan_and_its_assignment_are_the_same() -> None:
    problem = make_problem(0.5, 0.33)
    plan = make_plan(problem, Options(), tuple(SLOWER)).plan
    assignment = to_assignment(plan, problem.cluster)
    assert plan.predicted is not None
    again = to_plan(problem, assignment, plan.method, plan.predicted)
    assert again.stages == plan.stages
    priced = with_run(problem, assignment, evaluate(problem, assignment))
    assert priced.objective == plan.predicted.objective
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_configurations_of_one_device_have_no_links() -> None:
    problem = make_problem(2.0)
    plan = make_plan(problem, Options(), tuple(SLOWER)).plan
    assert len(plan.stages) == 1
    device = problem.cluster.devices()[0]
    configuration = Configuration(
        (StageDevices(device.node, device.type, device.memory_bytes),), 8, 1, 8
    )
    assert not make_instance(problem, configuration).link.busy.any()


# ---- the command


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a model, a rehearsed cluster, a workload and a profile."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    spec = spec_from_config(CONFIG, name="test")
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "cpu.json").write_text(json.dumps(profile_data(spec)))
    (tmp_path / "cluster.yaml").write_text(json.dumps(cluster_data(0.5, 0.4)))
    (tmp_path / "workload.yaml").write_text(
        "name: job\nprompt_tokens: {min: 4, max: 32}\nnew_tokens: 8\nnum_requests: 20\nbatch: 8\n"
    )
    return tmp_path


def command_line(files: Path, *more: str) -> list[str]:
    given = {
        "--model": "config.json",
        "--cluster": "cluster.yaml",
        "--workload": "workload.yaml",
        "--profiles": "profiles",
    }
    pairs = [(name, str(files / path)) for name, path in given.items() if name not in more]
    return [*itertools.chain.from_iterable(pairs), *more]


def run(files: Path, *more: str) -> Result:
    result = CliRunner().invoke(main, command_line(files, *more))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def test_the_plan_of_a_model_of_text_and_images_says_what_is_not_served(files: Path) -> None:
    text = CONFIG | {"model_type": "mistral"}
    whole = {"model_type": "mistral3", "text_config": text, "vision_config": {}}
    (files / "config.json").write_text(json.dumps(whole))
    profile = profile_data(spec_from_config(text, name="test"))
    (files / "profiles" / "cpu.json").write_text(json.dumps(profile))
    result = run(files, "-o", str(files / "plan.json"), "--method", "uniform")
    assert result.exit_code == 0, result.output
    assert "note: the language model alone is planned: images are not served" in result.output
    assert load_plan(files / "plan.json").model.has_other_parts


def test_plan_report_and_files(files: Path) -> None:
    output, folder = files / "plan.json", files / "rivals"
    result = run(files, "-o", str(output), "--baseline-plans", str(folder))
    assert result.exit_code == 0, result.output
    plan = load_plan(output)
    assert plan.method == "auto" and plan.predicted is not None
    assert plan.predicted.gap <= 0.2 and plan.predicted.quality_loss_percent <= 1.0
    assert plan.predicted.gap <= 0.005 or "the gap is above the one asked for" in result.output
    assert {b.method for b in plan.baselines} == {*baselines.BASELINES, "flexgen"}
    for outcome in plan.baselines:
        if outcome.method == "flexgen":
            continue
        assert (folder / f"{outcome.method}.json").exists() == outcome.feasible
    written = json.loads(output.read_text())
    assert all("why_not" in b and "tokens_per_s" in b for b in written["baselines"])
    for text in (
        "budget 1 % (default)",
        "generic estimate, not measured",
        "tokens/s",
        "fitted",
    ):
        assert text in result.output


@pytest.mark.parametrize("method", baselines.BASELINES)
def test_a_baseline_as_the_method(files: Path, method: str) -> None:
    output = files / "plan.json"
    result = run(files, "--method", method, "--max-quality-loss", "50", "-o", str(output))
    assert result.exit_code == 0, result.output
    assert load_plan(output).method == method


def test_evaluate_prices_a_plan_as_the_planner_did(files: Path) -> None:
    output, priced = files / "plan.json", files / "priced.json"
    run(files, "-o", str(output), "-q")
    result = run(files, "--evaluate", str(output), "--json", str(priced))
    assert result.exit_code == 0, result.output
    before, after = load_plan(output).predicted, load_plan(priced).predicted
    assert before is not None and after is not None
    assert after.total_s == pytest.approx(before.total_s)


def test_evaluate_needs_no_cluster_file_and_says_what_does_not_fit(files: Path) -> None:
    output = files / "plan.json"
    run(files, "-o", str(output), "-q")
    profiles = ["--profiles", str(files / "profiles")]
    runner = CliRunner()
    assert runner.invoke(main, ["--evaluate", str(output), *profiles]).exit_code == 0
    (files / "cluster.yaml").write_text(json.dumps(cluster_data(0.2, 0.1)))
    smaller = ["--cluster", str(files / "cluster.yaml")]
    result = runner.invoke(main, ["--evaluate", str(output), *profiles, *smaller])
    assert result.exit_code == 3 and "the plan does not fit" in result.output


CLUSTER = json.dumps(cluster_data(0.5, 0.4))
SENSITIVITY = {
    "schema_version": 1,
    "kind": "sensitivity",
    "model": "other",
    "num_layers": 7,
    "indicator": "measured",
    "layers": [],
    "calibration": {"source": "x", "num_tokens": 1},
    "fit": {"scale": 1, "mean_abs_error_percent": 0, "num_plans": 0},
}
BAD_FILES = {
    "unknown device type": ("cluster.yaml", "nodes: [{name: n, devices: [{type: t5}]}]", "'t5'"),
    "negative memory": ("cluster.yaml", CLUSTER.replace("0.5", "-0.5"), "memory_mib"),
    "too long for the model": (
        "workload.yaml",
        "prompt_tokens: 125\nnew_tokens: 4\nnum_requests: 2\n",
        "exceeds the 128 positions",
    ),
    "YAML syntax": ("workload.yaml", "name: [", "not valid YAML"),
    "unknown key": ("workload.yaml", "prompts: 1\n", "unknown key 'prompts'"),
    "empty profile": ("profiles/cpu.json", "{}", "'device' is missing"),
    "JSON syntax": ("profiles/cpu.json", "{", "not valid JSON"),
    "another model": ("sensitivity.json", json.dumps(SENSITIVITY), "7 layers"),
    "model without sizes": ("config.json", '{"model_type": "llama"}', "'hidden_size' is missing"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_ends_with_2_and_its_fault(files: Path, case: str) -> None:
    name, text, message = BAD_FILES[case]
    (files / name).write_text(text)
    more = ["--sensitivity", str(files / name)] if name == "sensitivity.json" else []
    result = run(files, *more)
    assert result.exit_code == 2 and message in result.output, result.output
    assert "Traceback" not in result.output


BAD_FLAGS = {
    "theta and budget": (["--theta", "1", "--max-quality-loss", "1"], "not both"),
    "missing file": (["--cluster", "nowhere.yaml"], "nowhere.yaml: no such file"),
    "missing model": (["--model", "nowhere"], "nowhere: no such model"),
    "missing folder": (["--profiles", "nowhere"], "no such folder"),
    "unknown precision": (["--precisions", "16,5"], "unknown precision '5'"),
    "unmeasured precision": (["--precisions", "8-w8a8"], "no device type has times for it"),
    "no precision": (["--precisions", ","], "names nothing"),
    "negative budget": (["--max-quality-loss", "-1"], "-1"),
    "infinite theta": (["--theta", "inf"], "not a finite number"),
    "theta not a number": (["--theta", "nan"], "not a finite number"),
    "gap not a number": (["--gap", "nan"], "not a finite number"),
    "budget not a number": (["--max-quality-loss", "nan"], "not a finite number"),
    "infinite budget": (["--max-quality-loss", "inf"], "not a finite number"),
    "frontier and theta": (["--frontier", "--theta", "1"], "leave out --theta"),
    "frontier and evaluate": (["--frontier", "--evaluate", "p.json"], "give only one of"),
    "one cluster to compare": (["--compare-clusters", "a.yaml"], "two cluster files or more"),
    "a stray file": (["a.yaml"], "unexpected a.yaml"),
    "flexgen to a file": (["--method", "flexgen", "-o", "p.json"], "has no plan file"),
    "tensor parallelism": (["--tensor-parallel", "many"], "expected off, auto or a number"),
    "unknown method": (["--method", "magic"], "magic"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_bad_flag_ends_with_2(files: Path, case: str) -> None:
    flags, message = BAD_FLAGS[case]
    result = run(files, *flags)
    assert result.exit_code == 2 and message in result.output, result.output


def test_faults_of_several_files_come_together(files: Path) -> None:
    (files / "cluster.yaml").write_text("nodes: []\n")
    (files / "workload.yaml").write_text("prompt_tokens: 0\n")
    output = run(files, "--profiles", str(files / "none")).output
    for part in ("cluster.yaml", "workload.yaml", "none: no such folder"):
        assert part in output


def test_without_profiles_a_rehearsal_says_what_to_run(files: Path) -> None:
    arguments = command_line(files)
    at = arguments.index("--profiles")
    result = CliRunner().invoke(main, arguments[:at] + arguments[at + 2 :])
    assert result.exit_code == 2 and "llmpq-profile layers --model" in result.output


def test_nothing_fits_ends_with_3(files: Path) -> None:
    (files / "cluster.yaml").write_text(json.dumps(cluster_data(0.15, 0.1)))
    result = run(files)
    assert result.exit_code == 3
    assert "MiB short" in result.output and "would fit:" in result.output


def test_a_quality_that_cannot_be_kept_ends_with_3(files: Path) -> None:
    (files / "cluster.yaml").write_text(json.dumps(cluster_data(0.32, 0.26)))
    result = run(files, "--max-quality-loss", "0")
    assert result.exit_code == 3 and "no plan keeps the quality" in result.output


def test_spec_sheets_are_named_as_such(files: Path) -> None:
    (files / "cluster.yaml").write_text("nodes: [{name: n, devices: [{type: t4-16g, count: 2}]}]")
    result = run(files)
    assert result.exit_code == 0 and "not from measurements" in result.output


def test_names_with_brackets_are_printed_as_they_are(files: Path) -> None:
    (files / "cluster.yaml").write_text(json.dumps(cluster_data(0.5, 0.4) | {"name": "[/x] [red]"}))
    result = run(files)
    assert result.exit_code == 0 and "on [/x] [red]" in result.output
