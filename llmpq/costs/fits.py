"""Seconds of a layer from measured rows of one precision and phase.

Several models are fitted, all weighted for relative error, and the one that predicts rows it has
not seen best is kept (cross-validation, `choose`). With M = rows of a matrix product (prompts x
tokens in prefill, requests in decode):
  - `regression`: the paper's (LLM-PQ, arXiv 2403.01136). Prefill of p prompts of s tokens on
    {p, s, p s, p s^2, 1}, decode of q requests on {q (past + 1), q, past, 1}.
  - `lines between lengths`: for a micro-batch that was measured itself, straight lines between
    its lengths; for others the regression.
  - `non-negative`: the regression without negative costs (Lawson and Hanson's least squares).
  - `pieces`: a roofline is the larger of a memory and a compute term, so linear in M below and
    above a knee; attention and overheads beside it, nothing negative.
  - `pieces, switch at N rows`: two of these, as kernels change with the number of rows.
Each also with a correction from its neighbours: what the model leaves over, smoothed between near
points of the profile (kriging). docs/latency-model.md says which one won, by how much.

Every prediction has an `Accuracy`: whether its point was measured, lies between measured ones or
beyond them, and how far off predictions of unseen rows near it were. Lengths may be numpy arrays;
times are seconds. Not covered: how often a device changes its speed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from llmpq.costs.links import Seconds, Tokens
from llmpq.kernel_table import MAX_ROWS
from llmpq.profile_data import Candidate, ChosenModel, ProfileRow

Features = Callable[[Any, Any], tuple[Any, ...]]

BEYOND = "beyond the profile"
SOURCES = ("measured", "interpolated", "fitted", BEYOND, "spec sheet")  # the surest first

LAYER_PHASES = ("prefill", "decode")
FOLDS = 5
LEAST_FOR_CHOICE = 10  # rows; with fewer, the non-negative regression alone
LEAST_A_SIDE = 4  # of a switch
OCTAVE = np.log(2.0)
NEAR = 1.0  # octaves: so near a measured row, a point lies "between measured ones"
REWEIGHTINGS = 2
RIDGE = 1e-9
KNEES = tuple(2.0**power for power in range(1, 13))  # rows


@dataclass(frozen=True)
class Points:
    """Measured rows as arrays of equal length."""

    phase: str
    batch: np.ndarray
    length: np.ndarray
    seconds: np.ndarray

    def take(self, chosen: np.ndarray) -> "Points":
        """Some of them."""
        return Points(self.phase, self.batch[chosen], self.length[chosen], self.seconds[chosen])

    def __len__(self) -> int:
        return len(self.seconds)


class Model(Protocol):
    """Seconds of one phase."""

    def seconds(self, micro_batch: Any, tokens: Tokens) -> Seconds:
        """For `micro_batch` requests of `tokens` prompt (decode: past) tokens."""


Recipe = Callable[[Points], Model]


@dataclass(frozen=True)
class Accuracy:
    """Where a prediction comes from, and its expected relative error: a mean, no bound.

    The error is None where nothing tells.
    """

    source: str  # one of SOURCES
    error: float | None


@dataclass(frozen=True)
class Fitted:
    """The model that was chosen, and what predictions of unseen rows were worth.

    `errors` [rows]: relative error of each row, predicted without it. `beyond`: error an octave
    outside the measured range.
    """

    name: str
    model: Model
    points: Points
    errors: np.ndarray
    beyond: float

    @property
    def mean_error(self) -> float:
        """Relative, of rows that the model had not seen."""
        return float(self.errors.mean())

    def seconds(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """Never below half the shortest measured time."""
        floor_s = self.points.seconds.min() / 2
        return np.maximum(floor_s, self.model.seconds(micro_batch, tokens))

    def accuracy(self, micro_batch: int, tokens: float) -> Accuracy:
        """Errors of near rows count most."""
        away = _octaves(self.points, micro_batch, tokens)
        weight = np.exp(-away)
        error = float(weight @ self.errors / weight.sum())
        outside = _octaves_outside(self.points, micro_batch, tokens)
        if outside > 0:
            return Accuracy(BEYOND, error + outside * self.beyond)
        if away.min() == 0:
            return Accuracy("measured", error)
        return Accuracy("interpolated" if away.min() <= NEAR else "fitted", error)


def fit(rows: Sequence[ProfileRow], known: str | None = None) -> Fitted:
    """The model that predicts unseen rows of one phase and precision best; `known`: its name."""
    points = points_of(rows)
    return _fitted(known if known in RECIPES else choose([points]), points)


def fit_all(
    rows: Iterable[ProfileRow], known: Mapping[tuple[str, str], str] | None = None
) -> dict[tuple[str, str], Fitted]:
    """A model for each precision and phase: one recipe a phase, chosen over all its precisions.

    The kernels differ, what makes them slow hardly does, and four times the rows choose more
    surely. `known`: recipes by (precision, phase) that need not be chosen.
    """
    groups = {key: points_of(group) for key, group in grouped(rows).items()}
    names = {key: name for key, name in (known or {}).items() if name in RECIPES}
    for phase in dict.fromkeys(phase for _, phase in groups):
        open_keys = [key for key in groups if key[1] == phase and key not in names]
        large = [groups[key] for key in open_keys if len(groups[key]) >= LEAST_FOR_CHOICE]
        name = choose(large)
        for key in open_keys:
            names[key] = name if len(groups[key]) >= LEAST_FOR_CHOICE else NON_NEGATIVE
    return {key: _fitted(names[key], points) for key, points in groups.items()}


def _fitted(name: str, points: Points) -> Fitted:
    recipe = RECIPES[name]
    errors = cross_validate(recipe, points)
    return Fitted(name, recipe(points), points, errors, _beyond(recipe, points, errors))


def choose(groups: Sequence[Points]) -> str:
    """The recipe of least mean error on unseen rows over groups of one phase."""
    fewest = min((len(points) for points in groups), default=0)
    if fewest < LEAST_FOR_CHOICE or groups[0].phase not in LAYER_PHASES:
        return NON_NEGATIVE

    def error(name: str) -> float:
        found = [cross_validate(RECIPES[name], points).mean() for points in groups]
        return float(np.mean(found))

    best = min(PLAIN, key=error)
    return min((best, best + CORRECTED), key=error)


def cross_validate(recipe: Recipe, points: Points) -> np.ndarray:
    """Relative error of every row, predicted by a model that has not seen its fold."""
    if len(points) < 2:
        return np.ones(len(points))  # nothing is known of any other point
    order = np.lexsort((points.length, points.batch))
    errors = np.zeros(len(points))
    folds = min(FOLDS, len(points))
    for fold in range(folds):
        unseen = order[fold::folds]
        seen = np.setdiff1d(order, unseen)
        model = recipe(points.take(seen))
        errors[unseen] = _errors(model, points.take(unseen))
    return errors


def chosen_models(rows: Sequence[ProfileRow]) -> list[ChosenModel]:
    """What `fit` chooses for the layers of every model, precision and phase."""
    found = []
    for model_key in dict.fromkeys(row.model_key for row in rows):
        mine = [r for r in rows if r.model_key == model_key and r.phase in LAYER_PHASES]
        found += [
            ChosenModel(
                model_key=model_key,
                precision=precision,
                phase="prefill" if phase == "prefill" else "decode",
                model=one.name,
                mean_error=one.mean_error,
            )
            for (precision, phase), one in fit_all(mine).items()
        ]
    return found


def worst(
    rows: Sequence[ProfileRow], candidates: Sequence[Candidate], count: int
) -> list[Candidate]:
    """The `count` candidates to measure next: where predictions are expected to be worst.

    A candidate's expected error falls with each one chosen near it.
    """
    kinds: list[tuple[str, str]] = [(c.precision, c.phase) for c in candidates]
    fits = fit_all(row for row in rows if (row.precision, row.phase) in kinds)
    expected = np.array([_expected(fits, one) for one in candidates])
    place = np.log([[c.micro_batch, c.tokens + 1] for c in candidates]) / OCTAVE
    chosen: list[Candidate] = []
    for _ in range(min(count, len(candidates))):
        best = int(np.argmax(expected))
        chosen.append(candidates[best])
        same = np.array([kind == kinds[best] for kind in kinds])
        near = np.exp(-np.abs(place - place[best]).sum(axis=1))
        expected = np.where(same, expected * (1 - near), expected)
        expected[best] = -1.0
    return chosen


def _expected(fits: "dict[tuple[str, str], Fitted]", candidate: Candidate) -> float:
    """Error of a candidate, more where no measured row is near."""
    key = candidate.precision, candidate.phase
    if key not in fits:
        return 1.0
    found = fits[key]
    near = float(_octaves(found.points, candidate.micro_batch, candidate.tokens).min())
    error = found.accuracy(candidate.micro_batch, candidate.tokens).error
    return near if error is None else near * error


def points_of(rows: Sequence[ProfileRow]) -> Points:
    """Rows of one phase as arrays; several rows of one point are averaged."""
    keys = np.array([(row.micro_batch, row.tokens) for row in rows], dtype=float)
    unique, where = np.unique(keys, axis=0, return_inverse=True)
    times = np.array([row.time_ms for row in rows]) / 1000
    seconds = np.bincount(where.ravel(), weights=times) / np.bincount(where.ravel())
    return Points(rows[0].phase, unique[:, 0], unique[:, 1], seconds)


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
        few = _num_rows(self.phase, micro_batch, tokens) <= self.num_rows
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
    return Linear(features, _least_squares(*_relative(features, points)))


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
    rows = np.unique(_num_rows(points.phase, points.batch, points.length))
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


def _switch(num_rows: int) -> Recipe:
    """Pieces on both sides, where both have rows enough."""

    def recipe(points: Points) -> Model:
        few = _num_rows(points.phase, points.batch, points.length) <= num_rows
        if min(few.sum(), (~few).sum()) < LEAST_A_SIDE:
            return _pieces(points)
        parts = (_pieces(points.take(side)) for side in (few, ~few))
        return Switching(points.phase, num_rows, *parts)

    return recipe


def _relative(features: Features, points: Points) -> tuple[np.ndarray, np.ndarray]:
    """The problem of least relative error: columns over times, and ones."""
    columns = _columns(features, points.batch, points.length)
    return columns / points.seconds[:, None], np.ones(len(points))


def _least_squares(columns: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    return np.linalg.lstsq(columns / scale, wanted, rcond=1e-10)[0] / scale


def non_negative(columns: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares with coefficients >= 0: Lawson and Hanson, "Solving Least Squares Problems"
    (1974), chapter 23. Here because importing scipy would take longer than planning."""
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    matrix = columns / scale
    gram, target = matrix.T @ matrix, matrix.T @ wanted
    solution = np.zeros(len(target))
    passive = np.zeros(len(target), dtype=bool)
    for _ in range(3 * len(target)):
        gradient = np.where(passive, -np.inf, target - gram @ solution)
        if gradient.max() <= 1e-9 * len(wanted):
            break
        passive[int(gradient.argmax())] = True
        solution = _within(gram, target, solution, passive)
        passive = solution > 0
    return solution / scale


