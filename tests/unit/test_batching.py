"""Batches: every request once, never above the reserve, padding on the left."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpq.errors import UserError
from llmpq.runtime.batching import (
    Request,
    fitting_batches,
    micro_batches,
    padded_ids,
    table_of,
)
from llmpq.workload import Batch


def requests_of(lengths) -> list[Request]:
    return [Request(f"r{i}", i, (1,) * s, n) for i, (s, n) in enumerate(lengths)]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=40),
    batch=st.integers(1, 16),
    cache_tokens=st.integers(1, 60),
)
def test_batches_hold_every_request_once_and_stay_within_the_reserve(lengths, batch, cache_tokens):
    reserved = batch * cache_tokens
    requests = requests_of(lengths)
    if max(s + n for s, n in lengths) > reserved:
        with pytest.raises(UserError, match="tokens of cache"):
            fitting_batches(requests, batch, cache_tokens)
        return
    found = fitting_batches(requests, batch, cache_tokens)
    assert sorted(i for b in found for i in b.requests) == list(range(len(requests)))
    for b in found:
        assert len(b.requests) <= batch
        assert len(b.requests) * (b.prompt_tokens + b.new_tokens) <= reserved
        assert b.prompt_tokens == max(lengths[i][0] for i in b.requests)
        assert b.new_tokens == max(lengths[i][1] for i in b.requests)


def test_batches_within_the_plan_are_not_cut():
    found = fitting_batches(requests_of([(8, 4)] * 10), batch=4, cache_tokens=12)
    assert [len(b.requests) for b in found] == [4, 4, 2]


@given(count=st.integers(0, 50), size=st.integers(1, 20))
def test_micro_batches_cover_all_in_order(count, size):
    slices = micro_batches(count, size)
    assert [i for start, end in slices for i in range(start, end)] == list(range(count))
    assert all(0 < end - start <= size for start, end in slices)


def test_padding_is_on_the_left_and_masked():
    requests = [Request("a", 7, (5, 6, 7), 2), Request("b", 9, (8,), 4)]
    batch = Batch((0, 1), 3, 4)
    table = table_of(batch, requests)
    assert padded_ids(batch, requests, pad_id=0).tolist() == [[5, 6, 7], [0, 0, 8]]
    assert table.lengths.tolist() == [[3, 2, 7], [1, 4, 9]]
    assert table.mask(0, 2, 5).tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert table.mask(0, 1, 5) is None  # nothing padded in this slice
    assert table.positions(0, 2, 0, 3).tolist() == [[0, 1, 2], [0, 0, 0]]
    assert table.positions(0, 2, 3, 1).tolist() == [[3], [1]]
