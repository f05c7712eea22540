"""One worker's part of `llmpq-run`: input is read, the stage loaded, the batch run, and told.

The worker that leads writes results, the trace and the report.
"""

import os
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmpq.artifact import write_json
from llmpq.cli.common import ARGUMENTS, console, emit, report_console
from llmpq.cli.run_options import RunOptions, read_inputs
from llmpq.costs.float16 import run_overflow
from llmpq.errors import FailedRequests, InfeasibleError, UserError
from llmpq.plan_data import Plan
from llmpq.planned_kernels import COUNTED, kernel_lines
from llmpq.precision import is_optional
from llmpq.run_report import Report, RunCounts, make_report
from llmpq.seats import Seat, stage_ranks

if TYPE_CHECKING:
    from rich.console import Console

    from llmpq.evaluation.perplexity import Loss
    from llmpq.models.sharding import ShardGroup
    from llmpq.prompts.prompts import PromptFile
    from llmpq.prompts.result_stream import ResultStream
    from llmpq.reliability.journal import Results
    from llmpq.runtime.process import Role
    from llmpq.runtime.run_inputs import RunInputs

RETRIES = ("--resume", "--keep-errors")


def work(
    plan: Plan, options: RunOptions, role: "Role", on_seated: Callable[[int], object] = lambda _: 0
) -> FailedRequests | None:
    """Does this process's part of the run; returns the error of failed requests, if it leads.

    `on_seated` is told which worker of the plan this process is. The first one leads.
    """
    from llmpq.runtime.process import disconnect

    try:
        seats, inputs = _begin(plan, options, role, on_seated)
        return _work(plan, options, role, seats, inputs)
    finally:
        disconnect()


def _begin(
    plan: Plan, options: RunOptions, role: "Role", on_seated: Callable[[int], object]
) -> "tuple[list[Seat], RunInputs]":
    """Finds the workers' seats and reads the input; one worker per machine tells of bad input."""
    from llmpq.runtime.cards import find_seats

    worker = None
    try:
        seats, without_cards = find_seats(plan, role, options.device)
        worker, _ = seats[role.rank]
        on_seated(worker)
        if without_cards and worker == 0:
            _warn_of_cpu(plan, options)
        return seats, read_inputs(plan, options, leads=worker == 0)
    except UserError:
        if role.local_rank == 0 or worker == 0:  # the leader reads what others do not
            raise
        sys.exit(UserError.exit_code)  # the first worker on this machine finds and says the same


def _warn_of_cpu(plan: Plan, options: RunOptions) -> None:
    """Warns where a plan for GPUs runs on a machine that has none."""
    types = {device for stage in plan.stages for device in stage.devices}
    cards = sorted(name for name in types if plan.cluster.kind_of(name) == "gpu")
    if cards:
        console(options.quiet).print(
            f"warning: the plan is for {', '.join(cards)}, but torch sees no GPU here: its stages "
            "run on the CPU",
            soft_wrap=True,
        )


def _work(
    plan: Plan, options: RunOptions, role: "Role", seats: list[Seat], inputs: "RunInputs"
) -> FailedRequests | None:
    """Loads the stage and runs the batch, once every process knows its seat."""
    import torch

    from llmpq.reliability.ending import SUPERVISED
    from llmpq.reliability.monitor import restarts
    from llmpq.runtime.cards_here import claim_device
    from llmpq.runtime.process import all_gather, connect

    worker, _ = seats[role.rank]
    results = _open_results(plan, options, inputs) if worker == 0 else None
    under_torchrun = role.size > 1 and SUPERVISED not in os.environ
    ends = results is not None and needs_no_engine(results, inputs, options, restarts() > 0)
    if any(int(told) for told in all_gather(torch.tensor(int(ends)), role)):
        if results is None:
            return None
        with closing(results):
            say_first(plan, options, inputs, results)
        return outcome(results, inputs.led_prompts, options, under_torchrun, "")
    device = claim_device(plan, options.device, role, seats)
    transport, group = connect(role, device, stage_ranks(plan, seats))
    try:
        engine = _engine(plan, options, inputs, device, transport, group)
        stage = engine.worker.stage
        if stage.shard.leads:
            say_kernels(plan, transport.rank, device, stage.dtype, worker == 0, options.quiet)
        graphs_note = say_engine(engine, options.quiet)
        if results is None:
            _follow(engine, options)
            say_engine(engine, options.quiet, graphs_note)
            return None
        report, served = _lead(engine, plan, options, inputs, results)
        say_engine(engine, options.quiet, graphs_note)
        dtype = stage.dtype
        del engine, stage  # its memory is wanted for the layers of the 16-bit model
        unmeasured = _finish(report, served, options, inputs, dtype, device)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise InfeasibleError(
            f"stage {transport.rank} ran out of memory on {device}: {reason}"
        ) from None
    failed = outcome(results, inputs.led_prompts, options, under_torchrun, str(dtype))
    if failed is None or unmeasured is None:
        return failed or unmeasured
    return FailedRequests(f"{unmeasured}\n{failed}")


