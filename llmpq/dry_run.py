"""What a run of a plan would load where, what it takes and how long; nothing is loaded.

All input has been read and checked as for a run (`runtime.run_inputs`); every tensor's presence and
shape is checked here, by the headers of its file. Memory is what the planner counts for the plan's
own workload, of each device where several share a stage; times are the plan's predictions.

Cards are compared with the plan where this machine has some and is the plan's only node or has a
node's name. Not covered: other machines' cards and disks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llmpq.artifact import SCHEMA_VERSION, Provenance, Strict
from llmpq.cluster import MIB
from llmpq.costs.latency import machine_of
from llmpq.costs.memory import StageMemory, run_sizes, stage_memory
from llmpq.errors import UserError
from llmpq.launch import launch_lines
from llmpq.plan_data import Plan, Predicted
from llmpq.planned_kernels import kernel_lines
from llmpq.workload import planned_lengths

if TYPE_CHECKING:
    import torch

    from llmpq.models.stage_model import StageModel
    from llmpq.placement import FoundCard
    from llmpq.runtime.run_inputs import RunInputs


class StagePreview(Strict):
    """One stage. Memory is that of each of its devices, files are what all of them read.

    `num_packed_weights` of `num_quantized_weights` need no rounding, as --cache-dir has them.
    """

    rank: int
    node: str
    devices: list[str]
    first_layer: int
    end_layer: int
    precisions: list[str]
    weights_bytes: int
    cache_bytes: int
    activation_bytes: int
    buffer_bytes: int
    total_bytes: int
    memory_capacity_bytes: int
    checkpoint_read_bytes: int
    packed_read_bytes: int
    num_quantized_weights: int
    num_packed_weights: int
    prefill_s: float | None
    decode_step_s: float | None


class PromptsPreview(Strict):
    """The requests of the prompts file, in tokens; `longest` are of single requests."""

    num_requests: int
    num_prompt_tokens: int
    num_new_tokens: int
    longest_prompt_tokens: int
    longest_tokens: int
    longest_planned_tokens: int


class DryRun(Strict):
    """What a run would do; --json writes it."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["dry_run"] = "dry_run"
    model: str
    stages: list[StagePreview]
    prompts: PromptsPreview
    kernels: list[str] = []
    launch: list[str] = []
    cards: list[str] = []
    predicted: Predicted | None
    notes: list[str]
    provenance: Provenance


@dataclass(frozen=True)
class ReadBytes:
    """What a stage, or a device of it, reads."""

    checkpoint: int = 0
    packed: int = 0
    num_quantized: int = 0
    num_packed: int = 0


def dry_run(
    plan: Plan, inputs: "RunInputs", device: str, dtype: str, words: Sequence[str]
) -> DryRun:
    """Finds out what a run of the plan on these inputs would do.

    `device` and `dtype` are what the command line says, `words` the options of the run that the
    launch lines repeat. Raises `UserError` where a tensor is missing or has another shape.
    """
    from llmpq.runtime.cards_here import card_lines, stage_cards

    cards = stage_cards(plan, device)
    places = [_device(cards.get(rank), device, dtype) for rank in range(len(plan.stages))]
    stages = [_stage(plan, rank, inputs, place) for rank, place in enumerate(places)]
    prompts = _prompts(plan, list(inputs.led_prompts.todo(()).values()))
    on_weights = inputs.weights.note(plan.precisions)
    return DryRun(
        model=plan.model.name,
        stages=stages,
        prompts=prompts,
        kernels=_kernels(plan, places),
        launch=launch_lines(plan, words),
        cards=card_lines(plan, device),
        predicted=plan.predicted,
        notes=[
            *([on_weights] if on_weights else []),
            *_notes(plan, stages, prompts),
            *inputs.notes,
            *inputs.led_prompts.notes,
        ],
        provenance=Provenance.here(),
    )


def memory_of(plan: Plan, rank: int) -> StageMemory:
    """Returns what each device of a stage holds, as the planner counts it."""
    stage = plan.stages[rank]
    return stage_memory(
        plan.model.shard(stage.tensor_parallel),
        stage.precisions,
        first=rank == 0,
        last=rank == len(plan.stages) - 1,
        kinds=plan.model.kind_of_layers[stage.first_layer : stage.end_layer],
        sizes=run_sizes(plan),
        machine=machine_of(plan.cluster, stage.devices[0]),
    )


