"""What `llmpq-plan` tells and writes: the report, plan files, JSON for programs.

The report goes to standard output, notes to standard error. Nothing is computed here but the
simulation of a run that is to be shown. Heavy modules are imported inside functions, so that
`--help` is quick.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llmpq.cli.common import console, emit, report_console
from llmpq.cli.plan_options import PlanOptions, max_loss
from llmpq.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from llmpq.costs.simulate import SimulatedRun
    from llmpq.plan_data import Plan
    from llmpq.planner.planning import Planned
    from llmpq.planner.problem import Assignment, Problem
    from llmpq.planner.what_if import WhatIf

MAX_SPANS = 50_000_000  # of all jobs on all stages and links, 16 bytes each
MAX_JOBS = 1_000_000  # simulating them takes some 40 seconds


def report_to(options: PlanOptions) -> "Console":
    """Returns the console that the report goes to."""
    return report_console(options.quiet, options.json_path)


def show_notes(options: PlanOptions, notes: Sequence[str]) -> None:
    """Prints what a reader should know, on standard error."""
    from llmpq.render.plan_report import print_notes

    print_notes(console(options.quiet), notes)


def show_plan(
    options: PlanOptions,
    problem: "Problem",
    planned: "Planned",
    notes: Sequence[str],
    what_if: "WhatIf | None" = None,
) -> None:
    """Prints the plan, the baselines, what would change it, and how to run it."""
    from llmpq.launch import launch_lines
    from llmpq.render.plan_report import print_changes, print_outcomes, print_report

    out, plan = report_to(options), planned.plan
    print_report(out, plan, problem.quality.source, [], _limits(options))
    if options.compare and planned.outcomes:
        print_outcomes(out, plan, planned.outcomes)
    if what_if and (what_if.changes or what_if.num_left_out):
        print_changes(out, plan, what_if)
    files = ["--plan", str(options.output or "PLAN.json"), "--prompts", "PROMPTS.jsonl"]
    for line in launch_lines(plan, [*files, "--output", "OUT.jsonl"]):
        out.print(line, soft_wrap=True)
    effort = [planned.effort] if options.verbose and planned.effort else []
    show_notes(options, [*notes, *planned.notes, *_warnings(options, problem, plan), *effort])


def _warnings(options: PlanOptions, problem: "Problem", plan: "Plan") -> list[str]:
    """Returns what the reader of a plan should know of its predictions."""
    from llmpq.costs.float16 import planned_overflow
    from llmpq.planner.accuracy import assumed_calls, warnings
    from llmpq.planner.evaluate import to_assignment
    from llmpq.planner.problem import OVER

    assignment = to_assignment(plan, problem.cluster)
    found = warnings(problem, assignment) + assumed_calls(problem, assignment)
    found += filter(None, [planned_overflow(plan)])
    if any(stage.tensor_parallel > 1 for stage in plan.stages):
        found.append(
            "stages of several devices (tensor parallelism) have not been measured on GPUs: their "
            "predicted times may be far off (--tensor-parallel off plans without them)"
        )
    if plan.predicted and plan.predicted.sum_sensitivity > problem.budget * OVER:
        found.append(f"this plan loses more than the {_limits(options)} allows")
    return found


def _limits(options: PlanOptions) -> str:
    if options.theta is not None:
        return f"theta {options.theta:g} s for one unit of summed sensitivity"
    default = " (default)" if options.max_quality_loss is None else ""
    return f"budget {max_loss(options):g} %{default}"


def write_plan(options: PlanOptions, plan: "Plan") -> None:
    """Writes the plan file, and the same as JSON where that is asked for."""
    from llmpq.artifact import write_json

    if options.output is not None:
        write_json(options.output, plan)
    emit(plan.model_dump_json(indent=1), options.json_path)


def write_baselines(options: PlanOptions, problem: "Problem", planned: "Planned") -> None:
    """Writes a plan file for each baseline that has a plan, where a folder is given."""
    from llmpq.artifact import write_json
    from llmpq.planner.planning import baseline_plan

    if options.baseline_plans is None:
        return
    for outcome in planned.outcomes:
        plan = baseline_plan(problem, outcome)
        if plan is not None:
            write_json(options.baseline_plans / f"{outcome.method}.json", plan)


def write_value(options: PlanOptions, kind: str, value: Mapping[str, object]) -> None:
    """Writes a result other than a plan as JSON, where that is asked for."""
    from llmpq.artifact import SCHEMA_VERSION, Provenance

    whole = {"schema_version": SCHEMA_VERSION, "kind": kind, **value}
    whole["provenance"] = Provenance.here().model_dump()
    emit(json.dumps(whole, indent=1), options.json_path)


def write_with_run(
    options: PlanOptions, problem: "Problem", plan: "Plan", filed: "Plan | None" = None
) -> None:
    """Writes a plan, simulates its run, shows that, and adds it to what `--json` asked for.

    `filed`: the plan as `llmpq-run` would read it, where that was made for another workload: it
    says what the runtime reserves.
    """
    from llmpq.planner.bubbles import find_bubbles
    from llmpq.planner.evaluate import to_assignment
    from llmpq.render.simulated_run import figures, write_trace
    from llmpq.render.timeline_view import print_timeline

    write_plan(replace(options, json_path=None), plan)
    run = _simulate(options, problem, to_assignment(filed or plan, problem.cluster))
    bubbles, out = find_bubbles(run), report_to(options)
    print_timeline(out, run, bubbles)
    if options.trace is not None:
        out.print(f"trace: {write_trace(options.trace, plan, run)}")
    simulated = figures(run, bubbles, plan)
    difference = simulated["closed_form_difference_percent"]
    out.print(f"simulated: {run.total_s:.2f} s; the closed form is {difference:+.2f} % off")
    values = plan.model_dump(mode="json") | {"simulated": simulated}
    emit(json.dumps(values, indent=1), options.json_path)


def _simulate(options: PlanOptions, problem: "Problem", assignment: "Assignment") -> "SimulatedRun":
    from llmpq.planner.simulated import least_jobs, simulate
    from llmpq.render.progress import progress
    from llmpq.workload import request_lengths

    every = tuple(request_lengths(problem.workload))
    problem = replace(problem, lengths=every, num_requests=None, _known={})
    count = least_jobs(problem, assignment.configuration)
    most = min(MAX_JOBS, MAX_SPANS // (2 * len(assignment.stages)))
    if count > most:
        raise UserError(
            f"simulating a run of {len(problem.lengths)} requests takes {count} jobs, and {most} "
            f"are the most; give --workload with about {most / count:.0%} of the requests"
        )
    with progress(console(options.quiet), "simulating", len(problem.lengths)) as bar:

        def show(num_ended: int) -> None:
            if bar.is_due():
                bar.update(num_ended, "requests")

        return simulate(problem, assignment, told=show)
