"""A new plan for what is left of a cluster when workers were lost.

`load_replan_inputs` reads and checks, before anything runs, all that new plans need; `plan_without`
makes the plan. Quality is kept where it can be: first the new plan may not lose more than the first
one did; where nothing fits so, it loses as little as memory allows, and a note says so.

Not covered: who was lost, and starting again (`cli.run`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmpq.artifact import validate
from llmpq.cluster import Cluster
from llmpq.costs.latency import LayerTimes, device_times, machine_of
from llmpq.costs.quality import QualityModel
from llmpq.devices import device_library
from llmpq.errors import InfeasibleError, UserError
from llmpq.model_spec import ModelSpec
from llmpq.plan_data import Plan
from llmpq.planner.explain import why
from llmpq.planner.input_files import InputFiles, read_inputs
from llmpq.planner.inputs import Inputs
from llmpq.planner.planning import Options, replan
from llmpq.planner.problem import Problem
from llmpq.precision import in_order, is_optional
from llmpq.quantizer import Quantizer
from llmpq.seats import worker_places
from llmpq.workload import Workload, planned_lengths

PLANNING_S = 30.0  # at most, for one new plan
GAP = 0.01
FAR_ABOVE = 1e3  # so many times the run's length is what all sensitivity is worth, for best quality


@dataclass(frozen=True)
class ReplanInputs:
    """What new plans are made from. `plan` is the first one, on the cluster as it was then."""

    plan: Plan
    spec: ModelSpec  # the plan's model, for texts as long as those of the workload
    quality: QualityModel
    times: Mapping[str, LayerTimes]
    precisions: tuple[str, ...]
    workload: Workload
    max_loss_percent: float | None

    def problem(self, cluster: Cluster, budget: float, theta: float = 0.0) -> Problem:
        """The problem of planning on `cluster`, what is left."""
        return Problem(
            spec=self.spec,
            model=self.plan.model,
            cluster=cluster,
            workload=self.workload,
            lengths=tuple(planned_lengths(self.workload)),
            num_requests=self.workload.num_requests,
            times=self.times,
            quality=self.quality,
            precisions=self.precisions,
            budget=budget,
            theta=theta,
            max_tensor_parallel=max(stage.tensor_parallel for stage in self.plan.stages),
        )


def load_replan_inputs(
    plan: Plan,
    files: InputFiles,
    quantizer: Quantizer,
    longest: int,
    max_loss_percent: float | None = None,
) -> ReplanInputs:
    """Reads and checks all that new plans need; raises `UserError` with all faults.

    `quantizer`: how the weights are rounded, which stays where the files name no sensitivity.
    `longest`: tokens of the longest request. `max_loss_percent`: that perplexity may rise by;
    None: as little as fits.
    """
    inputs = read_inputs(files, plan)
    if files.cluster is not None:  # the plan's stages must lie on it
        cluster = {"cluster": inputs.cluster.model_dump()}
        validate(plan.model_dump() | cluster, Plan, files.cluster)
    quality = inputs.quality
    if files.sensitivity is None:
        quality = replace(quality, quantizer=quantizer)
    workload = with_longest(plan.workload, longest)
    spec = plan.model.within(max(map(sum, planned_lengths(workload))))
    types = dict.fromkeys(device.type for device in inputs.cluster.devices())
    times = {name: _times(inputs, spec, name) for name in types}
    timed = in_order(name for one in times.values() for name in one.offered)
    return ReplanInputs(
        plan=plan.model_copy(update={"cluster": inputs.cluster}),
        spec=spec,
        quality=quality,
        times=times,
        precisions=tuple(
            name
            for name in timed
            if name in quality.omega and (not is_optional(name) or name in plan.precisions)
        ),
        workload=workload,
        max_loss_percent=max_loss_percent,
    )


def absolute_quantizer(plan: Plan, plan_path: Path, moments: Path | None) -> Quantizer:
    """The plan's quantizer with an absolute path of its calibration statistics.

    `moments`: the file where it is not at the plan's own path.
    """
    named = plan.quantizer.moments
    if moments is None and named is None:
        return plan.quantizer
    found = moments or plan_path.parent / str(named)
    return plan.quantizer.model_copy(update={"moments": str(found.resolve())})


def _times(inputs: Inputs, spec: ModelSpec, name: str) -> LayerTimes:
    """The best times that are there; of a rehearsed device without a profile, the spec sheet's.

    A CPU takes memory for it all the same.
    """
    cluster = inputs.cluster
    try:
        return device_times(cluster, name, spec, inputs.profiles)
    except UserError:
        if name not in device_library():
            raise
        real = cluster.model_copy(update={"rehearse": {}})
        times = device_times(real, name, spec, inputs.profiles)
        return replace(times, machine=machine_of(cluster, name))


def with_longest(workload: Workload, longest: int) -> Workload:
    """The workload, with a request of `longest` tokens more where it has none as long.

    The longest output stays, as prompts that ask for no number of new tokens get that many.
    """
    lengths = planned_lengths(workload)
    new = max(new for _, new in lengths)
    if longest <= max(map(sum, lengths)):
        return workload
    prompts, outputs = zip(*lengths, (longest - new, new), strict=True)
    count = max(workload.num_requests, len(prompts))
    more = {"prompt_tokens": prompts, "new_tokens": outputs, "num_requests": count}
    return workload.model_copy(update=more)


def without(cluster: Cluster, lost: Sequence[tuple[str, str]]) -> Cluster | None:
    """The cluster less devices, each a node and a type; None where nothing is left."""
    missing = Counter(lost)
    nodes = []
    for node in cluster.nodes:
        groups = []
        for group in node.devices:
            gone = min(group.count, missing[node.name, group.type])
            missing[node.name, group.type] -= gone
            if gone < group.count:
                groups.append(group.model_copy(update={"count": group.count - gone}))
        if groups:
            nodes.append(node.model_copy(update={"devices": groups}))
    return cluster.model_copy(update={"nodes": nodes}) if nodes else None


def plan_without(inputs: ReplanInputs, plan: Plan, lost: Sequence[int]) -> tuple[Plan, list[str]]:
    """A plan for the cluster of `plan` less the devices of the `lost` workers, and notes.

    Raises `InfeasibleError` where no plan fits.
    """
    cluster = without(plan.cluster, [worker_places(plan)[worker] for worker in lost])
    if cluster is None:
        raise InfeasibleError("no device is left")
    options = Options(gap=GAP, time_limit_s=PLANNING_S, compare=False)
    notes = [
        f"times of {name}: {inputs.times[name].provenance}"
        for name in dict.fromkeys(device.type for device in cluster.devices())
    ]
    budget, limit = _budget(inputs)
    try:
        return replan(inputs.problem(cluster, budget), options), notes
    except InfeasibleError:
        if inputs.max_loss_percent is not None:
            raise InfeasibleError(why(inputs.problem(cluster, budget))) from None
    found = _best_quality(inputs, cluster, options)
    assert found.predicted is not None
    loss = found.predicted.quality_loss_percent
    return found, [*notes, f"no plan for what is left keeps {limit}: this one loses {loss:.3g} %"]


def _budget(inputs: ReplanInputs) -> tuple[float, str]:
    """The largest summed sensitivity, and in words."""
    quality, asked, omega = inputs.quality, inputs.max_loss_percent, inputs.quality.omega
    if asked is not None:
        return quality.budget(asked), f"the quality loss of {asked:g} %"
    if not set(inputs.plan.precisions) <= set(omega):
        return quality.budget(0.0), "the quality of 16 bits"
    used = quality.sum_omega(inputs.plan.precisions)
    return used, f"the quality loss of {quality.expected_percent(used):.3g} %"


def _best_quality(inputs: ReplanInputs, cluster: Cluster, options: Options) -> Plan:
    """The fastest of the plans that lose least."""
    worst = max(map(sum, inputs.quality.omega.values())) or 1.0
    known = inputs.plan.predicted
    theta = FAR_ABOVE * max(1.0, known.total_s if known else 1e4) / worst
    try:
        best = replan(inputs.problem(cluster, float("inf"), theta), options)
    except InfeasibleError:
        raise InfeasibleError(why(inputs.problem(cluster, float("inf")))) from None
    least = inputs.quality.sum_omega(best.precisions)
    return replan(inputs.problem(cluster, least), options, like=best)
