"""What there is to search: subsets of devices at sizes, and bounds for pairs of micro-batches.

What has the same sizes is a part of the space. It is opened, which makes its tables, when no part
that is not open has a lesser bound (`size_bounds`): most small batches never are. Its tables are
made of subsets with the same kinds of stages after each other, as the prices of one LP bound the
others too. A space also keeps what searches have learned of it, so that a search after a change of
scales does not begin anew.

Not covered: how it is searched (`search`).
"""

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from llmpq.model_spec import tensor_parallel_degrees
from llmpq.planner import pool, pool_bounds
from llmpq.planner.layouts import DeviceSubset, canonical, ends, num_stages, subsets
from llmpq.planner.problem import Configuration, Problem, Sizes, StageDevices
from llmpq.planner.size_bounds import least_round_s, least_run_s
from llmpq.planner.sizes import all_sizes, with_shorter_chunks
from llmpq.planner.solver import Solver
from llmpq.planner.tables import Table

ORDERS: Table[DeviceSubset, list[tuple[StageDevices, ...]]] = Table()

MOST_SMALLEST = 16


@dataclass
class Tables:
    """The bounds of all pairs of micro-batches of a subset and batch; they only ever rise.

    `tight`: pairs whose own LP was solved.
    """

    subset: DeviceSubset
    sizes: Sizes
    pool: pool.Pool
    bounds: np.ndarray  # [P, Q]
    tight: set[tuple[int, int]] = field(default_factory=set)


@dataclass
class SpacePart:
    """All subsets of devices at the same sizes. `bound`: no plan of it is below.

    `tables` are those of the first `num_opened` subsets, but for those where nothing fits.
    """

    sizes: Sizes
    subsets: list[DeviceSubset]
    bound: float
    tables: list[Tables] = field(default_factory=list)
    num_opened: int = 0

    @property
    def num_left(self) -> int:
        """Pairs of micro-batches of the subsets that have no table yet."""
        return (len(self.subsets) - self.num_opened) * math.prod(self.sizes.shape)

    @property
    def is_open(self) -> bool:
        """There is a table of every subset where something fits."""
        return self.num_opened == len(self.subsets)


@dataclass(frozen=True)
class Space:
    """What there is to search.

    What searches have learned of it: `known` bounds of nodes, and `floor`, which no plan is below.
    """

    parts: list[SpacePart]
    notes: list[str]
    known: dict[tuple[int, Configuration], float] = field(default_factory=dict)  # by a node's level
    floor: float = 0.0

    @property
    def num_configurations(self) -> int:
        """Pairs of micro-batches over all subsets and batches."""
        return sum(math.prod(part.sizes.shape) * len(part.subsets) for part in self.parts)

    @property
    def tables(self) -> list[Tables]:
        """Those of the parts that are open."""
        return [table for part in self.parts for table in part.tables]

    @property
    def bound(self) -> float:
        """No plan is below it."""
        closed = [part.bound for part in self.parts if not part.is_open]
        return min([*closed, *(float(table.bounds.min()) for table in self.tables)], default=0.0)

    def best_first(
        self, problem: Problem, solver: Solver, until: float = math.inf
    ) -> Iterator[tuple[float, Configuration]]:
        """Configurations with the bound of their own LP, made as they come.

        No part is opened after `until` (monotonic), but for a first table.
        """

        def tight(table: Tables, pair: tuple[int, int]) -> None:
            if pair not in table.tight:
                tighten(table, pair, solver)

        return self._ordered(problem, solver, tight, until)

    def configurations(
        self, problem: Problem, solver: Solver, until: float = math.inf
    ) -> Iterator[tuple[float, Configuration]]:
        """One order for each pair, first and last stage, with its bound; the least first."""
        return self._ordered(problem, solver, lambda table, pair: None, until)

    def _ordered(
        self,
        problem: Problem,
        solver: Solver,
        look: Callable[[Tables, tuple[int, int]], None],
        until: float,
    ) -> Iterator[tuple[float, Configuration]]:
        """By rising bounds; `look` may raise that of a pair that would be the next."""
        serial = itertools.count()
        queue: list[tuple[float, int, SpacePart | None, Tables | None, tuple[int, int]]] = []

        def push(tables: Sequence[Tables], bound: float) -> None:
            for value, table, pair in pairs(tables):
                heapq.heappush(queue, (max(value, bound), next(serial), None, table, pair))

        for one in self.parts:
            push(one.tables, one.bound)
            if not one.is_open:
                heapq.heappush(queue, (one.bound, next(serial), one, None, (0, 0)))
        while queue:
            bound, number, part, table, pair = heapq.heappop(queue)
            if part is not None:
                if time.monotonic() < until or not (queue or part.tables):
                    push(opened(part, problem, solver, until), part.bound)
                    if not part.is_open and time.monotonic() < until:
                        heapq.heappush(queue, (part.bound, next(serial), part, None, (0, 0)))
                continue
            assert table is not None
            if table.bounds[pair] <= bound:
                look(table, pair)
            if table.bounds[pair] > bound:
                if table.bounds[pair] < math.inf:
                    heapq.heappush(queue, (float(table.bounds[pair]), number, None, table, pair))
                continue
            for configuration in configurations_of(problem, table, pair):
                yield bound, configuration

    def smallest(self, problem: Problem) -> list[Configuration]:
        """With the least batch, micro-batches and chunk, which take least memory; one a subset."""
        least = min((part.sizes.batch for part in self.parts), default=0)
        parts = [part for part in self.parts if part.sizes.batch == least]
        parts.sort(key=lambda part: problem.chunk_tokens(part.sizes), reverse=True)
        last = {subset: part.sizes for part in parts for subset in part.subsets}
        some = itertools.islice(last.items(), MOST_SMALLEST)
        return [configurations_at(problem, subset, sizes, (0, 0))[0] for subset, sizes in some]


