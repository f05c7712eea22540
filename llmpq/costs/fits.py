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
points of the profile (kriging). docs/latency-model.md says which one won, by how much. Where rows
cannot tell a slope, as those of one prompt length, the spec sheet's formula is drawn through them
(`costs.anchored`). Measured cells cost what was measured, to the spread that their rows state.

Every prediction has an `Accuracy`: whether its point was measured, lies between measured ones or
beyond them, and how far off predictions of unseen rows near it were. Lengths may be numpy arrays;
times are seconds. Not covered: how often a device changes its speed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmpq.costs.anchored import Sheet, anchored, tells_slopes
from llmpq.costs.links import Seconds, Tokens
from llmpq.costs.recipes import (
    CORRECTED,
    NON_NEGATIVE,
    OCTAVE,
    PLAIN,
    RECIPES,
    Model,
    Points,
    Recipe,
    at,
    grouped,
    pinned,
    points_of,
)
from llmpq.profile_data import Candidate, ChosenModel, ProfileRow

BEYOND = "beyond the profile"
SOURCES = ("measured", "interpolated", "fitted", BEYOND, "spec sheet")  # the surest first
ASSUMED = "assumed"  # a default: it is in no device's figures, and a note says so

LAYER_PHASES = ("prefill", "decode")
FOLDS = 5
LEAST_FOR_CHOICE = 10  # rows; with fewer, the non-negative regression or the spec sheet
LEAST_TO_COMPARE = 4  # rows; with fewer, the spec sheet where there is one
SHEET = "spec sheet through the measured rows"
NEAR = 1.0  # octaves: so near a measured row, a point lies "between measured ones"


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
    outside the measured range; None where nothing tells.
    """

    name: str
    model: Model
    points: Points
    errors: np.ndarray
    beyond: float | None

    @property
    def mean_error(self) -> float:
        """Relative, of rows that the model had not seen."""
        return float(self.errors.mean())

    def seconds(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """Never below half the shortest measured time, but where the spec sheet says so."""
        return np.maximum(_floor_s(self.name, self.points), self.model.seconds(micro_batch, tokens))

    def accuracy(self, micro_batch: int, tokens: float) -> Accuracy:
        """Errors of near rows count most; a measured cell's is the spread that its row states."""
        away = _octaves(self.points, micro_batch, tokens)
        weight = np.exp(-away)
        error = float(weight @ self.errors / weight.sum())
        outside = _octaves_outside(self.points, micro_batch, tokens)
        if outside > 0:
            if self.name == SHEET:  # which is off by as much everywhere
                outside = min(1.0, outside)
            return Accuracy(BEYOND, None if self.beyond is None else error + outside * self.beyond)
        if away.min() == 0:
            noise = float(self.points.noise[away.argmin()])
            return Accuracy("measured", min(error, noise) if noise else error)
        return Accuracy("interpolated" if away.min() <= NEAR else "fitted", error)


def fit(rows: Sequence[ProfileRow], known: str | None = None, sheet: Sheet | None = None) -> Fitted:
    """The model that predicts unseen rows of one phase and precision best; `known`: its name.

    `sheet`: what the device's spec sheet says of them, for what the rows cannot tell.
    """
    points = points_of(rows)
    if name := _of_few(points, sheet):
        return _fitted(name, points, sheet)
    return _fitted(known if known in RECIPES else choose([points]), points, sheet)


def fit_all(
    rows: Iterable[ProfileRow],
    known: Mapping[tuple[str, str], str] | None = None,
    sheets: Mapping[tuple[str, str], Sheet] | None = None,
) -> dict[tuple[str, str], Fitted]:
    """A model for each precision and phase: one recipe a phase, chosen over all its precisions.

    The kernels differ, what makes them slow hardly does, and four times the rows choose more
    surely. `known`: recipes by (precision, phase) that need not be chosen. `sheets`: see `fit`.
    """
    sheets = sheets or {}
    groups = {key: points_of(group) for key, group in grouped(rows).items()}
    names = {key: name for key, name in (known or {}).items() if name in RECIPES}
    few = {key: _of_few(points, sheets.get(key)) for key, points in groups.items()}
    names |= {key: name for key, name in few.items() if name}
    for phase in dict.fromkeys(phase for _, phase in groups):
        open_keys = [key for key in groups if key[1] == phase and key not in names]
        if open_keys:
            names |= dict.fromkeys(open_keys, choose([groups[key] for key in open_keys]))
    return {key: _fitted(names[key], points, sheets.get(key)) for key, points in groups.items()}


