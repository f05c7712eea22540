"""What a layer may be: a precision, for layers of one kind; and what that costs in quality.

Of a model with one kind of layers, the options are the problem's precisions. Where there are
several kinds, each kind has options of its own, and a layer takes one of its kind's: sensitivities
`omega` [L, B] are infinite elsewhere. Precisions that name experts apart ("8+experts@4") are
options of kinds with experts alone; layers without experts then have the precision of the rest.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llmpq.costs.latency import LayerTimes
from llmpq.model_spec import ModelSpec
from llmpq.planner.problem import Assignment, Problem
from llmpq.planner.tables import Scope, Table
from llmpq.precision import layer_precision


class LayerOption(NamedTuple):
    """A precision of a layer of one kind, by its place among `ModelSpec.kind_specs`."""

    kind: int
    precision: str


@dataclass(frozen=True)
class LayerGroups:
    """Layers of equal sensitivity: `omega` [G, B], and how many each group has."""

    omega: np.ndarray
    sizes: np.ndarray


OPTIONS: Table[None, tuple[LayerOption, ...]] = Table()
LAYER_GROUPS: Table[None, LayerGroups] = Table()
OMEGA: Table[None, np.ndarray] = Table()
PLACES: Table[str, list[int]] = Table()
STAGE_OPTIONS: Table[tuple[int, tuple[str, ...]], dict[LayerOption, int]] = Table(Scope.REQUESTS)


def option_of(spec: ModelSpec, layer: int, precision: str) -> LayerOption:
    """The option of a layer at a precision of a plan."""
    kind = spec.kind_of_layers[layer]
    return LayerOption(kind, _own(spec.kind_specs[kind], precision))


def _own(kind: ModelSpec, precision: str) -> str:
    """The precision that layers of a kind have at a name of a plan."""
    return precision if kind.experts is not None else layer_precision(precision).rest


def options_of(problem: Problem) -> tuple[LayerOption, ...]:
    """All options B, those of the first kind of layers first."""

    def compute() -> tuple[LayerOption, ...]:
        return tuple(
            LayerOption(place, name)
            for place, kind in enumerate(problem.spec.kind_specs)
            for name in dict.fromkeys(_own(kind, precision) for precision in problem.precisions)
        )

    return problem.cached(OPTIONS, None, compute)


def places_of(problem: Problem, precisions: Sequence[str]) -> list[int]:
    """For every layer of the model, the place of its option among `options_of`."""
    place = {option: b for b, option in enumerate(options_of(problem))}
    spec, kinds = problem.spec, problem.spec.kind_of_layers
    pairs = zip(kinds, precisions, strict=True)
    return [place[LayerOption(kind, _own(spec.kind_specs[kind], name))] for kind, name in pairs]


def places_at(problem: Problem, precision: str) -> list[int]:
    """The same where all layers have one precision of plans."""
    names = [precision] * problem.spec.num_layers
    return problem.cached(PLACES, precision, lambda: places_of(problem, names))


def options_held(problem: Problem, assignment: Assignment, rank: int) -> dict[LayerOption, int]:
    """How many layers of a stage have each option."""
    first = sum(map(len, assignment.stages[:rank]))
    return options_from(problem, first, assignment.stages[rank])


def options_from(problem: Problem, first: int, own: tuple[str, ...]) -> dict[LayerOption, int]:
    """How many layers have each option, of those from `first` on with these precisions."""

    def compute() -> dict[LayerOption, int]:
        return dict(Counter(option_of(problem.spec, first + i, name) for i, name in enumerate(own)))

    return problem.cached(STAGE_OPTIONS, (first, own), compute)


def offers(times: LayerTimes, option: LayerOption) -> bool:
    """Whether a device's times have an option."""
    return option.precision in times.of_kind(option.kind).precisions


def lacking(times: LayerTimes, spec: ModelSpec, first: int, precisions: Sequence[str]) -> list[str]:
    """The precisions of layers from `first` on that a device has no times for."""
    options = {option_of(spec, first + i, name) for i, name in enumerate(precisions)}
    return sorted({option.precision for option in options if not offers(times, option)})


def omega_of(problem: Problem) -> np.ndarray:
    """[L, B]: sensitivity; infinity for options of other kinds of layers."""

    def compute() -> np.ndarray:
        kinds = np.array(problem.spec.kind_of_layers)
        options = options_of(problem)
        omega = np.full((len(kinds), len(options)), math.inf)
        for b, (kind, precision) in enumerate(options):
            own = kinds == kind
            omega[own, b] = np.array(problem.quality.omega[precision], dtype=float)[own]
        return omega

    return problem.cached(OMEGA, None, compute)


def groups_of(problem: Problem) -> LayerGroups:
    """Layers of equal sensitivity."""
    return problem.cached(
        LAYER_GROUPS, None, lambda: layer_groups(omega_of(problem), problem.budget, problem.theta)
    )


def layer_groups(omega: np.ndarray, budget: float, theta: float) -> LayerGroups:
    """Groups of equal rows of omega [L, B]; where omega does not matter, of layers of a kind."""
    if theta == 0 and budget == math.inf:
        omega = np.where(np.isfinite(omega), 0.0, math.inf)
    return LayerGroups(*np.unique(omega, axis=0, return_counts=True))
