"""Estimates the time of a computation from samples: a median, its uncertainty, and outliers.

The 95 % confidence interval of the median is taken from order statistics: the k-th smallest and
k-th largest of n values enclose it with probability 1 - 2 P(Binomial(n, 1/2) < k), whatever the
distribution. Below six values no pair reaches 95 %, and the whole range is used instead. Outliers
are more than 5 MAD and more than 5 % above the median; they are counted and left out, as
disturbances only make a computation slower. All functions are pure and read no clock.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TARGET = 0.02  # half the interval, relative to the median
CONFIDENCE = 0.95
OUTLIER_MADS = 5.0
OUTLIER_SHARE = 0.05  # values within this share of the median are no outliers
FLOOR_MS = 1e-6


@dataclass(frozen=True)
class Estimate:
    """A median in ms with its confidence interval, the 10th and 90th percentile, and counts."""

    median_ms: float
    low_ms: float
    high_ms: float
    p10_ms: float
    p90_ms: float
    num_samples: int
    num_outliers: int

    @property
    def half_width(self) -> float:
        """Half the confidence interval as a share of the median."""
        return (self.high_ms - self.low_ms) / 2 / max(FLOOR_MS, self.median_ms)


def estimate(times_ms: Sequence[float]) -> Estimate:
    """The estimate from at least one time; outliers are left out of all its figures."""
    values = np.asarray(times_ms, dtype=float)
    kept = np.sort(values[~is_outlier(values)])
    low, high = median_interval(kept)
    p10, median, p90 = (max(FLOOR_MS, float(q)) for q in np.percentile(kept, (10, 50, 90)))
    return Estimate(median, low, high, p10, p90, len(kept), len(values) - len(kept))


def is_outlier(values: np.ndarray) -> np.ndarray:
    """Which values lie far above the median."""
    median = np.median(values)
    spread = np.median(np.abs(values - median))
    return values > median + np.maximum(OUTLIER_MADS * spread, OUTLIER_SHARE * abs(median))


def median_interval(ordered: np.ndarray) -> tuple[float, float]:
    """The 95 % confidence interval of the median of ascending values; below six: their range."""
    rank = interval_rank(len(ordered))
    return float(ordered[rank - 1]), float(ordered[-rank])


def interval_rank(count: int) -> int:
    """The largest k for which the k-th smallest and largest enclose the median 95 times in 100."""
    tail, rank = 0.0, 1
    for k in range(count // 2):
        tail += math.comb(count, k) / 2**count
        if 2 * tail > 1 - CONFIDENCE:
            break
        rank = k + 1
    return rank
