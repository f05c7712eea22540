"""What a subset of devices can do at best, whatever the order, partition or choice of layers.

What is ignored: the order (embedding and head lie where that is cheapest, in parts if need be),
that a stage holds whole layers, and where stages begin and end in the model. What is left are the
costs of a layer on the stages of each kind, and what is beside them: `pool_bounds` bounds all plans
of the subset by it. Subsets of the same kinds of stages differ in how many of each they have, and
share the rest.

Arrays: K kinds of stages, P prefill and Q decode micro-batches, B options, G groups of layers.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llmpq.costs.timeline import SLOWEST, STAYING, Costs, combined
from llmpq.planner.counts import finite
from llmpq.planner.instance import (
    capacity,
    fixed_costs,
    kind_of,
    layer_bytes,
    layer_costs,
    least_hop,
    least_token_return,
    link_costs,
    most_room,
    packed_options,
    unpacked_bytes,
)
from llmpq.planner.layer_options import LayerGroups, groups_of, offers, options_of
from llmpq.planner.layouts import DeviceSubset, num_stages
from llmpq.planner.problem import OVER, Problem, Sizes, StageDevices
from llmpq.planner.tables import Table

SHARED: Table[tuple[Hashable, ...], "_Kinds"] = Table()
ROOMS: Table[tuple[Hashable, ...], "_KindsRoom"] = Table()
ENDS: Table[tuple[Hashable, ...], "End"] = Table()
END_COSTS: Table[tuple[Hashable, bool, int, Sizes], tuple[Costs, np.ndarray]] = Table()
LEAST_LINKS: Table[tuple[tuple[tuple[str, int], ...], Sizes], tuple[Costs, Costs]] = Table()
LEAST_BYTES: Table[tuple[str, int, int, Sizes, bool], np.ndarray] = Table()


@dataclass(frozen=True)
class Pool:
    """Costs are [P, Q, ...]."""

    kinds: tuple[Hashable, ...]  # K, what tells them apart
    many: np.ndarray  # [K], stages of each kind
    offered: np.ndarray  # [K, B], booleans
    layer: Costs  # [P, Q, K, B], 0 where not offered
    fixed: Costs  # [P, Q, K]: of a stage in the middle
    ends: tuple["End", ...]  # what embedding and head add where they lie; none of one stage alone
    link_sum: Costs  # [P, Q]
    least_others: np.ndarray  # [P, Q], that the slowest resource takes for prefills beside bursts
    least_pace: np.ndarray  # [P, Q], and for decode steps
    least_busy: np.ndarray  # [P, Q], and in all
    layer_bytes: np.ndarray  # [K, B], the share of an unpacked matrix included
    capacity: np.ndarray  # [P, Q, K]
    groups: LayerGroups
    budget: float
    theta: float


@dataclass(frozen=True)
class End:
    """What the first or the last stage has on top, by the kind it is of."""

    costs: Costs  # [P, Q, K]
    num_bytes: np.ndarray  # [P, Q, K]


@dataclass(frozen=True)
class Room:
    """Which options there are and what fits; arrays as in `Pool`. It knows no times."""

    many: np.ndarray
    offered: np.ndarray
    layer_bytes: np.ndarray
    capacity: np.ndarray
    num_layers: int

    @property
    def is_infeasible(self) -> np.ndarray:
        """[P, Q]: not even the smallest option leaves room for all layers."""
        least = np.where(self.offered, self.layer_bytes, np.inf).min(axis=1)
        held = np.floor(self.capacity * OVER / least)
        layers = (held * self.many).sum(axis=-1)
        return np.asarray((held < 1).any(axis=-1) | (layers < self.num_layers))


@dataclass(frozen=True, eq=False)
class _KindsRoom:
    """What subsets of the same kinds of stages share of their `Room`."""

    offered: np.ndarray
    layer_bytes: np.ndarray
    capacity: np.ndarray


@dataclass(frozen=True, eq=False)
class _Kinds:
    """What subsets of the same kinds of stages share, to no scale; arrays as in `Pool`."""

    layer: Costs  # infinite where not offered
    fixed: Costs
    layer_bytes: np.ndarray
    capacity: np.ndarray
    num_layers: int

    @cached_property
    def finite(self) -> Costs:
        """Of a layer, 0 where not offered."""
        return self.layer.map(finite)

    @cached_property
    def slowest(self) -> dict[str, "WholeStages"]:
        """By the kind of cost that a resource may be the slowest in."""
        held = np.floor(self.capacity.max(axis=(0, 1)) * OVER / self.layer_bytes.min(axis=1))
        flat = (-1, len(held))

        def of(name: str) -> WholeStages:
            each, beside = getattr(self.layer, name).min(axis=-1), getattr(self.fixed, name)
            return WholeStages(each.reshape(flat), beside.reshape(flat), held, self.num_layers)

        return {name: of(name) for name in (*SLOWEST, STAYING)}


def room_of(problem: Problem, subset: DeviceSubset, sizes: Sizes) -> Room:
    """What fits on a subset. No job is counted for it."""
    kinds = _kinds(problem, subset)
    alone = num_stages(subset) == 1
    shared = _shared_room(problem, sizes, kinds, alone)
    many = np.array([count for _, count in kinds.values()], dtype=float)
    layers = problem.spec.num_layers
    return Room(many, shared.offered, shared.layer_bytes, shared.capacity, layers)


def make_pool(problem: Problem, subset: DeviceSubset, sizes: Sizes) -> Pool:
    """The arrays of a subset."""
    kinds = _kinds(problem, subset)
    stage_devices = [devices for devices, _ in kinds.values()]
    alone, stages = num_stages(subset) == 1, num_stages(subset)
    same = tuple(kinds), sizes
    room = _shared_room(problem, sizes, kinds, alone)
    shared = problem.cached(
        SHARED, (*same, alone), lambda: _shared(problem, sizes, stage_devices, alone, room)
    )
    scale = problem.scales_of(stages, sizes)
    link_sum, link_most = (some.times(scale) for some in _links(problem, sizes, subset))
    many = np.array([count for _, count in kinds.values()], dtype=float)

    def end(last: bool) -> End:
        key = (*same, last, stages)
        found = problem.cached(ENDS, key, lambda: _end(problem, sizes, stage_devices, last, stages))
        return End(found.costs.times(scale), found.num_bytes)

    def slowest(name: str) -> np.ndarray:
        """[P, Q]: of stages that hold whole layers, and of links."""
        found = shared.slowest[name].least(many).reshape(sizes.shape) * scale
        return np.maximum(getattr(link_most, name), found)

    return Pool(
        kinds=tuple(kinds),
        many=many,
        offered=room.offered,
        layer=shared.finite.times(scale),
        fixed=shared.fixed.times(scale),
        ends=() if alone else tuple(end(last) for last in (False, True)),
        link_sum=link_sum,
        least_others=slowest("others"),
        least_pace=slowest("pace"),
        least_busy=slowest("busy"),
        layer_bytes=room.layer_bytes,
        capacity=room.capacity,
        groups=groups_of(problem),
        budget=problem.budget,
        theta=problem.theta,
    )


def _shared_room(
    problem: Problem,
    sizes: Sizes,
    kinds: Mapping[Hashable, tuple[StageDevices, int]],
    alone: bool,
) -> _KindsRoom:
    stage_devices = [devices for devices, _ in kinds.values()]

    def compute() -> _KindsRoom:
        times = [problem.times_at(devices) for devices in stage_devices]
        room = [most_room(problem, sizes, devices, alone) for devices in stage_devices]
        return _KindsRoom(
            offered=np.array([[offers(own, o) for o in options_of(problem)] for own in times]),
            layer_bytes=np.stack(
                [_least_bytes(problem, sizes, devices, alone) for devices in stage_devices]
            ),
            capacity=np.stack(room, axis=-1),
        )

    return problem.cached(ROOMS, (tuple(kinds), sizes, alone), compute)


def _shared(
    problem: Problem,
    sizes: Sizes,
    stage_devices: Sequence[StageDevices],
    alone: bool,
    room: _KindsRoom,
) -> _Kinds:
    return _Kinds(
        layer=_stack([layer_costs(problem, sizes, devices) for devices in stage_devices]),
        fixed=_stack(
            [fixed_costs(problem, sizes, devices, alone, alone) for devices in stage_devices]
        ),
        layer_bytes=room.layer_bytes,
        capacity=room.capacity,
        num_layers=problem.spec.num_layers,
    )


class WholeStages:
    """How fast stages that hold whole layers can be, all `num_layers` of them together.

    A layer takes `seconds` [M, K] on a stage of kind k beside its `fixed` [M, K]; each has room for
    `held` [K] layers.
    """

    def __init__(
        self, seconds: np.ndarray, fixed: np.ndarray, held: np.ndarray, num_layers: int
    ) -> None:
        steps = np.arange(1, num_layers + 1)
        times = fixed[:, :, None] + seconds[:, :, None] * steps  # [M, K, L]
        times = np.where(steps <= held[:, None], times, np.inf).reshape(len(times), -1)
        order = times.argsort(axis=1)
        self.times = np.take_along_axis(times, order, axis=1)
        self.kind = order // num_layers  # of the stage that takes so long
        self.num_layers = num_layers

    def least(self, many: np.ndarray) -> np.ndarray:
        """[M]: of the slowest of `many` [K] stages; infinity where there is no room."""
        layers = many[self.kind].cumsum(axis=1)
        enough = (layers >= self.num_layers).argmax(axis=1)
        found = self.times[np.arange(len(self.times)), enough]
        return np.asarray(np.where(layers[:, -1] >= self.num_layers, found, np.inf))


def _kinds(problem: Problem, subset: DeviceSubset) -> dict[Hashable, tuple[StageDevices, int]]:
    """One stage's devices of each kind, and how many stages are of that kind."""
    stage_devices: dict[Hashable, StageDevices] = {}
    many: dict[Hashable, int] = {}
    for devices, count in subset:
        key = (kind_of(problem, devices), devices.memory_bytes)
        stage_devices.setdefault(key, devices)
        many[key] = many.get(key, 0) + count
    return {key: (stage_devices[key], count) for key, count in many.items()}