def _engine(
    plan: Plan,
    options: RunOptions,
    inputs: "RunInputs",
    device: Any,
    transport: Any,
    group: "ShardGroup | None",
) -> Any:
    """Builds the engine of this process, with the weights of its stage loaded."""
    from llmpq.checkpoint.packed_cache import NO_CACHE
    from llmpq.quant.humming_jit import keep_kernels_in
    from llmpq.render.loading import shown_compiling, shown_loading
    from llmpq.runtime.engine import StageEngine
    from llmpq.runtime.process import choose_dtype
    from llmpq.runtime.sampler import Sampling

    dtype = choose_dtype(options.dtype, device, transport)
    warning = run_overflow(plan.model.model_type, str(dtype).removeprefix("torch."))
    if warning and transport.rank == 0:
        console(options.quiet).print(warning, soft_wrap=True)
    if options.cache_dir is not None and device.type == "cuda":
        keep_kernels_in(options.cache_dir)
    quiet = options.quiet or (group is not None and group.rank > 0)  # one worker per stage tells
    cache = inputs.cache or NO_CACHE
    with shown_loading(plan, transport.rank, quiet, cache) as packed:
        return StageEngine(
            plan,
            inputs.config,
            inputs.weights,
            transport,
            dtype,
            device,
            Sampling(options.temperature, options.top_k, options.top_p, options.seed),
            inputs.eos_ids,
            roundings=inputs.roundings,
            packed=packed,
            group=group,
            graphs=options.graphs,
            batch_invariant=options.batch_invariant,
            on_compiled=shown_compiling(transport.rank, options.quiet),
        )


# ---- the batch


def _open_results(plan: Plan, options: RunOptions, inputs: "RunInputs") -> "Results | ResultStream":
    from llmpq.runtime.run_results import ResultFile, open_results

    shared = ("dtype", "temperature", "top_p", "top_k", "seed", "ignore_eos")
    output = ResultFile(
        None if options.streams else options.output,
        {name: getattr(options, name) for name in shared},
        options.output_format,
        options.resume,
        options.keep_errors,
        options.fsync,
    )
    return open_results(plan, inputs, output)


def needs_no_engine(
    results: "Results | ResultStream", inputs: "RunInputs", options: RunOptions, restarted: bool
) -> bool:
    """Whether every request is done, and nothing is asked for that only a loaded model tells.

    `restarted`: torchrun has started this run again; what failed in it has been reported.
    """
    if len(results.finished) < len(inputs.led_prompts):
        return False
    measures = options.check_quality or options.trace is not None or options.has_report
    return not measures or (restarted and bool(results.failed))


def _follow(engine: Any, options: RunOptions) -> None:
    """Does the part of a worker that does not lead."""
    from llmpq.evaluation.pipeline_loss import follow_text

    engine.start_clock(trace=options.trace is not None)
    engine.follow()
    engine.measure(options.has_report)
    if options.trace is not None:
        engine.trace()
    if options.check_quality:
        follow_text(engine)


