"""Detects slow periods of the machine by a fixed computation that is timed throughout the run.

`DriftMonitor` times this reference computation now and then and gives its latest time, which is
kept beside every sample. On a card, a sample is unsteady if its reference time was off the median
of all of them by more than 5 %, and by more than the reference's own noise explains (three times
its usual change from one timing to the next). Unsteady samples are left out where the cell has
steady ones, and a note says so.

On a shared CPU (`scales`), the speed changes by half for seconds to minutes, and times of small
layers follow it. The reference is timed after every sample, and every time is scaled to the
reference's median speed. Over 40 s on two shared cores this changed the spread of the medians of
ten samples from 8.8 to 3.1 % (small linears), from 6.9 to 2.1 % (large ones, few rows), and from
2.9 to 3.5 % (large ones, 64 rows).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

TOLERANCE = 0.05
EVERY_S = 1.0
NOISE_FACTOR = 3.0
NORMAL_MAD = 1.4826  # a normal spread over its median absolute deviation
MIN_STEADY = 3  # with fewer steady samples, the unsteady ones are kept


@dataclass
class DriftMonitor:
    """The times of the reference so far. `measure()` times it once, in ms."""

    measure: Callable[[], float]
    clock: Callable[[], float]
    levels_ms: list[float] = field(default_factory=list)
    scales: bool = False
    _last_s: float = -np.inf

    def level_ms(self) -> float:
        """The reference's time: measured now where times are scaled, else within `EVERY_S`."""
        if self.scales or self.clock() - self._last_s >= EVERY_S:
            self.levels_ms.append(self.measure())
            self._last_s = self.clock()
        return self.levels_ms[-1]

    def speed(self) -> "MachineSpeed":
        """The normal speed of this machine, by all reference times so far."""
        levels = np.array(self.levels_ms)
        median_ms = float(np.median(levels)) if len(levels) else 1.0
        steps = np.abs(np.diff(levels)) / median_ms
        noise = float(np.median(steps)) * NORMAL_MAD / math.sqrt(2) if len(steps) else 0.0
        return MachineSpeed(median_ms, max(TOLERANCE, NOISE_FACTOR * noise), noise, self.scales)

    def notes(self) -> list[str]:
        """Notes on drift and noise."""
        speed = self.speed()
        ratios = np.array(self.levels_ms) / speed.level_ms - 1
        if self.scales:
            return _scaled_notes(ratios)
        notes = []
        if off := sum(not speed.holds(level) for level in self.levels_ms):
            extent = f"{100 * ratios.min():+.0f} to {100 * ratios.max():+.0f} %"
            notes.append(
                f"this machine's speed drifted: {off} of {len(ratios)} timings of a fixed "
                f"computation deviated by more than {100 * speed.tolerance:.0f} % from their "
                f"median ({extent})"
            )
        if speed.noise > TOLERANCE:
            notes.append(
                f"this machine is busy: a fixed computation varied by {100 * speed.noise:.0f} % "
                "from one timing to the next"
            )
        return notes


def _scaled_notes(ratios: np.ndarray) -> list[str]:
    """A note on changes of speed that scaling removed, where they were large."""
    if not len(ratios):
        return []
    low, high = np.percentile(100 * ratios, (10, 90))
    if high - low <= 100 * TOLERANCE:
        return []
    return [
        f"this machine's speed changed: a fixed computation deviated by {low:+.0f} to {high:+.0f} "
        "% from its median (10th to 90th percentile); times are given for the median"
    ]


@dataclass(frozen=True)
class MachineSpeed:
    """The reference's median time in ms, its relative tolerance, and its relative noise.

    With `scales`, times are scaled to the median instead of being left out.
    """

    level_ms: float
    tolerance: float = TOLERANCE
    noise: float = 0.0
    scales: bool = False

    def holds(self, level_ms: float) -> bool:
        """Whether a reference time is within the tolerance."""
        return abs(level_ms / self.level_ms - 1) <= self.tolerance


def steady(times_ms: list[float], levels_ms: list[float], speed: MachineSpeed) -> list[float]:
    """The times at normal speed, or all where too few are; with `scales`, all of them scaled."""
    if speed.scales:
        return [t * speed.level_ms / level for t, level in zip(times_ms, levels_ms, strict=True)]
    if not is_steady(levels_ms, speed):
        return times_ms
    pairs = zip(times_ms, levels_ms, strict=True)
    return [time for time, level in pairs if speed.holds(level)]


def is_steady(levels_ms: list[float], speed: MachineSpeed) -> bool:
    """Whether enough samples were taken at normal speed, or times are scaled."""
    return speed.scales or sum(speed.holds(level) for level in levels_ms) >= MIN_STEADY
