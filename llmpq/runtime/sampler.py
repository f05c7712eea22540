"""Chooses the next token from logits, on the device that computed them.

Sampling adds noise that is a function of (seed, request, position, token) alone, so that a draw
depends neither on which requests share its micro-batch (the logits may, in their last bits) nor on
the device. `Sampling` is one setting for all requests; `Draws` is a table of settings by request
number, with which rows of a micro-batch differ. Nothing here waits for a device or looks at values,
so a CUDA graph may hold it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood, 2014): its increment and two multipliers, as signed numbers.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
SHIFTS = (30, 27, 31)

MOST_K = 2**31  # the limit of top-k: more tokens than any vocabulary has
GREEDY_BELOW = 1e-5  # as in vLLM (_SAMPLING_EPS)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy. `top_k` 0 and `top_p` 1 exclude nothing.

    Temperatures below `GREEDY_BELOW` are greedy too: logits that differ at all are then so far
    apart that the most likely token is drawn, and logits over the temperature overflow. With
    `own_seed`, draws do not depend on the request's number.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    own_seed: bool = False

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self.temperature < GREEDY_BELOW

    @property
    def cuts(self) -> bool:
        """Whether some tokens are excluded from the draw."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1)


@dataclass(frozen=True)
class Draws:
    """Sampling settings of each request, by its number, where requests differ.

    `whole` int64 `[N, 2]` holds the initial state of a request's noise, and its `top_k`. `parts`
    fp32 `[N, 2]` holds its temperature and `top_p`. `cuts` tells whether some request has a
    `top_k` or `top_p`.
    """

    whole: Tensor
    parts: Tensor
    cuts: bool

    def to(self, device: torch.device) -> Self:
        """The same table on a device."""
        return type(self)(self.whole.to(device), self.parts.to(device), self.cuts)

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> Self:
        """The table of requests 0, 1, 2 and so on, in main memory."""
        whole = [
            (
                _signed(_mix(_mix(one.seed) + (0 if one.own_seed else number))),
                min(one.top_k, MOST_K),
            )
            for number, one in enumerate(samplings)
        ]
        parts = [(one.temperature, one.top_p) for one in samplings]
        return cls(
            torch.tensor(whole, dtype=torch.int64),
            torch.tensor(parts, dtype=torch.float32),
            any(one.cuts for one in samplings),
        )


def choose(
    logits: Tensor, sampling: Sampling | Draws, requests: Tensor, positions: Tensor
) -> Tensor:
    """`[B, V]` logits to `[B]` token ids.

    `requests` `[B]` holds the numbers of the requests, `positions` `[B]` the number of the new
    token of each, both int64. A request gets the same tokens from `Draws` as from its `Sampling`.
    """
    if isinstance(sampling, Draws):
        return _choose_each(logits, sampling, requests, positions)
    if sampling.greedy:
        return logits.argmax(dim=-1)
    # By a tensor, as that is how `Draws` do it: division by a number may round otherwise.
    scaled = logits.float() / torch.full((1, 1), sampling.temperature, device=logits.device)
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = scaled.topk(sampling.top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < threshold, float("-inf"))
    if sampling.top_p < 1:
        scaled = _cut_tail(scaled, torch.full((1, 1), sampling.top_p, device=logits.device))
    seeded = torch.full_like(requests, _signed(_mix(sampling.seed)))
    numbers = torch.zeros_like(requests) if sampling.own_seed else requests
    return (scaled + _gumbel(logits.shape[1], _mixed(seeded + numbers), positions)).argmax(dim=-1)


def _choose_each(logits: Tensor, draws: Draws, requests: Tensor, positions: Tensor) -> Tensor:
    starts, top_k = draws.whole[requests].unbind(dim=-1)
    temperature, top_p = draws.parts[requests].split(1, dim=-1)
    is_drawn = temperature >= GREEDY_BELOW
    scaled = logits.float() / torch.where(is_drawn, temperature, 1.0)
    if draws.cuts:
        scaled = _cut_tail(_cut_each(scaled, top_k[:, None]), top_p)
    drawn = (scaled + _gumbel(logits.shape[1], starts, positions)).argmax(dim=-1)
    return torch.where(is_drawn[:, 0], drawn, logits.argmax(dim=-1))


def _cut_each(logits: Tensor, top_k: Tensor) -> Tensor:
    """Sets what top-k `[B, 1]` excludes to minus infinity."""
    size = logits.shape[-1]
    last = torch.where(top_k > 0, top_k, size).clamp(max=size) - 1
    threshold = logits.sort(dim=-1, descending=True).values.gather(1, last)
    return logits.masked_fill(logits < threshold, float("-inf"))


def _cut_tail(logits: Tensor, top_p: Tensor) -> Tensor:
    """Sets what top-p `[B, 1]` or `[1, 1]` excludes to minus infinity."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    above = (probabilities.cumsum(dim=-1) - probabilities >= top_p) & (top_p < 1)
    above[..., 0] = False  # the most likely token always stays
    excluded = torch.zeros_like(above).scatter(-1, order, above)
    return logits.masked_fill(excluded, float("-inf"))


def _gumbel(size: int, starts: Tensor, positions: Tensor) -> Tensor:
    """`[B, size]` noise whose arg-max with the logits is a draw from their softmax."""
    tokens = torch.arange(size, device=starts.device)
    bits = _mixed(_mixed(starts + positions)[:, None] + tokens * GOLDEN)
    uniform = (((bits >> 12) & (2**52 - 1)).double() + 0.5) * 2.0**-52  # neither 0 nor 1
    return -torch.log(-torch.log(uniform)).float()


def _mix(state: int) -> int:
    """`_mixed` of one number, from 0 to 2^64 - 1."""
    state = (state + GOLDEN) % 2**64
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        state = (state ^ (state >> shift)) * multiplier % 2**64
    return state


def _mixed(state: Tensor) -> Tensor:
    """SplitMix64's output after this state; int64 products wrap, and shifts are made logical."""
    state = state + GOLDEN
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        state = (state ^ ((state >> shift) & (2 ** (64 - shift) - 1))) * multiplier
    return state


def _signed(number: int) -> int:
    """The low 64 bits of a number, as int64 holds them."""
    return (number + 2**63) % 2**64 - 2**63
