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
    prediction_checks,
    serving_checks,
    token_checks,
)
from _kernels_tables import Sheet, sheets  # noqa: E402

RESULTS = ("kernels", "serving", "tests", "experts", "predictions", "cluster")
TOKEN_TESTS = {  # a word in the names of the tests that tell
    "one process and several on the card": "share_the_card",
    "captured graphs and single launches": "test_graphs",
    "llmpq-run and transformers": "tokens_of_transformers",
}
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
    steps = run["steps"]  # what lies there of others is of another call, or another card
    found = {name: _read(out / f"{name}.json" if name in steps else None) for name in RESULTS}
    rows = {name: [_without_plan(row) for row in data["rows"]] for name, data in found.items()}
    card = (run["environment"]["card"] or {}).get("name")
    return {
        "schema_version": 1,
        "kind": "gpu-report",
        "environment": run["environment"],
        "device_type": found["serving"].get("device_type"),
        "steps": steps,
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


def _read(path: Path | None) -> dict[str, Any]:
    data = json.loads(path.read_text()) if path and path.is_file() else {}
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
    rows = [row for name in RESULTS for row in report[name]]
    sections = [
        _head(report),
        _section("Targets", _targets(report)),
        *(_section(sheet.title, _of_sheet(sheet)) for sheet in sheets(rows)),
        _section("Tests", _tests(report["tests"])),
        _section("Steps", _steps(report)),
    ]
    return "\n".join(section for section in sections if section)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lines of a Markdown table; empty where it has no rows."""
    body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*head, *body]) if body else ""


def _of_sheet(sheet: Sheet) -> str:
    note = f"{sheet.note}\n\n" if sheet.note else ""
    return note + table(sheet.columns, sheet.body)


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