def _stack(costs: list[Costs]) -> Costs:
    """[P, Q, K, ...]"""
    return combined(costs, np.stack, axis=2)


def _end(
    problem: Problem,
    sizes: Sizes,
    stage_devices: Sequence[StageDevices],
    last: bool,
    num_stages: int,
) -> End:
    each = [_end_at(problem, sizes, devices, last, num_stages) for devices in stage_devices]
    return End(
        _stack([costs for costs, _ in each]), np.stack([taken for _, taken in each], axis=-1)
    )


def _end_at(
    problem: Problem, sizes: Sizes, devices: StageDevices, last: bool, num_stages: int
) -> tuple[Costs, np.ndarray]:
    """What an end adds to a stage in the middle: costs [P, Q], bytes [P, Q]."""

    def compute() -> tuple[Costs, np.ndarray]:
        middle = fixed_costs(problem, sizes, devices, False, False).map(np.negative)
        added = combined([fixed_costs(problem, sizes, devices, not last, last), middle], np.sum)
        room = most_room(problem, sizes, devices, False)
        return added, room - capacity(problem, sizes, devices, not last, last, num_stages)

    return problem.cached(END_COSTS, (kind_of(problem, devices), last, num_stages, sizes), compute)


def _links(problem: Problem, sizes: Sizes, subset: DeviceSubset) -> tuple[Costs, Costs]:
    """Sum and maxima over the fewest and cheapest links that the stages of a subset need."""
    stages: dict[str, int] = {}
    for devices, count in subset:
        stages[devices.node] = stages.get(devices.node, 0) + count
    key = tuple(stages.items()), sizes
    return problem.cached(LEAST_LINKS, key, lambda: _find_links(problem, sizes, stages))


