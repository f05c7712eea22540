"""What `llmpq-eval` tells: a table for people, JSON for programs; what is no number has failed."""

import json
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Any

from llmpq.artifact import Provenance
from llmpq.cli.common import console, emit
from llmpq.errors import FailedRequests

if TYPE_CHECKING:
    from llmpq.cli.eval_ways import Model, Row, Subject
    from llmpq.evaluation.harness import TaskScore

WHY = (
    "the loss is no finite number: activations became NaN or infinite; in float16 they may "
    "overflow: --dtype bfloat16 or float32 has more room"
)


def show(
    rows: "list[Row]",
    scores: "list[tuple[Subject, TaskScore]]",
    flags: dict[str, Any],
    way: str,
    model: "Model",
) -> None:
    """Tells and writes what was found; raises `FailedRequests` where that is no number.

    JSON has null in the place of such a number, and "error" says why.
    """
    from llmpq.evaluation.perplexity import window_tokens

    data = {
        "schema_version": 1,
        "kind": "evaluation",
        "way": way,
        "window": window_tokens(flags["window"], model.max_positions),
        "rows": [_row_data(row) for row in rows],
        "tasks": [_score_data(subject, score) for subject, score in scores],
        "provenance": Provenance.here().model_dump(),
    }
    emit(json.dumps(data, indent=1), flags["json_path"])
    out = console(flags["quiet"])
    if rows:
        out.print(_table(rows, flags["verbose"]))
    if scores:
        out.print(_task_table(scores))
    failed = [f"{row.subject.name} on {row.text}" for row in rows if not row.loss.is_finite]
    failed += [f"{s.name} on {score.task}" for s, score in scores if not isfinite(score.value)]
    if failed:
        count = len(rows) + len(scores)
        raise FailedRequests(f"{len(failed)} of {count} failed: {', '.join(failed)}: {WHY}")


def _row_data(row: "Row") -> dict[str, Any]:
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


def _score_data(subject: "Subject", score: "TaskScore") -> dict[str, Any]:
    values = asdict(score) | {"value": _number(score.value)}
    return {"name": subject.name, "precisions": list(subject.precisions), **values}


def _table(rows: "list[Row]", verbose: bool) -> Any:
    from rich.table import Table

    streamed = any(row.divergence is not None for row in rows)
    last = "KL from 16 bits" if streamed else "weights MiB"
    table = Table("what", "text", "perplexity", "tokens", last)
    for row in rows:
        name = row.subject.name
        name += f" ({' '.join(row.subject.precisions)})" if verbose else ""
        held = "-" if row.weight_bytes is None else f"{row.weight_bytes / 1024**2:.2f}"
        cell = f"{row.divergence:.5f}" if row.divergence is not None else held
        table.add_row(name, row.text, f"{row.loss.perplexity:.4f}", str(row.loss.num_tokens), cell)
    return table


def _task_table(scores: "list[tuple[Subject, TaskScore]]") -> Any:
    from rich.table import Table

    table = Table("what", "task", "examples", "metric", "value", "samples")
    for subject, score in scores:
        error = "" if score.error is None else f" ± {score.error:.4f}"
        table.add_row(
            subject.name,
            score.task,
            str(score.num_fewshot),
            score.metric,
            f"{score.value:.4f}{error}",
            str(score.num_samples),
        )
    return table
