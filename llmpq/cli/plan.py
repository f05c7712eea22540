"""`llmpq-plan`: model + cluster + workload -> plan, report, baselines beside it. No torch."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llmpq.cli.common import Command, common_options, console
from llmpq.cli.progress import progress
from llmpq.errors import InfeasibleError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from llmpq.cli.progress import Progress as ProgressBar
    from llmpq.cluster import Cluster
    from llmpq.costs.latency import LayerTimes
    from llmpq.costs.quality import QualityModel
    from llmpq.model_spec import ModelSpec
    from llmpq.plan import Plan
    from llmpq.planner.planning import Planned
    from llmpq.planner.problem import Problem
    from llmpq.planner.search import Progress
    from llmpq.profile_data import Profile
    from llmpq.workload import Workload

T = TypeVar("T")
PATH = click.Path(path_type=Path)
METHODS = ("auto", "ilp", "adabits", "pipeedge", "uniform")
METHODS_TO_COME = ("heuristic", "flexgen")


class FiniteRange(click.FloatRange):
    """A range of numbers without infinity and NaN."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return float(number)


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    model: str | None
    cluster: Path | None
    workload: Path | None
    profiles: Path | None
    sensitivity: Path | None
    max_quality_loss: float | None
    theta: float | None
    precisions: str | None
    method: str
    solver: str
    frontier: bool
    gap: float
    time_limit: float
    compare: bool
    evaluate: Path | None
    output: Path | None
    baseline_plans: Path | None
    json_path: Path | None
    verbose: bool
    quiet: bool


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
    type=click.Choice([*METHODS, *METHODS_TO_COME]),
    metavar=f"[{'|'.join(METHODS)}]",
    default="auto",
    help="auto: ilp",
)
@click.option("--solver", type=click.Choice(["highs", "gurobi"]), default="highs")
@click.option("--frontier", is_flag=True, hidden=True)  # to come
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
@click.option("--evaluate", type=PATH, help="Price this plan.json instead of making one")
@click.option("-o", "--output", type=PATH, help="Write the plan here")
@click.option("--baseline-plans", type=PATH, help="Write each baseline's plan into this folder")
@common_options
def main(**options: object) -> None:
    """Chooses devices' order, layers, precisions and micro-batches for a batch job.

    Prints the plan with its predicted speed, memory and quality, and what other methods would do.
    """
    arguments = Arguments(**options)  # type: ignore[arg-type]
    _check(arguments)
    if arguments.evaluate is not None:
        _evaluate(arguments, arguments.evaluate)
    else:
        _plan(arguments)


def _check(arguments: Arguments) -> None:
    faults = []
    if arguments.theta is not None and arguments.max_quality_loss is not None:
        faults.append("give --max-quality-loss or --theta, not both")
    if arguments.solver == "gurobi":
        faults.append("--solver gurobi is not there yet; leave it out to use HiGHS")
    if arguments.frontier:
        faults.append("--frontier is not there yet; plan once for each --max-quality-loss")
    if arguments.method in METHODS_TO_COME:
        known = ", ".join(METHODS)
        faults.append(f"--method {arguments.method} is not there yet; there are {known}")
    if arguments.evaluate is None:
        faults += [
            f"--{name} is missing: give its YAML file"
            for name in ("cluster", "workload")
            if getattr(arguments, name) is None
        ]
    if faults:
        raise UserError("\n".join(faults))


def _plan(arguments: Arguments) -> None:
    from llmpq.planner.planning import Options, make_plan

    out = console(arguments.quiet)
    inputs = _read(arguments, None)
    problem, offered, notes = _problem(arguments, inputs)
    method = "ilp" if arguments.method == "auto" else arguments.method
    with progress(out, "planning", 1) as bar:
        options = Options(method, arguments.gap, arguments.time_limit, _shown(bar))
        planned = make_plan(problem, options, offered)
    _report(out, arguments, problem, planned, notes)
    _write(arguments, planned.plan)
    _write_baselines(arguments, problem, planned)


def _evaluate(arguments: Arguments, path: Path) -> None:
    from llmpq.plan import load_plan
    from llmpq.planner.evaluate import evaluate, shortages, to_assignment
    from llmpq.planner.planning import Planned

    start = time.monotonic()
    plan = load_plan(path)
    problem, _, notes = _problem(arguments, _read(arguments, plan), plan)
    _check_evaluable(problem, plan, path)
    assignment = to_assignment(plan, problem.cluster)
    predicted = evaluate(problem, assignment)
    predicted = predicted.model_copy(update={"planning_s": time.monotonic() - start})
    priced = plan.model_copy(
        update={
            "predicted": predicted,
            "baselines": [],
            "cluster": problem.cluster,
            "workload": problem.workload,
        }
    )
    _report(console(arguments.quiet), arguments, problem, Planned(priced), notes)
    _write(arguments, priced)
    _raise_shortages(plan, shortages(problem, assignment))


