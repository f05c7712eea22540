"""The arrays of one setting: what the methods optimise over.

An `Instance` holds, per layer and stage, seconds *summed over all batches of the workload*: the
objective of `value` lets one actor be the slowest for all batches together. Layers cost the same,
so times and memory depend only on *how many* layers a stage holds at each option: `counts` [N, B].
An option is a precision here; whatever else a layer may choose (precisions of attention and
feed-forward apart, of the cache) would be more columns of the same arrays.

The arrays are made from cost tables: functions of a problem, a place and `Sizes`, for all pairs
of micro-batches of a batch at once. A problem remembers them, as many settings share them.

Not covered: what a choice of layers costs (`value`).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from llmpq.costs import memory
from llmpq.costs.links import Seconds
from llmpq.costs.timeline import split, wait_counts
from llmpq.planner.problem import (
    Place,
    Problem,
    Setting,
    Sizes,
    Work,
    fixed_work,
    hop_works,
    layer_work,
)
from llmpq.schedule import cache_tokens


@dataclass(frozen=True)
class Costs:
    """Seconds of an actor, summed over the workload's batches.

    prefill_once: the first, largest micro-batch; prefill_rest: all others of that size;
    prefill_tail: a smaller last one.
    step_last: the last, smallest micro-batch of one decode step; step_others: all but the first of
    a step; step_every: all of a step. later_once, later_every: the first micro-batch, and all, of
    all decode steps but one. Where the last one is smaller, `later_once` is less by it: a chain
    that has waited for the whole prefill goes on with that one, and not once more round the loop.
    """

    prefill_once: np.ndarray
    prefill_rest: np.ndarray
    prefill_tail: np.ndarray
    step_last: np.ndarray
    step_others: np.ndarray
    step_every: np.ndarray
    later_once: np.ndarray
    later_every: np.ndarray

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Costs":
        """`change` done to each array."""
        return Costs(*(change(getattr(self, f.name)) for f in fields(self)))

    @property
    def decode_every(self) -> np.ndarray:
        """All micro-batches of all decode steps."""
        return np.asarray(self.step_every + self.later_every)

    @property
    def busy(self) -> np.ndarray:
        """Seconds of work over the whole workload."""
        prefill = self.prefill_once + self.prefill_rest + self.prefill_tail
        return np.asarray(prefill + self.decode_every)


def combined(costs: Sequence[Costs], how: Callable[..., np.ndarray], axis: int = 0) -> Costs:
    """Costs of several, array by array: `how` is np.stack, np.sum, np.min or np.max."""
    return Costs(*(how([getattr(c, f.name) for c in costs], axis=axis) for f in fields(Costs)))


def stack(costs: Sequence[Costs]) -> Costs:
    """Costs of several, along a new first axis."""
    return combined(costs, np.stack)


@dataclass(frozen=True)
class LayerGroups:
    """Layers of equal sensitivity: `omega` [G, B], and how many each group has."""

    omega: np.ndarray
    sizes: np.ndarray


def layer_groups(omega: np.ndarray, budget: float, theta: float) -> LayerGroups:
    """Groups of equal rows of omega [L, B]; one group where omega does not matter."""
    if theta == 0 and budget == math.inf:
        return LayerGroups(0 * omega[:1], np.array([len(omega)]))
    return LayerGroups(*np.unique(omega, axis=0, return_counts=True))


@dataclass(frozen=True)
class Overlap:
    """How decoding starts while others still prefill.

    `waits`: share of the prefill's rest before the first decode micro-batch can start. `after`:
    share of a step's other decode micro-batches that come after the first one that waits for the
    whole prefill.
    """

    waits: float = 0.0
    after: float = 0.0


@dataclass(frozen=True)
class Instance:
    """N stages in order, L layers, B options. Unavailable options cost infinity."""

    layer: Costs  # [N, B]: of one layer
    fixed: Costs  # [N]: of a stage beside its layers
    link: Costs  # [N]: after each stage; the last is the way back
    layer_bytes: np.ndarray  # [N, B], the cache of one layer included
    capacity: np.ndarray  # [N], what layers may take
    unpacked_bytes: np.ndarray  # [N], taken by a device that holds any packed option
    packed: np.ndarray  # [B], booleans
    omega: np.ndarray  # [L, B]
    overlap: Overlap = Overlap()
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

    @property
    def available(self) -> np.ndarray:
        """[N, B]: which options a place offers."""
        return np.isfinite(self.layer.prefill_once) & np.isfinite(self.layer.later_once)


def make_instance(problem: Problem, setting: Setting) -> Instance:
    """The arrays of one setting."""
    places, sizes = setting.places, setting.sizes
    last = len(places) - 1
    fixed = [fixed_costs(problem, sizes, p, j == 0, j == last) for j, p in enumerate(places)]
    ends = [(j == 0, j == last) for j in range(len(places))]
    room = [
        capacity(problem, sizes, place, *end, num_stages=len(places))[0, 0]
        for place, end in zip(places, ends, strict=True)
    ]
    return Instance(
        layer=stack([layer_costs(problem, sizes, place).map(_first) for place in places]),
        fixed=stack([costs.map(_first) for costs in fixed]),
        link=stack([c.map(_first) for c in link_costs(problem, sizes, [p.node for p in places])]),
        layer_bytes=np.stack([layer_bytes(problem, sizes, place) for place in places]),
        capacity=np.array(room),
        unpacked_bytes=np.array(
            [
                unpacked_bytes(problem, sizes, p, j == 0, j == last)[0, 0]
                for j, p in enumerate(places)
            ]
        ),
        packed=np.array([memory.is_packed(p) for p in problem.precisions]),
        omega=omega_of(problem),
        overlap=_overlap(problem, setting),
        budget=problem.budget,
        theta=problem.theta,
        known_groups=groups_of(problem),
    )


def groups_of(problem: Problem) -> LayerGroups:
    """Layers of equal sensitivity."""
    return problem.once(
        "layer groups", lambda: layer_groups(omega_of(problem), problem.budget, problem.theta)
    )


def _first(array: np.ndarray) -> np.ndarray:
    """Of the only pair of micro-batches."""
    return np.asarray(array[0])


def capacity(
    problem: Problem, sizes: Sizes, place: Place, first: bool, last: bool, num_stages: int
) -> np.ndarray:
    """[P, Q]: bytes that layers may take on each device, beside ends, activations, messages."""
    room = _room_beside_messages(problem, sizes, place, first, last)
    key = ("messages", first, last, num_stages, sizes)
    taken = problem.once(key, lambda: _messages(problem, sizes, first, last, num_stages))
    return np.asarray(room - taken)


def most_room(problem: Problem, sizes: Sizes, place: Place, alone: bool) -> np.ndarray:
    """[P, Q]: no place in a pipeline (or alone) leaves layers more."""
    return _room_beside_messages(problem, sizes, place, alone, alone)


def _room_beside_messages(
    problem: Problem, sizes: Sizes, place: Place, first: bool, last: bool
) -> np.ndarray:
    ends = memory.end_weight_bytes(problem.shard(place), first=first, last=last)
    taken = ends + _activations(problem, sizes, place, first, last, ("16",))
    return np.asarray(place.memory_bytes - taken)


def _messages(
    problem: Problem, sizes: Sizes, first: bool, last: bool, num_stages: int
) -> np.ndarray:
    """[P, Q]: messages are as wide as the model on every device."""
    places = (Place("", "", 0),) * num_stages
    fixed = sizes.chunk_tokens, sizes.lanes
    settings = [
        [Setting(places, sizes.batch, p, q, *fixed) for q in sizes.decode] for p in sizes.prefill
    ]
    return np.array(
        [
            [
                memory.buffer_bytes(problem.spec, problem.run_sizes(one), first=first, last=last)
                for one in row
            ]
            for row in settings
        ],
        dtype=float,
    )


def _activations(
    problem: Problem,
    sizes: Sizes,
    place: Place,
    first: bool,
    last: bool,
    precisions: tuple[str, ...],
) -> np.ndarray:
    """[P, Q]: the peak of both phases, of a stage with layers at `precisions`.

    And what decode steps keep beside it.
    """
    spec, machine = problem.shard(place), problem.times[place.type].machine
    key = ("activations", place.tensor_parallel, machine, first, last, precisions)
    stage: dict[str, Any] = {"first": first, "last": last, "precisions": precisions}
    stage["machine"] = machine
    chunk = problem.chunk_tokens(sizes)

    def prefill(requests: int) -> int:
        longest = problem.max_prompt_tokens
        return memory.prefill_bytes(spec, requests, chunk, longest, **stage)

    def decode(requests: int) -> int:
        return memory.decode_bytes(spec, requests, problem.max_tokens, **stage)

    def kept(requests: int) -> int:
        lanes = problem.lanes(sizes, requests)
        return memory.step_bytes(spec, lanes, first=first, last=last)

    def graphs(requests: int) -> int:
        return memory.graph_bytes(problem.lanes(sizes, requests), machine)

    prefills = [
        problem.once((*key, "prefill", p, chunk), partial(prefill, p)) for p in sizes.prefill
    ]
    decodes = [
        problem.once((*key, "decode", q), partial(decode, q)) + graphs(q) for q in sizes.decode
    ]
    both = memory.of_both_phases(
        np.array(prefills, dtype=float)[:, None], np.array(decodes, dtype=float), machine
    )
    return np.asarray(both + np.array([kept(q) for q in sizes.decode], dtype=float))


def layer_bytes(problem: Problem, sizes: Sizes, place: Place) -> np.ndarray:
    """[B]: what a layer takes on each device of a place, with the least cache of all `sizes`."""

    machine = problem.times[place.type].machine

    def compute() -> np.ndarray:
        spec = problem.shard(place)
        tokens = min(cache_tokens(problem.lanes(sizes, q)) for q in sizes.decode)
        weights = [memory.layer_weight_bytes(spec, p, machine) for p in problem.precisions]
        return np.array(weights, dtype=float) + memory.layer_cache_bytes(spec, tokens)

    key = ("bytes", machine, sizes.batch, sizes.decode, sizes.lanes, place.tensor_parallel)
    return problem.once(key, compute)


def unpacked_bytes(
    problem: Problem, sizes: Sizes, place: Place, first: bool, last: bool
) -> np.ndarray:
    """[P, Q]: what a stage with any packed layer takes besides, at the precision that takes most.

    A plan whose stage has none of that precision takes less (`evaluate.memory_of`).
    """
    offered = problem.times[place.type].precisions
    packed = tuple(p for p in problem.precisions if p in offered and memory.is_packed(p))
    plain = _activations(problem, sizes, place, first, last, ("16",))
    more = _activations(problem, sizes, place, first, last, packed) if packed else plain
    return np.maximum(more - plain, 0.0)


def omega_of(problem: Problem) -> np.ndarray:
    """[L, B]: sensitivity."""

    def compute() -> np.ndarray:
        return np.array([problem.quality.omega[p] for p in problem.precisions], dtype=float).T

    return problem.once("omega", compute)


def _overlap(problem: Problem, setting: Setting) -> Overlap:
    """The least of all batches, so that no chain gets longer than it is."""
    sizes = setting.prefill_micro_batch, setting.decode_micro_batch
    each = [overlap(group.num_requests, *sizes) for group in problem.groups(setting.batch)]
    return Overlap(min(o.waits for o in each), min(o.after for o in each))


def overlap(num_requests: int, prefill_micro_batch: int, decode_micro_batch: int) -> Overlap:
    """Of one batch. A smaller last decode micro-batch comes after no other: a lower bound."""
    waits = wait_counts(num_requests, prefill_micro_batch, decode_micro_batch)
    in_all, others = waits[-1], len(waits) - 1
    after = others - waits.index(in_all) if num_requests % decode_micro_batch == 0 else 0
    return Overlap(
        waits=(waits[0] - 1) / (in_all - 1) if in_all > 1 else 0.0,
        after=after / others if others else 0.0,
    )


def kind_of(problem: Problem, place: Place) -> Hashable:
    """What times of a place depend on: equal kinds have equal times."""
    link = problem.cluster.link_between(place.node, place.node)
    return (place.type, place.tensor_parallel, link if place.tensor_parallel > 1 else None)


# ---- cost tables: [P] in the prefill's arrays, [Q] in the decode's, of all pairs of `sizes`


def layer_costs(problem: Problem, sizes: Sizes, place: Place) -> Costs:
    """[P | Q, B]: one layer at each precision; infinity where a place does not offer it."""
    kind = kind_of(problem, place)

    def compute() -> Costs:
        times = problem.times_at(place)
        each = [
            summed(problem, sizes, ("layer", kind, name), layer_work(times, name))
            if name in times.precisions
            else _never(sizes)
            for name in problem.precisions
        ]
        return stack(each).map(np.transpose)

    return problem.once(("layers", kind, sizes), compute)


def _never(sizes: Sizes) -> Costs:
    prefill, decode = (np.full(len(some), math.inf) for some in (sizes.prefill, sizes.decode))
    return Costs(prefill, prefill, prefill, *(decode,) * 5)


def fixed_costs(problem: Problem, sizes: Sizes, place: Place, first: bool, last: bool) -> Costs:
    """[P | Q]: what a stage costs beside its layers."""
    key = ("fixed", kind_of(problem, place), first, last)
    work = fixed_work(problem.times_at(place), first, last)
    return problem.once((*key, sizes), lambda: summed(problem, sizes, key, work))


def link_costs(problem: Problem, sizes: Sizes, nodes: Sequence[str]) -> list[Costs]:
    """[P | Q] of the link after each stage; the last is the way back."""
    works = hop_works(problem, nodes)
    ends = [("hop", *pair) for pair in zip(nodes, nodes[1:], strict=False)]
    ends.append(("back", *((nodes[-1], nodes[0]) if len(nodes) > 1 else ())))
    return [summed(problem, sizes, end, work) for end, work in zip(ends, works, strict=True)]


def least_hop(problem: Problem, sizes: Sizes, node: str, nodes: tuple[str, ...]) -> Costs:
    """[P | Q] of a hand-over from a place of `node` in any order of places on `nodes`.

    Inside the node, or to another one where that is cheaper.
    """
    other = next((other for other in nodes if other != node), node)
    ways = ([node, node], [node, other])
    return combined([link_costs(problem, sizes, way)[0] for way in ways], np.min)


def least_way_back(
    problem: Problem, sizes: Sizes, nodes: tuple[str, ...], num_stages: int
) -> Costs:
    """[P | Q] of the tokens' way back in any order of places on `nodes`."""
    if num_stages == 1:
        return link_costs(problem, sizes, [nodes[0]])[-1]
    ways = [[node, node] for node in nodes] + [list(nodes[:2])] * (len(nodes) > 1)
    return combined([link_costs(problem, sizes, way)[-1] for way in ways], np.min)


