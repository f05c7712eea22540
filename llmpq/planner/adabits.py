"""The least summed sensitivity that memory allows, of any contiguous stages.

Of the partitions with the least sensitivity, `adabits` takes the one whose busiest stage is least
busy. Layers may be of several kinds. Not covered: the budget, and which configurations are tried.
"""

from dataclasses import dataclass

import numpy as np

from llmpq.planner.instance import Instance
from llmpq.planner.partition import Fronts, least_bottleneck, least_sum, like_starts
from llmpq.planner.value import Choice


@dataclass(frozen=True)
class Ranges:
    """For every device and range of layers: least omega, its busy time, and how to get it."""

    omega: np.ndarray  # [N, L + 1, L + 1]
    busy: np.ndarray
    sources: tuple["DeviceRanges", ...]


@dataclass(frozen=True)
class DeviceRanges:
    """The least omega of every range on a device of some capacity."""

    omega: np.ndarray  # [L + 1, L + 1]
    counts: np.ndarray  # [L + 1, L + 1, B]
    choices: dict[tuple[int, int], tuple[Fronts, int, int]]  # with start and point there


class FrontCache:
    """Fronts and ranges that configurations share: they depend on options and capacity alone."""

    def __init__(self) -> None:
        self._fronts: dict[tuple[bytes, bytes], Fronts] = {}
        self._ranges: dict[tuple[bytes, float, bytes], DeviceRanges] = {}
        self._like: list[int] = []

    def like(self, instance: Instance) -> list[int]:
        """The starts of ranges whose layers are like others (`like_starts`)."""
        self._like = self._like or like_starts(instance.omega)
        return self._like

    def fronts(self, instance: Instance, rank: int, mask: np.ndarray) -> Fronts:
        """The fronts of a mask of options, for a stage's bytes of a layer."""
        num_bytes = instance.layer_bytes[rank]
        key = mask.tobytes(), (num_bytes - num_bytes.min()).tobytes()
        if key not in self._fronts:
            self._fronts[key] = Fronts(instance.omega, num_bytes, mask, self.like(instance))
        return self._fronts[key]

    def ranges(self, instance: Instance, rank: int) -> DeviceRanges:
        """The least omega of every range on one stage."""
        mask, room = instance.available[rank], float(instance.capacity[rank])
        key = mask.tobytes(), room, instance.layer_bytes[rank].tobytes()
        if key not in self._ranges:
            self._ranges[key] = _device_ranges(self, instance, rank)
        return self._ranges[key]


def adabits(instance: Instance, fronts: FrontCache) -> Choice | None:
    """Least sensitivity under memory, then the least busy bottleneck."""
    ranges = adabits_ranges(instance, fronts)
    least, on_way = least_sum(ranges.omega)
    if not np.isfinite(least):
        return None
    _, ends = least_bottleneck(np.where(on_way, ranges.busy, np.inf))
    starts = [0, *ends[:-1]]
    cuts = zip(ranges.sources, starts, ends, strict=True)
    return tuple(_range_choice(source, a, e) for source, a, e in cuts)


def adabits_ranges(instance: Instance, fronts: FrontCache) -> Ranges:
    """The ranges of every device."""
    sources = tuple(fronts.ranges(instance, j) for j in range(instance.num_stages))
    per_layer = np.where(instance.available, instance.layer.busy, 0.0)
    busy = [s.counts @ per_layer[j] + instance.fixed.busy[j] for j, s in enumerate(sources)]
    return Ranges(np.stack([s.omega for s in sources]), np.stack(busy), sources)


def _device_ranges(cache: FrontCache, instance: Instance, rank: int) -> DeviceRanges:
    width = instance.num_layers + 1
    found = DeviceRanges(
        np.full((width, width), np.inf), np.zeros((width, width, instance.num_options)), {}
    )
    mask, room = instance.available[rank], float(instance.capacity[rank])
    for options, unpacked in (
        (mask & ~instance.packed, 0.0),
        (mask, instance.unpacked_bytes[rank]),
    ):
        if options.any():
            least = float(instance.layer_bytes[rank, options].min())
            _improve(found, cache.fronts(instance, rank, options), room - unpacked, least)
    return _spread(found, np.array(cache.like(instance)))


def _spread(found: DeviceRanges, like: np.ndarray) -> DeviceRanges:
    """What ranges have, for all that start like them; `like` [L]."""
    layers = len(like)
    start, end = np.triu_indices(layers, 1, layers + 1)
    known = like[start], like[start] + end - start
    omega, counts = np.full_like(found.omega, np.inf), np.zeros_like(found.counts)
    omega[start, end], counts[start, end] = found.omega[known], found.counts[known]
    choices = {
        (a, e): found.choices[int(like[a]), int(like[a]) + e - a]
        for a, e in np.argwhere(np.isfinite(omega)).tolist()
    }
    return DeviceRanges(omega, counts, choices)


def _improve(found: DeviceRanges, fronts: Fronts, room: float, least_bytes: float) -> None:
    for start, end, point in fronts.best_within(room, least_bytes):
        front = fronts.front(start, end)
        if front.omega[point] < found.omega[start, end]:
            found.omega[start, end] = front.omega[point]
            found.counts[start, end] = front.counts[point]
            found.choices[start, end] = fronts, start, point


def _range_choice(source: DeviceRanges, start: int, end: int) -> tuple[int, ...]:
    fronts, first, point = source.choices[start, end]
    return fronts.choice(first, first + end - start, point)
