"""`llmpq-plan`: model + cluster + workload -> plan, report, baselines beside it. No torch.

The command line, which of its options go together, and the plan itself; `plan_modes` has what else
the command does, `plan_inputs` reads the files, `plan_output` tells and writes.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmpq.cli.common import Command, FiniteRange, common_options, console
from llmpq.cli.plan_inputs import Arguments, make_problem, read_inputs
from llmpq.cli.plan_modes import (
    compare_clusters,
    counted,
    evaluate_plan,
    quick_replan,
    show_flexgen,
    show_frontier,
    write_with_run,
)
from llmpq.cli.plan_output import report, write_baselines, write_plan
from llmpq.cli.progress import progress
from llmpq.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from llmpq.cli.progress import Progress as ProgressBar
    from llmpq.plan_data import Plan
    from llmpq.planner.planning import Options
    from llmpq.planner.problem import Problem
    from llmpq.planner.search import Progress
    from llmpq.planner.what_if import WhatIf

PATH = click.Path(path_type=Path)
METHODS = ("auto", "ilp", "heuristic", "adabits", "pipeedge", "uniform", "flexgen")
TENSOR_PARALLEL = ("off", "auto")
WHAT_IF_S = 2.0  # at most, for what would change a plan


@click.command(cls=Command, name="plan", context_settings={"show_default": True})
@click.option("--model", help="Hugging Face id, directory or config.json [default: tiny-tales]")
@click.option("--cluster", type=PATH, help="cluster.yaml: nodes, devices, links")
@click.option("--workload", type=PATH, help="workload.yaml: lengths and number of requests")
@click.option("--profiles", type=PATH, help="Folder of profiles; without: spec sheets")
@click.option("--sensitivity", type=PATH, help="sensitivity.json; without: a built-in prior")
@click.option(
    "--max-quality-loss",
    type=FiniteRange(min=0),
    help="Percent that perplexity may rise [default: 1.0]",
)
@click.option(
    "--theta",
    type=FiniteRange(min=0),
    help="Instead of a budget: seconds that one unit of summed sensitivity is worth",
)
@click.option("--precisions", help="Allowed, as in 16,8,4,3 [default: all that have times]")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="auto",
    help="auto: the search that proves; ilp: it too, by the plain programme, for reference",
)
@click.option("--solver", type=click.Choice(["highs", "gurobi"]), default="highs")
@click.option(
    "--tensor-parallel",
    default="off",
    metavar="[off|auto|N]",
    help="Stages of several devices of a node, at most N; not yet measured on cards",
)
@click.option(
    "--frontier", is_flag=True, help="Throughput against quality loss, as a table and a PNG"
)
@click.option(
    "--compare-clusters",
    is_flag=True,
    help="Plan for each of the cluster files that follow: which one to buy",
)
@click.option(
    "--gap",
    type=FiniteRange(0, 1, max_open=True),
    default=0.005,
    help="End when no plan can be better by more than this share",
)
@click.option(
    "--time-limit",
    type=FiniteRange(min=0, min_open=True),
    default=60.0,
    help="Seconds; the best plan so far is kept",
)
@click.option("--compare/--no-compare", default=True, help="Show the baselines")
@click.option("--what-if/--no-what-if", default=True, help="Show what would change the plan")
@click.option("--evaluate", type=PATH, help="Price this plan.json instead of making one")
@click.option("--trace", type=PATH, help="Simulate the plan's run; write it for chrome://tracing")
@click.option("-o", "--output", type=PATH, help="Write the plan here")
@click.option("--baseline-plans", type=PATH, help="Write each baseline's plan into this folder")
@click.argument("clusters", nargs=-1, type=PATH)
@common_options
def main(trace: Path | None, **options: object) -> None:
    """Chooses devices' order, layers, precisions and micro-batches for a batch job.

    Prints the plan with its predicted speed, memory and quality, what other methods would do and
    what would make it faster. CLUSTERS: cluster files for --compare-clusters.
    """
    arguments = Arguments(**options)  # type: ignore[arg-type]
    _check(arguments, trace)
    if arguments.evaluate is not None:
        evaluate_plan(arguments, arguments.evaluate, trace)
    elif arguments.compare_clusters:
        compare_clusters(arguments)
    elif arguments.frontier:
        show_frontier(arguments)
    elif arguments.method == "flexgen":
        show_flexgen(arguments)
    else:
        _plan(arguments, trace)


def _check(arguments: Arguments, trace: Path | None) -> None:
    faults = _trace_faults(arguments, trace) if trace is not None else []
    if arguments.theta is not None and arguments.max_quality_loss is not None:
        faults.append("give --max-quality-loss or --theta, not both")
    faults += _mode_faults(arguments)
    if arguments.evaluate is None:
        faults += [
            f"--{name} is missing: give its YAML file"
            for name in ("cluster", "workload")
            if getattr(arguments, name) is None
            and not (name == "cluster" and arguments.compare_clusters)
        ]
    if faults:
        raise UserError("\n".join(faults))
    _check_files(arguments, trace)


def _trace_faults(arguments: Arguments, trace: Path) -> list[str]:
    """A trace is of one plan, and a file of its own."""
    modes = {
        "--frontier": arguments.frontier,
        "--compare-clusters": arguments.compare_clusters,
        "--method flexgen": arguments.method == "flexgen" and arguments.evaluate is None,
    }
    faults = [f"--trace shows one plan's run; leave out {name}" for name, on in modes.items() if on]
    return faults


def _check_files(arguments: Arguments, trace: Path | None) -> None:
    """No file is written that is read, or written as another one."""
    from llmpq.cli.paths import (
        Named,
        check_files,
        model_files,
        profile_files,
        trace_files,
    )

    output, folder = arguments.output, arguments.baseline_plans
    picture = output.with_suffix(".frontier.png") if output and arguments.frontier else None
    writes: list[Named] = [
        ("-o", output),
        ("--json", arguments.json_path),
        ("--trace", trace),
        ("the picture of --frontier", picture),
    ]
    if folder is not None:
        plans = [folder / f"{method}.json" for method in METHODS]
        writes += [("a plan of --baseline-plans", path) for path in plans]
    reads: list[Named] = [
        ("--cluster", arguments.cluster),
        ("--workload", arguments.workload),
        ("--sensitivity", arguments.sensitivity),
        ("--evaluate", arguments.evaluate),
        *(("a cluster file", path) for path in arguments.clusters),
        *model_files(arguments.model),
        *trace_files(arguments.workload),
        *profile_files(arguments.profiles, writes),
    ]
    check_files(reads, writes)


def _mode_faults(arguments: Arguments) -> list[str]:
    """What does not go together."""
    modes = {
        "--evaluate": arguments.evaluate is not None,
        "--frontier": arguments.frontier,
        "--compare-clusters": arguments.compare_clusters,
    }
    chosen = [name for name, on in modes.items() if on]
    faults = [f"give only one of {', '.join(chosen)}"] if len(chosen) > 1 else []
    others = arguments.frontier or arguments.compare_clusters
    if others and arguments.method not in ("auto", "flexgen"):
        faults.append(f"{chosen[0]} plans by --method auto; leave out --method {arguments.method}")
    if arguments.compare_clusters and arguments.output is not None:
        faults.append("--compare-clusters writes no plan; leave out -o (--json writes the table)")
    if arguments.baseline_plans is not None and not arguments.compare:
        faults.append("--baseline-plans needs the other methods; leave out --no-compare")
    if arguments.compare_clusters and len(arguments.clusters) < 2:
        faults.append("--compare-clusters needs two cluster files or more: A.yaml B.yaml")
    if arguments.clusters and not arguments.compare_clusters:
        names = " ".join(map(str, arguments.clusters))
        faults.append(f"unexpected {names}; cluster files follow --compare-clusters or --cluster")
    if arguments.frontier and arguments.theta is not None:
        faults.append("--frontier plans for each quality loss; leave out --theta")
    if arguments.method == "flexgen" and arguments.output is not None:
        faults.append("--method flexgen has no plan file, as llmpq-run cannot run it; leave out -o")
    degree = arguments.tensor_parallel
    if degree not in TENSOR_PARALLEL and not (
        degree.isascii() and degree.isdecimal() and int(degree) > 0
    ):
        faults.append(f"--tensor-parallel {degree}: expected off, auto or a number such as 4")
    return faults


def _plan(arguments: Arguments, trace: Path | None) -> None:
    from llmpq.planner.planning import make_plan

    out = console(arguments.quiet)
    problem, offered, notes = make_problem(arguments, read_inputs(arguments, None))
    with progress(out, "planning", 1) as bar:
        planned = make_plan(problem, _options(arguments, _shown(bar)), offered)
    if trace is None:
        write_plan(arguments, planned.plan)
    write_baselines(arguments, problem, planned)
    what_if = _what_if(arguments, out, problem, planned.plan)
    report(out, arguments, problem, planned, notes, what_if)
    if trace is not None:
        write_with_run(arguments, problem, planned.plan, trace)


def _options(arguments: Arguments, shown: "Callable[[Progress], None]") -> "Options":
    from llmpq.planner.planning import Options

    return Options(
        method=arguments.method,
        gap=arguments.gap,
        time_limit_s=arguments.time_limit,
        compare=arguments.compare,
        solver=arguments.solver,
        progress=shown,
    )


def _what_if(arguments: Arguments, out: "Console", problem: "Problem", plan: "Plan") -> "WhatIf":
    from llmpq.planner.what_if import WhatIf, changes, what_if

    if not arguments.what_if or arguments.quiet or arguments.method not in ("auto", "ilp"):
        return WhatIf()
    with progress(out, "what would change it", len(list(changes(problem, plan)))) as bar:
        deadline = time.monotonic() + min(WHAT_IF_S, arguments.time_limit)
        replan = counted(bar, quick_replan(arguments, like=plan))
        return what_if(problem, plan, replan, deadline)


def _shown(bar: "ProgressBar") -> "Callable[[Progress], None]":
    """Tells `bar` how far a phase of the search is."""

    def show(progress: "Progress") -> None:
        best = progress.best_tokens_per_s
        detail = f"{progress.phase}, best {best:.1f} tokens/s" if best else progress.phase
        bar.update(progress.done, detail, progress.total)

    return show


if __name__ == "__main__":
    main()
