"""Models that may be fitted to measured times of a layer, by name (`RECIPES`).

What each of them says of a layer stands in docs/latency-model.md; `costs.fits` chooses among them.
`pinned` puts any of them through the measured rows: a cell that was measured costs what was
measured there, to the spread that its row states.

Lengths may be numpy arrays; times are seconds. Not covered: which recipe is best, and what rows of
one length alone cannot tell (`costs.anchored`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from llmpq.costs.least_squares import least_squares, non_negative
from llmpq.costs.links import Seconds, Tokens
from llmpq.kernel_table import MAX_ROWS
from llmpq.profile_data import ProfileRow

Features = Callable[[Any, Any], tuple[Any, ...]]

LEAST_A_SIDE = 4  # of a switch
OCTAVE = np.log(2.0)
REWEIGHTINGS = 2
BY_TOKENS = ("prefill", "embedding")  # phases whose rows are all tokens of the prompts
KNEES = tuple(2.0**power for power in range(1, 13))  # rows


@dataclass(frozen=True)
class Points:
    """Measured rows as arrays of equal length; `low` and `high` bound most of their samples."""

    phase: str
    batch: np.ndarray
    length: np.ndarray
    seconds: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def take(self, chosen: np.ndarray) -> "Points":
        """Some of them."""
        arrays = self.batch, self.length, self.seconds, self.low, self.high
        return Points(self.phase, *(array[chosen] for array in arrays))

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def noise(self) -> np.ndarray:
        """Half of each row's spread (10th to 90th percentile) over its time; 0: none is stated."""
        return (self.high - self.low) / (2 * self.seconds)

    @property
    def rows(self) -> np.ndarray:
        """Of the matrix products."""
        return np.asarray(num_rows(self.phase, self.batch, self.length))


class Model(Protocol):
    """Seconds of one phase."""

    def seconds(self, micro_batch: Any, tokens: Tokens) -> Seconds:
        """For `micro_batch` requests of `tokens` prompt (decode: past) tokens."""


Recipe = Callable[[Points], Model]


def points_of(rows: Sequence[ProfileRow]) -> Points:
    """Rows of one phase as arrays; several rows of one point are averaged."""
    keys = np.array([(row.micro_batch, row.tokens) for row in rows], dtype=float)
    unique, where = np.unique(keys, axis=0, return_inverse=True)
    count = np.bincount(where.ravel())

    def mean_s(times: Iterable[float]) -> np.ndarray:
        return np.bincount(where.ravel(), weights=np.array(list(times)) / 1000) / count

    return Points(
        rows[0].phase,
        unique[:, 0],
        unique[:, 1],
        mean_s(row.time_ms for row in rows),
        mean_s(min(row.time_ms_p10, row.time_ms) for row in rows),
        mean_s(max(row.time_ms_p90, row.time_ms) for row in rows),
    )


def grouped(rows: Iterable[ProfileRow]) -> dict[tuple[str, str], list[ProfileRow]]:
    """By (precision, phase); "" where the precision does not matter."""
    groups: dict[tuple[str, str], list[ProfileRow]] = defaultdict(list)
    for row in rows:
        precision = row.precision if row.phase in ("prefill", "decode") else ""
        groups[precision, row.phase].append(row)
    return groups


# ---- linear models


@dataclass(frozen=True)
class Linear:
    """A sum of features with coefficients."""

    features: Features
    coefficients: np.ndarray

    def seconds(self, micro_batch: Any, tokens: Tokens) -> Seconds:
        """The sum."""
        return _columns(self.features, micro_batch, tokens) @ self.coefficients


@dataclass(frozen=True)
class Switching:
    """One model up to `num_rows` rows of a matrix product, another above."""

    phase: str
    num_rows: int
    below: Model
    above: Model

    def seconds(self, micro_batch: Any, tokens: Tokens) -> Seconds:
        """By the number of rows."""
        few = num_rows(self.phase, micro_batch, tokens) <= self.num_rows
        parts = (model.seconds(micro_batch, tokens) for model in (self.below, self.above))
        return np.where(few, *parts)


