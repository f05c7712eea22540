"""Memory of a plan's stages as vLLM takes it: weights, cache in blocks, and CUDA graphs.

Weights are counted as llmpq stores them: vLLM's kernels keep the same bits, and pack zero points a
little tighter. Activations are those of a step of `max_num_batched_tokens`, one layer's widest
matrices in and out, an estimate. What `Device.memory_bytes` leaves out (the CUDA context) is not
counted again.

Not covered: what torch.compile and vLLM's processes take of the host's memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmpq.costs.memory import end_weight_bytes
from llmpq.model_spec import ModelSpec
from llmpq.plan_data import Plan, reserve_of
from llmpq.precision import PRECISIONS
from llmpq.vllm_settings import graph_bytes, stage_cache_bytes, stage_devices, vllm_settings

HALF = 2
SINGLE = 4


@dataclass(frozen=True)
class VllmStageMemory:
    """Bytes on each device of one stage, and what the device offers."""

    layers: int
    ends: int  # embedding, final norm and head
    cache: int
    activations: int
    graphs: int
    capacity: int

    @property
    def total(self) -> int:
        """All that the device's memory must hold."""
        return self.layers + self.ends + self.cache + self.activations + self.graphs


def vllm_memory(plan: Plan, precisions: Sequence[Mapping[str, str]]) -> list[VllmStageMemory]:
    """The memory of every stage, with the `precisions` of each layer's linears by name."""
    settings, reserve, devices = vllm_settings(plan), reserve_of(plan), stage_devices(plan)
    spec = plan.model.shard(settings.tensor_parallel)
    last = len(plan.stages) - 1
    found = []
    for rank, stage in enumerate(plan.stages):
        numbers = range(stage.first_layer, stage.end_layer)
        kinds = [spec.kind_specs[plan.model.kind_of_layers[number]] for number in numbers]
        layers = zip(kinds, precisions[stage.first_layer : stage.end_layer], strict=True)
        found.append(
            VllmStageMemory(
                layers=sum(layer_bytes(kind, own) for kind, own in layers),
                ends=end_weight_bytes(spec, first=rank == 0, last=rank == last),
                cache=stage_cache_bytes(
                    spec,
                    reserve.lanes,
                    plan.model.windows[stage.first_layer : stage.end_layer],
                    settings.block_size,
                ),
                activations=activation_bytes(
                    spec, settings.max_num_batched_tokens, plan.batch if rank == last else 0
                ),
                graphs=graph_bytes(settings.max_num_seqs, stage.num_layers, devices[rank]),
                capacity=_capacity(plan, rank),
            )
        )
    return found


def layer_bytes(spec: ModelSpec, precisions: Mapping[str, str]) -> int:
    """Weights of one layer of a kind, with the precision of each of its linears."""
    matrices = sum(
        PRECISIONS[precisions[op.name]].weight_bytes(op.out_features, op.in_features)
        for op in spec.linears
    )
    return matrices + HALF * spec.layer_other_params


def activation_bytes(spec: ModelSpec, tokens: int, sampled: int) -> int:
    """An estimate of a step's activations; `sampled`: rows whose logits are computed, at fp32."""
    widest = max(op.out_features + op.in_features for op in spec.linears)
    return HALF * tokens * (2 * widest + spec.hidden_size) + SINGLE * sampled * spec.vocab_size


def _capacity(plan: Plan, rank: int) -> int:
    """What weights, cache and activations may take on a device of a stage."""
    stage = plan.stages[rank]
    return min(
        device.memory_bytes
        for device in plan.cluster.devices()
        if (device.node, device.type) == (stage.node, stage.devices[0])
    )
