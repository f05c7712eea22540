"""The quickstart's last page: every method's predicted and measured speed, and two stories.

python scripts/quickstart_table.py quickstart-out
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OURS = "llmpq"
STORIES = ("story-000", "story-007")


def main() -> None:
    """Prints the table and two continuations."""
    folder = Path(sys.argv[1])
    plan = _read(folder / "plans" / f"{OURS}.json")
    perplexity = {
        Path(row["name"]).stem: row["perplexity"]
        for row in _read(folder / "perplexity.json")["rows"]
    }
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    table = Table("method", "predicted tokens/s", "measured tokens/s", "perplexity")
    for method in [OURS, *(baseline["method"] for baseline in plan["baselines"])]:
        table.add_row(method, *_cells(folder, method, plan, perplexity))
    out.print(table)
    stories = map(json.loads, (folder / "stories.jsonl").read_text().splitlines())
    for line in [line for line in stories if line["id"] in STORIES]:
        out.print(_story(line), markup=False)


def _cells(
    folder: Path, method: str, plan: dict[str, Any], perplexity: dict[str, float]
) -> tuple[str, str, str]:
    report_path = folder / f"{method}.report.json"
    if not report_path.exists():
        row = next(b for b in plan["baselines"] if b["method"] == method)
        if row["feasible"]:  # off-loading, which llmpq-run cannot do
            return f"{row['tokens_per_s']:.0f}", "only priced", "-"
        return "cannot run", str(row["why_not"]), "-"
    report = _read(report_path)
    predicted, measured = report["predicted"]["tokens_per_s"], report["tokens_per_s"]
    return f"{predicted:.0f}", f"{measured:.0f}", f"{perplexity[method]:.2f}"


def _story(line: dict[str, Any]) -> str:
    prompts = Path(__file__).parents[1] / "llmpq" / "assets" / "prompts.jsonl"
    rows = map(json.loads, prompts.read_text().splitlines())
    prompt = next(row["prompt"] for row in rows if row["id"] == line["id"])
    return f"\n{line['id']}: {prompt} >>>{line['text']}"


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
