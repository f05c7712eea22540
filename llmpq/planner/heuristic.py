"""Bitwidth transfer: a local search for one setting's choice that is there in milliseconds.

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
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np

from llmpq.costs.timeline import Costs, run_s
from llmpq.planner.instance import Instance, make_instance
from llmpq.planner.problem import OVER, Problem, Setting
from llmpq.planner.value import Choice, count_options, objective

MAX_SETTINGS = 64
STEPS = (1, 2, 5, 12)  # layers that move at once
MAX_FREE = 12  # stages among which any two may exchange layers
NEAR = 2
TRIES = 4  # of the moves that look best, how many are looked at exactly
# What an exchange charges for all sensitivity and all memory in use, in parts of the seconds.
PRICES = ((0.1, 0.0), (0.5, 0.0), (0.0, 0.2), (0.0, 1.0))
NUM_COSTS = len(fields(Costs))
LEAST_GAIN = 1e-9  # relative; less is rounding


def heuristic(
    problem: Problem, settings: Iterable[tuple[float, Setting]], deadline: float
) -> tuple[Setting, Choice] | None:
    """The best choice found over `settings` until `deadline` (monotonic).

    They come with a bound that no choice is below, the least first; it ends where that is no better
    than what was found, and after `MAX_SETTINGS`. None: nothing within memory and budget was found.
    """
    best: tuple[float, Setting, Choice] | None = None
    for bound, setting in itertools.islice(settings, MAX_SETTINGS):
        if time.monotonic() > deadline or (best is not None and bound >= best[0]):
            break
        instance = make_instance(problem, setting)
        start = start_choice(instance, deadline)
        if start is None:
            continue
        choice = transfer(instance, start, deadline)
        value = objective(instance, choice)
        if best is None or value < best[0]:
            best = value, setting, choice
    return best[1:] if best else None


def transfer(instance: Instance, start: Choice, deadline: float) -> Choice:
    """The best choice that moves lead to from `start`, which fits, until `deadline` (monotonic).

    A start above the budget is first brought within it, or as near as moves lead.
    """
    table = _Table(instance)
    state = _towards_budget(table, _first_state(table, start), deadline)
    limit = max(instance.budget, min(state.omega, instance.budget * OVER))
    if state.omega <= limit:
        goal = _Goal(seconds=1.0, omega=instance.theta, max_omega=limit)
        state = _exchanged(table, state, goal, deadline)
    return _choice(state)


def start_choice(instance: Instance, deadline: float = math.inf) -> Choice | None:
    """A choice within memory and budget, quickly; None where it finds none by the deadline.

    Layers lie as the stages' speeds have it, at the options that take least memory; where moves do
    not bring that within the budget, as memory lets the summed sensitivity be least.
    """
    if instance.num_layers < instance.num_stages:
        return None
    table = _Table(instance)
    for start in (_fast_start, _precise_start):
        counts = start(instance)
        if counts is None:
            return None
        state = _towards_budget(table, _first_state(table, _any_order(counts)), deadline)
        if state.omega <= instance.budget * OVER:
            return _choice(state)
    return None


def assign_layers(omega: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The options [L] of a stage's layers with the least summed sensitivity, to the exact.

    `omega` is [L, B], `counts` [B] with sum L: how many layers get each option. A transport
    problem: layers change options along the cycle of options that gains most, until no cycle gains.
    """
    used = np.flatnonzero(counts)
    options = np.repeat(used, counts[used])
    if len(used) == 1 or (omega == omega[0]).all():
        return options
    if len(used) == 2:
        gain = omega[:, used[0]] - omega[:, used[1]]
        options = np.full(len(omega), used[1])
        options[np.argsort(gain, kind="stable")[: counts[used[0]]]] = used[0]
        return options
    cycles = [c for n in range(2, len(used) + 1) for c in _cycles(used.tolist(), n)]
    while True:
        price, layer = _cheapest_moves(omega, options, used)
        gains = [sum(price[pair] for pair in cycle) for cycle in cycles]
        best = int(np.argmin(gains))
        if gains[best] >= -LEAST_GAIN * max(1.0, float(np.abs(omega).max())):
            return options
        for origin, to in cycles[best]:
            options[layer[origin, to]] = to


def _cycles(options: list[int], length: int) -> list[list[tuple[int, int]]]:
    """Every cycle of `length` options once, as pairs (from, to)."""
    found = []
    for some in itertools.combinations(options, length):
        for rest in itertools.permutations(some[1:]):
            ring = (some[0], *rest)
            found.append(list(zip(ring, (*rest, some[0]), strict=True)))
    return found


