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
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from llmpq.costs import memory
from llmpq.costs.job_counts import DecodeSteps, PrefillJob
from llmpq.costs.timeline import Costs, Shares, combined, shares
from llmpq.job import cache_tokens
from llmpq.machine import Machine
from llmpq.planner.problem import (
    Place,
    Problem,
    Setting,
    Sizes,
    Work,
    chunk_s,
    fixed_work,
    hop_works,
    layer_work,
)


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
        return np.isfinite(self.layer.bursts)


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
        layer=stack([layer_costs(problem, sizes, place).map(of_only_pair) for place in places]),
        fixed=stack([costs.map(of_only_pair) for costs in fixed]),
        link=stack(
            [c.map(of_only_pair) for c in link_costs(problem, sizes, [p.node for p in places])]
        ),
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
        budget=problem.budget,
        theta=problem.theta,
        known_groups=groups_of(problem),
    )


def groups_of(problem: Problem) -> LayerGroups:
    """Layers of equal sensitivity."""
    return problem.once(
        "layer groups", lambda: layer_groups(omega_of(problem), problem.budget, problem.theta)
    )


def of_only_pair(array: np.ndarray) -> np.ndarray:
    """Of the only pair of micro-batches."""
    return np.asarray(array[0, 0])


def capacity(
    problem: Problem, sizes: Sizes, place: Place, first: bool, last: bool, num_stages: int
) -> np.ndarray:
    """[P, Q]: bytes that layers may take on each device, beside ends, activations, messages."""
    room = _room_beside_messages(problem, sizes, place, first, last)
    key = ("messages", first, last, num_stages, sizes)
    taken = problem.shared(key, lambda: _messages(problem, sizes, first, last, num_stages))
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
    machine = problem.times[place.type].machine
    stage = _StageKind(place.tensor_parallel, machine, first, last, precisions)
    return problem.shared((stage, sizes), lambda: _activations_of(problem, sizes, stage))


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
    ends = {"first": stage.first, "last": stage.last}
    run: dict[str, Any] = {**ends, "precisions": stage.precisions, "machine": machine}

    def prefill(requests: int) -> int:
        longest = problem.max_prompt_tokens
        return memory.prefill_bytes(spec, requests, chunk, longest, **run)

    def decode(requests: int) -> int:
        return memory.decode_bytes(spec, requests, problem.max_tokens, **run)

    prefills = [
        problem.shared((stage, "prefill", p, chunk), partial(prefill, p)) for p in sizes.prefill
    ]
    lanes = [problem.lanes(sizes, rows) for rows in sizes.decode]
    decodes = [
        problem.shared((stage, "decode", rows), partial(decode, rows))
        + memory.graph_bytes(shapes, machine)
        for rows, shapes in zip(sizes.decode, lanes, strict=True)
    ]
    both = memory.of_both_phases(
        np.array(prefills, dtype=float)[:, None], np.array(decodes, dtype=float), machine
    )
    kept = [memory.step_bytes(spec, shapes, **ends) for shapes in lanes]
    return np.asarray(both + np.array(kept, dtype=float))


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


def kind_of(problem: Problem, place: Place) -> Hashable:
    """What times of a place depend on: equal kinds have equal times."""
    if place.tensor_parallel == 1:
        return (place.type, 1, None)
    link = problem.cluster.link_between(place.node, place.node)
    return (place.type, place.tensor_parallel, link)


# ---- cost tables: [P, Q, ...], of all pairs of micro-batches of `sizes`


def layer_costs(problem: Problem, sizes: Sizes, place: Place) -> Costs:
    """[P, Q, B]: one layer at each precision; infinity where a place does not offer it."""
    kind = kind_of(problem, place)

    def compute() -> Costs:
        times = problem.times_at(place)
        each = [
            table_of(problem, sizes).costs(layer_work(times, name))
            if name in times.precisions
            else _never(sizes)
            for name in problem.precisions
        ]
        return combined(each, np.stack, axis=-1)

    return problem.once(("layers", kind, sizes), compute)


def _never(sizes: Sizes) -> Costs:
    return Costs(*(np.full(sizes.shape, math.inf) for _ in fields(Costs)))


def fixed_costs(problem: Problem, sizes: Sizes, place: Place, first: bool, last: bool) -> Costs:
    """[P, Q]: what a stage costs beside its layers."""
    key = ("fixed", kind_of(problem, place), first, last, sizes)
    work = fixed_work(problem.times_at(place), first, last)
    return problem.once(key, lambda: table_of(problem, sizes).costs(work))


