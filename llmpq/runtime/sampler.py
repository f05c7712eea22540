"""Chooses the next token from logits.

Sampling draws from a generator that is seeded by (seed, request, position) alone, so the draw does
not depend on which others share its micro-batch (the logits may, in their last bits).
"""

from dataclasses import dataclass

import torch

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


def choose(
    logits: torch.Tensor, sampling: Sampling, requests: list[int], positions: list[int]
) -> torch.Tensor:
    """`[B, V]` logits to `[B]` token ids.

    `requests` are the numbers of the B requests, `positions` those of the tokens among their new
    ones.
    """
    if sampling.greedy:
        return logits.argmax(dim=-1)
    scaled = _cut(logits.float() / sampling.temperature, sampling)
    rows = [
        (row + _gumbel(row.shape[0], sampling.seed, request, position).to(row.device)).argmax()
        for row, request, position in zip(scaled, requests, positions, strict=True)
    ]
    return torch.stack(rows)


def _cut(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
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


def _gumbel(size: int, seed: int, request: int, position: int) -> torch.Tensor:
    """Noise whose arg-max with the logits is a draw from their softmax."""
    mixed = (seed * 1_000_003 + request) * 1_000_003 + position
    generator = torch.Generator().manual_seed(mixed % (2**63))
    uniform = torch.rand(size, generator=generator).clamp_(1e-20, 1 - 1e-7)
    return -torch.log(-torch.log(uniform))
