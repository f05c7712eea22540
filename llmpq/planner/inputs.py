"""From what files hold, and what is wished for, to a `Problem`.

`make_problem` adds to model, cluster, workload, profiles and quality what is allowed: precisions, a
budget of quality or its price, devices that share a stage. It returns notes beside the problem:
what a reader of the plan should know of where its figures come from.

Not covered: reading the files, and options of the command line (`cli.plan_inputs`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

from llmpq.cluster import Cluster
from llmpq.costs.latency import LayerTimes, device_times
from llmpq.costs.measured_types import unused_profiles, with_measured_types
from llmpq.costs.quality import DEFAULT_MAX_LOSS_PERCENT, QualityModel, for_all_layers, prior_of
from llmpq.errors import UserError
from llmpq.model_spec import ModelSpec, shard_faults
from llmpq.plan_data import Plan
from llmpq.planner.problem import Problem
from llmpq.planner.vllm_target import NOTE as VLLM_NOTE
from llmpq.planner.vllm_target import Target, vllm_times
from llmpq.precision import (
    EXPERTS_AT,
    KNOWN_NAMES,
    in_order,
    is_layer_precision,
    is_optional,
    with_fewer_for_experts,
)
from llmpq.profile_data import Profile
from llmpq.workload import Workload, planned_lengths

MAX_DEVICES_A_STAGE = 64


@dataclass(frozen=True)
class Inputs:
    """What the files hold.

    `model`: as its configuration says; `spec`: where kinds of layers that do not differ on texts of
    these lengths are one.
    """

    model: ModelSpec
    spec: ModelSpec
    cluster: Cluster
    workload: Workload
    lengths: tuple[tuple[int, int], ...]
    profiles: Sequence[Profile]
    quality: QualityModel


@dataclass(frozen=True)
class Wishes:
    """What a plan may do.

    `precisions`: None allows all that have times. `max_quality_loss`: percent that perplexity may
    rise. `theta`: instead of that, seconds that one unit of summed sensitivity is worth.
    `tensor_parallel`: "off", "auto", or the most devices of a stage, as a number. `target`: what
    runs the plan.
    """

    precisions: Sequence[str] | None = None
    max_quality_loss: float = DEFAULT_MAX_LOSS_PERCENT
    theta: float | None = None
    tensor_parallel: str = "off"
    target: Target = "llmpq"


def inputs_of(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    profiles: Sequence[Profile] = (),
    quality: QualityModel | None = None,
) -> Inputs:
    """Inputs as they belong together; without `quality` a generic estimate."""
    lengths = tuple(planned_lengths(workload))
    return Inputs(
        model,
        model.within(max(map(sum, lengths))),
        with_measured_types(cluster, profiles),
        workload,
        lengths,
        profiles,
        quality or prior_of(model),
    )


def make_problem(
    inputs: Inputs, wishes: Wishes, plan: Plan | None = None, source: str = ""
) -> tuple[Problem, list[str], list[str]]:
    """The problem, all precisions that could be allowed, and notes.

    `plan`: one that is to be priced, whose precisions and shared stages are allowed; `source`: the
    file that the workload is from, for messages. Raises `UserError` for what cannot be planned.
    """
    _check_lengths(inputs, source)
    times = layer_times(inputs)
    if wishes.target == "vllm":
        times = vllm_times(inputs.spec, inputs.cluster, times)
    asked = _asked(inputs, wishes, plan)
    offered = [p for p in offered_precisions(times, asked or ()) if p in inputs.quality.omega]
    notes = _notes(inputs, times) + ([VLLM_NOTE] if wishes.target == "vllm" else [])
    precisions = _precisions(inputs, times, offered, asked)
    budget = inf if wishes.theta is not None else inputs.quality.budget(wishes.max_quality_loss)
    problem = Problem(
        spec=inputs.spec,
        model=inputs.model,
        cluster=inputs.cluster,
        workload=inputs.workload,
        lengths=inputs.lengths,
        num_requests=inputs.workload.num_requests,
        times=times,
        quality=for_all_layers(inputs.quality, inputs.spec),
        precisions=tuple(precisions),
        budget=budget,
        theta=wishes.theta or 0.0,
        max_tensor_parallel=_most_devices(wishes.tensor_parallel, inputs, notes, plan),
        profiles=tuple(inputs.profiles),
    )
    return problem, offered, notes


def _check_lengths(inputs: Inputs, source: str) -> None:
    """No request is longer than the model can read: the runtime would refuse it."""
    prompt, new = max(inputs.lengths, key=sum)
    if prompt + new > inputs.spec.max_positions:
        where = f"{source}: " if source else ""
        raise UserError(
            f"{where}workload '{inputs.workload.name}': a prompt of {prompt} tokens with {new} "
            f"new ones exceeds the {inputs.spec.max_positions} positions of {inputs.spec.name}"
        )


def _most_devices(asked: str, inputs: Inputs, notes: list[str], plan: Plan | None) -> int:
    """How many devices a stage may have."""
    if plan is not None:
        return max(stage.tensor_parallel for stage in plan.stages)
    if asked in ("off", "1"):
        return 1
    if faults := shard_faults(inputs.spec, 2):
        notes.append(f"{'; '.join(faults)}: tensor parallelism is off")
        return 1
    if any(device.type in inputs.cluster.rehearse for device in inputs.cluster.devices()):
        notes.append("rehearsed devices cannot share a stage: tensor parallelism is off")
        return 1
    names = dict.fromkeys(device.type for device in inputs.cluster.devices())
    if unknown := [name for name in names if inputs.cluster.figures_of(name) is None]:
        notes.append(
            f"{', '.join(unknown)}: without bandwidth_gbs and tflops in the cluster file, parts of "
            "a layer cannot be predicted: tensor parallelism is off"
        )
        return 1
    return MAX_DEVICES_A_STAGE if asked == "auto" else int(asked)


def layer_times(inputs: Inputs) -> dict[str, LayerTimes]:
    """Times of every device type; all that are missing in one `UserError`."""
    times, faults = {}, []
    for name in dict.fromkeys(device.type for device in inputs.cluster.devices()):
        try:
            times[name] = device_times(inputs.cluster, name, inputs.spec, inputs.profiles)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))
    return times


def offered_precisions(times: dict[str, LayerTimes], asked: Sequence[str] = ()) -> list[str]:
    """Those that some device has times for; optional ones only where they are asked for."""
    timed = in_order(p for t in times.values() for p in t.offered)
    return [p for p in timed if not is_optional(p) or p in asked]


def has_experts(spec: ModelSpec) -> bool:
    """Whether some layers have routed experts."""
    return any(kind.experts is not None for kind in spec.kind_specs)


def _asked(inputs: Inputs, wishes: Wishes, plan: Plan | None) -> list[str] | None:
    """The precisions that are asked for by name."""
    if wishes.precisions is not None:
        return list(wishes.precisions)
    return sorted(set(plan.precisions)) if plan is not None else None


def _precisions(
    inputs: Inputs, times: dict[str, LayerTimes], offered: Sequence[str], asked: list[str] | None
) -> list[str]:
    chosen = list(offered) if asked is None else list(dict.fromkeys(asked))
    if has_experts(inputs.spec):  # pairs of what is asked for are allowed where there are times
        chosen += [p for p in with_fewer_for_experts(chosen) if p in offered and p not in chosen]
    faults = [_why_no_precision(inputs, name) for name in chosen if name not in offered]
    if not chosen:
        faults.append("--precisions names no precision; for instance --precisions 16,8,4,3")
    faults += [
        f"device type '{device}' has no times at {', '.join(chosen)} bits; "
        f"it has them at {', '.join(t.offered)}"
        for device, t in times.items()
        if not faults and not set(chosen) & set(t.offered)
    ]
    if faults:
        raise UserError("\n".join(faults))
    return chosen


def _why_no_precision(inputs: Inputs, name: str) -> str:
    if not is_layer_precision(name):
        return f"unknown precision '{name}'; known: {KNOWN_NAMES}"
    if EXPERTS_AT in name and not has_experts(inputs.spec):
        return f"precision {name}: {inputs.spec.name} has no layers with experts"
    if name not in inputs.quality.omega:
        return f"precision {name}: the sensitivity file does not have it for every layer"
    return f"precision {name}: no device type has times for it; profile it with 'llmpq-profile'"


def _short_name(model: str) -> str:
    """The last part of a model's name or path, without what a configuration's file adds."""
    return Path(model.removesuffix("/config.json")).name.removesuffix(".json")


def _notes(inputs: Inputs, times: dict[str, LayerTimes]) -> list[str]:
    guessed = [name for name, t in times.items() if not t.measured]
    launched = [name for name in guessed if times[name].machine.is_card]
    notes = unused_profiles(inputs.cluster, inputs.spec, inputs.profiles)
    if inputs.spec.has_other_parts:
        notes.append("the language model alone is planned: images are not served")
    if inputs.spec.guessed:
        notes.append(f"{inputs.spec.model_type} is not a known family; treated as LLaMA-like")
    if guessed:
        notes.append(
            f"times of {', '.join(guessed)} come from spec sheets, not from measurements; "
            "make profiles with 'llmpq-profile' and give their folder as --profiles"
        )
    if launched and has_experts(inputs.spec):
        notes.append(
            f"layers with experts on {', '.join(launched)}: kernels that multiply for all experts "
            "at once, and what launching experts one after the other costs, were not measured on "
            "any card"
        )
    if inputs.quality.model and _short_name(inputs.quality.model) != _short_name(inputs.spec.name):
        notes.append(
            f"the sensitivity file was measured on {inputs.quality.model}, the plan is for "
            f"{inputs.spec.name}"
        )
    missing = [p for p in offered_precisions(times) if p not in inputs.quality.omega]
    if missing:
        notes.append(f"not allowed, as the sensitivity file lacks them: {', '.join(missing)}")
    pinned = inputs.workload.batch
    count = inputs.workload.num_requests
    if isinstance(pinned, int) and pinned > count:
        notes.append(f"batch {pinned} is above the number of requests, {count}")
    return notes
