"""A bound for a mix of places that no order, partition or choice of layers is below.

What is ignored: the order (embedding and head lie where that is cheapest, in parts if need be),
that a stage holds whole layers, and where stages begin and end in the model. What is left is a
small linear programme over how many layers the stages of each kind hold at each option. Its
prices (duals: of a stage's time, of memory, of sensitivity) bound every other pair of micro-batches
too: for *any* prices, the cheapest way to place each layer by itself is below every plan. So one
programme a mix and batch, and array arithmetic, bound all pairs of micro-batches.

Arrays: K kinds of places, P prefill and Q decode micro-batches, B options, G groups of layers.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, fields

import numpy as np

from llmpq.costs.memory import is_packed
from llmpq.planner.counts import Rows, Term, add_transport, finite
from llmpq.planner.instance import (
    Costs,
    LayerGroups,
    capacity,
    combined,
    fixed_costs,
    groups_of,
    kind_of,
    layer_bytes,
    layer_costs,
    least_hop,
    least_way_back,
    link_costs,
    most_room,
    unpacked_bytes,
)
from llmpq.planner.layouts import Mix, num_stages
from llmpq.planner.problem import OVER, Place, Problem, Sizes
from llmpq.planner.solver import Programme, Solver


@dataclass(frozen=True)
class Pool:
    """Costs are [P, ...] for prefill and [Q, ...] for decode arrays."""

    many: np.ndarray  # [K], stages of each kind
    offered: np.ndarray  # [K, B], booleans
    layer: Costs  # [P | Q, K, B], 0 where not offered
    fixed: Costs  # [P | Q, K]: of a stage in the middle
    ends: tuple["End", ...]  # what embedding and head add where they lie; none of one stage alone
    link_sum: Costs  # [P | Q]
    least_rest: np.ndarray  # [P], that the slowest actor takes in prefill beside the first
    least_pace: np.ndarray  # [Q], and in decode
    layer_bytes: np.ndarray  # [K, B], the share of an unpacked matrix included
    capacity: np.ndarray  # [P, Q, K]
    groups: LayerGroups
    budget: float
    theta: float


@dataclass(frozen=True)
class End:
    """What the first or the last stage has on top, by the kind it is of."""

    costs: Costs  # [P | Q, K]
    num_bytes: np.ndarray  # [P, Q, K]


@dataclass(frozen=True)
class Prices:
    """Seconds for a unit: of a kind's time in prefill and decode, the loop, memory, sensitivity."""

    rest: np.ndarray  # [K]
    pace: np.ndarray  # [K]
    loop: float
    memory: np.ndarray  # [K], of a byte
    least: np.ndarray  # [K], of a stage having a layer
    omega: float


def make_pool(problem: Problem, mix: Mix, sizes: Sizes) -> Pool:
    """The arrays of a mix."""
    kinds = _kinds(problem, mix)
    places = [place for place, _ in kinds]
    alone = num_stages(mix) == 1
    layer = _stack([layer_costs(problem, sizes, place) for place in places])
    fixed = _stack([fixed_costs(problem, sizes, place, alone, alone) for place in places])
    link_sum, link_most = _links(problem, sizes, mix)
    room = np.stack([most_room(problem, sizes, place, alone) for place in places], axis=-1)
    num_bytes = np.stack([_least_bytes(problem, sizes, place, alone) for place in places])
    many = np.array([count for _, count in kinds], dtype=float)
    held = np.floor(room.max(axis=(0, 1)) * OVER / num_bytes.min(axis=1))
    rest, pace = layer.prefill_rest.min(axis=-1), layer.later_every.min(axis=-1)
    whole = problem.spec.num_layers
    least_rest = slowest_of_whole(rest, fixed.prefill_rest, many, held, whole)
    least_pace = slowest_of_whole(pace, fixed.later_every, many, held, whole)
    return Pool(
        many=many,
        offered=np.isfinite(layer.prefill_once[0]),
        layer=layer.map(finite),
        fixed=fixed,
        ends=() if alone else tuple(_end(problem, sizes, mix, places, k) for k in (False, True)),
        link_sum=link_sum,
        least_rest=np.maximum(link_most.prefill_rest, least_rest),
        least_pace=np.maximum(link_most.later_every, least_pace),
        layer_bytes=num_bytes,
        capacity=room,
        groups=groups_of(problem),
        budget=problem.budget,
        theta=problem.theta,
    )


