"""Bounds of a pool: by its LP, and by that one's prices for every other pair.

Which layers lie where is a small LP over how many layers the stages of each kind hold
at each option (`relaxed`). Its prices (duals: of a stage's time, of memory, of sensitivity) bound
every other pair of micro-batches too: for *any* prices, the cheapest way to place each layer by
itself is below every plan (`bounds`). So one LP a subset and batch, and array arithmetic, bound
all pairs of micro-batches.

Not covered: what a pool ignores (`pool`).
"""

import math
from dataclasses import dataclass

import numpy as np

from llmpq.costs.timeline import ADDED, LOOP, SLOWEST, STAYING, Costs
from llmpq.planner.counts import Rows, Term, add_transport, finite
from llmpq.planner.pool import Pool
from llmpq.planner.solver import LinearProgram, Solver


@dataclass(frozen=True)
class Prices:
    """Duals: what one more second, byte or unit of sensitivity somewhere costs in seconds.

    `passing`: of the chain of bursts and what comes between them, and in it `others` and `pace` of
    a kind's stages and the `loop`; `busy`: of a kind's stages that never pause.
    """

    passing: float
    others: np.ndarray  # [K]
    pace: np.ndarray  # [K]
    loop: float
    busy: np.ndarray  # [K]
    memory: np.ndarray  # [K], of a byte
    least: np.ndarray  # [K], of a stage having a layer
    omega: float


def relaxed(pool: Pool, prefill: int, decode: int, solver: Solver) -> tuple[float, Prices | None]:
    """The bound of one pair of micro-batches (their positions in the tables), and its prices.

    Infinity without prices where not even that is feasible.
    """
    program = _PoolProgram(pool, prefill, decode)
    answer = solver.relaxed(program.build())
    if answer.status == "infeasible":
        return math.inf, None
    if answer.duals is None:
        return 0.0, None
    return answer.objective, program.prices(answer.duals)


def bounds(pool: Pool, prices: Prices) -> np.ndarray:
    """[P, Q]: what no plan with these micro-batches is below, for any prices."""
    taken = (pool.capacity * (prices.memory * pool.many)).sum(axis=-1)
    total = _constants(pool, prices) - taken + (prices.least * pool.many).sum()
    if prices.omega:
        total = total - prices.omega * pool.budget
    for end in pool.ends:
        each = _priced(end.costs, prices, pool.many) + prices.memory * end.num_bytes
        total = total + each.min(axis=-1)
    return np.asarray(total + _layers(pool, prices))


# ---- prices


def carried(prices: Prices, given: Pool, other: Pool) -> Prices | None:
    """The prices of a pool as a guess for another one of the same sizes; any prices are valid.

    Where all kinds are busy, the price of a kind's time is as its stages are many; what bytes and
    sensitivity cost in seconds is then as the run takes longer. None where `other` has more kinds.
    """
    if not set(other.kinds) <= set(given.kinds):
        return None
    at = [given.kinds.index(kind) for kind in other.kinds]
    ratio = other.many / given.many[at]
    groups = prices.others, prices.pace, prices.busy
    before, after = float(sum(groups).sum()), float((sum(groups)[at] * ratio).sum())  # type: ignore[union-attr,index]
    if after <= 0:
        return None
    longer = before / after

    def shared(group: np.ndarray) -> np.ndarray:
        """As much in all as before."""
        found = group[at] * ratio
        return np.asarray(found * (group.sum() / found.sum() if found.sum() else 0.0))

    others, pace, busy = map(shared, groups)
    memory, least = prices.memory[at] * longer, prices.least[at] * longer
    loop, omega = prices.loop, prices.omega * longer
    return Prices(prices.passing, others, pace, loop, busy, memory, least, omega)


def _priced(costs: Costs, prices: Prices, many: np.ndarray) -> np.ndarray:
    """[P, Q, K]: what lies on a stage of kind k, of which there are `many`."""
    passing = prices.passing * (costs.bursts + costs.step) + prices.loop * costs.loop
    slowest = prices.others * costs.others + prices.pace * costs.pace + prices.busy * costs.busy
    return np.asarray(passing + slowest / many)


