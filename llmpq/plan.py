"""The plan: which device holds which layers, at which precisions, in which micro-batches.

A plan is a frozen value, the same whether a person or the planner wrote it. It is validated when
read: its stages cover the model's layers exactly, in order, and fit its own cluster.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from llmpq.artifact import SCHEMA_VERSION, Provenance, Strict, read_json
from llmpq.cluster import Cluster
from llmpq.model_spec import ModelSpec
from llmpq.precision import PRECISIONS
from llmpq.workload import Workload


class Stage(Strict):
    """Layers `first_layer` up to but not including `end_layer`, on one device."""

    rank: NonNegativeInt
    node: str
    devices: list[str] = Field(min_length=1)
    tensor_parallel: PositiveInt = 1
    first_layer: NonNegativeInt
    end_layer: NonNegativeInt
    precisions: list[str]

    @property
    def num_layers(self) -> int:
        """Layers of this stage."""
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
        unknown = sorted(set(self.precisions) - set(PRECISIONS))
        if unknown:
            faults.append(
                f"unknown precision {', '.join(map(repr, unknown))}; known: {', '.join(PRECISIONS)}"
            )
        if self.tensor_parallel != 1 or len(self.devices) != 1:
            faults.append(f"stage {self.rank}: a stage of several devices cannot run yet")
        if faults:
            raise ValueError("; ".join(faults))
        return self


class PredictedStage(Strict):
    """Predicted times of one stage. `prefill_s` and `decode_step_s` are of one micro-batch."""

    prefill_s: float
    decode_step_s: float
    peak_memory_bytes: int
    memory_capacity_bytes: int
    provenance: str


class Predicted(Strict):
    """What the planner expects of the plan; `tokens_per_s` counts generated tokens only."""

    total_s: float
    prefill_s: float
    decode_s: float
    tokens_per_s: float
    quality_loss_percent: float
    sum_sensitivity: float
    objective: float
    lower_bound: float
    gap: float
    planning_s: float
    stages: list[PredictedStage]


class Baseline(Strict):
    """What another method would do with the same cluster and the same costs."""

    method: str
    feasible: bool
    tokens_per_s: float | None = None
    quality_loss_percent: float | None = None
    why_not: str | None = None


class Plan(Strict):
    """plan.json."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["plan"] = "plan"
    model: ModelSpec
    workload: Workload
    cluster: Cluster
    method: str
    batch: PositiveInt
    prefill_micro_batch: PositiveInt
    decode_micro_batch: PositiveInt
    kv_precision: Literal["16"] = "16"
    stages: list[Stage] = Field(min_length=1)
    predicted: Predicted | None = None
    baselines: list[Baseline] = []
    provenance: Provenance = Provenance()

    @property
    def precisions(self) -> list[str]:
        """The precision of every layer of the model."""
        return [p for stage in self.stages for p in stage.precisions]

    @model_validator(mode="after")
    def _check(self) -> "Plan":
        faults = [*self._layer_faults(), *self._device_faults()]
        for name in ("prefill_micro_batch", "decode_micro_batch"):
            if getattr(self, name) > self.batch:
                faults.append(f"{name} {getattr(self, name)} is above batch {self.batch}")
        if faults:
            raise ValueError("; ".join(faults))
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


def load_plan(path: Path) -> Plan:
    """Reads and validates plan.json."""
    return read_json(path, Plan)
