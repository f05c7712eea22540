"""One order solved exactly: the best layers and precisions of an instance, with a bound.

Where all layers are equally sensitive, counts are the whole problem; else which layer lies on
which stage is part of it (`counts.build_exact`). Then a plan by moves comes first: what is better
than it can only have its stages end within narrow windows, which small LPs find, and
that leaves a fraction of the layers open.
"""

import itertools
import math
import time
from dataclasses import dataclass, replace

import numpy as np

from llmpq.planner import counts
from llmpq.planner.heuristic import start_choice, transfer
from llmpq.planner.instance import Instance
from llmpq.planner.moves import assign_layers
from llmpq.planner.problem import OVER
from llmpq.planner.solver import TOLERANCE, LinearProgram, Solver, Status
from llmpq.planner.value import Choice, count_options, fits, objective, seconds, sum_omega

MOVES_S = 0.3  # at most, for the plan by moves
SLACK = 1e-6  # of a window's ends: an LP's rounding


@dataclass(frozen=True)
class Solution:
    """A choice (if one was found) and a bound that no choice is below."""

    status: Status
    choice: Choice | None
    bound: float


def solve(
    instance: Instance,
    solver: Solver,
    *,
    gap: float = 0.0,
    time_limit: float = math.inf,
    cutoff: float = math.inf,
    plain: bool = False,
) -> Solution:
    """The best choice within `gap` (relative), if one is at most `cutoff`.

    `plain`: by the ILP with a binary for every layer, stage and option, for reference.
    """
    if instance.num_layers < instance.num_stages:
        return Solution("infeasible", None, math.inf)
    if plain or is_even(instance):
        program = counts.build_plain(instance, cutoff) if plain else counts.build(instance, cutoff)
        return _solved(instance, program, solver, gap, time_limit, cutoff)
    return _solve_uneven(instance, solver, gap, time_limit, cutoff)


def _solve_uneven(
    instance: Instance, solver: Solver, gap: float, time_limit: float, cutoff: float
) -> Solution:
    deadline = time.monotonic() + min(time_limit, MOVES_S)
    moved = first_choice(instance, deadline)
    value = objective(instance, moved) if moved else math.inf
    limit = min(cutoff, value * (1 + TOLERANCE))
    known = Solution("optimal", moved, value) if moved and value <= cutoff else None
    windows = _windows(instance, solver, limit)
    if windows is None:
        return known or Solution("infeasible", None, math.inf)
    program = counts.build_exact(instance, limit, windows)
    found = _solved(instance, program, solver, gap, time_limit, limit)
    if found.status == "infeasible":
        return known or found
    if found.choice is None and known:
        return Solution("feasible", moved, min(found.bound, limit))
    return replace(found, bound=min(found.bound, limit))


def first_choice(instance: Instance, deadline: float) -> Choice | None:
    """A choice by moves; None where none within memory and budget was found."""
    start = start_choice(instance, deadline)
    if start is None:
        return None
    choice = transfer(instance, start, deadline)
    return choice if allowed(instance, choice) else None


def _windows(instance: Instance, solver: Solver, cutoff: float) -> np.ndarray | None:
    """[N - 1, 2]: where stages but the last may end in choices up to `cutoff`.

    None where there is no such choice.
    """
    program = counts.build(instance, cutoff)
    held = counts.Columns(instance).c
    ends = [held[: j + 1].ravel() for j in range(instance.num_stages - 1)]
    found = solver.extents(program, ends)
    if found is None:
        return None
    return np.stack([np.ceil(found[:, 0] - SLACK), np.floor(found[:, 1] + SLACK)], axis=1)


def _solved(
    instance: Instance,
    program: LinearProgram,
    solver: Solver,
    gap: float,
    time_limit: float,
    cutoff: float,
) -> Solution:
    answer = solver.integers(program, gap=gap, time_limit=time_limit)
    if answer.status == "infeasible":
        return Solution("infeasible", None, math.inf)
    if answer.x is None:
        return Solution("unknown", None, answer.bound)
    choice = _choice(instance, answer.x)
    if choice is not None and not allowed(instance, choice):
        choice = _within(instance, solver, gap, time_limit, cutoff)
    return Solution(answer.status, choice, answer.bound)


def allowed(instance: Instance, choice: Choice) -> bool:
    """Within memory, to the byte, and within the budget, each layer at an option of its kind."""
    return fits(instance, choice) and sum_omega(instance, choice) <= instance.budget * OVER


