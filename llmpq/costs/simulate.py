"""A run, simulated job by job: who works on what, from when to when.

The servers of a pipeline stand in a row: stage, link, stage, ..., stage, and the token return path
as the last one. Which job comes next is decided by the runtime's own `Schedule`: the first stage,
as soon as it is free, tells it what has come back and asks it; where there is nothing to do it
waits for the oldest job's return. Every other server does all jobs in that order, each when it has
arrived and the one before is done. So times follow from a recurrence and no queue of events is
needed.

This is what a run does if every time is as predicted. Times are in seconds from its start.
Not covered: what handing over costs a sender itself; two links that share a wire; moves inside
the cache.
"""

from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from llmpq.job import Job
from llmpq.schedule import Schedule

Seconds = Callable[[Job], Sequence[float]]  # what each server needs for a job


@dataclass(frozen=True, eq=False)
class Jobs:
    """The jobs of a run in the order in which every server does them; arrays [jobs].

    `step` counts a lane's decode steps from 1 and is 0 for a prefill. `micro_batch`: a decode
    step's lane, a prefill's number. `parent`: the job that came back last before this one was
    given out, or -1. `requests` are served, each with so many new `tokens` after `past` ones;
    `rows` are computed.
    """

    micro_batch: np.ndarray
    step: np.ndarray
    parent: np.ndarray
    requests: np.ndarray
    tokens: np.ndarray
    past: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True, eq=False)
class SimulatedRun:
    """A run that was simulated. `start_s` and `end_s` are [jobs, servers]."""

    jobs: Jobs
    start_s: np.ndarray
    end_s: np.ndarray

    @cached_property
    def total_s(self) -> float:
        """When all tokens are back."""
        return float(self.end_s[-1, -1])

    @cached_property
    def busy_s(self) -> np.ndarray:
        """How long each server worked, [servers]."""
        return (self.end_s - self.start_s).sum(axis=0)

    @cached_property
    def prefill_busy_s(self) -> np.ndarray:
        """How long each server worked on prefills, [servers]."""
        return (self.end_s - self.start_s)[self.jobs.step == 0].sum(axis=0)

    @property
    def prefill_s(self) -> float:
        """When the first token of every request is back: when the last prefill is."""
        return float(self.end_s[self.jobs.step == 0, -1].max())

    @property
    def decode_s(self) -> float:
        """From then on."""
        return self.total_s - self.prefill_s

    @property
    def prefill_share(self) -> float:
        """What prefills are of the busiest stage's work."""
        busiest = 2 * int(self.busy_s[::2].argmax())
        return float(self.prefill_busy_s[busiest] / self.busy_s[busiest])

    @cached_property
    def busy_share(self) -> float:
        """Of the busiest stage, from when it gets its first job until the last token is back."""
        busiest = 2 * int(self.busy_s[::2].argmax())
        return float(self.busy_s[busiest] / (self.total_s - self.start_s[0, busiest]))


class _Log:
    """The jobs so far, as numbers in rows."""

    def __init__(self) -> None:
        self.rows = array("q")
        self.numbers: Counter[int | None] = Counter()  # decode steps of each lane; prefills

    def add(self, job: Job, parent: int) -> None:
        lane = None if job.prefill else job.lane
        number, width = self.numbers[lane], job.end - job.begin
        self.numbers[lane] = number + 1
        if lane is None:
            row = (number, 0, parent, len(job.members), width, job.begin, job.rows)
        else:
            row = (lane, number + 1, parent, len(job.members), 1, width - 1, job.rows)
        self.rows.extend(row)

    def jobs(self) -> Jobs:
        rows = np.array(self.rows, dtype=np.int64).reshape(-1, len(fields(Jobs)))
        return Jobs(*rows.T)


def simulate_schedule(
    schedule: Schedule,
    seconds: Seconds,
    num_servers: int,
    told: Callable[[int], None] = lambda _: None,
) -> SimulatedRun:
    """Simulates all requests of a schedule until the last token is back.

    `told` hears after every job how many requests have ended.
    """
    log, asked, ends = _Log(), array("d"), array("d")
    free = [0.0] * num_servers
    back: deque[float] = deque()  # when jobs under way will be back
    now, returned, ended = 0.0, 0, 0
    while True:
        while back and back[0] <= now:
            back.popleft()
            returned += 1
            ended += sum(schedule.returned())
        job = schedule.next()
        if job is None:
            if not back:
                break
            now = back[0]
            continue
        log.add(job, returned - 1)
        asked.append(now)
        free = _done(now, seconds(job), free)
        ends.extend(free)
        back.append(free[-1])
        now = free[0]
        told(ended)
    end_s = _spans(ends, num_servers)
    return SimulatedRun(log.jobs(), _starts(np.array(asked), end_s), end_s)


def _done(now: float, seconds: Sequence[float], free: Sequence[float]) -> list[float]:
    """When each server has done a job that is given out `now`, if they are free from then on."""
    done = []
    for needed, since in zip(seconds, free, strict=True):
        now = (now if now > since else since) + needed
        done.append(now)
    return done


def _starts(asked: np.ndarray, end_s: np.ndarray) -> np.ndarray:
    """[jobs, servers]: when a job is there (the first server's is `asked` for) and its server free.

    The same maxima as in `_done`.
    """
    there = np.column_stack([asked, end_s[:, :-1]])
    free = np.vstack([np.zeros(end_s.shape[1]), end_s])[: len(end_s)]
    return np.asarray(np.maximum(there, free))


def _spans(times: "array[float]", num_servers: int) -> np.ndarray:
    """[jobs, servers]."""
    return np.array(times).reshape(-1, num_servers)
