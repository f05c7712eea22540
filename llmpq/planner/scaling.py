"""Simulated seconds over those of the closed form, by the sizes of a run and its number of stages.

Where a run was simulated, the closed form of all plans of its sizes is multiplied by that.
Not covered: which runs are simulated (`confirm`).
"""

from collections.abc import Mapping
from typing import NamedTuple


class ScaledSizes(NamedTuple):
    """Sizes of a run whose closed form is corrected alike."""

    batch: int
    prefill_micro_batch: int
    decode_micro_batch: int
    chunk_tokens: int


Scales = Mapping[ScaledSizes, Mapping[int, float]]  # by the number of stages


def scale_at(scales: Scales, sizes: ScaledSizes, num_stages: int) -> float:
    """As simulated with so many stages, or with the nearest number of them; 1 if never."""
    some = scales.get(sizes)
    if not some:
        return 1.0
    return some[min(some, key=lambda number: (abs(number - num_stages), number))]


def least_change(scales: Scales, before: Scales, most_stages: int) -> float:
    """No scale is less than so many times what it was `before`; 1 at most."""
    changes = [
        scale_at(scales, sizes, number) / scale_at(before, sizes, number)
        for sizes in scales
        for number in range(1, most_stages + 1)
    ]
    return min([1.0, *changes])
