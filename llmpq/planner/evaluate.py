"""The one price of a plan: every method's plans, and hand-written ones, are compared by it.

Exact for each batch of the workload (see `costs.timeline`), the smaller last micro-batch and the
smaller last batch included. Also turns assignments into plans and plans into assignments.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from llmpq.artifact import Provenance
from llmpq.cluster import Cluster, Device
from llmpq.costs.latency import Seconds
from llmpq.costs.memory import StageMemory, stage_memory
from llmpq.costs.timeline import decode_step_s, prefill_s
from llmpq.plan import Plan, Predicted, PredictedStage, Stage
from llmpq.planner.problem import (
    Assignment,
    BatchGroup,
    Problem,
    Setting,
    decode_actor,
    decode_links,
    fixed_decode,
    fixed_prefill,
    prefill_actor,
    prefill_links,
)

Actor = Callable[[int, Any], Seconds]


def evaluate(problem: Problem, assignment: Assignment) -> Predicted:
    """Times, memory and quality of an assignment; no lower bound is known here."""
    prefill = decode = 0.0
    groups = problem.groups(assignment.setting.batch)
    for group in groups:
        prefill += _prefill(problem, assignment, group)
        decode += _decode(problem, assignment, group)
    omega = problem.quality.sum_omega(assignment.precisions)
    total = prefill + decode
    return Predicted(
        total_s=total,
        prefill_s=prefill,
        decode_s=decode,
        tokens_per_s=problem.num_new_tokens / total,
        quality_loss_percent=problem.quality.percent(omega),
        sum_sensitivity=omega,
        objective=total + problem.theta * omega,
        lower_bound=0.0,
        gap=1.0,
        planning_s=0.0,
        stages=[_stage(problem, assignment, rank) for rank in range(len(assignment.stages))],
    )


def bounded(predicted: Predicted, lower_bound: float, planning_s: float) -> Predicted:
    """The same prediction with a lower bound of its objective."""
    bound = min(max(lower_bound, 0.0), predicted.objective)
    gap = (predicted.objective - bound) / predicted.objective
    return predicted.model_copy(update={"lower_bound": bound, "gap": gap, "planning_s": planning_s})


def memory_of(problem: Problem, assignment: Assignment, rank: int) -> StageMemory:
    """Memory of one stage."""
    setting = assignment.setting
    return stage_memory(
        problem.spec,
        assignment.stages[rank],
        first=rank == 0,
        last=rank == len(assignment.stages) - 1,
        batch=setting.batch,
        cache_tokens=problem.cache_tokens(setting.batch),
        prefill_micro_batch=setting.prefill_micro_batch,
        prompt_tokens=problem.max_prompt_tokens,
        decode_micro_batch=setting.decode_micro_batch,
    )


def shortages(problem: Problem, assignment: Assignment) -> dict[int, int]:
    """Bytes that are short, by rank, where a stage does not fit."""
    short = {
        rank: memory_of(problem, assignment, rank).total - device.memory_bytes
        for rank, device in enumerate(assignment.setting.devices)
    }
    return {rank: num_bytes for rank, num_bytes in short.items() if num_bytes > 0}


def to_plan(problem: Problem, assignment: Assignment, method: str, predicted: Predicted) -> Plan:
    """The plan file's value."""
    setting = assignment.setting
    return Plan(
        model=problem.spec,
        workload=problem.workload,
        cluster=problem.cluster,
        method=method,
        batch=setting.batch,
        prefill_micro_batch=setting.prefill_micro_batch,
        decode_micro_batch=setting.decode_micro_batch,
        stages=_stages(assignment),
        predicted=predicted,
        provenance=Provenance.here(),
    )


def to_assignment(plan: Plan, cluster: Cluster) -> Assignment:
    """A plan's assignment on a cluster that has its devices."""
    free = cluster.devices()
    devices = [_take(free, stage.node, stage.devices[0]) for stage in plan.stages]
    setting = Setting(tuple(devices), plan.batch, plan.prefill_micro_batch, plan.decode_micro_batch)
    return Assignment(setting, tuple(tuple(stage.precisions) for stage in plan.stages))


