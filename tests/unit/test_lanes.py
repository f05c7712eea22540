"""Slots of the cache: what jobs store, where, and what they see of it."""

import pytest
import torch

from llmpq.job import Job, LaneShape, Member, Move
from llmpq.models.lanes import LaneCache

CPU = torch.device("cpu")
SHAPES = [LaneShape(2, 6), LaneShape(1, 4)]


def states(rows: int, tokens: int, first: int = 1) -> torch.Tensor:
    """`[rows, 1 head, tokens, size 2]` of different numbers."""
    numbers = torch.arange(first, first + rows * tokens).view(rows, 1, tokens, 1)
    return numbers.float().expand(-1, -1, -1, 2).contiguous()


def held(cache: LaneCache, lane: int) -> list[list[float]]:
    """The keys of a lane, row by row."""
    buffer = cache.pair(0, states(1, 1), states(1, 1))[0]
    return cache.layout(0).slots(buffer, lane)[:, :, 0, 0].tolist()


def prompts(*members: Member, width: int) -> Job:
    return Job(True, members, 0, width, len(members))


def test_prompts_of_several_lanes_are_stored_without_their_padding():
    cache = LaneCache(1, SHAPES)
    job = prompts(Member(0, 1, 3, 0, 0), Member(1, 0, 2, 1, 0), width=3)
    view = cache.prefill(job, 0, 2, CPU)
    keys, values = view.update(states(2, 3), -states(2, 3), 0)
    assert torch.equal(keys, states(2, 3)) and torch.equal(values, -states(2, 3))
    assert held(cache, 0) == [[0] * 6, [1, 2, 3, 0, 0, 0]]
    assert held(cache, 1) == [[4, 5, 0, 0]]


def test_a_chunk_sees_what_its_slot_holds():
    cache = LaneCache(1, SHAPES)
    member = Member(0, 1, 5, 0, 0)
    cache.prefill(Job(True, (member,), 0, 3, 1, False), 0, 1, CPU).update(
        states(1, 3), states(1, 3), 0
    )
    view = cache.prefill(Job(True, (member,), 3, 5, 1), 0, 1, CPU)
    keys, _ = view.update(states(1, 2, 7), states(1, 2, 7), 0)
    assert keys.shape == (1, 1, 5, 2)
    assert keys[0, 0, :, 0].tolist() == [1, 2, 3, 7, 8]
    assert view.get_query_offset() == 3 and view.get_mask_sizes(2, 0) == (5, 0)


def test_rows_that_take_no_part_in_a_step_write_where_no_request_stores():
    cache = LaneCache(1, SHAPES)
    first = prompts(Member(0, 0, 2, 0, 0), Member(0, 1, 3, 1, 0), width=3)
    cache.prefill(first, 0, 2, CPU).update(states(2, 3), states(2, 3), 0)
    job = Job(False, (Member(0, 1, 3, 1, 1),), 0, 4, 2)
    tokens = torch.tensor(cache.step_tokens(job, 2))
    view = cache.step(0, range(2), 4, torch.tensor([0, 3]), tokens)
    keys, _ = view.update(states(2, 1, 8), states(2, 1, 8), 0)
    assert keys.shape == (2, 1, 4, 2) and keys[1, 0, :, 0].tolist() == [4, 5, 6, 9]
    assert held(cache, 0) == [[1, 2, 0, 0, 0, 8], [4, 5, 6, 9, 0, 0]]


def test_new_requests_find_a_clean_slot():
    """Even where activations of the last one had become NaN."""
    cache = LaneCache(1, SHAPES)
    job = prompts(Member(0, 0, 3, 0, 0), Member(0, 1, 3, 1, 0), width=3)
    cache.prefill(job, 0, 2, CPU).update(states(2, 3) * torch.nan, states(2, 3), 0)
    cache.rearrange(prompts(Member(0, 1, 2, 2, 0), width=2))
    assert held(cache, 0)[1] == [0] * 6
    assert torch.tensor(held(cache, 0)[0][:3]).isnan().all()


def test_a_request_moves_with_all_it_holds_and_nothing_else():
    """What was in its new slot may be NaN, which would reach through a mask."""
    cache = LaneCache(1, SHAPES)
    before = prompts(Member(0, 0, 5, 1, 0), width=5)
    cache.prefill(before, 0, 1, CPU).update(states(1, 5) * torch.nan, states(1, 5), 0)
    job = prompts(Member(0, 1, 3, 0, 0), width=3)
    cache.prefill(job, 0, 1, CPU).update(states(1, 3), states(1, 3), 0)
    step = Job(False, (Member(0, 0, 3, 0, 1),), 0, 4, 1, moves=(Move(0, 1, 0, 3),))
    cache.rearrange(step)
    assert held(cache, 0)[0] == [1, 2, 3, 0, 0, 0]


@pytest.mark.parametrize("layers", [1, 3])
def test_bytes_are_those_of_all_slots(layers):
    cache = LaneCache(layers, SHAPES)
    for layer in range(layers):
        cache.pair(layer, states(1, 1), states(1, 1))
    assert cache.num_bytes == layers * 2 * (2 * 6 + 4) * 2 * 4
