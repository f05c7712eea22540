"""Moves of bitwidth transfer: what each would lead to, priced all at once.

A move takes some layers at one option of one stage and gives them back at another option or another
stage: the stage boundaries in between shift along. Which layer of a stage gets which of its options
is an assignment problem (`assign_layers`), exact; its outcome for a move is estimated from single
layers. Where layers are of several kinds, some move between stages only if all that cross a
boundary on the way are of their kind (`crossing`), so that other stages keep what they hold.

Not covered: which moves are made, and in which order (`heuristic`).
"""

import itertools
import math
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from llmpq.costs.timeline import Costs, run_s
from llmpq.planner.instance import Instance
from llmpq.planner.value import Choice, count_options

STEPS = (1, 2, 5, 12)  # layers that move at once
MAX_FREE = 12  # stages among which any two may exchange layers
NEAR = 2
NUM_COSTS = len(fields(Costs))
LEAST_GAIN = 1e-9  # relative; less is rounding


@dataclass(frozen=True)
class Goal:
    """What is to be low: seconds, summed sensitivity and bytes, each times its price."""

    seconds: float
    omega: float
    num_bytes: float = 0.0
    max_omega: float = math.inf  # no state above it
    enough: float = -math.inf  # lower than that is not looked for


@dataclass(frozen=True, eq=False)
class State:
    """A choice that fits, as counts [N, B] and options [L], and what it comes to."""

    counts: np.ndarray
    options: np.ndarray
    seconds: float
    omega: float
    num_bytes: float

    def value(self, goal: Goal) -> float:
        """How far it is from a goal."""
        priced = goal.omega * self.omega + goal.num_bytes * self.num_bytes
        return goal.seconds * self.seconds + priced


@dataclass(frozen=True, eq=False)
class Moves:
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

    def pick(self, which: np.ndarray) -> "Moves":
        """Some of them."""
        return Moves(*(getattr(self, f.name)[which] for f in fields(self)))


@dataclass(frozen=True, eq=False)
class After:
    """[M] each: what moves lead to. The sensitivity is an estimate, all else is exact."""

    seconds: np.ndarray
    omega: np.ndarray
    num_bytes: np.ndarray
    fits: np.ndarray

    def value(self, goal: Goal) -> np.ndarray:
        """How far they are from a goal."""
        priced = goal.omega * self.omega + goal.num_bytes * self.num_bytes
        return goal.seconds * self.seconds + priced


@dataclass(frozen=True, eq=False)
class MoveTable:
    """What does not change while an instance is searched."""

    instance: Instance

    @cached_property
    def moves(self) -> Moves:
        """All of them, whatever a stage holds."""
        at = np.argwhere(self.instance.available)
        sizes = [size for size in STEPS if size <= self.instance.num_layers]
        grid = np.meshgrid(np.arange(len(at)), np.arange(len(at)), sizes, indexing="ij")
        a, b, size = (axis.ravel() for axis in grid)
        moves = Moves(at[a, 0], at[a, 1], at[b, 0], at[b, 1], size).pick(a != b)
        near = moves.distance <= self.reach
        kind = self.instance.kinds[1]
        alike = kind[moves.from_option] == kind[moves.to_option]
        return moves.pick(alike & (near | (moves.from_option == moves.to_option)))

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


def first_state(table: MoveTable, choice: Choice) -> State:
    """A choice, its layers' options put in the best order where that is better."""
    omega, layers = table.instance.omega, np.arange(table.instance.num_layers)
    counts = count_options(table.instance, choice)
    given = np.array([option for stage in choice for option in stage])
    options = assigned(table, counts)
    before, after = (math.fsum(omega[layers, o]) for o in (given, options))
    kept = options if after < before else given
    found = outcomes(table, table.totals(counts)[:, :, None])
    return State(counts, kept, float(found[0][0]), min(before, after), float(found[1][0]))


def choice_of(state: State) -> Choice:
    ends = state.counts.sum(axis=1).cumsum()[:-1]
    return tuple(tuple(int(o) for o in stage) for stage in np.split(state.options, ends))


def assigned(table: MoveTable, counts: np.ndarray, near: State | None = None) -> np.ndarray:
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
        found = assign_layers(table.instance.omega[held], counts[j])
        assert found is not None, "layers of other kinds than their options"
        options[held] = found
    return options