def _take(free: list[Device], node: str, device_type: str) -> Device:
    found = next(d for d in free if (d.node, d.type) == (node, device_type))
    free.remove(found)
    return found


def _stages(assignment: Assignment) -> list[Stage]:
    stages, start = [], 0
    for rank, precisions in enumerate(assignment.stages):
        device = assignment.setting.devices[rank]
        end = start + len(precisions)
        stages.append(
            Stage(
                rank=rank,
                node=device.node,
                devices=[device.type],
                first_layer=start,
                end_layer=end,
                precisions=list(precisions),
            )
        )
        start = end
    return stages


def _prefill(problem: Problem, assignment: Assignment, group: BatchGroup) -> float:
    costs = [stage_prefill(problem, assignment, r) for r in range(len(assignment.stages))]
    costs += prefill_links(problem, assignment.setting.devices)
    pairs = [prefill_actor(group, assignment.setting, cost) for cost in costs]
    seconds = prefill_s(*_arrays(pairs, group))
    return float((group.num_batches * seconds).sum())


def _decode(problem: Problem, assignment: Assignment, group: BatchGroup) -> float:
    costs = [stage_decode(problem, assignment, r) for r in range(len(assignment.stages))]
    costs += decode_links(problem, assignment.setting.devices)
    pairs = [decode_actor(group, assignment.setting, cost) for cost in costs]
    seconds = decode_step_s(*_arrays(pairs, group)) * group.num_steps
    return float((group.num_batches * seconds).sum())


def _arrays(
    pairs: list[tuple[Seconds, Seconds]], group: BatchGroup
) -> tuple[np.ndarray, np.ndarray]:
    """`once` and `every`, [actors, batches]."""
    shape = group.prompt_tokens.shape
    once, every = (np.stack([np.broadcast_to(p[i], shape) for p in pairs]) for i in (0, 1))
    return once, every


def stage_prefill(problem: Problem, assignment: Assignment, rank: int) -> Actor:
    """Prefill seconds of a stage by micro-batch and prompt tokens."""
    last = rank == len(assignment.stages) - 1
    times = problem.times[assignment.setting.devices[rank].type]
    fixed = fixed_prefill(times, rank == 0, last)
    counts = _counts(assignment.stages[rank])
    return lambda size, tokens: (
        fixed(size, tokens) + sum(n * times.prefill_s(p, size, tokens) for p, n in counts.items())
    )


def stage_decode(problem: Problem, assignment: Assignment, rank: int) -> Actor:
    """Decode seconds of a stage by micro-batch and past tokens."""
    last = rank == len(assignment.stages) - 1
    times = problem.times[assignment.setting.devices[rank].type]
    fixed = fixed_decode(times, rank == 0, last)
    counts = _counts(assignment.stages[rank])
    return lambda size, past: (
        fixed(size, past) + sum(n * times.decode_s(p, size, past) for p, n in counts.items())
    )


def _counts(precisions: tuple[str, ...]) -> dict[str, int]:
    return {p: precisions.count(p) for p in dict.fromkeys(precisions)}


def _stage(problem: Problem, assignment: Assignment, rank: int) -> PredictedStage:
    """One micro-batch's times, the mean over the batches."""
    setting = assignment.setting
    prefill, decode, count = 0.0, 0.0, 0
    for group in problem.groups(setting.batch):
        p, _ = prefill_actor(group, setting, stage_prefill(problem, assignment, rank))
        d, _ = decode_actor(group, setting, stage_decode(problem, assignment, rank))
        prefill += float((group.num_batches * p).sum())
        decode += float((group.num_batches * d).sum())
        count += int(group.num_batches.sum())
    device = setting.devices[rank]
    return PredictedStage(
        prefill_s=prefill / count,
        decode_step_s=decode / count,
        peak_memory_bytes=memory_of(problem, assignment, rank).total,
        memory_capacity_bytes=device.memory_bytes,
        provenance=problem.times[device.type].provenance,
    )