def _cheapest_moves(
    omega: np.ndarray, options: np.ndarray, used: np.ndarray
) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int], int]]:
    """For each pair of options, the layer that changes from one to the other at least cost."""
    price, layer = {}, {}
    for origin in used.tolist():
        held = np.flatnonzero(options == origin)
        change = omega[held] - omega[held, origin][:, None]
        least = change.argmin(axis=0)
        for to in used.tolist():
            price[origin, to] = float(change[least[to], to])
            layer[origin, to] = int(held[least[to]])
    return price, layer


# ---- values


@dataclass(frozen=True)
class _Goal:
    """What is to be low: seconds, summed sensitivity and bytes, each times its price."""

    seconds: float
    omega: float
    num_bytes: float = 0.0
    max_omega: float = math.inf  # no state above it
    enough: float = -math.inf  # lower than that is not looked for


@dataclass(frozen=True, eq=False)
class _State:
    """A choice that fits, as counts [N, B] and options [L], and what it comes to."""

    counts: np.ndarray
    options: np.ndarray
    seconds: float
    omega: float
    num_bytes: float

    def value(self, goal: _Goal) -> float:
        """How far it is from a goal."""
        priced = goal.omega * self.omega + goal.num_bytes * self.num_bytes
        return goal.seconds * self.seconds + priced


@dataclass(frozen=True, eq=False)
class _Moves:
    """[M] each: `size` layers at an option of a stage become layers at another one."""

    from_stage: np.ndarray
    from_option: np.ndarray
    to_stage: np.ndarray
    to_option: np.ndarray
    size: np.ndarray

    @property
    def distance(self) -> np.ndarray:
        """How many stage boundaries shift."""
        return np.abs(self.to_stage - self.from_stage)

    def pick(self, which: np.ndarray) -> "_Moves":
        """Some of them."""
        return _Moves(*(getattr(self, f.name)[which] for f in fields(self)))


@dataclass(frozen=True, eq=False)
class _After:
    """[M] each: what moves lead to. The sensitivity is an estimate, all else is exact."""

    seconds: np.ndarray
    omega: np.ndarray
    num_bytes: np.ndarray
    fits: np.ndarray

    def value(self, goal: _Goal) -> np.ndarray:
        """How far they are from a goal."""
        priced = goal.omega * self.omega + goal.num_bytes * self.num_bytes
        return goal.seconds * self.seconds + priced


@dataclass(frozen=True, eq=False)
class _Table:
    """What does not change while an instance is searched."""

    instance: Instance

    @cached_property
    def moves(self) -> _Moves:
        """All of them, whatever a stage holds."""
        at = np.argwhere(self.instance.available)
        sizes = [size for size in STEPS if size <= self.instance.num_layers]
        grid = np.meshgrid(np.arange(len(at)), np.arange(len(at)), sizes, indexing="ij")
        a, b, size = (axis.ravel() for axis in grid)
        moves = _Moves(at[a, 0], at[a, 1], at[b, 0], at[b, 1], size).pick(a != b)
        near = moves.distance <= self.reach
        return moves.pick(near | (moves.from_option == moves.to_option))

    @property
    def reach(self) -> int:
        """Stages further apart than that exchange layers only where one is the slowest."""
        num_stages = self.instance.num_stages
        return num_stages if num_stages <= MAX_FREE else NEAR

    @cached_property
    def rates(self) -> np.ndarray:
        """[costs + 2, N, B]: the costs of one layer, its bytes, whether it is packed."""
        instance = self.instance
        packed = np.broadcast_to(instance.packed.astype(float), instance.available.shape)
        rates = np.stack([*_arrays(instance.layer), instance.layer_bytes, packed])
        return np.where(instance.available, rates, 0.0)

    @cached_property
    def fixed(self) -> np.ndarray:
        """[costs + 2, N]: the same of a stage beside its layers."""
        none = np.zeros(self.instance.num_stages)
        return np.stack([*_arrays(self.instance.fixed), none, none])

    @cached_property
    def link(self) -> Costs:
        """[N, 1]: the links, beside moves."""
        return self.instance.link.map(lambda array: array[:, None])

    def totals(self, counts: np.ndarray) -> np.ndarray:
        """[costs + 2, N] of the stages that hold these layers."""
        return np.asarray((self.rates * counts).sum(axis=2) + self.fixed)


def _arrays(costs: Costs) -> list[np.ndarray]:
    return [getattr(costs, f.name) for f in fields(Costs)]


def _first_state(table: _Table, choice: Choice) -> _State:
    """A choice, its layers' options put in the best order where that is better."""
    omega, layers = table.instance.omega, np.arange(table.instance.num_layers)
    counts = count_options(table.instance, choice)
    given = np.array([option for stage in choice for option in stage])
    options = _assigned(table, counts)
    before, after = (math.fsum(omega[layers, o]) for o in (given, options))
    kept = options if after < before else given
    found = _outcomes(table, table.totals(counts)[:, :, None])
    return _State(counts, kept, float(found[0][0]), min(before, after), float(found[1][0]))