def crossing(table: MoveTable, state: State, moves: Moves) -> np.ndarray:
    """[M] booleans: all layers that cross boundaries between the two stages are of one kind."""
    of_layers, of_options = table.instance.kinds
    every, ends = np.arange(of_layers.max() + 1), state.counts.sum(axis=1).cumsum()[:-1]
    before = np.zeros((len(every), len(of_layers) + 1), dtype=int)  # layers of each kind, so far
    before[:, 1:] = (of_layers == every[:, None]).cumsum(axis=1)
    sizes = np.array(STEPS)
    alike = []  # by direction: [kinds, sizes, boundaries + 1], boundaries that they may cross
    for first, last in ((-1, 0), (0, 1)):  # to later stages, to earlier ones
        start, end = (
            np.clip(ends + at * sizes[:, None], 0, len(of_layers)) for at in (first, last)
        )
        whole = before[:, end] - before[:, start] == sizes[:, None]
        none = np.zeros((len(every), len(sizes), 1), dtype=int)
        alike.append(np.concatenate([none, whole.cumsum(axis=2)], axis=2))
    kind, size = of_options[moves.from_option], np.searchsorted(sizes, moves.size)
    low, high = np.sort([moves.from_stage, moves.to_stage], axis=0)
    backwards = (moves.to_stage < moves.from_stage).astype(int)
    found = np.stack(alike)[backwards, kind, size]
    column = np.arange(len(found))
    return np.asarray(found[column, high] - found[column, low] == high - low)


def outcomes(table: MoveTable, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[M] each, of `totals` [costs + 2, N, M]: seconds, bytes of all layers, whether they fit."""
    instance = table.instance
    seconds = run_s(Costs(*totals[:NUM_COSTS]), table.link)
    num_bytes, packed = totals[NUM_COSTS:]
    unpacked = instance.unpacked_bytes[:, None] * (packed > 0.5)
    fits = (num_bytes + unpacked <= instance.capacity[:, None]).all(axis=0)
    return seconds, num_bytes.sum(axis=0), fits


def totals_after(table: MoveTable, state: State, moves: Moves) -> np.ndarray:
    """[costs + 2, N, M]: the stages' totals after each move."""
    rates, column = table.rates, np.arange(len(moves.size))
    totals = np.repeat(table.totals(state.counts)[:, :, None], len(column), axis=2)
    lost = rates[:, moves.from_stage, moves.from_option]
    won = rates[:, moves.to_stage, moves.to_option]
    totals[:, moves.from_stage, column] -= lost * moves.size
    totals[:, moves.to_stage, column] += won * moves.size
    return totals


def least_changes(instance: Instance, state: State) -> np.ndarray:
    """[N, B, B]: the least change of sensitivity when one layer of a stage changes its option."""
    layers = np.arange(instance.num_layers)
    change = instance.omega - instance.omega[layers, state.options][:, None]
    stage = np.repeat(np.arange(instance.num_stages), state.counts.sum(axis=1))
    least = np.full((instance.num_stages, instance.num_options, instance.num_options), np.inf)
    np.minimum.at(least, (stage, state.options), change)
    return least


# ---- layers of a stage


def assign_layers(omega: np.ndarray, counts: np.ndarray) -> np.ndarray | None:
    """The options [L] of a stage's layers with the least summed sensitivity, to the exact.

    `omega` is [L, B], `counts` [B] with sum L: how many layers get each option. Where layers are of
    several kinds, each kind by itself; None where so many layers of a kind have no such options.
    """
    if np.isfinite(omega).all():
        return _assign_alike(omega, counts)
    options = np.empty(len(omega), dtype=int)
    kinds, of_kind = np.unique(np.isfinite(omega), axis=0, return_inverse=True)
    for number, own in enumerate(kinds):
        layers = of_kind.ravel() == number
        if counts[own].sum() != layers.sum():
            return None
        where = np.flatnonzero(own)
        options[layers] = where[_assign_alike(omega[np.ix_(layers, own)], counts[own])]
    return options


def _assign_alike(omega: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Of layers of one kind. A transport problem: layers change options along the cycle of options
    that gains most, until no cycle gains.
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
