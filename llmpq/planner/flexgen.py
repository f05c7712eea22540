"""flexgen: the best single device, with weights and cache partly kept in its host's memory.

The other methods need the model to fit the devices; this one streams what does not fit over the
link to the host, layer by layer, as FlexGen does (see `costs.offload`). All layers have the same
precision, one that keeps the quality budget. Every device type, precision, number of requests in
flight and micro-batch (the same in both phases) is tried, with the shares of weights and cache
that stay on the device, in steps of 2.5 %. The least total + theta * omega counts.

Requests in flight are those that the other methods try, though a host could hold more: pin `batch`
in the workload to compare at larger ones. Not covered: several devices, and what `costs.offload`
leaves out. The runtime cannot run such a plan, so there is no plan file.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from llmpq.cluster import DEFAULT_LINK_GBS, MIB, Device
from llmpq.costs import memory
from llmpq.costs.links import Tokens
from llmpq.costs.offload import OffloadMemory, layer_s, offload_memory, shares
from llmpq.job import LaneShape
from llmpq.planner.layer_options import LayerOption, lacking, options_from
from llmpq.planner.problem import OVER, Problem
from llmpq.planner.sizes import batch_options, micro_batch_options
from llmpq.planner.waves import BatchGroup, groups, seconds_of_all
from llmpq.planner.works import fixed_work, layer_work


@dataclass(frozen=True)
class OffloadPlan:
    """What one device does with the whole workload.

    Shares are those on the device. Where nothing fits, `why_not` says what is short of the smallest
    that was tried, times are infinite and the bytes are those that it would need. `prefill_s`:
    until the first token of every request is there, `decode_s`: from then on, of the last block.
    """

    device_type: str
    node: str
    precision: str
    batch: int
    micro_batch: int
    weights_share: float
    cache_share: float
    host_bytes: int
    device_bytes: int
    prefill_s: float
    decode_s: float
    total_s: float
    tokens_per_s: float
    quality_loss_percent: float
    objective: float
    why_not: str = ""

    @property
    def feasible(self) -> bool:
        """It fits."""
        return not self.why_not


@dataclass(frozen=True)
class _Block:
    """Everything but the shares."""

    device: Device
    precision: str
    batch: int
    micro_batch: int


def flexgen(problem: Problem) -> OffloadPlan | None:
    """The best plan of a single device; None: no precision keeps the quality budget."""
    best: OffloadPlan | None = None
    for block in _blocks(problem):
        if best is not None and _least_objective(problem, block) >= best.objective:
            continue
        plan = offload_plan(problem, block.device, block.precision, block.batch, block.micro_batch)
        if best is None or _rank(plan) < _rank(best):
            best = plan
    return best


def offload_plan(
    problem: Problem, device: Device, precision: str, batch: int, micro_batch: int
) -> OffloadPlan:
    """The best shares of one block of requests on one device."""
    block = _Block(device, precision, batch, micro_batch)
    held = _memory(problem, block)
    weights_share, cache_share = shares(held, device.memory_bytes)
    if not len(weights_share):
        return _too_large(problem, block, held)
    total_s, decode_s = _seconds(problem, block, weights_share, cache_share)
    best = int(total_s.argmin())
    plan = _plan(problem, block, held, float(weights_share[best]), float(cache_share[best]))
    total, decode = float(total_s[best]), float(decode_s[best])
    return replace(
        plan,
        prefill_s=total - decode,
        decode_s=decode,
        total_s=total,
        tokens_per_s=problem.num_new_tokens / total,
        objective=total + problem.theta * _omega(problem, precision),
    )


def host_link_bytes_per_s(problem: Problem, device: Device) -> float:
    """Between a device and its host's memory; of a rehearsed type, the link of its node."""
    if device.type in problem.cluster.rehearse:
        return problem.cluster.link_between(device.node, device.node).bandwidth_gbs * 1e9
    sheet = problem.cluster.figures_of(device.type)
    return (DEFAULT_LINK_GBS if sheet is None else sheet.link_gbs) * 1e9


# ---- what is tried


def _blocks(problem: Problem) -> Iterator[_Block]:
    kinds = {(d.type, d.memory_bytes): d for d in reversed(problem.cluster.devices())}
    for device in reversed(kinds.values()):
        times, layers = problem.times[device.type], problem.spec.num_layers
        for precision in problem.precisions:
            if lacking(times, problem.spec, 0, [precision] * layers):
                continue
            if _omega(problem, precision) <= problem.budget * OVER:
                for batch in reversed(batch_options(problem)):  # the best one is large, mostly
                    for micro_batch in reversed(micro_batch_options(batch)):
                        yield _Block(device, precision, batch, micro_batch)


def _omega(problem: Problem, precision: str) -> float:
    return problem.quality.sum_omega([precision] * problem.spec.num_layers)


def _memory(problem: Problem, block: _Block) -> OffloadMemory:
    return offload_memory(
        problem.spec,
        block.precision,
        batch=block.batch,
        micro_batch=block.micro_batch,
        cache_tokens=problem.max_tokens,
        prompt_tokens=problem.max_prompt_tokens,
        machine=problem.times[block.device.type].machine,
    )