def _within(
    gram: np.ndarray, target: np.ndarray, solution: np.ndarray, passive: np.ndarray
) -> np.ndarray:
    """Solves for the passive coefficients, dropping those that would turn negative on the way."""
    passive = passive.copy()
    while passive.any():
        free = np.zeros(len(target))
        part = gram[passive][:, passive]
        part.flat[:: len(part) + 1] *= 1 + RIDGE  # features may be copies of each other
        free[passive] = np.linalg.solve(part, target[passive])
        negative = passive & (free <= 0)
        if not negative.any():
            return free
        falls = solution[negative] - free[negative]
        step = (solution[negative] / np.maximum(falls, 1e-300)).min()
        solution = solution + step * (free - solution)
        passive &= solution > 1e-15
        solution = np.where(passive, solution, 0.0)
    return np.zeros(len(target))


def _columns(features: Features, micro_batch: Any, tokens: Tokens) -> np.ndarray:
    values = features(micro_batch, np.asarray(tokens, dtype=float))
    return np.stack(np.broadcast_arrays(*values), axis=-1)


def _num_rows(phase: str, micro_batch: Any, tokens: Tokens) -> Any:
    """Rows of the matrix products of a layer."""
    return micro_batch * tokens if phase == "prefill" else micro_batch + 0 * tokens


