"""Whether the machine itself was slower for a while: a fixed computation timed through the run.

`Watch` times the reference every second and gives its latest time, which is kept beside every
sample. A sample is unsteady if its reference was off the median of all of them by more than 5 %,
and by more than the reference's own noise explains (three times what it changes by from one timing
to the next: on a shared machine that was 8 %, and said nothing about the samples beside it).
Unsteady samples are left out where the cell has steady ones, and said; no time is ever scaled.
Not covered: disturbances shorter than a few seconds, which the outlier rule is for.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

TOLERANCE = 0.05
EVERY_S = 1.0
NOISE_FACTOR = 3.0
NORMAL_MAD = 1.4826  # a normal spread over its median absolute deviation
MIN_STEADY = 3  # fewer steady samples than this, and the unsteady ones are kept


@dataclass
class Watch:
    """The reference's times so far. `measure()` times it once, in ms."""

    measure: Callable[[], float]
    clock: Callable[[], float]
    levels_ms: list[float] = field(default_factory=list)
    _last_s: float = -np.inf

    def level_ms(self) -> float:
        """The reference's latest time, at most a second old."""
        if self.clock() - self._last_s >= EVERY_S:
            self.levels_ms.append(self.measure())
            self._last_s = self.clock()
        return self.levels_ms[-1]

    def usual(self) -> "Usual":
        """What is normal for this machine, by all levels so far."""
        levels = np.array(self.levels_ms)
        median_ms = float(np.median(levels)) if len(levels) else 1.0
        steps = np.abs(np.diff(levels)) / median_ms
        noise = float(np.median(steps)) * NORMAL_MAD / math.sqrt(2) if len(steps) else 0.0
        return Usual(median_ms, max(TOLERANCE, NOISE_FACTOR * noise), noise)

    def notes(self) -> list[str]:
        """What there is to say about drift and noise, in words."""
        usual = self.usual()
        ratios = np.array(self.levels_ms) / usual.level_ms - 1
        notes = []
        if off := sum(not usual.holds(level) for level in self.levels_ms):
            extent = f"{100 * ratios.min():+.0f} to {100 * ratios.max():+.0f} %"
            notes.append(
                f"this machine's speed drifted: {off} of {len(ratios)} timings of a fixed "
                f"computation were more than {100 * usual.tolerance:.0f} % from their median "
                f"({extent})"
            )
        if usual.noise > TOLERANCE:
            notes.append(
                f"this machine is busy: a fixed computation varied by {100 * usual.noise:.0f} % "
                "from one timing to the next"
            )
        return notes


@dataclass(frozen=True)
class Usual:
    """The reference's median, how far from it is still usual, and its noise; the latter shares."""

    level_ms: float
    tolerance: float = TOLERANCE
    noise: float = 0.0

    def holds(self, level_ms: float) -> bool:
        """Whether a level is within the tolerance."""
        return abs(level_ms / self.level_ms - 1) <= self.tolerance


def steady(times_ms: list[float], levels_ms: list[float], usual: Usual) -> list[float]:
    """The times whose reference was as usual; all of them where too few were."""
    if not is_steady(levels_ms, usual):
        return times_ms
    pairs = zip(times_ms, levels_ms, strict=True)
    return [time for time, level in pairs if usual.holds(level)]


def is_steady(levels_ms: list[float], usual: Usual) -> bool:
    """Whether enough samples were taken while the machine was as usual."""
    return sum(usual.holds(level) for level in levels_ms) >= MIN_STEADY