def _rank(plan: OffloadPlan) -> tuple[float, float]:
    """Smaller is better: the objective; where nothing fits, the bytes needed."""
    return plan.objective, plan.device_bytes if plan.why_not else 0.0


# ---- what it takes


def _seconds(
    problem: Problem,
    block: _Block,
    weights_share: np.ndarray,
    cache_share: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """[K] each: of all requests, and of the last block's decode steps, by the shares [K]."""
    missing = 1 - np.stack([weights_share, cache_share])[..., None]
    total, last = np.zeros(len(weights_share)), np.zeros(len(weights_share))
    for group in groups(problem, block.batch):
        total += _prefill_s(problem, block, group, missing) @ group.num_batches
        decode = _step_s(problem, block, group, missing) * group.num_steps
        total += decode @ group.num_batches
        last = decode[:, -1]
    return total, last


def _least_objective(problem: Problem, block: _Block) -> float:
    """If all weights and the cache had room on the device."""
    total_s, _ = _seconds(problem, block, np.ones(1), np.ones(1))
    return float(total_s[0]) + problem.theta * _omega(problem, block.precision)


def _prefill_s(
    problem: Problem, block: _Block, group: BatchGroup, missing: np.ndarray
) -> np.ndarray:
    """[K, batches]: what is `missing` of a layer's weights comes, of its cache goes (shares)."""
    times = problem.times[block.device.type]
    tokens, size = group.prompt_tokens, block.micro_batch
    total = seconds_of_all(fixed_work(times, True, True).prefill, group, size, tokens)
    for option, number in _layers(problem, block).items():
        compute = seconds_of_all(layer_work(times, option).prefill, group, size, tokens)
        streamed = missing[0] * _weight_bytes(problem, block, option)
        stored = missing[1] * _cache_bytes(problem, group, option, tokens)
        each = layer_s(compute, streamed, stored, host_link_bytes_per_s(problem, block.device))
        total = total + number * each
    return np.asarray(total)


def _step_s(problem: Problem, block: _Block, group: BatchGroup, missing: np.ndarray) -> np.ndarray:
    """[K, batches]: one step; `missing` shares of the past come, those of the new token go."""
    times = problem.times[block.device.type]
    past, size = group.past_tokens, block.micro_batch
    total = seconds_of_all(fixed_work(times, True, True).decode, group, size, past)
    for option, number in _layers(problem, block).items():
        compute = seconds_of_all(layer_work(times, option).decode, group, size, past)
        cache, new = (_cache_bytes(problem, group, option, n) for n in (past, 1))
        loaded = missing[0] * _weight_bytes(problem, block, option) + missing[1] * cache
        each = layer_s(
            compute, loaded, missing[1] * new, host_link_bytes_per_s(problem, block.device)
        )
        total = total + number * each
    return np.asarray(total)


def _layers(problem: Problem, block: _Block) -> dict[LayerOption, int]:
    """How many layers have each option."""
    return options_from(problem, 0, (block.precision,) * problem.spec.num_layers)


def _weight_bytes(problem: Problem, block: _Block, option: LayerOption) -> int:
    """Of one layer."""
    machine = problem.times[block.device.type].machine
    kind = problem.spec.kind_specs[option.kind]
    return memory.layer_weight_bytes(kind, option.precision, machine)


def _cache_bytes(
    problem: Problem, group: BatchGroup, option: LayerOption, tokens: Tokens
) -> Tokens:
    """One layer's cache of so many tokens of every request, of which it keeps a window."""
    kind = problem.spec.kind_specs[option.kind]
    kept = tokens if kind.window is None else np.minimum(tokens, kind.window)
    return memory.layer_cache_bytes(kind, [LaneShape(group.num_requests, 1)]) * kept


# ---- what came of it


def _plan(
    problem: Problem, block: _Block, held: OffloadMemory, weights_share: float, cache_share: float
) -> OffloadPlan:
    """A plan without its times."""
    return OffloadPlan(
        device_type=block.device.type,
        node=block.device.node,
        precision=block.precision,
        batch=block.batch,
        micro_batch=block.micro_batch,
        weights_share=weights_share,
        cache_share=cache_share,
        host_bytes=round(held.host_bytes(weights_share, cache_share)),
        device_bytes=round(held.device_bytes(weights_share, cache_share)),
        prefill_s=math.inf,
        decode_s=math.inf,
        total_s=math.inf,
        tokens_per_s=0.0,
        quality_loss_percent=problem.quality.expected_percent(_omega(problem, block.precision)),
        objective=math.inf,
    )


def _too_large(problem: Problem, block: _Block, held: OffloadMemory) -> OffloadPlan:
    plan = _plan(problem, block, held, 0.0, 0.0)
    short = (plan.device_bytes - block.device.memory_bytes) / MIB
    why = (
        f"{short:.2f} MiB short on {block.device.type} for embedding, head, two layers' weights at "
        f"precision {block.precision} and one micro-batch of {block.micro_batch}"
    )
    return replace(plan, why_not=why)
