"""What `llmpq-profile recalibrate` tells: tables on the console, and the same as rows of JSON."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpq.costs.recalibrate import Factor, StageCalls, total_error
from llmpq.plan_data import diff
from llmpq.planner.recalibration import (
    Recalibration,
    Replanned,
    Run,
    TypeResult,
    past_run_s,
    run_notes,
    tokens_per_s,
)

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Files:
    """Where corrected profiles go, and the file of the cluster, where one was given."""

    output: Path
    cluster: Path | None


def tell_past(
    asked: Recalibration, results: Sequence[TypeResult], out: "Console", verbose: bool
) -> dict[str, Any]:
    """Prints what the runs were like at the times before and after, and gives it as JSON."""
    factors = [
        _factor_row(result, factor) for result in results for factor in result.correction.factors
    ]
    stages = [row for result in results for row in _stage_rows(result)]
    stages.sort(key=lambda row: (row["report"], row["rank"], row["phase"] != "prefill"))
    runs = [_run_row(asked, results, run) for run in asked.runs]
    notes = run_notes(asked, results)
    _show_factors(factors, out, verbose)
    _show_stages(stages, runs, out)
    for note in notes:
        out.print(f"note: {note}")
    return {"factors": factors, "stages": stages, "runs": runs, "notes": notes}


def _factor_row(result: TypeResult, factor: Factor) -> dict[str, Any]:
    return {
        "device_type": result.name,
        "part": factor.part[0],
        "phase": factor.part[1] or None,
        "factor": factor.value,
        "spread_percent": 100 * factor.spread,
        "told_apart": factor.own,
    }


def _stage_rows(result: TypeResult) -> list[dict[str, Any]]:
    """Measured and predicted seconds of each stage and phase."""
    groups: dict[tuple[int, int, str], list[StageCalls]] = {}
    for calls in result.measured:
        groups.setdefault((calls.report, calls.rank, calls.phase), []).append(calls)
    return [
        {
            "report": report,
            "rank": rank,
            "device_type": result.name,
            "phase": phase,
            "measured_s": sum(calls.count * calls.seconds for calls in group),
            "error_before_percent": 100 * total_error(result.before, group),
            "error_after_percent": 100 * total_error(result.after, group),
        }
        for (report, rank, phase), group in groups.items()
    ]


def _run_row(asked: Recalibration, results: Sequence[TypeResult], run: Run) -> dict[str, Any]:
    """Total times of a run: None where something else than the planned work was done."""
    planned = run.report.error_percent is not None
    before, after = (
        past_run_s(asked, run, {r.name: getattr(r, when) for r in results}) if planned else None
        for when in ("before", "after")
    )
    measured = run.report.total_s
    return {
        "report": str(run.path),
        "measured_total_s": measured,
        "planned_total_s": run.plan.predicted.total_s if run.plan.predicted else None,
        "error_before_percent": 100 * (before / measured - 1) if before else None,
        "error_after_percent": 100 * (after / measured - 1) if after else None,
    }


def _show_factors(factors: Sequence[dict[str, Any]], out: "Console", verbose: bool) -> None:
    from rich.table import Table

    table = Table("device type", "part", "phase", "measured / predicted", "left over")
    for row in factors:
        if row["told_apart"] or verbose or row["part"] not in ("embedding", "head", "call"):
            name = f"layers, {row['part']} bits" if row["part"].isdigit() else row["part"]
            value = f"{row['factor']:.3f}" + ("" if row["told_apart"] else " (in common)")
            spread = f"+- {row['spread_percent']:.1f} %"
            table.add_row(row["device_type"], name, row["phase"] or "both", value, spread)
    out.print(table)


def _show_stages(
    stages: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], out: "Console"
) -> None:
    from rich.table import Table

    table = Table("run", "stage", "phase", "measured s", "error before", "error after")
    several = len(runs) > 1
    for row in stages:
        name = str(row["report"] + 1) if several else ""
        stage, seconds = f"{row['rank']} ({row['device_type']})", f"{row['measured_s']:.3f}"
        table.add_row(name, stage, row["phase"], seconds, *_errors(row))
    for number, row in enumerate(runs, 1):
        seconds = f"{row['measured_total_s']:.3f}"
        table.add_row(str(number) if several else "", "whole run", "", seconds, *_errors(row))
    out.print(table)


def _errors(row: dict[str, Any]) -> tuple[str, str]:
    values = (row["error_before_percent"], row["error_after_percent"])
    before, after = ("-" if value is None else f"{value:+.1f} %" for value in values)
    return before, after


def tell_next(
    asked: Recalibration, found: Replanned, files: Files, out: "Console"
) -> dict[str, Any]:
    """Prints whether another plan is now better, and gives it as JSON."""
    speed, best_speed, gain = tokens_per_s(found.now), tokens_per_s(found.best), found.gain_percent
    worth = found.is_worth_it
    changed = diff(found.now, found.best) if worth and found.now and found.best else None
    command = _command(asked, found.percent, files) if worth else None
    said = {
        "quality": found.why,
        "plan that ran, at corrected times": f"{speed:.1f} tokens/s" if speed else "not here",
        "best plan now": f"{best_speed:.1f} tokens/s" if best_speed else "none was found",
    }
    for name, value in said.items():
        out.print(f"{name}: {value}")
    if gain is not None:
        word = f"another plan is better by {gain:.1f} %" if worth else "it stays the best plan"
        out.print(word)
    if changed:
        out.print(str(changed))
    if command:
        out.print(f"make it: {command}", soft_wrap=True)
    return {
        "plan_tokens_per_s": speed,
        "best_tokens_per_s": best_speed,
        "gain_percent": gain,
        "changes": str(changed).splitlines() if changed else [],
        "command": command,
    }


def _command(asked: Recalibration, percent: float, files: Files) -> str:
    """The command line that makes the best plan."""
    cluster = files.cluster or files.output / "cluster.yaml"
    words: list[object] = ["llmpq-plan", "--model", asked.runs[-1].plan.model.name]
    words += ["--cluster", cluster, "--workload", files.output / "workload.yaml"]
    words += ["--profiles", files.output]
    if asked.sensitivity:
        words += ["--sensitivity", asked.sensitivity]
    words += ["--max-quality-loss", f"{percent:g}", "-o", "plan.json"]
    return shlex.join(map(str, words))