def pairs(tables: Sequence[Tables]) -> list[tuple[float, Tables, tuple[int, int]]]:
    """Every pair that may be feasible, with its bound."""
    return [
        (float(bound), table, (int(p), int(q)))
        for table in tables
        for (p, q), bound in np.ndenumerate(table.bounds)
        if bound < math.inf
    ]


def configurations_of(
    problem: Problem, table: Tables, pair: tuple[int, int]
) -> list[Configuration]:
    """The canonical orders of a subset at one pair of micro-batches."""
    return configurations_at(problem, table.subset, table.sizes, pair)


def configurations_at(
    problem: Problem, subset: DeviceSubset, sizes: Sizes, pair: tuple[int, int]
) -> list[Configuration]:
    """The same of a subset that may have no table."""
    found = problem.cached(ORDERS, subset, lambda: _canonical_orders(problem, subset))
    micro_batches = sizes.prefill[pair[0]], sizes.decode[pair[1]]
    return [
        Configuration(order, sizes.batch, *micro_batches, sizes.chunk_tokens) for order in found
    ]


def tighten(table: Tables, pair: tuple[int, int], solver: Solver) -> pool_bounds.Prices | None:
    """The bound by a pair's own LP, whose prices tell on the subset's other pairs."""
    value, prices = pool_bounds.relaxed(table.pool, *pair, solver)
    table.tight.add(pair)
    if prices is not None:
        table.bounds = np.maximum(table.bounds, pool_bounds.bounds(table.pool, prices))
    if value == math.inf:  # which has no seconds to do with
        table.bounds[pool.has_no_more_room(table.pool, pair)] = math.inf
    table.bounds[pair] = max(value, float(table.bounds[pair]))
    return prices


def _canonical_orders(problem: Problem, subset: DeviceSubset) -> list[tuple[StageDevices, ...]]:
    return [canonical(subset, *pair) for pair in ends(problem.cluster, subset)]


# ---- what there is to search