def _layers(pool: Pool, prices: Prices) -> np.ndarray:
    """[P, Q]: every layer where it is cheapest."""
    by_option = pool.layer.map(lambda array: array.swapaxes(-1, -2))
    each = _priced(by_option, prices, pool.many).swapaxes(-1, -2)
    held = prices.memory[:, None] * pool.layer_bytes - prices.least[:, None]
    pairs = each + held + np.where(pool.offered, 0.0, np.inf)  # [P, Q, K, B]
    omega = pool.groups.omega
    lost = np.where(np.isinf(omega), np.inf, (prices.omega + pool.theta) * finite(omega))
    cheapest = pairs.min(axis=2)[:, :, None, :] + lost
    return np.asarray((cheapest.min(axis=-1) * pool.groups.sizes).sum(axis=-1))


def _constants(pool: Pool, prices: Prices) -> np.ndarray:
    """[P, Q]: all that does not depend on where layers lie."""
    link, many = pool.link_sum, pool.many
    total = (_priced(pool.fixed, prices, many) * many).sum(axis=-1)
    total = total + prices.passing * (link.bursts + link.step) + prices.loop * link.loop
    total = total + (prices.passing - prices.others.sum()) * pool.least_others
    total = total + (prices.passing - prices.pace.sum() - prices.loop) * pool.least_pace
    return np.asarray(total + (1 - prices.passing - prices.busy.sum()) * pool.least_busy)


# ---- the LP


