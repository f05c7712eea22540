"""Chooses the next token from logits, on the device that computed them.

Sampling draws by noise that is a function of (seed, request, position, token) alone, so that the
draw does not depend on which others share its micro-batch (the logits may, in their last bits), nor
on the device. Nothing here waits for a device or looks at values, so a CUDA graph may hold it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood, 2014): its increment and two multipliers, as signed numbers.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
SHIFTS = (30, 27, 31)

GREEDY_BELOW = 1e-5  # as in vLLM (_SAMPLING_EPS)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy. `top_k` 0 and `top_p` 1 cut nothing.

    So are temperatures below `GREEDY_BELOW`: there logits that differ at all are so far apart that
    the most likely token is drawn, and logits over the temperature overflow.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Always the most likely token."""
        return self.temperature < GREEDY_BELOW


def choose(logits: Tensor, sampling: Sampling, requests: Tensor, positions: Tensor) -> Tensor:
    """`[B, V]` logits to `[B]` token ids.

    `requests` `[B]` are the numbers of the requests, `positions` `[B]` those of the tokens among
    their new ones, both int64.
    """
    if sampling.greedy:
        return logits.argmax(dim=-1)
    scaled = _cut(logits.float() / sampling.temperature, sampling)
    return (scaled + _gumbel(scaled.shape[1], sampling.seed, requests, positions)).argmax(dim=-1)


def _cut(logits: Tensor, sampling: Sampling) -> Tensor:
    """Sets what top-k and top-p exclude to minus infinity."""
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        above = probabilities.cumsum(dim=-1) - probabilities >= sampling.top_p
        above[..., 0] = False  # the most likely token always stays
        excluded = torch.zeros_like(above).scatter(-1, order, above)
        logits = logits.masked_fill(excluded, float("-inf"))
    return logits


def _gumbel(size: int, seed: int, requests: Tensor, positions: Tensor) -> Tensor:
    """`[B, size]` noise whose arg-max with the logits is a draw from their softmax."""
    tokens = torch.arange(size, device=requests.device)
    seeded = _mixed(torch.full_like(requests, _signed(seed)))
    start = _mixed(_mixed(seeded + requests) + positions)
    bits = _mixed(start[:, None] + tokens * GOLDEN)
    uniform = (((bits >> 12) & (2**52 - 1)).double() + 0.5) * 2.0**-52  # neither 0 nor 1
    return -torch.log(-torch.log(uniform)).float()


def _mixed(state: Tensor) -> Tensor:
    """SplitMix64's output after this state; int64 products wrap, and shifts are made logical."""
    state = state + GOLDEN
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        state = (state ^ ((state >> shift) & (2 ** (64 - shift) - 1))) * multiplier
    return state


def _signed(number: int) -> int:
    """The low 64 bits of a number, as int64 holds them."""
    return (number + 2**63) % 2**64 - 2**63