def _find_links(problem: Problem, sizes: Sizes, stages: dict[str, int]) -> tuple[Costs, Costs]:
    hops: list[Costs] = []
    for node, count in stages.items():
        inside = least_hop(problem, sizes, node, tuple(stages))
        hops += [inside] * (count - 1)
    nodes = list(stages)
    hops += [link_costs(problem, sizes, [a, b])[0] for a, b in zip(nodes, nodes[1:], strict=False)]
    back = least_token_return(problem, sizes, tuple(nodes), sum(stages.values()))
    return combined([*hops, back], np.sum), combined([*hops, back], np.max)


def _least_bytes(problem: Problem, sizes: Sizes, devices: StageDevices, alone: bool) -> np.ndarray:
    """[B]: a packed layer takes its share of the unpacked matrix of as many as fit at most."""
    key = devices.type, devices.tensor_parallel, devices.memory_bytes, sizes, alone
    return problem.cached(
        LEAST_BYTES, key, lambda: _find_least_bytes(problem, sizes, devices, alone)
    )


def _find_least_bytes(
    problem: Problem, sizes: Sizes, devices: StageDevices, alone: bool
) -> np.ndarray:
    held = layer_bytes(problem, sizes, devices)
    packed = packed_options(problem)
    unpacked = _least_unpacked(problem, sizes, devices, alone)
    room = most_room(problem, sizes, devices, alone).max() - unpacked
    most = np.floor(max(room, 0.0) * OVER / held.min())
    most = min(max(most, 1.0), problem.spec.num_layers)
    return np.asarray(held + packed * unpacked / most)


def _least_unpacked(problem: Problem, sizes: Sizes, devices: StageDevices, alone: bool) -> float:
    """Wherever in the pipeline the stage lies."""
    ends = [(True, True)] if alone else [(False, False), (True, False), (False, True)]
    each = [unpacked_bytes(problem, sizes, devices, first, last) for first, last in ends]
    return float(min(some.min() for some in each))


def has_no_more_room(pool: Pool, pair: tuple[int, int]) -> np.ndarray:
    """[P, Q]: pairs of micro-batches that leave no device more bytes than `pair` does.

    Where that one is infeasible they are too: all that limits layers is bytes and sensitivity.
    """
    less = (pool.capacity <= pool.capacity[pair]).all(axis=-1)
    for end in pool.ends:
        less &= (end.num_bytes >= end.num_bytes[pair]).all(axis=-1)
    return np.asarray(less)
