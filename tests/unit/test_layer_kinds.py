"""Plans of models whose layers are of several kinds, with and without experts.

The search against every assignment of 200 small random problems (`test_brute_force`), and what a
choice of layers of several kinds must be like.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from test_brute_force import check_search, random_problem

from llmpq.costs.latency import device_times
from llmpq.costs.quality import QualityModel, prior_of
from llmpq.errors import UserError
from llmpq.model_spec import Experts, LayerKind, LinearShape, ModelSpec
from llmpq.planner import search
from llmpq.planner.evaluate import evaluate, memory_of, shortages
from llmpq.planner.exact import first_choice, spread
from llmpq.planner.inputs import Wishes, inputs_of, make_problem
from llmpq.planner.instance import make_instance
from llmpq.planner.layer_options import omega_of, option_of, options_of, places_of
from llmpq.planner.problem import Assignment, Configuration, Problem, StageDevices
from llmpq.planner.solver import Solver
from llmpq.planner.space import make_space
from llmpq.planner.value import to_assignment
from llmpq.precision import bits_text, layer_precision, with_fewer_for_experts


def widened(op: LinearShape, factor: float) -> LinearShape:
    """A matrix with more or fewer outputs."""
    return op.model_copy(update={"out_features": 64 * max(1, round(op.out_features * factor / 64))})


def kind_of(spec: ModelSpec, name: str, factor: float, experts: Experts | None = None) -> LayerKind:
    """Layers whose matrices are `factor` times as large, beside experts."""
    return LayerKind(
        name=name,
        linears=tuple(widened(op, factor) for op in spec.linears),
        layer_other_params=spec.layer_other_params,
        ffn_size=max(64, round(spec.ffn_size * factor)),
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        experts=experts,
    )


def with_kinds(
    spec: ModelSpec, kinds: Sequence[LayerKind], layer_kinds: Sequence[int]
) -> ModelSpec:
    """The model with as many layers as `layer_kinds` names, of these kinds."""
    own = {name: getattr(kinds[0], name) for name in set(LayerKind.model_fields) - {"name"}}
    return ModelSpec.model_validate(
        spec.model_dump()
        | {name: value for name, value in own.items() if name != "linears"}
        | {"linears": kinds[0].linears, "kinds": tuple(kinds), "layer_kinds": tuple(layer_kinds)}
        | {"num_layers": len(layer_kinds)}
    )


def problem_with(problem: Problem, spec: ModelSpec, seed: int) -> Problem:
    """The problem for another model, whose layers are unequally sensitive in every other one."""
    rng = np.random.default_rng(1000 + seed)
    precisions = with_fewer_for_experts(problem.precisions)
    if all(kind.experts is None for kind in spec.kind_specs):
        precisions = list(problem.precisions)
    quality = prior_of(spec)
    omega = dict(quality.omega)
    if seed % 2 == 0:
        weight = rng.uniform(0.5, 2.0, spec.num_layers)
        omega = {name: (np.array(each) * weight).tolist() for name, each in omega.items()}
    devices = {device.type for device in problem.cluster.devices()}
    return replace(
        problem,
        spec=spec,
        times={name: device_times(problem.cluster, name, spec, []) for name in devices},
        quality=replace(quality, omega=omega),
        precisions=tuple(precisions),
        _known={},
    )


def random_kinds(seed: int) -> Problem:
    """As `random_problem`, with 2 or 3 kinds of layers, one of them with experts in most cases."""
    problem, rng = random_problem(seed), np.random.default_rng(2000 + seed)
    spec, count = problem.spec, 2 + int(rng.integers(2))
    experts = Experts(count=4, per_token=2, linears=tuple(widened(op, 0.25) for op in spec.linears))
    factors = rng.uniform(0.3, 1.5, count)
    held = [None, experts if seed % 3 else None, None][:count]
    kinds = [
        kind_of(spec, f"kind {i}", float(factor), own)
        for i, (factor, own) in enumerate(zip(factors, held, strict=True))
    ]
    layers = min(spec.num_layers, 4 + seed % 2)
    if seed % 4 == 0:  # the first ones are of one kind, as in DeepSeek's models
        first = int(rng.integers(1, layers))
        order = [0] * first + [1] * (layers - first)
    else:
        order = rng.integers(0, count, layers).tolist()
    return problem_with(problem, with_kinds(spec, kinds, order), seed)


@pytest.mark.parametrize("tens", range(20))
def test_the_search_finds_the_least_objective_of_all_assignments(tens: int) -> None:
    """By enumeration."""
    for seed in range(10 * tens, 10 * tens + 10):
        check_search(random_kinds(seed), seed)


def test_most_of_the_small_problems_have_a_plan_and_they_differ() -> None:
    """Else the enumeration would say little: experts have their own precision in some plans."""
    found = []
    for seed in range(0, 200, 8):
        problem, solver = random_kinds(seed), Solver()
        space = make_space(problem)
        best = search.search(problem, space, solver, gap=0.0, deadline=math.inf).assignment
        if best is not None:
            found.append(best)
    assert len(found) >= 12
    precisions = [name for plan in found for name in plan.precisions]
    assert len(set(precisions)) >= 4
    assert any(len(set(layer_precision(name))) == 2 for name in precisions)


def choice_problem() -> tuple[Problem, Configuration]:
    problem = random_kinds(1)
    devices = [StageDevices(d.node, d.type, 2**40) for d in problem.cluster.devices()]
    return problem, Configuration(tuple(devices), 4, 2, 2)


def test_options_are_of_one_kind_each() -> None:
    problem, _ = choice_problem()
    options, omega = options_of(problem), omega_of(problem)
    assert omega.shape == (problem.spec.num_layers, len(options))
    for layer, kind in enumerate(problem.spec.kind_of_layers):
        own = [option.kind == kind for option in options]
        assert np.isfinite(omega[layer]).tolist() == own
    plain = [option for option in options if problem.spec.kind_specs[option.kind].experts is None]
    assert all(len(set(layer_precision(option.precision))) == 1 for option in plain)


def test_a_layer_without_experts_takes_the_rest_of_a_name() -> None:
    problem, _ = choice_problem()
    names = [layer_precision(name) for name in problem.precisions]
    apart = next(name for name in names if name.rest != name.experts)
    for layer, kind in enumerate(problem.spec.kind_of_layers):
        experts = problem.spec.kind_specs[kind].experts
        found = option_of(problem.spec, layer, apart.name)
        assert found.precision == (apart.rest if experts is None else apart.name)
    places = places_of(problem, [apart.name] * problem.spec.num_layers)
    assert np.isfinite(omega_of(problem)[np.arange(len(places)), places]).all()


def test_counts_that_no_contiguous_stages_have_are_no_choice() -> None:
    problem, configuration = choice_problem()
    instance = make_instance(problem, configuration)
    choice = first_choice(instance, math.inf)
    assert choice is not None
    flat = [option for stage in choice for option in stage]
    assert np.isfinite(instance.omega[np.arange(len(flat)), flat]).all()
    held = np.zeros((instance.num_stages, instance.num_options), dtype=int)
    kinds = problem.spec.kind_of_layers
    other = next(b for b, option in enumerate(options_of(problem)) if option.kind != kinds[0])
    held[0, other] = 1  # the first layer is of another kind
    rest = [places_of(problem, ["4" if "4" in problem.precisions else "8"] * len(kinds))]
    for place in rest[0][1:]:
        held[-1, place] += 1
    assert spread(instance, held) is None


def test_memory_and_times_of_a_stage_are_those_of_its_own_layers() -> None:
    """Whichever kinds lie on a stage: what all stages take is the same in any partition."""
    problem, configuration = choice_problem()
    layers, width = problem.spec.num_layers, len(configuration.stage_devices)
    devices = (configuration.stage_devices[0],) * width
    same = replace(configuration, stage_devices=devices)
    precision = problem.precisions[-1]
    weights, caches = set(), set()
    for ends in itertools.combinations(range(1, layers), width - 1):
        cut = [b - a for a, b in itertools.pairwise((0, *ends, layers))]
        assignment = Assignment(same, tuple((precision,) * n for n in cut))
        each = [memory_of(problem, assignment, rank) for rank in range(width)]
        weights.add(sum(memory.weights for memory in each))
        caches.add(sum(memory.cache for memory in each))
    assert len(weights) == len(caches) == 1


def test_what_the_instance_says_of_a_plan_is_its_price() -> None:
    for seed in range(0, 40, 5):
        problem, solver = random_kinds(seed), Solver()
        space = make_space(problem)
        found = search.search(problem, space, solver, gap=0.05, deadline=math.inf)
        if found.assignment is None:
            continue
        configuration = found.assignment.configuration
        instance = make_instance(problem, configuration)
        choice = first_choice(instance, math.inf)
        assert choice is not None
        again = to_assignment(problem, configuration, choice)
        assert evaluate(problem, again).objective >= found.best * (1 - 1e-9)
        assert not shortages(problem, again)


# ---- what may be asked for


def asked_for(problem: Problem, *precisions: str, quality: QualityModel | None = None) -> Problem:
    inputs = inputs_of(problem.spec, problem.cluster, problem.workload, (), quality)
    return make_problem(inputs, Wishes(precisions=precisions))[0]


def test_pairs_of_what_is_asked_for_are_allowed_where_they_are_known() -> None:
    problem = random_kinds(1)
    assert "8+experts@4" in asked_for(problem, "8", "4").precisions
    known = prior_of(problem.spec)
    plain = replace(known, omega={name: known.omega[name] for name in ("16", "8", "4")})
    assert asked_for(problem, "8", "4", quality=plain).precisions == ("8", "4")
    with pytest.raises(UserError, match=r"precision 8\+experts@4: the sensitivity file"):
        asked_for(problem, "8+experts@4", quality=plain)


@pytest.mark.parametrize("name", ["banana", "8+experts@5", "experts@4", "8+experts", "8+experts@8"])
def test_an_unknown_name_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(UserError, match=f"unknown precision '{re.escape(name)}'; known: 16, 8,"):
        asked_for(random_kinds(1), name)


def test_a_dense_model_has_no_experts_to_ask_for() -> None:
    with pytest.raises(UserError, match="has no layers with experts"):
        asked_for(random_problem(1), "8+experts@4")


def test_dense_layers_lose_what_a_name_with_experts_says_of_them() -> None:
    """Where only that name was measured; layers with experts are not held at its rest alone."""
    problem = random_kinds(1)
    known = prior_of(problem.spec)
    one = replace(known, omega={"8+experts@4": known.omega["8+experts@4"]})
    found = asked_for(problem, "8+experts@4", quality=one)
    plain = [problem.spec.kind_specs[k].experts is None for k in problem.spec.kind_of_layers]
    assert found.precisions == ("8+experts@4",)
    assert np.isfinite(found.quality.omega["8"]).tolist() == plain
    places = places_of(found, ["8+experts@4"] * len(plain))
    omega = omega_of(found)[np.arange(len(plain)), places]
    assert omega.tolist() == list(known.omega["8+experts@4"])


def test_names_of_precisions_as_reports_write_them() -> None:
    assert [bits_text(name) for name in ("16", "8-w8a8", "8+experts@4", "nf4+experts@3")] == [
        "16-bit",
        "8-w8a8",
        "8-bit+experts@4",
        "nf4+experts@3",
    ]
