"""The planning problem as a value, and its arrays for one setting of order and batch sizes.

A `Setting` fixes everything but which device holds which layers at which precisions; an
`Assignment` fixes that too. An `Instance` is what the methods optimise over: per layer and device
seconds *summed over all batches of the workload*. Its objective lets one actor be the slowest for
all batches together, so it never exceeds the exact time of `evaluate` (a sum of maxima is at least
the maximum of sums), and equals it where the batches have the same bottleneck.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from llmpq.cluster import Cluster, Device
from llmpq.costs import links, memory
from llmpq.costs.latency import LayerTimes, Seconds
from llmpq.costs.quality import QualityModel
from llmpq.costs.timeline import Split, mean_past, split
from llmpq.model_spec import ModelSpec
from llmpq.workload import Workload, batches

T = TypeVar("T")
Lengths = tuple[tuple[int, int], ...]  # (prompt tokens, new tokens) of every request
Choice = tuple[tuple[int, ...], ...]  # for each stage, the option of each of its layers


@dataclass(frozen=True)
class Setting:
    """The order of the devices and the sizes of batch and micro-batches."""

    devices: tuple[Device, ...]
    batch: int
    prefill_micro_batch: int
    decode_micro_batch: int


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
    """Model, machines, work and costs. `budget`: largest summed sensitivity; `theta`: its price."""

    spec: ModelSpec
    cluster: Cluster
    workload: Workload
    lengths: Lengths
    times: Mapping[str, LayerTimes]  # by device type
    quality: QualityModel
    precisions: tuple[str, ...]
    budget: float = math.inf
    theta: float = 0.0
    _known: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`, kept for the next time the same is asked."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt."""
        return max(prompt for prompt, _ in self.lengths)

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


def actor(cost: Callable[[int], Seconds], parts: Split) -> tuple[Seconds, Seconds]:
    """(one micro-batch, all micro-batches of a batch) from the cost of a micro-batch's size."""
    once = cost(parts.size)
    rest = cost(parts.rest) if parts.rest else 0.0
    return once, once * parts.count + rest


def prefill_actor(
    group: BatchGroup, setting: Setting, cost: Callable[[int, Any], Seconds]
) -> tuple[Seconds, Seconds]:
    """Prefill of one micro-batch and of all, for each of a group's batches."""
    parts = split(group.num_requests, setting.prefill_micro_batch)
    return actor(lambda size: cost(size, group.prompt_tokens), parts)


def decode_actor(
    group: BatchGroup, setting: Setting, cost: Callable[[int, Any], Seconds]
) -> tuple[Seconds, Seconds]:
    """One decode step of one micro-batch and of all, for each of a group's batches."""
    parts = split(group.num_requests, setting.decode_micro_batch)
    return actor(lambda size: cost(size, group.past_tokens), parts)


def fixed_prefill(times: LayerTimes, first: bool, last: bool) -> Callable[[int, Any], Seconds]:
    """What a stage's prefill costs beside its layers: the call, the embedding, the head."""

    def cost(size: int, tokens: Any) -> Seconds:
        seconds = times.stage_prefill_s(size, tokens)
        seconds = seconds + (times.embedding_s(size, tokens) if first else 0.0)
        return seconds + (times.head_s(size) if last else 0.0)

    return cost


def fixed_decode(times: LayerTimes, first: bool, last: bool) -> Callable[[int, Any], Seconds]:
    """What a stage's decode step costs beside its layers: one token a request is embedded."""

    def cost(size: int, past: Any) -> Seconds:
        seconds = times.stage_decode_s(size, past)
        seconds = seconds + (times.embedding_s(size, 1) if first else 0.0)
        return seconds + (times.head_s(size) if last else 0.0)

    return cost


LinkCost = Callable[[int, Any], Seconds]


def prefill_links(problem: Problem, devices: Sequence[Device]) -> list[LinkCost]:
    """Hand-overs of the prefill."""
    return [_prefill_link(problem, a, b) for a, b in zip(devices, devices[1:], strict=False)]