def _choice(state: _State) -> Choice:
    ends = state.counts.sum(axis=1).cumsum()[:-1]
    return tuple(tuple(int(o) for o in stage) for stage in np.split(state.options, ends))


def _assigned(table: _Table, counts: np.ndarray, near: _State | None = None) -> np.ndarray:
    """[L]: the best options; stages that hold the layers of `near` keep what they have there."""
    options = near.options.copy() if near else np.empty(table.instance.num_layers, dtype=int)
    ends = counts.sum(axis=1).cumsum()
    changed = np.ones(len(counts), dtype=bool)
    if near:
        shifted = near.counts.sum(axis=1).cumsum() != ends
        changed = (
            (near.counts != counts).any(axis=1) | shifted | np.concatenate([[False], shifted[:-1]])
        )
    for j in np.flatnonzero(changed):
        held = slice(ends[j] - counts[j].sum(), ends[j])
        options[held] = assign_layers(table.instance.omega[held], counts[j])
    return options


# ---- the search


def _towards_budget(table: _Table, state: _State, deadline: float) -> _State:
    """A state within the budget, or one of less sensitivity."""
    if state.omega <= table.instance.budget * OVER:
        return state
    goal = _Goal(seconds=0.0, omega=1.0, enough=table.instance.budget)
    return _exchanged(table, state, goal, deadline)


def _exchanged(table: _Table, state: _State, goal: _Goal, deadline: float) -> _State:
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


def _priced(goal: _Goal, state: _State, prices: tuple[float, float]) -> _Goal:
    """The goal with prices for what a state uses, relative to what the state is worth."""
    worth = abs(state.value(goal))
    omega = prices[0] * worth / state.omega if state.omega > 0 else 0.0
    num_bytes = prices[1] * worth / max(state.num_bytes, 1.0)
    return replace(goal, omega=goal.omega + omega, num_bytes=num_bytes, enough=-math.inf)


def _descended(table: _Table, state: _State, goal: _Goal, deadline: float) -> _State:
    """Move by move towards a goal."""
    while state.value(goal) > goal.enough and time.monotonic() < deadline:
        better = _best_move(table, state, goal)
        if better is None:
            break
        state = better
    return state


def _best_move(table: _Table, state: _State, goal: _Goal) -> _State | None:
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


def _possible(table: _Table, state: _State) -> _Moves:
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
    return moves.pick(np.flatnonzero(there & near & (stays | comes)))


def _slowest(table: _Table, state: _State) -> np.ndarray:
    """[N] booleans: the stages that are slowest in any of the costs."""
    totals = table.totals(state.counts)[:NUM_COSTS]
    return np.bincount(totals.argmax(axis=1), minlength=totals.shape[1]) > 0


def _made(table: _Table, state: _State, moves: _Moves, after: _After, index: int) -> _State:
    counts = state.counts.copy()
    counts[moves.from_stage[index], moves.from_option[index]] -= moves.size[index]
    counts[moves.to_stage[index], moves.to_option[index]] += moves.size[index]
    options = _assigned(table, counts, near=state)
    omega = math.fsum(table.instance.omega[np.arange(len(options)), options])
    seconds, num_bytes = float(after.seconds[index]), float(after.num_bytes[index])
    return _State(counts, options, seconds, omega, num_bytes)


def _after(table: _Table, state: _State, moves: _Moves) -> _After:
    seconds, num_bytes, fits = _outcomes(table, _totals_after(table, state, moves))
    change = _least_changes(table.instance, state)
    each = change[moves.from_stage, moves.from_option, moves.to_option]
    return _After(seconds, state.omega + moves.size * each, num_bytes, fits)


