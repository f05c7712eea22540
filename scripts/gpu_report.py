#!/usr/bin/env python3
"""Turns what `scripts/gpu.sh` left in a folder into CARD-DATE.json and a table beside it.

    scripts/gpu_report.py OUT [-o docs/gpu]

Both are labelled with card, driver, libraries, date and commit. Steps that did not run or did not
end are named; what they had measured is there. Results of a CPU are for trying out the scripts:
they are not written among those of cards.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

from _common import Check  # noqa: E402
from _kernels_checks import (  # noqa: E402
    NO_CARD,
    NOT_MEASURED,
    linear_checks,
    of_kind,
    prediction_checks,
    serving_checks,
    token_checks,
)

RESULTS = ("kernels", "serving", "tests", "predictions", "cluster")
TOKEN_TESTS = {  # a word in the names of the tests that tell
    "several processes on the card": "share_the_card",
    "captured graphs and single launches": "test_graphs",
    "llmpq-run and transformers": "tokens_of_transformers",
}
GIB = 1024**3
DEFAULT_FOLDER = ROOT / "docs" / "gpu"


def main() -> int:
    """The exit code: 2 where there is nothing to report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="what OUT was for scripts/gpu.sh")
    parser.add_argument("-o", "--output", type=Path, help="a folder [default: docs/gpu]")
    options = parser.parse_args()
    try:
        report = gather(options.out)
    except OSError as error:
        print(f"{error.filename}: cannot be read; did scripts/gpu.sh run?", file=sys.stderr)
        return 2
    if report["environment"]["device"] == "cpu" and options.output is None:
        print("these results are of a CPU and say nothing about a card: give -o FOLDER to see them")
        return 2
    folder = options.output or DEFAULT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = file_name(report)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown(report))
    print(f"{folder / name}.json, {folder / name}.md")
    return 0


# ---- the report


def gather(out: Path) -> dict[str, Any]:
    """All results of a folder in one value. Raises `OSError` where run.json is missing."""
    run = json.loads((out / "run.json").read_text())
    found = {name: _read(out / f"{name}.json") for name in RESULTS}
    rows = {name: [_without_plan(row) for row in data["rows"]] for name, data in found.items()}
    card = (run["environment"]["card"] or {}).get("name")
    return {
        "schema_version": 1,
        "kind": "gpu-report",
        "environment": run["environment"],
        "device_type": found["serving"].get("device_type"),
        "steps": run["steps"],
        "failures": {name: data["failures"] for name, data in found.items() if data["failures"]},
        "ceilings": found["kernels"].get("ceilings") or found["serving"].get("ceilings"),
        "checks": [asdict(check) for check in checks_of(rows, card)],
        **rows,
    }


def checks_of(rows: dict[str, list[dict[str, Any]]], card: str | None) -> list[Check]:
    """Every target, against the rows of a card; of a CPU nothing can be told."""
    if card is None:
        rows, why = {name: [] for name in rows}, NO_CARD
    else:
        why = NOT_MEASURED
    return [
        *linear_checks(rows["kernels"], why),
        *serving_checks(rows["serving"], card or "", why),
        *prediction_checks(rows["serving"], rows["predictions"], why),
        *token_checks(_equal_tokens(rows["tests"]), why),
    ]


def _equal_tokens(tests: Sequence[dict[str, Any]]) -> dict[str, bool | None]:
    """By what is compared: whether all its tests passed; None where none ran."""
    found: dict[str, bool | None] = {}
    for name, word in TOKEN_TESTS.items():
        ran = [t["outcome"] for t in tests if word in t["name"] and t["outcome"] != "skipped"]
        found[name] = all(outcome == "passed" for outcome in ran) if ran else None
    return found


def _read(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text()) if path.is_file() else {}
    return {"rows": [], "failures": []} | data


def _without_plan(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "plan"}


def file_name(report: dict[str, Any]) -> str:
    """CARD-DATE, the card by its name in cluster files if it has one."""
    environment = report["environment"]
    card = (environment["card"] or {}).get("name", "cpu")
    slug = "-".join(re.findall(r"[a-z0-9]+", card.lower()))
    on_card = environment["device"] == "cuda"
    return f"{(report['device_type'] if on_card else None) or slug}-{environment['date']}"


# ---- the table