def _check_evaluable(problem: "Problem", plan: "Plan", path: Path) -> None:
    faults = []
    if problem.spec.num_layers != plan.model.num_layers:
        layers = f"{plan.model.num_layers} layers, {problem.spec.name} {problem.spec.num_layers}"
        faults.append(f"{path}: the plan has {layers}")
    free = [(device.node, device.type) for device in problem.cluster.devices()]
    for stage in plan.stages:
        device = stage.devices[0]
        if (stage.node, device) not in free:
            faults.append(f"{path}: stage {stage.rank}: the cluster has no (more) {device}")
            continue
        free.remove((stage.node, device))
        missing = set(stage.precisions) - set(problem.times[device].precisions)
        if missing:
            faults.append(f"{path}: no times of {device} at {', '.join(sorted(missing))} bits")
    if faults:
        raise UserError("\n".join(faults))


def _raise_shortages(plan: "Plan", short: dict[int, int]) -> None:
    from llmpq.planner.baselines import amount

    lines = [
        f"the plan does not fit: {plan.stages[rank].devices[0]}#{rank} on {plan.stages[rank].node} "
        f"is {amount(num_bytes)} short"
        for rank, num_bytes in short.items()
    ]
    if lines:
        raise InfeasibleError("\n".join(lines))


# ---- reading


@dataclass(frozen=True)
class Inputs:
    """What the files hold."""

    spec: "ModelSpec"
    cluster: "Cluster"
    workload: "Workload"
    lengths: tuple[tuple[int, int], ...]
    profiles: "list[Profile]"
    quality: "QualityModel"


def _read(arguments: Arguments, plan: "Plan | None") -> Inputs:
    """All files, their faults in one `UserError`. A plan stands for what is not given."""
    from llmpq.cluster import load_cluster
    from llmpq.model_spec import DEFAULT_MODEL, load_model_spec
    from llmpq.profile_data import load_profiles
    from llmpq.workload import load_workload, request_lengths

    faults: list[str] = []

    def attempt(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except UserError as error:
            faults.append(str(error))
            return None

    def given(path: Path | None, load: Callable[[Path], T], other: T | None) -> T | None:
        return attempt(lambda: load(path)) if path is not None else other

    model = arguments.model or DEFAULT_MODEL
    in_plan = plan.model if plan is not None and arguments.model is None else None
    spec = in_plan or attempt(lambda: load_model_spec(model))
    cluster = given(arguments.cluster, load_cluster, plan.cluster if plan else None)
    workload = given(arguments.workload, load_workload, plan.workload if plan else None)
    none: list[Profile] = []
    profiles = given(arguments.profiles, load_profiles, none)
    lengths = attempt(lambda: request_lengths(workload)) if workload else None
    quality = attempt(lambda: _quality(arguments, spec)) if spec else None
    if faults:
        raise UserError("\n".join(faults))
    assert spec and cluster and workload and lengths and quality and profiles is not None
    return Inputs(spec, cluster, workload, tuple(lengths), profiles, quality)


def _quality(arguments: Arguments, spec: "ModelSpec") -> "QualityModel":
    from llmpq.costs.quality import measured_quality, prior_quality
    from llmpq.profile_data import load_sensitivity

    if arguments.sensitivity is None:
        return prior_quality(spec.num_layers)
    sensitivity = load_sensitivity(arguments.sensitivity)
    return measured_quality(sensitivity, spec, str(arguments.sensitivity))


def _problem(
    arguments: Arguments, inputs: Inputs, plan: "Plan | None" = None
) -> "tuple[Problem, list[str], list[str]]":
    """The problem, all precisions that could be allowed, and notes."""
    from llmpq.planner.problem import Problem

    times = _times(inputs)
    offered = [p for p in _offered(times) if p in inputs.quality.omega]
    notes = _notes(inputs, times)
    asked = _asked(arguments, plan)
    precisions = _precisions(inputs, times, offered, asked)
    budget = float("inf") if arguments.theta is not None else _budget(arguments, inputs.quality)
    problem = Problem(
        spec=inputs.spec,
        cluster=inputs.cluster,
        workload=inputs.workload,
        lengths=inputs.lengths,
        times=times,
        quality=inputs.quality,
        precisions=tuple(precisions),
        budget=budget,
        theta=arguments.theta or 0.0,
    )
    return problem, offered, notes


def _budget(arguments: Arguments, quality: "QualityModel") -> float:
    return quality.budget(_max_loss(arguments))


def _max_loss(arguments: Arguments) -> float:
    from llmpq.costs.quality import DEFAULT_MAX_LOSS_PERCENT

    asked = arguments.max_quality_loss
    return DEFAULT_MAX_LOSS_PERCENT if asked is None else asked


def _times(inputs: Inputs) -> "dict[str, LayerTimes]":
    """Times of every device type; all that are missing in one `UserError`."""
    from llmpq.costs.latency import device_times

    times, faults = {}, []
    for name in dict.fromkeys(device.type for device in inputs.cluster.devices()):
        try:
            times[name] = device_times(inputs.cluster, name, inputs.spec, inputs.profiles)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))
    return times


