"""The planning problem as a value, and its arrays for one setting of order and batch sizes.

A `Setting` fixes everything but which stage holds which layers at which precisions; an
`Assignment` fixes that too. An `Instance` is what the methods optimise over: per layer and stage
seconds *summed over all batches of the workload*. Its objective lets one actor be the slowest for
all batches together, so it never exceeds the exact time of `evaluate` (a sum of maxima is at least
the maximum of sums), and equals it where the batches have the same bottleneck.

Layers cost the same, so times and memory depend only on *how many* layers a stage holds at each
option: `counts` [N, B]. An option is a precision here; whatever else a layer may choose (precisions
of attention and feed-forward apart, of the cache) would be more columns of the same arrays.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from llmpq.cluster import Cluster
from llmpq.costs import links, memory
from llmpq.costs.latency import LayerTimes, Seconds, tensor_parallel_times
from llmpq.costs.quality import QualityModel
from llmpq.costs.timeline import mean_past, split, wait_counts
from llmpq.model_spec import ModelSpec
from llmpq.profile_data import Profile
from llmpq.workload import Workload, batches

T = TypeVar("T")
Lengths = tuple[tuple[int, int], ...]  # (prompt tokens, new tokens) of every request
Choice = tuple[tuple[int, ...], ...]  # for each stage, the option of each of its layers


@dataclass(frozen=True)
class Place:
    """Where a stage lies: `tensor_parallel` equal devices of a node, `memory_bytes` each."""

    node: str
    type: str
    memory_bytes: int
    tensor_parallel: int = 1


@dataclass(frozen=True)
class Sizes:
    """A batch, and the micro-batches of both phases that are looked at together."""

    batch: int
    prefill: tuple[int, ...]
    decode: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """The places of the stages in order, and the sizes of batch and micro-batches."""

    places: tuple[Place, ...]
    batch: int
    prefill_micro_batch: int
    decode_micro_batch: int

    @property
    def sizes(self) -> Sizes:
        """The one pair of micro-batches."""
        return Sizes(self.batch, (self.prefill_micro_batch,), (self.decode_micro_batch,))


@dataclass(frozen=True)
class Assignment:
    """A setting, and the precision of every layer of every stage."""

    setting: Setting
    stages: tuple[tuple[str, ...], ...]

    @property
    def precisions(self) -> list[str]:
        """The precision of every layer of the model."""
        return [p for stage in self.stages for p in stage]


@dataclass(frozen=True)
class BatchGroup:
    """The workload's batches of one number of requests; arrays over distinct lengths."""

    num_requests: int
    prompt_tokens: np.ndarray
    new_tokens: np.ndarray
    num_batches: np.ndarray  # how many batches have these lengths

    @property
    def num_steps(self) -> np.ndarray:
        """Decode steps of a batch; its first token comes from the prefill."""
        return self.new_tokens - 1

    @property
    def past_tokens(self) -> np.ndarray:
        """Mean past of the decode steps."""
        return mean_past(self.prompt_tokens, self.new_tokens)


