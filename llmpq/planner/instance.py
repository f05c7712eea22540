"""The arrays of one configuration: what the methods optimise over.

An `Instance` holds, per layer and stage, seconds *summed over all batches of the workload*: the
objective of `value` lets one resource be the slowest for all batches together. Layers of a kind
cost the same, so times and memory depend only on *how many* layers a stage holds at each option:
`counts` [N, B]. An option is a precision for one kind of layers (`layer_options`).

The arrays are made from cost tables: functions of a problem, a stage's devices and `Sizes`, for all
pairs of micro-batches of a batch at once. A problem remembers them, as many configurations share
them.

Not covered: what a choice of layers costs (`value`).
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from llmpq.costs import memory
from llmpq.costs.timeline import Costs, combined
from llmpq.machine import Machine
from llmpq.planner.job_table import table_of
from llmpq.planner.layer_options import (
    LayerGroups,
    groups_of,
    layer_groups,
    offers,
    omega_of,
    options_of,
)
from llmpq.planner.problem import Configuration, Problem, Sizes, StageDevices
from llmpq.planner.tables import Scope, Table
from llmpq.planner.works import fixed_work, hop_works, layer_work

LAYER_COSTS: Table[tuple[Hashable, Sizes], Costs] = Table()
FIXED_COSTS: Table[tuple[Hashable, bool, bool, Sizes], Costs] = Table()
LINK_COSTS: Table[tuple[tuple[str, ...], Sizes], Costs] = Table()
LEAST_HOPS: Table[tuple[str, str, Sizes], Costs] = Table()
LAYER_BYTES: Table[tuple[Hashable, ...], np.ndarray] = Table()
MESSAGES: Table[tuple[bool, bool, int, Sizes], np.ndarray] = Table(Scope.REQUESTS)
ACTIVATIONS: Table[tuple["_StageKind", Sizes], np.ndarray] = Table(Scope.REQUESTS)
PREFILL_BYTES: Table[tuple["_StageKind", int, int], int] = Table(Scope.REQUESTS)
DECODE_BYTES: Table[tuple["_StageKind", int], int] = Table(Scope.REQUESTS)


def stack(costs: Sequence[Costs]) -> Costs:
    """Costs of several, along a new first axis."""
    return combined(costs, np.stack)


@dataclass(frozen=True)
class Instance:
    """N stages in order, L layers, B options. Unavailable options cost infinity."""

    layer: Costs  # [N, B]: of one layer
    fixed: Costs  # [N]: of a stage beside its layers
    link: Costs  # [N]: after each stage; the last is the token return path
    layer_bytes: np.ndarray  # [N, B], the cache of one layer included
    capacity: np.ndarray  # [N], what layers may take
    unpacked_bytes: np.ndarray  # [N], taken by a device that holds any packed option
    packed: np.ndarray  # [B], booleans
    omega: np.ndarray  # [L, B], infinite where an option is of another kind of layers
    budget: float = math.inf
    theta: float = 0.0
    known_groups: LayerGroups | None = None

    @cached_property
    def groups(self) -> LayerGroups:
        """Layers of equal sensitivity."""
        return self.known_groups or layer_groups(self.omega, self.budget, self.theta)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.omega.shape[0]

    @property
    def num_stages(self) -> int:
        """N."""
        return self.capacity.shape[0]

    @property
    def num_options(self) -> int:
        """B."""
        return self.omega.shape[1]

    @cached_property
    def has_kinds(self) -> bool:
        """Layers are of several kinds, with options of their own."""
        return not np.isfinite(self.omega).all()

    @cached_property
    def kinds(self) -> tuple[np.ndarray, np.ndarray]:
        """The kind of every layer [L], and of every option [B]; -1: of kinds that no layer is."""
        offered, of_layers = np.unique(np.isfinite(self.omega), axis=0, return_inverse=True)
        return of_layers.ravel(), np.where(offered.any(axis=0), offered.argmax(axis=0), -1)

    @property
    def available(self) -> np.ndarray:
        """[N, B]: which options a stage's devices offer."""
        return np.isfinite(self.layer.bursts)


