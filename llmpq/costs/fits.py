"""Seconds of a layer from measured rows of one precision and phase.

Several models are fitted, all weighted for relative error, and the one that predicts rows it has
not seen best is kept (cross-validation, `choose`). With M = rows of a matrix product (prompts x
tokens in prefill, requests in decode):
  - `regression`: the paper's (LLM-PQ, arXiv 2403.01136). Prefill of p prompts of s tokens on
    {p, s, p s, p s^2, 1}, decode of q requests on {q (past + 1), q, past, 1}.
  - `lines between lengths`: for a micro-batch that was measured itself, straight lines between
    its lengths; for others the regression.
  - `non-negative`: the regression without negative costs.
  - `pieces`: a roofline is the larger of a memory and a compute term, so linear in M below and
    above a knee; attention and overheads beside it, nothing negative.
  - `pieces, switch at N rows`: two of these, as kernels change with the number of rows.
docs/latency-model.md says which one won, by how much. Where rows cannot tell a slope, as those of
one prompt length, the spec sheet's formula is drawn through them (`costs.anchored`). Measured cells
cost what was measured, to the spread that their rows state.

A profile holds what was fitted when it was written (`chosen_models`), so that reading it only
evaluates that; rows that were changed since, or joined with others, are fitted anew.

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
    NON_NEGATIVE,
    OCTAVE,
    RECIPES,
    Model,
    Points,
    Recipe,
    at,
    grouped,
    model_of,
    parts_of,
    pinned,
    points_of,
)
from llmpq.profile_data import Candidate, ChosenModel, ProfileRow, fit_hash

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


@dataclass(frozen=True)
class ValidatedModel:
    """A recipe fitted to all points, and what it was off where it had not seen them.

    `errors` [points]: of each, predicted without it. `beyond`: an octave outside the measured
    range; None where the points are too few for that.
    """

    name: str
    model: Model
    errors: np.ndarray
    beyond: float | None


Kind = tuple[str, str]  # precision ("" where it does not matter) and phase


def fit(rows: Sequence[ProfileRow], sheet: Sheet | None = None) -> Fitted:
    """The model that predicts unseen rows of one phase and precision best.

    `sheet`: what the device's spec sheet says of them, for what the rows cannot tell.
    """
    (kind,) = grouped(rows)
    return fit_all(rows, sheets={} if sheet is None else {kind: sheet})[kind]


def fit_all(
    rows: Iterable[ProfileRow],
    stored: Mapping[Kind, ChosenModel] | None = None,
    sheets: Mapping[Kind, Sheet] | None = None,
) -> dict[Kind, Fitted]:
    """A model for each precision and phase: one recipe a phase, chosen over all its precisions.

    The kernels differ, what makes them slow hardly does, and four times the rows choose more
    surely. `stored`: what the profile holds of them. `sheets`: see `fit`.
    """
    stored, sheets = stored or {}, sheets or {}
    groups = grouped(rows)
    points = {kind: points_of(group) for kind, group in groups.items()}
    seen = {
        kind: found
        for kind, group in groups.items()
        if (found := _restored(stored.get(kind), group, points[kind]))
    }
    names = {kind: one.model for kind, one in stored.items() if one.model in RECIPES}
    names |= {kind: NON_NEGATIVE for kind in groups if len(points[kind]) < LEAST_FOR_CHOICE}
    for phase in dict.fromkeys(phase for _, phase in groups):
        unnamed = [kind for kind in groups if kind[1] == phase and kind not in names]
        unnamed = [kind for kind in unnamed if not _needs(sheets.get(kind), points[kind])]
        if unnamed:
            names |= dict.fromkeys(unnamed, choose([points[kind] for kind in unnamed]))
    return {
        kind: _best(points[kind], sheets.get(kind), names.get(kind, SHEET), seen.get(kind))
        for kind in groups
    }


def _restored(
    stored: ChosenModel | None, rows: Sequence[ProfileRow], points: Points
) -> ValidatedModel | None:
    """What was fitted when these very rows were written; None where either differs by now."""
    if stored is None or stored.model not in RECIPES or stored.sha256 != fit_hash(rows, stored):
        return None
    model = model_of(stored.model, stored.parts, points)
    if model is None or len(stored.errors) != len(points):
        return None
    return ValidatedModel(stored.model, model, np.array(stored.errors), stored.beyond)


def _needs(sheet: Sheet | None, points: Points) -> bool:
    """Whether the rows are too few, or too much alike, for any model without the spec sheet."""
    return sheet is not None and (len(points) < LEAST_TO_COMPARE or not tells_slopes(points))


def _best(points: Points, sheet: Sheet | None, name: str, known: ValidatedModel | None) -> Fitted:
    """The model of this name; of few rows, the spec sheet's formula where that is better."""
    if _needs(sheet, points):
        return _fitted(_see(SHEET, points, sheet), points, sheet)
    best = known if known and known.name == name else _see(name, points)
    if sheet is not None and len(points) < LEAST_FOR_CHOICE:
        best = min((best, _see(SHEET, points, sheet)), key=lambda one: float(one.errors.mean()))
    return _fitted(best, points, sheet)


