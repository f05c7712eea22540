"""Attention over slots: what `attend` computes, and which keys each row's mask leaves it."""

import pytest
import torch
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from llmpq.models.attention import attend, make_additive_mask, make_mask


def expected(query, key, value, mask, scale, softcap=None, sinks=None):
    """By the definition, in float64: one row, head and query at a time sees what its mask says."""
    query, key, value = (states.double() for states in (query, key, value))
    group = query.shape[1] // key.shape[1]
    out = torch.zeros_like(query)
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            for place in range(query.shape[2]):
                seen = mask[row if mask.shape[0] > 1 else 0, 0, place]
                scores = key[row, head // group] @ query[row, head, place] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                scores = torch.where(seen, scores, -torch.inf)
                if sinks is not None:
                    scores = torch.cat((scores, sinks[head : head + 1].double()))
                weights = scores.softmax(0)[: len(seen)]
                out[row, head, place] = weights @ value[row, head // group]
    return out.transpose(1, 2)


def states(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-2]))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("new", [1, 6])
def test_grouped_heads_attend_to_what_the_mask_shows(new, group, softcap):
    rows, heads, columns, size = 3, 2, 11, 8
    buffer = states(rows, columns, heads, size)  # as slots lie, columns before heads
    key, value = buffer.transpose(1, 2), buffer.flip(0).transpose(1, 2)
    query = states(rows, heads * group, new, size)
    first = torch.tensor([0, 3, 5])
    mask = make_mask(rows, new, columns, first, mask_function=causal_mask_function)
    ours, _ = attend(None, query, key, value, mask, scaling=0.3, softcap=softcap)
    wanted = expected(query, key, value, mask, 0.3, softcap)
    assert torch.allclose(ours.double(), wanted, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_without_a_mask_it_is_causal(softcap):
    query, key, value = states(2, 4, 5, 8), states(2, 2, 5, 8), states(2, 2, 5, 8)
    whole = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    ours, _ = attend(None, query, key, value, None, softcap=softcap)
    assert torch.allclose(ours.double(), expected(query, key, value, whole, 8**-0.5, softcap))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("new", [1, 6])
def test_sinks_take_part_in_the_softmax_of_their_head(new, softcap):
    query, key, value = states(2, 8, new, 8), states(2, 2, 11, 8), states(2, 2, 11, 8).flip(0)
    sinks = torch.linspace(-3, 5, 8)  # from one that hardly counts to one that rules
    mask = make_mask(2, new, 11, torch.tensor([0, 5]), mask_function=causal_mask_function)
    ours, _ = attend(None, query, key, value, mask, softcap=softcap, s_aux=sinks)
    wanted = expected(query, key, value, mask, 8**-0.5, softcap, sinks)
    assert torch.allclose(ours.double(), wanted, atol=1e-5)


def test_sinks_without_a_mask_leave_attention_causal():
    query, key, value = states(2, 4, 5, 8), states(2, 2, 5, 8), states(2, 2, 5, 8).flip(0)
    whole, sinks = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril(), torch.linspace(-2, 2, 4)
    ours, _ = attend(None, query, key, value, None, s_aux=sinks)
    wanted = expected(query, key, value, whole, 8**-0.5, None, sinks)
    assert torch.allclose(ours.double(), wanted, atol=1e-5)


def test_sinks_are_not_rounded_to_the_16_bits_of_queries():
    """Scores of 0, so that a sink's weight is all that is rounded: 1 / (5 + e^sink) of each."""
    none, value = torch.zeros(1, 1, 5, 8).bfloat16(), torch.ones(1, 1, 5, 8).bfloat16()
    sinks = torch.tensor([9.03125]).bfloat16()
    ours, _ = attend(None, none, none, value, None, scaling=0.3, s_aux=sinks)
    last = 5 / (5 + torch.exp(sinks.double()))
    assert torch.allclose(ours[0, -1].double(), last, rtol=1e-2)


def test_values_may_have_another_size_than_keys():
    query, key, value = states(2, 4, 5, 8), states(2, 4, 5, 8), states(2, 4, 5, 6)
    whole = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    ours, _ = attend(None, query, key, value, None)
    wide = expected(query, key, torch.nn.functional.pad(value, (0, 2)), whole, 8**-0.5)
    assert torch.allclose(ours.double(), wide[..., :6], atol=1e-5)


def test_queries_are_scaled_by_place():
    query, key, value = states(2, 4, 5, 8), states(2, 2, 5, 8), states(2, 2, 5, 8).flip(0)
    scales = torch.linspace(1, 3, 10).view(2, 5)
    ours, _ = attend(None, query, key, value, None, query_scales=scales)
    wanted, _ = attend(None, query * scales[:, None, :, None], key, value, None)
    assert torch.equal(ours, wanted)


def test_what_it_cannot_compute_with_is_refused():
    query = states(1, 1, 1, 4)
    with pytest.raises(NotImplementedError, match="position_bias"):
        attend(torch.nn.Linear(1, 1), query, query, query, None, position_bias=torch.ones(1))


def test_every_row_of_a_step_sees_up_to_its_own_column():
    columns = torch.tensor([2, 0, 4])
    mask = make_mask(3, 1, 6, columns, mask_function=causal_mask_function)
    assert mask[:, 0, 0].int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1] * 5 + [0]]
    window = sliding_window_causal_mask_function(2)
    mask = make_mask(3, 1, 6, columns, mask_function=window, local_size=2)
    assert mask[:, 0, 0].int().tolist() == [
        [0, 1, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0] * 3 + [1, 1, 0],
    ]
    chunks = chunked_causal_mask_function(3, torch.zeros(3, dtype=torch.int64))
    mask = make_mask(3, 1, 6, columns, mask_function=chunks, local_size=3)
    assert mask[2, 0, 0].int().tolist() == [0, 0, 0, 1, 1, 0]


def test_prompts_need_a_mask_only_behind_others_or_under_a_window():
    causal = {"mask_function": causal_mask_function}
    assert make_mask(2, 5, 5, 0, **causal) is None
    chunk = make_mask(1, 2, 5, 3, **causal)
    assert chunk.int().tolist() == [[[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]]
    window = {"mask_function": sliding_window_causal_mask_function(2), "local_size": 2}
    assert make_mask(2, 2, 2, 0, **window) is None
    assert make_mask(2, 3, 3, 0, **window)[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_masks_to_add_hide_by_the_least_number():
    mask = make_additive_mask(
        batch_size=1,
        q_length=2,
        kv_length=2,
        q_offset=0,
        mask_function=causal_mask_function,
        dtype=torch.float16,
    )
    assert mask.tolist() == [[[[0, torch.finfo(torch.float16).min], [0, 0]]]]
    assert mask.dtype == torch.float16
