"""How many jobs of which sizes a run has, counted without knowing any times.

The run of `llmpq.schedule` is played in rounds: in each, every lane that holds requests takes one
decode step. A request that ends in a round leaves its slot to the next one, whose prompt is
computed in a prefill job, alone or with others that the same lane takes in that round. What comes
out (prefill jobs by rows and tokens, decode steps by rows and past tokens, rounds) hardly depends
on how long jobs take, so that one count serves every choice of devices and layers.

Against 288 simulated runs of random plans, in the median: decode steps, the longest lane's steps
and their past are within 1 %. Prefill jobs are counted 10 % low where the pipeline is starved, as
requests then are taken one by one.

Not covered: several lanes' newcomers in one prefill job, which a run has while its first stage is
busy; stop tokens.
"""

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from llmpq.job import LaneShape, chunk_length, padded_width
from llmpq.schedule import NEAR, PADDED

SAMPLES = 12  # rounds at which the lanes are looked at
OCTAVE = 8  # widths an octave: `job.padded_width`


class PrefillJob(NamedTuple):
    """Tokens `begin` to `end` of `rows` prompts."""

    rows: int
    begin: int
    end: int


class DecodeSteps(NamedTuple):
    """`number` decode steps of `rows` requests with `past` tokens each before them."""

    rows: int
    past: float
    number: float


@dataclass(frozen=True)
class JobCounts:
    """The jobs of a run.

    `first`: prefill jobs that fill the lanes at the beginning; `refills`: all others, which come in
    `num_bursts` rounds; both by size. `steps`: decode steps of all lanes, `longest_lane`: those of
    the lane that takes most; `rounds_after`: how many of them come after the last prefill job.
    `empty_steps`, `empty_rounds`: steps of all lanes and of the longest one that nobody takes, as
    all requests of the lane have ended and others are on their way; not among the steps.
    """

    num_lanes: int
    first: Mapping[PrefillJob, float]
    refills: Mapping[PrefillJob, float]
    num_bursts: float
    steps: tuple[DecodeSteps, ...]
    longest_lane: tuple[DecodeSteps, ...]
    rounds_after: float
    empty_steps: float = 0.0
    empty_rounds: float = 0.0

    @cached_property
    def num_first(self) -> float:
        """Prefill jobs before the first decode steps."""
        return sum(self.first.values())

    @cached_property
    def num_refills(self) -> float:
        """Prefill jobs of requests that take the slot of another one."""
        return sum(self.refills.values())

    @cached_property
    def num_steps(self) -> float:
        """Decode steps of all lanes."""
        return sum(steps.number for steps in self.steps)

    @cached_property
    def num_rounds(self) -> float:
        """Decode steps of the lane that takes most."""
        return sum(steps.number for steps in self.longest_lane)

    @cached_property
    def mean_prompt(self) -> float:
        """Tokens that a prefill job reaches to, on average over requests."""
        jobs = [*self.first.items(), *self.refills.items()]
        rows = sum(job.rows * count for job, count in jobs)
        return sum(job.rows * job.end * count for job, count in jobs) / rows

    @cached_property
    def mean_past(self) -> float:
        """Tokens before those of a decode step, on average; where there is none, of a prompt."""
        if not self.num_steps:
            return self.mean_prompt
        return sum(some.past * some.number for some in self.steps) / self.num_steps


class Tokens(NamedTuple):
    """Of a workload: prompt tokens, and new tokens that take a decode step."""

    prompt: float
    new: float


def tokens_of(lengths: Sequence[tuple[int, int]]) -> Tokens:
    """All tokens of requests of these (prompt tokens, new tokens)."""
    return Tokens(sum(prompt for prompt, _ in lengths), sum(new - 1 for _, new in lengths))


def count_jobs(
    lengths: Sequence[tuple[int, int]],
    lanes: Sequence[LaneShape],
    prefill_rows: int,
    chunk_tokens: int,
    whole: Tokens | None = None,
) -> JobCounts:
    """The jobs of a run of requests of these (prompt tokens, new tokens).

    `lanes` and the rest are what `schedule.Schedule` gets. `whole`: the tokens of the workload that
    the requests are a sample of. What happens while requests wait is then repeated until the tokens
    add up; the first fill and the end are not.
    """
    rounds = _Rounds(lanes, prefill_rows, chunk_tokens, _by_room(lengths, lanes))
    rounds.play()
    return rounds.counted(whole or tokens_of(lengths))


def alike_together(lengths: Sequence[tuple[int, int]], rows: Sequence[int]) -> int:
    """How many requests can be counted as one: equal ones that come and go together.

    `rows` of all lanes and of a prefill job.
    """
    return math.gcd(*rows, len(lengths)) if len(set(lengths)) == 1 else 1


