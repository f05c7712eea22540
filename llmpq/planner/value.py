"""What a choice of layers costs at one instance, and whether it fits.

A `Choice` gives every stage's layers their options. Its seconds are the longest of a schedule's
chains, with the times of all batches summed first, so that one actor is the slowest for all of
them. That never exceeds the exact time of `evaluate` (a sum of maxima is at least the maximum of
sums), and equals it where the batches have the same bottleneck. The linear programmes of `counts`
and `pool` hold the same chains as rows.

Not covered: exact times, batch by batch; those are `evaluate`'s.
"""

import math
from dataclasses import fields
from typing import Any

import numpy as np

from llmpq.planner.instance import Costs, Instance, Overlap
from llmpq.planner.problem import Assignment, Problem, Setting

Choice = tuple[tuple[int, ...], ...]  # for each stage, the option of each of its layers


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
    """Every device has the memory for its layers, unpacking at the precision that takes most.

    A plan that fits so fits by `evaluate.shortages`, which looks at its own precisions alone.
    """
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
