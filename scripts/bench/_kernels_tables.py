"""Tables of what was measured on a card: pure, from rows to columns and cells of text.

`kernels.py` prints them, `gpu_report.py` writes them as Markdown.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from _kernels_checks import of_kind

GIB = 1024**3
Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Sheet:
    """A table. `note` says what its cells are, where columns cannot."""

    title: str
    columns: tuple[str, ...]
    body: list[tuple[str, ...]]
    note: str = ""


def sheets(rows: Rows) -> list[Sheet]:
    """A table for each kind of row that there is."""
    every = (linears, kernels, served, predicted, cluster)
    return [sheet for sheet in (make(rows) for make in every) if sheet.body]


def linears(rows: Rows) -> Sheet:
    """A line a matrix and precision; a column a number of rows."""
    cells = of_kind(rows, "linear")
    counts = sorted({cell["rows"] for cell in cells})
    lines: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for cell in cells:
        shape = f"{cell['out_features']} x {cell['in_features']}"
        lines.setdefault((shape, cell["precision"], cell["layer"]), {})[cell["rows"]] = cell
    body = [
        (*key, *(_linear(line.get(count)) for count in counts), _worst(line.values()))
        for key, line in lines.items()
    ]
    columns = ("out x in", "bits", "layer", *(f"{count} rows" for count in counts), "worst error")
    note = "Share of a copy's bandwidth / speed against the 16-bit product of the same run."
    return Sheet("Linear layers", columns, body, note)


def _linear(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    return f"{100 * cell['share_of_copy']:.0f} % / {cell['against_plain']:.2f}x"


def _worst(cells: Iterable[dict[str, Any]]) -> str:
    return f"{100 * max(cell['error'] for cell in cells):.2f} %"


def kernels(rows: Rows) -> Sheet:
    """Kernels that were called by themselves, each beside another way to the same result."""
    body = [
        (
            row["what"],
            row["shape"],
            f"{row['ms']:.4f}",
            f"{100 * row['share_of_copy']:.0f} %",
            row["beside"],
            f"{row['against']:.2f}x",
            f"{100 * row['error']:.2f} %",
        )
        for row in of_kind(rows, "kernel")
    ]
    columns = ("kernel", "shape", "ms", "of a copy's bandwidth", "beside", "speed", "error")
    return Sheet("Kernels by themselves", columns, body)


def served(rows: Rows) -> Sheet:
    """A line a precision, then transformers."""
    body: list[tuple[str, ...]] = [
        (
            f"llmpq-run, {row['precision']} bits",
            f"{row['tokens_per_s']:,.0f} ({row['first_tokens_per_s']:,.0f})",
            f"{row['predicted_tokens_per_s']:,.0f}",
            f"{row['error_percent']:+.1f} %",
            f"{row['prefill_tokens_per_s']:,.0f} ({100 * row['prefill_share_of_matmul']:.0f} %)",
            f"{row['decode_step_ms']:.2f} x {row['decode_rows']}",
            f"{row['peak_memory_bytes'] / GIB:.1f}",
            f"{row['load_s']:.1f}",
        )
        for row in of_kind(rows, "serving")
    ]
    for row in of_kind(rows, "transformers"):
        body.append(("transformers, 16 bits", f"{row['tokens_per_s']:,.0f}", *["-"] * 6))
    columns = ("engine", "tokens/s (first run)", "by the spec sheet", "error of its time")
    more = ("prefill tokens/s (of a product's arithmetic)", "decode step, ms x rows")
    return Sheet("A model served", (*columns, *more, "peak GiB", "load s"), body)


def predicted(rows: Rows) -> Sheet:
    """A line a precision."""
    body = [
        (
            row["precision"],
            f"{row['measured_tokens_per_s']:,.0f}",
            f"{row['predicted_tokens_per_s']:,.0f}",
            f"{row['error_percent']:+.1f} %",
        )
        for row in of_kind(rows, "prediction")
    ]
    columns = ("bits", "measured tokens/s", "predicted", "error of its time")
    return Sheet("Predicted from a profile", columns, body)


def cluster(rows: Rows) -> Sheet:
    """A line a method."""
    body = [
        (
            row["method"],
            f"{row['measured_tokens_per_s']:,.1f}",
            f"{row['predicted_tokens_per_s']:,.1f}",
            f"{row['error_percent']:+.1f} %",
            ", ".join(f"{n} on {d}" for d, n in zip(row["devices"], row["layers"], strict=True)),
        )
        for row in of_kind(rows, "cluster")
    ]
    columns = ("method", "measured tokens/s", "predicted", "error of its time", "layers")
    return Sheet("A mixed cluster, rehearsed on one device", columns, body)
