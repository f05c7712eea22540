"""What there is to search: subsets of devices at sizes, and bounds for pairs of micro-batches.

Tables are made of subsets with the same kinds of stages and of the same sizes after each other, as
the prices of one LP bound the others too. A space also keeps what searches have
learned of it, so that a search after a change of scales does not begin anew.

Not covered: how it is searched (`search`).
"""

import heapq
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from llmpq.model_spec import tensor_parallel_degrees
from llmpq.planner import pool, pool_bounds
from llmpq.planner.layouts import DeviceSubset, canonical, ends, num_stages, subsets
from llmpq.planner.problem import Configuration, Problem, Sizes, StageDevices
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


@dataclass(frozen=True)
class Space:
    """What there is to search. `num_left_out`: subsets and batches that there was no time for.

    What searches have learned of it: `known` bounds of nodes, and `floor`, which no plan is below.
    """

    tables: list[Tables]
    num_left_out: int
    notes: list[str]
    known: dict[tuple[int, Configuration], float] = field(default_factory=dict)  # by a node's level
    floor: float = 0.0

    @property
    def num_configurations(self) -> int:
        """Pairs of micro-batches over all subsets and batches."""
        return sum(table.bounds.size for table in self.tables)

    def num_orders(self, problem: Problem) -> int:
        """Orders of all pairs that may be feasible."""
        return sum(
            int(np.isfinite(table.bounds).sum()) * len(configurations_of(problem, table, (0, 0)))
            for table in self.tables
        )

    def pairs(self) -> list[tuple[float, Tables, tuple[int, int]]]:
        """Every pair that may be feasible, the least bound first."""
        found = [
            (float(bound), table, (int(p), int(q)))
            for table in self.tables
            for (p, q), bound in np.ndenumerate(table.bounds)
            if bound < math.inf
        ]
        return sorted(found, key=lambda entry: entry[0])

    def best_first(self, problem: Problem, solver: Solver) -> Iterator[tuple[float, Configuration]]:
        """Configurations with the bound of their own LP, made as they come."""
        queue = [(bound, i, table, pair) for i, (bound, table, pair) in enumerate(self.pairs())]
        while queue:
            bound, index, table, pair = heapq.heappop(queue)
            known = float(table.bounds[pair])
            if known <= bound and pair in table.tight:
                yield from (
                    (bound, configuration)
                    for configuration in configurations_of(problem, table, pair)
                )
                continue
            if known <= bound:
                tighten(table, pair, solver)
            value = float(table.bounds[pair])
            if value < math.inf:
                heapq.heappush(queue, (value, index, table, pair))

    def configurations(self, problem: Problem) -> Iterator[tuple[float, Configuration]]:
        """One order for each pair, first and last stage, with its bound; the least first."""
        for bound, table, pair in self.pairs():
            for configuration in configurations_of(problem, table, pair):
                yield bound, configuration

    def smallest(self, problem: Problem) -> list[Configuration]:
        """With the least batch, micro-batches and chunk, which take least memory; one a subset."""
        least = min((table.sizes.batch for table in self.tables), default=0)
        tables = [table for table in self.tables if table.sizes.batch == least]
        last = {
            table.subset: table for table in tables
        }  # of each subset, that of the shortest chunk
        some = list(last.values())[:MOST_SMALLEST]
        return [configurations_of(problem, table, (0, 0))[0] for table in some]


def configurations_of(
    problem: Problem, table: Tables, pair: tuple[int, int]
) -> list[Configuration]:
    """The canonical orders of a subset at one pair of micro-batches."""
    sizes = table.sizes
    found = problem.cached(ORDERS, table.subset, lambda: _canonical_orders(problem, table.subset))
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


def make_space(
    problem: Problem,
    solver: Solver,
    deadline: float = math.inf,
    told: Callable[[int, int], None] = lambda done, total: None,
    sizes: Sequence[Sizes] | None = None,
) -> Space:
    """Every subset and batch with its bounds; those not reached by `deadline` (monotonic) are not.

    `sizes`: in place of those that are tried first. `told` hears how many of how many are done.
    """
    degrees = tensor_parallel_degrees(problem.spec, problem.max_tensor_parallel)
    found, notes = subsets(problem.cluster, degrees, problem.spec.num_layers)
    todo = _todo(problem, found, sizes)
    tables: list[Tables] = []
    priced: list[tuple[pool.Pool, pool_bounds.Prices]] = []  # of the same sizes
    best = (0, 0)
    for index, (subset, some) in enumerate(todo):
        if time.monotonic() > deadline:
            notes = [
                *notes,
                f"the time limit left {len(todo) - index} of {len(todo)} subsets of the "
                "devices unsearched",
            ]
            return Space(tables, len(todo) - index, notes)
        if index and some != todo[index - 1][1]:
            priced.clear()
        table = make_tables(problem, subset, some, best, solver, priced)
        devices = int(table.bounds.argmin())
        best = divmod(devices, table.bounds.shape[1])
        tables.append(table)
        if index % 64 == 0:
            told(index, len(todo))
    return Space(tables, 0, notes)


def _todo(
    problem: Problem, found: Sequence[DeviceSubset], sizes: Sequence[Sizes] | None
) -> list[tuple[DeviceSubset, Sizes]]:
    """What to make tables of: the default chunk of all subsets first."""
    if sizes is not None:
        return [(subset, some) for some in sizes for subset in found]
    usual = [(subset, some) for some in all_sizes(problem) for subset in found]
    return usual + [
        (subset, some) for subset in found for some in with_shorter_chunks(problem, subset)
    ]


def make_tables(
    problem: Problem,
    subset: DeviceSubset,
    sizes: Sizes,
    near: tuple[int, int],
    solver: Solver,
    priced: list[tuple[pool.Pool, pool_bounds.Prices]],
) -> Tables:
    """Bounds by the prices of a subset that has the same kinds of stages and more, out of `priced`.

    Where there is none, by an LP at a pair of micro-batches `near` the best, whose
    prices go there.
    """
    arrays = pool.make_pool(problem, subset, sizes)
    infeasible = pool.is_infeasible(arrays)
    table = Tables(subset, sizes, arrays, np.where(infeasible, math.inf, 0.0))
    if infeasible.all():
        return table
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

    each = [(table, factors(num_stages(table.subset), table.sizes)) for table in space.tables]
    least = min((float(some.min()) for _, some in each), default=1.0)
    return replace(
        space,
        tables=[_rescaled(problem, table, some) for table, some in each],
        known={key: moved(key[1], bound) for key, bound in space.known.items()},
        floor=space.floor * min(least, 1.0),
    )


def _rescaled(problem: Problem, table: Tables, factors: np.ndarray) -> Tables:
    if np.all(factors == 1.0):
        return table
    arrays = pool.make_pool(problem, table.subset, table.sizes)
    tight = set() if problem.theta else table.tight
    return replace(table, pool=arrays, bounds=table.bounds * factors, tight=tight)
