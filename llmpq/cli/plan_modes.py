"""What `llmpq-plan` does besides making one plan; a function for each.

`show_frontier`: speed against quality. `compare_clusters`: which cluster to buy. `show_flexgen`:
offloading to the host. `evaluate_plan`: what a plan file's run would be like, and whether it fits.
`quick_replan` makes the planner of changed problems that the first two ask many times.

Heavy modules are imported inside functions, so that `--help` is quick. Not covered: which options
go together (`plan_options`).
"""

import itertools
import re
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmpq.cli.common import console
from llmpq.cli.plan_options import PlanOptions, pose
from llmpq.cli.plan_output import (
    report_to,
    show_notes,
    show_plan,
    write_plan,
    write_value,
    write_with_run,
)
from llmpq.errors import InfeasibleError, UserError

if TYPE_CHECKING:
    from llmpq.plan_data import Plan
    from llmpq.planner.frontier import Point
    from llmpq.planner.problem import Problem
    from llmpq.render.progress import ProgressBar

REPLAN_GAP = 0.02
REPLAN_S = 2.0  # at most, for one plan of a changed problem
FRONTIER_S = 5.0  # likewise, for one point


def quick_replan(
    options: PlanOptions, limit: float = REPLAN_S, like: "Plan | None" = None
) -> "Callable[[Problem], Plan]":
    """Plans a changed problem quickly: within `limit` seconds, from the plan `like`."""
    from llmpq.planner.planning import Options, replan

    search = Options(
        gap=max(options.gap, REPLAN_GAP) if like else options.gap,
        time_limit_s=min(limit, options.time_limit),
        compare=False,
        simulate=like is None,
        near=like is not None,
        solver=options.solver,
    )
    return lambda problem: replan(problem, search, like)


def counted(bar: "ProgressBar", replan: "Callable[[Problem], Plan]") -> "Callable[[Problem], Plan]":
    """`replan` that shows on `bar` how many plans were made."""
    made = itertools.count(1)

    def again(problem: "Problem") -> "Plan":
        bar.update(next(made), "plans")
        return replan(problem)

    return again


def show_flexgen(options: PlanOptions) -> None:
    """Reports offloading to the host; raises `InfeasibleError` where it has no plan."""
    from llmpq.planner.flexgen import flexgen
    from llmpq.render.plan_report import print_offload

    problem, _, notes = pose(options)
    found = flexgen(problem)
    if found is None or not found.feasible:
        why = found.why_not if found else "no precision keeps the quality budget"
        raise InfeasibleError(f"flexgen has no plan that fits: {why}")
    print_offload(report_to(options), found, [])
    show_notes(options, notes)
    write_value(options, "offload", asdict(found))


def show_frontier(options: PlanOptions) -> None:
    """Shows the plan at each budget as a table, and as a picture beside the output file."""
    from llmpq.planner.frontier import NUM_BUDGETS, frontier
    from llmpq.render.frontier_view import print_frontier, save_frontier
    from llmpq.render.progress import progress

    out = report_to(options)
    problem, offered, notes = pose(options)
    with progress(console(options.quiet), "planning for each quality loss", NUM_BUDGETS) as bar:
        points = frontier(problem, counted(bar, quick_replan(options, FRONTIER_S)), None)
    if not any(point.plan for point in points):
        from llmpq.planner.fixes import infeasible

        raise infeasible(problem, offered, quick_replan(options))
    print_frontier(out, points)
    show_notes(options, [*notes, f"quality: {problem.quality.source}"])
    write_value(options, "frontier", {"points": [_frontier_row(point) for point in points]})
    name = re.sub(r"[^\w-]+", "-", problem.cluster.name)  # which may hold slashes and dots
    stem = options.output or Path(f"{name}.json")
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


def compare_clusters(options: PlanOptions) -> None:
    """Shows a row for each cluster; raises `InfeasibleError` where the model fits none of them."""
    from llmpq.render.plan_report import print_comparison
    from llmpq.render.progress import progress

    posed, faults = [], []
    for path in options.clusters:
        try:
            posed.append(pose(replace(options, cluster=path)))
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    rows = []
    with progress(console(options.quiet), "planning", len(posed)) as bar:
        for number, (problem, _, _) in enumerate(posed):
            rows.append(_cluster_row(options, problem))
            bar.update(number + 1, problem.cluster.name)
    print_comparison(report_to(options), rows)
    show_notes(options, list(dict.fromkeys(note for _, _, notes in posed for note in notes)))
    write_value(options, "comparison", {"clusters": [_cluster_values(*row) for row in rows]})
    if all(isinstance(plan, str) for _, plan, _ in rows):
        reasons = [f"{name}: {str(plan).splitlines()[0]}" for name, plan, _ in rows]
        raise InfeasibleError("\n".join(["the model fits none of these clusters", *reasons]))


def _cluster_row(
    options: PlanOptions, problem: "Problem"
) -> "tuple[str, Plan | str, float | None]":
    price = problem.cluster.price_per_hour()
    try:
        plan = quick_replan(options, options.time_limit)(problem)
    except InfeasibleError:
        from llmpq.planner.explain import why

        return problem.cluster.name, why(problem), price
    return problem.cluster.name, plan, price


def _cluster_values(name: str, plan: "Plan | str", price: float | None) -> dict[str, object]:
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


def evaluate_plan(options: PlanOptions, path: Path) -> None:
    """Reports a plan file at these costs; raises `InfeasibleError` where it does not fit.

    With a trace to write, or verbose, its run is simulated too.
    """
    from llmpq.plan_data import load_plan
    from llmpq.planner.evaluate import shortages, to_assignment
    from llmpq.planner.planning import Planned
    from llmpq.planner.price import misfits, price, with_planning_s

    start = time.monotonic()
    filed = load_plan(path)
    problem, _, notes = pose(options, filed)
    if faults := misfits(problem, filed):
        raise UserError("\n".join(f"{path}: {fault}" for fault in faults))
    priced = with_planning_s(price(problem, filed), time.monotonic() - start)
    show_plan(options, problem, Planned(priced), notes)
    if options.trace is not None or options.verbose:
        write_with_run(options, problem, priced, filed)
    else:
        write_plan(options, priced)
    _refuse_short(priced, shortages(problem, to_assignment(priced, problem.cluster)))


def _refuse_short(plan: "Plan", short: dict[int, int]) -> None:
    from llmpq.planner.baselines import amount

    lines = [
        f"the plan does not fit: {plan.stages[rank].devices[0]}#{rank} on {plan.stages[rank].node} "
        f"is {amount(num_bytes)} short"
        for rank, num_bytes in short.items()
    ]
    if lines:
        raise InfeasibleError("\n".join(lines))
