"""Speed against quality: the plan at each of several budgets of quality loss.

Budgets run from 0 to what the lowest allowed precision loses in every layer, evenly on a
logarithmic scale. They are planned from the largest down: a plan that loses less than its budget
is also the answer at every smaller budget that still allows it, which saves planning again.
Points with the same figures are one point, at its smallest budget, and a larger budget is never
slower: where a search ended early and found less, the faster plan of a smaller budget stands.

Not covered: other trade-offs than this one; a price of quality (theta) is put aside.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmpq.errors import InfeasibleError
from llmpq.plan_data import Plan
from llmpq.planner.problem import Problem
from llmpq.planner.what_if import Replan, with_budget

NUM_BUDGETS = 10
LEAST_SHARE = 1e-3  # of the largest budget: the least one above 0
DIGITS = 2  # of a budget


@dataclass(frozen=True)
class Point:
    """A budget in percent of perplexity, and its plan, or why there is none."""

    max_loss_percent: float
    plan: Plan | None
    why_not: str = ""

    @property
    def tokens_per_s(self) -> float:
        """Predicted; 0 where there is no plan."""
        return self.plan.predicted.tokens_per_s if self.plan and self.plan.predicted else 0.0

    @property
    def quality_loss_percent(self) -> float | None:
        """What the plan loses, at most its budget."""
        return (
            self.plan.predicted.quality_loss_percent if self.plan and self.plan.predicted else None
        )


def frontier(
    problem: Problem, replan: Replan, percents: Sequence[float] | None = None
) -> list[Point]:
    """The points by rising budget: first the budgets without a plan, then ever faster plans.

    `percents`: the budgets; without, `budgets(problem)`.
    """
    asked = sorted(set(budgets(problem) if percents is None else percents), reverse=True)
    points: list[Point] = []
    for percent in asked:
        loss = points[-1].quality_loss_percent if points else None
        if loss is not None and loss <= percent:
            points.append(Point(percent, points[-1].plan))
        else:
            points.append(_planned(problem, replan, percent))
    return _rising(points[::-1])


def budgets(problem: Problem) -> list[float]:
    """0, and `NUM_BUDGETS` up to the loss of the lowest precision everywhere."""
    layers = problem.spec.num_layers
    losses = [
        problem.quality.percent(problem.quality.sum_omega([name] * layers))
        for name in problem.precisions
    ]
    largest = max(losses)
    if largest <= 0:
        return [0.0]
    spaced = np.geomspace(largest * LEAST_SHARE, largest, NUM_BUDGETS)
    return [0.0, *(round_up(float(percent), DIGITS) for percent in spaced)]


def round_up(value: float, digits: int) -> float:
    """The least number of so many significant digits that is no less than `value` (above 0)."""
    exponent = int(np.floor(np.log10(value))) - digits + 1
    steps = np.ceil(value / 10.0**exponent * (1 - 1e-12))
    return float(f"{steps:.0f}e{exponent}")


def _planned(problem: Problem, replan: Replan, percent: float) -> Point:
    try:
        return Point(percent, replan(with_budget(problem, percent)))
    except InfeasibleError as error:
        return Point(percent, None, str(error).splitlines()[0])


def _rising(points: Sequence[Point]) -> list[Point]:
    """Drops points that are no faster than one of a smaller budget."""
    kept: list[Point] = []
    best = 0.0
    for point in points:
        if point.plan is None and best == 0.0:
            kept.append(point)
        elif point.tokens_per_s > best:
            kept.append(point)
            best = point.tokens_per_s
    return kept
