"""One batch of the runtime, played event by event: who works on what, from when to when.

The servers of a pipeline stand in a row: stage, link, stage, ..., stage, and the tokens' way back
as the last one. Each works on one micro-batch at a time, first come first served: all prefill
micro-batches, then for every decode step all decode micro-batches, in this fixed order. A decode
micro-batch sets out again when its tokens of the step before are back at the first stage; for the
first step, when all prefill micro-batches that hold its requests are.

This is what a run does if every time is as predicted; `costs.timeline` is the closed form of it and
shares no code with it. Times are in seconds from the start of the batch.
Not covered: requests that end early, a link that holds back its sender because the receiver has no
buffer free (the runtime posts one buffer ahead), two links that share a wire.
"""

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Batch:
    """What each server needs for each micro-batch, and what decoding waits for.

    `prefill` is [servers, prefill micro-batches], `decode` [servers, decode micro-batches, steps],
    both in seconds. `waits[i]`: how many prefill micro-batches must be back before decode
    micro-batch i starts its first step. Raises `ValueError` where these do not fit together.
    """

    prefill: np.ndarray
    decode: np.ndarray
    waits: tuple[int, ...]

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


@dataclass(frozen=True, slots=True)
class Job:
    """One micro-batch of one pass; `step` counts decode steps from 1 and is 0 for the prefill."""

    phase: Literal["prefill", "decode"]
    micro_batch: int
    step: int


@dataclass(frozen=True, slots=True)
class Span:
    """A server's work on a job, in seconds from the start of the batch."""

    server: int
    job: Job
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Outcome:
    """When all first tokens are back, when all tokens are, and how long each server worked."""

    first_tokens_s: float
    total_s: float
    busy_s: np.ndarray  # [servers]


def simulate(batch: Batch) -> Outcome:
    """Plays a batch from its start until the last token is back."""
    first_tokens = total = 0.0
    for span in trace(batch):
        total = max(total, span.end_s)
        if span.job.phase == "prefill":
            first_tokens = max(first_tokens, span.end_s)
    busy = batch.prefill.sum(axis=1) + batch.decode.sum(axis=(1, 2))
    return Outcome(first_tokens, total, busy)


def trace(batch: Batch) -> Iterator[Span]:
    """Every server's every job, in the order in which they end."""
    row = _Row(batch)
    for micro_batch in range(batch.prefill.shape[1]):
        row.arrive(0, Job("prefill", micro_batch, 0), now=0.0)
    while row.ends:
        span = row.next_end()
        yield span
        for job in row.pass_on(span):
            row.arrive((span.server + 1) % row.num_servers, job, span.end_s)


class _Row:
    """The servers while they work: what waits before each, and what ends next."""

    def __init__(self, batch: Batch) -> None:
        self.num_servers = batch.prefill.shape[0]
        self.num_steps = batch.decode.shape[2]
        self.waits = batch.waits
        self.prefill, self.decode = batch.prefill.tolist(), batch.decode.tolist()
        self.queues: list[deque[Job]] = [deque() for _ in range(self.num_servers)]
        self.working = [False] * self.num_servers
        self.ends: list[tuple[float, int, Span]] = []  # a heap
        self.count = 0  # of spans so far; keeps the order of those that end at the same time

    def arrive(self, server: int, job: Job, now: float) -> None:
        """Queues a job, or starts it on an idle server."""
        self.queues[server].append(job)
        if not self.working[server]:
            self._start(server, now)

    def next_end(self) -> Span:
        """The span that ends next; its server goes on with what waits."""
        end, _, span = heapq.heappop(self.ends)
        self.working[span.server] = False
        if self.queues[span.server]:
            self._start(span.server, end)
        return span

    def pass_on(self, span: Span) -> list[Job]:
        """What the end of a span lets the next server have."""
        if span.server < self.num_servers - 1:
            return [span.job]
        if span.job.phase == "prefill":
            return self._first_steps(span.job.micro_batch + 1)
        if span.job.step < self.num_steps:
            return [Job("decode", span.job.micro_batch, span.job.step + 1)]
        return []

    def _first_steps(self, num_back: int) -> list[Job]:
        """Decode micro-batches that wait for just so many prefill micro-batches."""
        if not self.num_steps:
            return []
        return [Job("decode", i, 1) for i, wait in enumerate(self.waits) if wait == num_back]

    def _start(self, server: int, now: float) -> None:
        job = self.queues[server].popleft()
        self.working[server] = True
        end = now + self._seconds(server, job)
        heapq.heappush(self.ends, (end, self.count, Span(server, job, now, end)))
        self.count += 1

    def _seconds(self, server: int, job: Job) -> float:
        if job.phase == "prefill":
            return float(self.prefill[server][job.micro_batch])
        return float(self.decode[server][job.micro_batch][job.step - 1])
