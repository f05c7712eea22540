"""The result of an evaluation for programs, and what of it is not a number and so has failed."""

from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite

from llmpq.artifact import SCHEMA_VERSION, Provenance
from llmpq.evaluation.harness import TaskScore
from llmpq.evaluation.methods import EvalRow, EvalSubject

WHY = (
    "the loss is not a finite number: activations became NaN or infinite; in float16 they may "
    "overflow: --dtype bfloat16 or float32 has more room"
)
Scores = Sequence[tuple[EvalSubject, TaskScore]]


def failures(rows: Sequence[EvalRow], scores: Scores) -> list[str]:
    """What has no finite number."""
    failed = [f"{row.subject.name} on {row.text}" for row in rows if not row.loss.is_finite]
    return failed + [f"{s.name} on {one.task}" for s, one in scores if not isfinite(one.value)]


def report_data(
    rows: Sequence[EvalRow], scores: Scores, method: str, window: int
) -> dict[str, object]:
    """What --json writes; a number that is not finite is null, and "error" says why."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "evaluation",
        "way": method,
        "window": window,
        "rows": [_row_data(row) for row in rows],
        "tasks": [_score_data(subject, score) for subject, score in scores],
        "provenance": Provenance.here().model_dump(),
    }


def _row_data(row: EvalRow) -> dict[str, object]:
    return {
        "name": row.subject.name,
        "text": row.text,
        "perplexity": _number(row.loss.perplexity),
        "loss": _number(row.loss.mean),
        "num_tokens": row.loss.num_tokens,
        "divergence": None if row.divergence is None else _number(row.divergence),
        "precisions": list(row.subject.precisions),
        "quantizer": row.subject.quantizer.model_dump(),
        "weight_bytes": row.weight_bytes,
        "weights_sha256": list(row.weights_sha256),
        "error": None if row.loss.is_finite else WHY,
    }


def _number(value: float) -> float | None:
    """What JSON can hold."""
    return value if isfinite(value) else None


def _score_data(subject: EvalSubject, score: TaskScore) -> dict[str, object]:
    values = asdict(score) | {"value": _number(score.value)}
    return {"name": subject.name, "precisions": list(subject.precisions), **values}
