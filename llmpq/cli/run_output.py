"""What `llmpq-run` tells: notes before and during a run, the report, and the last line."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmpq.artifact import write_json
from llmpq.cli.common import ARGUMENTS, console, emit, report_console
from llmpq.cli.run_options import RunOptions
from llmpq.errors import FailedRequests
from llmpq.plan_data import Plan
from llmpq.planned_kernels import COUNTED, kernel_lines
from llmpq.precision import PRECISIONS
from llmpq.run_report import Quality, Report, StageReport, duration

if TYPE_CHECKING:
    from rich.console import Console

    from llmpq.prompts.prompts import PromptFile
    from llmpq.prompts.result_stream import ResultStream
    from llmpq.reliability.journal import Results
    from llmpq.runtime.run_inputs import RunInputs

RETRIES = ("--resume", "--keep-errors")


def report_to(options: RunOptions) -> "Console":
    """Where the report goes: standard output, unless results or JSON have that."""
    return report_console(options.quiet, options.json_path, options.output)


def say_kernels(plan: Plan, stage: int, device: Any, dtype: Any, leads: bool, quiet: bool) -> None:
    """Once, when a stage is loaded: all lines where this worker leads, else those that differ."""
    from llmpq.quant import machine_here

    optional = any(PRECISIONS[p].library is not None for p in plan.stages[stage].precisions)
    for line in kernel_lines(plan, stage, machine_here(device, dtype, optional)):
        if leads or COUNTED in line:
            console(quiet).print(line, soft_wrap=True)


def say_engine(engine: Any, quiet: bool, before: str | None = None) -> str | None:
    """How a loaded stage computes, where that is worth a word; returns what was said of graphs.

    After a run, with what was said `before`: only what has changed, as capturing may fail late.
    """
    if not engine.worker.stage.shard.leads:
        return None
    note: str | None = engine.graphs_note()
    notes = engine.kernel_notes if before is None else []
    for line in [*notes, *([note] if note is not None and note != before else [])]:
        console(quiet).print(f"stage {engine.transport.rank}: {line}", soft_wrap=True)
    return note


def say_first(
    plan: Plan, options: RunOptions, inputs: "RunInputs", results: "Results | ResultStream"
) -> None:
    """What is to be known of the input and of earlier results before anything runs."""
    out, prompts = console(options.quiet), inputs.led_prompts
    if note := inputs.weights.note(plan.precisions):
        out.print(f"warning: {note}")
    for line in [*inputs.notes, *prompts.notes, *_on_format(prompts, options), *results.notes]:
        out.print(line, soft_wrap=True)
    if results.finished:
        out.print(f"resuming: {len(results.finished)} requests are already done")


def _on_format(prompts: "PromptFile", options: RunOptions) -> list[str]:
    """Which format was chosen for the output, where that is no matter of course."""
    if options.output_format != "auto":
        return []
    if prompts.is_mixed:
        return [
            "some prompts are OpenAI batch lines and others are not: all results are in llmpq's "
            "own format (--output-format openai for the other)"
        ]
    if prompts.form == "openai":
        return ["results are in OpenAI's batch format, as the prompts are (--output-format)"]
    return []


def write_report(report: Report, options: RunOptions) -> None:
    """Writes report.json and JSON where they are asked for, and tells the report's main figures."""
    if options.report is not None:
        write_json(options.report, report)
    emit(report.model_dump_json(indent=1), options.json_path)
    out = report_to(options)
    out.print(
        f"{report.num_requests} requests, {report.num_new_tokens} new tokens in "
        f"{duration(report.total_s)}: {report.tokens_per_s:.1f} tokens/s, "
        f"{report.requests_per_s:.3g} requests/s"
    )
    for stage in report.stages:
        _warn_of_memory(stage, options)
        if options.verbose:
            out.print(stage.model_dump_json())
    if report.predicted is not None:
        out.print(
            f"predicted {duration(report.predicted.total_s)}, "
            f"{report.predicted.tokens_per_s:.1f} tokens/s for the planned workload"
        )


def _warn_of_memory(stage: StageReport, options: RunOptions) -> None:
    sizes = {"prefill": stage.most_prefill_rows, "decode": stage.most_decode_rows}
    for phase, rows in sizes.items():
        if rows is not None:
            console(options.quiet).print(
                f"warning: stage {stage.rank} ran out of memory: {phase} continued with {rows} "
                "requests at once"
            )


def show_quality(quality: Quality, options: RunOptions) -> None:
    """What the precisions cost on a text, measured and predicted."""
    from llmpq.evaluation.quality_check import summary

    report_to(options).print(summary(quality))


def outcome(
    results: "Results | ResultStream",
    prompts: "PromptFile",
    options: RunOptions,
    under_torchrun: bool,
    dtype: str,
) -> FailedRequests | None:
    """Tells that all is done; where requests failed, returns the error that the command ends with.

    `dtype`: what the run computed in.
    """
    num_requests = len(prompts)
    place = "standard output" if options.streams else str(options.output)
    failed = len(results.failed)
    if not failed:
        what = f"all {num_requests} requests are done, none failed: {place}"
        report_to(options).print(what, soft_wrap=True)
        return None
    what = f"{failed} of {num_requests} requests failed; their lines in {place} say why"
    refused = {prompts.ids[number] for number in prompts.refused}
    if dtype.endswith("float16") and not dtype.endswith("bfloat16") and results.failed - refused:
        what += "; where activations overflow in float16, --dtype bfloat16 or float32 has more room"
    return FailedRequests(f"{what}; {_how_to_retry(options.output, under_torchrun)}")


def _how_to_retry(output: Path, under_torchrun: bool) -> str:
    context = click.get_current_context(silent=True)
    words = context.meta.get(ARGUMENTS) if context else None
    if str(output) == "-":
        return "to try them again, run with an --output that is a file, then with --resume"
    if words is None or under_torchrun:
        return "to try them again, run the same command with --resume"
    again = [word for word in words if word not in RETRIES]
    return f"to try them again: {shlex.join(['llmpq-run', *again, '--resume'])}"
