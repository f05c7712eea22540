"""The schedule that the closed form of a plan's time is of, played job by job.

Servers stand in a row (stage, link, ..., way back). Each does all prefill micro-batches and then,
step by step, all decode micro-batches, in this one order. A decode job sets out when the tokens
that it goes on from are back at the first server.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Batch:
    """`prefill` [servers, micro-batches], `decode` [servers, micro-batches, steps], in seconds.

    `waits[i]`: how many prefill micro-batches must be back before decode micro-batch i starts.
    """

    prefill: np.ndarray
    decode: np.ndarray
    waits: tuple[int, ...]


@dataclass(frozen=True)
class Played:
    """`spans`: of every job, when each server starts and ends it."""

    spans: list[tuple[list[float], list[float]]]
    num_prefills: int

    @property
    def first_tokens_s(self) -> float:
        """When all first tokens are back."""
        return max(end[-1] for _, end in self.spans[: self.num_prefills])

    @property
    def total_s(self) -> float:
        """When all tokens are back."""
        return max(end[-1] for _, end in self.spans)


def simulate(batch: Batch) -> Played:
    """Plays a batch from its start until the last token is back."""
    num_servers, num_prefills = batch.prefill.shape
    free, spans = [0.0] * num_servers, []

    def play(seconds: np.ndarray, now: float) -> float:
        start, end = [], []
        for server, needed in enumerate(seconds.tolist()):
            start.append(max(now, free[server]))
            now = free[server] = start[-1] + needed
            end.append(now)
        spans.append((start, end))
        return now

    back = [play(batch.prefill[:, i], 0.0) for i in range(num_prefills)]
    ready = [back[wait - 1] for wait in batch.waits]
    for step in range(batch.decode.shape[2]):
        for i in range(len(ready)):
            ready[i] = play(batch.decode[:, i, step], ready[i])
    return Played(spans, num_prefills)
