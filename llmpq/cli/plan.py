"""`llmpq-plan`: model + cluster + workload -> a plan, its report, and the baselines. No torch."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from llmpq.cli.common import console
from llmpq.cli.options import command
from llmpq.cli.plan_modes import (
    compare_clusters,
    counted,
    evaluate_plan,
    quick_replan,
    show_flexgen,
    show_frontier,
)
from llmpq.cli.plan_options import PlanOptions, check_options, pose
from llmpq.cli.plan_output import show_plan, write_baselines, write_plan, write_with_run

if TYPE_CHECKING:
    from llmpq.plan_data import Plan
    from llmpq.planner.problem import Problem
    from llmpq.planner.search import Progress
    from llmpq.planner.what_if import WhatIf
    from llmpq.render.progress import ProgressBar

WHAT_IF_S = 1.0  # at most, for what would change a plan


@command(PlanOptions, "plan")
def main(options: PlanOptions) -> None:
    """Choose devices' order, layers, precisions and micro-batches for a batch job.

    Prints the plan with its predicted speed, memory and quality, what the baselines would reach
    and what would make it faster. CLUSTERS: cluster files for --compare-clusters.
    """
    check_options(options)
    if options.evaluate is not None:
        evaluate_plan(options, options.evaluate)
    elif options.compare_clusters:
        compare_clusters(options)
    elif options.frontier:
        show_frontier(options)
    elif options.method == "flexgen":
        show_flexgen(options)
    else:
        _plan(options)


def _plan(options: PlanOptions) -> None:
    from llmpq.planner.planning import Options, make_plan
    from llmpq.planner.vllm_target import for_vllm
    from llmpq.render.progress import progress

    problem, offered, notes = pose(options)
    with progress(console(options.quiet), "planning", 1) as bar:
        search = Options(
            method=options.method,
            gap=options.gap,
            time_limit_s=options.time_limit,
            compare=options.compare,
            solver=options.solver,
            progress=_shown(bar),
        )
        planned = make_plan(problem, search, offered)
    if options.target == "vllm":
        plan, more = for_vllm(planned.plan)
        planned = replace(planned, plan=plan, notes=(*planned.notes, *more))
    if options.trace is None:
        write_plan(options, planned.plan)
    write_baselines(options, problem, planned)
    show_plan(options, problem, planned, notes, _what_if(options, problem, planned.plan))
    if options.trace is not None:
        write_with_run(options, problem, planned.plan)


def _what_if(options: PlanOptions, problem: "Problem", plan: "Plan") -> "WhatIf | None":
    from llmpq.planner.what_if import changes, what_if
    from llmpq.render.progress import progress

    if not options.what_if or options.quiet or options.method not in ("auto", "ilp"):
        return None
    num_changes = len(list(changes(problem, plan)))
    with progress(console(), "what would change it", num_changes) as bar:
        deadline = time.monotonic() + min(WHAT_IF_S, options.time_limit)
        return what_if(problem, plan, counted(bar, quick_replan(options, like=plan)), deadline)


def _shown(bar: "ProgressBar") -> "Callable[[Progress], None]":
    """Shows on `bar` how far a phase of the search is."""

    def show(progress: "Progress") -> None:
        best = progress.best_tokens_per_s
        detail = f"{progress.phase}, best {best:.1f} tokens/s" if best else progress.phase
        bar.update(progress.done, detail, progress.total)

    return show


if __name__ == "__main__":
    main()
