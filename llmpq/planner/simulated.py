"""A plan played event by event, with the same times that price it in closed form.

Every batch of the workload, the smaller last ones included, with caches that grow step by step.
Slow for long workloads: a batch takes (micro-batches x steps x actors) events.
"""

import numpy as np

from llmpq.costs.simulate import Batch, simulate
from llmpq.costs.timeline import Split, split, wait_counts
from llmpq.planner.evaluate import actor_works
from llmpq.planner.problem import Assignment, BatchGroup, Problem, Work


def simulated_s(problem: Problem, assignment: Assignment) -> float:
    """Seconds of the whole workload."""
    setting = assignment.setting
    works = actor_works(problem, assignment)
    total = 0.0
    for group in problem.groups(setting.batch):
        sizes = setting.prefill_micro_batch, setting.decode_micro_batch
        for index, count in enumerate(group.num_batches):
            total += float(count) * simulate(_batch(works, group, index, *sizes)).total_s
    return total


def _batch(works: list[Work], group: BatchGroup, index: int, prefill: int, decode: int) -> Batch:
    """One of a group's batches: its actors' times for every micro-batch and step."""
    prompt, steps = float(group.prompt_tokens[index]), int(group.num_steps[index])
    past = prompt + np.arange(steps)
    prefills, decodes = (split(group.num_requests, size) for size in (prefill, decode))
    first = [[float(work.prefill(n, prompt)) for n in _sizes(prefills)] for work in works]
    then = [
        [np.broadcast_to(work.decode(n, past), past.shape) for n in _sizes(decodes)]
        for work in works
    ]
    waits = wait_counts(group.num_requests, prefill, decode)
    return Batch(np.array(first), np.array(then).reshape(len(works), len(waits), steps), waits)


def _sizes(parts: Split) -> list[int]:
    """Requests of each micro-batch."""
    return [parts.size] * parts.count + ([parts.rest] if parts.rest else [])
