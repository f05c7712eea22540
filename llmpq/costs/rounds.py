"""A run followed in rounds, which knows no times: when each request begins and ends, and where.

In each round every lane that holds requests takes one decode step. A request that ends leaves its
slot to the next one, which begins in the round after. `costs.job_counts` counts the jobs of it.

Not covered: lanes that fall behind each other, so that their requests end in different rounds; stop
tokens.
"""

import heapq
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from llmpq.job import LaneShape
from llmpq.schedule_state import NEAR, PADDED

SAMPLES = 12  # rounds at which the lanes are looked at


class Seen(NamedTuple):
    """The requests that run in a round: where they lie, and tokens that each holds after it."""

    slot: np.ndarray
    held: np.ndarray


@dataclass(frozen=True, eq=False)
class Rounds:
    """When requests begin and end; arrays [requests] in the order in which they begin.

    `begin` is the round before a request's first decode step, `end` that of its last one; `slot` is
    where it lies, counted from the slots of the shortest lanes.
    """

    slot: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    prompt: np.ndarray

    @cached_property
    def last(self) -> int:
        """From this round on slots stay free."""
        return int(self.begin.max())

    @cached_property
    def num_bursts(self) -> int:
        """Rounds with newcomers, beside the first."""
        return len(np.unique(self.begin)) - 1

    @property
    def parts(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """From and to which round requests wait for slots, and do not any more."""
        return (0, self.last), (self.last, int(self.end.max()))

    @cached_property
    def seen(self) -> list[list[Seen]]:
        """Of both parts, `SAMPLES` rounds each."""
        return [
            [self._seen(start + (i + 0.5) * (stop - start) / SAMPLES) for i in range(SAMPLES)]
            for start, stop in self.parts
        ]

    def _seen(self, at: float) -> Seen:
        """Where nothing runs, as all slots change hands, of the last round before with steps."""
        runs = (self.begin <= at) & (self.end > at)
        if not runs.any() and (before := (self.begin <= at) & (self.end > self.begin)).any():
            at = float(self.begin[before].max())
            runs = (self.begin <= at) & (self.end > at)
        return Seen(self.slot[runs], (self.prompt - self.begin)[runs] + at + 1)


def slots_of(lanes: Sequence[LaneShape]) -> tuple[tuple[int, int], ...]:
    """How many slots there are of each number of tokens, the shortest first."""
    rows: Counter[int] = Counter()
    for lane in lanes:
        rows[lane.tokens] += lane.rows
    return tuple(sorted(rows.items()))


def run_in_rounds(
    lengths: Sequence[tuple[int, int]],
    slots: Sequence[tuple[int, int]],
    prefill_rows: int,
) -> Rounds:
    """Every request takes the first slot that is free and has room for it; longest outputs first.

    As `schedule.Schedule` takes requests: those whose prompts are like the first one of a prefill
    job of `prefill_rows` come sooner.
    """
    if len(slots) == 1 and len(set(lengths)) == 1:
        return _alike(len(lengths), *lengths[0], slots[0][1])
    waiting = _by_room(lengths, [tokens for tokens, _ in slots])
    choices = [waiting[index::-1] for index, (_, rows) in enumerate(slots) for _ in range(rows)]
    taken, begins, ends, prompts = (array("q") for _ in range(4))
    ending: dict[int, list[int]] = {}  # slots that become free after a round
    rounds: list[int] = []  # a heap of these rounds

    def fill(free: Iterable[int], begin: int) -> None:
        rows, like = 0, 0
        for slot in free:
            some = next(filter(None, choices[slot]), None)
            if some is None:
                continue
            new, prompt = _take(some, like) if like else some.pop()
            rows = rows + 1 if prompt <= like <= PADDED * prompt else 1
            like = 0 if rows == prefill_rows else like if rows > 1 else prompt
            end = begin + new - 1
            taken.append(slot)
            begins.append(begin)
            ends.append(end)
            prompts.append(prompt)
            if end not in ending:
                ending[end] = []
                heapq.heappush(rounds, end)
            ending[end].append(slot)

    fill(range(len(choices)), 0)
    while rounds:
        now = heapq.heappop(rounds)
        fill(sorted(ending.pop(now)), now + 1)
    return Rounds(*(np.array(values, dtype=np.int64) for values in (taken, begins, ends, prompts)))


def _alike(count: int, prompt: int, new: int, num_slots: int) -> Rounds:
    """Of equal requests: they come and go together."""
    wave, slot = np.divmod(np.arange(count), num_slots)
    return Rounds(slot, new * wave, new * wave + new - 1, np.full(count, prompt))


def _by_room(
    lengths: Sequence[tuple[int, int]], rooms: Sequence[int]
) -> list[list[tuple[int, int]]]:
    """(new tokens, prompt tokens) by the least lane that has room; the longest outputs last."""
    waiting: list[list[tuple[int, int]]] = [[] for _ in rooms]
    for prompt, new in lengths:
        waiting[min(bisect_left(rooms, prompt + new), len(rooms) - 1)].append((new, prompt))
    for some in waiting:
        some.sort()
    return waiting


def _take(waiting: list[tuple[int, int]], like: int) -> tuple[int, int]:
    """The last one, or of the next `NEAR` one of about `like` prompt tokens."""
    for back, (_, prompt) in enumerate(waiting[: -NEAR - 1 : -1], start=1):
        if like <= PADDED * prompt and prompt <= like:
            return waiting.pop(-back)
    return waiting.pop()
