"""The recurrence that plays a run, against a queue of events; what every run must hold to.

`Events` is a simulation in the plainest form: servers that take the next job that came, one end
after another. It shares no code with the recurrence but the schedule that both ask.
"""

import heapq
from collections import Counter, deque
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpq.costs.simulate import Seconds, SimulatedRun, simulate_schedule
from llmpq.job import Item, Job
from llmpq.schedule import Schedule
from llmpq.workload import chunk_tokens, lanes

Lengths = Sequence[tuple[int, int]]


class Case:
    """A random run: requests, sizes, and seconds that depend on phase, rows and columns."""

    def __init__(self, seed: int, whole: bool = False, equal: bool = False) -> None:
        rng = np.random.default_rng(seed)
        count = int(rng.integers(1, 40))
        most = rng.integers(1, [60, 25])
        self.lengths = [tuple(map(int, rng.integers(1, most + 1))) for _ in range(count)]
        if equal:
            self.lengths = self.lengths[:1] * count
        self.num_stages = int(rng.integers(1, 5))
        self.batch = int(rng.integers(1, min(count, 12) + 1))
        self.sizes = tuple(int(n) for n in rng.integers(1, self.batch + 1, 2))
        self.fixed = rng.integers(0, 5, (2, 2 * self.num_stages)) * 1.0
        self.fixed[:, ::2] += 1  # stages always take time
        self.growing = rng.integers(0, 3, (2, 2 * self.num_stages)) * (1.0 if whole else 0.01)

    def schedule(self, refill: bool = True) -> Schedule:
        prefill, decode = self.sizes
        items = [Item(i, *lengths) for i, lengths in enumerate(self.lengths)]
        shapes = lanes(self.lengths, self.batch, decode)
        most = chunk_tokens(self.lengths)
        return Schedule(shapes, prefill, most, self.num_stages, iter(items), refill)

    def seconds(self, job: Job) -> list[float]:
        size = job.rows * (job.end - job.begin)
        return list((self.fixed + size * self.growing)[int(job.prefill)])

    def simulate_schedule(self, refill: bool = True) -> SimulatedRun:
        return simulate_schedule(self.schedule(refill), self.seconds, 2 * self.num_stages)


