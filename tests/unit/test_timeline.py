"""The time of a batch in closed form against the schedule that it is of, played job by job.

Two simulations are worked out on paper below; all else compares the two, which share no code.
How near both are to runs that refill places: test_simulate_run. Random cases are seeded: stages
within 10x of each other in prefill and decode, their ratio of prefill to decode too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from fixed_order import Batch, Played, simulate
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpq.costs.timeline import PhaseTimes, batch_s, starts, wait_counts

# ---- the simulation, on paper


def constant(
    prefill: Sequence[float],
    decode: Sequence[float],
    num_prefills: int,
    steps: int,
    waits: tuple[int, ...],
) -> Batch:
    """Every server's micro-batches are all alike."""
    ones = np.ones((len(waits), steps))
    return Batch(
        np.outer(prefill, np.ones(num_prefills)),
        np.multiply.outer(np.array(decode, dtype=float), ones),
        waits,
    )


def times(played: Played, server: int) -> list[tuple[float, float]]:
    """(start, end) of every job of a server."""
    return [(start[server], end[server]) for start, end in played.spans]


# Two stages, the link between them, the way back: two micro-batches, two steps.
#   prefill      stage 0   link    stage 1  back     (2, 1, 3 and 1 s)
#     1           0-2      2-3      3-6     6-7
#     2           2-4      4-5      6-9     9-10
#   step 1                                           (1, 1, 2 and 1 s)
#     1           7-8      8-9      9-11   11-12     stage 1 is just free again
#     2          10-11    11-12    12-14   14-15
#   step 2
#     1          12-13    13-14    14-16   16-17
#     2          15-16    16-17    17-19   19-20
def test_decoding_starts_while_the_prefill_still_runs() -> None:
    batch = constant((2, 1, 3, 1), (1, 1, 2, 1), num_prefills=2, steps=2, waits=(1, 2))
    result = simulate(batch)
    assert (result.first_tokens_s, result.total_s) == (10, 20)
    assert times(result, 0) == [(0, 2), (2, 4), (7, 8), (10, 11), (12, 13), (15, 16)]
    assert times(result, 2) == [(3, 6), (6, 9), (9, 11), (12, 14), (14, 16), (17, 19)]


# The same, but both decode micro-batches hold a request of the second prefill micro-batch.
#   step 1       stage 0   link    stage 1  back
#     1          10-11    11-12    12-14   14-15
#     2          11-12    12-13    14-16   16-17
#   step 2
#     1          15-16    16-17    17-19   19-20
#     2          17-18    18-19    19-21   21-22
def test_decoding_waits_for_all_of_its_requests() -> None:
    batch = constant((2, 1, 3, 1), (1, 1, 2, 1), num_prefills=2, steps=2, waits=(2, 2))
    assert (simulate(batch).first_tokens_s, simulate(batch).total_s) == (10, 22)


def test_one_device_does_one_job_after_another() -> None:
    batch = Batch(
        prefill=np.array([[5.0, 2.0], [0.0, 0.0]]),
        decode=np.array([[[1.0, 2.0], [3.0, 4.0]], np.zeros((2, 2))]),
        waits=(1, 2),
    )
    result = simulate(batch)
    assert (result.first_tokens_s, result.total_s) == (7, 17)
    assert times(result, 0) == [(0, 5), (5, 7), (7, 8), (8, 11), (11, 13), (13, 17)]


def test_a_batch_of_one_token_ends_with_its_prefill() -> None:
    batch = constant((1, 2), (1, 1), num_prefills=3, steps=0, waits=(1, 2, 3))
    result = simulate(batch)
    assert result.first_tokens_s == result.total_s == 7  # 1 + 3 x 2
    assert times(result, 0) == [(0, 1), (1, 2), (2, 3)]


# ---- random batches


@dataclass(frozen=True)
class Range:
    """What a random batch may be like; all times are relative."""

    equal: bool = False  # micro-batches of one size
    powers: bool = False  # micro-batches of powers of two
    links: tuple[float, float] = (0.001, 0.3)  # in mean stage times
    overhead: tuple[float, float] = (0.5, 0.95)  # what a smaller decode micro-batch does not save
    growth: float = 0.0  # of a stage's time with each step, at most; relative to the first
    max_steps: int = 80


@dataclass(frozen=True)
class Case:
    """A random batch: for the simulation, and for the closed form."""

    batch: Batch
    times: PhaseTimes
    steps: int


