"""What `llmpq-plan` tells and writes: the report, plan files, JSON for programs.

People read standard error; `--json -` has standard output to itself. Nothing is computed here.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmpq.cli.common import emit
from llmpq.cli.plan_inputs import Arguments, max_loss

if TYPE_CHECKING:
    from rich.console import Console

    from llmpq.plan_data import Plan
    from llmpq.planner.planning import Planned
    from llmpq.planner.problem import Problem
    from llmpq.planner.what_if import WhatIf


def report(
    out: "Console",
    arguments: Arguments,
    problem: "Problem",
    planned: "Planned",
    notes: Sequence[str],
    what_if: "WhatIf",
) -> None:
    """For people: the plan, what other methods would do, what would change it."""
    from llmpq.planner.report import print_changes, print_outcomes, print_report

    notes = [*notes, *planned.notes, *_warnings(arguments, problem, planned.plan)]
    if arguments.verbose and planned.effort:
        notes.append(planned.effort)
    print_report(out, planned.plan, problem.quality.source, notes, _limits(arguments))
    if arguments.compare and planned.outcomes:
        print_outcomes(out, planned.plan, planned.outcomes)
    if what_if.changes or what_if.num_left_out:
        print_changes(out, planned.plan, what_if)
    _print_launch(out, arguments, planned.plan)


def _print_launch(out: "Console", arguments: Arguments, plan: "Plan") -> None:
    """How to run it, in lines that can be copied."""
    from llmpq.launch import launch_lines

    path = str(arguments.output or "PLAN.json")
    files = ["--plan", path, "--prompts", "PROMPTS.jsonl", "--output", "OUT.jsonl"]
    for line in launch_lines(plan, files):
        out.print(line, soft_wrap=True)


def _warnings(arguments: Arguments, problem: "Problem", plan: "Plan") -> list[str]:
    """What a plan asks of its reader."""
    from llmpq.costs.float16 import planned_overflow
    from llmpq.planner.accuracy import assumed_calls, warnings
    from llmpq.planner.evaluate import to_assignment
    from llmpq.planner.problem import OVER

    assignment = to_assignment(plan, problem.cluster)
    found = warnings(problem, assignment) + assumed_calls(problem, assignment)
    found += filter(None, [planned_overflow(plan)])
    if any(stage.tensor_parallel > 1 for stage in plan.stages):
        found.append(
            "this plan has stages of several devices, which llmpq-run cannot run yet (for one that "
            "it can run: --tensor-parallel off)"
        )
    if plan.predicted and plan.predicted.sum_sensitivity > problem.budget * OVER:
        found.append(f"this plan loses more than the {_limits(arguments)} allows")
    return found


def _limits(arguments: Arguments) -> str:
    if arguments.theta is not None:
        return f"theta {arguments.theta:g} s for one unit of summed sensitivity"
    default = " (default)" if arguments.max_quality_loss is None else ""
    return f"budget {max_loss(arguments):g} %{default}"


def write_plan(arguments: Arguments, plan: "Plan") -> None:
    """The plan file, and the same as JSON where that is asked for."""
    from llmpq.artifact import write_json

    if arguments.output is not None:
        write_json(arguments.output, plan)
    emit(plan.model_dump_json(indent=1), arguments.json_path)


def write_baselines(arguments: Arguments, problem: "Problem", planned: "Planned") -> None:
    """A plan file for each other method that has a plan, where a folder is given."""
    from llmpq.artifact import write_json
    from llmpq.planner.planning import baseline_plan

    if arguments.baseline_plans is None:
        return
    for outcome in planned.outcomes:
        plan = baseline_plan(problem, outcome)
        if plan is not None:
            write_json(arguments.baseline_plans / f"{outcome.method}.json", plan)


def write_value(arguments: Arguments, kind: str, value: dict[str, object]) -> None:
    """What is no plan, as JSON where that is asked for."""
    from llmpq.artifact import SCHEMA_VERSION, Provenance

    whole = {"schema_version": SCHEMA_VERSION, "kind": kind} | value
    whole["provenance"] = Provenance.here().model_dump()
    emit(json.dumps(whole, indent=1), arguments.json_path)
