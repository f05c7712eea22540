"""One batch of the runtime, played job by job: who works on what, from when to when.

The servers of a pipeline stand in a row: stage, link, stage, ..., stage, and the tokens' way back
as the last one. Each does all jobs of a batch in one fixed order (`schedule`): every prefill
micro-batch, then for every decode step the decode micro-batches that still have a request to
serve. A job goes down the row, and waits at each server for the job before it; a decode job sets
out only when the tokens that it goes on from are back at the first stage. As the order is fixed,
times follow from a recurrence (`play`): no queue of events is needed, and any schedule whose jobs
wait for earlier ones can be played (one that refills the places of ended requests, for instance).

This is what a run does if every time is as predicted; `costs.timeline` is the closed form of it and
shares no code with it. Times are in seconds from the start of the batch.
Not covered: what handing over costs a sender itself; a sender that waits for its own sends (it
keeps a whole round under way, so it never does); two links that share a wire.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Batch:
    """What each server needs for each micro-batch, and what decoding waits for.

    `prefill` is [servers, prefill micro-batches], `decode` [servers, decode micro-batches, steps],
    both in seconds. `waits[i]`: how many prefill micro-batches must be back before decode
    micro-batch i starts its first step. `steps[i]`: how many steps it takes; None: all of them.
    `ready` [servers]: seconds until each can begin; None: all can at once. `one_ahead`: a receiver
    has one buffer posted, the next one once it has taken a message, so that a link carries a
    message only when its receiver has begun with the one before. Raises `ValueError` where these
    do not fit together.
    """

    prefill: np.ndarray
    decode: np.ndarray
    waits: tuple[int, ...]
    steps: tuple[int, ...] | None = None
    ready: np.ndarray | None = None
    one_ahead: bool = False

    def __post_init__(self) -> None:
        servers, num_prefills = self.prefill.shape
        if self.decode.shape[:2] != (servers, len(self.waits)):
            raise ValueError(
                f"decode times {self.decode.shape} are not of {servers} servers and "
                f"{len(self.waits)} micro-batches"
            )
        rising = list(self.waits) == sorted(self.waits)
        if not rising or self.waits[0] < 1 or self.waits[-1] > num_prefills:
            raise ValueError(f"waits {self.waits} must rise within 1 .. {num_prefills}")
        most = self.decode.shape[2]
        if len(self.num_steps) != len(self.waits) or not 0 <= max(self.num_steps) <= most:
            raise ValueError(f"steps {self.num_steps} are not of {len(self.waits)} x {most}")
        if self.ready is not None and self.ready.shape != (servers,):
            raise ValueError(f"ready times {self.ready.shape} are not of {servers} servers")

    @property
    def num_steps(self) -> tuple[int, ...]:
        """Decode steps of each decode micro-batch."""
        return (self.decode.shape[2],) * len(self.waits) if self.steps is None else self.steps


@dataclass(frozen=True, eq=False)
class Jobs:
    """The jobs of a batch in the order in which every server does them; arrays [jobs].

    `step` counts decode steps from 1 and is 0 for the prefill; `micro_batch` counts within the
    phase. `parent`: the earlier job whose tokens must be back before this one sets out, or -1.
    """

    micro_batch: np.ndarray
    step: np.ndarray
    parent: np.ndarray

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True, eq=False)
class Played:
    """A batch that was played. `start_s` and `end_s` are [jobs, servers]."""

    jobs: Jobs
    start_s: np.ndarray
    end_s: np.ndarray
    ready_s: np.ndarray  # [servers]

    @cached_property
    def first_tokens_s(self) -> float:
        """When all first tokens are back."""
        return float(self.end_s[self.jobs.step == 0, -1].max())

    @cached_property
    def total_s(self) -> float:
        """When all tokens are back."""
        return float(self.end_s[:, -1].max())

    @cached_property
    def busy_s(self) -> np.ndarray:
        """How long each server worked, [servers]."""
        return (self.end_s - self.start_s).sum(axis=0)

    def order(self, server: int) -> list[tuple[int, int]]:
        """(step, micro-batch) of each job, as this server begins with them."""
        at = np.argsort(self.start_s[:, server], kind="stable")
        return [(int(self.jobs.step[i]), int(self.jobs.micro_batch[i])) for i in at]


def simulate(batch: Batch) -> Played:
    """Plays a batch from its start until the last token is back."""
    jobs = schedule(batch.prefill.shape[1], batch.waits, batch.num_steps)
    servers = batch.prefill.shape[0]
    ready = np.zeros(servers) if batch.ready is None else batch.ready
    return play(jobs, _seconds(batch, jobs), ready, batch.one_ahead)


def schedule(num_prefills: int, waits: Sequence[int], steps: Sequence[int]) -> Jobs:
    """The runtime's order: all prefills, then step by step what still has a step to do."""
    micro_batch, step = list(range(num_prefills)), [0] * num_prefills
    parent = [-1] * num_prefills
    before = [wait - 1 for wait in waits]  # of each decode micro-batch: its job of the last step
    live = list(range(len(waits)))
    for number in range(1, max(steps) + 1):
        live = [i for i in live if steps[i] >= number]
        parent += [before[i] for i in live]
        for place, i in enumerate(live, len(step)):
            before[i] = place
        micro_batch += live
        step += [number] * len(live)
    return Jobs(*(np.array(values, dtype=np.int64) for values in (micro_batch, step, parent)))


def play(jobs: Jobs, seconds: np.ndarray, ready_s: np.ndarray, one_ahead: bool) -> Played:
    """Plays any jobs; `seconds` is [jobs, servers], `ready_s` [servers].

    A job starts at a server once it has arrived, the server has done the job before it, and (on a
    link, where receivers post `one_ahead`) the receiver has begun with the job before it.
    """
    starts: list[list[float]] = []
    ends: list[list[float]] = []
    free = ready_s.tolist()
    if one_ahead:
        free[1:-1:2] = np.maximum(ready_s[1:-1:2], ready_s[2::2]).tolist()
    for row, parent in zip(seconds.tolist(), jobs.parent.tolist(), strict=True):
        now = ends[parent][-1] if parent >= 0 else 0.0
        start, end = [], []
        for busy_until, needed in zip(free, row, strict=True):
            if busy_until > now:
                now = busy_until
            start.append(now)
            now += needed
            end.append(now)
        starts.append(start)
        ends.append(end)
        free = end[:]
        if one_ahead:
            free[1:-1:2] = start[2::2]
    return Played(jobs, np.array(starts), np.array(ends), ready_s)


def _seconds(batch: Batch, jobs: Jobs) -> np.ndarray:
    """[jobs, servers]."""
    num_prefills = batch.prefill.shape[1]
    decode = batch.decode[:, jobs.micro_batch[num_prefills:], jobs.step[num_prefills:] - 1]
    return np.concatenate([batch.prefill.T, decode.T])
