"""The spec sheet's formula, drawn through measured rows that cannot tell a slope by themselves.

Rows of one prompt length say nothing of what a longer prompt costs: tokens that are multiplied
(which grow with prompts x tokens) and attention (which grows with the square of the length) look
alike there. The formula of `costs.spec_sheet` says how each grows. What does not depend on the
length is fitted: the time that attention leaves over, relative to the sheet's, is followed on
straight lines between the measured numbers of rows of the matrix products, and stays what it is
beyond them. Attention's own part is the sheet's, or less where the device is faster than that, or
what rows of equal numbers at several lengths make of it.

Lengths may be numpy arrays; times are seconds. Not covered: which sheet stands for a device that
has none (`costs.latency`).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from llmpq.costs.links import Seconds, Tokens
from llmpq.costs.recipes import Points, Recipe, at, num_rows

# What attention is multiplied by, in octaves about the sheet's; a pull towards none where rows
# hardly tell: as much of the mean square error for each octave squared.
ATTENTION_STEPS = tuple(np.arange(-12, 13) / 4)
PULL = 1e-4
TELLING = 1.5  # the largest size over the smallest, from which on rows tell how time grows with it


class Sheet(Protocol):
    """What a spec sheet says of one phase; `error` is relative, None where nothing tells."""

    @property
    def error(self) -> float | None:
        """How far off it is on a device that its fit has not seen."""

    def seconds(self, micro_batch: Any, tokens: Tokens) -> Seconds:
        """All of it."""

    def without_attention_s(self, micro_batch: Any, tokens: Tokens) -> Seconds:
        """The same if attention cost nothing."""


@dataclass(frozen=True)
class OtherSheet:
    """The sheet of a device that is only like this one: its proportions, not its speed."""

    sheet: Sheet
    error: None = None

    def seconds(self, micro_batch: Any, tokens: Tokens) -> Seconds:
        """Of the other device."""
        return self.sheet.seconds(micro_batch, tokens)

    def without_attention_s(self, micro_batch: Any, tokens: Tokens) -> Seconds:
        """Likewise."""
        return self.sheet.without_attention_s(micro_batch, tokens)


@dataclass(frozen=True)
class Anchored:
    """A sheet whose attention is multiplied by one number, all else by one for each row count.

    `rows` (ascending) and `factors` are logarithms.
    """

    phase: str
    sheet: Sheet
    attention: float
    rows: np.ndarray
    factors: np.ndarray

    def seconds(self, micro_batch: Any, tokens: Tokens) -> Seconds:
        """Attention as the sheet has it, on top of what was measured."""
        free = self.sheet.without_attention_s(micro_batch, tokens)
        attention = self.sheet.seconds(micro_batch, tokens) - free
        rows = np.log(np.maximum(1, num_rows(self.phase, micro_batch, tokens)))
        return free * np.exp(np.interp(rows, self.rows, self.factors)) + self.attention * attention


def anchored(sheet: Sheet) -> Recipe:
    """A recipe that draws this sheet through the rows.

    Where equal numbers of rows were measured at several lengths, these tell attention's part.
    """

    def through_rows(points: Points) -> Anchored:
        whole = np.asarray(sheet.seconds(points.batch, points.length))
        free = np.asarray(sheet.without_attention_s(points.batch, points.length))
        share = float((points.seconds / whole).min())
        if not isinstance(sheet, OtherSheet):
            share = min(1.0, share)  # what makes a device slower is not known to be attention
        tried = [share * 2.0**step for step in ATTENTION_STEPS]
        possible = [a for a in tried if (points.seconds > 1.05 * a * (whole - free)).all()]

        def fault(attention: float) -> float:
            model = _with_attention(sheet, points, free, whole - free, attention)
            off = np.log(at(model, points) / points.seconds)
            return float((off**2).mean()) + PULL * float(np.log2(attention / share)) ** 2

        best = min(possible or [share], key=fault)
        return _with_attention(sheet, points, free, whole - free, best)

    return through_rows


def _with_attention(
    sheet: Sheet, points: Points, free: np.ndarray, attention: np.ndarray, factor: float
) -> Anchored:
    """The sheet through the rows, with `factor` times its attention."""
    left = np.log((points.seconds - factor * attention) / free)
    rows, where = np.unique(np.log(np.maximum(1, points.rows)), return_inverse=True)
    factors = np.bincount(where.ravel(), weights=left) / np.bincount(where.ravel())
    return Anchored(points.phase, sheet, factor, rows, factors)


def tells_slopes(points: Points) -> bool:
    """Whether the rows differ enough in each size that the phase depends on."""
    sizes = {"head": (points.batch,), "embedding": (points.rows,)}
    return all(
        (size.max() + 1) / (size.min() + 1) >= TELLING
        for size in sizes.get(points.phase, (points.batch, points.length))
    )
