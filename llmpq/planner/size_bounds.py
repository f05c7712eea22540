"""A bound of the run of a batch that needs no count of its jobs: a request's tokens follow one
another.

Of a batch of B requests in flight, some slot computes at least a B-th of all decode steps one after
another, and each of them passes every layer. In closed form (`costs.timeline`) some of these rounds
are hidden behind prefill jobs, which pass every layer too. So a run takes as many rounds as it has
tokens for a slot, times what all layers take at least for a job of one row. Small batches are far
above the best plan by it, and need not be looked at.

What layers take at least: each at its fastest option, on the fastest devices that have room for it.
Times of jobs are looked at for the rows of all micro-batches, and taken to be at least
`LEAST_SHARE` of the least of these for what lies between, as times that were measured need not rise
with every row.

Not covered: how devices share the work, which limits large batches.
"""

import math
from collections.abc import Sequence

import numpy as np

from llmpq.costs import memory
from llmpq.planner.layer_options import LayerOption, offers, options_of
from llmpq.planner.layouts import DeviceSubset
from llmpq.planner.problem import OVER, Problem, StageDevices
from llmpq.planner.sizes import batch_options, micro_batch_options
from llmpq.planner.works import layer_work

LEAST_SHARE = 0.9


def least_round_s(problem: Problem, subsets: Sequence[DeviceSubset]) -> float:
    """Seconds that a job takes all layers at least, on any of the subsets of devices."""
    most: dict[StageDevices, int] = {}
    for subset in subsets:
        for devices, count in subset:
            most[devices] = max(count, most.get(devices, 0))
    kinds = problem.spec.kind_of_layers
    return LEAST_SHARE * sum(
        _least_of_kind(problem, kind, kinds.count(kind), most) for kind in set(kinds)
    )


def least_run_s(problem: Problem, batch: int, round_s: float) -> float:
    """Seconds that no run with so many requests in flight is below, to no scale."""
    rounds = problem.num_decoded_tokens / batch
    return rounds * round_s if rounds else 0.0


def _least_of_kind(problem: Problem, kind: int, count: int, most: dict[StageDevices, int]) -> float:
    """Seconds of `count` layers of a kind, on the fastest devices that have room for them."""
    options = [option for option in options_of(problem) if option.kind == kind]
    each = sorted(
        (_layer_s(problem, devices, options), _held(problem, devices, options) * many)
        for devices, many in most.items()
    )
    seconds, left = 0.0, count
    for layer_s, held in each:
        if not left or math.isinf(layer_s):
            break
        taken = min(left, held)
        seconds, left = seconds + taken * layer_s, left - taken
    return math.inf if left else seconds


def _layer_s(problem: Problem, devices: StageDevices, options: Sequence[LayerOption]) -> float:
    """Seconds of the quickest job at the fastest option."""
    times = problem.times_at(devices)
    past = np.array([min(prompt for prompt, _ in problem.lengths), problem.max_tokens], dtype=float)
    rows = micro_batch_options(max(batch_options(problem)))
    works = [layer_work(times, option) for option in options if offers(times, option)]
    jobs = [float(work.prefill(1, 1.0)) for work in works]
    jobs += [float(np.min(work.decode(number, past))) for work in works for number in rows]
    return min(jobs, default=math.inf)


def _held(problem: Problem, devices: StageDevices, options: Sequence[LayerOption]) -> int:
    """The most layers that a stage has room for."""
    machine = problem.times[devices.type].machine
    spec = problem.shard(devices)
    least = min(
        memory.layer_weight_bytes(spec.kind_specs[option.kind], option.precision, machine)
        for option in options
    )
    return int(devices.memory_bytes * OVER // least)