def decode_links(problem: Problem, devices: Sequence[Device]) -> list[LinkCost]:
    """Hand-overs of a decode step, and the tokens' way back to the first stage."""
    if len(devices) == 1:
        return []
    down = [_decode_link(problem, a, b) for a, b in zip(devices, devices[1:], strict=False)]
    ends = devices[-1].node, devices[0].node
    return [*down, lambda size, past: links.tokens_back_s(problem.cluster, *ends, size) + 0 * past]


def _prefill_link(problem: Problem, a: Device, b: Device) -> LinkCost:
    return lambda size, tokens: links.prefill_s(
        problem.cluster, a.node, b.node, problem.spec, size, tokens
    )


def _decode_link(problem: Problem, a: Device, b: Device) -> LinkCost:
    return lambda size, past: (
        links.decode_s(problem.cluster, a.node, b.node, problem.spec, size) + 0 * past
    )


# ---- the arrays of one setting


@dataclass(frozen=True)
class Costs:
    """Seconds over the whole workload: `once` a batch's first micro-batch, the others with it.

    `prefill_rest`: all micro-batches but the first; `decode_every`: all, and all steps.
    """

    prefill_once: np.ndarray
    prefill_rest: np.ndarray
    decode_once: np.ndarray
    decode_every: np.ndarray


@dataclass(frozen=True)
class Instance:
    """N devices in order, L layers, B options. Unavailable options cost infinity."""

    layer: Costs  # [N, B]: of one layer
    fixed: Costs  # [N]: of a stage beside its layers
    link: Costs  # scalars: sums of `once`, maxima of the others
    layer_bytes: np.ndarray  # [B], the cache of one layer included
    capacity: np.ndarray  # [N], what layers may take
    unpacked_bytes: float  # taken by a device that holds any packed option
    packed: np.ndarray  # [B], booleans
    omega: np.ndarray  # [L, B]
    budget: float = math.inf
    theta: float = 0.0

    @property
    def num_layers(self) -> int:
        """L."""
        return self.omega.shape[0]

    @property
    def num_devices(self) -> int:
        """N."""
        return self.capacity.shape[0]

    @property
    def num_options(self) -> int:
        """B."""
        return self.layer_bytes.shape[0]

    @property
    def available(self) -> np.ndarray:
        """[N, B]: which options a device offers."""
        return np.isfinite(self.layer.prefill_once) & np.isfinite(self.layer.decode_once)

    @property
    def busy(self) -> np.ndarray:
        """[N, B]: seconds that one layer keeps a device busy over the whole workload."""
        return self.layer.prefill_once + self.layer.prefill_rest + self.layer.decode_every

    @property
    def fixed_busy(self) -> np.ndarray:
        """[N]: the same of what a stage does beside its layers."""
        return self.fixed.prefill_once + self.fixed.prefill_rest + self.fixed.decode_every


def make_instance(problem: Problem, setting: Setting) -> Instance:
    """The arrays of one setting."""
    devices = setting.devices
    last = len(devices) - 1
    fixed = [_fixed(problem, setting, d, j == 0, j == last) for j, d in enumerate(devices)]
    layer = [_layer(problem, setting, device.type) for device in devices]
    return Instance(
        layer=_stack(layer),
        fixed=_stack(fixed),
        link=_link(problem, setting),
        layer_bytes=problem.once(
            ("bytes", setting.batch), lambda: _layer_bytes(problem, setting.batch)
        ),
        capacity=np.array([layer_capacity(problem, setting, j) for j in range(len(devices))]),
        unpacked_bytes=float(memory.unpacked_bytes(problem.spec)),
        packed=np.array([memory.is_packed(p) for p in problem.precisions]),
        omega=problem.once("omega", lambda: _omega(problem)),
        budget=problem.budget,
        theta=problem.theta,
    )


