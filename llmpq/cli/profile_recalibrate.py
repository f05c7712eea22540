"""`llmpq-profile recalibrate`: run reports -> corrected profiles, and whether to plan anew.

Reads reports and the profiles that their plans were made with, asks `costs.recalibrate` for each
device type's factors, writes a full profile of each type, prices the last report's plan with them
and looks for a better one at the same loss of quality. Imports no torch.
"""

import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmpq.cli.common import Command, FiniteRange, common_options, console, emit
from llmpq.errors import InfeasibleError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from llmpq.cluster import Cluster
    from llmpq.costs.latency import LayerTimes
    from llmpq.costs.quality import QualityModel
    from llmpq.costs.recalibrate import Correction, StageCalls
    from llmpq.plan import Plan
    from llmpq.planner.problem import Problem
    from llmpq.profile_data import Profile
    from llmpq.report import Report

PATH = click.Path(path_type=Path)
GAP = 0.005  # of the search for a better plan; what is less is no gain
OTHER_PROFILES = 0.02  # relative: stage times further off were planned with other profiles
GROSS = 3.0  # times what links were predicted to take
GROSS_SHARE = 0.05  # of the run


@dataclass(frozen=True)
class Run:
    """A report with its plan."""

    path: Path
    report: "Report"
    plan: "Plan"


@dataclass(frozen=True)
class Request:
    """The command line."""

    runs: tuple[Run, ...]
    cluster: "Cluster"
    cluster_path: Path | None
    profiles: "tuple[Profile, ...]"
    sensitivity: Path | None
    max_quality_loss: float | None
    time_limit: float
    output: Path


@dataclass(frozen=True)
class TypeResult:
    """One device type: its calls, its times before and after, and what lies between."""

    name: str
    measured: "tuple[StageCalls, ...]"
    before: "LayerTimes"
    after: "LayerTimes"
    correction: "Correction"
    profile: "Profile | None"


@click.command(cls=Command, name="recalibrate")
@click.option("--report", "first", multiple=True, required=True, type=PATH, help="Of llmpq-run.")
@click.option("--profiles", type=PATH, help="Folder of the profiles that the plan was made with.")
@click.option("--cluster", type=PATH, help="cluster.yaml, where it is not the plan's any more.")
@click.option("--sensitivity", type=PATH, help="sensitivity.json; without: a built-in prior.")
@click.option(
    "--max-quality-loss",
    type=FiniteRange(min=0),
    help="Percent of perplexity for a new plan; without: what the plan loses.",
)
@click.option("--time-limit", type=FiniteRange(min=0.1), default=20.0, show_default=True)
@click.option("-o", "--output", required=True, type=PATH, help="Folder for corrected profiles.")
@click.argument("more", nargs=-1, type=PATH)
@common_options
def recalibrate(**flags: Any) -> None:
    """Correct profiles by what runs measured, and see if another plan is now better.

    MORE: further reports of the same model (--report A.json B.json ...).
    """
    request = _request(flags)
    _check_files(flags, request)
    out = console(flags["quiet"])
    results = [_result(request, name) for name in _types(request)]
    written = _write(request, results)
    value = _told(request, results, out, flags["verbose"])
    value["profiles"] = [str(path) for path in written]
    value |= _replanned(request, results, out)
    _emit(value, flags["json_path"])


# ---- what is asked


def _request(flags: dict[str, Any]) -> Request:
    from llmpq.cluster import load_cluster
    from llmpq.profile_data import load_profiles

    runs = [_run(path) for path in (*flags["first"], *flags["more"])]
    profiles, output = flags["profiles"], flags["output"]
    if profiles is not None and os.path.realpath(output) == os.path.realpath(profiles):
        raise UserError(f"-o {output}: is the folder of --profiles; corrected ones need their own")
    cluster = load_cluster(flags["cluster"]) if flags["cluster"] else runs[-1].plan.cluster
    _check_alike(runs, cluster)
    return Request(
        tuple(runs),
        cluster,
        flags["cluster"],
        tuple(load_profiles(profiles)) if profiles else (),
        flags["sensitivity"],
        flags["max_quality_loss"],
        flags["time_limit"],
        output,
    )


def _check_files(flags: dict[str, Any], request: Request) -> None:
    """No file is written that is read, or written as another one."""
    from llmpq.cli.paths import Named, check_files, profile_files

    names = [*map(_file_name, _types(request)), "cluster.yaml", "workload.yaml"]
    writes: list[Named] = [("a file of -o", request.output / name) for name in names]
    writes += [("--json", flags["json_path"])]
    reads: list[Named] = [("--report", run.path) for run in request.runs]
    reads += [("--cluster", request.cluster_path), ("--sensitivity", request.sensitivity)]
    check_files([*reads, *profile_files(flags["profiles"], writes)], writes)


