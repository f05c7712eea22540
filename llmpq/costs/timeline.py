"""How long a pipeline takes, in closed form.

Stages and the links between them are alike here: actors that each take some time for every
micro-batch. Arrays are [actors, batches]: `once` is an actor's time for one (the first, largest)
micro-batch, `every` its time for all micro-batches of a batch; a smaller last one counts as such.

Prefill: the first micro-batch goes down the chain, the others follow at the slowest actor's pace.
    sum_j once_j + max_j (every_j - once_j)         (= sum_j P_j + (m - 1) max_j P_j)
Decode is a loop: a micro-batch's next token waits until its last one has left the last stage.
    one step of all micro-batches: max(sum_j once_j, max_j every_j)        (= max(sum D, m max D))
The first token comes from the prefill, so n new tokens take n - 1 steps. Steps are priced at their
mean past, s + (n - 2) / 2: exact where costs are linear in the past and one term stays the larger.
Exact for micro-batches of one size. Not covered: a decode that starts while others still prefill.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Split:
    """A batch cut into micro-batches: `count` of `size`, then one of `rest` if that is not 0."""

    size: int
    count: int
    rest: int


def split(num_requests: int, micro_batch: int) -> Split:
    """How `num_requests` fall into micro-batches of at most `micro_batch`."""
    size = min(micro_batch, num_requests)
    return Split(size, num_requests // size, num_requests % size)


def mean_past(prompt_tokens: np.ndarray, new_tokens: np.ndarray) -> np.ndarray:
    """Tokens in the cache at the middle of the n - 1 decode steps (their past is s ... s + n-2)."""
    return prompt_tokens + np.maximum(new_tokens - 2, 0) / 2


def prefill_s(once: np.ndarray, every: np.ndarray) -> np.ndarray:
    """Seconds from the first micro-batch's start to the last one's end, for each batch."""
    return once.sum(axis=0) + (every - once).max(axis=0)


def decode_step_s(once: np.ndarray, every: np.ndarray) -> np.ndarray:
    """Seconds in which every request of a batch gets one more token, for each batch."""
    return np.maximum(once.sum(axis=0), every.max(axis=0))