def in_any_order(problem: Problem, setting: Setting, instance: Instance) -> Instance:
    """The instance with links that no order of the places between the ends has cheaper.

    `setting` crosses the fewest links between nodes.
    """
    nodes = [place.node for place in setting.places]
    there = tuple(dict.fromkeys(nodes))
    if len(there) == 1:
        return instance
    sizes = setting.sizes
    hops = [
        least_hop(problem, sizes, a, there) if a == b else link_costs(problem, sizes, [a, b])[0]
        for a, b in zip(nodes, nodes[1:], strict=False)
    ]
    back = link_costs(problem, sizes, nodes)[-1]
    link = stack([costs.map(_first) for costs in (*hops, back)])
    return replace(instance, link=link)


def summed(problem: Problem, sizes: Sizes, key: Hashable, work: Work) -> Costs:
    """[P | Q]: an actor's costs over all batches. `key` names the actor."""
    prefill = np.array([_prefill_sums(problem, sizes.batch, p, key, work) for p in sizes.prefill])
    decode = np.array([_decode_sums(problem, sizes.batch, q, key, work) for q in sizes.decode])
    return Costs(*prefill.T, *decode.T)


def _prefill_sums(
    problem: Problem, batch: int, size: int, key: Hashable, work: Work
) -> tuple[float, ...]:
    """The prefill costs of `Costs`, in order."""

    def compute() -> tuple[float, ...]:
        total = np.zeros(3)
        for group in problem.groups(batch):
            parts = split(group.num_requests, size)
            first = _dot(group.num_batches, work.prefill(parts.size, group.prompt_tokens))
            total[:2] += first, first * (parts.count - 1)
            if parts.rest:
                total[2] += _dot(group.num_batches, work.prefill(parts.rest, group.prompt_tokens))
        return tuple(total.tolist())

    return problem.once(("p", key, batch, size), compute)


def _decode_sums(
    problem: Problem, batch: int, size: int, key: Hashable, work: Work
) -> tuple[float, ...]:
    """The decode costs of `Costs`, in order."""

    def compute() -> tuple[float, ...]:
        total = np.zeros(5)
        for group in problem.groups(batch):
            parts = split(group.num_requests, size)
            once = work.decode(parts.size, group.past_tokens)
            last = work.decode(parts.rest, group.past_tokens) if parts.rest else once
            every = once * parts.count + (last if parts.rest else 0.0)
            some = group.num_batches * (group.num_steps > 0)
            later = group.num_batches * np.maximum(group.num_steps - 1, 0)
            weights = (some, some, some, later, later)
            least = np.minimum(once, last)  # a chain's way down is with either
            seconds = (least, every - once, every, once, every)
            total += [_dot(*pair) for pair in zip(weights, seconds, strict=True)]
            total[3] -= _dot(some, last) if parts.rest else 0.0
        return tuple(total.tolist())

    return problem.once(("d", key, batch, size), compute)


def _dot(weight: np.ndarray, seconds: Seconds) -> float:
    return float((weight * seconds).sum())
