"""From the command line to a `Problem`: all files of `llmpq-plan`, read and checked.

`read_inputs` reads model, cluster, workload, profiles and sensitivities, and tells the faults of
all of them in one error. `make_problem` adds what the command line says: precisions, budget or
theta, tensor parallelism (`planner.inputs`). A plan file that is priced stands for what is not
given.

Heavy modules are imported inside functions, so that `--help` is quick. Not covered: which options
go together (`plan`).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from llmpq.errors import UserError

if TYPE_CHECKING:
    from llmpq.costs.quality import QualityModel
    from llmpq.model_spec import ModelSpec
    from llmpq.plan_data import Plan
    from llmpq.planner.inputs import Inputs
    from llmpq.planner.problem import Problem
    from llmpq.profile_data import Profile

T = TypeVar("T")


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


def read_inputs(arguments: Arguments, plan: "Plan | None") -> "Inputs":
    """All files, their faults in one `UserError`. A plan stands for what is not given."""
    from llmpq.cluster import load_cluster
    from llmpq.costs.measured_types import with_measured_types
    from llmpq.model_lookup import DEFAULT_MODEL, load_model_spec
    from llmpq.planner.inputs import Inputs
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
    arguments: Arguments, inputs: "Inputs", plan: "Plan | None" = None
) -> "tuple[Problem, list[str], list[str]]":
    """The problem, all precisions that could be allowed, and notes."""
    from llmpq.planner.inputs import Wishes, make_problem

    names = arguments.precisions
    wishes = Wishes(
        None if names is None else [name.strip() for name in names.split(",") if name.strip()],
        max_loss(arguments),
        arguments.theta,
        arguments.tensor_parallel,
    )
    return make_problem(inputs, wishes, plan, str(arguments.workload or ""))


def max_loss(arguments: Arguments) -> float:
    """Percent that perplexity may rise."""
    from llmpq.costs.quality import DEFAULT_MAX_LOSS_PERCENT

    asked = arguments.max_quality_loss
    return DEFAULT_MAX_LOSS_PERCENT if asked is None else asked
