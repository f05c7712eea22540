"""Slots that keep a window of tokens give the attention that slots of all tokens give under a mask.

Runs of the schedule, with refills, moves and chunks, drive a cache with a ring beside a full slot.
"""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import (
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from llmpq.job import Item, Job, LaneShape, Member, bounding_window, cache_tokens, slot_columns
from llmpq.models.attention import attend, make_mask
from llmpq.models.lanes import LaneCache, StageCache, held
from llmpq.schedule import Schedule
from llmpq.workload import lanes

CPU = torch.device("cpu")
HEADS, SIZE = 2, 4
RING, FULL = 0, 1  # the layers of the caches


def mask_of(window: int, chunked: bool):
    if chunked:
        return chunked_causal_mask_function(window, torch.zeros(99, dtype=torch.int64))
    return sliding_window_causal_mask_function(window)


def attended(cache: StageCache, layer: int, states, function) -> torch.Tensor:
    """Attention of one layer as transformers' modules ask for it, `[R, S, heads, size]`."""
    query, key, value = states
    rows, _, tokens, _ = query.shape
    count, first = cache.get_mask_sizes(tokens, layer)
    mask = make_mask(
        batch_size=rows,
        q_length=tokens,
        kv_length=count,
        q_offset=cache.get_query_offset(layer),
        kv_offset=first,
        mask_function=function,
        local_size=0,  # there is always a mask
    )
    keys, values = cache.update(key, value, layer)
    assert mask is not None and keys.shape[2] == mask.shape[3]
    return attend(None, query, keys, values, mask)[0]


def view_of(cache: LaneCache, job: Job) -> StageCache:
    if job.prefill:
        return cache.prefill(job, 0, job.rows, CPU)
    columns = torch.zeros(job.rows, dtype=torch.int64)
    for member in job.members:
        columns[member.row] = member.column
    tokens = torch.tensor(cache.step_tokens(job, job.rows))
    return cache.step(job.lane, range(job.rows), job.end, columns, tokens)


def check(cache: LaneCache, job: Job, function) -> None:
    """Both layers get the same states; what real tokens attend to must be the same."""
    cache.rearrange(job)
    tokens = job.end - job.begin if job.prefill else 1
    states = torch.randn(3, job.rows, HEADS, tokens, SIZE)
    view = view_of(cache, job)
    ring, full = (attended(view, layer, states, function) for layer in (RING, FULL))
    for place, member in enumerate(job.members):
        row = place if job.prefill else member.row
        count = min(job.end, member.prompt_tokens) - job.begin if job.prefill else 1
        assert torch.allclose(ring[row, :count], full[row, :count], atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=12),
    window=st.integers(1, 24),
    chunked=st.booleans(),
    batch=st.integers(1, 6),
    chunk=st.sampled_from([3, 16, 64]),
    refill=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_runs_attend_to_rings_as_to_full_slots(
    lengths, window, chunked, batch, chunk, refill, seed
):
    torch.manual_seed(seed)
    rnd = random.Random(seed)
    shapes = lanes(lengths, batch, min(batch, 3))
    items = (Item(i, *pair) for i, pair in enumerate(lengths))
    schedule = Schedule(shapes, 2, chunk, 2, items, refill)
    cache = LaneCache(2, shapes, [window, None])
    function = mask_of(window, chunked)
    while not schedule.is_done:
        job = schedule.next()
        if job is not None:
            check(cache, job, function)
        if schedule.num_in_flight and (job is None or rnd.random() < 0.5):
            schedule.returned([rnd.random() < 0.05 for _ in schedule.oldest.members])
    kept = [cache_tokens(shapes, w) for w in (window, None)]
    assert cache.num_bytes == sum(kept) * 2 * HEADS * SIZE * 4


def test_a_slot_keeps_a_window_and_one_column_more():
    assert [slot_columns(tokens, 8) for tokens in (3, 8, 9, 10, 500)] == [3, 8, 9, 9, 9]
    assert slot_columns(500, None) == 500
    shapes = [LaneShape(2, 100), LaneShape(3, 6)]
    assert cache_tokens(shapes, 8) == 2 * 9 + 3 * 6 and cache_tokens(shapes) == 218
    assert bounding_window(shapes, 8) == 8
    assert bounding_window(shapes, 98) == 98 and bounding_window(shapes, 99) is None


def test_windows_that_shorten_no_slot_change_nothing():
    """Layers then share one layout, and transformers sees no sliding layer."""
    cache = LaneCache(3, [LaneShape(2, 9)], [8, None, 400])
    assert [layout.window for layout in cache.layouts] == [None]
    view = cache.prefill(Job(True, (Member(0, 0, 3, 0, 0),), 0, 3, 1), 0, 1, CPU)
    assert not any(view.is_sliding)


@pytest.mark.parametrize("width", [3, 5])
def test_positions_that_a_ring_holds(width):
    newest = torch.tensor([1, 4, 5, 13])
    rows = [[0, 1, -3, -2, -1], [0, 1, 2, 3, 4], [5, 1, 2, 3, 4], [10, 11, 12, 13, 9]]
    assert held(newest, width, 5).tolist() == [row[:width] for row in rows]


def test_only_the_last_tokens_of_a_prompt_are_stored():
    cache = LaneCache(1, [LaneShape(2, 50)], [4])
    job = Job(True, (Member(0, 0, 9, 0, 0), Member(0, 1, 2, 1, 0)), 0, 9, 2)
    numbers = torch.arange(1.0, 19.0).view(2, 1, 9, 1)
    cache.prefill(job, 0, 2, CPU).update(numbers, numbers, 0)
    keys, _ = cache.pair(0, numbers, numbers)
    found = cache.layout(0).slots(keys, 0)[:, :, 0, 0].tolist()
    assert found == [[9, 6, 7, 8, 0], [10, 11, 0, 0, 0]]


def test_moves_and_new_requests_leave_nothing_of_earlier_ones():
    cache = LaneCache(1, [LaneShape(2, 50)], [4])
    whole = Job(True, (Member(0, 0, 9, 0, 0), Member(0, 1, 9, 1, 0)), 0, 9, 2)
    nan = torch.full((2, 1, 9, 1), torch.nan)
    cache.prefill(whole, 0, 2, CPU).update(nan, nan, 0)
    job = Job(True, (Member(0, 1, 2, 2, 0),), 0, 2, 1)
    cache.rearrange(job)
    few = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1)
    cache.prefill(job, 0, 1, CPU).update(few, few, 0)
    step = Job(False, (Member(0, 0, 2, 2, 1),), 0, 3, 1, moves=((0, 1, 0, 2),))
    cache.rearrange(step)
    keys, _ = cache.pair(0, few, few)
    assert cache.layout(0).slots(keys, 0)[0, :, 0, 0].tolist() == [1, 2, 0, 0, 0]