def _see(name: str, points: Points, sheet: Sheet | None = None) -> ValidatedModel:
    """Fits a recipe, or draws the sheet through the points."""
    errors = cross_validate(name, points, sheet)
    return ValidatedModel(name, _recipe(name, sheet)(points), errors, _beyond(name, points))


def _fitted(seen: ValidatedModel, points: Points, sheet: Sheet | None) -> Fitted:
    """Through measured cells, with the error beyond them that is known best.

    Where the rows are too few to tell it: what the spec sheet is off, if that is known.
    """
    inside, beyond = float(seen.errors.mean()), seen.beyond
    if beyond is None and (seen.name == SHEET or not tells_slopes(points)):
        beyond = None if sheet is None else sheet.error
    elif beyond is None:
        beyond = inside
    most = None if beyond is None else max(inside, beyond)
    return Fitted(seen.name, pinned(seen.model, points), points, seen.errors, most)


def _recipe(name: str, sheet: Sheet | None) -> Recipe:
    """How to fit the model of this name."""
    if name == SHEET:
        assert sheet is not None
        return anchored(sheet)
    return RECIPES[name]


def choose(groups: Sequence[Points]) -> str:
    """The recipe of least mean error on unseen rows over groups of one phase."""
    fewest = min((len(points) for points in groups), default=0)
    if fewest < LEAST_FOR_CHOICE or groups[0].phase not in LAYER_PHASES:
        return NON_NEGATIVE

    def error(name: str) -> float:
        return float(np.mean([cross_validate(name, points).mean() for points in groups]))

    return min(RECIPES, key=error)


def cross_validate(name: str, points: Points, sheet: Sheet | None = None) -> np.ndarray:
    """Relative error of every row, predicted by a model that has not seen its fold.

    Folds take every fifth row in order of sizes, so that each lies between rows that were seen.
    """
    if len(points) < 2:  # nothing is known of any other point but by the sheet
        return points.noise if name == SHEET else np.ones(len(points))
    recipe = _recipe(name, sheet)
    order = np.lexsort((points.length, points.batch))
    errors = np.zeros(len(points))
    folds = min(FOLDS, len(points))
    for fold in range(folds):
        unseen = order[fold::folds]
        seen = np.setdiff1d(order, unseen)
        known = points.take(seen)
        model = pinned(recipe(known), known)
        errors[unseen] = _errors(name, model, points.take(unseen))
    return errors


def chosen_models(rows: Sequence[ProfileRow]) -> list[ChosenModel]:
    """What a profile of these rows holds beside them: the model of every kind of row, fitted."""
    found = []
    for model_key in dict.fromkeys(row.model_key for row in rows):
        groups = grouped(row for row in rows if row.model_key == model_key)
        points = {kind: points_of(group) for kind, group in groups.items()}
        enough = [kind for kind in groups if len(points[kind]) >= LEAST_FOR_CHOICE]
        names = {
            phase: choose([points[kind] for kind in enough if kind[1] == phase])
            for _, phase in enough
        }
        for kind, group in groups.items():
            seen = _see(names[kind[1]] if kind in enough else NON_NEGATIVE, points[kind])
            found.append(_stored(model_key, kind, group, seen))
    return found


def _stored(
    model_key: str, kind: Kind, rows: Sequence[ProfileRow], seen: ValidatedModel
) -> ChosenModel:
    """As profile.json keeps it."""
    found = ChosenModel(
        model_key=model_key,
        precision=kind[0],
        phase=rows[0].phase,
        model=seen.name,
        mean_error=float(seen.errors.mean()),
        parts=parts_of(seen.model),
        errors=tuple(seen.errors.tolist()),
        beyond=seen.beyond,
    )
    return found.model_copy(update={"sha256": fit_hash(rows, found)})


def worst(
    rows: Sequence[ProfileRow], candidates: Sequence[Candidate], count: int
) -> list[Candidate]:
    """The `count` candidates to measure next: where predictions are expected to be worst.

    A candidate's expected error falls with each one chosen near it.
    """
    kinds: list[tuple[str, str]] = [(c.precision, c.phase) for c in candidates]
    fits = fit_all(row for row in rows if (row.precision, row.phase) in kinds)
    expected = np.array([_expected(fits, one) for one in candidates])
    sizes = np.log([[c.micro_batch, c.tokens + 1] for c in candidates]) / OCTAVE
    chosen: list[Candidate] = []
    for _ in range(min(count, len(candidates))):
        best = int(np.argmax(expected))
        chosen.append(candidates[best])
        same = np.array([kind == kinds[best] for kind in kinds])
        near = np.exp(-np.abs(sizes - sizes[best]).sum(axis=1))
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


def _beyond(name: str, points: Points) -> float | None:
    """What an octave outside costs: the largest batches and lengths predicted from all others."""
    found = []
    for sizes in (points.batch, points.length):
        seen = sizes < sizes.max() / 1.5
        if name != SHEET and seen.sum() >= LEAST_FOR_CHOICE / 2:
            wider = (sizes.max() + 1) / (sizes[seen].max() + 1)
            octaves = max(1.0, float(np.log(wider)) / OCTAVE)
            known = points.take(seen)
            model = pinned(RECIPES[name](known), known)
            found.append(float(_errors(name, model, points.take(~seen)).mean()) / octaves)
    return max(found, default=None)