def random_case(rng: np.random.Generator, within: Range) -> Case:
    """A batch of 1 .. 12 stages."""
    stages = int(rng.integers(1, 13))
    num_requests, prefill_size, decode_size = random_sizes(rng, within)
    prefill_parts = sizes(num_requests, prefill_size)
    decode_parts = sizes(num_requests, decode_size)
    steps = int(np.exp(rng.uniform(0, np.log(within.max_steps))))
    full_prefill, full_decode = random_servers(rng, stages, within.links)
    prefill = by_size(full_prefill, rng.uniform(0, 0.5, 2 * stages), prefill_parts)
    decode = by_size(full_decode, rng.uniform(*within.overhead, 2 * stages), decode_parts)
    growth = np.where(is_stage(stages), within.growth * rng.uniform(0.5, 1, 2 * stages), 0)
    grown = 1 + np.outer(growth, np.arange(steps))
    seconds = decode[:, :, None] * grown[:, None, :]
    waits = wait_counts(num_requests, prefill_size, decode_size)
    return Case(Batch(prefill, seconds, waits), phase_times(prefill, seconds.mean(axis=2)), steps)


def random_sizes(rng: np.random.Generator, within: Range) -> tuple[int, int, int]:
    """Requests, prefill and decode micro-batch."""
    if within.powers:
        prefill, decode = 2 ** int(rng.integers(0, 5)), 2 ** int(rng.integers(0, 6))
    else:
        prefill, decode = int(rng.integers(1, 9)), int(rng.integers(1, 17))
    if within.equal:
        both = int(np.lcm(prefill, decode))
        return both * int(rng.integers(1, max(2, 64 // both))), prefill, decode
    num_requests = int(rng.integers(1, 65))
    return num_requests, min(prefill, num_requests), min(decode, num_requests)


def random_servers(
    rng: np.random.Generator, stages: int, links: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of a full micro-batch of prefill and of decode, [servers]."""
    while True:
        decode = 10 ** rng.uniform(0, 1, stages)
        prefill = decode * 10 ** (
            rng.uniform(-0.3, 1.7) + rng.uniform(0, rng.uniform(0, 1), stages)
        )
        if prefill.max() <= 10 * prefill.min():
            break
    both = []
    for seconds in (prefill, decode):
        servers = seconds.mean() * np.exp(rng.uniform(*np.log(links), 2 * stages))
        servers[::2] = seconds
        both.append(servers)
    both[0][-1] = 0.0
    both[1][-1] = 0.0 if stages == 1 else 0.02 * both[1][-1]
    return both[0], both[1]


def is_stage(stages: int) -> np.ndarray:
    """Which servers are stages."""
    return np.arange(2 * stages) % 2 == 0


def sizes(num_requests: int, micro_batch: int) -> np.ndarray:
    """Requests of every micro-batch."""
    return np.array(
        [min(micro_batch, num_requests - i) for i in range(0, num_requests, micro_batch)]
    )


def by_size(full: np.ndarray, overhead: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """[servers, micro-batches]: a smaller one saves its share of what is no overhead."""
    share = overhead[:, None] + (1 - overhead[:, None]) * parts / parts[0]
    return full[:, None] * share


def phase_times(prefill: np.ndarray, decode: np.ndarray) -> PhaseTimes:
    """For one batch, from [servers, micro-batches]."""
    return PhaseTimes(
        prefill[:, :1],
        prefill.sum(axis=1, keepdims=True),
        decode[:, :1],
        decode.sum(axis=1, keepdims=True),
    )


def errors(within: Range, count: int = 150, seed: int = 0) -> np.ndarray:
    """Relative errors of the closed form's total; its prefill must always be exact."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        case = random_case(rng, within)
        result = simulate(case.batch)
        prefill, total = batch_s(case.times, np.array([case.steps]), case.batch.waits)
        assert prefill[0] == pytest.approx(result.first_tokens_s, rel=1e-9)
        found.append(total[0] / result.total_s - 1)
    return np.array(found)


SLOW_LINKS = (0.5, 3.0)


@pytest.mark.parametrize("links", [Range.links, SLOW_LINKS])
@pytest.mark.parametrize("powers", [True, False])
def test_exact_for_micro_batches_of_one_size(links: tuple[float, float], powers: bool) -> None:
    found = errors(Range(equal=True, powers=powers, links=links))
    assert np.abs(found).max() < 1e-9


@pytest.mark.parametrize("links", [Range.links, SLOW_LINKS])
@pytest.mark.parametrize("powers", [True, False])
def test_a_smaller_last_one_within_one_percent_and_never_above(
    links: tuple[float, float], powers: bool
) -> None:
    found = errors(Range(powers=powers, links=links))
    assert found.min() > -0.01 and found.max() < 1e-9
    assert np.mean(np.abs(found) < 1e-9) > 0.95


@pytest.mark.parametrize("equal", [True, False])
def test_growing_caches_within_one_percent(equal: bool) -> None:
    found = errors(Range(equal=equal, growth=0.003))
    assert np.abs(found).max() < 0.01
    assert np.median(np.abs(found)) < 1e-4


# ---- chains that hypothesis looks for

SECONDS = st.integers(0, 20)


@st.composite
def equal_cases(draw: st.DrawFn) -> tuple[Batch, PhaseTimes, int]:
    """Any whole seconds, any counts, any waits that a batch can have."""
    servers = draw(st.integers(1, 4))
    prefill = draw(st.lists(SECONDS, min_size=servers, max_size=servers))
    decode = draw(st.lists(SECONDS, min_size=servers, max_size=servers))
    prefill_size, decode_size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    num_requests = int(np.lcm(prefill_size, decode_size)) * draw(st.integers(1, 3))
    waits = wait_counts(num_requests, prefill_size, decode_size)
    steps = draw(st.integers(0, 6))
    batch = constant(prefill, decode, waits[-1], steps, waits)
    times = phase_times(batch.prefill, np.outer(decode, np.ones(len(waits))))
    return batch, times, steps


@settings(max_examples=300, deadline=None)
@given(equal_cases())
def test_exact_for_any_times_of_equal_micro_batches(case: tuple[Batch, PhaseTimes, int]) -> None:
    batch, times, steps = case
    result = simulate(batch)
    prefill, total = batch_s(times, np.array([steps]), batch.waits)
    assert prefill[0] == pytest.approx(result.first_tokens_s)
    assert total[0] == pytest.approx(result.total_s)


# ---- the closed form itself


def test_a_loop_of_equal_stages() -> None:
    """Four stages of 1 s: a step takes max(4, micro-batches), whichever is longer."""
    for count, step in ((1, 4), (2, 4), (4, 4), (6, 6)):
        times = phase_times(np.ones((4, count)), np.ones((4, count)))
        waits = tuple(range(1, count + 1))
        short, long = (batch_s(times, np.array([k]), waits)[1][0] for k in (10, 30))
        assert long - short == 20 * step


def test_one_device_is_never_idle() -> None:
    times = phase_times(np.array([[5.0, 5.0, 2.0]]), np.array([[3.0, 1.0]]))
    prefill, total = batch_s(times, np.array([7]), (2, 3))
    assert (prefill[0], total[0]) == (12, 12 + 7 * 4)


def test_batches_are_priced_side_by_side() -> None:
    rng = np.random.default_rng(1)
    once = rng.uniform(1, 2, (2, 5, 6))
    times = PhaseTimes(once[0], 2.5 * once[0], once[1], 3.5 * once[1])
    steps, waits = np.array([0, 1, 2, 3, 10, 100]), (1, 2, 3, 3)
    prefill, total = batch_s(times, steps, waits)
    assert (total[1:] > prefill[1:]).all() and total[0] == prefill[0]
    for i, k in enumerate(steps):
        columns = (times.prefill_once, times.prefill_every, times.decode_once, times.decode_every)
        alone = batch_s(PhaseTimes(*(c[:, i : i + 1] for c in columns)), np.array([k]), waits)
        assert (alone[0][0], alone[1][0]) == pytest.approx((prefill[i], total[i]))


def test_wait_counts_hold_all_requests_of_a_micro_batch() -> None:
    assert wait_counts(8, 2, 2) == (1, 2, 3, 4)
    assert wait_counts(8, 4, 2) == (1, 1, 2, 2)
    assert wait_counts(8, 2, 4) == (2, 4)
    assert wait_counts(10, 4, 3) == (1, 2, 3, 3)
    assert wait_counts(7, 3, 16) == (3,)


def test_starts_are_the_corners_of_what_decoding_waits_for() -> None:
    assert starts((4,)) == (0,)
    assert starts((1, 2, 3, 4)) == (0, 2)  # the last one, smaller perhaps, is priced apart
    assert starts((1, 1, 2, 2, 3, 3)) == (0, 2, 4)
    assert starts((1, 1, 1, 2, 3, 4, 4)) == (0, 4, 5)
    assert starts((2, 2)) == (0,)
