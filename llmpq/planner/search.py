"""Branch and bound over everything: which devices, order, tensor parallelism, sizes, layers.

Five levels, each with a tighter bound than the one above, wait in one queue by their bounds:
0. all subsets of devices at a batch: `size_bounds`, before any job is counted;
1. a subset of devices with a batch and a pair of micro-batches: `pool_bounds`, array arithmetic;
2. the same with first and last stage: the linear relaxation of `counts.build`;
3. the same solved in whole layers, for any order between the ends. Its counts make a plan;
   where layers differ in sensitivity, where stages begin and end was ignored so far, so
4. each order, solved exactly by `counts.build_exact`.
The least bound is taken each time. The search ends where it is within the gap of the best plan,
or at the time limit; the bound it returns holds for every plan of the space, solved or not. What
space that is, `Space.notes` says. There is a plan from the first solved node on, and before that
those that other methods offer.
"""

import heapq
import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from llmpq.plan_data import Predicted
from llmpq.planner import counts
from llmpq.planner.evaluate import evaluate
from llmpq.planner.exact import build as build_whole
from llmpq.planner.exact import realised, solve, with_less_loss
from llmpq.planner.instance import in_any_order, make_instance
from llmpq.planner.layer_options import places_of
from llmpq.planner.layouts import orders
from llmpq.planner.problem import Assignment, Configuration, Problem, Sizes
from llmpq.planner.solver import LinearProgram, Solver
from llmpq.planner.space import Space, SpacePart, Tables, configurations_of, opened, pairs, tighten
from llmpq.planner.value import to_assignment

POLISH_S = 0.1  # at most, to make a plan of counts better by moves


@dataclass(frozen=True)
class Progress:
    """How far a phase of the search is."""

    done: int
    total: int
    best_tokens_per_s: float
    phase: str = "configurations"


# ---- the search


@dataclass
class Search:
    """The best plan so far and what is known about all others."""

    problem: Problem
    gap: float
    deadline: float
    solver: Solver
    plain: bool = False  # every order by the plain ILP, for reference
    assignment: Assignment | None = None
    predicted: Predicted | None = None
    closed: float = math.inf  # no plan of what was dealt with is below this, but the best one
    num_relaxed: int = 0
    num_solved: int = 0
    timed_out: bool = False
    # As `Space` has them.
    known: dict[tuple[int, Configuration], float] = field(default_factory=dict)
    floor: float = 0.0
    queue: list["Entry"] = field(default_factory=list)
    by_sizes: dict[Sizes, tuple[float, Assignment]] = field(default_factory=dict)
    serial: Iterator[int] = field(default_factory=itertools.count)

    @property
    def best(self) -> float:
        """The objective of the best plan so far."""
        return self.predicted.objective if self.predicted else math.inf

    @property
    def target(self) -> float:
        """What a plan must be below to be worth having."""
        return self.best * (1 - self.gap)

    @property
    def finalists(self) -> list[Assignment]:
        """The best plan, then the best ones of other sizes."""
        ranked = sorted(self.by_sizes.values(), key=lambda entry: entry[0])
        others = [found for _, found in ranked if found != self.assignment]
        return [] if self.assignment is None else [self.assignment, *others]

    @property
    def seconds_left(self) -> float:
        """Until the time limit."""
        return self.deadline - time.monotonic()

    @property
    def lower_bound(self) -> float:
        """No plan of the space is below it."""
        still_open = self.queue[0].bound if self.queue else math.inf
        return min(self.best, max(self.floor, min(self.closed, still_open)))

    def push(self, bound: float, node: "SearchNode") -> None:
        """Leaves a node for later; one that is no better than the target is done."""
        if bound >= self.target:
            self.close(bound)
        else:
            heapq.heappush(self.queue, Entry(bound, -node.level, next(self.serial), node))

    def learn(self, node: "ConfigurationNode", bound: float) -> float:
        """Keeps a bound of a node for later searches; the best one that is known of it."""
        key = node.level, node.configuration
        self.known[key] = max(bound, self.known.get(key, 0.0))
        return self.known[key]

    def knows(self, node: "ConfigurationNode") -> bool:
        """Some search has solved its relaxation."""
        return (node.level, node.configuration) in self.known

    def close(self, bound: float) -> None:
        """A node is done: nothing in it is below `bound`."""
        self.closed = min(self.closed, bound)

    def offer(self, assignment: Assignment) -> None:
        """Keeps an assignment if it is the best, or the best of its sizes."""
        predicted = evaluate(self.problem, assignment)
        sizes = assignment.configuration.sizes
        if sizes not in self.by_sizes or predicted.objective < self.by_sizes[sizes][0]:
            self.by_sizes[sizes] = predicted.objective, assignment
        if predicted.objective < self.best:
            self.assignment, self.predicted = assignment, predicted