def make_instance(problem: Problem, configuration: Configuration) -> Instance:
    """The arrays of one configuration."""
    stage_devices, sizes = configuration.stage_devices, configuration.sizes
    last = len(stage_devices) - 1
    scale = problem.scales_of(len(stage_devices), sizes)
    fixed = [fixed_costs(problem, sizes, p, j == 0, j == last) for j, p in enumerate(stage_devices)]
    ends = [(j == 0, j == last) for j in range(len(stage_devices))]
    room = [
        capacity(problem, sizes, devices, *end, num_stages=len(stage_devices))[0, 0]
        for devices, end in zip(stage_devices, ends, strict=True)
    ]
    return Instance(
        layer=_of_pair([layer_costs(problem, sizes, devices) for devices in stage_devices], scale),
        fixed=_of_pair(fixed, scale),
        link=_of_pair(link_costs(problem, sizes, [p.node for p in stage_devices]), scale),
        layer_bytes=np.stack([layer_bytes(problem, sizes, devices) for devices in stage_devices]),
        capacity=np.array(room),
        unpacked_bytes=np.array(
            [
                unpacked_bytes(problem, sizes, p, j == 0, j == last)[0, 0]
                for j, p in enumerate(stage_devices)
            ]
        ),
        packed=packed_options(problem),
        omega=omega_of(problem),
        budget=problem.budget,
        theta=problem.theta,
        known_groups=groups_of(problem),
    )


def packed_options(problem: Problem) -> np.ndarray:
    """[B], booleans: which options hold weights below 16 bits."""
    return np.array([memory.is_packed(option.precision) for option in options_of(problem)])


def _of_pair(costs: Sequence[Costs], scale: np.ndarray) -> Costs:
    """Costs of several at the only pair of micro-batches, along a new first axis, to scale."""
    return stack([some.times(scale).map(of_only_pair) for some in costs])


def of_only_pair(array: np.ndarray) -> np.ndarray:
    """Of the only pair of micro-batches."""
    return np.asarray(array[0, 0])


def capacity(
    problem: Problem, sizes: Sizes, devices: StageDevices, first: bool, last: bool, num_stages: int
) -> np.ndarray:
    """[P, Q]: bytes that layers may take on each device, beside ends, activations, messages."""
    room = _room_beside_messages(problem, sizes, devices, first, last)
    key = first, last, num_stages, sizes
    taken = problem.cached(
        MESSAGES, key, lambda: _messages(problem, sizes, first, last, num_stages)
    )
    return np.asarray(room - taken)


def most_room(problem: Problem, sizes: Sizes, devices: StageDevices, alone: bool) -> np.ndarray:
    """[P, Q]: no stage of a pipeline (or alone) leaves layers more."""
    return _room_beside_messages(problem, sizes, devices, alone, alone)


def _room_beside_messages(
    problem: Problem, sizes: Sizes, devices: StageDevices, first: bool, last: bool
) -> np.ndarray:
    ends = memory.end_weight_bytes(problem.shard(devices), first=first, last=last)
    taken = ends + _activations(problem, sizes, devices, first, last, ("16",))
    return np.asarray(devices.memory_bytes - taken)


def _messages(
    problem: Problem, sizes: Sizes, first: bool, last: bool, num_stages: int
) -> np.ndarray:
    """[P, Q]: messages are as wide as the model on every device."""
    stage_devices = (StageDevices("", "", 0),) * num_stages
    fixed = sizes.chunk_tokens, sizes.lanes
    configurations = [
        [Configuration(stage_devices, sizes.batch, p, q, *fixed) for q in sizes.decode]
        for p in sizes.prefill
    ]
    return np.array(
        [
            [
                memory.buffer_bytes(problem.spec, problem.run_sizes(one), first=first, last=last)
                for one in row
            ]
            for row in configurations
        ],
        dtype=float,
    )


