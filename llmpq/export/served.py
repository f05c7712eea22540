"""Decides at which precision vLLM serves each matrix of a plan: as planned, or raised.

Parts of a matrix that vLLM computes as one (query, key and value; gate and up) get one precision.
All functions are pure.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmpq.errors import UserError
from llmpq.families import CUTS
from llmpq.model_spec import LinearShape, ModelSpec
from llmpq.plan_data import Plan, Stage
from llmpq.precision import PRECISIONS, bits_text
from llmpq.vllm_support import (
    FUSED,
    STEP,
    VLLM,
    VllmDevice,
    group_fits_shards,
    raised,
    vllm_device,
    why_no_vllm,
)

MOST_LAYERS_NAMED = 8
LayerPrecisions = Mapping[str, str]  # of a layer: the precision of each linear by its last name


@dataclass(frozen=True)
class Served:
    """The precision of every linear of every layer, and notes on those that were raised."""

    layers: tuple[LayerPrecisions, ...]
    notes: tuple[str, ...] = ()

    def of(self, layer: int, linear: str) -> str:
        """The precision of a linear by the last part of its name, such as "q_proj"."""
        return self.layers[layer].get(linear, "16")


@dataclass(frozen=True)
class _Raise:
    """Why some matrices have another precision than the plan says."""

    stage: int
    planned: str
    served: str
    linears: tuple[str, ...]  # empty: all of the layer
    why: str


def served_precisions(plan: Plan) -> Served:
    """The precision of each matrix on the devices of its stage.

    Raises `UserError` for plans that vLLM cannot run at all.
    """
    _refuse_unservable(plan)
    layers: list[LayerPrecisions] = []
    raises: dict[_Raise, list[int]] = {}
    specs = plan.model.shard(plan.stages[0].tensor_parallel).kind_specs
    for stage in plan.stages:
        device = vllm_device(plan.cluster, stage.devices[0])
        for number, planned in enumerate(stage.precisions, stage.first_layer):
            spec = specs[plan.model.kind_of_layers[number]]
            found = _layer(spec, planned, device, stage.tensor_parallel)
            layers.append(found)
            for reason in _reasons(stage, planned, found, spec, device):
                raises.setdefault(reason, []).append(number)
    notes = [_note(reason, numbers) for reason, numbers in raises.items()]
    return Served(tuple(layers), (*notes, *_library_notes(plan, layers)))


def _refuse_unservable(plan: Plan) -> None:
    if any(kind.experts is not None for kind in plan.model.kind_specs):
        raise UserError(
            f"{plan.model.name}: layers with routed experts cannot be exported yet; llmpq-run "
            "serves them"
        )
    degrees = sorted({stage.tensor_parallel for stage in plan.stages})
    if len(degrees) > 1:
        raise UserError(
            f"the stages have different numbers of devices ({', '.join(map(str, degrees))}); vLLM "
            "has one tensor-parallel size for all: plan with --tensor-parallel off"
        )
    kinds = {
        vllm_device(plan.cluster, name).kind for stage in plan.stages for name in stage.devices
    }
    if len(kinds) > 1:
        raise UserError("some stages are on CPUs and some on GPUs, which vLLM cannot run together")
    if kinds == {"cpu"} and len({stage.node for stage in plan.stages}) > 1:
        raise UserError(f"vLLM {VLLM} runs CPUs of one machine alone; the plan has several nodes")
    for stage in plan.stages:
        device = vllm_device(plan.cluster, stage.devices[0])
        if why := why_no_vllm(device, plan.model.head_dim):
            raise UserError(
                f"stage {stage.rank}: {stage.devices[0]} {why}; llmpq-run serves the plan"
            )


def _library_notes(plan: Plan, layers: Sequence[LayerPrecisions]) -> Iterator[str]:
    """Says which libraries must be beside vLLM, for which precisions."""
    needed: dict[str, set[str]] = {}
    for stage in plan.stages:
        device = vllm_device(plan.cluster, stage.devices[0])
        for own in layers[stage.first_layer : stage.end_layer]:
            for name in own.values():
                if library := device.library_for(name):
                    needed.setdefault(library, set()).add(name)
    for library, names in needed.items():
        bits = " and ".join(map(bits_text, sorted(names)))
        yield f"{bits} layers need the {library} kernels in vLLM's environment"


def _layer(spec: ModelSpec, planned: str, device: VllmDevice, degree: int) -> LayerPrecisions:
    found: dict[str, str] = {}
    for ops in _fused(spec.linears):
        shapes = [(op.out_features, op.in_features) for op in ops]
        name = raised(planned, device, shapes)
        if any(not _fits_shards(name, op, degree) for op in ops):
            name = "16"
        found |= {op.name: name for op in ops}
    return found


def _fused(linears: Iterable[LinearShape]) -> Iterator[list[LinearShape]]:
    """The linears, those together that vLLM computes as one matrix."""
    whole = {part: name for name, parts in FUSED.items() for part in parts}
    groups: dict[str, list[LinearShape]] = {}
    for op in linears:
        groups.setdefault(whole.get(op.name, op.name), []).append(op)
    yield from groups.values()


def _fits_shards(precision: str, op: LinearShape, degree: int) -> bool:
    """Whether each shard has whole groups of scales; `op` is the shard's."""
    if degree == 1 or not PRECISIONS[precision].weight_only or CUTS.get(op.name) != "in":
        return True
    return group_fits_shards(PRECISIONS[precision].weight_bits, op.in_features * degree, degree)


def _reasons(
    stage: Stage, planned: str, found: LayerPrecisions, spec: ModelSpec, device: VllmDevice
) -> Iterator[_Raise]:
    if planned not in device.precisions:
        usual = Counter(found.values()).most_common(1)[0][0]
        why = f"vLLM {VLLM} has no kernel for it on {stage.devices[0]}"
        yield _Raise(stage.rank, planned, usual, (), why)
    else:
        usual = planned
    shapes = {op.name: (op.out_features, op.in_features) for op in spec.linears}
    for served in sorted(set(found.values()) - {usual}):
        linears = tuple(name for name, one in found.items() if one == served)
        sizes = ", ".join(f"{name} {list(shapes[name])}" for name in linears)
        why = f"its kernels take sizes that are multiples of {STEP}, and whole groups on each shard"
        yield _Raise(stage.rank, planned, served, linears, f"{why} ({sizes})")


def _note(reason: _Raise, layers: list[int]) -> str:
    named = ", ".join(map(str, layers[:MOST_LAYERS_NAMED]))
    more = len(layers) - MOST_LAYERS_NAMED
    what = f"layer{'s' if len(layers) > 1 else ''} {named}{f' and {more} more' if more > 0 else ''}"
    part = f"{', '.join(reason.linears)} of {what}" if reason.linears else what
    return (
        f"stage {reason.stage}: {bits_text(reason.planned)} becomes {bits_text(reason.served)} in "
        f"{part}: {reason.why}"
    )
