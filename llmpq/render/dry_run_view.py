"""The report of a dry run: tables of memory and loading, the prompts, kernels and how to start."""

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from llmpq.cluster import GIB, MIB
from llmpq.dry_run import DryRun, StagePreview
from llmpq.plan_data import Plan
from llmpq.render.plan_report import empty_table, expected_time


def print_dry_run(out: Console, plan: Plan, found: DryRun) -> None:
    """Prints the report of a dry run without its notes."""
    names = (found.model, plan.cluster.name, plan.workload.name)
    out.print("{} on {}, {}: what a run would do; nothing is loaded".format(*names))
    out.print(_memory_table(found.stages))
    out.print(_loading_table(found.stages))
    prompts, predicted = found.prompts, found.predicted
    out.print(
        f"prompts: {prompts.num_requests} requests, {prompts.num_prompt_tokens} tokens and at most "
        f"{prompts.num_new_tokens} new ones; longest prompt {prompts.longest_prompt_tokens}, "
        f"longest request {prompts.longest_tokens} tokens"
    )
    if predicted is not None:
        out.print(
            f"predicted for the planned workload: {predicted.tokens_per_s:.1f} tokens/s, "
            f"{expected_time(predicted)}"
        )
    for line in [*found.kernels, *found.cards, *found.launch]:
        out.print(line, soft_wrap=True)


def layer_counts(precisions: Sequence[str]) -> str:
    """Writes ["8", "8", "4"] as "2x8,1x4": layers x precision."""
    return ",".join(f"{len(list(group))}x{name}" for name, group in groupby(precisions))


def _memory_table(stages: Sequence[StagePreview]) -> Table:
    """Makes a table with a row per stage: what each of its devices holds."""
    unit, size = _unit(max(stage.total_bytes for stage in stages))
    table = empty_table(
        ["rank", "node", "device", "layers", "precisions"],
        ["weights", "KV cache", "activations", "messages", "total", "of"],
        f"Memory, {unit}",
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
            layer_counts(stage.precisions),
            *(f"{num_bytes / size:.2f}" for num_bytes in held),
            style="red" if stage.total_bytes > stage.memory_capacity_bytes else None,
        )
    return table


def _loading_table(stages: Sequence[StagePreview]) -> Table:
    """Makes a table with a row per stage: what it reads, and how long a micro-batch takes."""
    unit, size = _unit(max(stage.checkpoint_read_bytes for stage in stages))
    table = empty_table(
        ["rank"],
        [f"from checkpoint, {unit}", f"from cache, {unit}", "weights in cache"]
        + ["prefill ms", "decode step ms"],
        "Loading, and times of a micro-batch",
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