def layer_capacity(problem: Problem, setting: Setting, rank: int) -> float:
    """Bytes that layers may take on a device, beside embedding, head and activations."""
    first, last = rank == 0, rank == len(setting.devices) - 1
    key = ("taken", first, last, *_sizes(setting))
    taken = problem.once(key, lambda: _taken(problem, setting, first, last))
    return float(setting.devices[rank].memory_bytes - taken)


def _sizes(setting: Setting) -> tuple[int, int, int]:
    return setting.batch, setting.prefill_micro_batch, setting.decode_micro_batch


def _taken(problem: Problem, setting: Setting, first: bool, last: bool) -> int:
    ends = memory.end_weight_bytes(problem.spec, first=first, last=last)
    return ends + memory.activation_bytes(
        problem.spec,
        last=last,
        cache_tokens=problem.cache_tokens(setting.batch),
        prefill_micro_batch=setting.prefill_micro_batch,
        prompt_tokens=problem.max_prompt_tokens,
        decode_micro_batch=setting.decode_micro_batch,
    )


def _layer_bytes(problem: Problem, batch: int) -> np.ndarray:
    cache = memory.layer_cache_bytes(problem.spec, batch, problem.cache_tokens(batch))
    weights = [memory.layer_weight_bytes(problem.spec, p) for p in problem.precisions]
    return np.array(weights, dtype=float) + cache


def _omega(problem: Problem) -> np.ndarray:
    return np.array([problem.quality.omega[p] for p in problem.precisions], dtype=float).T


def _layer(problem: Problem, setting: Setting, device_type: str) -> Costs:
    """[B]: one layer at each precision."""
    key = ("layer", device_type, *_sizes(setting))
    return problem.once(key, lambda: _new_layer(problem, setting, device_type))


def _new_layer(problem: Problem, setting: Setting, device_type: str) -> Costs:
    times = problem.times[device_type]

    def one(name: str) -> Costs:
        if name not in times.precisions:
            return Costs(*(np.array(math.inf),) * 4)
        return _summed(
            problem,
            setting,
            (device_type, name),
            lambda size, tokens: times.prefill_s(name, size, tokens),
            lambda size, past: times.decode_s(name, size, past),
        )

    return _stack([one(name) for name in problem.precisions])


def _fixed(problem: Problem, setting: Setting, device: Device, first: bool, last: bool) -> Costs:
    times = problem.times[device.type]
    key = (device.type, first, last)
    costs = fixed_prefill(times, first, last), fixed_decode(times, first, last)
    whole = ("fixed", *key, *_sizes(setting))
    return problem.once(whole, lambda: _summed(problem, setting, key, *costs))


def _link(problem: Problem, setting: Setting) -> Costs:
    nodes = tuple(device.node for device in setting.devices)
    key = ("links", nodes, *_sizes(setting))
    return problem.once(key, lambda: _new_link(problem, setting, nodes))


def _new_link(problem: Problem, setting: Setting, nodes: tuple[str, ...]) -> Costs:
    """Sums of `once`, maxima of the others; the pairs of nodes are what counts."""
    down = [
        _prefill_sum(problem, setting, ("link", *nodes[j : j + 2]), cost)
        for j, cost in enumerate(prefill_links(problem, setting.devices))
    ]
    loop = [
        _decode_sum(problem, setting, ("link", *nodes[j : j + 2], nodes[0]), cost)
        for j, cost in enumerate(decode_links(problem, setting.devices))
    ]
    return Costs(
        np.array(sum(once for once, _ in down)),
        np.array(max((rest for _, rest in down), default=0.0)),
        np.array(sum(once for once, _ in loop)),
        np.array(max((every for _, every in loop), default=0.0)),
    )


def _summed(
    problem: Problem, setting: Setting, key: Hashable, prefill: LinkCost, decode: LinkCost
) -> Costs:
    first = _prefill_sum(problem, setting, key, prefill)
    return Costs(*map(np.array, (*first, *_decode_sum(problem, setting, key, decode))))