def make_space(problem: Problem, sizes: Sequence[Sizes] | None = None) -> Space:
    """Every subset and batch; no table is made yet. `sizes`: in place of those tried first."""
    degrees = tensor_parallel_degrees(problem.spec, problem.max_tensor_parallel)
    found, notes = subsets(problem.cluster, degrees, problem.spec.num_layers)
    usual = all_sizes(problem) if sizes is None else sizes
    todo: dict[Sizes, list[DeviceSubset]] = {one: list(found) for one in usual}
    for subset in found if sizes is None else ():
        for one in with_shorter_chunks(problem, subset):
            todo.setdefault(one, []).append(subset)
    round_s = least_round_s(problem, found)
    scale = problem.least_change({})
    parts = [
        SpacePart(one, some, scale * least_run_s(problem, one.batch, round_s))
        for one, some in todo.items()
    ]
    return Space(parts, notes)


def opened(
    part: SpacePart, problem: Problem, solver: Solver, deadline: float = math.inf
) -> list[Tables]:
    """Makes the tables of a part, until `deadline` (monotonic); those that were not there before.

    It may have to be called again, where the time was not enough; one subset is always looked at.
    """
    before, first = len(part.tables), part.num_opened
    priced: list[tuple[pool.Pool, pool_bounds.Prices]] = []
    near = (0, 0)
    while not part.is_open and (time.monotonic() < deadline or part.num_opened == first):
        subset = part.subsets[part.num_opened]
        part.num_opened += 1
        table = make_tables(problem, subset, part.sizes, near, solver, priced)
        if table is not None:
            near = divmod(int(table.bounds.argmin()), table.bounds.shape[1])
            part.tables.append(table)
    return part.tables[before:]


def make_tables(
    problem: Problem,
    subset: DeviceSubset,
    sizes: Sizes,
    near: tuple[int, int],
    solver: Solver,
    priced: list[tuple[pool.Pool, pool_bounds.Prices]],
) -> Tables | None:
    """Bounds by the prices of a subset that has the same kinds of stages and more, out of `priced`.

    Where there is none, by an LP at a pair of micro-batches `near` the best, whose
    prices go there. None: nothing fits, which is known before any job is counted.
    """
    infeasible = pool.room_of(problem, subset, sizes).is_infeasible
    if infeasible.all():
        return None
    arrays = pool.make_pool(problem, subset, sizes)
    table = Tables(subset, sizes, arrays, np.where(infeasible, math.inf, 0.0))
    guesses = (pool_bounds.carried(prices, given, arrays) for given, prices in priced)
    guess = next((prices for prices in guesses if prices is not None), None)
    if guess is not None:
        table.bounds = np.maximum(table.bounds, pool_bounds.bounds(arrays, guess))
        return table
    free = np.argwhere(~infeasible)
    prefill, decode = free[np.abs(free - np.array(near)).sum(axis=1).argmin()]
    prices = tighten(table, (int(prefill), int(decode)), solver)
    if prices is not None:
        priced.append((arrays, prices))
    return table


def rescaled(space: Space, before: Problem, problem: Problem) -> Space:
    """The space of a problem that differs from the one `before` in its scales alone.

    Bounds grow or fall as seconds do; where sensitivity has a price they only fall.
    """

    def factors(num_stages: int, sizes: Sizes) -> np.ndarray:
        found = problem.scales_of(num_stages, sizes) / before.scales_of(num_stages, sizes)
        return np.minimum(found, 1.0) if problem.theta else found

    def moved(configuration: Configuration, bound: float) -> float:
        return bound * float(factors(len(configuration.stage_devices), configuration.sizes)[0, 0])

    least = problem.least_change(before.scales)
    parts = [
        replace(
            part,
            bound=part.bound * least,
            tables=[
                _rescaled(problem, table, factors(num_stages(table.subset), table.sizes))
                for table in part.tables
            ],
        )
        for part in space.parts
    ]
    return replace(
        space,
        parts=parts,
        known={key: moved(key[1], bound) for key, bound in space.known.items()},
        floor=space.floor * least,
    )


def _rescaled(problem: Problem, table: Tables, factors: np.ndarray) -> Tables:
    if np.all(factors == 1.0):
        return table
    arrays = pool.make_pool(problem, table.subset, table.sizes)
    tight = set() if problem.theta else table.tight
    return replace(table, pool=arrays, bounds=table.bounds * factors, tight=tight)