def build(instance: Instance, cutoff: float = math.inf) -> LinearProgram:
    """The ILP with all that matters."""
    if is_even(instance):
        return counts.build(instance, cutoff)
    return counts.build_exact(instance, cutoff)


def is_even(instance: Instance) -> bool:
    """All layers are equally sensitive, or sensitivity does not matter."""
    return len(instance.groups.sizes) == 1


def realised(instance: Instance, held: np.ndarray, seconds: float) -> Choice | None:
    """The best choice with about so many layers `held` [N, B] at each option; None: none fits.

    Made better by moves for at most `seconds` where layers differ.
    """
    choice = spread(instance, repaired(instance, held) if instance.has_kinds else held)
    if choice is None or not fits(instance, choice):
        return None
    if not is_even(instance):
        choice = transfer(instance, choice, time.monotonic() + seconds)
    return choice if allowed(instance, choice) else None


def repaired(instance: Instance, held: np.ndarray) -> np.ndarray:
    """[N, B]: counts near to `held` that the kinds of the stages' layers allow.

    What a kind has too many of goes from the largest option, what it lacks comes at the smallest.
    """
    of_layers, of_options = instance.kinds
    counts, ends = held.copy(), held.sum(axis=1).cumsum()
    for j, end in enumerate(ends):
        there = np.bincount(of_layers[end - held[j].sum() : end], minlength=of_layers.max() + 1)
        for kind, number in enumerate(there):
            own = np.flatnonzero((of_options == kind) & instance.available[j])
            order = own[np.argsort(instance.layer_bytes[j, own])]
            for option in order[::-1]:
                counts[j, option] -= min(counts[j, option], max(0, counts[j, own].sum() - number))
            if len(order):
                counts[j, order[0]] += number - counts[j, own].sum()
    return counts


def with_less_loss(instance: Instance, choice: Choice) -> Choice:
    """The same speed, less sensitivity: layers take options that lose less where time is to spare.

    One layer of a stage at a time, as long as the run takes no longer and memory allows.
    """
    held = count_options(instance, choice)
    limit = seconds(instance, held)
    best, improved = choice, True
    while improved:
        improved = False
        for stage, origin, to in itertools.product(*map(range, (*held.shape, held.shape[1]))):
            changed = _with_one_moved(instance, held, stage, origin, to)
            if changed is None or seconds(instance, changed) > limit * (1 + 1e-12):
                continue
            other = spread(instance, changed)
            if other is None or not fits(instance, other):
                continue
            if sum_omega(instance, other) < sum_omega(instance, best):
                held, best, improved = changed, other, True
    return best


def _with_one_moved(
    instance: Instance, held: np.ndarray, stage: int, origin: int, to: int
) -> np.ndarray | None:
    if origin == to or not held[stage, origin] or not instance.available[stage, to]:
        return None
    ours = np.isfinite(instance.omega[:, origin])
    if (instance.omega[ours, to] >= instance.omega[ours, origin]).all():
        return None
    changed = held.copy()
    changed[stage, origin] -= 1
    changed[stage, to] += 1
    return changed


def spread(instance: Instance, held: np.ndarray) -> Choice | None:
    """The layers of every stage at the options that lose least, as many of each as `held`.

    None where a stage's layers are not of the kinds that its options are for.
    """
    ends = np.cumsum(held.sum(axis=1))
    stages = [
        assign_layers(instance.omega[end - row.sum() : end], row)
        for end, row in zip(ends, held, strict=True)
    ]
    if any(stage is None for stage in stages):
        return None
    return tuple(tuple(int(o) for o in stage) for stage in stages if stage is not None)


def _choice(instance: Instance, x: np.ndarray) -> Choice | None:
    """With the options that lose least for the counts found; z itself may hold fractions."""
    return spread(instance, counts.counts_of(instance, x))


def _within(
    instance: Instance, solver: Solver, gap: float, time_limit: float, cutoff: float
) -> Choice | None:
    """For when the solver overstepped a limit by its tolerance: solved with that much less."""
    less = instance.capacity - 2 * TOLERANCE * np.abs(instance.capacity)
    budget = instance.budget * (1 - 2 * TOLERANCE)
    tighter = replace(instance, capacity=less, budget=budget)
    answer = solver.integers(build(tighter, cutoff), gap=gap, time_limit=time_limit)
    choice = None if answer.x is None else _choice(tighter, answer.x)
    return choice if choice is not None and allowed(instance, choice) else None