@dataclass(frozen=True)
class Lines:
    """For each micro-batch that was measured at two lengths, straight lines between these."""

    otherwise: Model
    curves: Mapping[int, tuple[np.ndarray, np.ndarray]]

    def seconds(self, micro_batch: Any, tokens: Tokens) -> Seconds:
        """Beyond the measured lengths, on the line of the nearest two."""
        if np.ndim(micro_batch):
            pairs = zip(micro_batch, tokens, strict=True)
            return np.array([float(self.seconds(int(q), n)) for q, n in pairs])
        if micro_batch not in self.curves:
            return self.otherwise.seconds(micro_batch, tokens)
        lengths, seconds = self.curves[micro_batch]
        right = np.clip(np.searchsorted(lengths, tokens), 1, len(lengths) - 1)
        share = (tokens - lengths[right - 1]) / (lengths[right] - lengths[right - 1])
        return seconds[right - 1] + share * (seconds[right] - seconds[right - 1])


def _regression(points: Points) -> Model:
    features = FEATURES[points.phase]
    return Linear(features, least_squares(*_relative(features, points)))


def _non_negative(points: Points) -> Model:
    return _robust(FEATURES[points.phase], points)


def _lines(points: Points) -> Model:
    curves = {}
    for size in np.unique(points.batch):
        own = points.take(points.batch == size)
        if len(own) >= 2:
            order = np.argsort(own.length)
            curves[int(size)] = (own.length[order], own.seconds[order])
    return Lines(_regression(points), curves)


def _pieces(points: Points) -> Model:
    """With the knee that leaves the least error; it must lie between the measured rows."""
    rows = np.unique(num_rows(points.phase, points.batch, points.length))
    knees = [k for k in KNEES if rows.min() < k < rows.max()] or [float(rows.max())]
    features = [_piece_features(points.phase, knee) for knee in knees]
    return _robust(min(features, key=lambda one: _left_over(one, points)), points)


def _left_over(features: Features, points: Points) -> float:
    """Mean relative error of the best fit of these features."""
    columns, ones = _relative(features, points)
    return float(np.abs(columns @ non_negative(columns, ones) - 1).mean())


def _robust(features: Features, points: Points) -> Model:
    """Nothing negative, and little heed to rows that all others contradict (Huber's weights)."""
    columns, ones = _relative(features, points)
    weights = ones
    for _ in range(REWEIGHTINGS):
        found = non_negative(columns * weights[:, None], weights)
        off = np.abs(columns @ found - 1)
        usual = max(float(np.median(off)), 1e-4)
        weights = np.sqrt(np.minimum(1.0, 1.5 * usual / np.maximum(off, 1e-12)))
    return Linear(features, found)


def _switch(limit: int) -> Recipe:
    """Pieces on both sides, where both have rows enough."""

    def recipe(points: Points) -> Model:
        few = num_rows(points.phase, points.batch, points.length) <= limit
        if min(few.sum(), (~few).sum()) < LEAST_A_SIDE:
            return _pieces(points)
        parts = (_pieces(points.take(side)) for side in (few, ~few))
        return Switching(points.phase, limit, *parts)

    return recipe


def _relative(features: Features, points: Points) -> tuple[np.ndarray, np.ndarray]:
    """The problem of least relative error: columns over times, and ones."""
    columns = _columns(features, points.batch, points.length)
    return columns / points.seconds[:, None], np.ones(len(points))


def _columns(features: Features, micro_batch: Any, tokens: Tokens) -> np.ndarray:
    values = features(micro_batch, np.asarray(tokens, dtype=float))
    return np.stack(np.broadcast_arrays(*values), axis=-1)


def num_rows(phase: str, micro_batch: Any, tokens: Tokens) -> Any:
    """Rows of the matrix products of a layer, or of those that are looked up."""
    return micro_batch * tokens if phase in BY_TOKENS else micro_batch + 0 * tokens


def _prefill_features(p: Any, s: Any) -> tuple[Any, ...]:
    return p, s, p * s, p * s * s, 1.0


def _decode_features(q: Any, past: Any) -> tuple[Any, ...]:
    return q * (past + 1), q, past, 1.0


def _piece_features(phase: str, knee: float) -> Features:
    """Rows below and above the knee, attention, and what a call costs; all grow with the sizes."""

    def features(micro_batch: Any, tokens: Any) -> tuple[Any, ...]:
        rows = num_rows(phase, micro_batch, tokens)
        pieces = np.minimum(rows, knee), np.maximum(rows - knee, 0)
        if phase == "prefill":
            return *pieces, micro_batch * tokens * tokens, micro_batch, 1.0
        return *pieces, micro_batch * tokens, tokens, 1.0

    return features