def _file_name(device_type: str) -> str:
    """Of a type's profile, whatever the type is called."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', device_type)}.json"


def _run(path: Path) -> Run:
    """A report that holds what is needed."""
    from llmpq.artifact import parse_json, show_value, validate
    from llmpq.report import Report

    data = parse_json(path)
    kind = data.get("kind", "something else") if isinstance(data, dict) else "something else"
    if kind != "report":
        raise UserError(
            f"{path}: is of the kind {show_value(kind)}, expected a report, as "
            "'llmpq-run --report' writes it"
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
    return Run(path, report, report.plan)


def _check_alike(runs: Sequence[Run], cluster: "Cluster") -> None:
    """One model, and device types that mean the same everywhere."""
    faults = []
    for run in runs:
        if run.plan.model.model_key != runs[0].plan.model.model_key:
            faults.append(f"{run.path}: is of another model than {runs[0].path}")
        for name, role in run.plan.cluster.rehearse.items():
            here = cluster.rehearse.get(name)
            if here is not None and here.slowdown != role.slowdown:
                faults.append(
                    f"{run.path}: rehearses {name} {role.slowdown:g} times slower, "
                    f"the cluster at hand {here.slowdown:g} times"
                )
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))


def _types(request: Request) -> list[str]:
    return list(dict.fromkeys(device.type for device in request.cluster.devices()))


# ---- corrections


def _result(request: Request, name: str) -> TypeResult:
    """All about one device type; without a profile and without calls, the spec sheet stays."""
    from llmpq.artifact import Provenance
    from llmpq.costs.latency import device_times
    from llmpq.costs.recalibrate import (
        base_of,
        corrected_device,
        corrected_rows,
        correction,
        stage_calls,
    )
    from llmpq.profile_data import Profile

    spec, cluster = request.runs[0].plan.model, request.cluster
    every = stage_calls([(run.report, run.plan) for run in request.runs])
    measured = tuple(calls for calls in every if calls.device_type == name)
    before = device_times(cluster, name, spec, request.profiles)
    _check_precisions(measured, before)
    found = correction(name, before, measured)
    base = base_of(cluster, name, spec, request.profiles)
    if base is None and not measured:
        return TypeResult(name, measured, before, before, found, None)
    rows = corrected_rows(base, before, found, measured, spec)
    device = corrected_device(base, name, cluster, len({calls.report for calls in measured}))
    source = f"{device.name}; planned with: {before.provenance}"
    profile = Profile(
        device=device,
        rows=rows,
        memory=list(base.memory) if base else [],
        provenance=Provenance.here(source),
    )
    after = device_times(cluster, name, spec, [profile])
    return TypeResult(name, measured, before, after, found, profile)


def _check_precisions(measured: "Sequence[StageCalls]", times: "LayerTimes") -> None:
    """The profiles must know what ran."""
    missing = {p for calls in measured for p in calls.precisions} - set(times.precisions)
    if missing:
        raise UserError(
            f"--profiles: no times of {measured[0].device_type} at {', '.join(sorted(missing))} "
            "bits, which the run used; give the profiles that its plan was made with"
        )


def _write(request: Request, results: Sequence[TypeResult]) -> list[Path]:
    """A profile for each type, and the cluster and workload that a new plan needs."""
    import yaml

    from llmpq.artifact import write_json, write_text

    written = []
    for result in results:
        if result.profile is not None:
            path = request.output / _file_name(result.name)
            write_json(path, result.profile)
            written.append(path)
    for name, value in (("cluster", request.cluster), ("workload", request.runs[-1].plan.workload)):
        data = value.model_dump(mode="json", exclude_none=True)
        write_text(request.output / f"{name}.yaml", yaml.safe_dump(data, sort_keys=False))
    return written


# ---- what is told of the past


def _told(
    request: Request, results: Sequence[TypeResult], out: "Console", verbose: bool
) -> dict[str, Any]:
    factors = [_factor_row(result, factor) for result in results for factor in _factors(result)]
    stages = [row for result in results for row in _stage_rows(result)]
    stages.sort(key=lambda row: (row["report"], row["rank"], row["phase"] != "prefill"))
    runs = [_run_row(request, results, run) for run in request.runs]
    notes = _notes(request, results)
    _show_factors(factors, out, verbose)
    _show_stages(stages, runs, out)
    for note in notes:
        out.print(f"note: {note}")
    return {"factors": factors, "stages": stages, "runs": runs, "notes": notes}


def _factors(result: TypeResult) -> Sequence[Any]:
    return result.correction.factors


def _factor_row(result: TypeResult, factor: Any) -> dict[str, Any]:
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
    from llmpq.costs.recalibrate import total_error

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


def _run_row(request: Request, results: Sequence[TypeResult], run: Run) -> dict[str, Any]:
    """Total times of a run: None where something else than the planned work was done."""
    planned = run.report.error_percent is not None
    before, after = (
        _predicted_s(request, run, {r.name: getattr(r, when) for r in results}) if planned else None
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


def _predicted_s(request: Request, run: Run, times: "dict[str, LayerTimes]") -> float | None:
    """A run's total time at these times; None where some of its devices have none."""
    from llmpq.planner.evaluate import to_assignment
    from llmpq.planner.simulated import run_s

    if not {stage.devices[0] for stage in run.plan.stages} <= set(times):
        return None
    problem = _problem(request, run.plan, run.plan.cluster, times)
    return run_s(problem, to_assignment(run.plan, run.plan.cluster))