@dataclass(frozen=True, eq=False)
class Problem:
    """Model, machines, work and costs. `budget`: largest summed sensitivity; `theta`: its price.

    `max_tensor_parallel`: the most devices of a stage; 1 leaves tensor parallelism out.
    """

    spec: ModelSpec
    cluster: Cluster
    workload: Workload
    lengths: Lengths
    times: Mapping[str, LayerTimes]  # by device type, of one device
    quality: QualityModel
    precisions: tuple[str, ...]
    budget: float = math.inf
    theta: float = 0.0
    max_tensor_parallel: int = 1
    profiles: Sequence[Profile] = ()  # where times of several devices a stage are looked up
    _known: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`, kept for the next time the same is asked."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt."""
        return self.once("longest", lambda: max(prompt for prompt, _ in self.lengths))

    @property
    def num_new_tokens(self) -> int:
        """Tokens to generate."""
        return sum(new for _, new in self.lengths)

    def groups(self, batch: int) -> list[BatchGroup]:
        """The batches that will run, by number of requests."""
        return self.once(("groups", batch), lambda: _groups(self.lengths, batch))

    def cache_tokens(self, batch: int) -> int:
        """The longest padded prompt with its batch's new tokens."""
        groups = self.groups(batch)
        return max(int((g.prompt_tokens + g.new_tokens).max()) for g in groups)

    def shard(self, place: Place) -> ModelSpec:
        """What one device of a place holds of the model."""
        degree = place.tensor_parallel
        return self.once(("shard", degree), lambda: self.spec.shard(degree))

    def times_at(self, place: Place) -> LayerTimes:
        """Times of a place, the messages between its devices included."""
        if place.tensor_parallel == 1:
            return self.times[place.type]
        key = ("times", place.type, place.node, place.tensor_parallel)
        return self.once(key, lambda: self._tensor_parallel_times(place))

    def _tensor_parallel_times(self, place: Place) -> LayerTimes:
        return tensor_parallel_times(
            self.cluster, place.type, place.node, self.spec, place.tensor_parallel, self.profiles
        )


def _groups(lengths: Lengths, batch: int) -> list[BatchGroup]:
    counts: dict[int, Counter[tuple[int, int]]] = {}
    for one in batches(lengths, batch):
        group = counts.setdefault(len(one.requests), Counter())
        group[one.prompt_tokens, one.new_tokens] += 1
    return [_group(size, counter) for size, counter in counts.items()]


def _group(num_requests: int, counter: Counter[tuple[int, int]]) -> BatchGroup:
    lengths = np.array(list(counter), dtype=float)
    return BatchGroup(num_requests, lengths[:, 0], lengths[:, 1], np.array(list(counter.values())))


# ---- the time of one actor (a stage or a link) for one batch

Cost = Callable[[int, Any], Seconds]  # of a micro-batch's requests and its prompt or past tokens


@dataclass(frozen=True)
class Work:
    """What an actor does with a micro-batch in both phases."""

    prefill: Cost
    decode: Cost


def layer_work(times: LayerTimes, precision: str) -> Work:
    """One decoder layer."""
    return Work(
        lambda size, tokens: times.prefill_s(precision, size, tokens),
        lambda size, past: times.decode_s(precision, size, past),
    )


def fixed_work(times: LayerTimes, first: bool, last: bool) -> Work:
    """What a stage does beside its layers: the call, the embedding, the head.

    In decode one token a request is embedded.
    """

    def cost(call: Cost, size: int, tokens: Any, embedded: Any) -> Seconds:
        seconds = call(size, tokens)
        seconds = seconds + (times.embedding_s(size, embedded) if first else 0.0)
        return seconds + (times.head_s(size) if last else 0.0)

    return Work(
        lambda size, tokens: cost(times.stage_prefill_s, size, tokens, tokens),
        lambda size, past: cost(times.stage_decode_s, size, past, 1),
    )


def stage_work(times: LayerTimes, first: bool, last: bool, precisions: Sequence[str]) -> Work:
    """A whole stage."""
    counts = Counter(precisions)
    fixed = fixed_work(times, first, last)
    layers = {name: layer_work(times, name) for name in counts}

    def total(phase: str, size: int, tokens: Any) -> Seconds:
        each = sum(n * getattr(layers[p], phase)(size, tokens) for p, n in counts.items())
        return getattr(fixed, phase)(size, tokens) + each

    return Work(
        lambda *micro_batch: total("prefill", *micro_batch),
        lambda *micro_batch: total("decode", *micro_batch),
    )


def hop_works(problem: Problem, nodes: Sequence[str]) -> list[Work]:
    """The link after each stage: to the next one; after the last, the tokens' way back."""
    down = [_hand_over(problem, a, b) for a, b in zip(nodes, nodes[1:], strict=False)]
    return [*down, _way_back(problem, nodes)]


def _hand_over(problem: Problem, node: str, other: str) -> Work:
    cluster, spec = problem.cluster, problem.spec
    return Work(
        lambda size, tokens: links.prefill_s(cluster, node, other, spec, size, tokens),
        lambda size, past: links.decode_s(cluster, node, other, spec, size) + 0.0 * past,
    )


def _way_back(problem: Problem, nodes: Sequence[str]) -> Work:
    """Nothing where one stage is first and last."""
    if len(nodes) == 1:
        return Work(lambda size, tokens: 0.0 * tokens, lambda size, past: 0.0 * past)
    ends = nodes[-1], nodes[0]
    return Work(
        lambda size, tokens: 0.0 * tokens,
        lambda size, past: links.tokens_back_s(problem.cluster, *ends, size) + 0.0 * past,
    )


# ---- the arrays of one setting


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


def stack(costs: Sequence[Costs]) -> Costs:
    """Costs of several, along a new first axis."""
    return Costs(*(np.stack([getattr(c, f.name) for c in costs]) for f in fields(Costs)))


@dataclass(frozen=True)
class LayerGroups:
    """Layers of equal sensitivity: `omega` [G, B], how many each group has, each layer's group."""

    omega: np.ndarray
    sizes: np.ndarray
    of_layer: np.ndarray


def layer_groups(omega: np.ndarray, budget: float, theta: float) -> LayerGroups:
    """Groups of equal rows of omega [L, B]; one group where omega does not matter."""
    if theta == 0 and budget == math.inf:
        layers = len(omega)
        return LayerGroups(0 * omega[:1], np.array([layers]), np.zeros(layers, dtype=int))
    rows, inverse, sizes = np.unique(omega, axis=0, return_inverse=True, return_counts=True)
    return LayerGroups(rows, sizes, inverse.ravel())


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
    room = [capacity(problem, sizes, p, j == 0, j == last)[0, 0] for j, p in enumerate(places)]
    return Instance(
        layer=stack([layer_costs(problem, sizes, place).map(_first) for place in places]),
        fixed=stack([costs.map(_first) for costs in fixed]),
        link=stack([c.map(_first) for c in link_costs(problem, sizes, [p.node for p in places])]),
        layer_bytes=np.stack([layer_bytes(problem, setting.batch, place) for place in places]),
        capacity=np.array(room),
        unpacked_bytes=np.array([unpacked_bytes(problem, place) for place in places]),
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


def capacity(problem: Problem, sizes: Sizes, place: Place, first: bool, last: bool) -> np.ndarray:
    """[P, Q]: bytes that layers may take on each device, beside ends and activations."""

    def compute() -> np.ndarray:
        spec = problem.shard(place)
        ends = memory.end_weight_bytes(spec, first=first, last=last)
        return np.array(
            [
                [ends + _activations(problem, spec, sizes.batch, p, q, last) for q in sizes.decode]
                for p in sizes.prefill
            ],
            dtype=float,
        )

    key = ("taken", place.tensor_parallel, first, last, sizes)
    return np.asarray(place.memory_bytes - problem.once(key, compute))


def _activations(
    problem: Problem, spec: ModelSpec, batch: int, prefill: int, decode: int, last: bool
) -> int:
    return memory.activation_bytes(
        spec,
        last=last,
        cache_tokens=problem.cache_tokens(batch),
        prefill_micro_batch=prefill,
        prompt_tokens=problem.max_prompt_tokens,
        decode_micro_batch=decode,
    )


def layer_bytes(problem: Problem, batch: int, place: Place) -> np.ndarray:
    """[B]: what a layer takes on each device of a place, its cache included."""

    def compute() -> np.ndarray:
        spec = problem.shard(place)
        cache = memory.layer_cache_bytes(spec, batch, problem.cache_tokens(batch))
        weights = [memory.layer_weight_bytes(spec, p) for p in problem.precisions]
        return np.array(weights, dtype=float) + cache

    return problem.once(("bytes", batch, place.tensor_parallel), compute)


def unpacked_bytes(problem: Problem, place: Place) -> float:
    """What a stage with any packed layer takes besides."""
    key = ("unpacked", place.tensor_parallel)
    return problem.once(key, lambda: float(memory.unpacked_bytes(problem.shard(place))))


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


# Costs of tables are [P] in the prefill's arrays and [Q] in the decode's, of all pairs of `sizes`.


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
            seconds = (last, every - once, every, once, every)
            total += [_dot(*pair) for pair in zip(weights, seconds, strict=True)]
            total[3] -= _dot(some, last) if parts.rest else 0.0
        return tuple(total.tolist())

    return problem.once(("d", key, batch, size), compute)


def _dot(weight: np.ndarray, seconds: Seconds) -> float:
    return float((weight * seconds).sum())


# ---- what a choice costs


def objective(instance: Instance, choice: Choice) -> float:
    """Seconds of the instance (never above the exact time) + theta * summed sensitivity."""
    value = seconds(instance, count_options(instance, choice))
    return value + instance.theta * sum_omega(instance, choice)


def seconds(instance: Instance, counts: np.ndarray) -> float:
    """Seconds of a run where the stages hold `counts` [N, B] layers: see `costs.timeline`."""
    totals = stage_totals(instance, counts)
    return float(run_seconds(totals, instance.link, instance.overlap))


def stage_totals(instance: Instance, counts: np.ndarray) -> Costs:
    """[N]: what the stages' layers and all beside them cost."""

    def total(layer: np.ndarray, fixed: np.ndarray) -> np.ndarray:
        held = np.where(counts > 0, layer, 0.0)  # an unavailable option that no layer has is free
        return np.asarray((held * counts).sum(axis=1) + fixed)

    pairs = (
        (getattr(instance.layer, f.name), getattr(instance.fixed, f.name)) for f in fields(Costs)
    )
    return Costs(*(total(*pair) for pair in pairs))


def run_seconds(stage: Costs, link: Costs, overlap: Overlap) -> Any:
    """The longest of the schedule's chains, from costs [N, ...] of stages and links after them.

    Chains that `costs.timeline` has for stages, each linear in costs and maxima, so that the
    programmes of `counts` and `pool` hold the same rows. Never above the exact time.
    """
    once = (stage.prefill_once + link.prefill_once).sum(axis=0)
    step = (stage.step_last + link.step_last).sum(axis=0)
    loop = (stage.later_once + link.later_once).sum(axis=0)
    rest = np.maximum(stage.prefill_rest, link.prefill_rest).max(axis=0)
    after = overlap.after * stage.step_others
    slowest = np.maximum((stage.later_every + after).max(axis=0), link.later_every.max(axis=0))
    stay = stage.decode_every - stage.step_last
    waited = once + overlap.waits * rest + step
    chains = (
        once + rest + stage.prefill_tail[-1] + step + np.maximum(loop + after.max(axis=0), slowest),
        waited + loop + stage.step_others.max(axis=0),
        waited + stay.max(axis=0),
        _stays(stage, link, stay).max(axis=0),
    )
    return np.maximum.reduce(chains)


def _stays(stage: Costs, link: Costs, stay: np.ndarray) -> np.ndarray:
    """Down to a stage and on to the end, staying in prefill before and in decode after it.

    Shaped as the costs.
    """
    down = np.cumsum(stage.prefill_once + link.prefill_once, axis=0) - link.prefill_once
    up = np.cumsum((stage.step_last + link.step_last)[::-1], axis=0)[::-1]
    before = np.maximum.accumulate(stage.prefill_rest)
    after = np.maximum.accumulate(stay[::-1])[::-1]
    return np.asarray(down + before + up + after)


def sum_omega(instance: Instance, choice: Choice) -> float:
    """Summed sensitivity of a choice."""
    options = [option for stage in choice for option in stage]
    return math.fsum(instance.omega[np.arange(len(options)), options])


def fits(instance: Instance, choice: Choice) -> bool:
    """Every device has the memory for its layers, to the byte: `evaluate.shortages` agrees."""
    return bool((shortage(instance, count_options(instance, choice)) <= 0).all())


def shortage(instance: Instance, counts: np.ndarray) -> np.ndarray:
    """[N]: bytes short on each device of a place (negative: to spare)."""
    used = (counts * instance.layer_bytes).sum(axis=1)
    unpacked = instance.unpacked_bytes * (counts[:, instance.packed].sum(axis=1) > 0)
    return np.asarray(used + unpacked - instance.capacity)


def count_options(instance: Instance, choice: Choice) -> np.ndarray:
    """[N, B]: how many layers a stage holds at each option."""
    width = instance.num_options
    return np.stack([np.bincount(stage, minlength=width) for stage in choice])


def to_assignment(problem: Problem, setting: Setting, choice: Choice) -> Assignment:
    """A choice with its precisions' names."""
    stages = tuple(tuple(problem.precisions[o] for o in stage) for stage in choice)
    return Assignment(setting, stages)