FEATURES: dict[str, Features] = {
    "prefill": _prefill_features,
    "stage_prefill": _prefill_features,
    "decode": _decode_features,
    "stage_decode": _decode_features,
    "embedding": lambda p, s: (p * s, 1.0),
    "head": lambda q, _: (q, 1.0),
}

# ---- what is left over, smoothed between neighbours

RANGES = (0.7, 2.0)  # octaves over which neighbours are alike
NOISES = (0.02, 0.5)  # variance of a measurement over that of what is left


@dataclass(frozen=True)
class Corrected:
    """A model times what its neighbours in the profile suggest (kriging of the log ratio)."""

    model: Model
    batch: np.ndarray
    length: np.ndarray
    weights: np.ndarray
    reach: float

    def seconds(self, micro_batch: Any, tokens: Tokens) -> Seconds:
        """Far from all rows, the model alone."""
        tokens = np.asarray(tokens, dtype=float)
        batch = np.broadcast_to(np.asarray(micro_batch, dtype=float), tokens.shape)
        near = likeness(batch, tokens, self.batch, self.length, self.reach)
        return self.model.seconds(micro_batch, tokens) * np.exp(near @ self.weights)


def _corrected(recipe: Recipe) -> Recipe:
    def with_neighbours(points: Points) -> Model:
        model = recipe(points)
        left = np.log(points.seconds / np.maximum(at(model, points), points.seconds / 10))
        batch, length = points.batch, points.length
        found = (_kriging(batch, length, left, r, n) for r in RANGES for n in NOISES)
        _, reach, weights = min(found, key=lambda one: one[0])
        return Corrected(model, batch, length, weights, reach)

    return with_neighbours


def _kriging(
    batch: np.ndarray, length: np.ndarray, left: np.ndarray, reach: float, noise: float
) -> tuple[float, float, np.ndarray]:
    """Leave-one-out error, reach and weights (the error in closed form: Rasmussen and Williams,
    "Gaussian Processes for Machine Learning" (2006), equation 5.12)."""
    alike = likeness(batch, length, batch, length, reach)
    inverse = np.linalg.inv(alike + noise * np.eye(len(left)))
    weights = inverse @ left
    return float(np.abs(weights / np.diag(inverse)).mean()), reach, weights


def likeness(
    batch: np.ndarray, length: np.ndarray, others: np.ndarray, lengths: np.ndarray, reach: float
) -> np.ndarray:
    """exp(-distance / reach), [.., others], in octaves of batch and length."""
    first = np.log(batch)[..., None] - np.log(others)
    second = np.log(length + 1)[..., None] - np.log(lengths + 1)
    return np.exp(-np.sqrt(first**2 + second**2) / (OCTAVE * reach))


CORRECTED = ", corrected by neighbours"
REGRESSION, NON_NEGATIVE, LINES = "regression", "non-negative", "lines between lengths"
PLAIN: dict[str, Recipe] = {
    REGRESSION: _regression,
    LINES: _lines,
    NON_NEGATIVE: _non_negative,
    "pieces": _pieces,
    **{f"pieces, switch at {rows} rows": _switch(rows) for rows in MAX_ROWS},
}
RECIPES = PLAIN | {name + CORRECTED: _corrected(recipe) for name, recipe in PLAIN.items()}

# ---- through what was measured

PIN_OCTAVES = 0.25  # over which what a cell was measured at fades


def pinned(recipe: Recipe) -> Recipe:
    """The same model, bent to within the spread that each measured row states."""

    def through_rows(points: Points) -> Model:
        model = recipe(points)
        found = np.maximum(at(model, points), points.seconds / 10)
        left = np.log(np.clip(found, points.low, points.high) / found)
        if np.abs(left).max() < 1e-9:
            return model
        alike = likeness(points.batch, points.length, points.batch, points.length, PIN_OCTAVES)
        return Corrected(
            Floored(model, float(points.seconds.min()) / 10),
            points.batch,
            points.length,
            np.linalg.solve(alike, left),
            PIN_OCTAVES,
        )

    return through_rows


@dataclass(frozen=True)
class Floored:
    """A model that is nowhere below `floor_s`."""

    model: Model
    floor_s: float

    def seconds(self, micro_batch: Any, tokens: Tokens) -> Seconds:
        """The larger of both."""
        return np.maximum(self.floor_s, self.model.seconds(micro_batch, tokens))


def at(model: Model, points: Points) -> np.ndarray:
    """What a model says of measured points."""
    return np.asarray(model.seconds(points.batch, points.length))
