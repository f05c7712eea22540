"""The plan: the layers of each device, their precisions, and the micro-batches.

A plan is a frozen value, whether a person or the planner wrote it. It is validated when it is read:
its stages cover the model's layers exactly, in order, and fit its own cluster; where several
devices share a stage (tensor parallelism), the model can be cut so. `refuse_shared_stages` is for
commands that do not support such stages yet.
"""

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from llmpq.artifact import SCHEMA_VERSION, Provenance, Strict, read_json
from llmpq.cluster import GIB, Cluster
from llmpq.errors import UserError, listed
from llmpq.job import LaneShape
from llmpq.model_spec import ModelSpec, shard_faults
from llmpq.plan_diff import LayerPlacement, PlanDiff, changes, layer_ranges
from llmpq.precision import KNOWN_NAMES, is_layer_precision, layer_precision
from llmpq.quantizer import Quantizer
from llmpq.workload import (
    MAX_BATCH,
    MAX_LENGTH,
    Reserve,
    Workload,
    chunk_tokens,
    lanes,
    lanes_for,
    planned_lengths,
)


class Stage(Strict):
    """Layers `first_layer` up to but not including `end_layer`, on one device or several.

    Where `tensor_parallel` (a power of two) is above 1, so many equal devices of a node share every
    layer; `devices` names each of them.
    """

    rank: NonNegativeInt
    node: str
    devices: list[str] = Field(min_length=1)
    tensor_parallel: PositiveInt = 1
    first_layer: NonNegativeInt
    end_layer: NonNegativeInt
    precisions: list[str]

    @property
    def num_layers(self) -> int:
        """The number of layers of this stage."""
        return self.end_layer - self.first_layer

    @model_validator(mode="after")
    def _check(self) -> "Stage":
        faults = []
        if self.end_layer <= self.first_layer:
            faults.append(f"stage {self.rank} holds no layer: {self.first_layer}..{self.end_layer}")
        elif len(self.precisions) != self.num_layers:
            faults.append(
                f"stage {self.rank} has {self.num_layers} layers "
                f"but {len(self.precisions)} precisions"
            )
        unknown = sorted(p for p in set(self.precisions) if not is_layer_precision(p))
        if unknown:
            faults.append(
                f"unknown precision {', '.join(map(repr, unknown))}; known: {KNOWN_NAMES}"
            )
        faults += [f"stage {self.rank}: {fault}" for fault in self._sharing_faults()]
        if faults:
            raise ValueError(listed(faults))
        return self

    def _sharing_faults(self) -> list[str]:
        faults, degree = [], self.tensor_parallel
        if degree & (degree - 1):
            faults.append(f"tensor_parallel {degree} is not a power of two")
        if len(self.devices) != degree:
            faults.append(f"tensor_parallel is {degree} but devices names {len(self.devices)}")
        if len(set(self.devices)) > 1:
            types = ", ".join(sorted(set(self.devices)))
            faults.append(f"the devices of a stage must be of one type, found {types}")
        return faults


class Lane(Strict):
    """Slots of the KV cache that decode together: `rows` slots of `tokens` each."""

    rows: PositiveInt = Field(le=MAX_BATCH)
    tokens: PositiveInt = Field(le=2 * MAX_LENGTH)


class PredictedStage(Strict):
    """Predicted times of one stage. `prefill_s` and `decode_step_s` are of one micro-batch.

    The errors of these times are those expected on average, not bounds; None where unknown.
    `kernels` holds the expected kernels by precision, in the order of rising numbers of rows.
    `source` is "measured", "interpolated", "fitted", "beyond the profile" or "spec sheet", the
    least certain source of the times.
    """

    prefill_s: float
    decode_step_s: float
    peak_memory_bytes: int
    memory_capacity_bytes: int
    provenance: str
    source: str | None = None
    prefill_error_percent: float | None = None
    decode_error_percent: float | None = None
    kernels: dict[str, list[str]] = {}


class Predicted(Strict):
    """The planner's predictions for the plan; `tokens_per_s` counts generated tokens only.

    `prefill_s` is the time until every request has its first token, `decode_s` the time after that.
    Where new requests take the slots of ended ones, both phases overlap until then, and
    `prefill_share` is the share of prefills in the busiest stage's work.
    `error_percent` is the expected error of `total_s`, by the times of the slowest stages.
    `objective` is `total_s`, plus the price of its sensitivity where that has one. No plan of the
    space has an objective below `lower_bound` in closed form (in proportion, where the closed form
    is above the simulation); `gap` is the relative distance of the objective above it.
    `closed_form_s` is this plan's total in closed form, where `total_s` was simulated;
    `closed_form_scale` is the factor of simulated to closed-form times of plans of these sizes, by
    which it and the closed form of `lower_bound` were multiplied.
    """

    total_s: float
    prefill_s: float
    decode_s: float
    tokens_per_s: float
    requests_per_s: float | None = None
    prefill_share: float | None = None
    quality_loss_percent: float
    sum_sensitivity: float
    objective: float
    lower_bound: float
    gap: float
    planning_s: float
    error_percent: float | None = None
    closed_form_s: float | None = None
    closed_form_scale: float | None = None
    stages: list[PredictedStage]

    @property
    def priced_s(self) -> float:
        """The total in closed form."""
        return self.total_s if self.closed_form_s is None else self.closed_form_s

    @property
    def share_of_prefills(self) -> float:
        """`prefill_share`; plans of earlier versions have it as `prefill_s` over the total."""
        earlier = self.prefill_s / self.total_s if self.total_s > 0 else 0.0
        return earlier if self.prefill_share is None else self.prefill_share