def _activations(
    problem: Problem,
    sizes: Sizes,
    devices: StageDevices,
    first: bool,
    last: bool,
    precisions: tuple[str, ...],
) -> np.ndarray:
    """[P, Q]: the peak of both phases, of a stage with layers at `precisions`.

    And what decode steps keep beside it.
    """
    machine = problem.times[devices.type].machine
    stage = _StageKind(devices.tensor_parallel, machine, first, last, precisions)
    return problem.cached(
        ACTIVATIONS, (stage, sizes), lambda: _activations_of(problem, sizes, stage)
    )


class _StageKind(NamedTuple):
    """What the activations of a stage depend on, beside sizes."""

    tensor_parallel: int
    machine: Machine
    first: bool
    last: bool
    precisions: tuple[str, ...]


def _activations_of(problem: Problem, sizes: Sizes, stage: _StageKind) -> np.ndarray:
    spec, chunk, machine = (
        problem.shard_of(stage.tensor_parallel),
        problem.chunk_tokens(sizes),
        stage.machine,
    )
    ends: dict[str, Any] = {"first": stage.first, "last": stage.last}
    run: dict[str, Any] = {**ends, "precisions": stage.precisions, "machine": machine}

    def prefill(requests: int) -> int:
        longest = problem.max_prompt_tokens
        return memory.prefill_bytes(spec, requests, chunk, longest, **run)

    def decode(requests: int) -> int:
        return memory.decode_bytes(spec, requests, problem.max_tokens, **run)

    prefills = [
        problem.cached(PREFILL_BYTES, (stage, p, chunk), partial(prefill, p)) for p in sizes.prefill
    ]
    lanes = [problem.lanes(sizes, rows) for rows in sizes.decode]
    decodes = [
        problem.cached(DECODE_BYTES, (stage, rows), partial(decode, rows))
        + memory.graph_bytes(shapes, machine)
        for rows, shapes in zip(sizes.decode, lanes, strict=True)
    ]
    both = memory.of_both_phases(
        np.array(prefills, dtype=float)[:, None], np.array(decodes, dtype=float), machine
    )
    kept = [memory.step_bytes(spec, shapes, **ends) for shapes in lanes]
    return np.asarray(both + np.array(kept, dtype=float))


def layer_bytes(problem: Problem, sizes: Sizes, devices: StageDevices) -> np.ndarray:
    """[B]: what a layer takes on each device of a stage, with the least cache of all `sizes`."""

    machine = problem.times[devices.type].machine

    def compute() -> np.ndarray:
        spec = problem.shard(devices)
        lanes = [problem.lanes(sizes, q) for q in sizes.decode]
        kinds = spec.kind_specs
        cache = [min(memory.layer_cache_bytes(kind, some) for some in lanes) for kind in kinds]
        held = [
            memory.layer_weight_bytes(kinds[kind], precision, machine) + cache[kind]
            for kind, precision in options_of(problem)
        ]
        return np.array(held, dtype=float)

    key = machine, sizes.batch, sizes.decode, sizes.lanes, devices.tensor_parallel
    return problem.cached(LAYER_BYTES, key, compute)


def unpacked_bytes(
    problem: Problem, sizes: Sizes, devices: StageDevices, first: bool, last: bool
) -> np.ndarray:
    """[P, Q]: what a stage with any packed layer takes besides, at the precision that takes most.

    A plan whose stage has none of that precision takes less (`evaluate.memory_of`).
    """
    times = problem.times[devices.type]
    offered = (o.precision for o in options_of(problem) if offers(times, o))
    packed = tuple(dict.fromkeys(filter(memory.is_packed, offered)))
    plain = _activations(problem, sizes, devices, first, last, ("16",))
    more = _activations(problem, sizes, devices, first, last, packed) if packed else plain
    return np.maximum(more - plain, 0.0)


