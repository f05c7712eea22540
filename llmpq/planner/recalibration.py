"""Reports of runs against the profiles that their plans were made with, and whether to plan anew.

`costs.recalibrate` finds each device type's factors. Here they become a full profile of each type
(`type_result`), times of past runs at corrected profiles (`past_run_s`), notes on what does not
fit (`run_notes`), and the last plan's speed beside the best one's at the same loss of quality
(`replanned`).

Not covered: reading reports, writing profiles, and what is shown of it (`cli.profile_recalibrate`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from llmpq.artifact import Provenance
from llmpq.cluster import Cluster
from llmpq.costs.corrected_rows import base_of, corrected_device, corrected_rows
from llmpq.costs.fits import chosen_models
from llmpq.costs.latency import LayerTimes, device_times
from llmpq.costs.quality import QualityModel, measured_quality, prior_of
from llmpq.costs.recalibrate import Correction, StageCalls, correction, link_s, stage_calls
from llmpq.errors import InfeasibleError, UserError
from llmpq.plan_data import Plan, spec_of_run
from llmpq.planner.evaluate import evaluate, to_assignment
from llmpq.planner.planning import Options, replan
from llmpq.planner.problem import Problem
from llmpq.planner.search import Progress
from llmpq.planner.simulated import run_s, with_run
from llmpq.precision import in_order, is_optional
from llmpq.profile_data import Profile, load_sensitivity
from llmpq.run_report import Report
from llmpq.workload import planned_lengths

GAP = 0.005  # of the search for a better plan; what is less is no gain
OTHER_PROFILES = 0.02  # relative: stage times further off were planned with other profiles
GROSS = 3.0  # times what links were predicted to take
GROSS_SHARE = 0.05  # of the run


@dataclass(frozen=True)
class ReportedRun:
    """A report with its plan."""

    path: Path
    report: Report
    plan: Plan


@dataclass(frozen=True)
class Recalibration:
    """What is asked: runs of one model, and the cluster and profiles at hand.

    `sensitivity`: file of measured losses of quality; None: a generic estimate. `max_quality_loss`:
    percent of perplexity that a new plan may lose; None: what the last run's plan loses.
    """

    runs: tuple[ReportedRun, ...]
    cluster: Cluster
    profiles: tuple[Profile, ...]
    sensitivity: Path | None
    max_quality_loss: float | None
    time_limit_s: float

    @property
    def device_types(self) -> list[str]:
        """Of the cluster at hand, each once."""
        return list(dict.fromkeys(device.type for device in self.cluster.devices()))


@dataclass(frozen=True)
class TypeResult:
    """One device type: its calls, its times before and after, and what lies between."""

    name: str
    measured: tuple[StageCalls, ...]
    before: LayerTimes
    after: LayerTimes
    correction: Correction
    profile: Profile | None


@dataclass(frozen=True)
class Replanned:
    """The last run's plan at corrected times (None: the cluster lacks its devices), and the best
    plan now (None: there is none), within `percent` of loss; `why`: where that limit is from.
    """

    now: Plan | None
    best: Plan | None
    percent: float
    why: str

    @property
    def gain_percent(self) -> float | None:
        """By how much the best plan is faster; None where the two cannot be compared."""
        speed, best = tokens_per_s(self.now), tokens_per_s(self.best)
        return 100 * (best / speed - 1) if speed and best else None

    @property
    def is_worth_it(self) -> bool:
        """Whether the best plan is faster by more than the search can tell apart."""
        gain = self.gain_percent
        return self.best is not None and (gain is None or gain > 100 * GAP)


def tokens_per_s(plan: Plan | None) -> float | None:
    """The predicted speed of a plan, where there is one."""
    return plan.predicted.tokens_per_s if plan and plan.predicted else None


def check_alike(runs: Sequence[ReportedRun], cluster: Cluster) -> None:
    """One model, and device types that mean the same everywhere."""
    faults = []
    keys = [run.plan.model.without_windows().model_key for run in runs]  # older plans know of none
    for run, key in zip(runs, keys, strict=True):
        if key != keys[0]:
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


# ---- corrections


def type_result(asked: Recalibration, name: str) -> TypeResult:
    """All about one device type; without a profile and without calls, the spec sheet stays."""
    spec, cluster = spec_of_run(asked.runs[0].plan), asked.cluster
    every = stage_calls([(run.report, run.plan) for run in asked.runs])
    measured = tuple(calls for calls in every if calls.device_type == name)
    before = device_times(cluster, name, spec, asked.profiles)
    _check_precisions(measured, before)
    found = correction(name, before, measured)
    base = base_of(cluster, name, spec, asked.profiles)
    if base is None and not measured:
        return TypeResult(name, measured, before, before, found, None)
    rows = corrected_rows(base, before, found, measured, spec)
    device = corrected_device(base, name, cluster, len({calls.report for calls in measured}))
    source = f"{device.name}; planned with: {before.provenance}"
    profile = Profile(
        device=device,
        rows=rows,
        memory=list(base.memory) if base else [],
        models=chosen_models(rows),
        provenance=Provenance.here(source),
    )
    after = device_times(cluster, name, spec, [profile])
    return TypeResult(name, measured, before, after, found, profile)


def _check_precisions(measured: Sequence[StageCalls], times: LayerTimes) -> None:
    """The profiles must know what ran."""
    missing = {p for calls in measured for p in calls.precisions} - set(times.precisions)
    if missing:
        raise UserError(
            f"--profiles: no times of {measured[0].device_type} at {', '.join(sorted(missing))} "
            "bits, which the run used; give the profiles that its plan was made with"
        )


# ---- past runs


def past_run_s(
    asked: Recalibration, run: ReportedRun, times: dict[str, LayerTimes]
) -> float | None:
    """A run's total time at these times; None where some of its devices have none."""
    if not {stage.devices[0] for stage in run.plan.stages} <= set(times):
        return None
    problem = _problem(asked, run.plan, run.plan.cluster, times)
    return run_s(problem, to_assignment(run.plan, run.plan.cluster))