class _PoolProgram:
    """Columns: layers [K, B], transport [G, B] of several groups, both ends' kinds [K], R, S, T.

    As in `counts`: T seconds, R the slowest for other prefills, S the loop or the slowest pace.
    """

    def __init__(self, pool: Pool, prefill: int, decode: int) -> None:
        self.pool, self.pair = pool, (prefill, decode)

        def at(array: np.ndarray) -> np.ndarray:
            return np.asarray(array[prefill, decode])

        self.layer, self.fixed = pool.layer.map(at), pool.fixed.map(at)
        self.link = pool.link_sum.map(at)
        self.ends = [end.costs.map(at) for end in pool.ends]
        self.end_bytes = [at(end.num_bytes) for end in pool.ends]
        self.capacity = at(pool.capacity)
        shape = self.layer.bursts.shape
        self.c = np.arange(math.prod(shape)).reshape(shape)
        num_groups = len(pool.groups.sizes)
        self.y = self.c.size + np.arange(num_groups * shape[1]).reshape(num_groups, -1)
        self.y = self.y if num_groups > 1 else self.y[:0]
        size = self.c.size + self.y.size
        self.where = size + np.arange(len(pool.ends) * shape[0]).reshape(len(pool.ends), shape[0])
        self.R, self.S, self.T = size + self.where.size + np.arange(3)
        busy = self.layer.busy[pool.offered]
        typical = float(pool.groups.sizes.sum() * busy.mean()) if busy.size else 1.0
        self.scale = typical or 1.0
        self.rows = Rows()

    def build(self) -> LinearProgram:
        """The LP; its rows come in the order that `prices` reads."""
        pool, rows, inf = self.pool, self.rows, math.inf
        for column, name in zip((self.R, self.S, self.T), (*SLOWEST, STAYING), strict=True):
            self._slowest(int(column), name)
        self._summed((int(self.S), 1.0), names=(LOOP,))
        run = (int(self.T), 1.0), (int(self.R), -1.0), (int(self.S), -1.0)
        self._summed(*run, names=ADDED)
        for k, many in enumerate(pool.many):
            unit = max(self.capacity[k] * many, 1.0)
            ends = [
                (int(where[k]), taken[k] / unit)
                for where, taken in zip(self.where, self.end_bytes, strict=True)
            ]
            held = self.c[k], pool.layer_bytes[k] / unit
            rows.add(-inf, self.capacity[k] * many / unit, held, *ends)
        for k, many in enumerate(pool.many):
            rows.add(many, inf, (self.c[k], 1.0))
        self._sensitivity()
        rows.add(pool.groups.sizes.sum(), pool.groups.sizes.sum(), (self.c, 1.0))
        for where in self.where:
            rows.add(1, 1, (where, 1.0))
        return self._finish()

    def _slowest(self, column: int, name: str) -> None:
        """A column is at least what the stages of each kind take on average."""
        layer, fixed = getattr(self.layer, name), getattr(self.fixed, name)
        for k, many in enumerate(self.pool.many):
            held = self.c[k], -layer[k] / many / self.scale
            ends = [
                (int(where[k]), -getattr(end, name)[k] / many / self.scale)
                for where, end in zip(self.where, self.ends, strict=True)
            ]
            self.rows.add(fixed[k] / self.scale, math.inf, (column, 1.0), held, *ends)

    def _summed(self, *columns: Term, names: tuple[str, ...]) -> None:
        """Columns are at least what all resources take together."""
        scale = self.scale

        def total(costs: Costs) -> np.ndarray:
            return np.asarray(sum(getattr(costs, name) for name in names))

        constant = float((total(self.fixed) * self.pool.many).sum() + total(self.link))
        held = self.c, -total(self.layer) / scale
        ends = [
            (where, -total(end) / scale) for where, end in zip(self.where, self.ends, strict=True)
        ]
        self.rows.add(constant / scale, math.inf, *columns, held, *ends)

    def prices(self, duals: np.ndarray) -> Prices:
        """From the duals of the rows, in order; rounded so that they add up to no more than 1."""
        kinds = len(self.pool.many)
        units = np.maximum(self.capacity * self.pool.many, 1.0)
        positive = np.maximum(duals, 0.0)
        others, pace, busy = positive[: 3 * kinds].reshape(3, kinds)
        loop, passing = positive[3 * kinds : 3 * kinds + 2]
        total = max(1.0, passing + busy.sum())
        passing, busy = passing / total, busy / total
        others = others * min(1.0, passing / max(others.sum(), 1e-12))
        slowest = min(1.0, passing / max(pace.sum() + loop, 1e-12))
        at = 3 * kinds + 2
        budget = self.pool.budget
        priced = max(0.0, -duals[at + 2 * kinds]) * self.scale / (budget or 1.0)
        return Prices(
            passing=passing,
            others=others,
            pace=pace * slowest,
            loop=loop * slowest,
            busy=busy,
            memory=np.maximum(-duals[at : at + kinds], 0.0) * self.scale / units,
            least=positive[at + kinds : at + 2 * kinds] * self.scale,
            omega=priced if budget < math.inf else 0.0,
        )

    def _sensitivity(self) -> None:
        """The budget's row comes first; then which layers have which option."""
        groups, rows, budget = self.pool.groups, self.rows, self.pool.budget
        where = self.y if self.y.size else self.c
        omega = np.broadcast_to(finite(groups.omega), where.shape)
        unit = (budget or 1.0) if budget < math.inf else 1.0
        rows.add(-math.inf, budget / unit, (where, omega / unit))
        if self.y.size:
            add_transport(rows, self.y, self.c, groups)

    def _finish(self) -> LinearProgram:
        pool, scale = self.pool, self.scale
        cost = np.zeros(self.T + 1)
        where = self.y if self.y.size else self.c
        omega = np.broadcast_to(finite(pool.groups.omega), where.shape)
        cost[where] += pool.theta * omega / scale
        cost[self.T] = 1.0
        bounds = np.zeros((2, len(cost)))
        bounds[1] = math.inf
        bounds[1, self.c[~pool.offered]] = 0.0
        if self.y.size:
            bounds[1, self.y[np.isinf(pool.groups.omega)]] = 0.0
        least = (self.R, pool.least_others), (self.S, pool.least_pace), (self.T, pool.least_busy)
        for column, values in least:
            bounds[0, column] = values[self.pair] / scale
        whole = np.zeros(len(cost), dtype=bool)
        return self.rows.program(cost, bounds, whole, scale)
