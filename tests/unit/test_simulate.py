"""The recurrence that plays a batch, against a queue of events and against bare constraints.

`events` is a simulation in the plainest form: servers that take the next job that came, one end
after another. `relaxed` knows no order of time at all: it raises starts until no constraint is
broken. Both share no code with the recurrence.
"""

import heapq
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpq.costs.simulate import Batch, schedule, simulate
from llmpq.costs.timeline import wait_counts

Job = tuple[int, int]  # step (0: prefill), micro-batch


def seconds(batch: Batch, server: int, job: Job) -> float:
    step, i = job
    return float(batch.decode[server, i, step - 1] if step else batch.prefill[server, i])


def events(batch: Batch) -> dict[tuple[int, Job], tuple[float, float]]:
    """(server, job) to (start, end); first come, first served."""
    servers, num_prefills = batch.prefill.shape
    ready = np.zeros(servers) if batch.ready is None else batch.ready
    queues: list[deque[Job]] = [deque() for _ in range(servers)]
    heap: list[tuple[float, int, str, int, Job | None]] = []
    working, spans = [False] * servers, {}
    count = 0

    def push(time: float, what: str, server: int, job: Job | None) -> None:
        nonlocal count
        heapq.heappush(heap, (time, count, what, server, job))
        count += 1

    def go_on(server: int, now: float) -> None:
        if not working[server] and queues[server] and now >= ready[server]:
            job = queues[server].popleft()
            working[server] = True
            spans[server, job] = now, now + seconds(batch, server, job)
            push(spans[server, job][1], "end", server, job)

    for server in range(servers):
        push(float(ready[server]), "ready", server, None)
    for i in range(num_prefills):
        push(0.0, "come", 0, (0, i))
    while heap:
        now, _, what, server, job = heapq.heappop(heap)
        if what == "come":
            queues[server].append(job)
        elif what == "end":
            working[server] = False
            for follower in following(batch, server, job):
                push(now, "come", (server + 1) % servers, follower)
        go_on(server, now)
    return spans


def following(batch: Batch, server: int, job: Job) -> list[Job]:
    """What the end of a job at a server lets the next server have."""
    step, i = job
    if server < batch.prefill.shape[0] - 1:
        return [job]
    if step:
        return [(step + 1, i)] if step < batch.num_steps[i] else []
    return [(1, k) for k, w in enumerate(batch.waits) if w == i + 1 and batch.num_steps[k]]


def relaxed(batch: Batch) -> np.ndarray:
    """Ends [jobs, servers] of the schedule by raising starts until every constraint holds."""
    jobs = schedule(batch.prefill.shape[1], batch.waits, batch.num_steps)
    servers = batch.prefill.shape[0]
    order = [(int(s), int(i)) for s, i in zip(jobs.step, jobs.micro_batch, strict=True)]
    needed = np.array([[seconds(batch, a, job) for a in range(servers)] for job in order])
    ready = np.zeros(servers) if batch.ready is None else batch.ready
    start = np.tile(ready, (len(order), 1))
    while True:
        end, before = start + needed, start.copy()
        start[1:] = np.maximum(start[1:], end[:-1])
        start[:, 1:] = np.maximum(start[:, 1:], end[:, :-1])
        late = jobs.parent >= 0
        start[late, 0] = np.maximum(start[late, 0], end[jobs.parent[late], -1])
        for link in range(1, servers - 1, 2):  # its receiver took the message before, or is there
            taken = np.concatenate([[ready[link + 1]], start[:-1, link + 1]])
            start[:, link] = np.maximum(start[:, link], taken)
        if (start == before).all():
            return start + needed


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """1 .. 4 stages; whole, fractional and zero seconds; requests that end early."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    servers = 2 * draw(st.integers(1, 4))
    num_requests = draw(st.integers(1, 12))
    sizes = draw(st.integers(1, num_requests)), draw(st.integers(1, num_requests))
    waits = wait_counts(num_requests, *sizes)
    most = draw(st.integers(0, 6))
    steps = tuple(int(n) for n in rng.integers(0, most + 1, len(waits)))
    whole = draw(st.booleans())

    def times(*shape: int) -> np.ndarray:
        found = rng.integers(0, 5, shape) if whole else rng.uniform(0, 3, shape)
        return np.asarray(found, dtype=float)

    ready = times(servers) if draw(st.booleans()) else None
    prefill, decode = times(servers, waits[-1]), times(servers, len(waits), max(most, 1))
    return Batch(prefill, decode, waits, steps, ready)


@settings(max_examples=300, deadline=None)
@given(batches())
def test_the_recurrence_gives_what_a_queue_of_events_gives(batch: Batch) -> None:
    played, spans = simulate(batch), events(batch)
    assert played.start_s.size == len(spans)
    for k, (step, i) in enumerate(zip(played.jobs.step, played.jobs.micro_batch, strict=True)):
        for server in range(played.start_s.shape[1]):
            mine = played.start_s[k, server], played.end_s[k, server]
            assert mine == pytest.approx(spans[server, (int(step), int(i))], abs=1e-9)
    assert played.total_s == pytest.approx(max(end for _, end in spans.values()), abs=1e-9)


@settings(max_examples=150, deadline=None)
@given(batches())
def test_links_wait_for_the_one_buffer_of_their_receiver(batch: Batch) -> None:
    fields = batch.prefill, batch.decode, batch.waits, batch.steps, batch.ready
    played = simulate(Batch(*fields, one_ahead=True))
    assert played.end_s == pytest.approx(relaxed(batch), abs=1e-9)
    assert (played.end_s >= simulate(batch).end_s - 1e-9).all()


def test_a_message_waits_until_its_receiver_has_begun_with_the_one_before() -> None:
    # Three prefills; the stages take 1 and 5 s, the link 2 s: it could deliver at 3, 5 and 7.
    prefill = np.array([[1.0] * 3, [2.0] * 3, [5.0] * 3, [0.0] * 3])
    batch = Batch(prefill, np.zeros((4, 1, 1)), (3,), (0,), one_ahead=True)
    played = simulate(batch)
    assert played.start_s[:, 2].tolist() == [3, 8, 13]
    assert played.start_s[:, 1].tolist() == [1, 3, 8]


def test_a_micro_batch_whose_requests_are_done_takes_no_more_steps() -> None:
    jobs = schedule(2, (1, 2, 2), (2, 0, 1))
    pairs = list(zip(jobs.step.tolist(), jobs.micro_batch.tolist(), strict=True))
    assert pairs == [(0, 0), (0, 1), (1, 0), (1, 2), (2, 0)]
    assert jobs.parent.tolist() == [-1, -1, 0, 1, 2]


def test_steps_and_ready_times_must_fit() -> None:
    prefill, decode = np.ones((2, 1)), np.ones((2, 1, 3))
    with pytest.raises(ValueError, match="steps"):
        Batch(prefill, decode, (1,), steps=(4,))
    with pytest.raises(ValueError, match="steps"):
        Batch(prefill, decode, (1,), steps=(1, 1))
    with pytest.raises(ValueError, match="ready"):
        Batch(prefill, decode, (1,), ready=np.zeros(3))
