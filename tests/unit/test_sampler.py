"""Choosing tokens: greedy, what top-k and top-p leave, seeds, and the distribution drawn from."""

import pytest
import torch

from llmpq.runtime import sampler
from llmpq.runtime.sampler import Sampling

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