def of_groups(counts: JobCounts, size: int) -> JobCounts:
    """The jobs where each request that was counted stands for `size` equal ones."""

    def larger(jobs: Mapping[PrefillJob, float]) -> Mapping[PrefillJob, float]:
        return {job._replace(rows=size * job.rows): count for job, count in jobs.items()}

    def wider(steps: Sequence[DecodeSteps]) -> tuple[DecodeSteps, ...]:
        return tuple(some._replace(rows=size * some.rows) for some in steps)

    return replace(
        counts,
        first=larger(counts.first),
        refills=larger(counts.refills),
        steps=wider(counts.steps),
        longest_lane=wider(counts.longest_lane),
    )


# ---- the run in rounds

_Waiting = tuple[int, int]  # (-new tokens, -prompt tokens)


def _by_room(
    lengths: Sequence[tuple[int, int]], lanes: Sequence[LaneShape]
) -> dict[int, list[_Waiting]]:
    """Requests by the least lane that has room for one; the longest outputs last."""
    rooms = sorted({lane.tokens for lane in lanes})
    waiting: dict[int, list[_Waiting]] = {room: [] for room in rooms}
    for prompt, new in lengths:
        room = next((room for room in rooms if room >= prompt + new), rooms[-1])
        waiting[room].append((-new, -prompt))
    for some in waiting.values():
        some.sort(reverse=True)
    return waiting


@dataclass
class _Rounds:
    """Requests in lanes, round by round. Lists have an entry for every request that began."""

    lanes: Sequence[LaneShape]
    prefill_rows: int
    chunk_tokens: int
    waiting: dict[int, list[_Waiting]]
    first: Counter[PrefillJob] = field(default_factory=Counter)
    refills: Counter[PrefillJob] = field(default_factory=Counter)
    num_bursts: int = 0
    lane: list[int] = field(default_factory=list)
    begin: list[int] = field(default_factory=list)  # the round before its first decode step
    end: list[int] = field(default_factory=list)  # the round of its last one
    prompt: list[int] = field(default_factory=list)
    running: list[tuple[int, int]] = field(default_factory=list)  # (end, lane), a heap

    def play(self) -> None:
        """Until all requests have ended."""
        order = sorted(range(len(self.lanes)), key=lambda i: (self.lanes[i].tokens, i))
        free = [index for index in order for _ in range(self.lanes[index].rows)]
        self._fill(free, 0, self.first)
        running, last_burst = self.running, -1
        while running:
            now, index = heapq.heappop(running)
            free = [index]
            while running and running[0] == (now, index):
                heapq.heappop(running)
                free.append(index)
            if self._fill(free, now + 1, self.refills) and now != last_burst:
                self.num_bursts += 1
                last_burst = now

    def _fill(self, free: list[int], begin: int, jobs: Counter[PrefillJob]) -> bool:
        """Requests for free slots, given as the lanes they are in; whether there were any."""
        found = False
        while free:
            left: list[int] = []
            rows, like, none_for = 0, 0, 0
            for place, index in enumerate(free):
                if rows == self.prefill_rows or like > self.chunk_tokens:
                    left += free[place:]
                    break
                tokens = self.lanes[index].tokens
                item = None if tokens == none_for else self._take(tokens, like)
                if item is None:
                    none_for = tokens
                    left.append(index)
                    continue
                rows, like = rows + 1, like or -item[1]
                self._settle(index, begin, item)
            if not rows:
                break
            found = True
            self._add_prefill(jobs, rows, like)
            free = left
        return found

    def _take(self, tokens: int, like: int) -> _Waiting | None:
        """As `schedule.Schedule` takes requests; `like` 0: any."""
        for room in reversed(self.waiting):
            if room > tokens:
                continue
            waiting = self.waiting[room]
            if waiting and not like:
                return waiting.pop()
            least = like / PADDED
            for back, (_, prompt) in enumerate(waiting[: -NEAR - 1 : -1], start=1):
                if least <= -prompt <= like:
                    return waiting.pop(-back)
        return None

    def _settle(self, index: int, begin: int, item: _Waiting) -> None:
        end = begin - item[0] - 1
        self.lane.append(index)
        self.begin.append(begin)
        self.end.append(end)
        self.prompt.append(-item[1])
        heapq.heappush(self.running, (end, index))

    def _add_prefill(self, jobs: Counter[PrefillJob], rows: int, prompt: int) -> None:
        if prompt <= self.chunk_tokens:
            jobs[PrefillJob(rows, 0, min(self.chunk_tokens, padded_width(prompt)))] += 1
            return
        chunk = chunk_length(prompt, self.prefill_rows, self.chunk_tokens)
        for start in range(0, prompt, chunk):
            jobs[PrefillJob(1, start, min(prompt, start + chunk))] += 1

    # ---- what was counted

    def counted(self, whole: Tokens) -> JobCounts:
        """All jobs of a workload of so many tokens."""
        lane, begin, end = np.array(self.lane), np.array(self.begin), np.array(self.end)
        last = int(begin.max())  # from then on slots stay free
        while_waiting = int(np.clip(np.minimum(end, last) - begin, 0, None).sum())
        refilled = int(np.array(self.prompt)[begin > 0].sum())
        prefills = _times(whole.prompt, sum(self.prompt), refilled)
        turns = _times(whole.new, int((end - begin).sum()), while_waiting)
        ends = np.zeros(len(self.lanes), dtype=int)
        np.maximum.at(ends, lane, end)
        empty = _empty_rounds(lane, begin, end, len(self.lanes))
        longest = max(range(len(ends)), key=lambda i: (ends[i] - empty[i], self.lanes[i].tokens))
        parts = [(0, last, turns)] if last else []
        parts.append((last, int(ends.max()), 1.0))
        steps: list[DecodeSteps] = []
        of_longest: list[DecodeSteps] = []
        for start, stop, times in parts:
            rows, past = self._looked_at(start, stop, shrink=start == last)
            taken = np.clip(ends - start, 0, stop - start) - (0 if start else empty)
            steps += _steps(rows, past, times * float(taken.sum()))
            one = slice(longest, longest + 1)
            of_longest += _steps(rows[:, one], past[:, one], times * float(taken[longest]))
        return JobCounts(
            num_lanes=len(self.lanes),
            first=dict(self.first),
            refills={job: prefills * count for job, count in self.refills.items()},
            num_bursts=prefills * self.num_bursts,
            steps=tuple(steps),
            longest_lane=tuple(of_longest),
            rounds_after=float(max(0, ends.max() - last)),
            empty_steps=turns * float(empty.sum()),
            empty_rounds=turns * float(empty[longest]),
        )

    def _looked_at(self, start: int, stop: int, shrink: bool) -> tuple[np.ndarray, np.ndarray]:
        """[samples, lanes]: rows that a step computes, and their past; rows are 0 without a step.

        A step attends to as many tokens as its longest request has. Where slots stay free
        (`shrink`), requests move together, so that steps have fewer rows.
        """
        at = start + (np.arange(SAMPLES)[:, None] + 0.5) * (stop - start) / SAMPLES
        lane, order = np.array(self.lane), np.argsort(self.lane, kind="stable")
        begin, end, prompt = (np.array(x)[order] for x in (self.begin, self.end, self.prompt))
        there, starts = np.unique(lane[order], return_index=True)
        runs = (begin <= at) & (end > at)
        seen = np.where(runs, prompt + at - begin + 1, 0)
        longest = np.maximum.reduceat(seen, starts, axis=1)
        number = np.add.reduceat(runs.astype(int), starts, axis=1)
        rows = np.zeros((SAMPLES, len(self.lanes)), dtype=int)
        past = np.zeros(rows.shape)
        slots = np.array([shape.rows for shape in self.lanes])
        tokens = np.array([shape.tokens for shape in self.lanes])
        rows[:, there] = number if shrink else np.where(number > 0, slots[there], 0)
        past[:, there] = np.minimum(_padded(longest), tokens[there]) - 1
        return rows, past