def _notes(request: Request, results: Sequence[TypeResult]) -> list[str]:
    notes = [
        f"{result.name}: no stage ran on it, its times stay as they were"
        for result in results
        if not result.measured
    ]
    known = {result.name for result in results}
    for number, run in enumerate(request.runs):
        left = {stage.devices[0] for stage in run.plan.stages} - known
        notes += [f"{run.path}: {name} is not in the cluster, left out" for name in sorted(left)]
        notes += _other_profiles(run, results)
        notes += _slow_links(number, run, results)
    return notes


def _other_profiles(run: Run, results: Sequence[TypeResult]) -> list[str]:
    """Says so where the plan was made with other times than those given."""
    row = run.plan.predicted
    given = _mean_steps(run, {result.name: result.before for result in results})
    if row is None or not given:
        return []
    off = max(abs(given[rank] / row.stages[rank].decode_step_s - 1) for rank in given)
    if off <= OTHER_PROFILES:
        return []
    return [
        f"{run.path}: its plan was made with other times than those of --profiles (a stage's decode"
        f" step differs by {100 * off:.0f} %); 'before' is by the profiles given now"
    ]


def _mean_steps(run: Run, times: "dict[str, LayerTimes]") -> dict[int, float]:
    """Predicted decode step of each stage, at the plan's mean past, as its planner takes it."""
    from llmpq.costs.quality import prior_quality
    from llmpq.planner.evaluate import evaluate, to_assignment
    from llmpq.planner.problem import Problem
    from llmpq.workload import planned_lengths

    plan = run.plan
    if not {stage.devices[0] for stage in plan.stages} <= set(times):
        return {}
    problem = Problem(
        spec=plan.model,
        cluster=plan.cluster,
        workload=plan.workload,
        lengths=tuple(planned_lengths(plan.workload)),
        num_requests=plan.workload.num_requests,
        times=times,
        quality=prior_quality(plan.model.num_layers),
        precisions=tuple(sorted(set(plan.precisions))),
    )
    predicted = evaluate(problem, to_assignment(plan, plan.cluster))
    return {rank: stage.decode_step_s for rank, stage in enumerate(predicted.stages)}


def _slow_links(number: int, run: Run, results: Sequence[TypeResult]) -> list[str]:
    """Says so where handing over took grossly longer than links were predicted to take."""
    from llmpq.costs.recalibrate import link_s

    notes = []
    for stage in run.report.stages:
        mine = [
            c for r in results for c in r.measured if (c.report, c.rank) == (number, stage.rank)
        ]
        expected = link_s(run.plan, mine)
        if stage.comm_s > max(GROSS * expected, GROSS_SHARE * run.report.total_s):
            notes.append(
                f"{run.path}: stage {stage.rank} spent {stage.comm_s:.2f} s handing over, the "
                f"cluster's links say {expected:.2f} s; measure them: llmpq-profile links"
            )
    return notes


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


# ---- what is told of the future


