"""A job's header says all of it; masks and positions are those of prompts padded on the left."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from llmpq.runtime.jobs import END, headers_for, mask, positions, shape
from llmpq.schedule import Job, Member, Move, Shift

number = st.integers(0, 2**31 - 1)
members = st.builds(Member, *[number] * 6)


@given(
    prefill=st.booleans(),
    rows=st.lists(members, min_size=1, max_size=6),
    ends=st.tuples(number, number, number),
    shifts=st.lists(st.builds(Shift, number, number, number, st.integers(-99, 99)), max_size=4),
    moves=st.lists(st.builds(Move, number, number, number, number), max_size=5),
    busy=st.lists(number, max_size=3),
)
def test_headers_bring_jobs_unchanged(prefill, rows, ends, shifts, moves, busy):
    job = Job(prefill, tuple(rows), *ends, shifts=tuple(shifts), moves=tuple(moves))
    headers = headers_for(3, 6, 3)
    assert headers.read(headers.write(job, busy)) == (job, busy)


def test_the_end_has_a_header_of_the_same_size():
    headers = headers_for(2, 2, 2)
    job = Job(False, (Member(0, 0, 0, 1, 0, 0),), 0, 1, 1)
    assert headers.read(headers.empty()) is None
    assert headers.empty()[0] == END
    assert headers.write(job, []).shape == headers.empty().shape


def test_prompts_are_padded_on_the_left():
    job = Job(True, (Member(0, 0, 0, 3, 0, 0), Member(0, 1, 2, 1, 1, 0)), 0, 3, 2)
    assert shape(job) == (2, 3)
    assert mask(job, 0, 2).tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions(job, 0, 2).tolist() == [[0, 1, 2], [0, 0, 0]]
    assert mask(job, 0, 1) is None


def test_a_chunk_sees_what_came_before_it():
    job = Job(True, (Member(0, 0, 5, 9, 0, 0),), 4, 7, 1, chooses=False)
    assert shape(job) == (1, 3)
    assert mask(job, 0, 1) is None
    assert positions(job, 0, 1).tolist() == [[4, 5, 6]]


def test_a_step_sees_columns_from_each_prompt_on():
    late, early = Member(0, 2, 4, 2, 0, 1), Member(0, 0, 2, 3, 1, 2)
    job = Job(False, (early, late), begin=2, end=7, rows=3)
    assert shape(job) == (3, 1)
    assert mask(job, 0, 3).tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 1, 1, 1]]
    assert positions(job, 0, 3).tolist() == [[4], [0], [2]]
    assert torch.equal(mask(job, 2, 3), mask(job, 0, 3)[2:])
