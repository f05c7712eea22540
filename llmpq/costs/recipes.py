"""Models that may be fitted to measured times of a layer, by name (`RECIPES`).

What each of them says of a layer stands in docs/latency-model.md; `costs.fits` chooses among them.
Of a layer with routed experts, how many a call uses (`costs.routing`) is a feature of all of them.
Coefficients are fitted by scikit-learn, whose import takes longer than planning: it is imported
where something is fitted, and profile.json keeps the coefficients (`parts_of`, `model_of`).
`pinned` puts any model through the measured rows: a cell that was measured costs what was measured
there, to the spread that its row states.

Lengths may be numpy arrays; times are seconds. Not covered: which recipe is best, and what rows of
one length alone cannot tell (`costs.anchored`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from llmpq.costs.attended import attended_past
from llmpq.costs.links import Seconds, Tokens
from llmpq.costs.routing import TOKENS, Routing, measured_routing
from llmpq.kernel_table import MAX_ROWS
from llmpq.model_spec import window_in
from llmpq.profile_data import ModelPart, ProfileRow

LEAST_A_SIDE = 4  # of a switch
OCTAVE = np.log(2.0)
REWEIGHTINGS = 2
BY_TOKENS = ("prefill", "embedding")  # phases whose rows are all tokens of the prompts
KNEES = tuple(2.0**power for power in range(1, 13))  # rows


@dataclass(frozen=True)
class Points:
    """Measured rows as arrays of equal length; `low` and `high` bound most of their samples.

    `routing`: of a layer with experts.
    """

    phase: str
    batch: np.ndarray
    length: np.ndarray
    seconds: np.ndarray
    low: np.ndarray
    high: np.ndarray
    routing: Routing | None = None

    def take(self, chosen: np.ndarray) -> "Points":
        """Some of them."""
        names = ("batch", "length", "seconds", "low", "high")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})

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
    """Rows of one phase as arrays; several rows of one point are averaged.

    Past tokens that a window hides are no part of a point.
    """
    keys = np.array([(row.micro_batch, _length(row)) for row in rows], dtype=float)
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
        routing=measured_routing(rows) if rows[0].phase in TOKENS else None,
    )


def _length(row: ProfileRow) -> Tokens:
    return attended_past(row.phase, row.tokens, window_in(row.model_key))


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
    """A sum of features with coefficients: of two pieces with a `knee`, else of the regression.

    With `routing`, the experts that are used are one more.
    """

    phase: str
    knee: float | None
    coefficients: np.ndarray
    routing: Routing | None = None

    def seconds(self, micro_batch: Any, tokens: Tokens) -> Seconds:
        """The sum."""
        columns = _columns(self.phase, self.knee, micro_batch, tokens, self.routing)
        return columns @ self.coefficients


@dataclass(frozen=True)
class Switching:
    """One model up to `num_rows` rows of a matrix product, another above."""

    phase: str
    num_rows: int
    below: Linear
    above: Linear

    def seconds(self, micro_batch: Any, tokens: Tokens) -> Seconds:
        """By the number of rows."""
        few = num_rows(self.phase, micro_batch, tokens) <= self.num_rows
        parts = (model.seconds(micro_batch, tokens) for model in (self.below, self.above))
        return np.where(few, *parts)


@dataclass(frozen=True)
class Lines:
    """For each micro-batch that was measured at two lengths, straight lines between these."""

    otherwise: Linear
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


def _regression(points: Points) -> Linear:
    found = _least_squares(*_relative(points, None))
    return Linear(points.phase, None, found, points.routing)


def _non_negative(points: Points) -> Linear:
    return _robust(points, None)


def _lines(points: Points) -> Lines:
    return Lines(_regression(points), _curves(points))


def _curves(points: Points) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Lengths and seconds of each micro-batch that was measured at two lengths."""
    curves = {}
    for size in np.unique(points.batch):
        own = points.take(points.batch == size)
        if len(own) >= 2:
            order = np.argsort(own.length)
            curves[int(size)] = (own.length[order], own.seconds[order])
    return curves