def run_notes(asked: Recalibration, results: Sequence[TypeResult]) -> list[str]:
    """What of the runs does not fit the profiles or the cluster at hand, a line each."""
    notes = [
        f"{result.name}: no stage ran on it; its times are unchanged"
        for result in results
        if not result.measured
    ]
    known = {result.name for result in results}
    for number, run in enumerate(asked.runs):
        left = {stage.devices[0] for stage in run.plan.stages} - known
        notes += [
            f"{run.path}: {name} is not in the cluster and is left out" for name in sorted(left)
        ]
        notes += _other_profiles(run, results)
        notes += _slow_links(number, run, results)
    return notes


def _other_profiles(run: ReportedRun, results: Sequence[TypeResult]) -> list[str]:
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


def _mean_steps(run: ReportedRun, times: dict[str, LayerTimes]) -> dict[int, float]:
    """Predicted decode step of each stage, at the plan's mean past, as its planner takes it."""
    plan = run.plan
    if not {stage.devices[0] for stage in plan.stages} <= set(times):
        return {}
    problem = Problem(
        spec=spec_of_run(plan),
        model=plan.model,
        cluster=plan.cluster,
        workload=plan.workload,
        lengths=tuple(planned_lengths(plan.workload)),
        num_requests=plan.workload.num_requests,
        times=times,
        quality=prior_of(plan.model),
        precisions=tuple(sorted(set(plan.precisions))),
    )
    predicted = evaluate(problem, to_assignment(plan, plan.cluster))
    return {rank: stage.decode_step_s for rank, stage in enumerate(predicted.stages)}


def _slow_links(number: int, run: ReportedRun, results: Sequence[TypeResult]) -> list[str]:
    """Says so where handing over took grossly longer than links were predicted to take."""
    notes = []
    for stage in run.report.stages:
        mine = [
            c for r in results for c in r.measured if (c.report, c.rank) == (number, stage.rank)
        ]
        expected = link_s(run.plan, mine)
        if stage.comm_s > max(GROSS * expected, GROSS_SHARE * run.report.total_s):
            notes.append(
                f"{run.path}: stage {stage.rank} spent {stage.comm_s:.2f} s sending; by the "
                f"cluster's links it should be {expected:.2f} s; measure them: llmpq-profile links"
            )
    return notes


# ---- the next run


def replanned(
    asked: Recalibration,
    results: Sequence[TypeResult],
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Replanned:
    """The last plan at corrected times, and the best plan now."""
    plan = asked.runs[-1].plan
    profiles = [result.profile for result in results if result.profile]
    problem = _problem(asked, plan, asked.cluster, {r.name: r.after for r in results}, profiles)
    percent, why = _allowed(asked, problem, plan)
    problem = replace(problem, budget=problem.quality.budget(percent))
    options = Options(gap=GAP, time_limit_s=asked.time_limit_s, compare=False, progress=on_progress)
    try:
        best = replan(problem, options, like=plan)
    except InfeasibleError:
        best = None
    why = f"{why}; {problem.quality.source}"
    return Replanned(_as_now(problem, plan), best, percent, why)


def _as_now(problem: Problem, plan: Plan) -> Plan | None:
    """A plan as it would run now; None where the cluster at hand has not its devices."""
    try:
        assignment = to_assignment(plan, problem.cluster)
        predicted = with_run(problem, assignment, evaluate(problem, assignment))
    except ValueError:
        return None
    return plan.model_copy(update={"predicted": predicted})


def _problem(
    asked: Recalibration,
    plan: Plan,
    cluster: Cluster,
    times: dict[str, LayerTimes],
    profiles: Sequence[Profile] = (),
) -> Problem:
    """The plan's problem at these times; any quality, the budget comes later."""
    quality = _quality(asked, plan)
    timed = in_order(p for t in times.values() for p in t.offered)
    return Problem(
        spec=spec_of_run(plan),
        model=plan.model,
        cluster=cluster,
        workload=plan.workload,
        lengths=tuple(planned_lengths(plan.workload)),
        num_requests=plan.workload.num_requests,
        times=times,
        quality=quality,
        precisions=tuple(
            p for p in timed if p in quality.omega and (not is_optional(p) or p in plan.precisions)
        ),
        profiles=tuple(profiles),
    )


def _quality(asked: Recalibration, plan: Plan) -> QualityModel:
    if asked.sensitivity is None:
        return prior_of(plan.model)
    sensitivity = load_sensitivity(asked.sensitivity)
    return measured_quality(sensitivity, plan.model, str(asked.sensitivity))


def _allowed(asked: Recalibration, problem: Problem, plan: Plan) -> tuple[float, str]:
    """Percent of perplexity that a new plan may lose, rounded up, and where that is from."""
    if asked.max_quality_loss is not None:
        return asked.max_quality_loss, f"a new plan may lose {asked.max_quality_loss:g} %"
    percent = problem.quality.percent(problem.quality.sum_omega(plan.precisions))
    percent = ceil(percent * 1e4) / 1e4
    return percent, f"a new plan may lose {percent:g} %, what the plan that ran loses"