def kind_of(problem: Problem, devices: StageDevices) -> Hashable:
    """What the times of a stage's devices depend on: equal kinds have equal times."""
    if devices.tensor_parallel == 1:
        return (devices.type, 1, None)
    link = problem.cluster.link_between(devices.node, devices.node)
    return (devices.type, devices.tensor_parallel, link)


# ---- cost tables: [P, Q, ...], of all pairs of micro-batches of `sizes`


def layer_costs(problem: Problem, sizes: Sizes, devices: StageDevices) -> Costs:
    """[P, Q, B]: one layer at each option; infinity where its devices do not offer it."""
    kind = kind_of(problem, devices)

    def compute() -> Costs:
        times = problem.times_at(devices)
        each = [
            table_of(problem, sizes).costs(layer_work(times, option))
            if offers(times, option)
            else _never(sizes)
            for option in options_of(problem)
        ]
        return combined(each, np.stack, axis=-1)

    return problem.cached(LAYER_COSTS, (kind, sizes), compute)


def _never(sizes: Sizes) -> Costs:
    return Costs(*(np.full(sizes.shape, math.inf) for _ in fields(Costs)))


def fixed_costs(
    problem: Problem, sizes: Sizes, devices: StageDevices, first: bool, last: bool
) -> Costs:
    """[P, Q]: what a stage costs beside its layers."""
    key = kind_of(problem, devices), first, last, sizes
    work = fixed_work(problem.times_at(devices), first, last)
    return problem.cached(FIXED_COSTS, key, lambda: table_of(problem, sizes).costs(work))


def link_costs(problem: Problem, sizes: Sizes, nodes: Sequence[str]) -> list[Costs]:
    """[P, Q] of the link after each stage; the last is the tokens' return."""
    works = hop_works(problem, nodes)
    ends = [("hop", *pair) for pair in zip(nodes, nodes[1:], strict=False)]
    ends.append(("back", *((nodes[-1], nodes[0]) if len(nodes) > 1 else ())))
    return [
        problem.cached(LINK_COSTS, (end, sizes), partial(table_of(problem, sizes).costs, work))
        for end, work in zip(ends, works, strict=True)
    ]


def least_hop(problem: Problem, sizes: Sizes, node: str, nodes: tuple[str, ...]) -> Costs:
    """[P, Q] of a hand-over from a stage on `node` in any order of stages on `nodes`.

    Inside the node, or to another one where that is cheaper.
    """
    other = next((other for other in nodes if other != node), node)
    ways = ([node, node], [node, other])

    def compute() -> Costs:
        return combined([link_costs(problem, sizes, way)[0] for way in ways], np.min)

    return problem.cached(LEAST_HOPS, (node, other, sizes), compute)


def least_token_return(
    problem: Problem, sizes: Sizes, nodes: tuple[str, ...], num_stages: int
) -> Costs:
    """[P, Q] of the tokens' return in any order of stages on `nodes`."""
    if num_stages == 1:
        return link_costs(problem, sizes, [nodes[0]])[-1]
    ways = [[node, node] for node in nodes] + [list(nodes[:2])] * (len(nodes) > 1)
    return combined([link_costs(problem, sizes, way)[-1] for way in ways], np.min)


def in_any_order(problem: Problem, configuration: Configuration, instance: Instance) -> Instance:
    """The instance with links that no order of the stages between the ends has cheaper.

    `configuration` crosses the fewest links between nodes.
    """
    nodes = [devices.node for devices in configuration.stage_devices]
    there = tuple(dict.fromkeys(nodes))
    if len(there) == 1:
        return instance
    sizes = configuration.sizes
    hops = [
        least_hop(problem, sizes, a, there) if a == b else link_costs(problem, sizes, [a, b])[0]
        for a, b in zip(nodes, nodes[1:], strict=False)
    ]
    back = link_costs(problem, sizes, nodes)[-1]
    scale = problem.scales_of(len(nodes), sizes)
    return replace(instance, link=_of_pair([*hops, back], scale))
