"""Waves of typical requests: how a device that streams its weights works through a workload.

It computes a block of requests, prefill and all decode steps, before the next one begins. Blocks of
equal size are one `BatchGroup`.
Not covered: slots that are refilled while others go on (`costs.job_counts`).
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmpq.planner.problem import Lengths, Problem
from llmpq.planner.tables import Scope, Table
from llmpq.planner.works import Cost
from llmpq.schedule_state import PADDED

WAVES: Table[int, list["BatchGroup"]] = Table(Scope.REQUESTS)


@dataclass(frozen=True)
class BatchGroup:
    """Waves of so many typical requests each; arrays over distinct lengths."""

    num_requests: int
    prompt_tokens: np.ndarray
    new_tokens: np.ndarray
    num_batches: np.ndarray  # how many waves have these lengths

    @property
    def num_steps(self) -> np.ndarray:
        """Decode steps of a wave; its first token comes from the prefill."""
        return self.new_tokens - 1

    @property
    def past_tokens(self) -> np.ndarray:
        """Tokens in the cache at the middle of the n - 1 steps, whose past is s ... s + n - 2."""
        return self.prompt_tokens + np.maximum(self.new_tokens - 2, 0) / 2


def groups(problem: Problem, batch: int) -> list[BatchGroup]:
    """The waves of a problem, by number of requests."""
    found = problem.cached(WAVES, batch, lambda: _groups(problem.lengths, batch))
    return [replace(one, num_batches=problem.repeats * one.num_batches) for one in found]


def _groups(lengths: Lengths, batch: int) -> list[BatchGroup]:
    """As many requests as are in flight, again and again, then those that are left.

    A wave of typical requests takes what they do on average: their prompt, padded to others like
    it, and their number of steps. Requests with the longest outputs begin first. Where the longest
    one of all outlasts the others, slots stay free meanwhile: those steps count half, as they are
    taken with half of the slots on average. Equal requests are what they are.
    """
    steps = np.sort(np.array([new for _, new in lengths]) - 1)[::-1]
    waves, rest = divmod(len(lengths), batch)
    prompt = _padded_prompt(lengths)
    groups = []
    if waves:
        mean = float(steps[: waves * batch].mean())
        groups.append(_group(batch, prompt, max(mean, (mean + steps[0] / waves) / 2), waves))
    if rest:
        groups.append(_group(rest, prompt, float(steps[waves * batch]), 1))
    return groups


def _padded_prompt(lengths: Lengths) -> float:
    """Mean prompt, padded as in micro-batches of like prompts."""
    total, like = 0, 0
    for prompt, count in sorted(Counter(prompt for prompt, _ in lengths).items(), reverse=True):
        like = prompt if prompt * PADDED < like or not like else like
        total += count * like
    return total / len(lengths)


def _group(num_requests: int, prompt_tokens: float, steps: float, count: int) -> BatchGroup:
    arrays = np.array([prompt_tokens]), np.array([steps + 1]), np.array([count])
    return BatchGroup(num_requests, *arrays)


def seconds_of_all(cost: Cost, group: BatchGroup, size: int, tokens: Any) -> Any:
    """All micro-batches of a block of at most `size` requests each, for a group's blocks."""
    size = min(size, group.num_requests)
    count, rest = divmod(group.num_requests, size)
    return cost(size, tokens) * count + (cost(rest, tokens) if rest else 0.0)