def slowest_of_whole(
    seconds: np.ndarray, fixed: np.ndarray, many: np.ndarray, held: np.ndarray, num_layers: int
) -> np.ndarray:
    """[M]: the least time of the slowest stage that holds whole layers, all `num_layers` of them.

    A layer takes `seconds` [M, K] on a stage of kind k beside its `fixed` [M, K]; there are `many`
    [K] of them, each with room for `held` [K] layers. Infinity where there is no room.
    """
    steps = np.arange(1, num_layers + 1)
    times = fixed[:, :, None] + seconds[:, :, None] * steps  # [M, K, L]
    times = np.where(steps <= held[:, None], times, np.inf)
    order = times.reshape(len(times), -1).argsort(axis=1)
    layers = np.broadcast_to(many[:, None], times.shape[1:]).ravel()[order].cumsum(axis=1)
    enough = (layers >= num_layers).argmax(axis=1)
    rows = np.arange(len(times))
    found = times.reshape(len(times), -1)[rows, order[rows, enough]]
    return np.asarray(np.where(layers[:, -1] >= num_layers, found, np.inf))


def _kinds(problem: Problem, mix: Mix) -> list[tuple[Place, int]]:
    """One place of each kind, and how many stages have it."""
    places: dict[Hashable, Place] = {}
    many: dict[Hashable, int] = {}
    for place, count in mix:
        key = (kind_of(problem, place), place.memory_bytes)
        places.setdefault(key, place)
        many[key] = many.get(key, 0) + count
    return [(places[key], count) for key, count in many.items()]


def _stack(costs: list[Costs]) -> Costs:
    """[P | Q, K, ...]"""
    return combined(costs, np.stack, axis=1)


def _end(problem: Problem, sizes: Sizes, mix: Mix, places: list[Place], last: bool) -> End:
    each = [_end_at(problem, sizes, place, last, num_stages(mix)) for place in places]
    return End(_stack([costs for costs, _ in each]), np.stack([taken for _, taken in each], -1))


def _end_at(
    problem: Problem, sizes: Sizes, place: Place, last: bool, num_stages: int
) -> tuple[Costs, np.ndarray]:
    """What an end adds to a stage in the middle: costs [P | Q], bytes [P, Q]."""

    def compute() -> tuple[Costs, np.ndarray]:
        middle = fixed_costs(problem, sizes, place, False, False).map(np.negative)
        added = combined([fixed_costs(problem, sizes, place, not last, last), middle], np.sum)
        room = most_room(problem, sizes, place, False)
        return added, room - capacity(problem, sizes, place, not last, last, num_stages)

    return problem.once(("end", kind_of(problem, place), last, num_stages, sizes), compute)


def _links(problem: Problem, sizes: Sizes, mix: Mix) -> tuple[Costs, Costs]:
    """Sum and maxima over the fewest and cheapest links that the stages of a mix need."""
    stages: dict[str, int] = {}
    for place, count in mix:
        stages[place.node] = stages.get(place.node, 0) + count
    hops: list[Costs] = []
    for node, count in stages.items():
        inside = least_hop(problem, sizes, node, tuple(stages))
        hops += [inside] * (count - 1)
    nodes = list(stages)
    hops += [link_costs(problem, sizes, [a, b])[0] for a, b in zip(nodes, nodes[1:], strict=False)]
    back = least_way_back(problem, sizes, tuple(nodes), num_stages(mix))
    return combined([*hops, back], np.sum), combined([*hops, back], np.max)


def _least_bytes(problem: Problem, sizes: Sizes, place: Place, alone: bool) -> np.ndarray:
    """[B]: a packed layer takes its share of the unpacked matrix of as many as fit at most."""
    held = layer_bytes(problem, sizes, place)
    packed = np.array([is_packed(p) for p in problem.precisions])
    unpacked = _least_unpacked(problem, sizes, place, alone)
    room = most_room(problem, sizes, place, alone).max() - unpacked
    most = np.floor(max(room, 0.0) * OVER / held.min())
    most = min(max(most, 1.0), problem.spec.num_layers)
    return np.asarray(held + packed * unpacked / most)


def _least_unpacked(problem: Problem, sizes: Sizes, place: Place, alone: bool) -> float:
    """Wherever in the pipeline the place lies."""
    ends = [(True, True)] if alone else [(False, False), (True, False), (False, True)]
    each = [unpacked_bytes(problem, sizes, place, first, last) for first, last in ends]
    return float(min(some.min() for some in each))


def is_hopeless(pool: Pool) -> np.ndarray:
    """[P, Q]: not even the smallest option leaves room for all layers."""
    least = np.where(pool.offered, pool.layer_bytes, np.inf).min(axis=1)
    held = np.floor(pool.capacity * OVER / least)
    layers = pool.groups.sizes.sum()
    return np.asarray((held < 1).any(axis=-1) | ((held * pool.many).sum(axis=-1) < layers))


def relaxed(pool: Pool, prefill: int, decode: int, solver: Solver) -> tuple[float, Prices | None]:
    """The bound of one pair of micro-batches (their places in the tables), and its prices.

    Infinity without prices where not even that is feasible.
    """
    programme = _Programme(pool, prefill, decode)
    answer = solver.relaxed(programme.build())
    if answer.status == "infeasible":
        return math.inf, None
    if answer.duals is None:
        return 0.0, None
    return answer.objective, programme.prices(answer.duals)