def _prefill_sum(
    problem: Problem, setting: Setting, key: Hashable, cost: LinkCost
) -> tuple[float, float]:
    """(first micro-batches, all others) over all batches."""

    def compute() -> tuple[float, float]:
        total = np.zeros(2)
        for group in problem.groups(setting.batch):
            once, every = prefill_actor(group, setting, cost)
            total += [_dot(group.num_batches, once), _dot(group.num_batches, every - once)]
        return float(total[0]), float(total[1])

    return problem.once(("p", key, setting.batch, setting.prefill_micro_batch), compute)


def _decode_sum(
    problem: Problem, setting: Setting, key: Hashable, cost: LinkCost
) -> tuple[float, float]:
    """(one micro-batch, all) over all batches and steps."""

    def compute() -> tuple[float, float]:
        total = np.zeros(2)
        for group in problem.groups(setting.batch):
            once, every = decode_actor(group, setting, cost)
            weight = group.num_batches * group.num_steps
            total += [_dot(weight, once), _dot(weight, every)]
        return float(total[0]), float(total[1])

    return problem.once(("d", key, setting.batch, setting.decode_micro_batch), compute)


def _dot(weight: np.ndarray, seconds: Seconds) -> float:
    return float((weight * seconds).sum())


def _stack(costs: Sequence[Costs]) -> Costs:
    return Costs(
        np.stack([c.prefill_once for c in costs]),
        np.stack([c.prefill_rest for c in costs]),
        np.stack([c.decode_once for c in costs]),
        np.stack([c.decode_every for c in costs]),
    )


# ---- the value of a choice


def objective(instance: Instance, choice: Choice) -> float:
    """Seconds of the instance (never above the exact time) + theta * summed sensitivity."""
    counts = count_options(instance, choice)
    prefill_once = _stage_sum(instance.layer.prefill_once, counts, instance.fixed.prefill_once)
    prefill_rest = _stage_sum(instance.layer.prefill_rest, counts, instance.fixed.prefill_rest)
    decode_once = _stage_sum(instance.layer.decode_once, counts, instance.fixed.decode_once)
    decode_every = _stage_sum(instance.layer.decode_every, counts, instance.fixed.decode_every)
    link = instance.link
    seconds = prefill_once.sum() + link.prefill_once + max(prefill_rest.max(), link.prefill_rest)
    loop = decode_once.sum() + link.decode_once
    seconds += max(loop, decode_every.max(), link.decode_every)
    return float(seconds) + instance.theta * sum_omega(instance, choice)


def sum_omega(instance: Instance, choice: Choice) -> float:
    """Summed sensitivity of a choice."""
    options = [option for stage in choice for option in stage]
    return math.fsum(instance.omega[np.arange(len(options)), options])


def fits(instance: Instance, choice: Choice) -> bool:
    """Every device has the memory for its layers, to the byte: `evaluate.shortages` agrees."""
    counts = count_options(instance, choice)
    used = counts @ instance.layer_bytes
    used += instance.unpacked_bytes * (counts[:, instance.packed].sum(axis=1) > 0)
    return bool((used <= instance.capacity).all())


def count_options(instance: Instance, choice: Choice) -> np.ndarray:
    """[N, B]: how many layers a device holds at each option."""
    width = instance.num_options
    return np.stack([np.bincount(stage, minlength=width) for stage in choice])


def _stage_sum(seconds: np.ndarray, counts: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    held = np.where(counts > 0, seconds, 0.0)  # an unavailable option that no layer has is free
    return (held * counts).sum(axis=1) + fixed


def to_assignment(problem: Problem, setting: Setting, choice: Choice) -> Assignment:
    """A choice with its precisions' names."""
    stages = tuple(tuple(problem.precisions[o] for o in stage) for stage in choice)
    return Assignment(setting, stages)