def _empty_rounds(
    lane: np.ndarray, begin: np.ndarray, end: np.ndarray, num_lanes: int
) -> np.ndarray:
    """[lanes]: rounds between its steps in which a lane has none, as all slots change hands."""
    found = np.zeros(num_lanes, dtype=int)
    for index in np.unique(lane):
        own = lane == index
        order = np.argsort(begin[own], kind="stable")
        until = np.maximum.accumulate(end[own][order])
        found[index] = np.clip(begin[own][order][1:] - until[:-1], 0, None).sum()
    return found


def _times(whole: float, counted: float, repeated: float) -> float:
    """How often a part of what was counted is repeated, so that it adds up to the whole."""
    return (whole - counted + repeated) / repeated if repeated else 1.0


def _padded(tokens: np.ndarray) -> np.ndarray:
    """`job.padded_width` of an array."""
    whole = np.maximum(tokens, 1)
    step = 2.0 ** np.maximum(0, np.ceil(np.log2(whole)) - np.log2(2 * OCTAVE))
    return np.asarray(np.ceil(whole / step) * step)


def _steps(rows: np.ndarray, past: np.ndarray, count: float) -> list[DecodeSteps]:
    """`count` steps like those that were looked at; alike ones (rows within an octave) together."""
    live = rows > 0
    if not live.any() or count <= 0:
        return []
    octave = np.frexp(rows[live] - 0.5)[1]
    found = []
    for one in np.unique(octave):
        same = octave == one
        mean = rows[live][same].mean()
        share = same.sum() / live.sum()
        found.append(DecodeSteps(round(mean), float(past[live][same].mean()), count * share))
    return found