def bounds(pool: Pool, prices: Prices) -> np.ndarray:
    """[P, Q]: what no plan with these micro-batches is below, for any prices."""
    prefill, decode = _constants(pool, prices)
    taken = (pool.capacity * (prices.memory * pool.many)).sum(axis=-1)
    total = prefill[:, None] + decode[None] - taken + (prices.least * pool.many).sum()
    if prices.omega:
        total = total - prices.omega * pool.budget
    total = total + sum(_cheapest_place(pool, end, prices) for end in pool.ends)
    return np.asarray(total + _layers(pool, prices))


# ---- prices


def _cheapest_place(pool: Pool, end: End, prices: Prices) -> np.ndarray:
    """[P, Q]: an end where it costs least."""
    costs = end.costs
    first = costs.prefill_once + prices.rest * costs.prefill_rest / pool.many
    then = costs.step_last + prices.pace * costs.later_every / pool.many
    then = then + prices.loop * costs.later_once
    each = first[:, None] + then[None] + prices.memory * end.num_bytes
    return np.asarray(each.min(axis=-1))


def _layers(pool: Pool, prices: Prices) -> np.ndarray:
    """[P, Q]: every layer where it is cheapest."""
    layer, many = pool.layer, pool.many[:, None]
    first = layer.prefill_once + prices.rest[:, None] * layer.prefill_rest / many
    first = first + prices.memory[:, None] * pool.layer_bytes - prices.least[:, None]
    then = layer.step_last + prices.pace[:, None] * layer.later_every / many
    then = then + prices.loop * layer.later_once
    pairs = first[:, None] + then[None] + np.where(pool.offered, 0.0, np.inf)  # [P, Q, K, B]
    cheapest = pairs.min(axis=2)[:, :, None, :] + (prices.omega + pool.theta) * pool.groups.omega
    return np.asarray((cheapest.min(axis=-1) * pool.groups.sizes).sum(axis=-1))


def _constants(pool: Pool, prices: Prices) -> tuple[np.ndarray, np.ndarray]:
    """[P] and [Q]: all that does not depend on where layers lie."""
    fixed, link = pool.fixed, pool.link_sum
    many = pool.many
    first = (fixed.prefill_once * many).sum(axis=-1) + link.prefill_once
    first = first + (fixed.prefill_rest * prices.rest).sum(axis=-1)
    first = first + (1 - prices.rest.sum()) * pool.least_rest
    step = (fixed.step_last * many).sum(axis=-1) + link.step_last
    loop = (fixed.later_once * many).sum(axis=-1) + link.later_once
    pace = (fixed.later_every * prices.pace).sum(axis=-1)
    left = 1 - prices.pace.sum() - prices.loop
    pace = pace + left * pool.least_pace
    return first, step + prices.loop * loop + pace


# ---- the linear programme