def _of_few(points: Points, sheet: Sheet | None) -> str | None:
    """The model of rows that are too few, or too much alike, to choose among all; None: of others.

    Whatever a profile says was chosen for them, it was chosen without a spec sheet.
    """
    is_few = len(points) < LEAST_FOR_CHOICE
    if sheet is None:
        return NON_NEGATIVE if is_few else None
    if len(points) < LEAST_TO_COMPARE or not tells_slopes(points):
        return SHEET
    if not is_few:
        return None
    errors = {name: cross_validate(name, points, sheet).mean() for name in (NON_NEGATIVE, SHEET)}
    return min(errors, key=lambda name: errors[name])


def _fitted(name: str, points: Points, sheet: Sheet | None) -> Fitted:
    recipe = _recipe(name, sheet)
    errors = cross_validate(name, points, sheet)
    return Fitted(name, recipe(points), points, errors, _beyond(name, points, errors, sheet))


def _recipe(name: str, sheet: Sheet | None) -> Recipe:
    """A model of this name that goes through measured cells."""
    if name == SHEET:
        assert sheet is not None
        return pinned(anchored(sheet))
    return pinned(RECIPES[name])


def choose(groups: Sequence[Points]) -> str:
    """The recipe of least mean error on unseen rows over groups of one phase."""
    fewest = min((len(points) for points in groups), default=0)
    if fewest < LEAST_FOR_CHOICE or groups[0].phase not in LAYER_PHASES:
        return NON_NEGATIVE

    def error(name: str) -> float:
        return float(np.mean([cross_validate(name, points).mean() for points in groups]))

    best = min(PLAIN, key=error)
    return min((best, best + CORRECTED), key=error)


def cross_validate(name: str, points: Points, sheet: Sheet | None = None) -> np.ndarray:
    """Relative error of every row, predicted by a model that has not seen its fold."""
    if len(points) < 2:  # nothing is known of any other point but by the sheet
        return points.noise if name == SHEET else np.ones(len(points))
    recipe = _recipe(name, sheet)
    order = np.lexsort((points.length, points.batch))
    errors = np.zeros(len(points))
    folds = min(FOLDS, len(points))
    for fold in range(folds):
        unseen = order[fold::folds]
        seen = np.setdiff1d(order, unseen)
        model = recipe(points.take(seen))
        errors[unseen] = _errors(name, model, points.take(unseen))
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


# ---- errors


def _floor_s(name: str, points: Points) -> float:
    """No prediction is below; a spec sheet's needs no such care."""
    return 0.0 if name == SHEET else float(points.seconds.min()) / 2


def _errors(name: str, model: Model, points: Points) -> np.ndarray:
    """Relative; predictions are cut off as `Fitted.seconds` does."""
    return np.abs(np.maximum(at(model, points), _floor_s(name, points)) / points.seconds - 1)


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


def _beyond(name: str, points: Points, errors: np.ndarray, sheet: Sheet | None) -> float | None:
    """What an octave outside costs: the largest batches and lengths predicted from all others.

    Where the rows are too few for that: what the spec sheet is off, if that is known.
    """
    found = []
    for sizes in (points.batch, points.length):
        seen = sizes < sizes.max() / 1.5
        if name != SHEET and seen.sum() >= LEAST_FOR_CHOICE / 2:
            wider = (sizes.max() + 1) / (sizes[seen].max() + 1)
            octaves = max(1.0, float(np.log(wider)) / OCTAVE)
            model = _recipe(name, sheet)(points.take(seen))
            found.append(float(_errors(name, model, points.take(~seen)).mean()) / octaves)
    if not found and (name == SHEET or not tells_slopes(points)):
        known = None if sheet is None else sheet.error
        return None if known is None else max(float(errors.mean()), known)
    return max([float(errors.mean()), *found])
