"""`llmpq-plan`: model + cluster + workload -> plan, report, baselines beside it. No torch."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

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
    from llmpq.planner.frontier import Point
    from llmpq.planner.planning import Options, Planned
    from llmpq.planner.problem import Problem
    from llmpq.planner.search import Progress
    from llmpq.planner.what_if import Change
    from llmpq.profile_data import Profile
    from llmpq.workload import Workload

T = TypeVar("T")
PATH = click.Path(path_type=Path)
METHODS = ("auto", "ilp", "heuristic", "adabits", "pipeedge", "uniform", "flexgen")
TENSOR_PARALLEL = ("off", "auto")
WHAT_IF_S = 10.0  # at most, for what would change a plan
MAX_DEVICES_A_STAGE = 64
REPLAN_GAP = 0.02
REPLAN_S = 2.0  # at most, for one plan of a changed problem


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
    solver: Literal["highs", "gurobi"]
    tensor_parallel: str
    frontier: bool
    compare_clusters: bool
    clusters: tuple[Path, ...]
    gap: float
    time_limit: float
    compare: bool
    what_if: bool
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
    type=click.Choice(METHODS),
    default="auto",
    help="auto: the search that proves; ilp: it too, by the plain programme, for reference",
)
@click.option("--solver", type=click.Choice(["highs", "gurobi"]), default="highs")
@click.option(
    "--tensor-parallel",
    default="off",
    metavar="[off|auto|N]",
    help="Stages of several devices of a node, at most N; llmpq-run cannot run them yet",
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
@click.option("-o", "--output", type=PATH, help="Write the plan here")
@click.option("--baseline-plans", type=PATH, help="Write each baseline's plan into this folder")
@click.argument("clusters", nargs=-1, type=PATH)
@common_options
def main(**options: object) -> None:
    """Chooses devices' order, layers, precisions and micro-batches for a batch job.

    Prints the plan with its predicted speed, memory and quality, what other methods would do and
    what would make it faster. CLUSTERS: cluster files for --compare-clusters.
    """
    arguments = Arguments(**options)  # type: ignore[arg-type]
    _check(arguments)
    if arguments.evaluate is not None:
        _evaluate(arguments, arguments.evaluate)
    elif arguments.compare_clusters:
        _compare_clusters(arguments)
    elif arguments.frontier:
        _frontier(arguments)
    elif arguments.method == "flexgen":
        _flexgen(arguments)
    else:
        _plan(arguments)


def _check(arguments: Arguments) -> None:
    faults = []
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


def _mode_faults(arguments: Arguments) -> list[str]:
    """What does not go together."""
    modes = {
        "--evaluate": arguments.evaluate is not None,
        "--frontier": arguments.frontier,
        "--compare-clusters": arguments.compare_clusters,
    }
    chosen = [name for name, on in modes.items() if on]
    faults = [f"give {' or '.join(chosen)}, not both"] if len(chosen) > 1 else []
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
    if degree not in TENSOR_PARALLEL and not (degree.isdigit() and int(degree) > 0):
        faults.append(f"--tensor-parallel {degree}: expected off, auto or a number such as 4")
    return faults


def _plan(arguments: Arguments) -> None:
    from llmpq.planner.planning import make_plan

    out = console(arguments.quiet)
    problem, offered, notes = _problem(arguments, _read(arguments, None))
    with progress(out, "planning", 1) as bar:
        planned = make_plan(problem, _options(arguments, _shown(bar)), offered)
    _write(arguments, planned.plan)
    _write_baselines(arguments, problem, planned)
    changes = _what_if(arguments, out, problem, planned.plan)
    _report(out, arguments, problem, planned, notes, changes)


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


def _replan(
    arguments: Arguments, limit: float = REPLAN_S, like: "Plan | None" = None
) -> "Callable[[Problem], Plan]":
    """Plans a changed problem, quickly."""
    from llmpq.planner.planning import Options, replan

    time_limit = min(limit, arguments.time_limit)
    gap = max(arguments.gap, REPLAN_GAP) if like else arguments.gap
    options = Options(gap=gap, time_limit_s=time_limit, compare=False)
    return lambda problem: replan(problem, options, like)


def _what_if(
    arguments: Arguments, out: "Console", problem: "Problem", plan: "Plan"
) -> "list[Change]":
    from llmpq.planner.what_if import what_if

    if not arguments.what_if or arguments.quiet or arguments.method not in ("auto", "ilp"):
        return []
    with progress(out, "what would change it", 1):
        deadline = time.monotonic() + min(WHAT_IF_S, arguments.time_limit)
        return what_if(problem, plan, _replan(arguments, like=plan), deadline)


def _flexgen(arguments: Arguments) -> None:
    from llmpq.planner.offload import flexgen
    from llmpq.planner.report import print_offload

    problem, _, notes = _problem(arguments, _read(arguments, None))
    found = flexgen(problem)
    if found is None or not found.feasible:
        why = found.why_not if found else "no precision keeps the quality budget"
        raise InfeasibleError(f"flexgen has no plan that fits: {why}")
    print_offload(console(arguments.quiet), found, notes)
    _write_value(arguments, asdict(found))


def _frontier(arguments: Arguments) -> None:
    from llmpq.cli.plan_frontier import print_frontier, save_frontier
    from llmpq.planner.frontier import frontier

    out = console(arguments.quiet)
    problem, _, _ = _problem(arguments, _read(arguments, None))
    with progress(out, "planning for each quality loss", 1):
        points = frontier(problem, _replan(arguments, 5.0), None)
    print_frontier(out, points)
    _write_value(arguments, [_frontier_row(point) for point in points])
    stem = arguments.output or Path(f"{problem.cluster.name}.json")
    picture = stem.with_suffix(".frontier.png")
    title = f"{problem.spec.name} on {problem.cluster.name}, {problem.workload.name}"
    save_frontier(picture, points, title)
    out.print(f"picture: {picture}", markup=False)


def _frontier_row(point: "Point") -> dict[str, object]:
    predicted = point.plan.predicted if point.plan else None
    return {
        "max_quality_loss_percent": point.max_loss_percent,
        "quality_loss_percent": predicted.quality_loss_percent if predicted else None,
        "tokens_per_s": predicted.tokens_per_s if predicted else None,
        "gap": predicted.gap if predicted else None,
    }


def _compare_clusters(arguments: Arguments) -> None:
    from llmpq.planner.report import print_comparison

    out = console(arguments.quiet)
    faults: list[str] = []
    rigs = [_rig(replace(arguments, cluster=path), faults) for path in arguments.clusters]
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    rows = []
    with progress(out, "planning", len(rigs)) as bar:
        for number, problem in enumerate(rigs):
            assert problem is not None
            rows.append(_rig_row(arguments, problem))
            bar.update(number + 1, problem.cluster.name, len(rigs))
    print_comparison(out, rows)
    _write_value(arguments, [_rig_values(*row) for row in rows])
    if all(isinstance(plan, str) for _, plan, _ in rows):
        raise InfeasibleError("no cluster of these fits the model")


def _rig(arguments: Arguments, faults: list[str]) -> "Problem | None":
    try:
        return _problem(arguments, _read(arguments, None))[0]
    except UserError as error:
        faults.append(str(error))
        return None


def _rig_row(arguments: Arguments, problem: "Problem") -> "tuple[str, Plan | str, float | None]":
    price = problem.cluster.price_per_hour()
    try:
        plan = _replan(arguments, arguments.time_limit)(problem)
    except InfeasibleError as error:
        return problem.cluster.name, str(error), price
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


def _write_value(arguments: Arguments, value: object) -> None:
    """JSON where it is asked for."""
    if arguments.json_path == Path("-"):
        click.echo(json.dumps(value, indent=1))
    elif arguments.json_path is not None:
        arguments.json_path.parent.mkdir(parents=True, exist_ok=True)
        arguments.json_path.write_text(json.dumps(value, indent=1) + "\n")


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
    _report(console(arguments.quiet), arguments, problem, Planned(priced), notes, [])
    _write(arguments, priced)
    _raise_shortages(plan, shortages(problem, assignment))


def _check_evaluable(problem: "Problem", plan: "Plan", path: Path) -> None:
    faults = []
    if problem.spec.num_layers != plan.model.num_layers:
        layers = f"{plan.model.num_layers} layers, {problem.spec.name} {problem.spec.num_layers}"
        faults.append(f"{path}: the plan has {layers}")
    free = [(device.node, device.type) for device in problem.cluster.devices()]
    for stage in plan.stages:
        device, taken = stage.devices[0], [(stage.node, name) for name in stage.devices]
        if any(free.count(place) < taken.count(place) for place in taken):
            faults.append(f"{path}: stage {stage.rank}: the cluster has no (more) {device}")
            continue
        for place in taken:
            free.remove(place)
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
        max_tensor_parallel=_most_devices(arguments, inputs, notes, plan),
        profiles=tuple(inputs.profiles),
    )
    return problem, offered, notes


def _most_devices(
    arguments: Arguments, inputs: Inputs, notes: list[str], plan: "Plan | None"
) -> int:
    """How many devices a stage may have."""
    asked = arguments.tensor_parallel
    if plan is not None:
        return max(stage.tensor_parallel for stage in plan.stages)
    if asked == "off":
        return 1
    if any(device.type in inputs.cluster.rehearse for device in inputs.cluster.devices()):
        notes.append("rehearsed devices make no stages of several: tensor parallelism left out")
        return 1
    notes.append(
        "stages of several devices were searched, which llmpq-run cannot run yet (for a plan that "
        "it can run: --tensor-parallel off)"
    )
    return MAX_DEVICES_A_STAGE if asked == "auto" else int(asked)


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
    changes: "Sequence[Change]",
) -> None:
    from llmpq.planner.report import print_changes, print_outcomes, print_report

    notes = [*notes, *planned.notes]
    if arguments.verbose and planned.effort:
        notes.append(planned.effort)
    print_report(out, planned.plan, problem.quality.source, notes, _limits(arguments))
    if arguments.compare and planned.outcomes:
        print_outcomes(out, planned.plan, planned.outcomes)
    if changes:
        print_changes(out, planned.plan, changes)


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
