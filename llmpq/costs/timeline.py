"""How long a batch takes, in closed form.

Stages, the links between them and the tokens' way back are alike here: actors that each do all
prefill micro-batches and then, step by step, all decode micro-batches, in a fixed order. A batch
takes as long as its longest chain of jobs that wait for each other. `batch_s` is the maximum over
the kinds of chains; each is linear in the actors' times and in maxima over actors. A chain
  - follows the prefill down the actors (`_prefill_ends`), then decoding from any actor on,
  - or goes through the loop from a prefill micro-batch's tokens to the decode micro-batch that
    waits for them (`starts`); prefill and decode overlap where that is not the last one;
  - in decoding goes round the loop at each step (sum_j once_j a step), or stays with one actor
    (every_j a step), and ends with the last micro-batch's way down (`_Steps.after`).
Arrays are [actors, batches]: `once` is an actor's time for one (the first, largest) micro-batch,
`every` its time for all of them; what that leaves for the last one may be less than `once`.

Against this schedule, played job by job: the prefill is always exact. The total is exact for
micro-batches of one size and steps of one length, whatever the times, counts and number of steps.
With a smaller last micro-batch it is never above, and exact in 99 % of random cases; 0.2 % short at
most where that one takes half the time of the others or more, 1.6 % elsewhere: chains that change
actors again and again within a step are left out. Steps that grow with the cache are priced at
their mean past s + (n - 2) / 2 (the first of n tokens comes from the prefill): exact while one
chain stays the longest, else short: by 1 % at most for 0.1 % a step; 1.4 % for 0.3 % (3 % with slow
links).

A run refills the slots of ended requests (`costs.simulate`), and a batch stands for a wave of
typical requests. On 180 random plans of 1 to 4 stages the closed form was off by, in the median
(worst): 0.8 % (25 %) for equal lengths, 4 % (44 %) for lengths within 50 % of their mean, 9 %
(117 %) for exponential ones. It is too low where few lanes have to fill many stages, as every
prefill of newcomers then holds up decoding, and prefills are smaller than planned; too high where
most of the requests are in flight at once and a few outlast the others; and far too low where any
prefill takes as long as many decode steps (34 % in the median of 30 plans for the shipped model,
whose decode steps are CUDA graphs). So it ranks plans; runs of the best ones are simulated, which
decides between them (`planner.confirm`).
Not covered: what `costs.simulate` does not cover.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Split:
    """A batch cut into micro-batches: `count` of `size`, then one of `rest` if that is not 0."""

    size: int
    count: int
    rest: int


@dataclass(frozen=True)
class PhaseTimes:
    """Seconds of every actor in the pipeline's order: stage, link, ..., stage, way back.

    All [actors, batches]; `once` for the first micro-batch, `every` for all of a batch (decode:
    of one step, at the mean past).
    """

    prefill_once: np.ndarray
    prefill_every: np.ndarray
    decode_once: np.ndarray
    decode_every: np.ndarray


def split(num_requests: int, micro_batch: int) -> Split:
    """How `num_requests` fall into micro-batches of at most `micro_batch`."""
    size = min(micro_batch, num_requests)
    return Split(size, num_requests // size, num_requests % size)


def mean_past(prompt_tokens: np.ndarray, new_tokens: np.ndarray) -> np.ndarray:
    """Tokens in the cache at the middle of the n - 1 decode steps (their past is s ... s + n-2)."""
    return prompt_tokens + np.maximum(new_tokens - 2, 0) / 2


def wait_counts(
    num_requests: int, prefill_micro_batch: int, decode_micro_batch: int
) -> tuple[int, ...]:
    """For each decode micro-batch, the prefill micro-batches up to the last of its requests."""
    ends = range(decode_micro_batch, num_requests + decode_micro_batch, decode_micro_batch)
    return tuple(-(-min(end, num_requests) // prefill_micro_batch) for end in ends)


def starts(waits: tuple[int, ...]) -> tuple[int, ...]:
    """Decode micro-batches at which the longest chain may enter decoding, the last one left out.

    `waits` as `wait_counts` gives them. A chain from micro-batch i on loses i jobs and gains
    waits[i] prefill jobs, so only corners of the upper hull of (i, waits[i]) count; and the first
    one that waits for the whole prefill, whose last micro-batch may be smaller.
    """
    inner = waits[:-1] or waits
    hull: list[int] = []
    for i in (inner.index(wait) for wait in sorted(set(inner)) if wait < waits[-1]):
        while len(hull) > 1 and not _bends(hull[-2], hull[-1], i, waits):
            hull.pop()
        hull.append(i)
    return (*hull, inner.index(waits[-1])) if waits[-1] in inner else tuple(hull)


def batch_s(
    times: PhaseTimes, steps: np.ndarray, waits: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds until all first tokens are back, and until all tokens are, for each batch.

    `steps` [batches]: decode steps, 0 and more. `waits`: for each decode micro-batch the number of
    prefill micro-batches it waits for, as `wait_counts` gives them; the last waits for all.
    """
    num_prefills = waits[-1]
    ends = _prefill_ends(times.prefill_once, times.prefill_every, num_prefills)
    decode = _steps(times.decode_once, times.decode_every, len(waits))
    total = _onwards(ends, decode, steps)
    for start in starts(waits):
        ready = _tokens_back(times.prefill_once, ends, waits[start], num_prefills)
        total = np.maximum(total, np.where(steps > 0, ready + _loops(decode, steps, start), 0))
    if len(waits) > 1:
        total = np.maximum(total, np.where(steps > 0, _from_last(ends[-1], decode, steps), 0))
    return ends[-1], total