@dataclass(frozen=True, order=True)
class Entry:
    """A node in the queue: the least bound first, then the deepest, then the oldest."""

    bound: float
    depth: int
    serial: int
    node: "SearchNode" = field(compare=False)


class SearchNode(ABC):
    """A part of the space with a bound."""

    level = 0

    @abstractmethod
    def work(self, state: Search, bound: float) -> None:
        """Makes the bound tighter, cuts the node into smaller ones, or solves it."""


def search(
    problem: Problem,
    space: Space,
    solver: Solver,
    *,
    gap: float,
    deadline: float,
    seeds: Sequence[Assignment] = (),
    plain: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Search:
    """The best assignment of a space. `seeds`: plans within the budget to start from."""
    state = Search(problem, gap, deadline, solver, plain, known=space.known, floor=space.floor)
    for seed in seeds:
        state.offer(seed)
    for part in space.parts:
        PartNode(part).push_tables(state, part.tables)
        if not part.is_open:
            state.push(part.bound, PartNode(part))
    total = space.num_configurations
    while state.queue and max(state.queue[0].bound, state.floor) < state.target:
        if state.seconds_left <= 0:
            state.timed_out = True
            break
        entry = heapq.heappop(state.queue)
        entry.node.work(state, entry.bound)
        left = sum(part.num_left for part in space.parts) + len(state.queue)
        progress(Progress(max(0, total - left), total, _speed(state)))
    if state.assignment is not None and not problem.theta:
        _lose_less(state, state.assignment)
    return state


def _lose_less(state: Search, best: Assignment) -> None:
    """The best plan's precisions are raised where that costs no time."""
    problem = state.problem
    places = iter(places_of(problem, best.precisions))
    choice = tuple(tuple(next(places) for _ in stage) for stage in best.stages)
    better = with_less_loss(make_instance(problem, best.configuration), choice)
    changed = to_assignment(problem, best.configuration, better)
    predicted = evaluate(problem, changed)
    if predicted.objective <= state.best * (1 + 1e-12):
        state.assignment, state.predicted = changed, predicted


def _speed(state: Search) -> float:
    return state.predicted.tokens_per_s if state.predicted else 0.0


@dataclass(frozen=True, eq=False)
class PartNode(SearchNode):
    """Level 0: all subsets at a batch, and all pairs of micro-batches of it."""

    part: SpacePart

    def work(self, state: Search, bound: float) -> None:
        """Its tables, as far as there is time."""
        self.push_tables(state, opened(self.part, state.problem, state.solver, state.deadline))
        if not self.part.is_open:
            state.push(bound, self)

    def push_tables(self, state: Search, tables: Sequence[Tables]) -> None:
        """Leaves the pairs of tables for later."""
        for value, table, pair in pairs(tables):
            state.push(max(value, self.part.bound), PairNode(table, pair))


@dataclass(frozen=True)
class PairNode(SearchNode):
    """Level 1: a subset, a batch, a pair of micro-batches."""

    table: Tables
    pair: tuple[int, int]
    level = 1

    def work(self, state: Search, bound: float) -> None:
        """Its own LP, which tells on the other pairs of the subset; then its ends."""
        known = float(self.table.bounds[self.pair])
        if known > bound:
            state.push(known, self)
        elif self.pair not in self.table.tight:
            state.num_relaxed += 1
            tighten(self.table, self.pair, state.solver)
            state.push(max(bound, float(self.table.bounds[self.pair])), self)
        else:
            for configuration in configurations_of(state.problem, self.table, self.pair):
                state.push(bound, EndsNode(configuration))


@dataclass(frozen=True)
class ConfigurationNode(SearchNode):
    """Of one configuration, to be relaxed first."""

    configuration: Configuration
    is_relaxed: bool = False

    def work(self, state: Search, bound: float) -> None:
        """Its linear relaxation, unless an earlier search has solved it; then solved."""
        if self.is_relaxed:
            self.solve(state, bound)
            return
        if not state.knows(self):
            state.num_relaxed += 1
            state.learn(self, state.solver.relaxed(self.program(state.problem)).bound)
        state.push(state.learn(self, bound), replace(self, is_relaxed=True))

    @abstractmethod
    def program(self, problem: Problem) -> LinearProgram:
        """What is relaxed."""

    @abstractmethod
    def solve(self, state: Search, bound: float) -> None:
        """In whole layers."""


@dataclass(frozen=True)
class EndsNode(ConfigurationNode):
    """Levels 2 and 3: first and last stage are known, and an order with them."""

    level = 2

    def program(self, problem: Problem, cutoff: float = math.inf) -> LinearProgram:
        """Counts, for every order between the ends."""
        instance = make_instance(problem, self.configuration)
        free = in_any_order(problem, self.configuration, instance)
        return counts.build(free, cutoff, any_order=True)

    def solve(self, state: Search, bound: float) -> None:
        """Whole layers, which make a plan; then its orders."""
        if state.plain:
            self._open_orders(state, bound)
            return
        cutoff = state.target
        program = self.program(state.problem, cutoff)
        answer = state.solver.integers(program, gap=state.gap / 2, time_limit=state.seconds_left)
        state.num_solved += 1
        if answer.status == "infeasible":
            state.close(state.learn(self, cutoff))
            return
        bound = state.learn(self, max(bound, min(answer.bound, cutoff)))
        if answer.x is not None:
            self._offer(state, answer.x)
        self._open_orders(state, bound)

    def _offer(self, state: Search, x: np.ndarray) -> None:
        instance = make_instance(state.problem, self.configuration)
        held = counts.counts_of(instance, x)
        choice = realised(instance, held, min(state.seconds_left, POLISH_S))
        if choice is not None:
            state.offer(to_assignment(state.problem, self.configuration, choice))

    def _open_orders(self, state: Search, bound: float) -> None:
        if bound >= state.target:
            state.close(bound)
            return
        found, complete = orders(self.configuration.stage_devices)
        for order in found:
            state.push(bound, OrderNode(replace(self.configuration, stage_devices=order)))
        if not complete:
            state.close(bound)


@dataclass(frozen=True)
class OrderNode(ConfigurationNode):
    """Level 4: everything but the layers is known."""

    level = 3

    def program(self, problem: Problem) -> LinearProgram:
        """All that matters."""
        return build_whole(make_instance(problem, self.configuration))

    def solve(self, state: Search, bound: float) -> None:
        """Exactly."""
        instance, cutoff = make_instance(state.problem, self.configuration), state.target
        found = solve(
            instance,
            state.solver,
            gap=state.gap / 2,
            time_limit=state.seconds_left,
            cutoff=cutoff,
            plain=state.plain,
        )
        state.num_solved += 1
        if found.choice is not None:
            state.offer(to_assignment(state.problem, self.configuration, found.choice))
        own = cutoff if found.status == "infeasible" else max(bound, min(found.bound, cutoff))
        state.close(state.learn(self, own))
