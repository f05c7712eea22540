"""What recalibration reads of runs, and its result as rows: factors, stages, whole runs.

Not covered: the corrections themselves (`planner.recalibration`), tables and files
(`cli.profile_recalibrate`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmpq.artifact import parse_json, show_value, validate
from llmpq.costs.recalibrate import StageCalls, total_error
from llmpq.errors import UserError
from llmpq.planner.recalibration import (
    Recalibration,
    ReportedRun,
    TypeResult,
    past_run_s,
    run_notes,
)
from llmpq.run_report import Report


@dataclass(frozen=True)
class FactorRow:
    """Measured over predicted time of a part of a device type's work.

    `told_apart`: whether the runs distinguish this part from others.
    """

    device_type: str
    part: str
    phase: str | None
    factor: float
    spread_percent: float
    told_apart: bool


@dataclass(frozen=True)
class StageRow:
    """Measured seconds of a stage in a phase; errors of the times before and after.

    `report`: the run's number, from 0.
    """

    report: int
    rank: int
    device_type: str
    phase: Literal["prefill", "decode"]
    measured_s: float
    error_before_percent: float
    error_after_percent: float


@dataclass(frozen=True)
class RunRow:
    """Total time of a run; errors are None where something else than the planned work was done."""

    report: str
    measured_total_s: float
    planned_total_s: float | None
    error_before_percent: float | None
    error_after_percent: float | None


@dataclass(frozen=True)
class PastRuns:
    """What the runs were like at the times before and after."""

    factors: list[FactorRow]
    stages: list[StageRow]
    runs: list[RunRow]
    notes: list[str]


def read_run(path: Path) -> ReportedRun:
    """Reads a report; raises `UserError` where it does not hold what is needed."""
    data = parse_json(path)
    kind = data.get("kind", "something else") if isinstance(data, dict) else "something else"
    if kind != "report":
        raise UserError(
            f"{path}: is of kind {show_value(kind)}; expected a report, as 'llmpq-run --report' "
            "writes it"
        )
    report = validate(data, Report, path)
    if report.plan is None or not any(stage.measured for stage in report.stages):
        raise UserError(
            f"{path}: holds no measured stage times; run again with this version: "
            f"llmpq-run ... --report {path}"
        )
    if len(report.stages) != len(report.plan.stages):
        raise UserError(
            f"{path}: has {len(report.stages)} stages, its plan {len(report.plan.stages)}"
        )
    return ReportedRun(path, report, report.plan)


def past_runs(asked: Recalibration, results: Sequence[TypeResult]) -> PastRuns:
    """All rows, and notes on what does not fit."""
    factors = [
        FactorRow(
            device_type=result.name,
            part=factor.part[0],
            phase=factor.part[1] or None,
            factor=factor.value,
            spread_percent=100 * factor.spread,
            told_apart=factor.own,
        )
        for result in results
        for factor in result.correction.factors
    ]
    stages = [row for result in results for row in _stage_rows(result)]
    stages.sort(key=lambda row: (row.report, row.rank, row.phase != "prefill"))
    runs = [_run_row(asked, results, run) for run in asked.runs]
    return PastRuns(factors, stages, runs, run_notes(asked, results))


def _stage_rows(result: TypeResult) -> list[StageRow]:
    groups: dict[tuple[int, int, Literal["prefill", "decode"]], list[StageCalls]] = {}
    for calls in result.measured:
        groups.setdefault((calls.report, calls.rank, calls.phase), []).append(calls)
    return [
        StageRow(
            report=report,
            rank=rank,
            device_type=result.name,
            phase=phase,
            measured_s=sum(calls.count * calls.seconds for calls in group),
            error_before_percent=100 * total_error(result.before, group),
            error_after_percent=100 * total_error(result.after, group),
        )
        for (report, rank, phase), group in groups.items()
    ]


def _run_row(asked: Recalibration, results: Sequence[TypeResult], run: ReportedRun) -> RunRow:
    planned, measured = run.report.error_percent is not None, run.report.total_s
    before, after = (
        past_run_s(asked, run, {r.name: getattr(r, when) for r in results}) if planned else None
        for when in ("before", "after")
    )
    return RunRow(
        report=str(run.path),
        measured_total_s=measured,
        planned_total_s=run.plan.predicted.total_s if run.plan.predicted else None,
        error_before_percent=100 * (before / measured - 1) if before else None,
        error_after_percent=100 * (after / measured - 1) if after else None,
    )