class _Programme:
    """Columns: layers [K, B], transport [G, B] of several groups, both ends' places [K], R, S."""

    def __init__(self, pool: Pool, prefill: int, decode: int) -> None:
        self.pool, self.prefill, self.decode = pool, prefill, decode
        self.layer = _at(pool.layer, prefill, decode)
        self.fixed = _at(pool.fixed, prefill, decode)
        self.capacity = pool.capacity[prefill, decode]
        shape = self.layer.prefill_once.shape
        self.c = np.arange(math.prod(shape)).reshape(shape)
        num_groups = len(pool.groups.sizes)
        self.y = self.c.size + np.arange(num_groups * shape[1]).reshape(num_groups, -1)
        self.y = self.y if num_groups > 1 else self.y[:0]
        size = self.c.size + self.y.size
        self.where = size + np.arange(len(pool.ends) * shape[0]).reshape(len(pool.ends), shape[0])
        self.ends = [_at(end.costs, prefill, decode) for end in pool.ends]
        self.R, self.S = size + self.where.size, size + self.where.size + 1
        busy = self.layer.busy[pool.offered]
        typical = float(pool.groups.sizes.sum() * busy.mean()) if busy.size else 1.0
        self.scale = typical or 1.0
        self.rows = Rows()

    def build(self) -> Programme:
        """The programme; its rows come in the order that `prices` reads."""
        pool, rows, scale = self.pool, self.rows, self.scale
        layer, fixed, inf = self.layer, self.fixed, math.inf
        for k, many in enumerate(pool.many):
            held = self.c[k], -layer.prefill_rest[k] / many / scale
            ends = self._ends("prefill_rest", k, -1 / many / scale)
            rows.add(fixed.prefill_rest[k] / scale, inf, (self.R, 1.0), held, *ends)
        for k, many in enumerate(pool.many):
            held = self.c[k], -layer.later_every[k] / many / scale
            ends = self._ends("later_every", k, -1 / many / scale)
            rows.add(fixed.later_every[k] / scale, inf, (self.S, 1.0), held, *ends)
        ends = [e for k in range(len(pool.many)) for e in self._ends("later_once", k, -1 / scale)]
        loop = self.c, -layer.later_once / scale
        rows.add(self._loop_constant() / scale, inf, (self.S, 1.0), loop, *ends)
        for k, many in enumerate(pool.many):
            unit = max(self.capacity[k] * many, 1.0)
            taken = [end.num_bytes[self.prefill, self.decode, k] / unit for end in pool.ends]
            ends = [(int(where[k]), value) for where, value in zip(self.where, taken, strict=True)]
            held = self.c[k], pool.layer_bytes[k] / unit
            rows.add(-inf, self.capacity[k] * many / unit, held, *ends)
        for k, many in enumerate(pool.many):
            rows.add(many, inf, (self.c[k], 1.0))
        self._sensitivity()
        rows.add(pool.groups.sizes.sum(), pool.groups.sizes.sum(), (self.c, 1.0))
        for where in self.where:
            rows.add(1, 1, (where, 1.0))
        return self._finish()

    def _ends(self, name: str, k: int, factor: float) -> list[Term]:
        """What ends on stages of kind k add to a row."""
        pairs = zip(self.where, self.ends, strict=True)
        return [(int(where[k]), factor * getattr(end, name)[k]) for where, end in pairs]

    def prices(self, duals: np.ndarray) -> Prices:
        """From the duals of the rows, in order."""
        kinds = len(self.pool.many)
        units = np.maximum(self.capacity * self.pool.many, 1.0)
        at = 3 * kinds + 1
        budget = self.pool.budget
        priced = max(0.0, -duals[at + kinds]) * self.scale / (budget or 1.0)
        rest = np.maximum(duals[:kinds], 0.0)
        pace = np.maximum(duals[kinds : 2 * kinds], 0.0)
        return Prices(
            rest=rest / max(1.0, rest.sum()),
            pace=pace / max(1.0, pace.sum() + max(0.0, duals[2 * kinds])),
            loop=max(0.0, duals[2 * kinds]) / max(1.0, pace.sum() + max(0.0, duals[2 * kinds])),
            memory=np.maximum(-duals[2 * kinds + 1 : at], 0.0) * self.scale / units,
            least=np.maximum(duals[at : at + kinds], 0.0) * self.scale,
            omega=priced if budget < math.inf else 0.0,
        )

    def _loop_constant(self) -> float:
        pool, q = self.pool, self.decode
        fixed = (self.fixed.later_once * pool.many).sum()
        return float(fixed + pool.link_sum.later_once[q])

    def _sensitivity(self) -> None:
        """The budget's row comes first; then which layers have which option."""
        groups, rows, budget = self.pool.groups, self.rows, self.pool.budget
        where = self.y if self.y.size else self.c
        omega = np.broadcast_to(groups.omega, where.shape)
        unit = (budget or 1.0) if budget < math.inf else 1.0
        rows.add(-math.inf, budget / unit, (where, omega / unit))
        if self.y.size:
            add_transport(rows, self.y, self.c, groups)

    def _finish(self) -> Programme:
        pool, layer, scale = self.pool, self.layer, self.scale
        cost = np.zeros(self.S + 1)
        cost[self.c] = (layer.prefill_once + layer.step_last) / scale
        where = self.y if self.y.size else self.c
        cost[where] += pool.theta * np.broadcast_to(pool.groups.omega, where.shape) / scale
        for place, end in zip(self.where, self.ends, strict=True):
            cost[place] = (end.prefill_once + end.step_last) / scale
        cost[[self.R, self.S]] = 1.0
        bounds = np.zeros((2, len(cost)))
        bounds[1] = math.inf
        bounds[1, self.c[~pool.offered]] = 0.0
        bounds[0, self.R] = pool.least_rest[self.prefill] / scale
        bounds[0, self.S] = pool.least_pace[self.decode] / scale
        whole = np.zeros(len(cost), dtype=bool)
        return self.rows.programme(cost, bounds, whole, scale, self._constant() / scale)

    def _constant(self) -> float:
        """Seconds of the first micro-batches beside the layers."""
        pool, p, q = self.pool, self.prefill, self.decode
        once = ((self.fixed.prefill_once + self.fixed.step_last) * pool.many).sum()
        return float(once + pool.link_sum.prefill_once[p] + pool.link_sum.step_last[q])


def _at(costs: Costs, prefill: int, decode: int) -> Costs:
    """One pair of micro-batches."""
    arrays = [getattr(costs, f.name) for f in fields(costs)]
    return Costs(*[a[prefill] for a in arrays[:3]], *[a[decode] for a in arrays[3:]])