def markdown(report: dict[str, Any]) -> str:
    """For people: one section a kind of result, empty ones left out."""
    sections = [
        _head(report),
        _section("Targets", _targets(report)),
        _section("Linear layers, of Llama-3.3-70B", _linears(report["kernels"])),
        _section("Kernels by themselves", _others(report["kernels"])),
        _section("A model served", _served(report["serving"])),
        _section("Predicted from a profile", _predicted(report["predictions"])),
        _section("A mixed cluster, rehearsed on this card", _cluster(report["cluster"])),
        _section("Tests", _tests(report["tests"])),
        _section("Steps", _steps(report)),
    ]
    return "\n".join(section for section in sections if section)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lines of a Markdown table; empty where it has no rows."""
    body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*head, *body]) if body else ""


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}\n" if text else ""


def _head(report: dict[str, Any]) -> str:
    found, ceilings = report["environment"], report["ceilings"] or {}
    card = found["card"] or {}
    title = card.get("name") or "A CPU in place of a card: no number here says anything about one"
    libraries = ", ".join(f"{name} {number or 'absent'}" for name, number in _versions(found))
    lines = [f"# {title}, {found['date']}", ""]
    lines.append(f"Measured by `scripts/gpu.sh` at commit {found['commit']}; driver ")
    lines[-1] += f"{card.get('driver', 'none')}; {libraries}; Python {found['python']}."
    if ceilings:
        lines.append(
            f"In the same run a copy reached {ceilings['copy_gb_per_s']:,.0f} GB/s (read and "
            f"written), a large 16-bit product {ceilings['matmul_tflops']:,.1f} TFLOP/s."
        )
    return "\n".join([*lines, ""])


def _versions(found: dict[str, Any]) -> list[tuple[str, str | None]]:
    wanted = ("torch", "triton", "humming-kernels", "transformers")
    return [(name, found["libraries"][name]) for name in wanted]


def _targets(report: dict[str, Any]) -> str:
    def held(check: dict[str, Any]) -> str:
        words = {True: "yes", False: "**no**", None: f"cannot tell: {check['why']}"}
        return words[check["holds"]]

    rows = [
        (
            check["name"],
            "-" if check["value"] is None else f"{check['value']:.3g} {check['unit']}",
            check["target"],
            held(check),
        )
        for check in report["checks"]
    ]
    return table(("target", "measured", "wanted", "holds"), rows)


def _linears(rows: Sequence[dict[str, Any]]) -> str:
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
    note = "Share of a copy's bandwidth / speed against the 16-bit product.\n\n"
    return note + table(columns, body) if body else ""


def _linear(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    return f"{100 * cell['share_of_copy']:.0f} % / {cell['against_plain']:.2f}x"


def _worst(cells: Iterable[dict[str, Any]]) -> str:
    return f"{100 * max(cell['error'] for cell in cells):.2f} %"


def _others(rows: Sequence[dict[str, Any]]) -> str:
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
    return table(columns, body)


def _served(rows: Sequence[dict[str, Any]]) -> str:
    body = [
        (
            f"llmpq-run, {row['precision']} bits",
            f"{row['tokens_per_s']:,.0f} (first run {row['first_tokens_per_s']:,.0f})",
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
    columns = ("engine", "tokens/s", "by the spec sheet", "error of its time")
    more = ("prefill tokens/s (of a product's arithmetic)", "decode step, ms x rows")
    return table((*columns, *more, "peak GiB", "load s"), body)


def _predicted(rows: Sequence[dict[str, Any]]) -> str:
    body = [
        (
            row["precision"],
            f"{row['measured_tokens_per_s']:,.0f}",
            f"{row['predicted_tokens_per_s']:,.0f}",
            f"{row['error_percent']:+.1f} %",
        )
        for row in of_kind(rows, "prediction")
    ]
    return table(("bits", "measured tokens/s", "predicted", "error of its time"), body)


def _cluster(rows: Sequence[dict[str, Any]]) -> str:
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
    return table(("method", "measured tokens/s", "predicted", "error of its time", "layers"), body)


def _tests(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    outcomes = [row["outcome"] for row in rows]
    counts = [f"{outcomes.count(word)} {word}" for word in ("passed", "failed", "skipped")]
    others = [f"- {row['outcome']}: `{row['name']}`" for row in rows if row["outcome"] != "passed"]
    return "\n".join([f"{', '.join(counts)}.", *others])


def _steps(report: dict[str, Any]) -> str:
    def ended(step: dict[str, Any]) -> str:
        return "did not run" if step["code"] is None else f"exit {step['code']}"

    body = [
        (name, f"{ended(step)} {step['note']}".strip(), f"{step['seconds']:.0f}")
        for name, step in report["steps"].items()
    ]
    failed = [f"- {name}: {word}" for name, words in report["failures"].items() for word in words]
    return "\n".join([table(("step", "ended", "seconds"), body), *[""] * bool(failed), *failed])


if __name__ == "__main__":
    sys.exit(main())