def _pieces(points: Points) -> Linear:
    """With the knee that leaves the least error; it must lie between the measured rows."""
    rows = np.unique(num_rows(points.phase, points.batch, points.length))
    knees = [k for k in KNEES if rows.min() < k < rows.max()] or [float(rows.max())]
    return _robust(points, min(knees, key=lambda knee: _left_over(points, knee)))


def _left_over(points: Points, knee: float) -> float:
    """Mean relative error of the best fit with this knee."""
    columns, ones = _relative(points, knee)
    return float(np.abs(columns @ _least_squares(columns, ones, positive=True) - 1).mean())


def _robust(points: Points, knee: float | None) -> Linear:
    """Nothing negative, and little heed to rows that all others contradict (Huber's weights)."""
    columns, ones = _relative(points, knee)
    weights = ones
    for _ in range(REWEIGHTINGS):
        found = _least_squares(columns * weights[:, None], weights, positive=True)
        off = np.abs(columns @ found - 1)
        usual = max(float(np.median(off)), 1e-4)
        weights = np.sqrt(np.minimum(1.0, 1.5 * usual / np.maximum(off, 1e-12)))
    return Linear(points.phase, knee, found, points.routing)


def _switch(limit: int) -> Recipe:
    """Pieces on both sides, where both have rows enough."""

    def recipe(points: Points) -> Model:
        few = num_rows(points.phase, points.batch, points.length) <= limit
        if min(few.sum(), (~few).sum()) < LEAST_A_SIDE:
            return _pieces(points)
        parts = (_pieces(points.take(side)) for side in (few, ~few))
        return Switching(points.phase, limit, *parts)

    return recipe


def _least_squares(columns: np.ndarray, wanted: np.ndarray, positive: bool = False) -> np.ndarray:
    """Coefficients of the least sum of squares; `positive`: none is below zero.

    Columns are scaled first, so that features of very different sizes do not lose digits.
    """
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    if not positive:
        return np.asarray(np.linalg.lstsq(columns / scale, wanted, rcond=1e-10)[0] / scale)
    from sklearn.linear_model import LinearRegression

    found = LinearRegression(fit_intercept=False, positive=True).fit(columns / scale, wanted)
    return np.asarray(found.coef_ / scale)