def link_costs(problem: Problem, sizes: Sizes, nodes: Sequence[str]) -> list[Costs]:
    """[P, Q] of the link after each stage; the last is the tokens' return."""
    works = hop_works(problem, nodes)
    ends = [("hop", *pair) for pair in zip(nodes, nodes[1:], strict=False)]
    ends.append(("back", *((nodes[-1], nodes[0]) if len(nodes) > 1 else ())))
    return [
        problem.once((end, sizes), partial(table_of(problem, sizes).costs, work))
        for end, work in zip(ends, works, strict=True)
    ]


def least_hop(problem: Problem, sizes: Sizes, node: str, nodes: tuple[str, ...]) -> Costs:
    """[P, Q] of a hand-over from a place of `node` in any order of places on `nodes`.

    Inside the node, or to another one where that is cheaper.
    """
    other = next((other for other in nodes if other != node), node)
    ways = ([node, node], [node, other])
    return combined([link_costs(problem, sizes, way)[0] for way in ways], np.min)


def least_way_back(
    problem: Problem, sizes: Sizes, nodes: tuple[str, ...], num_stages: int
) -> Costs:
    """[P, Q] of the tokens' return in any order of places on `nodes`."""
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
    link = stack([costs.map(of_only_pair) for costs in (*hops, back)])
    return replace(instance, link=link)


# ---- from the jobs of a run to seconds


@dataclass(frozen=True, eq=False)
class JobTable:
    """The jobs of the runs of all pairs of micro-batches, by what a resource is asked for.

    Prefill jobs are told apart by rows and tokens, decode steps by rows and past; `first`,
    `refills`, `steps` and `longest` [P, Q, jobs] say how many of them a run has.
    """

    prefill: tuple[PrefillJob, ...]
    decode: tuple[tuple[int, float], ...]
    first: np.ndarray
    refills: np.ndarray
    steps: np.ndarray
    longest: np.ndarray
    shares: Shares

    def costs(self, work: Work) -> Costs:
        """[P, Q]: what a resource is asked for in the whole run."""
        prefill, decode = self._prefill_s(work), self._decode_s(work)
        return self.shares.costs(
            self.first @ prefill, self.refills @ prefill, self.steps @ decode, self.longest @ decode
        )

    def _prefill_s(self, work: Work) -> np.ndarray:
        """Seconds of each prefill job."""
        jobs = np.array(self.prefill, dtype=float)
        seconds = np.zeros(len(jobs))
        for rows in np.unique(jobs[:, 0]):
            own = jobs[:, 0] == rows
            begin, end = jobs[own, 1], jobs[own, 2]
            whole = partial(work.prefill, int(rows))
            seconds[own] = np.where(begin > 0, chunk_s(whole, begin, end), whole(end))
        return seconds

    def _decode_s(self, work: Work) -> np.ndarray:
        steps = np.array(self.decode, dtype=float).reshape(-1, 2)
        seconds = np.zeros(len(steps))
        for rows in np.unique(steps[:, 0]):
            own = steps[:, 0] == rows
            seconds[own] = work.decode(int(rows), steps[own, 1])
        return seconds


def table_of(problem: Problem, sizes: Sizes) -> JobTable:
    """The jobs of all pairs of micro-batches."""
    return problem.shared(("table", sizes, problem.repeats), lambda: _make_table(problem, sizes))


def _make_table(problem: Problem, sizes: Sizes) -> JobTable:
    counts = [
        problem.job_counts(sizes, prefill, decode)
        for prefill in range(len(sizes.prefill))
        for decode in range(len(sizes.decode))
    ]
    prefills: dict[PrefillJob, int] = {}
    decodes: dict[tuple[int, float], int] = {}

    def of_prefills(jobs: Mapping[PrefillJob, float]) -> dict[int, float]:
        return {prefills.setdefault(job, len(prefills)): count for job, count in jobs.items()}

    def of_steps(steps: Sequence[DecodeSteps]) -> dict[int, float]:
        found: dict[int, float] = {}
        for rows, past, count in steps:
            at = decodes.setdefault((rows, past), len(decodes))
            found[at] = found.get(at, 0.0) + count
        return found

    columns = [
        (of_prefills(c.first), of_prefills(c.refills), of_steps(c.steps), of_steps(c.longest_lane))
        for c in counts
    ]
    widths = len(prefills), len(prefills), len(decodes), len(decodes)
    arrays = [np.zeros((len(counts), width)) for width in widths]
    for row, found in enumerate(columns):
        for array, some in zip(arrays, found, strict=True):
            array[row, list(some)] = list(some.values())
    first, refills, steps, longest = (array.reshape(*sizes.shape, -1) for array in arrays)
    return JobTable(
        prefill=tuple(prefills),
        decode=tuple(decodes),
        first=first,
        refills=refills,
        steps=steps,
        longest=longest,
        shares=shares(counts, sizes.shape),
    )
