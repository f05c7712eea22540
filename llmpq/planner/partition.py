"""Cutting layers into contiguous stages by dynamic programming over (device, end layer).

`least_bottleneck` minimises the largest cost of a stage, `least_sum` the summed one; both take the
cost of every range of layers on every device, infinity where it does not fit.

`Fronts` answers: how little sensitivity can the layers a..e-1 have within so many bytes? It keeps,
for each range, the precisions that no others beat in both bytes and sensitivity (at most
`MAX_POINTS` of them; the answer fits always, and is the least one unless points were dropped).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

MAX_POINTS = 512
TIE = 1e-12


def least_bottleneck(cost: np.ndarray) -> tuple[float, list[int]]:
    """`cost[j, a, e]`: layers a..e-1 on device j. Returns (largest cost, ends of the stages)."""
    best = np.full(cost.shape[1], np.inf)
    best[0] = -np.inf
    starts = []
    for matrix in cost:
        total = np.maximum(best[:, None], matrix)
        starts.append(total.argmin(axis=0))
        best = total.min(axis=0)
    return float(best[-1]), _ends(starts)


def least_sum(cost: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns (least summed cost, which ranges `[j, a, e]` lie on some way to it)."""
    forward = [_start(cost.shape[1], 0)]
    for matrix in cost:
        forward.append((forward[-1][:, None] + matrix).min(axis=0))
    backward = [_start(cost.shape[1], -1)]
    for matrix in cost[::-1]:
        backward.append((matrix + backward[-1][None]).min(axis=1))
    least = float(forward[-1][-1])
    through = [
        forward[j][:, None] + matrix + backward[len(cost) - 1 - j][None]
        for j, matrix in enumerate(cost)
    ]
    return least, np.stack(through) <= least + TIE * max(1.0, abs(least))


def range_lengths(num_layers: int) -> np.ndarray:
    """[L + 1, L + 1]: how many layers a..e-1 are; 0 where there is none."""
    ends = np.arange(num_layers + 1)
    return np.maximum(ends[None] - ends[:, None], 0)


def of_ranges(each: np.ndarray) -> np.ndarray:
    """[N, L + 1, L + 1]: the sums of `each` [N, L] over layers a..e-1."""
    upto = np.concatenate([np.zeros((len(each), 1)), each.cumsum(axis=1)], axis=1)
    return upto[:, None, :] - upto[:, :, None]


def _start(width: int, at: int) -> np.ndarray:
    cost = np.full(width, np.inf)
    cost[at] = 0.0
    return cost


def _ends(starts: list[np.ndarray]) -> list[int]:
    ends = [len(starts[0]) - 1]
    for start in reversed(starts[1:]):
        ends.append(int(start[ends[-1]]))
    return ends[::-1]


def like_starts(omega: np.ndarray) -> list[int]:
    """For every layer, the earliest one from which on layers are as sensitive, one after the other.

    Ranges that start at either have the same fronts. `omega` is [L, B].
    """
    _, rows = np.unique(omega, axis=0, return_inverse=True)
    alike = rows.ravel().tolist()
    tails = (alike[start:] for start in range(len(alike)))
    return [
        next(a for a in range(start + 1) if alike[a : a + len(tail)] == tail)
        for start, tail in enumerate(tails)
    ]


@dataclass(frozen=True)
class Front:
    """Undominated precisions of a range: more bytes (over the smallest option), less omega."""

    num_bytes: np.ndarray
    omega: np.ndarray
    counts: np.ndarray  # [points, B]
    parent: np.ndarray  # point of the range that is one layer shorter
    option: np.ndarray  # of the last layer

    def best(self, slack: float) -> int:
        """The point of least omega within `slack` bytes; -1 where none fits."""
        return int(np.searchsorted(self.num_bytes, slack * (1 + TIE), side="right")) - 1


class Fronts:
    """The fronts of all ranges, for the options of a mask; `like`: see `like_starts`."""

    def __init__(
        self, omega: np.ndarray, num_bytes: np.ndarray, mask: np.ndarray, like: Sequence[int]
    ) -> None:
        """`omega` [L, B]; `num_bytes` [B] of one layer; `mask` [B]; `like` [L]."""
        self.options = np.flatnonzero(mask)
        self.num_options = len(mask)
        sizes = num_bytes[self.options]
        self._extra = sizes - sizes.min()  # the same whatever the cache of a layer takes
        self._omega = omega[:, self.options]
        self.num_layers = len(omega)
        self.starts = sorted(set(like))
        self.fronts = {start: self._from(start, self.num_layers) for start in self.starts}

    def best_within(self, room: float, least_bytes: float) -> Iterator[tuple[int, int, int]]:
        """(start, end, point of least omega) of every range that so many bytes hold.

        Of ranges whose layers are like those of an earlier start, only the earlier ones.
        `least_bytes`: of a layer at the smallest option, its cache included.
        """
        most = int(max(0.0, room) * (1 + TIE) // least_bytes) if least_bytes else self.num_layers
        for start in self.starts:
            for end in range(start + 1, min(start + most, self.num_layers) + 1):
                slack = room - (end - start) * least_bytes
                point = self.front(start, end).best(slack)
                if point >= 0:
                    yield start, end, point

    def front(self, start: int, end: int) -> Front:
        """Of layers `start` up to but not including `end`."""
        return self.fronts[start][end - start]

    def choice(self, start: int, end: int, point: int) -> tuple[int, ...]:
        """The options of a range at one point of its front."""
        options = []
        for stop in range(end, start, -1):
            front = self.front(start, stop)
            options.append(int(front.option[point]))
            point = int(front.parent[point])
        return tuple(options[::-1])

    def _from(self, start: int, layers: int) -> list[Front]:
        none = np.zeros(1, dtype=int)
        empty = Front(np.zeros(1), np.zeros(1), np.zeros((1, self.num_options), int), none, none)
        fronts = [empty]
        for layer in range(start, layers):
            fronts.append(self._extended(fronts[-1], layer))
        return fronts

    def _extended(self, front: Front, layer: int) -> Front:
        num_bytes = (front.num_bytes[:, None] + self._extra).ravel()
        omega = (front.omega[:, None] + self._omega[layer]).ravel()
        keep = _undominated(num_bytes, omega)
        parent, column = np.divmod(keep, len(self.options))
        option = self.options[column]
        counts = front.counts[parent]
        counts[np.arange(len(keep)), option] += 1
        return Front(num_bytes[keep], omega[keep], counts, parent, option)


def _undominated(num_bytes: np.ndarray, omega: np.ndarray) -> np.ndarray:
    order = np.lexsort((omega, num_bytes))
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], omega[order][:-1]]))
    keep = order[omega[order] < best_before]
    if len(keep) > MAX_POINTS:
        keep = keep[np.linspace(0, len(keep) - 1, MAX_POINTS).round().astype(int)]
    return keep