def _offered(times: "dict[str, LayerTimes]") -> list[str]:
    from llmpq.precision import PRECISIONS

    return [p for p in PRECISIONS if any(p in t.precisions for t in times.values())]


def _asked(arguments: Arguments, plan: "Plan | None") -> list[str] | None:
    if arguments.precisions is not None:
        return [name.strip() for name in arguments.precisions.split(",") if name.strip()]
    return sorted(set(plan.precisions)) if plan is not None else None


def _precisions(
    inputs: Inputs, times: "dict[str, LayerTimes]", offered: Sequence[str], asked: list[str] | None
) -> list[str]:
    chosen = list(offered) if asked is None else list(dict.fromkeys(asked))
    faults = [_why_no_precision(inputs, name) for name in chosen if name not in offered]
    if not chosen:
        faults.append("--precisions names no precision; for instance --precisions 16,8,4,3")
    faults += [
        f"device type '{device}' has no times at {', '.join(chosen)} bits; "
        f"it has them at {', '.join(t.precisions)}"
        for device, t in times.items()
        if not faults and not set(chosen) & set(t.precisions)
    ]
    if faults:
        raise UserError("\n".join(faults))
    return chosen


def _why_no_precision(inputs: Inputs, name: str) -> str:
    from llmpq.precision import PRECISIONS

    if name not in PRECISIONS:
        return f"unknown precision '{name}'; known: {', '.join(PRECISIONS)}"
    if name not in inputs.quality.omega:
        return f"precision {name}: the sensitivity file does not have it for every layer"
    return f"precision {name}: no device type has times for it; profile it with 'llmpq-profile'"


def _notes(inputs: Inputs, times: "dict[str, LayerTimes]") -> list[str]:
    guessed = [name for name, t in times.items() if not t.measured]
    notes = []
    if inputs.spec.guessed:
        notes.append(f"{inputs.spec.model_type} is not a known family; counted as LLaMA-shaped")
    if guessed:
        notes.append(
            f"times of {', '.join(guessed)} come from spec sheets, not from measurements; "
            "make profiles with 'llmpq-profile' and give their folder as --profiles"
        )
    missing = [p for p in _offered(times) if p not in inputs.quality.omega]
    if missing:
        notes.append(f"not allowed, as the sensitivity file lacks them: {', '.join(missing)}")
    pinned = inputs.workload.batch
    if isinstance(pinned, int) and pinned > len(inputs.lengths):
        notes.append(f"batch {pinned} is above the number of requests, {len(inputs.lengths)}")
    return notes


# ---- telling


def _report(
    out: "Console",
    arguments: Arguments,
    problem: "Problem",
    planned: "Planned",
    notes: Sequence[str],
) -> None:
    from llmpq.planner.report import print_outcomes, print_report

    notes = [*notes, *planned.notes]
    if arguments.verbose and planned.effort:
        notes.append(planned.effort)
    print_report(out, planned.plan, problem.quality.source, notes, _limits(arguments))
    if arguments.compare and planned.outcomes:
        print_outcomes(out, planned.plan, planned.outcomes)


def _limits(arguments: Arguments) -> str:
    if arguments.theta is not None:
        return f"theta {arguments.theta:g} s for one unit of summed sensitivity"
    default = " (default)" if arguments.max_quality_loss is None else ""
    return f"budget {_max_loss(arguments):g} %{default}"


def _write(arguments: Arguments, plan: "Plan") -> None:
    from llmpq.artifact import write_json

    if arguments.output is not None:
        write_json(arguments.output, plan)
    if arguments.json_path == Path("-"):
        click.echo(plan.model_dump_json(indent=1))
    elif arguments.json_path is not None:
        write_json(arguments.json_path, plan)


def _write_baselines(arguments: Arguments, problem: "Problem", planned: "Planned") -> None:
    from llmpq.artifact import write_json
    from llmpq.planner.planning import baseline_plan

    if arguments.baseline_plans is None:
        return
    for outcome in planned.outcomes:
        plan = baseline_plan(problem, outcome)
        if plan is not None:
            write_json(arguments.baseline_plans / f"{outcome.method}.json", plan)


def _shown(bar: "ProgressBar") -> "Callable[[Progress], None]":
    """Tells `bar` how far a phase of the search is."""

    def show(progress: "Progress") -> None:
        best = progress.best_tokens_per_s
        detail = f"{progress.phase}, best {best:.1f} tokens/s" if best else progress.phase
        bar.update(progress.done, detail, progress.total)

    return show


if __name__ == "__main__":
    main()
