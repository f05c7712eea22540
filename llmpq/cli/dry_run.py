"""`llmpq-run --dry-run`: what would be loaded where, what it takes, how long; nothing is loaded.

All input is checked as for a run: plan, model folder (every tensor's presence and shape, by the
headers of its files), prompts, output. Memory is what the planner counts for the plan's own
workload, of each device where several share a stage; times are the plan's predictions.

Cards are compared with the plan where this machine has some and is the plan's only node or has a
node's name. Not covered: other machines' cards and disks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import click

from llmpq.artifact import SCHEMA_VERSION, Provenance, Strict
from llmpq.cli.common import ARGUMENTS, console, emit
from llmpq.cli.dry_cards import card_lines, stage_cards
from llmpq.cli.kernel_notes import kernel_lines
from llmpq.cli.run_options import RunOptions
from llmpq.cluster import GIB, MIB
from llmpq.costs.latency import machine_of
from llmpq.costs.memory import StageMemory, run_sizes, stage_memory
from llmpq.errors import UserError
from llmpq.launch import launch_lines
from llmpq.plan_data import Plan, Predicted
from llmpq.workload import planned_lengths

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

    from llmpq.cli.run_input import Prepared
    from llmpq.models.stage_model import StageModel


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
    """What --json writes."""

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
class Files:
    """What a stage reads."""

    checkpoint_bytes: int = 0
    packed_bytes: int = 0
    num_quantized: int = 0
    num_packed: int = 0


def show(plan: Plan, options: RunOptions) -> None:
    """Checks all input, prints what would be done, and writes it where --json says."""
    from llmpq.cli.run_input import prepare

    prepared = prepare(plan, options)
    assert prepared.prompts is not None
    stages = [
        _stage(plan, rank, _files(plan, rank, options, prepared))
        for rank in range(len(plan.stages))
    ]
    lengths = list(prepared.prompts.todo(()).values())
    prompts = _prompts(plan, lengths)
    found = DryRun(
        model=plan.model.name,
        stages=stages,
        prompts=prompts,
        kernels=_kernels(plan, options),
        launch=launch_lines(plan, _words()),
        cards=card_lines(plan, options),
        predicted=plan.predicted,
        notes=[
            *_notes(plan, stages, prompts, prepared.weights.note(plan.precisions)),
            *prepared.notes,
            *prepared.prompts.notes,
        ],
        provenance=Provenance.here(),
    )
    emit(found.model_dump_json(indent=1), options.json_path)
    render(console(options.quiet), plan, found)


def _words() -> list[str]:
    """The command line, less what makes it a dry run and what a dry run alone writes."""
    words, kept = list(click.get_current_context().meta[ARGUMENTS]), []
    while words:
        word = words.pop(0)
        if word == "--json":
            words = words[1:]
        elif word != "--dry-run" and not word.startswith("--json="):
            kept.append(word)
    return kept


def compressed(precisions: Sequence[str]) -> str:
    """["8", "8", "4"] as "2x8,1x4": layers x precision."""
    return ",".join(f"{len(list(group))}x{name}" for name, group in groupby(precisions))


def memory_of(plan: Plan, rank: int) -> StageMemory:
    """What each device of a stage holds, as the planner counts it."""
    stage = plan.stages[rank]
    return stage_memory(
        plan.model.shard(stage.tensor_parallel),
        stage.precisions,
        first=rank == 0,
        last=rank == len(plan.stages) - 1,
        sizes=run_sizes(plan),
        machine=machine_of(plan.cluster, stage.devices[0]),
    )


def _stage(plan: Plan, rank: int, files: Files) -> StagePreview:
    from llmpq.planner.evaluate import to_assignment

    stage, memory = plan.stages[rank], memory_of(plan, rank)
    times = plan.predicted.stages[rank] if plan.predicted else None
    place = to_assignment(plan, plan.cluster).setting.places[rank]
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
        memory_capacity_bytes=place.memory_bytes,
        checkpoint_read_bytes=files.checkpoint_bytes,
        packed_read_bytes=files.packed_bytes,
        num_quantized_weights=files.num_quantized,
        num_packed_weights=files.num_packed,
        prefill_s=times.prefill_s if times else None,
        decode_step_s=times.decode_step_s if times else None,
    )


def _files(plan: Plan, rank: int, options: RunOptions, prepared: "Prepared") -> Files:
    """What the devices of a stage read. Raises `UserError` where a tensor is not as it must be."""
    from llmpq.models.sharding import Shard
    from llmpq.models.stage_model import LayerRange, StageModel

    stage = plan.stages[rank]
    device, dtype = _device(plan, rank, options)
    layers = LayerRange(stage.first_layer, stage.end_layer, plan.model.num_layers)
    shards = [Shard(index, stage.tensor_parallel) for index in range(stage.tensor_parallel)]
    models = [
        StageModel(prepared.config, layers, stage.precisions, dtype, device, shard)
        for shard in shards
    ]
    return _sum([_files_of(model, prepared) for model in models])


def _device(plan: Plan, rank: int, options: RunOptions) -> "tuple[torch.device, torch.dtype]":
    """What a stage would take on this machine: the card that suits its plan, else the CPU."""
    import torch

    from llmpq.runtime.process import NO_CUDA, choose_dtype

    card = stage_cards(plan, options).get(rank)
    if card is None and options.device == "cuda" and not torch.cuda.is_available():
        raise UserError(NO_CUDA)
    device = torch.device("cpu") if card is None else torch.device("cuda", card.index)
    return device, choose_dtype(options.dtype, device)


def _kernels(plan: Plan, options: RunOptions) -> list[str]:
    """A line for each device type and precision: kernels here, or of the card that is not here."""
    from llmpq.quant import machine_here

    lines: dict[str, None] = {}
    for rank, stage in enumerate(plan.stages):
        machine = machine_of(plan.cluster, stage.devices[0])
        device, dtype = _device(plan, rank, options)
        if device.type == machine.kind:
            machine = machine_here(device, dtype)
        lines |= dict.fromkeys(kernel_lines(plan, rank, machine))
    return list(lines)


def _sum(parts: Sequence[Files]) -> Files:
    return Files(*(sum(getattr(part, name) for part in parts) for name in Files.__annotations__))


def _files_of(stage: "StageModel", prepared: "Prepared") -> Files:
    """What one device reads."""
    from llmpq.checkpoint.loader import raw_tensors
    from llmpq.checkpoint.packed_cache import packs

    found, cache = [], prepared.cache
    for raw, name in raw_tensors(stage, prepared.weights):
        rounding = prepared.roundings.of(name)
        num_bytes, part = prepared.weights.stored_bytes(name, raw.shape), raw.part(rounding)
        if part is not None:
            num_bytes = num_bytes * part.size // part.whole
        kept = cache.num_bytes(raw, name) if cache else None
        is_quantized = packs(raw) is not None
        found.append(Files(num_bytes, 0, is_quantized) if kept is None else Files(0, kept, 1, 1))
    return _sum(found)


def _prompts(plan: Plan, lengths: Sequence[tuple[int, int]]) -> PromptsPreview:
    return PromptsPreview(
        num_requests=len(lengths),
        num_prompt_tokens=sum(prompt for prompt, _ in lengths),
        num_new_tokens=sum(new for _, new in lengths),
        longest_prompt_tokens=max((prompt for prompt, _ in lengths), default=0),
        longest_tokens=max((prompt + new for prompt, new in lengths), default=0),
        longest_planned_tokens=max(p + new for p, new in planned_lengths(plan.workload)),
    )


def _notes(
    plan: Plan, stages: Sequence[StagePreview], prompts: PromptsPreview, on_weights: str | None
) -> list[str]:
    notes = [on_weights] if on_weights else []
    for stage in stages:
        short = stage.total_bytes - stage.memory_capacity_bytes
        if short > 0:
            notes.append(
                f"stage {stage.rank} ({stage.devices[0]} on {stage.node}) needs "
                f"{short / MIB:.2f} MiB more than its device has; llmpq-plan --evaluate says more"
            )
    if prompts.longest_tokens > prompts.longest_planned_tokens:
        notes.append(
            f"the longest request takes {prompts.longest_tokens} tokens, the plan foresaw at most "
            f"{prompts.longest_planned_tokens}: times and memory will be others"
        )
    if plan.predicted is None:
        notes.append("the plan has no predictions: llmpq-plan --evaluate PLAN.json makes them")
    return notes


def render(out: "Console", plan: Plan, found: DryRun) -> None:
    """For people."""
    from llmpq.planner.report import expected_time, noted

    names = (found.model, plan.cluster.name, plan.workload.name)
    out.print("{} on {}, {}: what a run would do; nothing is loaded".format(*names))
    out.print(_memory_table(found.stages))
    out.print(_loading_table(found.stages))
    prompts, predicted = found.prompts, found.predicted
    out.print(
        f"prompts: {prompts.num_requests} requests, {prompts.num_prompt_tokens} tokens and "
        f"{prompts.num_new_tokens} new ones at most; longest prompt "
        f"{prompts.longest_prompt_tokens}, longest request {prompts.longest_tokens} tokens"
    )
    if predicted is not None:
        out.print(
            f"predicted for the planned workload: {predicted.tokens_per_s:.1f} tokens/s, "
            f"{expected_time(predicted)}"
        )
    for line in [*found.kernels, *found.cards, *found.launch]:
        out.print(line, soft_wrap=True)
    for note in found.notes:
        out.print(noted(note))


def _memory_table(stages: Sequence[StagePreview]) -> "Table":
    """One row a stage: what each of its devices holds."""
    from llmpq.planner.report import empty_table

    unit, size = _unit(max(stage.total_bytes for stage in stages))
    table = empty_table(
        ["rank", "node", "device", "layers", "precisions"],
        ["weights", "KV cache", "activations", "messages", "total", "of"],
        f"memory, {unit}",
    )
    for stage in stages:
        count = f"{len(stage.devices)} x " if len(stage.devices) > 1 else ""
        held = (
            stage.weights_bytes,
            stage.cache_bytes,
            stage.activation_bytes,
            stage.buffer_bytes,
            stage.total_bytes,
            stage.memory_capacity_bytes,
        )
        table.add_row(
            str(stage.rank),
            stage.node,
            f"{count}{stage.devices[0]}",
            f"{stage.first_layer}-{stage.end_layer - 1}",
            compressed(stage.precisions),
            *(f"{num_bytes / size:.2f}" for num_bytes in held),
            style="red" if stage.total_bytes > stage.memory_capacity_bytes else None,
        )
    return table


def _loading_table(stages: Sequence[StagePreview]) -> "Table":
    """One row a stage: what is read, and what a micro-batch takes."""
    from llmpq.planner.report import empty_table

    unit, size = _unit(max(stage.checkpoint_read_bytes for stage in stages))
    table = empty_table(
        ["rank"],
        [f"from checkpoint, {unit}", f"from cache, {unit}", "packed before"]
        + ["prefill ms", "decode step ms"],
        "loading and times of a micro-batch",
    )
    for stage in stages:
        table.add_row(
            str(stage.rank),
            f"{stage.checkpoint_read_bytes / size:.2f}",
            f"{stage.packed_read_bytes / size:.2f}",
            f"{stage.num_packed_weights} of {stage.num_quantized_weights}",
            _ms(stage.prefill_s),
            _ms(stage.decode_step_s),
        )
    return table


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


def _unit(num_bytes: int) -> tuple[str, int]:
    return ("GiB", GIB) if num_bytes >= GIB else ("MiB", MIB)
