"""The frontier of speed and quality: a table for people, and a picture.

This module only renders what `planner.frontier` found. The picture needs matplotlib, which is
imported when a picture is asked for, and no display.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpq.errors import UserError
from llmpq.plain import plain
from llmpq.precision import bits_text, in_order

if TYPE_CHECKING:
    from rich.console import Console

    from llmpq.plan_data import Baseline, Plan
    from llmpq.planner.frontier import Point

INCHES, DOTS_PER_INCH = (7.0, 4.5), 150


def print_frontier(console: "Console", points: "Sequence[Point]") -> None:
    """Prints a row per point: budget, quality loss, speed and gap of its plan, and its layers."""
    from rich.table import Table

    table = Table(title="Speed against quality", title_justify="left")
    for heading in ("largest loss", "quality loss", "tokens/s", "gap"):
        table.add_column(heading, justify="right")
    table.add_column("layers", overflow="fold")
    for point in points:
        table.add_row(*_cells(point), _layers(point))
    console.print(table)


def save_frontier(
    path: Path, points: "Sequence[Point]", title: str, baselines: "Sequence[Baseline]" = ()
) -> None:
    """Draws a PNG: tokens/s over percent of perplexity, other methods as single marks.

    Raises `UserError` where matplotlib is missing, no point has a plan or the file cannot be made.
    """
    figures = [
        (loss, point.tokens_per_s)
        for point in points
        if (loss := point.quality_loss_percent) is not None
    ]
    if not figures:
        raise UserError(f"{path}: there is no plan at any budget, so there is nothing to draw")
    figure = _new_figure()
    axes = figure.subplots()
    axes.step(*zip(*figures, strict=True), where="post", marker="o", label="plans")
    _mark(axes, baselines)
    axes.set_xlabel("rise of perplexity (%)")
    axes.set_ylabel("generated tokens per second")
    axes.set_ylim(bottom=0)
    axes.set_title(plain(title), parse_math=False)
    axes.legend()
    axes.grid(alpha=0.3)
    _save(figure, path)


def _cells(point: "Point") -> list[str]:
    budget = f"{point.max_loss_percent:.3g} %"
    predicted = point.plan.predicted if point.plan else None
    if predicted is None:
        return [budget, "-", "-", "-"]
    loss = f"{predicted.quality_loss_percent:.3f} %"
    return [budget, loss, f"{predicted.tokens_per_s:.1f}", f"{100 * predicted.gap:.2f} %"]


def _layers(point: "Point") -> str:
    return _counts(point.plan) if point.plan else point.why_not


def _counts(plan: "Plan") -> str:
    """Writes how many layers have each precision, as "20x16-bit, 4x8-bit"."""
    held = plan.precisions
    return ", ".join(f"{held.count(name)}x{bits_text(name)}" for name in in_order(held))


def _mark(axes: Any, baselines: "Sequence[Baseline]") -> None:
    for baseline in baselines:
        if baseline.tokens_per_s is not None and baseline.quality_loss_percent is not None:
            at = [baseline.quality_loss_percent], [baseline.tokens_per_s]
            axes.plot(*at, marker="x", linestyle="none", label=baseline.method)


def _new_figure() -> Any:
    """Makes a figure on matplotlib's Agg canvas, which needs no display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "a picture of the frontier needs matplotlib: pip install 'llmpq[plot]'"
        ) from None
    figure = Figure(figsize=INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=DOTS_PER_INCH)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