class Baseline(Strict):
    """The result of another method with the same cluster and the same costs."""

    method: str
    feasible: bool
    tokens_per_s: float | None = None
    quality_loss_percent: float | None = None
    why_not: str | None = None


class Plan(Strict):
    """The contents of plan.json.

    At most `chunk_tokens` tokens of a prompt are computed at once; longer prompts are computed in
    chunks, one prompt at a time. `lanes` describes the KV cache: each lane holds the slots of a
    decode micro-batch, `batch` slots in all. Plans of earlier versions have neither, and
    `reserve_of` computes both from the workload.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["plan"] = "plan"
    model: ModelSpec
    workload: Workload
    cluster: Cluster
    method: str
    batch: PositiveInt = Field(le=MAX_BATCH)
    prefill_micro_batch: PositiveInt
    decode_micro_batch: PositiveInt
    chunk_tokens: PositiveInt | None = Field(default=None, le=MAX_LENGTH)
    lanes: list[Lane] | None = Field(default=None, min_length=1)
    kv_precision: Literal["16"] = "16"
    target: Literal["llmpq", "vllm"] = "llmpq"  # what it was planned for; llmpq-run runs both
    quantizer: Quantizer = Quantizer()
    stages: list[Stage] = Field(min_length=1)
    predicted: Predicted | None = None
    baselines: list[Baseline] = []
    provenance: Provenance = Provenance()

    @property
    def precisions(self) -> list[str]:
        """The precision of every layer of the model."""
        return [p for stage in self.stages for p in stage.precisions]

    @property
    def ranks(self) -> list[list[int]]:
        """The ranks of each stage's workers, one a device."""
        ends = list(itertools.accumulate(stage.tensor_parallel for stage in self.stages))
        return [
            list(range(end - stage.tensor_parallel, end))
            for stage, end in zip(self.stages, ends, strict=True)
        ]

    @model_validator(mode="after")
    def _check(self) -> "Plan":
        faults = [*self._layer_faults(), *self._device_faults(), *self._sharing_faults()]
        faults += [*self._lane_faults(), *self._expert_faults()]
        if not self.model.linears:
            faults.append("model.linears is empty, so its layers hold no weights")
        for name in ("prefill_micro_batch", "decode_micro_batch"):
            if getattr(self, name) > self.batch:
                faults.append(f"{name} {getattr(self, name)} is above batch {self.batch}")
        if faults:
            raise ValueError(listed(faults))
        return self

    def _layer_faults(self) -> list[str]:
        faults, expected = [], 0
        for rank, stage in enumerate(self.stages):
            if stage.rank != rank:
                faults.append(f"stage {rank} says rank {stage.rank}; ranks count from 0 in order")
            if stage.first_layer != expected:
                faults.append(f"stage {rank} starts at layer {stage.first_layer}, not {expected}")
            expected = stage.end_layer
        if expected != self.model.num_layers:
            faults.append(f"stages end at layer {expected}, the model has {self.model.num_layers}")
        return faults

    def _expert_faults(self) -> list[str]:
        named = [p for p in self.precisions if len(set(layer_precision(p))) > 1]
        if not named or any(kind.experts is not None for kind in self.model.kind_specs):
            return []
        return [f"precision '{named[0]}' names experts, but no layer of the model has any"]

    def _lane_faults(self) -> list[str]:
        if self.lanes is None:
            return []
        slots, most = sum(lane.rows for lane in self.lanes), max(lane.rows for lane in self.lanes)
        faults = []
        if slots != self.batch:
            faults.append(
                f"lanes have {slots} rows in all, but batch is {self.batch}; without lanes they "
                "are computed from the workload"
            )
        if most > self.decode_micro_batch:
            limit = f"decode_micro_batch {self.decode_micro_batch}"
            faults.append(f"a lane has {most} rows, which is above {limit}")
        return faults

    def _sharing_faults(self) -> list[str]:
        return [
            f"stage {stage.rank}: {fault}"
            for stage in self.stages
            for fault in shard_faults(self.model, stage.tensor_parallel)
            if stage.tensor_parallel > 1
        ]

    def _device_faults(self) -> list[str]:
        free = [(device.node, device.type) for device in self.cluster.devices()]
        faults = []
        for stage in self.stages:
            for device in stage.devices:
                if (stage.node, device) in free:
                    free.remove((stage.node, device))
                else:
                    faults.append(
                        f"stage {stage.rank} asks for a {device} on {stage.node}, "
                        f"which has none (left)"
                    )
        return faults