def _lead(
    engine: Any,
    plan: Plan,
    options: RunOptions,
    inputs: "RunInputs",
    results: "Results | ResultStream",
) -> "tuple[Report, Loss | None]":
    """Runs the requests; returns the report, and the loss of the served weights if checked."""
    from llmpq.evaluation.pipeline_loss import lead_text
    from llmpq.render.progress import progress
    from llmpq.render.trace_file import write_measured
    from llmpq.runtime.collector import Collector, samplings_of, stops_of
    from llmpq.runtime.sampler import Sampling

    out, prompts = console(options.quiet), inputs.led_prompts
    say_first(plan, options, inputs, results)
    todo = prompts.todo(results.finished)
    run = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    with progress(out, "requests", len(todo)) as shown, closing(results):
        collector = Collector(results, inputs.tokenizer, shown.update, shown.is_due)
        collector.refuse(prompts)
        engine.start_clock(trace=options.trace is not None)
        collector.started = time.perf_counter()
        engine.lead(
            todo,
            prompts.request,
            collector.finish,
            collector.after_job,
            options.refill,
            options.prefill_chunk,
            samplings_of(prompts, run),
            stops_of(inputs.tokenizer),
        )
        total_s = time.perf_counter() - collector.started
        results.check_files()
        stages = engine.measure(options.has_report)
    if options.trace is not None:
        write_measured(options.trace, plan, engine.trace())
    done = collector.num_done, collector.num_failed, collector.num_tokens
    report = make_report(plan, RunCounts(*done, collector.begun_s, total_s), stages)
    if inputs.windows is None:
        return report, None
    with progress(out, "checking quality, windows", len(inputs.windows)) as shown:
        return report, lead_text(engine, inputs.windows, shown.update)


def _finish(
    report: Report,
    served: "Loss | None",
    options: RunOptions,
    inputs: "RunInputs",
    dtype: Any,
    device: Any,
) -> FailedRequests | None:
    """Measures the 16-bit model for comparison, when the other stages are done, and reports.

    Returns an error where the quality could not be measured.
    """
    from llmpq.evaluation.quality_check import check_text, compare, sixteen_bits, summary
    from llmpq.render.progress import progress

    if served is None:
        _write_report(report, options)
        return None
    if options.report is not None:
        write_json(options.report, report)  # the comparison may fail
    windows = inputs.windows
    num_layers, out = inputs.config.num_hidden_layers, console(options.quiet)
    with progress(out, "16 bits for comparison, layers", num_layers) as shown:
        base = sixteen_bits(inputs.config, inputs.weights, windows, dtype, device, shown.update)
    quality = compare(report, served, base, options.check_text, windows.shape[1])
    _write_report(report.model_copy(update={"quality": quality}), options)
    if quality is None:
        return FailedRequests(
            f"the quality could not be measured: the loss on {check_text(options.check_text).name} "
            "is not a finite number, as activations became NaN or infinite"
        )
    report_to(options).print(summary(quality))
    return None


# ---- what is told


def report_to(options: RunOptions) -> "Console":
    """Returns the console for the report: standard output, unless results or JSON have that."""
    return report_console(options.quiet, options.json_path, options.output)


def say_kernels(plan: Plan, stage: int, device: Any, dtype: Any, leads: bool, quiet: bool) -> None:
    """Prints which kernels serve a loaded stage; a worker that does not lead, only differences."""
    from llmpq.quant import machine_here

    optional = any(map(is_optional, plan.stages[stage].precisions))
    for line in kernel_lines(plan, stage, machine_here(device, dtype, optional)):
        if leads or COUNTED in line:
            console(quiet).print(line, soft_wrap=True)


def say_engine(engine: Any, quiet: bool, before: str | None = None) -> str | None:
    """Prints how a loaded stage computes; returns the note on CUDA graphs, if there is one.

    `before`: that note before the run; then only a change is printed, as capturing may fail late.
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
    """Prints notes on the input and on earlier results, before anything runs."""
    from llmpq.runtime.run_results import format_notes

    out, prompts = console(options.quiet), inputs.led_prompts
    if note := inputs.weights.note(plan.precisions):
        out.print(f"warning: {note}")
    on_format = format_notes(prompts, options.output_format)
    for line in [*inputs.notes, *prompts.notes, *on_format, *results.notes]:
        out.print(line, soft_wrap=True)
    if results.finished:
        out.print(f"resuming: {len(results.finished)} requests are already done")


def _write_report(report: Report, options: RunOptions) -> None:
    """Writes report.json and JSON where they are asked for, and tells the report's main figures."""
    from llmpq.render.run_view import memory_warnings, print_run

    if options.report is not None:
        write_json(options.report, report)
    emit(report.model_dump_json(indent=1), options.json_path)
    print_run(report_to(options), report, options.verbose)
    for line in memory_warnings(report):
        console(options.quiet).print(line)


def outcome(
    results: "Results | ResultStream",
    prompts: "PromptFile",
    options: RunOptions,
    under_torchrun: bool,
    dtype: str,
) -> FailedRequests | None:
    """Prints that all is done, or returns the error that the command ends with.

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