class Events:
    """First come, first served. `spans`: (job, server) to (start, end)."""

    def __init__(self, schedule: Schedule, seconds: Seconds, num_servers: int) -> None:
        self.schedule, self.seconds, self.last = schedule, seconds, num_servers - 1
        self.queues: list[deque[int]] = [deque() for _ in range(num_servers)]
        self.works = [False] * num_servers
        self.needed: list[Sequence[float]] = []
        self.spans: dict[tuple[int, int], tuple[float, float]] = {}
        self.heap: list[tuple[float, int, int]] = []  # ends of jobs at servers
        self.go_on(0.0)
        while self.heap:
            now = self.heap[0][0]
            while self.heap and self.heap[0][0] == now:
                self.ended(*heapq.heappop(self.heap))
            self.go_on(now)

    def ended(self, now: float, server: int, job: int) -> None:
        self.works[server] = False
        if server == self.last:
            self.schedule.returned((False,) * len(self.schedule.oldest.members))
        else:
            self.queues[server + 1].append(job)
            self.take(server + 1, now)
        self.take(server, now)

    def go_on(self, now: float) -> None:
        """The first stage decides once all that happens now has happened."""
        if self.works[0] or (job := self.schedule.next()) is None:
            return
        self.queues[0].append(len(self.needed))
        self.needed.append(self.seconds(job))
        self.take(0, now)

    def take(self, server: int, now: float) -> None:
        if self.works[server] or not self.queues[server]:
            return
        job = self.queues[server].popleft()
        self.works[server] = True
        self.spans[job, server] = now, now + self.needed[job][server]
        heapq.heappush(self.heap, (self.spans[job, server][1], server, job))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_the_recurrence_gives_what_a_queue_of_events_gives(
    seed: int, whole: bool, refill: bool
) -> None:
    case = Case(seed, whole)
    simulated = case.simulate_schedule(refill)
    spans = Events(case.schedule(refill), case.seconds, 2 * case.num_stages).spans
    assert simulated.start_s.size == len(spans)
    for (job, server), (start, end) in spans.items():
        mine = simulated.start_s[job, server], simulated.end_s[job, server]
        assert mine == pytest.approx((start, end), abs=1e-9)
    assert simulated.total_s == pytest.approx(max(end for _, end in spans.values()), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_every_request_gets_its_tokens_once(seed: int, refill: bool) -> None:
    case = Case(seed)
    got: Counter[int] = Counter()
    computed: Counter[int] = Counter()
    ended: list[int] = []

    def seconds(job: Job) -> list[float]:
        for member in job.members:
            got[member.number] += job.chooses
            if job.prefill:
                computed[member.number] += min(job.end, member.prompt_tokens) - job.begin
        return case.seconds(job)

    simulated = simulate_schedule(case.schedule(refill), seconds, 2 * case.num_stages, ended.append)
    assert [got[i] for i in range(len(case.lengths))] == [new for _, new in case.lengths]
    assert [computed[i] for i in range(len(case.lengths))] == [prompt for prompt, _ in case.lengths]
    assert ended == sorted(ended) and len(ended) == len(simulated.jobs)
    assert int(simulated.jobs.requests[simulated.jobs.step > 0].sum()) == sum(
        new - 1 for _, new in case.lengths
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_the_prefill_ends_when_every_request_has_its_first_token(seed: int, refill: bool) -> None:
    """Newcomers in the slots of ended requests count, and so do the chunks of long prompts."""
    case = Case(seed)
    first_job: dict[int, int] = {}
    jobs: list[Job] = []

    def seconds(job: Job) -> list[float]:
        if job.chooses:
            for member in job.members:
                first_job.setdefault(member.number, len(jobs))
        jobs.append(job)
        return case.seconds(job)

    simulated = simulate_schedule(case.schedule(refill), seconds, 2 * case.num_stages)
    assert len(first_job) == len(case.lengths)
    assert simulated.prefill_s == max(simulated.end_s[job, -1] for job in first_job.values())
    assert 0 < simulated.prefill_share <= 1


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_servers_do_one_job_at_a_time_and_in_one_order(seed: int) -> None:
    case = Case(seed)
    simulated = case.simulate_schedule()
    assert (simulated.start_s[1:] >= simulated.end_s[:-1]).all()
    assert (simulated.start_s[:, 1:] >= simulated.end_s[:, :-1]).all()
    waits = simulated.jobs.parent >= 0
    back = simulated.end_s[simulated.jobs.parent[waits], -1]
    assert (simulated.start_s[waits, 0] >= back).all()
    assert simulated.total_s >= simulated.busy_s.max()
    assert simulated.prefill_s + simulated.decode_s == pytest.approx(simulated.total_s)
    assert 0 <= simulated.prefill_s <= simulated.total_s


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_one_stage_is_never_idle(seed: int) -> None:
    case = Case(seed)
    case.num_stages, case.fixed, case.growing = 1, case.fixed[:, :2], case.growing[:, :2]
    case.fixed[:, 1] = case.growing[:, 1] = 0.0
    simulated = case.simulate_schedule()
    assert simulated.total_s == pytest.approx(simulated.busy_s[0])


# Two stages and a link of 2, 1 and 3 s, 1 s back; one prefill, then steps of 1, 1, 2 and 1 s.
#              stage 0   link   stage 1   back
#   prefill      0-2     2-3      3-6     6-7
#   step 1       7-8     8-9      9-11   11-12
#   step 2      12-13   13-14    14-16   16-17
def test_one_request_on_paper() -> None:
    schedule = Schedule(lanes([(4, 3)], 1, 1), 1, 4, 2, iter([Item(0, 4, 3)]))
    simulated = simulate_schedule(
        schedule, lambda job: (2, 1, 3, 1) if job.prefill else (1, 1, 2, 1), 4
    )
    assert simulated.start_s.tolist() == [[0, 2, 3, 6], [7, 8, 9, 11], [12, 13, 14, 16]]
    assert simulated.total_s == 17 and simulated.busy_s.tolist() == [4, 3, 7, 3]
    assert simulated.prefill_s == 7 and simulated.busy_share == 7 / 14
    assert simulated.prefill_share == pytest.approx(3 / 7)
    jobs = simulated.jobs
    assert (jobs.step.tolist(), jobs.parent.tolist()) == ([0, 1, 2], [-1, 0, 1])
    assert (jobs.tokens.tolist(), jobs.past.tolist()) == ([4, 1, 1], [0, 4, 5])


def test_a_faster_stage_hardly_ever_makes_a_run_slower() -> None:
    """Never would be wrong: earlier tokens may start a half-empty prefill or step."""
    ratios = []
    for seed in range(200):
        case, server = Case(seed), 2 * (seed % 4)
        before = case.simulate_schedule().total_s
        case.fixed[:, server % (2 * case.num_stages)] *= 0.7
        ratios.append(case.simulate_schedule().total_s / before)
    found = np.array(ratios)
    assert found.mean() < 0.95 and np.mean(found > 1 + 1e-9) < 0.05 and found.max() < 1.15


def test_refilling_places_saves_time_where_lengths_differ() -> None:
    cases = [case for case in map(Case, range(200)) if len(case.lengths) >= 2 * case.batch]
    ratios = np.array(
        [
            case.simulate_schedule().total_s / case.simulate_schedule(refill=False).total_s
            for case in cases
        ]
    )
    assert np.median(ratios) < 0.9 and np.mean(ratios > 1 + 1e-9) < 0.1


def test_refilling_changes_little_where_lengths_are_equal() -> None:
    cases = [Case(seed, equal=True) for seed in range(200)]
    ratios = np.array(
        [
            case.simulate_schedule().total_s / case.simulate_schedule(refill=False).total_s
            for case in cases
        ]
    )
    assert np.median(ratios) == pytest.approx(1, abs=0.03) and ratios.max() < 1.25
