"""What there is to search: mixes of places at sizes, with a bound for each pair of micro-batches.

Tables are made of mixes with the same kinds of places and of the same sizes after each other, as
the prices of one linear programme bound the others too. A space also keeps what searches have
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
from llmpq.planner.layouts import Mix, canonical, ends, mixes, num_stages
from llmpq.planner.problem import Place, Problem, Setting, Sizes
from llmpq.planner.sizes import all_sizes, with_shorter_chunks
from llmpq.planner.solver import Solver

MOST_SMALLEST = 16


@dataclass
class Tables:
    """The bounds of all pairs of micro-batches of a mix and batch; they only ever rise.

    `tight`: pairs whose own linear programme was solved.
    """

    mix: Mix
    sizes: Sizes
    pool: pool.Pool
    bounds: np.ndarray  # [P, Q]
    tight: set[tuple[int, int]] = field(default_factory=set)


@dataclass(frozen=True)
class Space:
    """What there is to search. `num_left_out`: mixes and batches that there was no time for.

    What searches have learned of it: `known` bounds of nodes, and `floor`, which no plan is below.
    """

    tables: list[Tables]
    num_left_out: int
    notes: list[str]
    known: dict[tuple[int, Setting], float] = field(default_factory=dict)  # by a node's level
    floor: float = 0.0

    @property
    def num_settings(self) -> int:
        """Pairs of micro-batches over all mixes and batches."""
        return sum(table.bounds.size for table in self.tables)

    def num_orders(self, problem: Problem) -> int:
        """Orders of all pairs that may be feasible."""
        return sum(
            int(np.isfinite(table.bounds).sum()) * len(settings_of(problem, table, (0, 0)))
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

    def best_first(self, problem: Problem, solver: Solver) -> Iterator[tuple[float, Setting]]:
        """Settings with the bound of their own linear programme, made as they come."""
        queue = [(bound, i, table, pair) for i, (bound, table, pair) in enumerate(self.pairs())]
        while queue:
            bound, index, table, pair = heapq.heappop(queue)
            known = float(table.bounds[pair])
            if known <= bound and pair in table.tight:
                yield from ((bound, setting) for setting in settings_of(problem, table, pair))
                continue
            if known <= bound:
                tighten(table, pair, solver)
            value = float(table.bounds[pair])
            if value < math.inf:
                heapq.heappush(queue, (value, index, table, pair))

    def settings(self, problem: Problem) -> Iterator[tuple[float, Setting]]:
        """One order for each pair, first and last place, with its bound; the least first."""
        for bound, table, pair in self.pairs():
            for setting in settings_of(problem, table, pair):
                yield bound, setting

    def smallest(self, problem: Problem) -> list[Setting]:
        """With the least batch, micro-batches and chunk, which take least memory; one a mix."""
        least = min((table.sizes.batch for table in self.tables), default=0)
        tables = [table for table in self.tables if table.sizes.batch == least]
        last = {table.mix: table for table in tables}  # of each mix, that of the shortest chunk
        some = list(last.values())[:MOST_SMALLEST]
        return [settings_of(problem, table, (0, 0))[0] for table in some]


def settings_of(problem: Problem, table: Tables, pair: tuple[int, int]) -> list[Setting]:
    """The canonical orders of a mix at one pair of micro-batches."""
    sizes = table.sizes
    key = ("orders", table.mix)
    found = problem.once(key, lambda: _canonical_orders(problem, table.mix))
    micro_batches = sizes.prefill[pair[0]], sizes.decode[pair[1]]
    return [Setting(order, sizes.batch, *micro_batches, sizes.chunk_tokens) for order in found]


def tighten(table: Tables, pair: tuple[int, int], solver: Solver) -> pool_bounds.Prices | None:
    """The bound by a pair's own linear programme, whose prices tell on the mix's other pairs."""
    value, prices = pool_bounds.relaxed(table.pool, *pair, solver)
    table.tight.add(pair)
    if prices is not None:
        table.bounds = np.maximum(table.bounds, pool_bounds.bounds(table.pool, prices))
    if value == math.inf:  # which has no seconds to do with
        table.bounds[pool.has_no_more_room(table.pool, pair)] = math.inf
    table.bounds[pair] = max(value, float(table.bounds[pair]))
    return prices


def _canonical_orders(problem: Problem, mix: Mix) -> list[tuple[Place, ...]]:
    return [canonical(mix, *pair) for pair in ends(problem.cluster, mix)]


# ---- what there is to search


def make_space(
    problem: Problem,
    solver: Solver,
    deadline: float = math.inf,
    told: Callable[[int, int], None] = lambda done, total: None,
    sizes: Sequence[Sizes] | None = None,
) -> Space:
    """Every mix and batch with its bounds; those not reached by `deadline` (monotonic) are not.

    `sizes`: in place of those that are tried first. `told` hears how many of how many are done.
    """
    degrees = tensor_parallel_degrees(problem.spec, problem.max_tensor_parallel)
    found, notes = mixes(problem.cluster, degrees, problem.spec.num_layers)
    todo = _todo(problem, found, sizes)
    tables: list[Tables] = []
    priced: list[tuple[pool.Pool, pool_bounds.Prices]] = []  # of the same sizes
    best = (0, 0)
    for index, (mix, some) in enumerate(todo):
        if time.monotonic() > deadline:
            notes = [
                *notes,
                f"the time limit left out {len(todo) - index} of {len(todo)} ways to "
                "use the devices",
            ]
            return Space(tables, len(todo) - index, notes)
        if index and some != todo[index - 1][1]:
            priced.clear()
        table = make_tables(problem, mix, some, best, solver, priced)
        place = int(table.bounds.argmin())
        best = divmod(place, table.bounds.shape[1])
        tables.append(table)
        if index % 64 == 0:
            told(index, len(todo))
    return Space(tables, 0, notes)


def _todo(
    problem: Problem, found: Sequence[Mix], sizes: Sequence[Sizes] | None
) -> list[tuple[Mix, Sizes]]:
    """What to make tables of: the default chunk of all mixes first."""
    if sizes is not None:
        return [(mix, some) for some in sizes for mix in found]
    usual = [(mix, some) for some in all_sizes(problem) for mix in found]
    return usual + [(mix, some) for mix in found for some in with_shorter_chunks(problem, mix)]


def make_tables(
    problem: Problem,
    mix: Mix,
    sizes: Sizes,
    near: tuple[int, int],
    solver: Solver,
    priced: list[tuple[pool.Pool, pool_bounds.Prices]],
) -> Tables:
    """Bounds by the prices of a mix that has the same kinds of places and more, out of `priced`.

    Where there is none, by a linear programme at a pair of micro-batches `near` the best, whose
    prices go there.
    """
    arrays = pool.make_pool(problem, mix, sizes)
    hopeless = pool.is_hopeless(arrays)
    table = Tables(mix, sizes, arrays, np.where(hopeless, math.inf, 0.0))
    if hopeless.all():
        return table
    guesses = (pool_bounds.carried(prices, given, arrays) for given, prices in priced)
    guess = next((prices for prices in guesses if prices is not None), None)
    if guess is not None:
        table.bounds = np.maximum(table.bounds, pool_bounds.bounds(arrays, guess))
        return table
    free = np.argwhere(~hopeless)
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

    def moved(setting: Setting, bound: float) -> float:
        return bound * float(factors(len(setting.places), setting.sizes)[0, 0])

    each = [(table, factors(num_stages(table.mix), table.sizes)) for table in space.tables]
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
    arrays = pool.make_pool(problem, table.mix, table.sizes)
    tight = set() if problem.theta else table.tight
    return replace(table, pool=arrays, bounds=table.bounds * factors, tight=tight)
