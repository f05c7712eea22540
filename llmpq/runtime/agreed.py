"""Broadcasts the sampling settings of all requests from the first stage to the others.

Jobs carry what changes from step to step (`runtime.jobs`). What stays the same for a request during
the whole run is broadcast once before the first job, as a table by the requests' numbers.
"""

from collections.abc import Sequence

import torch

from llmpq.runtime.sampler import Draws, Sampling
from llmpq.runtime.transport import Transport


def agree_on_draws(samplings: Sequence[Sampling], transport: Transport) -> Draws | None:
    """The sampling settings of each request, in main memory; None where all share one setting.

    All workers must call this. Only the first stage's `samplings` are used: one for each request
    of the run by its number, or none at all.
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