def _bends(left: int, middle: int, right: int, waits: tuple[int, ...]) -> bool:
    """Whether the middle point lies above the line between the others."""
    rise = (waits[middle] - waits[left]) * (right - left)
    return rise > (waits[right] - waits[left]) * (middle - left)


# ---- chains through the prefill


def _prefill_ends(once: np.ndarray, every: np.ndarray, count: int) -> np.ndarray:
    """When each actor has done its last prefill micro-batch.

    The chain goes down with the first micro-batch, stays with an actor i until only the last is
    missing, goes down on to an actor k <= j, and from there with the last one:
    max over i <= k <= j of sum_{..k} once + (count - 2) once_i + sum_{k..j} last.
    """
    last = every - (count - 1) * once
    last_but_one = once.cumsum(axis=0) + (count - 2) * np.maximum.accumulate(once)
    last_down = last.cumsum(axis=0)
    return last_down + np.maximum.accumulate(last_but_one - (last_down - last))


def _tokens_back(once: np.ndarray, ends: np.ndarray, wait: int, count: int) -> np.ndarray:
    """When the tokens of the first `wait` of `count` prefill micro-batches are back."""
    return ends[-1] if wait == count else once.sum(axis=0) + (wait - 1) * once.max(axis=0)


# ---- chains through the decode steps


@dataclass(frozen=True)
class _Steps:
    """A decode step of each actor, [actors, batches].

    `last`: its last micro-batch. `before`: the first micro-batch on all earlier actors. `after`:
    what follows once the actor has done its last job.
    """

    once: np.ndarray
    every: np.ndarray
    last: np.ndarray
    before: np.ndarray
    after: np.ndarray

    @property
    def loop_s(self) -> np.ndarray:
        """One micro-batch on all actors, [batches]."""
        return self.once.sum(axis=0)


def _steps(once: np.ndarray, every: np.ndarray, count: int) -> _Steps:
    """With `after`: down with the last micro-batch but one to an actor k, then with the last.

    max over k >= j of sum_{j<..k} once + sum_{k..} last, less last_j.
    """
    last = every - (count - 1) * once
    down = once.cumsum(axis=0)
    rest = _sums_on(last)
    after = rest if count == 1 else _maxima_on(down + rest) - down
    return _Steps(once, every, last, down - once, after - last)


def _onwards(ends: np.ndarray, decode: _Steps, steps: np.ndarray) -> np.ndarray:
    """The end of `steps` more steps where each actor is free at `ends`.

    An actor j goes on without a gap, and its first micro-batch goes down; some actor k >= j does
    all of its jobs, or there are loops: max_j (ends_j + sum_{j..} once) + loops.
    """
    stay = _maxima_on(decode.before + steps * decode.every + decode.after) - decode.before
    total = np.where(steps > 0, (ends + stay).max(axis=0), ends[-1])
    first = (ends + _sums_on(decode.once)).max(axis=0)
    return np.maximum(total, np.where(steps > 1, first + _loops(decode, steps - 1, 0), 0))


def _loops(decode: _Steps, steps: np.ndarray, start: int) -> np.ndarray:
    """From micro-batch `start`, not the last, at the first actor to the end of `steps` steps.

    One step is an actor's own, the others are loops, or its own too where that is longer.
    """
    own = decode.before + decode.every - start * decode.once + decode.after
    return (own + (steps - 1) * np.maximum(decode.loop_s, decode.every)).max(axis=0)


def _from_last(ready: np.ndarray, decode: _Steps, steps: np.ndarray) -> np.ndarray:
    """From the last micro-batch, which waits for the whole prefill: it loops, or others follow."""
    others = _onwards(ready + decode.last.cumsum(axis=0), decode, steps - 1)
    return np.maximum(ready + steps * decode.last.sum(axis=0), others)


def _sums_on(values: np.ndarray) -> np.ndarray:
    """Of each actor and all after it."""
    return values[::-1].cumsum(axis=0)[::-1]


def _maxima_on(values: np.ndarray) -> np.ndarray:
    """Of each actor and all after it."""
    return np.maximum.accumulate(values[::-1])[::-1]
