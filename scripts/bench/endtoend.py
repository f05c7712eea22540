"""Profile, plan and run the shipped model on a rehearsed mixed cluster, beside the baselines.

Every method's plan runs in turn, for several rounds, on the same prompts with all tokens
generated. Checks: the plan's time is near its prediction; no baseline is faster beyond noise.
Everything is measured in this run, the profile included.

    python scripts/bench/endtoend.py [--quick] [--json OUT.json] [--rounds 5] [--device cuda]

Another model may be named, with a profile of it: then no sensitivity is measured, and plans rest on
the built-in prior.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import Benchmark, Check, arguments, finish, machine
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "configs" / "clusters" / "rehearsal-3.yaml"
WORKLOAD = ROOT / "configs" / "workloads" / "quickstart.yaml"
PROMPTS = ROOT / "llmpq" / "assets" / "prompts.jsonl"
OURS = "llmpq"
MAX_ERROR_PERCENT = 25.0


def main() -> None:
    """Runs the benchmark."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="default 5, or 1 with --quick")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--max-quality-loss", default="0.4", help="percent of perplexity")
    parser.add_argument("--model", type=Path, help="default: the shipped one")
    parser.add_argument("--profiles", type=Path, help="default: made now; needed for --model")
    parser.add_argument("--cluster", type=Path, default=CLUSTER)
    parser.add_argument("--workload", type=Path, default=WORKLOAD)
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="llmpq-endtoend-"))
    try:
        plans = make_plans(options, folder)
        rounds = options.rounds or (1 if options.quick else 5)
        reports = run_in_turn(plans, options, folder, rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    benchmark = Benchmark("endtoend", machine(), judge(reports), summarise(plans, reports))
    show(benchmark.rows)
    finish(benchmark, options.json)


def make_plans(options: Any, folder: Path) -> dict[str, Path]:
    """Our plan and every baseline's that can run."""
    plans = folder / "plans"
    known = ["--profiles", options.profiles or make_profile(options, folder)]
    if options.model:
        known += ["--model", options.model]
    else:
        sensitivity = folder / "sensitivity.json"
        llmpq("profile", "sensitivity", "--device", options.device, "-o", sensitivity)
        known += ["--sensitivity", sensitivity]
    inputs = ["--cluster", options.cluster, "--workload", options.workload]
    goal = ["--max-quality-loss", options.max_quality_loss]
    llmpq("plan", *inputs, *known, *goal, "--baseline-plans", plans, "-o", plans / f"{OURS}.json")
    return {path.stem: path for path in sorted(plans.glob("*.json"))}


def make_profile(options: Any, folder: Path) -> Path:
    """The folder of a profile of the shipped model, made now."""
    budget = "25" if options.quick else "90"
    grid = "--precisions 16,8,4,3 --prefill-micro-batches 1,2,4 --decode-micro-batches 2,4,8"
    lengths = "--prompt-tokens 16,48,112 --past-tokens 16,160"
    threads = [] if options.device == "cuda" else ["--threads", "1"]
    where = ["--device", options.device, "-o", folder / "profiles" / "device.json"]
    llmpq("profile", "layers", *threads, "--budget-s", budget, *f"{grid} {lengths}".split(), *where)
    return folder / "profiles"


def run_in_turn(
    plans: dict[str, Path], options: Any, folder: Path, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Every plan once a round; the reports by method."""
    reports: dict[str, list[dict[str, Any]]] = {method: [] for method in plans}
    for _ in range(rounds):
        for method, plan in plans.items():
            report, output = folder / "report.json", folder / "out.jsonl"
            files = ["--plan", plan, "--prompts", options.prompts, "--output", output]
            llmpq("run", *files, "--report", report, "--ignore-eos", "--device", options.device)
            reports[method].append(json.loads(report.read_text()))
    return reports


def judge(reports: dict[str, list[dict[str, Any]]]) -> list[Check]:
    """The two targets."""
    ours = reports[OURS]
    predicted = ours[0]["predicted"]["total_s"]
    error = 100 * (median(ours, "total_s") / predicted - 1)
    fits = Check(
        name="run's time against the plan's prediction",
        value=error,
        unit="%",
        target=f"within {MAX_ERROR_PERCENT:g} %",
        holds=abs(error) <= MAX_ERROR_PERCENT,
        samples=len(ours),
    )
    return [fits, *against_baselines(reports)]


def against_baselines(reports: dict[str, list[dict[str, Any]]]) -> list[Check]:
    """Our median throughput over each baseline's, and the noise that is allowed."""
    checks = []
    for method, theirs in reports.items():
        if method == OURS:
            continue
        ratio = median(reports[OURS], "tokens_per_s") / median(theirs, "tokens_per_s")
        noise = max(spread(reports[OURS]), spread(theirs))
        check = Check(
            name=f"throughput over {method}",
            value=ratio,
            unit="x",
            target=f">= 1 within noise ({100 * noise:.1f} %)",
            holds=ratio >= 1 - noise if len(theirs) > 1 else None,
            samples=len(theirs),
            why="one round tells no noise",
        )
        checks.append(check)
    return checks


def spread(reports: list[dict[str, Any]]) -> float:
    """Half the range between the quartiles over the median: how far a median may be off."""
    if len(reports) < 2:
        return 0.0
    values = [report["tokens_per_s"] for report in reports]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / statistics.median(values)


def summarise(
    plans: dict[str, Path], reports: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """A row a method."""
    return [
        {
            "method": method,
            "predicted_tokens_per_s": group[0]["predicted"]["tokens_per_s"],
            "measured_tokens_per_s": median(group, "tokens_per_s"),
            "all_tokens_per_s": [report["tokens_per_s"] for report in group],
            "predicted_quality_loss_percent": group[0]["predicted"]["quality_loss_percent"],
        }
        for method, group in reports.items()
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table("method", "predicted tokens/s", "measured (median)", "all rounds", "loss %")
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['predicted_tokens_per_s']:.0f}",
            f"{row['measured_tokens_per_s']:.0f}",
            " ".join(f"{value:.0f}" for value in row["all_tokens_per_s"]),
            f"{row['predicted_quality_loss_percent']:.2f}",
        )
    Console(highlight=False).print(table)


def median(reports: list[dict[str, Any]], key: str) -> float:
    """The median of a key over runs."""
    return statistics.median(report[key] for report in reports)


def llmpq(command: str, *words: object) -> None:
    """Runs a command of llmpq; its own words tell what went wrong."""
    line = [sys.executable, "-m", "llmpq.cli.main", command, "-q", *map(str, words)]
    if command == "profile":  # -q belongs to the sub-command
        line = [*line[:4], str(words[0]), "-q", *map(str, words[1:])]
    done = subprocess.run(line, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