def load_plan(path: Path | str) -> Plan:
    """Reads and validates plan.json."""
    return read_json(Path(path), Plan)


def reserve_of(plan: Plan) -> Reserve:
    """The sizes that a run of the plan reserves: its chunk and its lanes.

    Sizes that the plan does not give are computed from its workload. `lanes_for` replaces lanes
    that are too short for the longest request of the workload, and raises `UserError` where no
    lanes fit.
    """
    lengths, sizes = planned_lengths(plan.workload), (plan.batch, plan.decode_micro_batch)
    longest = max(prompt for prompt, _ in lengths)
    shapes = (
        lanes(lengths, *sizes)
        if plan.lanes is None
        else lanes_for(lengths, shapes_of(plan.lanes), *sizes, set(plan.model.windows))
    )
    chunk = chunk_tokens(lengths) if plan.chunk_tokens is None else plan.chunk_tokens
    return Reserve(shapes, min(chunk, longest), longest)


def spec_of_run(plan: Plan) -> ModelSpec:
    """The plan's model, where kinds of layers that do not differ on its workload are one."""
    return plan.model.within(max(map(sum, planned_lengths(plan.workload))))


def shapes_of(given: Iterable[Lane]) -> tuple[LaneShape, ...]:
    """The lanes of a plan file, for the schedule."""
    return tuple(LaneShape(lane.rows, lane.tokens) for lane in given)


def lanes_of(shapes: Iterable[LaneShape]) -> list[Lane]:
    """The lanes of the schedule, for a plan file."""
    return [Lane(rows=rows, tokens=tokens) for rows, tokens in shapes]


def refuse_shared_stages(plan: Plan, path: Path) -> None:
    """Raises `UserError` where several devices share a stage, which cannot be evaluated yet."""
    shared = [stage for stage in plan.stages if stage.tensor_parallel > 1]
    if shared:
        stages = ", ".join(f"stage {s.rank} ({s.tensor_parallel} devices)" for s in shared)
        raise UserError(
            f"{path}: the quality of stages of several devices cannot be measured yet: {stages}; "
            "their weights are those of one device, so evaluate a plan with the same precisions"
        )


def diff(a: Plan, b: Plan) -> PlanDiff:
    """The changes from `a` to `b`. Raises `ValueError` for plans of different models."""
    # Plans of older versions know of no windows.
    one, other = a.model.without_windows(), b.model.without_windows()
    if one != other:
        names = [n for n in ModelSpec.model_fields if getattr(one, n) != getattr(other, n)]
        raise ValueError(
            f"plans of different models cannot be compared: {a.model.name} and {b.model.name} "
            f"differ in {', '.join(names)}"
        )
    return PlanDiff(
        inputs=tuple(n for n in ("workload", "cluster") if getattr(a, n) != getattr(b, n)),
        settings=changes(_settings(a), _settings(b)),
        moves=layer_ranges(_placements(a), _placements(b)),
        precisions=layer_ranges(a.precisions, b.precisions),
        predicted=changes(_expected(a), _expected(b)),
    )


def _settings(plan: Plan) -> dict[str, object]:
    """The settings of a plan beside its layers, by readable names."""
    reserve = reserve_of(plan)
    return {
        "method": plan.method,
        "batch": plan.batch,
        "prefill micro-batch": plan.prefill_micro_batch,
        "decode micro-batch": plan.decode_micro_batch,
        "prompt chunk, tokens": reserve.chunk_tokens,
        "cache lanes": _lanes_text(reserve.lanes),
        "cache precision": plan.kv_precision,
        "devices": tuple(f"{stage.devices[0]} on {stage.node}" for stage in plan.stages),
        "tensor parallelism": tuple(stage.tensor_parallel for stage in plan.stages),
    }


def _lanes_text(shapes: Iterable[LaneShape]) -> str:
    """The lanes as "3 of 4 x 612, 1 of 2 x 306": counts of lanes of so many rows x tokens."""
    counts = Counter(shapes).items()
    return ", ".join(f"{count} of {rows} x {tokens}" for (rows, tokens), count in counts)


def _placements(plan: Plan) -> list[LayerPlacement]:
    """The devices of every layer of the model."""
    found: list[LayerPlacement] = []
    used: Counter[tuple[str, str]] = Counter()
    for stage in plan.stages:
        kind, count = (stage.node, stage.devices[0]), len(stage.devices)
        numbers = tuple(range(used[kind], used[kind] + count))
        used[kind] += count
        found += [LayerPlacement(*kind, numbers, stage.rank)] * stage.num_layers
    return found


def _expected(plan: Plan) -> dict[str, object]:
    """The predictions, with units in their names; empty where there are none."""
    predicted = plan.predicted
    if predicted is None:
        return {}
    memory = {
        f"memory of stage {rank}, GiB": stage.peak_memory_bytes / GIB
        for rank, stage in enumerate(predicted.stages)
    }
    speed, loss = predicted.tokens_per_s, predicted.quality_loss_percent
    return {"tokens/s": speed, "quality loss, %": loss, **memory}
