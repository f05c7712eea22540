"""What `llmpq-plan` does beside making one plan; a function for each.

`show_frontier`: speed against quality. `compare_clusters`: which cluster to buy. `show_flexgen`:
off-loading to the host. `evaluate_plan`: the price of a plan file, and whether it fits.
`write_with_run`: a plan, and how its run would go.
`quick_replan` makes the planner of changed problems that the first two ask many times.

Heavy modules are imported inside functions, so that `--help` is quick. Not covered: which options
go together, which `plan` has checked before.
"""

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmpq.cli.common import console, emit
from llmpq.cli.plan_inputs import Arguments, make_problem, read_inputs
from llmpq.cli.plan_output import report, write_plan, write_value
from llmpq.cli.progress import progress
from llmpq.errors import InfeasibleError, UserError

if TYPE_CHECKING:
    from llmpq.cli.progress import Progress as ProgressBar
    from llmpq.plan_data import Plan
    from llmpq.planner.frontier import Point
    from llmpq.planner.problem import Problem

REPLAN_GAP = 0.02
REPLAN_S = 2.0  # at most, for one plan of a changed problem


def quick_replan(
    arguments: Arguments, limit: float = REPLAN_S, like: "Plan | None" = None
) -> "Callable[[Problem], Plan]":
    """Plans a changed problem, quickly: within `limit` seconds, from the plan `like`."""
    from llmpq.planner.planning import Options, replan

    time_limit = min(limit, arguments.time_limit)
    gap = max(arguments.gap, REPLAN_GAP) if like else arguments.gap
    options = Options(
        gap=gap,
        time_limit_s=time_limit,
        compare=False,
        simulate=like is None,
        near=like is not None,
        solver=arguments.solver,
    )
    return lambda problem: replan(problem, options, like)


def counted(bar: "ProgressBar", replan: "Callable[[Problem], Plan]") -> "Callable[[Problem], Plan]":
    """`replan` that tells `bar` how many plans were made."""
    made = itertools.count(1)

    def again(problem: "Problem") -> "Plan":
        bar.update(next(made), "plans")
        return replan(problem)

    return again


def show_flexgen(arguments: Arguments) -> None:
    """Off-loading to the host as a report; `InfeasibleError` where it has no plan."""
    from llmpq.planner.offload import flexgen
    from llmpq.planner.report import print_offload

    problem, _, notes = make_problem(arguments, read_inputs(arguments, None))
    found = flexgen(problem)
    if found is None or not found.feasible:
        why = found.why_not if found else "no precision keeps the quality budget"
        raise InfeasibleError(f"flexgen has no plan that fits: {why}")
    print_offload(console(arguments.quiet), found, notes)
    write_value(arguments, "offload", asdict(found))


def show_frontier(arguments: Arguments) -> None:
    """A table, and a picture beside the output file, of the plan at each budget."""
    from llmpq.cli.plan_frontier import print_frontier, save_frontier
    from llmpq.planner.frontier import NUM_BUDGETS, frontier
    from llmpq.planner.report import print_notes

    out = console(arguments.quiet)
    problem, offered, notes = make_problem(arguments, read_inputs(arguments, None))
    with progress(out, "planning for each quality loss", NUM_BUDGETS) as bar:
        points = frontier(problem, counted(bar, quick_replan(arguments, 5.0)), None)
    if not any(point.plan for point in points):
        from llmpq.planner.fixes import infeasible

        raise infeasible(problem, offered, quick_replan(arguments))
    print_frontier(out, points)
    print_notes(out, [*notes, f"quality: {problem.quality.source}"])
    write_value(arguments, "frontier", {"points": [_frontier_row(point) for point in points]})
    stem = arguments.output or Path(f"{problem.cluster.name}.json")
    picture = stem.with_suffix(".frontier.png")
    title = f"{problem.spec.name} on {problem.cluster.name}, {problem.workload.name}"
    save_frontier(picture, points, title)
    out.print(f"picture: {picture}")


def _frontier_row(point: "Point") -> dict[str, object]:
    predicted = point.plan.predicted if point.plan else None
    return {
        "max_quality_loss_percent": point.max_loss_percent,
        "quality_loss_percent": predicted.quality_loss_percent if predicted else None,
        "tokens_per_s": predicted.tokens_per_s if predicted else None,
        "gap": predicted.gap if predicted else None,
    }


