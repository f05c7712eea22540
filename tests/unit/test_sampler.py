"""Choosing tokens: greedy, what top-k and top-p leave, seeds, and the distribution drawn from."""

import pytest
import torch

from llmpq.runtime import sampler
from llmpq.runtime.sampler import Draws, Sampling

LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]])


def choose(
    logits: torch.Tensor, sampling: Sampling, requests: list[int], positions: list[int]
) -> torch.Tensor:
    return sampler.choose(logits, sampling, torch.tensor(requests), torch.tensor(positions))


def draws(sampling: Sampling, count: int, logits: torch.Tensor = LOGITS) -> torch.Tensor:
    """`count` draws, each for another request."""
    return choose(logits.expand(count, -1), sampling, list(range(count)), [0] * count)


def test_greedy_takes_the_most_likely_of_each_row():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert choose(logits, Sampling(), [0, 1], [9, 9]).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40, 5e-324])
def test_a_temperature_that_logits_overflow_at_is_greedy(temperature):
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 5.0, 1.0], [-9e4, 8e4, 8.1e4]])
    for sampling in (Sampling(temperature), Sampling(temperature, top_k=2, top_p=0.5)):
        assert choose(logits, sampling, [0, 1, 2], [9, 9, 9]).tolist() == [1, 0, 2]


def test_the_smallest_temperature_that_is_drawn_at_does_not_overflow():
    logits = torch.tensor([[0.0, 3.0, 1.0], [-9e4, 8e4, 8.1e4]])
    assert choose(logits, Sampling(1e-5, top_p=0.9), [0, 1], [9, 9]).tolist() == [1, 2]


def test_top_k_leaves_exactly_the_k_most_likely():
    assert set(draws(Sampling(2.0, top_k=3), 400).tolist()) == {0, 1, 2}
    assert set(draws(Sampling(2.0, top_k=1), 50).tolist()) == {0}
    assert set(draws(Sampling(2.0, top_k=99), 800).tolist()) == {0, 1, 2, 3, 4}


def test_top_p_leaves_the_fewest_tokens_that_reach_it():
    # Probabilities at temperature 1: 0.56, 0.21, 0.12, 0.08, 0.03.
    assert set(draws(Sampling(1.0, top_p=0.5), 200).tolist()) == {0}
    assert set(draws(Sampling(1.0, top_p=0.7), 400).tolist()) == {0, 1}
    assert set(draws(Sampling(1.0, top_p=0.8), 400).tolist()) == {0, 1, 2}
    assert set(draws(Sampling(1.0, top_p=1e-9), 50).tolist()) == {0}


def test_top_k_and_top_p_cut_together():
    assert set(draws(Sampling(5.0, top_k=2, top_p=0.99), 200).tolist()) == {0, 1}


def test_a_draw_depends_on_seed_request_and_position_alone():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(1.5, seed=3)
    whole = choose(logits, sampling, [4, 9, 2, 7, 1, 0], [5] * 6).tolist()
    alone = [
        choose(logits[i : i + 1], sampling, [number], [5]).item()
        for i, number in enumerate([4, 9, 2, 7, 1, 0])
    ]
    assert whole == alone
    assert whole != choose(logits, Sampling(1.5, seed=4), [4, 9, 2, 7, 1, 0], [5] * 6).tolist()
    assert whole != choose(logits, sampling, [4, 9, 2, 7, 1, 0], [6] * 6).tolist()
    assert whole != choose(logits, sampling, [5, 8, 3, 6, 11, 12], [5] * 6).tolist()


def test_draws_follow_the_softmax_at_the_temperature():
    count = 4000
    for temperature in (0.7, 1.0, 2.0):
        wanted = count * (LOGITS[0] / temperature).softmax(0)
        seen = torch.bincount(draws(Sampling(temperature), count), minlength=5)
        chi_square = ((seen - wanted) ** 2 / wanted).sum().item()
        assert chi_square < 23.5, (temperature, seen)  # 1 in 10,000 for 4 degrees of freedom


def test_positions_draw_independently():
    rows = [choose(LOGITS, Sampling(1.0), [0], [position]).item() for position in range(2000)]
    same = sum(a == b for a, b in zip(rows, rows[1:], strict=False)) / 1999
    expected = (LOGITS[0].softmax(0) ** 2).sum().item()
    assert abs(same - expected) < 0.05


def test_half_precision_logits_are_drawn_from_as_fp32():
    sampling = Sampling(1.0, seed=1)
    half = LOGITS.to(torch.bfloat16)  # these values are exact in bf16
    assert draws(sampling, 100, half).tolist() == draws(sampling, 100).tolist()


# ---- requests that differ

MANY = [
    Sampling(temperature, top_k, top_p, seed, own_seed)
    for temperature in (0.0, 0.5, 2.0)
    for top_k in (0, 3, 10**12)
    for top_p in (1.0, 0.7)
    for seed, own_seed in ((0, False), (-5, False), (2**63, True))
]


@pytest.mark.parametrize("kinds", [MANY, [one for one in MANY if not one.cuts]])
def test_each_request_gets_what_it_would_get_alone(kinds):
    logits = 3 * torch.randn(len(kinds), 200, generator=torch.Generator().manual_seed(0))
    draws_of_all = Draws.of(kinds)
    assert draws_of_all.cuts == (kinds is MANY)
    order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(1))
    positions = order % 7
    found = sampler.choose(logits[order], draws_of_all, order, positions).tolist()
    alone = [choose(logits[i : i + 1], kinds[i], [i], [i % 7]).item() for i in order.tolist()]
    assert found == alone
    greedy = [i for i, one in enumerate(kinds) if one.greedy]
    assert all(alone[order.tolist().index(i)] == logits[i].argmax() for i in greedy)


def test_an_own_seed_gives_the_same_draws_at_any_place():
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(0)).expand(8, -1)
    own = Draws.of([Sampling(2.0, seed=3, own_seed=True)] * 8)
    by_place = Draws.of([Sampling(2.0, seed=3)] * 8)
    numbers, positions = torch.arange(8), torch.zeros(8, dtype=torch.int64)
    assert len(set(sampler.choose(logits, own, numbers, positions).tolist())) == 1
    assert len(set(sampler.choose(logits, by_place, numbers, positions).tolist())) > 1