def _prefill_features(p: Any, s: Any) -> tuple[Any, ...]:
    return p, s, p * s, p * s * s, 1.0


def _decode_features(q: Any, past: Any) -> tuple[Any, ...]:
    return q * (past + 1), q, past, 1.0


def _piece_features(phase: str, knee: float) -> Features:
    """Rows below and above the knee, attention, and what a call costs; all grow with the sizes."""

    def features(micro_batch: Any, tokens: Any) -> tuple[Any, ...]:
        rows = _num_rows(phase, micro_batch, tokens)
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
        near = _likeness(batch, tokens, self.batch, self.length, self.reach)
        return self.model.seconds(micro_batch, tokens) * np.exp(near @ self.weights)


def _corrected(recipe: Recipe) -> Recipe:
    def with_neighbours(points: Points) -> Model:
        model = recipe(points)
        left = np.log(points.seconds / np.maximum(_at(model, points), points.seconds / 10))
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
    alike = _likeness(batch, length, batch, length, reach)
    inverse = np.linalg.inv(alike + noise * np.eye(len(left)))
    weights = inverse @ left
    return float(np.abs(weights / np.diag(inverse)).mean()), reach, weights


def _likeness(
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


# ---- errors


def _at(model: Model, points: Points) -> np.ndarray:
    return np.asarray(model.seconds(points.batch, points.length))


def _errors(model: Model, points: Points) -> np.ndarray:
    """Relative; predictions are cut off as `Fitted.seconds` does."""
    return np.abs(np.maximum(_at(model, points), points.seconds.min() / 2) / points.seconds - 1)


def _octaves(points: Points, micro_batch: float, tokens: float) -> np.ndarray:
    """From a point to every row."""
    batch = np.log(micro_batch / points.batch)
    length = np.log((tokens + 1) / (points.length + 1))
    return np.hypot(batch, length) / OCTAVE


def _octaves_outside(points: Points, micro_batch: float, tokens: float) -> float:
    """How far a point lies beyond the smallest and largest sizes."""
    return (
        sum(
            max(
                0.0,
                float(np.log((sizes.min() + 1) / (size + 1))),
                float(np.log((size + 1) / (sizes.max() + 1))),
            )
            for sizes, size in ((points.batch, micro_batch), (points.length, tokens))
        )
        / OCTAVE
    )


def _beyond(recipe: Recipe, points: Points, errors: np.ndarray) -> float:
    """What an octave outside costs: the largest batches and lengths predicted from all others."""
    found = [float(errors.mean())]
    for sizes in (points.batch, points.length):
        seen = sizes < sizes.max() / 1.5
        if seen.sum() >= LEAST_FOR_CHOICE / 2:
            wider = (sizes.max() + 1) / (sizes[seen].max() + 1)
            octaves = max(1.0, float(np.log(wider)) / OCTAVE)
            outside = _errors(recipe(points.take(seen)), points.take(~seen))
            found.append(float(outside.mean()) / octaves)
    return max(found)