def compare_clusters(arguments: Arguments) -> None:
    """A row for each cluster file; `InfeasibleError` where none of them fits the model."""
    from llmpq.planner.report import print_comparison, print_notes

    out = console(arguments.quiet)
    faults: list[str] = []
    found = [_rig(replace(arguments, cluster=path), faults) for path in arguments.clusters]
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    rigs = [rig for rig in found if rig is not None]
    rows = []
    with progress(out, "planning", len(rigs)) as bar:
        for number, (problem, _) in enumerate(rigs):
            rows.append(_rig_row(arguments, problem))
            bar.update(number + 1, problem.cluster.name)
    print_comparison(out, rows)
    print_notes(out, list(dict.fromkeys(note for _, notes in rigs for note in notes)))
    write_value(arguments, "comparison", {"clusters": [_rig_values(*row) for row in rows]})
    if all(isinstance(plan, str) for _, plan, _ in rows):
        reasons = [f"{name}: {str(plan).splitlines()[0]}" for name, plan, _ in rows]
        raise InfeasibleError("\n".join(["no cluster of these fits the model", *reasons]))


def _rig(arguments: Arguments, faults: list[str]) -> "tuple[Problem, list[str]] | None":
    try:
        problem, _, notes = make_problem(arguments, read_inputs(arguments, None))
        return problem, notes
    except UserError as error:
        faults.append(str(error))
        return None


def _rig_row(arguments: Arguments, problem: "Problem") -> "tuple[str, Plan | str, float | None]":
    price = problem.cluster.price_per_hour()
    try:
        plan = quick_replan(arguments, arguments.time_limit)(problem)
    except InfeasibleError:
        from llmpq.planner.explain import why

        return problem.cluster.name, why(problem), price
    return problem.cluster.name, plan, price


def _rig_values(name: str, plan: "Plan | str", price: float | None) -> dict[str, object]:
    predicted = None if isinstance(plan, str) else plan.predicted
    speed = predicted.tokens_per_s if predicted else None
    return {
        "cluster": name,
        "feasible": predicted is not None,
        "tokens_per_s": speed,
        "quality_loss_percent": predicted.quality_loss_percent if predicted else None,
        "gap": predicted.gap if predicted else None,
        "price_per_hour": price,
        "tokens_per_price": 3600 * speed / price if speed and price else None,
        "why_not": plan if isinstance(plan, str) else None,
    }


def evaluate_plan(arguments: Arguments, path: Path, trace: Path | None = None) -> None:
    """The report of a plan file at these costs; `InfeasibleError` where it does not fit.

    With a `trace` to write, or verbose, its run is simulated too.
    """
    from llmpq.plan_data import load_plan
    from llmpq.planner.evaluate import shortages, to_assignment
    from llmpq.planner.planning import Planned
    from llmpq.planner.price import misfits, price, with_planning_s
    from llmpq.planner.what_if import WhatIf

    start = time.monotonic()
    filed = load_plan(path)
    problem, _, notes = make_problem(arguments, read_inputs(arguments, filed), filed)
    if faults := misfits(problem, filed):
        raise UserError("\n".join(f"{path}: {fault}" for fault in faults))
    priced = price(problem, filed)
    priced = with_planning_s(priced, time.monotonic() - start)
    report(console(arguments.quiet), arguments, problem, Planned(priced), notes, WhatIf())
    if trace is not None or arguments.verbose:
        write_with_run(arguments, problem, priced, trace, filed)
    else:
        write_plan(arguments, priced)
    _raise_shortages(priced, shortages(problem, to_assignment(priced, problem.cluster)))


def write_with_run(
    arguments: Arguments,
    problem: "Problem",
    plan: "Plan",
    trace: Path | None,
    filed: "Plan | None" = None,
) -> None:
    """Writes a plan; simulates its run, shows it, and adds it to what `--json` asked for.

    `filed`: the plan as `llmpq-run` would read it, where that was made for another workload.
    """
    from llmpq.cli.plan_trace import show_run

    write_plan(replace(arguments, json_path=None), plan)
    simulated = show_run(arguments, problem, plan, trace, filed or plan)
    values = plan.model_dump(mode="json") | {"simulated": simulated}
    emit(json.dumps(values, indent=1), arguments.json_path)


def _raise_shortages(plan: "Plan", short: dict[int, int]) -> None:
    from llmpq.planner.baselines import amount

    lines = [
        f"the plan does not fit: {plan.stages[rank].devices[0]}#{rank} on {plan.stages[rank].node} "
        f"is {amount(num_bytes)} short"
        for rank, num_bytes in short.items()
    ]
    if lines:
        raise InfeasibleError("\n".join(lines))
