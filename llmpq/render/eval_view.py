"""Tables of what `llmpq-eval` found: perplexity on texts, and scores on tasks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from llmpq.cluster import MIB

if TYPE_CHECKING:
    from llmpq.evaluation.eval_report import Scores
    from llmpq.evaluation.methods import EvalRow


def print_rows(out: Console, rows: "Sequence[EvalRow]", verbose: bool) -> None:
    """Prints a row per subject and text, if there are any."""
    if not rows:
        return
    streamed = any(row.divergence is not None for row in rows)
    last = "KL from 16 bits" if streamed else "weights MiB"
    table = Table("what", "text", "perplexity", "tokens", last)
    for row in rows:
        name = row.subject.name
        name += f" ({' '.join(row.subject.precisions)})" if verbose else ""
        held = "-" if row.weight_bytes is None else f"{row.weight_bytes / MIB:.2f}"
        cell = f"{row.divergence:.5f}" if row.divergence is not None else held
        table.add_row(name, row.text, f"{row.loss.perplexity:.4f}", str(row.loss.num_tokens), cell)
    out.print(table)


def print_scores(out: Console, scores: "Scores") -> None:
    """Prints a row per subject and task, if there are any."""
    if not scores:
        return
    table = Table("what", "task", "few-shot", "metric", "value", "samples")
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
    out.print(table)
