"""What the first stage knows of all requests, and another must know before the first job.

Jobs carry what changes from step to step (`runtime.jobs`); what stays the same for a request as
long as the run lasts is sent round once, as a table by the requests' numbers.
"""

from collections.abc import Sequence

import torch

from llmpq.runtime.sampler import Draws, Sampling
from llmpq.runtime.transport import Transport


def agree_on_draws(samplings: Sequence[Sampling], transport: Transport) -> Draws | None:
    """How the tokens of each request are chosen, in main memory; None where all are chosen alike.

    All workers must call this; only the first stage's `samplings` count, one for each request of
    the run by its number, or none at all.
    """
    own = Draws.of(samplings)
    sizes = torch.tensor([len(samplings), int(own.cuts)])
    transport.broadcast(sizes)
    count, cuts = sizes.tolist()
    if not count:
        return None
    whole, parts = own.whole, own.parts
    if len(samplings) != count:
        whole = torch.zeros(count, 2, dtype=torch.int64)
        parts = torch.zeros(count, 2, dtype=torch.float32)
    transport.broadcast(whole)
    transport.broadcast(parts)
    return Draws(whole, parts, bool(cuts))