def _relative(points: Points, knee: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The problem of least relative error: columns over times, and ones."""
    columns = _columns(points.phase, knee, points.batch, points.length, points.routing)
    return columns / points.seconds[:, None], np.ones(len(points))


def _columns(
    phase: str, knee: float | None, micro_batch: Any, tokens: Tokens, routing: Routing | None
) -> np.ndarray:
    """The features, along the last axis."""
    tokens = np.asarray(tokens, dtype=float)
    if knee is None:
        values = FEATURES[phase](micro_batch, tokens)
    else:
        values = _piece_features(phase, knee, micro_batch, tokens)
    if routing is not None:
        values = *values, routing.used(num_rows(phase, micro_batch, tokens))
    return np.stack(np.broadcast_arrays(*values), axis=-1)


def num_rows(phase: str, micro_batch: Any, tokens: Tokens) -> Any:
    """Rows of the matrix products of a layer, or of those that are looked up."""
    return micro_batch * tokens if phase in BY_TOKENS else micro_batch + 0 * tokens


def _prefill_features(p: Any, s: Any) -> tuple[Any, ...]:
    return p, s, p * s, p * s * s, 1.0


def _decode_features(q: Any, past: Any) -> tuple[Any, ...]:
    return q * (past + 1), q, past, 1.0


def _piece_features(phase: str, knee: float, micro_batch: Any, tokens: Any) -> tuple[Any, ...]:
    """Rows below and above the knee, attention, and what a call costs; all grow with the sizes."""
    rows = num_rows(phase, micro_batch, tokens)
    pieces = np.minimum(rows, knee), np.maximum(rows - knee, 0)
    if phase == "prefill":
        return *pieces, micro_batch * tokens * tokens, micro_batch, 1.0
    return *pieces, micro_batch * tokens, tokens, 1.0


FEATURES: dict[str, Callable[[Any, Any], tuple[Any, ...]]] = {
    "prefill": _prefill_features,
    "stage_prefill": _prefill_features,
    "decode": _decode_features,
    "stage_decode": _decode_features,
    "embedding": lambda p, s: (p * s, 1.0),
    "head": lambda q, _: (q, 1.0),
}

REGRESSION, NON_NEGATIVE, LINES = "regression", "non-negative", "lines between lengths"
RECIPES: dict[str, Recipe] = {
    REGRESSION: _regression,
    LINES: _lines,
    NON_NEGATIVE: _non_negative,
    "pieces": _pieces,
    **{f"pieces, switch at {rows} rows": _switch(rows) for rows in MAX_ROWS},
}

# ---- as profile.json keeps them


def parts_of(model: Model) -> tuple[ModelPart, ...]:
    """The coefficients of a recipe's model."""
    match model:
        case Linear():
            return (ModelPart(knee=model.knee, coefficients=tuple(model.coefficients.tolist())),)
        case Lines():
            return parts_of(model.otherwise)
        case Switching():
            (below,), (above,) = parts_of(model.below), parts_of(model.above)
            return below.model_copy(update={"up_to_rows": model.num_rows}), above
    raise AssertionError(f"no recipe makes {model}")


def model_of(name: str, parts: Sequence[ModelPart], points: Points) -> Model | None:
    """The model that `parts_of` took apart; `points` are those that it was fitted to.

    None where the parts are not those of this version's models.
    """
    for part in parts:
        one = points.batch[:1], points.length[:1]
        wanted = _columns(points.phase, part.knee, *one, points.routing).shape[-1]
        if len(part.coefficients) != wanted:
            return None
    lines = [
        Linear(points.phase, part.knee, np.array(part.coefficients), points.routing)
        for part in parts
    ]
    match lines, [part.up_to_rows for part in parts]:
        case [only], [None]:
            return Lines(only, _curves(points)) if name == LINES else only
        case [below, above], [int(limit), None]:
            return Switching(points.phase, limit, below, above)
    return None


# ---- through what was measured

PIN_OCTAVES = 0.25  # over which what a cell was measured at fades


def pinned(model: Model, points: Points) -> Model:
    """The same model, bent to within the spread that each measured row states."""
    found = np.maximum(at(model, points), points.seconds / 10)
    left = np.log(np.clip(found, points.low, points.high) / found)
    if np.abs(left).max() < 1e-9:
        return model
    alike = _likeness(points.batch, points.length, points)
    floor_s = float(points.seconds.min()) / 10
    return Pinned(Floored(model, floor_s), points, np.linalg.solve(alike, left))


@dataclass(frozen=True)
class Pinned:
    """A model times what measured rows ask for, the less the farther they are."""

    model: Model
    points: Points
    weights: np.ndarray

    def seconds(self, micro_batch: Any, tokens: Tokens) -> Seconds:
        """Far from all rows, the model alone."""
        tokens = np.asarray(tokens, dtype=float)
        batch = np.broadcast_to(np.asarray(micro_batch, dtype=float), tokens.shape)
        near = _likeness(batch, tokens, self.points)
        return self.model.seconds(micro_batch, tokens) * np.exp(near @ self.weights)


def _likeness(batch: np.ndarray, length: np.ndarray, points: Points) -> np.ndarray:
    """exp(-distance / PIN_OCTAVES) to each point, in octaves of batch and length; [.., points]."""
    first = np.log(batch)[..., None] - np.log(points.batch)
    second = np.log(length + 1)[..., None] - np.log(points.length + 1)
    return np.exp(-np.sqrt(first**2 + second**2) / (OCTAVE * PIN_OCTAVES))


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
