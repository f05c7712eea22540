"""Planning for stock vLLM instead of llmpq's own runtime (`llmpq-plan --target vllm`).

Devices offer the precisions at which vLLM runs every matrix of a layer; stages have one device
each, as vLLM has one tensor-parallel size for all. vLLM's rule for the cache, that all stages have
as many blocks as the one with the least room, is met by any plan: each stage has room for all
slots. Times are those of llmpq's kernels on the same devices, of which vLLM uses humming, Marlin
and oneDNN's too; nothing here was measured on vLLM. `for_vllm` compares the finished plan with an
account of vLLM's memory.

Not covered: times of vLLM itself.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from llmpq.cluster import MIB, Cluster
from llmpq.costs.latency import LayerTimes
from llmpq.costs.vllm_memory import vllm_memory
from llmpq.errors import UserError
from llmpq.model_spec import ModelSpec
from llmpq.plan_data import Plan
from llmpq.vllm_support import VLLM, VllmDevice, vllm_device, why_no_vllm

Target = Literal["llmpq", "vllm"]
NOTE = (
    f"planned for vLLM {VLLM}: precisions are those that it has kernels for; times are those of "
    "llmpq's kernels, not measured on vLLM"
)


def vllm_times(
    spec: ModelSpec, cluster: Cluster, times: Mapping[str, LayerTimes]
) -> dict[str, LayerTimes]:
    """The times of every device type at the precisions at which vLLM runs the model there.

    Raises `UserError`, with all reasons, where vLLM does not run the model or a device.
    """
    devices = {name: vllm_device(cluster, name) for name in times}
    faults = [
        f"device type '{name}' {why}; leave it out of the cluster file, or plan for llmpq-run"
        for name, device in devices.items()
        if (why := why_no_vllm(device, spec.head_dim))
    ]
    if any(kind.experts is not None for kind in spec.kind_specs):
        faults.append(f"{spec.name}: layers with routed experts cannot be exported to vLLM yet")
    if len({device.kind for device in devices.values()}) > 1:
        faults.append("vLLM cannot run stages on CPUs and stages on GPUs together")
    if faults:
        raise UserError("\n".join(faults))
    return {name: _restricted(own, spec, devices[name]) for name, own in times.items()}


def _restricted(times: LayerTimes, spec: ModelSpec, device: VllmDevice) -> LayerTimes:
    shapes = [(op.out_features, op.in_features) for kind in spec.kind_specs for op in kind.linears]
    served = [
        name for name in times.offered if all(device.serves(name, *shape) for shape in shapes)
    ]
    kinds = tuple(
        replace(kind, precisions=tuple(p for p in kind.precisions if p in served))
        for kind in times.kinds
    )
    own = tuple(p for p in times.precisions if p in served)
    return replace(times, precisions=own, kinds=kinds)


def for_vllm(plan: Plan) -> tuple[Plan, list[str]]:
    """The plan with the label of its target, and a note for each stage short of memory in vLLM."""
    names = [op.name for kind in plan.model.kind_specs for op in kind.linears]
    stages = vllm_memory(plan, [dict.fromkeys(names, one) for one in plan.precisions])
    return plan.model_copy(update={"target": "vllm"}), [
        f"stage {rank} needs {one.total / MIB:.0f} MiB in vLLM (an estimate) and has "
        f"{one.capacity / MIB:.0f} MiB: give a smaller memory_gib in the cluster file, plan again"
        for rank, one in enumerate(stages)
        if one.total > one.capacity
    ]