def _stage(
    plan: Plan, rank: int, inputs: "RunInputs", place: "tuple[torch.device, torch.dtype]"
) -> StagePreview:
    from llmpq.planner.evaluate import to_assignment

    stage, memory, read = plan.stages[rank], memory_of(plan, rank), _read(plan, rank, inputs, place)
    times = plan.predicted.stages[rank] if plan.predicted else None
    return StagePreview(
        rank=rank,
        node=stage.node,
        devices=stage.devices,
        first_layer=stage.first_layer,
        end_layer=stage.end_layer,
        precisions=stage.precisions,
        weights_bytes=memory.weights,
        cache_bytes=memory.cache,
        activation_bytes=memory.activations,
        buffer_bytes=memory.buffers,
        total_bytes=memory.total,
        memory_capacity_bytes=to_assignment(plan, plan.cluster)
        .configuration.stage_devices[rank]
        .memory_bytes,
        checkpoint_read_bytes=read.checkpoint,
        packed_read_bytes=read.packed,
        num_quantized_weights=read.num_quantized,
        num_packed_weights=read.num_packed,
        prefill_s=times.prefill_s if times else None,
        decode_step_s=times.decode_step_s if times else None,
    )


def _device(
    card: "FoundCard | None", device: str, dtype: str
) -> "tuple[torch.device, torch.dtype]":
    """Returns what a stage would compute on here: its card, or the CPU where it has none."""
    import torch

    from llmpq.runtime.process import NO_CUDA, choose_dtype

    if card is None and device == "cuda" and not torch.cuda.is_available():
        raise UserError(NO_CUDA)
    chosen = torch.device("cpu") if card is None else torch.device("cuda", card.index)
    return chosen, choose_dtype(dtype, chosen)


def _read(
    plan: Plan, rank: int, inputs: "RunInputs", place: "tuple[torch.device, torch.dtype]"
) -> ReadBytes:
    """Counts what the devices of a stage read; raises `UserError` where a tensor is wrong."""
    from llmpq.models.sharding import Shard
    from llmpq.models.stage_model import LayerRange, StageModel

    stage, (device, dtype) = plan.stages[rank], place
    layers = LayerRange(stage.first_layer, stage.end_layer, plan.model.num_layers)
    shards = [Shard(index, stage.tensor_parallel) for index in range(stage.tensor_parallel)]
    models = [
        StageModel(inputs.config, layers, stage.precisions, dtype, device, shard)
        for shard in shards
    ]
    return _sum([_read_by(model, inputs) for model in models])


def _read_by(stage: "StageModel", inputs: "RunInputs") -> ReadBytes:
    """Counts what one device reads."""
    from llmpq.checkpoint.loader import raw_tensors
    from llmpq.checkpoint.packed_cache import packs

    found, cache = [], inputs.cache
    for raw, name in raw_tensors(stage, inputs.weights):
        num_bytes = inputs.weights.stored_bytes(name, raw.shape)
        part = raw.part(inputs.roundings.of(name))
        if part is not None:
            num_bytes = num_bytes * part.size // part.whole
        kept = cache.num_bytes(raw, name) if cache else None
        unkept = ReadBytes(num_bytes, 0, int(packs(raw) is not None))
        found.append(unkept if kept is None else ReadBytes(0, kept, 1, 1))
    return _sum(found)


def _sum(parts: Sequence[ReadBytes]) -> ReadBytes:
    names = ReadBytes.__annotations__
    return ReadBytes(*(sum(getattr(part, name) for part in parts) for name in names))


def _kernels(plan: Plan, places: "Sequence[tuple[torch.device, torch.dtype]]") -> list[str]:
    """Returns a line per device type and precision: kernels here, or of a card elsewhere."""
    from llmpq.quant import machine_here

    lines: dict[str, None] = {}
    for rank, (device, dtype) in enumerate(places):
        machine = machine_of(plan.cluster, plan.stages[rank].devices[0])
        if device.type == machine.kind:
            machine = machine_here(device, dtype)
        lines |= dict.fromkeys(kernel_lines(plan, rank, machine))
    return list(lines)


def _prompts(plan: Plan, lengths: Sequence[tuple[int, int]]) -> PromptsPreview:
    return PromptsPreview(
        num_requests=len(lengths),
        num_prompt_tokens=sum(prompt for prompt, _ in lengths),
        num_new_tokens=sum(new for _, new in lengths),
        longest_prompt_tokens=max((prompt for prompt, _ in lengths), default=0),
        longest_tokens=max((prompt + new for prompt, new in lengths), default=0),
        longest_planned_tokens=max(p + new for p, new in planned_lengths(plan.workload)),
    )


def _notes(plan: Plan, stages: Sequence[StagePreview], prompts: PromptsPreview) -> list[str]:
    notes = []
    for stage in stages:
        short = stage.total_bytes - stage.memory_capacity_bytes
        if short > 0:
            notes.append(
                f"stage {stage.rank} ({stage.devices[0]} on {stage.node}) needs "
                f"{short / MIB:.2f} MiB more than its device has; llmpq-plan --evaluate says more"
            )
    if prompts.longest_tokens > prompts.longest_planned_tokens:
        notes.append(
            f"the longest request takes {prompts.longest_tokens} tokens, the plan expects at most "
            f"{prompts.longest_planned_tokens}: times and memory will differ from the prediction"
        )
    if plan.predicted is None:
        notes.append("the plan has no predictions: llmpq-plan --evaluate PLAN.json makes them")
    return notes
