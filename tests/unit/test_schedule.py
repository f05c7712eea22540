"""The schedule keeps its promises whatever comes back when: no slot is used twice."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpq.job import Item, Job, LaneShape, padded_width
from llmpq.schedule import Schedule
from llmpq.workload import chunk_tokens, lanes, lanes_within

Token = tuple[int, int]  # number of the request, place in its text


@dataclass
class Pipeline:
    """Plays the stages: a cache that remembers which token lies in which column."""

    shapes: tuple[LaneShape, ...]
    items: dict[int, Item]
    columns: dict[tuple[int, int], list[Token | None]] = field(init=False)

    def __post_init__(self) -> None:
        self.columns = {
            (lane, row): [None] * shape.tokens
            for lane, shape in enumerate(self.shapes)
            for row in range(shape.rows)
        }

    def do(self, job: Job) -> None:
        """Moves and writes what the job says, and checks that all it sees is there."""
        for lane, source, target, end in job.moves:
            self.columns[lane, target][:end] = self.columns[lane, source][:end]
        assert len({(member.lane, member.row) for member in job.members}) == len(job.members)
        for member in job.members:
            columns = self.columns[member.lane, member.row]
            assert member.prompt_tokens == self.items[member.number].prompt_tokens
            first, end = self._computed(job, member)
            assert end < len(columns)  # the last column is where rows write that take no part
            for column in range(first, end):
                columns[column] = (member.number, column)
            assert columns[:end] == [(member.number, column) for column in range(end)]

    def _computed(self, job: Job, member) -> tuple[int, int]:
        """Which tokens of a request a job computes."""
        if not job.prefill:
            column = member.prompt_tokens + member.position - 1
            assert member.column == column and member.row < job.rows
            assert column < job.end <= self.shapes[member.lane].tokens and job.begin == 0
            return column, column + 1
        if job.begin or not job.chooses:
            assert len(job.members) == 1
            return job.begin, job.end
        longest = max(m.prompt_tokens for m in job.members)
        assert longest <= job.end <= 1.125 * longest + 1 and job.begin == 0
        return 0, member.prompt_tokens


def run(schedule: Schedule, pipeline: Pipeline, rnd: random.Random, stop: float) -> dict[int, int]:
    """To the end; tokens come back at random moments. New tokens of every request."""
    num_new = dict.fromkeys(pipeline.items, 0)
    ended: set[int] = set()
    while not schedule.is_done:
        job = schedule.next()
        if job is not None:
            pipeline.do(job)
        if schedule.num_in_flight and (job is None or rnd.random() < 0.4):
            oldest = schedule.oldest
            ends = schedule.returned([rnd.random() < stop for _ in oldest.members])
            for member, end in zip(oldest.members, ends, strict=True):
                if member.number in ended:  # had stopped while this job was under way
                    assert schedule.ahead > 1 and not end
                    continue
                num_new[member.number] += oldest.chooses
                ended |= {member.number} if end else set()
        else:
            assert job is not None, "nothing is under way and nothing is given out"
    assert ended == set(pipeline.items)
    return num_new


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=40),
    batch=st.integers(1, 16),
    sizes=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    num_stages=st.integers(1, 4),
    chunk=st.sampled_from([16, 64]),
    window=st.sampled_from([2, 4096]),
    refill=st.booleans(),
    ahead=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_every_request_gets_its_tokens_where_it_expects_them(
    lengths, batch, sizes, num_stages, chunk, window, refill, ahead, seed
):
    items = {i: Item(i, *pair) for i, pair in enumerate(lengths)}
    p, q = (min(size, batch) for size in sizes)
    shapes = lanes(lengths, batch, q)
    schedule = Schedule(shapes, p, chunk, num_stages, iter(items.values()), refill, window, ahead)
    num_new = run(schedule, Pipeline(shapes, items), random.Random(seed), stop=0.0)
    assert num_new == {i: new for i, (_, new) in enumerate(lengths)}
    assert schedule.tokens_held == 0


@given(seed=st.integers(0, 300), refill=st.booleans(), ahead=st.integers(1, 2))
@settings(max_examples=50, deadline=None)
def test_requests_may_end_early(seed, refill, ahead):
    rnd = random.Random(seed)
    lengths = [(rnd.randint(1, 30), rnd.randint(1, 20)) for _ in range(30)]
    items = {i: Item(i, *pair) for i, pair in enumerate(lengths)}
    shapes = lanes(lengths, 6, 3)
    schedule = Schedule(shapes, 2, 16, 2, iter(items.values()), refill, ahead=ahead)
    num_new = run(schedule, Pipeline(shapes, items), rnd, stop=0.2)
    assert all(1 <= num_new[i] <= new for i, (_, new) in enumerate(lengths))


def jobs_of(schedule: Schedule) -> list[Job]:
    """All jobs, where each comes back before the next is asked for."""
    jobs = []
    while not schedule.is_done:
        job = schedule.next()
        assert job is not None
        jobs.append(job)
        schedule.returned([False] * len(job.members))
    return jobs


def test_a_slot_is_given_on_as_soon_as_its_request_has_ended():
    items = [Item(0, 4, 9), Item(1, 4, 3), Item(2, 4, 3), Item(3, 4, 3)]
    jobs = jobs_of(Schedule([LaneShape(2, 13)], 2, 64, 1, iter(items)))
    numbers = [[m.number for m in job.members] for job in jobs if job.prefill]
    assert numbers == [[0, 1], [2], [3]]
    assert max(len(job.members) for job in jobs) == 2
    assert sum(not job.prefill for job in jobs) < 9 + 3  # less than one after the other


def test_without_refill_a_batch_ends_before_the_next_begins():
    items = [Item(i, 4, new) for i, new in enumerate((9, 3, 3, 3))]
    jobs = jobs_of(Schedule([LaneShape(2, 13)], 2, 64, 1, iter(items), refill=False))
    steps = [len(job.members) for job in jobs if not job.prefill]
    assert steps == [2, 2, *[1] * 6, 2, 2]


def test_long_prompts_come_in_chunks_between_the_steps_of_others():
    items = [Item(0, 4, 20), Item(1, 100, 2)]
    lane = LaneShape(1, 102)
    schedule = Schedule([lane, lane], 2, 32, 1, iter(items))
    jobs = jobs_of(schedule)
    chunks = [(job.begin, job.end, job.chooses) for job in jobs if job.prefill and job.begin]
    assert chunks[-1][1:] == (100, True) and not any(chosen for *_, chosen in chunks[:-1])
    kinds = "".join("p" if job.prefill else "d" for job in jobs)
    assert "pdpd" in kinds


def test_a_request_too_long_for_every_lane():
    schedule = Schedule([LaneShape(2, 10)], 2, 64, 1, iter([Item(7, 8, 3)]))
    with pytest.raises(ValueError, match="request 7 needs 11 tokens"):
        schedule.next()


def test_requests_are_looked_at_no_further_ahead_than_the_window():
    taken = []

    def source():
        for i in range(1000):
            taken.append(i)
            yield Item(i, 4, 2)

    schedule = Schedule([LaneShape(2, 6)], 2, 64, 1, source(), window=8)
    schedule.next()
    assert len(taken) <= 8 + 2


@given(
    lengths=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 50)), min_size=1, max_size=60),
    batch=st.integers(1, 40),
    rows=st.integers(1, 40),
)
def test_lanes_hold_the_batch_and_the_longest_request(lengths, batch, rows):
    rows = min(rows, batch)
    shapes = lanes(lengths, batch, rows)
    longest = max(prompt + new for prompt, new in lengths)
    assert sum(shape.rows for shape in shapes) == batch
    assert all(1 <= shape.rows <= rows for shape in shapes)
    assert max(shape.tokens for shape in shapes) == longest
    tokens = sum(shape.rows * shape.tokens for shape in shapes)
    smaller = lanes_within({None: max(longest, tokens // 2)}, lengths, batch, rows)
    assert sum(s.rows * s.tokens for s in smaller) <= max(longest, tokens // 2)
    assert max(shape.tokens for shape in smaller) == longest


def test_short_requests_do_not_pay_for_long_ones():
    lengths = [(20, 10)] * 60 + [(400, 100)] * 4
    shapes = lanes(lengths, 32, 4)
    assert sum(shape.rows * shape.tokens for shape in shapes) < 0.6 * 32 * 500
    assert {shape.tokens for shape in lanes([(20, 10)] * 9, 32, 4)} == {30}


def test_widths_are_few_and_near():
    widths = {padded_width(tokens) for tokens in range(1, 4097)}
    assert len(widths) == 16 + 8 * 8
    assert all(n <= padded_width(n) <= 1.125 * n for n in range(1, 4097))


def test_a_few_long_prompts_are_cut():
    assert chunk_tokens([(100, 1)] * 9) == 100
    assert chunk_tokens([(40, 1)] * 99 + [(4000, 1)]) == 160
