"""Bitwidth transfer: a local search for one configuration's choice that is there in milliseconds.

It works on counts [N, B], how many layers each stage holds at each option, as times and memory
depend on nothing else. A move takes some layers at one option of one stage and gives them back at
another option or another stage: the stage boundaries in between shift along. All moves are priced
at once and the best one that keeps memory and budget is made, until none helps.

Then layers are exchanged. Trading bits of a stage with time to spare for time of the slowest one
takes several moves of which the first ones help nobody. So sensitivity or memory gets a price for
a while: moves save what is short where that costs least time. Without the price, moves then spend
it where it helps most. What came of it is kept where it is better.

Which layer of a stage gets which of its options is an assignment problem (`assign_layers`), exact.
Its outcome for a move is estimated from single layers first; no move is made on an estimate.
What it returns fits always and is never worse than its start. Not covered: a bound.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from llmpq.planner.first_counts import STARTS, STARTS_OF_KINDS
from llmpq.planner.instance import Instance, make_instance
from llmpq.planner.moves import (
    LEAST_GAIN,
    NUM_COSTS,
    After,
    Goal,
    Moves,
    MoveTable,
    State,
    assigned,
    choice_of,
    crossing,
    first_state,
    least_changes,
    outcomes,
    totals_after,
)
from llmpq.planner.problem import OVER, Configuration, Problem
from llmpq.planner.value import Choice, objective

MAX_SETTINGS = 64
TRIES = 4  # of the moves that look best, how many are looked at exactly
# What an exchange charges for all sensitivity and all memory in use, in parts of the seconds.
PRICES = ((0.1, 0.0), (0.5, 0.0), (0.0, 0.2), (0.0, 1.0))


def heuristic(
    problem: Problem,
    configurations: Iterable[tuple[float, Configuration]],
    deadline: float,
    find: Callable[[Instance, float], Choice | None],
) -> tuple[Configuration, Choice] | None:
    """The best choice that `find` finds over `configurations` until `deadline` (monotonic).

    They come with a bound that no choice is below, the least first; it ends where that is no better
    than what was found, and after `MAX_SETTINGS`. None: nothing within memory and budget was found.
    """
    best: tuple[float, Configuration, Choice] | None = None
    for bound, configuration in itertools.islice(configurations, MAX_SETTINGS):
        if time.monotonic() > deadline or (best is not None and bound >= best[0]):
            break
        instance = make_instance(problem, configuration)
        choice = find(instance, deadline)
        if choice is None and best is None and not instance.has_kinds:
            return None  # not even the smallest options fit
        if choice is None:
            continue
        value = objective(instance, choice)
        if best is None or value < best[0]:
            best = value, configuration, choice
    return best[1:] if best else None


def transfer(instance: Instance, start: Choice, deadline: float) -> Choice:
    """The best choice that moves lead to from `start`, which fits, until `deadline` (monotonic).

    A start above the budget is first brought within it, or as near as moves lead.
    """
    table = MoveTable(instance)
    state = _towards_budget(table, first_state(table, start), deadline)
    limit = max(instance.budget, min(state.omega, instance.budget * OVER))
    if state.omega <= limit:
        goal = Goal(seconds=1.0, omega=instance.theta, max_omega=limit)
        state = _exchanged(table, state, goal, deadline)
    return choice_of(state)


def start_choice(instance: Instance, deadline: float = math.inf) -> Choice | None:
    """A choice within memory and budget, quickly; None where it finds none by the deadline.

    Layers lie as the stages' speeds have it, at the options that take least memory; where moves do
    not bring that within the budget, as memory lets the summed sensitivity be least.
    """
    if instance.num_layers < instance.num_stages:
        return None
    table = MoveTable(instance)
    for start in STARTS_OF_KINDS if instance.has_kinds else STARTS:
        choice = start(instance)
        if choice is None and not instance.has_kinds:
            return None  # not even the smallest options fit
        if choice is None:
            continue
        state = _towards_budget(table, first_state(table, choice), deadline)
        if state.omega <= instance.budget * OVER:
            return choice_of(state)
    return None


# ---- the search


def _towards_budget(table: MoveTable, state: State, deadline: float) -> State:
    """A state within the budget, or one of less sensitivity."""
    if state.omega <= table.instance.budget * OVER:
        return state
    goal = Goal(seconds=0.0, omega=1.0, enough=table.instance.budget)
    return _exchanged(table, state, goal, deadline)


def _exchanged(table: MoveTable, state: State, goal: Goal, deadline: float) -> State:
    """The best state for a goal that moves and priced moves lead to."""
    state = _descended(table, state, goal, deadline)
    better = state.value(goal) > goal.enough
    while better and time.monotonic() < deadline:
        better = False
        for prices in PRICES:
            aside = _descended(table, state, _priced(goal, state, prices), deadline)
            found = _descended(table, aside, goal, deadline)
            if _gains(found.value(goal), state.value(goal)):
                state, better = found, True
    return state


def _priced(goal: Goal, state: State, prices: tuple[float, float]) -> Goal:
    """The goal with prices for what a state uses, relative to what the state is worth."""
    worth = abs(state.value(goal))
    omega = prices[0] * worth / state.omega if state.omega > 0 else 0.0
    num_bytes = prices[1] * worth / max(state.num_bytes, 1.0)
    return replace(goal, omega=goal.omega + omega, num_bytes=num_bytes, enough=-math.inf)


def _descended(table: MoveTable, state: State, goal: Goal, deadline: float) -> State:
    """Move by move towards a goal."""
    while state.value(goal) > goal.enough and time.monotonic() < deadline:
        better = _best_move(table, state, goal)
        if better is None:
            break
        state = better
    return state


def _best_move(table: MoveTable, state: State, goal: Goal) -> State | None:
    """The move that looks best of those that fit, keep the limit and are better."""
    moves = _possible(table, state)
    after = _after(table, state, moves)
    now, value = state.value(goal), after.value(goal)
    allowed = after.fits & (after.omega <= goal.max_omega) & _gains(value, now)
    for index in _least(np.where(allowed, value, np.inf), TRIES):
        found = _made(table, state, moves, after, index)
        if found.omega <= goal.max_omega and _gains(found.value(goal), now):
            return found
    return None


def _gains(value: np.ndarray | float, before: float) -> np.ndarray | bool:
    return value < before - LEAST_GAIN * abs(before)


def _least(score: np.ndarray, count: int) -> list[int]:
    """Where the least finite scores are, the least first."""
    some = np.flatnonzero(np.isfinite(score))
    if len(some) > count:
        some = some[np.argpartition(score[some], count)[:count]]
    return [int(i) for i in some[np.argsort(score[some], kind="stable")]]


def _possible(table: MoveTable, state: State) -> Moves:
    """Those of layers that are there, and that leave every stage a layer.

    A layer that comes to another stage keeps its option or takes one that is in use there.
    """
    moves, counts = table.moves, state.counts
    there = counts[moves.from_stage, moves.from_option] >= moves.size
    leaves = counts.sum(axis=1)[moves.from_stage] > moves.size
    known = counts[moves.to_stage, moves.to_option] > 0
    stays = moves.from_stage == moves.to_stage
    comes = leaves & (known | (moves.from_option == moves.to_option))
    near = (moves.distance <= table.reach) | _slowest(table, state)[moves.from_stage]
    found = moves.pick(np.flatnonzero(there & near & (stays | comes)))
    return found.pick(crossing(table, state, found)) if table.instance.has_kinds else found


def _slowest(table: MoveTable, state: State) -> np.ndarray:
    """[N] booleans: the stages that are slowest in any of the costs."""
    totals = table.totals(state.counts)[:NUM_COSTS]
    return np.bincount(totals.argmax(axis=1), minlength=totals.shape[1]) > 0


def _made(table: MoveTable, state: State, moves: Moves, after: After, index: int) -> State:
    counts = state.counts.copy()
    counts[moves.from_stage[index], moves.from_option[index]] -= moves.size[index]
    counts[moves.to_stage[index], moves.to_option[index]] += moves.size[index]
    options = assigned(table, counts, near=state)
    omega = math.fsum(table.instance.omega[np.arange(len(options)), options])
    seconds, num_bytes = float(after.seconds[index]), float(after.num_bytes[index])
    return State(counts, options, seconds, omega, num_bytes)


def _after(table: MoveTable, state: State, moves: Moves) -> After:
    seconds, num_bytes, fits = outcomes(table, totals_after(table, state, moves))
    change = least_changes(table.instance, state)
    each = change[moves.from_stage, moves.from_option, moves.to_option]
    return After(seconds, state.omega + moves.size * each, num_bytes, fits)
