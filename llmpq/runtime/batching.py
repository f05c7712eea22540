"""Which requests run together, and how a batch is cut into micro-batches. Pure functions.

Not covered: refilling a slot whose request has ended; a batch runs until its last request ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmpq.errors import UserError
from llmpq.workload import Batch, batches, fitting

COLUMNS = 3  # prompt length, new tokens, number of the request


@dataclass(frozen=True)
class Request:
    """One prompt. `number` is its position in the prompts file."""

    id: str | int
    number: int
    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True)
class BatchTable:
    """What all stages know of a batch. `lengths` is `[B, 3]`: see COLUMNS."""

    lengths: torch.Tensor
    prompt_tokens: int
    new_tokens: int

    @property
    def num_requests(self) -> int:
        """Requests in this batch; 0 ends the run."""
        return self.lengths.shape[0]

    def mask(self, start: int, end: int, total: int) -> torch.Tensor | None:
        """`[end - start, total]`, 1 for real tokens; None where nothing is padded.

        Prompts are padded on the left to `prompt_tokens`; generated tokens follow.
        """
        padding = self.prompt_tokens - self.lengths[start:end, 0]
        if not bool(padding.any()):
            return None
        return (torch.arange(total)[None, :] >= padding[:, None]).long()

    def positions(self, start: int, end: int, past: int, count: int) -> torch.Tensor:
        """`[end - start, count]` positions in each request's own text, 0 for padding."""
        padding = self.prompt_tokens - self.lengths[start:end, 0]
        return (torch.arange(past, past + count)[None, :] - padding[:, None]).clamp_(min=0)


def micro_batches(num_requests: int, size: int) -> list[tuple[int, int]]:
    """Slices of at most `size` requests; the last may be smaller."""
    return [(i, min(i + size, num_requests)) for i in range(0, num_requests, size)]


def fitting_batches(requests: Sequence[Request], batch: int, cache_tokens: int) -> list[Batch]:
    """Batches that never hold more tokens than the plan reserved (`batch` x `cache_tokens`).

    Prompts longer than planned run in smaller batches; one that fits in no batch is a `UserError`.
    """
    reserved = batch * cache_tokens
    too_long = [r for r in requests if len(r.prompt) + r.new_tokens > reserved]
    if too_long:
        raise UserError(
            f"request {too_long[0].id!r} needs {len(too_long[0].prompt)} + "
            f"{too_long[0].new_tokens} tokens of cache; the plan reserves {reserved} in all"
        )
    lengths = [(len(r.prompt), r.new_tokens) for r in requests]
    return [part for whole in batches(lengths, batch) for part in fitting(whole, lengths, reserved)]


def table_of(batch: Batch, requests: Sequence[Request]) -> BatchTable:
    """The table of a batch whose members are positions in `requests`."""
    rows = [(len(r.prompt), r.new_tokens, r.number) for r in (requests[i] for i in batch.requests)]
    return BatchTable(torch.tensor(rows), batch.prompt_tokens, batch.new_tokens)


def padded_ids(batch: Batch, requests: Sequence[Request], pad_id: int) -> torch.Tensor:
    """`[B, S]` token ids, padded on the left."""
    rows = [
        [pad_id] * (batch.prompt_tokens - len(requests[i].prompt)) + list(requests[i].prompt)
        for i in batch.requests
    ]
    return torch.tensor(rows)