def _outcomes(table: _Table, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[M] each, of `totals` [costs + 2, N, M]: seconds, bytes of all layers, whether they fit."""
    instance = table.instance
    seconds = run_s(Costs(*totals[:NUM_COSTS]), table.link)
    num_bytes, packed = totals[NUM_COSTS:]
    unpacked = instance.unpacked_bytes[:, None] * (packed > 0.5)
    fits = (num_bytes + unpacked <= instance.capacity[:, None]).all(axis=0)
    return seconds, num_bytes.sum(axis=0), fits


def _totals_after(table: _Table, state: _State, moves: _Moves) -> np.ndarray:
    """[costs + 2, N, M]: the stages' totals after each move."""
    rates, column = table.rates, np.arange(len(moves.size))
    totals = np.repeat(table.totals(state.counts)[:, :, None], len(column), axis=2)
    lost = rates[:, moves.from_stage, moves.from_option]
    won = rates[:, moves.to_stage, moves.to_option]
    totals[:, moves.from_stage, column] -= lost * moves.size
    totals[:, moves.to_stage, column] += won * moves.size
    return totals


def _least_changes(instance: Instance, state: _State) -> np.ndarray:
    """[N, B, B]: the least change of sensitivity when one layer of a stage changes its option."""
    layers = np.arange(instance.num_layers)
    change = instance.omega - instance.omega[layers, state.options][:, None]
    stage = np.repeat(np.arange(instance.num_stages), state.counts.sum(axis=1))
    least = np.full((instance.num_stages, instance.num_options, instance.num_options), np.inf)
    np.minimum.at(least, (stage, state.options), change)
    return least


# ---- where it starts


def _fast_start(instance: Instance) -> np.ndarray | None:
    """[N, B]: layers spread by speed at the options that take least memory; None: none fit."""
    most, option = _most_layers(instance)
    if (most < 1).any() or most.sum() < instance.num_layers:
        return None
    busy = np.where(instance.available, instance.layer.busy, np.inf).min(axis=1)
    counts = np.zeros(instance.available.shape, dtype=int)
    stages = np.arange(instance.num_stages)
    counts[stages, option] = _spread(busy, most, instance.num_layers)
    return counts


def _most_layers(instance: Instance) -> tuple[np.ndarray, np.ndarray]:
    """[N] each: how many layers a stage can hold, and at which option."""
    most, option = [], []
    for packed in (False, True):
        offered = instance.available & (instance.packed == packed)
        num_bytes = np.where(offered, instance.layer_bytes, np.inf)
        room = instance.capacity - packed * instance.unpacked_bytes
        most.append(np.maximum(np.floor(room / num_bytes.min(axis=1)), 0))
        option.append(num_bytes.argmin(axis=1))
    packed_more = most[1] > most[0]
    return np.where(packed_more, most[1], most[0]), np.where(packed_more, option[1], option[0])


def _spread(cost: np.ndarray, most: np.ndarray, num_layers: int) -> np.ndarray:
    """[N]: layers handed out one by one to the stage that is least busy with one more."""
    held = np.ones(len(cost), dtype=int)
    for _ in range(num_layers - len(cost)):
        after = np.where(held < most, (held + 1) * cost, np.inf)
        held[after.argmin()] += 1
    return held


def _precise_start(instance: Instance) -> np.ndarray | None:
    """[N, B]: the least sensitivity with two options a stage, as if layers were alike."""
    cost, counts = _two_options(instance)
    layers = np.arange(instance.num_layers + 1)
    shorter = layers[:, None] - layers[None]  # layers before a stage, by all up to it and its own
    best, held = np.where(layers == 0, 0.0, np.inf), []
    for stage in cost:
        total = np.where(shorter >= 0, best[shorter] + stage, np.inf)
        held.append(total.argmin(axis=1))
        best = total.min(axis=1)
    if not np.isfinite(best[-1]):
        return None
    left, chosen = instance.num_layers, []
    for stage in reversed(range(instance.num_stages)):
        chosen.append(counts[stage, held[stage][left]])
        left -= held[stage][left]
    return np.stack(chosen[::-1])


def _two_options(instance: Instance) -> tuple[np.ndarray, np.ndarray]:
    """For each stage and number of layers: the least sensitivity [N, L + 1] and counts [.., B]."""
    shape = instance.num_stages, instance.num_layers + 1
    layers = np.arange(shape[1])
    cost = np.full(shape, np.inf)
    counts = np.zeros((*shape, instance.num_options), dtype=int)
    omega = instance.omega.mean(axis=0)
    for large, small in itertools.product(range(instance.num_options), repeat=2):
        packed = instance.packed[[large, small]].any()
        room = (instance.capacity - packed * instance.unpacked_bytes)[:, None]
        num_bytes, more = instance.layer_bytes[:, [small]], instance.layer_bytes[:, [large]]
        spare = room - num_bytes * layers
        at_large = np.floor(spare / np.maximum(more - num_bytes, 1e-9))
        at_large = np.clip(at_large, 0, layers)
        value = omega[large] * at_large + omega[small] * (layers - at_large)
        offered = instance.available[:, [large, small]].all(axis=1, keepdims=True)
        better = offered & (spare >= 0) & (layers > 0) & (value < cost)
        cost = np.where(better, value, cost)
        held = np.zeros_like(counts)
        held[..., large] += at_large.astype(int)
        held[..., small] += (layers - at_large).astype(int)
        counts = np.where(better[..., None], held, counts)
    return cost, counts


def _any_order(counts: np.ndarray) -> Choice:
    return tuple(tuple(int(o) for o in np.repeat(np.arange(len(c)), c)) for c in counts)
