"""From the command line to a `Problem`: all files of `llmpq-plan`, read and checked.

`read_inputs` reads model, cluster, workload, profiles and sensitivities, and tells the faults of
all of them in one error. `make_problem` adds what the command line says: precisions, budget or
theta, tensor parallelism. It returns notes beside the problem: what a reader of the plan should
know of where its figures come from. A plan file that is priced stands for what is not given.

Heavy modules are imported inside functions, so that `--help` is quick. Not covered: which options
go together (`plan`).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from llmpq.errors import UserError

if TYPE_CHECKING:
    from llmpq.cluster import Cluster
    from llmpq.costs.latency import LayerTimes
    from llmpq.costs.quality import QualityModel
    from llmpq.model_spec import ModelSpec
    from llmpq.plan_data import Plan
    from llmpq.planner.problem import Problem
    from llmpq.profile_data import Profile
    from llmpq.workload import Workload

T = TypeVar("T")
MAX_DEVICES_A_STAGE = 64


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


@dataclass(frozen=True)
class Inputs:
    """What the files hold."""

    spec: "ModelSpec"
    cluster: "Cluster"
    workload: "Workload"
    lengths: tuple[tuple[int, int], ...]
    profiles: "list[Profile]"
    quality: "QualityModel"


def read_inputs(arguments: Arguments, plan: "Plan | None") -> Inputs:
    """All files, their faults in one `UserError`. A plan stands for what is not given."""
    from llmpq.cluster import load_cluster
    from llmpq.costs.measured_types import with_measured_types
    from llmpq.model_lookup import DEFAULT_MODEL, load_model_spec
    from llmpq.profile_data import load_profiles
    from llmpq.workload import load_workload, planned_lengths

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
    lengths = attempt(lambda: planned_lengths(workload)) if workload else None
    quality = attempt(lambda: _quality(arguments, spec)) if spec else None
    if faults:
        raise UserError("\n".join(faults))
    assert spec and cluster and workload and lengths and quality and profiles is not None
    cluster = with_measured_types(cluster, profiles)
    return Inputs(spec, cluster, workload, tuple(lengths), profiles, quality)


def _quality(arguments: Arguments, spec: "ModelSpec") -> "QualityModel":
    from llmpq.costs.quality import measured_quality, prior_quality
    from llmpq.profile_data import load_sensitivity

    if arguments.sensitivity is None:
        return prior_quality(spec.num_layers)
    sensitivity = load_sensitivity(arguments.sensitivity)
    quality = measured_quality(sensitivity, spec, str(arguments.sensitivity))
    moments = quality.quantizer.moments
    if moments is None:
        return quality
    found = _from_plan(arguments.sensitivity.parent / moments, arguments)
    return replace(quality, quantizer=quality.quantizer.model_copy(update={"moments": found}))


def _from_plan(moments: Path, arguments: Arguments) -> str:
    """The path as seen from the folder that all plans are written to; else a whole one."""
    folder = arguments.output.parent if arguments.output else None
    rivals = arguments.baseline_plans
    if folder is None or (rivals is not None and rivals.resolve() != folder.resolve()):
        return str(moments.resolve())
    return os.path.relpath(moments, folder)


def make_problem(
    arguments: Arguments, inputs: Inputs, plan: "Plan | None" = None
) -> "tuple[Problem, list[str], list[str]]":
    """The problem, all precisions that could be allowed, and notes."""
    from llmpq.planner.problem import Problem

    _check_lengths(inputs, arguments)
    times = _times(inputs)
    asked = _asked(arguments, plan)
    offered = [p for p in _offered(times, asked or ()) if p in inputs.quality.omega]
    notes = _notes(inputs, times)
    precisions = _precisions(inputs, times, offered, asked)
    budget = float("inf") if arguments.theta is not None else _budget(arguments, inputs.quality)
    problem = Problem(
        spec=inputs.spec,
        cluster=inputs.cluster,
        workload=inputs.workload,
        lengths=inputs.lengths,
        num_requests=inputs.workload.num_requests,
        times=times,
        quality=inputs.quality,
        precisions=tuple(precisions),
        budget=budget,
        theta=arguments.theta or 0.0,
        max_tensor_parallel=_most_devices(arguments, inputs, notes, plan),
        profiles=tuple(inputs.profiles),
    )
    return problem, offered, notes


def _check_lengths(inputs: Inputs, arguments: Arguments) -> None:
    """No request is longer than the model can read: the runtime would refuse it."""
    prompt, new = max(inputs.lengths, key=sum)
    if prompt + new > inputs.spec.max_positions:
        where = "" if arguments.workload is None else f"{arguments.workload}: "
        raise UserError(
            f"{where}workload '{inputs.workload.name}': a prompt of {prompt} tokens and {new} new "
            f"ones are more than the {inputs.spec.max_positions} positions of {inputs.spec.name}"
        )


def _most_devices(
    arguments: Arguments, inputs: Inputs, notes: list[str], plan: "Plan | None"
) -> int:
    """How many devices a stage may have."""
    asked = arguments.tensor_parallel
    if plan is not None:
        return max(stage.tensor_parallel for stage in plan.stages)
    if asked in ("off", "1"):
        return 1
    if any(device.type in inputs.cluster.rehearse for device in inputs.cluster.devices()):
        notes.append("rehearsed devices make no stages of several: tensor parallelism left out")
        return 1
    names = dict.fromkeys(device.type for device in inputs.cluster.devices())
    if unknown := [name for name in names if inputs.cluster.figures_of(name) is None]:
        notes.append(
            f"{', '.join(unknown)}: without bandwidth_gbs and tflops in the cluster file, parts of "
            "a layer cannot be priced: tensor parallelism left out"
        )
        return 1
    return MAX_DEVICES_A_STAGE if asked == "auto" else int(asked)


def _budget(arguments: Arguments, quality: "QualityModel") -> float:
    return quality.budget(max_loss(arguments))


def max_loss(arguments: Arguments) -> float:
    """Percent that perplexity may rise."""
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


def _offered(times: "dict[str, LayerTimes]", asked: Sequence[str] = ()) -> list[str]:
    """Those that some device has times for; optional ones only where they are asked for."""
    from llmpq.precision import PRECISIONS, STANDARD

    timed = {p for t in times.values() for p in t.precisions}
    return [p for p in PRECISIONS if p in timed and (p in STANDARD or p in asked)]


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
    from llmpq.costs.measured_types import unused_profiles

    guessed = [name for name, t in times.items() if not t.measured]
    notes = unused_profiles(inputs.cluster, inputs.spec, inputs.profiles)
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
    count = inputs.workload.num_requests
    if isinstance(pinned, int) and pinned > count:
        notes.append(f"batch {pinned} is above the number of requests, {count}")
    return notes