def _problem(
    request: Request,
    plan: "Plan",
    cluster: "Cluster",
    times: "dict[str, LayerTimes]",
    profiles: "Sequence[Profile]" = (),
) -> "Problem":
    """The plan's problem at these times; any quality, the budget comes later."""
    from llmpq.planner.problem import Problem
    from llmpq.precision import STANDARD
    from llmpq.workload import planned_lengths

    quality = _quality(request, plan)
    timed = {p for t in times.values() for p in t.precisions}
    known = dict.fromkeys((*STANDARD, *plan.precisions))
    return Problem(
        spec=plan.model,
        cluster=cluster,
        workload=plan.workload,
        lengths=tuple(planned_lengths(plan.workload)),
        num_requests=plan.workload.num_requests,
        times=times,
        quality=quality,
        precisions=tuple(p for p in known if p in timed and p in quality.omega),
        profiles=tuple(profiles),
    )


def _quality(request: Request, plan: "Plan") -> "QualityModel":
    from llmpq.costs.quality import measured_quality, prior_quality
    from llmpq.profile_data import load_sensitivity

    if request.sensitivity is None:
        return prior_quality(plan.model.num_layers)
    sensitivity = load_sensitivity(request.sensitivity)
    return measured_quality(sensitivity, plan.model, str(request.sensitivity))


def _replanned(request: Request, results: Sequence[TypeResult], out: "Console") -> dict[str, Any]:
    """The last plan at corrected times, and the best plan now."""
    from llmpq.cli.progress import progress
    from llmpq.planner.evaluate import evaluate, to_assignment
    from llmpq.planner.planning import Options, replan
    from llmpq.planner.simulated import with_run

    plan = request.runs[-1].plan
    profiles = [result.profile for result in results if result.profile]
    problem = _problem(request, plan, request.cluster, {r.name: r.after for r in results}, profiles)
    percent, why = _allowed(request, problem, plan)
    problem = replace(problem, budget=problem.quality.budget(percent))
    try:
        assignment = to_assignment(plan, request.cluster)
        predicted = with_run(problem, assignment, evaluate(problem, assignment))
        now = plan.model_copy(update={"predicted": predicted})
    except ValueError:
        now = None  # the cluster at hand has not its devices
    try:
        with progress(out, "planning", 1) as bar:
            options = Options(
                gap=GAP,
                time_limit_s=request.time_limit,
                compare=False,
                progress=lambda step: bar.update(step.done, step.phase, step.total),
            )
            best = replan(problem, options, like=plan)
    except InfeasibleError:
        best = None
    out.print(f"quality: {why}; {problem.quality.source}")
    return _verdict(request, now, best, percent, out)


def _allowed(request: Request, problem: "Problem", plan: "Plan") -> tuple[float, str]:
    """Percent of perplexity that a new plan may lose, rounded up, and where that is from."""
    from math import ceil

    if request.max_quality_loss is not None:
        return request.max_quality_loss, f"a new plan may lose {request.max_quality_loss:g} %"
    percent = problem.quality.percent(problem.quality.sum_omega(plan.precisions))
    percent = ceil(percent * 1e4) / 1e4
    return percent, f"a new plan may lose {percent:g} %, what the plan that ran loses"


def _verdict(
    request: Request, now: "Plan | None", best: "Plan | None", percent: float, out: "Console"
) -> dict[str, Any]:
    from llmpq.plan import diff

    speed, best_speed = _speed(now), _speed(best)
    gain = 100 * (best_speed / speed - 1) if speed and best_speed else None
    worth = best is not None and (gain is None or gain > 100 * GAP)
    changed = diff(now, best) if worth and now and best else None
    command = _command(request, percent) if worth else None
    said = {
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


def _speed(plan: "Plan | None") -> float | None:
    return plan.predicted.tokens_per_s if plan and plan.predicted else None


def _command(request: Request, percent: float) -> str:
    """The command line that makes the best plan."""
    cluster = request.cluster_path or request.output / "cluster.yaml"
    words: list[object] = ["llmpq-plan", "--model", request.runs[-1].plan.model.name]
    words += ["--cluster", cluster, "--workload", request.output / "workload.yaml"]
    words += ["--profiles", request.output]
    if request.sensitivity:
        words += ["--sensitivity", request.sensitivity]
    words += ["--max-quality-loss", f"{percent:g}", "-o", "plan.json"]
    return shlex.join(map(str, words))


def _emit(value: dict[str, Any], path: Path | None) -> None:
    from llmpq.artifact import SCHEMA_VERSION, Provenance

    head = {"schema_version": SCHEMA_VERSION, "kind": "recalibration"}
    tail = {"provenance": Provenance.here().model_dump()}
    emit(json.dumps(head | value | tail, indent=1), path)
