"""A job's header says all of it."""

from hypothesis import given
from hypothesis import strategies as st

from llmpq.job import Job, Member, Move
from llmpq.runtime.jobs import END, headers_for, shape

number = st.integers(0, 2**31 - 1)
members = st.builds(Member, *[number] * len(Member._fields))


@given(
    prefill=st.booleans(),
    rows=st.lists(members, min_size=1, max_size=6),
    ends=st.tuples(number, number, number),
    chooses=st.booleans(),
    moves=st.lists(st.builds(Move, number, number, number, number), max_size=5),
    busy=st.lists(number, max_size=3),
)
def test_headers_bring_jobs_unchanged(prefill, rows, ends, chooses, moves, busy):
    job = Job(prefill, tuple(rows), *ends, chooses, tuple(moves))
    headers = headers_for(3, 6, 3)
    assert headers.read(headers.write(job, busy)) == (job, busy)


def test_the_end_has_a_header_of_the_same_size():
    headers = headers_for(2, 2, 2)
    job = Job(False, (Member(0, 0, 1, 0, 1),), 0, 2, 1)
    assert headers.read(headers.empty()) is None
    assert headers.empty()[0] == END
    assert headers.write(job, []).shape == headers.empty().shape


def test_a_job_computes_a_token_of_each_row_or_parts_of_prompts():
    assert shape(Job(False, (Member(0, 2, 4, 0, 1),), 0, 7, 3)) == (3, 1)
    assert shape(Job(True, (Member(0, 0, 9, 0, 0),), 4, 7, 1, chooses=False)) == (1, 3)
