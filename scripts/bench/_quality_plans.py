"""Plans from equal bits by each indicator: what the better order of layers is worth.

For each number of bits a layer in the mean, the precisions of least summed sensitivity by each
indicator that take no more bits; all are measured on held-out text. Beside them the best uniform
precision that takes no more memory than ours. Random: the mean of ten seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from _common import Check
from _quality_common import (
    PRECISIONS,
    Measured,
    Mixed,
    Settings,
    Subject,
    random_table,
    sensitivity,
    sensitivity_path,
)

from llmpq.checkpoint.roundings import load_roundings
from llmpq.precision import PRECISIONS as KNOWN
from llmpq.profile_data import load_sensitivity

MEAN_BITS = (3.5, 4.5, 6.0)
ORDER = ("measured", "hessian", "variance", "random")  # the best first, as hoped
SEEDS = 10
NOISE = 2.0  # standard errors

Plans = Sequence[Sequence[str]]
Table = Mapping[str, Sequence[float]]  # sensitivity by precision and layer


@dataclass(frozen=True)
class Case:
    """One model and text at one number of bits: what every plan of every method did."""

    subject: Subject
    text: str
    bits: float
    base: Measured
    plans: Mapping[str, Plans]
    found: dict[str, list[Measured]]

    def windows(self, method: str, what: str) -> np.ndarray:
        """Loss or KL of every window, mean over the method's plans."""
        return np.mean([getattr(measured, what) for measured in self.found[method]], axis=0)

    def excess(self, method: str, other: str, what: str) -> tuple[float, float]:
        """By how much `method` is worse than `other`, nats a token, and its standard error."""
        difference = self.windows(method, what) - self.windows(other, what)
        return float(difference.mean()), float(difference.std(ddof=1) / len(difference) ** 0.5)


def run(settings: Settings) -> tuple[list[Check], list[dict[str, Any]]]:
    """The checks and a row for each method of each case."""
    cases = [case for subject in settings.subjects() for case in cases_of(settings, subject)]
    checks = [c for what in ("loss", "kl") for c in order_checks(cases, what)]
    return checks, [row for case in cases for row in rows(case)]


def cases_of(settings: Settings, subject: Subject) -> list[Case]:
    """All numbers of bits and texts of a model."""
    path = sensitivity_path(settings, subject)
    tables = {name: [sensitivity(settings, subject, name).table()] for name in ORDER[:-1]}
    tables["random"] = [random_table(subject, seed) for seed in range(SEEDS)]
    plans = {bits: plans_of(tables, subject, bits) for bits in MEAN_BITS}
    mixed = Mixed(subject, load_roundings(load_sensitivity(path).quantizer, None, path))
    return [
        case
        for text in subject.evaluation
        for case in _cases_of_text(settings, subject, text, mixed, plans)
    ]


def _cases_of_text(
    settings: Settings,
    subject: Subject,
    text: Path,
    mixed: Mixed,
    plans: Mapping[float, Mapping[str, Plans]],
) -> list[Case]:
    """All plans measured together."""
    every = [plan for methods in plans.values() for group in methods.values() for plan in group]
    base, measured = mixed.measure(every, subject.windows(text, settings.num_windows))
    rest = iter(measured)
    found = [
        {name: [next(rest) for _ in group] for name, group in methods.items()}
        for methods in plans.values()
    ]
    return [
        Case(subject, text.name, bits, base, methods, results)
        for (bits, methods), results in zip(plans.items(), found, strict=True)
    ]


def plans_of(
    tables: Mapping[str, Sequence[Table]], subject: Subject, bits: float
) -> dict[str, Plans]:
    """The plans of every method."""
    total = int(bits * subject.num_layers)
    plans: dict[str, Plans] = {
        name: [least_sum(table, total) for table in group] for name, group in tables.items()
    }
    return plans | {"uniform": [best_uniform(plans["measured"][0], subject)]}


def least_sum(table: Table, total: int) -> list[str]:
    """The plan of least summed sensitivity whose bits come to `total` at most.

    A dynamic program over layers and bits used so far: exact.
    """
    best: dict[int, tuple[float, tuple[str, ...]]] = {0: (0.0, ())}
    for layer in range(len(table["16"])):
        grown: dict[int, tuple[float, tuple[str, ...]]] = {}
        for used, (cost, plan) in best.items():
            for precision in PRECISIONS:
                now = used + KNOWN[precision].weight_bits
                more = cost + table[precision][layer], (*plan, precision)
                if now <= total and (now not in grown or more < grown[now]):
                    grown[now] = more
        best = grown
    return list(min(best.values())[1])


def best_uniform(plan: Sequence[str], subject: Subject) -> list[str]:
    """The highest precision that, in all layers, takes no more bytes than the plan."""
    most = weight_bytes(plan, subject)
    uniform = ([p] * subject.num_layers for p in PRECISIONS)
    return next(plan for plan in uniform if weight_bytes(plan, subject) <= most)


def weight_bytes(plan: Sequence[str], subject: Subject) -> int:
    """Of the linears of all layers."""
    linears = subject.spec.linears
    return sum(
        KNOWN[p].weight_bytes(op.out_features, op.in_features) for p in plan for op in linears
    )


def rows(case: Case) -> list[dict[str, Any]]:
    """A row a method; figures of several plans are means."""
    return [_row(case, method, measured) for method, measured in case.found.items()]


def _row(case: Case, method: str, measured: Sequence[Measured]) -> dict[str, Any]:
    figures = [one.figures(case.base) for one in measured]
    row: dict[str, Any] = {
        "model": case.subject.name,
        "text": case.text,
        "bits": case.bits,
        "method": method,
        "num_plans": len(measured),
        "perplexity_16": case.base.perplexity,
        "weight_bytes": weight_bytes(case.plans[method][0], case.subject),
    }
    row |= {key: float(np.mean([one[key] for one in figures])) for key in figures[0]}
    return row | {"precisions": " ".join(case.plans[method][0])}


def order_checks(cases: Sequence[Case], what: str) -> list[Check]:
    """Each method against the next worse one, and ours against the best uniform precision."""
    pairs = [*pairwise(ORDER), ("measured", "uniform")]
    return [order_check(cases, better, worse, what) for better, worse in pairs]


def order_check(cases: Sequence[Case], better: str, worse: str, what: str) -> Check:
    """In how many cases plans by one indicator are no worse than by another."""
    excess = [case.excess(better, worse, what) for case in cases]
    share = float(np.mean([more <= 0 for more, _ in excess]))
    holds = all(more <= NOISE * error for more, error in excess)
    name = f"{'perplexity' if what == 'loss' else 'KL'} of plans: {better} <= {worse}, cases"
    target = f"1, worse by {NOISE:g} standard errors at most"
    return Check(name, share, "", target, holds, len(cases))
