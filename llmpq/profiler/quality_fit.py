"""Fits the rise of perplexity to summed sensitivity: a line through plans measured as a whole.

Sensitivities add up over layers only roughly. So some plans are measured as a whole: each uniform
precision, and random mixed ones that are spread evenly from mild to severe.
"""

import math
import random
import statistics
from collections.abc import Sequence

from llmpq.precision import variance_of_errors
from llmpq.profile_data import MeasuredPlan, QualityFit

NUM_MIXED_PLANS = 12
CANDIDATES = 50  # plans drawn for each mixed plan that is kept
MILDEST = 0.01  # share of the severest uniform plan
LARGEST_RISE = 0.2  # nats a token, 22 % of perplexity
QUANTILE_95 = 1.8  # standard deviations: Student's t at 95 %, for 12 and more plans
OTHER_TEXT = 1.15  # plans diverged by up to this factor more on other text, on three models
WRONG = 1.5  # the factor between sum and measurement above which there is a note


def draw_plans(num_layers: int, precisions: Sequence[str], seed: int = 0) -> list[list[str]]:
    """Every uniform plan below 16 bits, and mixed ones from mild to severe.

    The severity of a plan is estimated by its bits alone: rounding to b bits leaves errors whose
    variance is proportional to 4^-b.
    """
    lower = [p for p in precisions if p != "16"]
    uniform = [[p] * num_layers for p in lower]
    draw = random.Random(seed)
    candidates = [
        _random_plan(num_layers, lower, draw) for _ in range(CANDIDATES * NUM_MIXED_PLANS)
    ]
    by_severity = {tuple(p): _severity(p) for p in candidates if len(set(p)) > 1}
    top = max((_severity(plan) for plan in uniform), default=0.0)
    mixed: list[list[str]] = []
    for step in range(NUM_MIXED_PLANS):
        wanted = math.log(MILDEST) * (1 - (step + 1) / (NUM_MIXED_PLANS + 1))
        far = {p: abs(math.log(s / top) - wanted) for p, s in by_severity.items()}
        if far:
            nearest = min(far, key=lambda plan: far[plan])
            mixed.append(list(nearest))
            del by_severity[nearest]
    return uniform + mixed


def _random_plan(num_layers: int, lower: Sequence[str], draw: random.Random) -> list[str]:
    choices = ["16", *lower]
    shares = [draw.random() ** 3 for _ in choices]
    return draw.choices(choices, shares, k=num_layers)


def _severity(plan: Sequence[str]) -> float:
    return math.fsum(variance_of_errors(p) for p in plan if p != "16")


def fit_quality(plans: Sequence[MeasuredPlan]) -> QualityFit:
    """The line through the origin that is nearest to the plans' rises, by relative error.

    Only plans within `LARGEST_RISE` count, where there are some: beyond it losses add up to more
    than their sum, and budgets are below it. `upper_scale` is above the ratio of every plan, and
    above that of 95 % of other plans if ratios are log-normal about the fit, with a margin for
    other text.
    """
    usable = [p for p in plans if p.sum_sensitivity > 0 and p.rise > 0]
    usable = [p for p in usable if p.rise <= LARGEST_RISE] or usable
    ratios = [p.rise / p.sum_sensitivity for p in usable]
    if not ratios:
        return QualityFit(scale=0.0, mean_abs_error_percent=0.0, num_plans=0, plans=list(plans))
    scale = statistics.fmean(ratios)  # least squares with weights 1 / x^2
    errors = [abs(_percent(scale * p.sum_sensitivity) - _percent(p.rise)) for p in usable]
    return QualityFit(
        scale=scale,
        mean_abs_error_percent=statistics.fmean(errors),
        num_plans=len(usable),
        upper_scale=OTHER_TEXT * max(*ratios, scale * math.exp(_spread(ratios, scale))),
        plans=list(plans),
    )


def notes_on_fit(fit: QualityFit) -> list[str]:
    """Notes on plans whose sum differs much from the measurement of the whole plan."""
    notes = []
    for plan in fit.plans:
        predicted = fit.scale * plan.sum_sensitivity
        if predicted > 0 and not 1 / WRONG < plan.rise / predicted < WRONG:
            notes.append(
                f"losses do not add up in plan {','.join(plan.precisions)}: the sum predicts "
                f"{_percent(predicted):.2f} %, measured {_percent(plan.rise):.2f} %"
            )
    return notes


def _spread(ratios: Sequence[float], scale: float) -> float:
    """The 95 % bound of the logarithm of another plan's ratio, above the fit."""
    if len(ratios) < 2:
        return 0.0
    squares = math.fsum(math.log(ratio / scale) ** 2 for ratio in ratios)
    count = len(ratios)
    return QUANTILE_95 * math.sqrt(squares / (count - 1) * (1 + 1 / count))


def _percent(rise: float) -> float:
    return 100 * math.expm1(rise)
