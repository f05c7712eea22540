"""A batch that runs as one, its prompts padded on the left: for measuring, and for lm-eval's tasks.

What `llmpq-run` does is decided by `llmpq.schedule`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmpq.runtime.request import Request
from llmpq.workload import Batch

COLUMNS = 3  # prompt length, new tokens, number of the request


@dataclass(frozen=True)
class BatchTable:
    """What all stages know of a batch. `lengths` is `[B, 3]`: see COLUMNS."""

    lengths: torch.Tensor
    prompt_tokens: int
    new_tokens: int

    def mask(self, start: int, end: int, total: int) -> torch.Tensor | None:
        """`[end - start, total]`, 1 for real tokens; None where nothing is padded.

        Prompts are padded on the left to `prompt_tokens`; generated tokens follow.
        """
        return padding_mask(self._padding(start, end), total)

    def positions(self, start: int, end: int, past: int, count: int) -> torch.Tensor:
        """`[end - start, count]` positions in each request's own text, 0 for padding."""
        return padded_positions(self._padding(start, end), past, past + count)

    def _padding(self, start: int, end: int) -> torch.Tensor:
        return self.prompt_tokens - self.lengths[start:end, 0]


def padding_mask(padding: torch.Tensor, total: int) -> torch.Tensor | None:
    """`[b, total]`, 0 for the first `padding` `[b]` columns of each row; None where none are."""
    if not bool(padding.any()):
        return None
    return (torch.arange(total)[None, :] >= padding[:, None]).long()


def padded_positions(padding: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """`[b, end - first]` positions of columns in each row's own text, 0 for padding."""
    return (torch.arange(first, end)[None, :] - padding[:, None]).clamp_(min=0)


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
