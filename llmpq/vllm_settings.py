"""How vLLM is started for a plan: its options, and what it takes of each device's memory.

vLLM cuts the cache into blocks of tokens and has as many of them on every stage as the stage with
the least room has (`get_kv_cache_configs` of vllm/v1/core/kv_cache_utils.py). So that each request
in flight has the room that the plan gives it, `kv_cache_bytes` is what the stage with the most
layers needs. All functions are pure.

Not covered: how vLLM forms micro-batches. It decides for itself which requests are computed
together; only their number and the tokens of a step are limited as in the plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llmpq.cluster import MIB
from llmpq.job import LaneShape
from llmpq.machine import BFLOAT16_CAPABILITY
from llmpq.model_spec import ModelSpec
from llmpq.plan_data import Plan, reserve_of
from llmpq.vllm_support import BLOCK_TOKENS, VllmDevice, vllm_device

HALF = 2  # bytes of a value of the cache
# Memory of vLLM's CUDA graphs, an estimate: 6 MiB a graph of 16 layers (vLLM pull request 11349),
# for as many numbers of rows as `_set_cudagraph_sizes` of vllm/config/vllm.py lists: 1, 2, 4,
# multiples of 8 below 256, multiples of 16 from there, up to twice `max_num_seqs` or 512.
GRAPH_LAYER_BYTES = 6 * MIB // 16
MOST_GRAPH_ROWS = 512


@dataclass(frozen=True)
class VllmSettings:
    """Options of vLLM's engine for a plan. `partition`: the number of layers of each stage."""

    partition: tuple[int, ...]
    tensor_parallel: int
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_cache_bytes: int
    on_cpu: bool

    def engine(self) -> dict[str, object]:
        """The arguments of `vllm.LLM`, beside the model; `vllm serve` has them with dashes."""
        return {
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "pipeline_parallel_size": len(self.partition),
            "tensor_parallel_size": self.tensor_parallel,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "block_size": self.block_size,
            "kv_cache_memory_bytes": self.kv_cache_bytes,
        }

    def environment(self) -> dict[str, str]:
        """Variables that every process of vLLM needs."""
        if len(self.partition) == 1:
            return {}
        return {"VLLM_PP_LAYER_PARTITION": ",".join(map(str, self.partition))}


def vllm_settings(plan: Plan) -> VllmSettings:
    """The settings for a plan that vLLM can run, on devices of one kind."""
    reserve, devices = reserve_of(plan), stage_devices(plan)
    on_cpu = devices[0].kind == "cpu"
    old = any(one.kind == "cuda" and one.capability < BFLOAT16_CAPABILITY for one in devices)
    tokens, degree = BLOCK_TOKENS[devices[0].kind], plan.stages[0].tensor_parallel
    partition = tuple(stage.num_layers for stage in plan.stages)
    spec = plan.model.shard(degree)
    return VllmSettings(
        partition=partition,
        tensor_parallel=degree,
        dtype="float16" if old else "bfloat16",
        max_model_len=min(max(lane.tokens for lane in reserve.lanes), plan.model.max_positions),
        max_num_seqs=plan.batch,
        max_num_batched_tokens=max(plan.prefill_micro_batch * reserve.chunk_tokens, plan.batch),
        block_size=tokens,
        kv_cache_bytes=max(
            stage_cache_bytes(
                spec, reserve.lanes, plan.model.windows[stage.first_layer : stage.end_layer], tokens
            )
            for stage in plan.stages
        ),
        on_cpu=on_cpu,
    )


def stage_devices(plan: Plan) -> list[VllmDevice]:
    """The device of each stage as vLLM sees it."""
    return [vllm_device(plan.cluster, stage.devices[0]) for stage in plan.stages]


def stage_cache_bytes(
    spec: ModelSpec,
    lanes: Sequence[LaneShape],
    windows: Sequence[int | None],
    block_tokens: int,
) -> int:
    """Bytes of the cache of a stage: whole blocks for each slot, and vLLM's empty block.

    `windows`: of each of its layers. Where some layers have a window and some have none, vLLM puts
    layers of a kind into groups of one size, each with blocks of its own, and one block more for
    each (`_get_kv_cache_groups_uniform_page_size`). Counted here as if windows bound nothing: read
    from its source, not run.
    """
    layers, with_window = len(windows), sum(window is not None for window in windows)
    blocks = sum(lane.rows * -(-lane.tokens // block_tokens) for lane in lanes)
    block_bytes = block_tokens * spec.kv_values_per_token * HALF
    less, more = sorted((with_window, layers - with_window))
    if not less:
        return (1 + blocks) * layers * block_bytes
    size = more if 2 * more < 3 * less else less
    groups = -(-less // size) + -(-more // size)
    rows = sum(lane.rows for lane in lanes)
    return (1 + groups * (blocks + rows)) * size * block_bytes


def graph_bytes(max_num_seqs: int, layers: int, device: VllmDevice) -> int:
    """An estimate of what vLLM's CUDA graphs take on a stage of `layers` layers; 0 on a CPU."""
    if device.kind == "cpu":
        return 0
    most = min(2 * max_num_seqs, MOST_GRAPH_ROWS)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, MOST_GRAPH_ROWS + 1, 16)]
    return sum(size <= most for size in sizes) * layers * GRAPH_LAYER_BYTES
