"""What a choice of layers costs at one instance, and whether it fits.

A `Choice` gives every stage's layers their options. Its seconds are those of `costs.timeline`; the
ILP of `counts` and the LP of `pool_bounds` hold the same chains as rows.

Not covered: the simulated run (`simulated`).
"""

import math
from dataclasses import fields

import numpy as np

from llmpq.costs.timeline import Costs, run_s
from llmpq.planner.instance import Instance
from llmpq.planner.layer_options import options_of
from llmpq.planner.problem import Assignment, Configuration, Problem

Choice = tuple[tuple[int, ...], ...]  # for each stage, the option of each of its layers


def objective(instance: Instance, choice: Choice) -> float:
    """Seconds of the instance + theta * summed sensitivity."""
    value = seconds(instance, count_options(instance, choice))
    return value + instance.theta * sum_omega(instance, choice)


def seconds(instance: Instance, counts: np.ndarray) -> float:
    """Seconds of a run where the stages hold `counts` [N, B] layers: see `costs.timeline`."""
    totals = stage_totals(instance, counts)
    return float(run_s(totals, instance.link))


def stage_totals(instance: Instance, counts: np.ndarray) -> Costs:
    """[N]: what the stages' layers and all beside them cost."""

    def total(layer: np.ndarray, fixed: np.ndarray) -> np.ndarray:
        held = np.where(counts > 0, layer, 0.0)  # an unavailable option that no layer has is free
        return np.asarray((held * counts).sum(axis=1) + fixed)

    pairs = (
        (getattr(instance.layer, f.name), getattr(instance.fixed, f.name)) for f in fields(Costs)
    )
    return Costs(*(total(*pair) for pair in pairs))


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
    """[N]: bytes short on each device of a stage (negative: to spare)."""
    used = (counts * instance.layer_bytes).sum(axis=1)
    unpacked = instance.unpacked_bytes * (counts[:, instance.packed].sum(axis=1) > 0)
    return np.asarray(used + unpacked - instance.capacity)


def count_options(instance: Instance, choice: Choice) -> np.ndarray:
    """[N, B]: how many layers a stage holds at each option."""
    width = instance.num_options
    return np.stack([np.bincount(stage, minlength=width) for stage in choice])


def to_assignment(problem: Problem, configuration: Configuration, choice: Choice) -> Assignment:
    """A choice with its precisions' names."""
    options = options_of(problem)
    stages = tuple(tuple(options[o].precision for o in stage) for stage in choice)
    return Assignment(configuration, stages)
