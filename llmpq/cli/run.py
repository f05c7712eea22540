"""`llmpq-run`: executes a plan on prompts, under torchrun or alone."""

import os
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmpq.artifact import Provenance, write_json
from llmpq.cli.common import ARGUMENTS, Command, common_options, console, emit
from llmpq.cli.progress import Progress, progress
from llmpq.errors import InfeasibleError, UserError, WorkerError
from llmpq.model_spec import load_model_spec
from llmpq.plan import Plan, load_plan, refuse_shared_stages
from llmpq.report import Report, StageReport
from llmpq.workload import request_lengths

if TYPE_CHECKING:
    from llmpq.runtime.batching import Request
    from llmpq.runtime.checkpoint import Checkpoint
    from llmpq.runtime.evaluate import Loss
    from llmpq.runtime.process import Role
    from llmpq.runtime.prompts import ResultFile
    from llmpq.runtime.roundings import Roundings

DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RunOptions:
    """What the command line asked for."""

    plan: Path
    prompts: Path
    output: Path
    report: Path | None
    json_path: Path | None
    model: str | None
    moments: Path | None
    check_quality: bool
    check_text: Path | None
    check_windows: int | None
    resume: bool
    temperature: float
    top_p: float
    top_k: int
    seed: int
    ignore_eos: bool
    device: str
    dtype: str
    quiet: bool
    verbose: bool


@click.command(cls=Command)
@click.option("--plan", required=True, type=click.Path(path_type=Path), help="plan.json")
@click.option("--prompts", required=True, type=click.Path(path_type=Path), help="prompts.jsonl")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="out.jsonl")
@click.option("--report", type=click.Path(path_type=Path), help="Where to write report.json.")
@click.option("--model", help="The model's directory, where it is not the plan's own.")
@click.option(
    "--moments", type=click.Path(path_type=Path), help="Second moments, where not at the plan's."
)
@click.option(
    "--check-quality", is_flag=True, help="Perplexity of the served weights against 16 bits."
)
@click.option(
    "--check-text", type=click.Path(path_type=Path), help="For that; default: shipped text."
)
@click.option(
    "--check-windows", type=click.IntRange(min=1), help="Of 256 tokens; default: 80 at most."
)
@click.option("--resume", is_flag=True, help="Keep finished requests of OUTPUT, do the others.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, help="0: greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0)
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="0: all tokens.")
@click.option("--seed", type=int, default=0)
@click.option("--ignore-eos", is_flag=True, help="Always generate all new tokens.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--dtype", type=click.Choice(DTYPE_NAMES), default="auto")
@common_options
def main(**flags: Any) -> None:
    """Generate for every prompt with the stages of a plan.

    Under torchrun each process is one stage:

      torchrun --nproc-per-node 3 -m llmpq.run --plan P.json --prompts IN.jsonl --output OUT.jsonl

    Without torchrun the processes are started here, on this machine.
    """
    options = RunOptions(**flags)
    plan = load_plan(options.plan)
    refuse_shared_stages(plan, options.plan)
    if not options.check_quality and (options.check_text or options.check_windows):
        raise UserError("--check-text, --check-windows: only with --check-quality")
    from llmpq.runtime.process import role_from_environment

    role = role_from_environment()
    if role is None:
        _run_here(plan, options)
    else:
        _guarded(plan, options, role)


def _run_here(plan: Plan, options: RunOptions) -> None:
    """Checks all input, then starts the workers (or is the only one)."""
    from llmpq.runtime.process import Role, start_workers

    if len(plan.stages) == 1:
        _warn_of_crowding(plan, options)
        _work(plan, options, Role(0, 1, 0, 1))
        return
    _prepare(plan, options)
    _warn_of_crowding(plan, options)
    names = [f"{stage.devices[0]} on {stage.node}" for stage in plan.stages]
    start_workers(click.get_current_context().meta[ARGUMENTS], names, "llmpq.run")


def _guarded(plan: Plan, options: RunOptions, role: "Role") -> None:
    """One worker among several; what went wrong is said once."""
    from llmpq.runtime.process import SUPERVISED, end_with_parent

    end_with_parent()
    if role.size != len(plan.stages):
        raise UserError(
            f"{options.plan}: the plan has {len(plan.stages)} stages but torchrun started "
            f"{role.size} processes; use --nproc-per-node {len(plan.stages)}"
        )
    if role.local_rank == 0 and SUPERVISED not in os.environ:
        _warn_of_crowding(plan, options)
    try:
        _work(plan, options, role)
    except WorkerError:
        if SUPERVISED not in os.environ:
            raise
        sys.exit(WorkerError.exit_code)  # the process that started us says which worker was lost


@dataclass
class Prepared:
    """Everything that is read before weights are."""

    config: Any
    weights: "Checkpoint"
    tokenizer: Any
    requests: "list[Request]"
    eos_ids: frozenset[int]
    roundings: "Roundings"
    pad_id: int = 0  # padding is masked, so any token will do
    windows: Any = None  # [n, W] of the text on which quality is checked


def _prepare(plan: Plan, options: RunOptions, leads: bool = True) -> Prepared:
    """Reads and checks all input; only the stage that leads needs the prompts."""
    from llmpq.cli.check_quality import check_windows
    from llmpq.models.stage_model import load_config
    from llmpq.models.tokenizer import end_tokens, load_tokenizer
    from llmpq.runtime.batching import fitting_batches
    from llmpq.runtime.checkpoint import Checkpoint
    from llmpq.runtime.engine import reserve_of
    from llmpq.runtime.loader import model_folder
    from llmpq.runtime.prompts import Limits, read_requests
    from llmpq.runtime.roundings import load_roundings

    folder = model_folder(options.model or plan.model.name)
    config = load_config(folder)
    _check_model(plan, folder)
    weights = Checkpoint(folder)
    roundings = load_roundings(plan.quantizer, options.moments, options.plan)
    eos_ids = frozenset() if options.ignore_eos else end_tokens(folder, config)
    if not leads:
        return Prepared(config, weights, None, [], eos_ids, roundings)
    _check_files(options)
    tokenizer = load_tokenizer(folder)
    limits = Limits(
        new_tokens=max(new for _, new in request_lengths(plan.workload)),
        max_positions=plan.model.max_positions,
        vocab_size=plan.model.vocab_size,
    )
    requests = read_requests(options.prompts, tokenizer, limits)
    reserve = reserve_of(plan)
    fitting_batches(requests, reserve.batch, reserve.cache_tokens)  # raises where one never fits
    prepared = Prepared(config, weights, tokenizer, requests, eos_ids, roundings)
    if options.check_quality:
        most, positions = options.check_windows, plan.model.max_positions
        prepared.windows = check_windows(options.check_text, tokenizer, positions, most)
    return prepared


def _check_model(plan: Plan, folder: Path) -> None:
    spec = load_model_spec(str(folder))
    if (spec.num_layers, spec.model_key) != (plan.model.num_layers, plan.model.model_key):
        raise UserError(
            f"{folder}: has {spec.num_layers} layers, the plan is for {plan.model.num_layers} "
            f"({spec.model_key} against {plan.model.model_key})"
        )


def _check_files(options: RunOptions) -> None:
    """Finds out before the work, and not after it, that its result has no place."""
    if options.output.resolve() == options.prompts.resolve():
        raise UserError(f"{options.output}: --output is the prompts file")
    for path in (options.output, options.report, options.json_path):
        if path is None or str(path) == "-":
            continue
        folder = next(p for p in path.absolute().parents if p.exists())
        if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
            raise UserError(f"{path}: cannot be written")


def _work(plan: Plan, options: RunOptions, role: "Role") -> None:
    """This process's part of the run."""
    import torch

    from llmpq.runtime.process import connect, disconnect

    try:
        prepared = _prepare(plan, options, leads=role.rank == 0)
    except UserError:
        if role.local_rank == 0:
            raise
        sys.exit(UserError.exit_code)  # the first worker on this machine finds and says the same
    device = _claim_device(plan, options, role)
    transport = connect(role, device)
    try:
        engine = _engine(plan, options, prepared, device, transport)
        if role.rank == 0:
            report, served = _lead(engine, plan, options, prepared)
            dtype = engine.worker.stage.dtype
            del engine  # its memory is wanted for the layers of the 16-bit model
            _finish(report, served, options, prepared, dtype, device)
        else:
            engine.start_clock()
            engine.follow()
            engine.measure(_with_hashes(options))
            if options.check_quality:
                engine.follow_text()
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise InfeasibleError(
            f"stage {role.rank} ran out of memory on {device}: {reason}"
        ) from None
    finally:
        disconnect()


def _claim_device(plan: Plan, options: RunOptions, role: "Role") -> Any:
    """The device of this process; a rehearsed one on the CPU has a core to itself."""
    import torch

    from llmpq.runtime.process import choose_device
    from llmpq.runtime.rehearsal import own_core

    rehearsed = bool(plan.cluster.rehearse)
    auto_on_cpu = rehearsed and options.device == "auto"
    device = choose_device("cpu" if auto_on_cpu else options.device, role)
    if rehearsed and device.type == "cpu":
        torch.set_num_threads(1)
        own_core(role.rank, role.size)
    return device


def _engine(
    plan: Plan, options: RunOptions, prepared: Prepared, device: Any, transport: Any
) -> Any:
    """This process's stage, its weights loaded."""
    from llmpq.runtime.engine import Engine
    from llmpq.runtime.process import choose_dtype
    from llmpq.runtime.sampler import Sampling

    return Engine(
        plan,
        prepared.config,
        prepared.weights,
        transport,
        choose_dtype(options.dtype, device, transport),
        device,
        Sampling(options.temperature, options.top_k, options.top_p, options.seed),
        prepared.eos_ids,
        roundings=prepared.roundings,
    )


def _with_hashes(options: RunOptions) -> bool:
    return options.report is not None or options.json_path is not None


def _lead(
    engine: Any, plan: Plan, options: RunOptions, prepared: Prepared
) -> "tuple[Report, Loss | None]":
    """Rank 0: results, progress, the report, and the served weights' loss where that is checked."""
    from llmpq.models.family import TESTED
    from llmpq.runtime.prompts import ResultFile

    results = ResultFile(options.output, options.resume)
    todo = [r for r in prepared.requests if r.id not in results.finished]
    out = console(options.quiet)
    if prepared.config.model_type not in TESTED:
        out.print(f"warning: pipelines of '{prepared.config.model_type}' models are not tested")
    if note := prepared.weights.note(plan.precisions):
        out.print(f"warning: {note}")
    if len(todo) < len(prepared.requests):
        out.print(f"resuming: {len(prepared.requests) - len(todo)} requests are already done")
    with progress(out, "requests", len(todo)) as shown, closing(results):
        collector = _Collector(results, prepared, shown)
        engine.start_clock()
        started = time.perf_counter()
        engine.lead(todo, prepared.pad_id, collector.note)
        total_s = time.perf_counter() - started
        stages = engine.measure(_with_hashes(options))
    report = _report(plan, collector, total_s, engine.worker.prefill_s, stages)
    if prepared.windows is None:
        return report, None
    with progress(out, "checking quality, windows", len(prepared.windows)) as shown:
        return report, engine.lead_text(prepared.windows, shown.update)


def _finish(
    report: Report,
    served: "Loss | None",
    options: RunOptions,
    prepared: Prepared,
    dtype: Any,
    device: Any,
) -> None:
    """Rank 0, when the others are done: the 16-bit model for comparison, and the report."""
    from llmpq.cli.check_quality import compare, sixteen_bits, summary

    out = console(options.quiet)
    if served is None:
        _write_report(report, options, out)
        return
    if options.report is not None:
        write_json(options.report, report)  # whatever comes of the comparison
    config, weights, windows = prepared.config, prepared.weights, prepared.windows
    with progress(out, "16 bits for comparison, layers", config.num_hidden_layers) as shown:
        base = sixteen_bits(config, weights, windows, dtype, device, shown.update)
    quality = compare(report, served, base, options.check_text, windows.shape[1])
    _write_report(report.model_copy(update={"quality": quality}), options, out)
    out.print(summary(quality))


@dataclass
class _Collector:
    """Gathers tokens and writes each request as it ends."""

    results: "ResultFile"
    prepared: Prepared
    shown: Progress
    num_done: int = 0
    num_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)
    tokens: dict[int, list[int]] = field(default_factory=dict)

    def note(self, request: "Request", token: int, last: bool) -> None:
        """One more token of a request."""
        tokens = self.tokens.setdefault(request.number, [])
        tokens.append(token)
        self.num_tokens += 1
        if not last:
            return
        self._finish(request, self.tokens.pop(request.number))
        rate = self.num_tokens / (time.perf_counter() - self.started)
        self.shown.update(self.num_done, f"({rate:.0f} tokens/s)")

    def _finish(self, request: "Request", tokens: list[int]) -> None:
        tokenizer = self.prepared.tokenizer
        text = tokenizer.decode(tokens, skip_special_tokens=True) if tokenizer else ""
        self.results.write(request, tokens, tokens[-1] in self.prepared.eos_ids, text)
        self.num_done += 1


def _report(
    plan: Plan, collector: _Collector, total_s: float, prefill_s: float, stages: list[StageReport]
) -> Report:
    predicted = plan.predicted
    return Report(
        tokens_per_s=collector.num_tokens / total_s,
        prefill_s=prefill_s,
        decode_s=total_s - prefill_s,
        total_s=total_s,
        load_s=max(stage.load_s for stage in stages),
        num_requests=collector.num_done,
        num_new_tokens=collector.num_tokens,
        stages=stages,
        predicted=predicted,
        plan=plan,
        error_percent=_error_percent(plan, collector, total_s),
        provenance=Provenance.here(),
    )


def _error_percent(plan: Plan, collector: _Collector, total_s: float) -> float | None:
    """Of the predicted time; None where something else than the planned work was done."""
    planned = request_lengths(plan.workload)
    done = (collector.num_done, collector.num_tokens)
    if plan.predicted is None or done != (len(planned), sum(new for _, new in planned)):
        return None
    return 100 * (plan.predicted.total_s / total_s - 1)


def _write_report(report: Report, options: RunOptions, out: Any) -> None:
    if options.report is not None:
        write_json(options.report, report)
    emit(report.model_dump_json(indent=1), options.json_path)
    out.print(
        f"{report.num_requests} requests, {report.num_new_tokens} new tokens in "
        f"{report.total_s:.2f} s: {report.tokens_per_s:.1f} tokens/s"
    )
    if options.verbose:
        for stage in report.stages:
            out.print(stage.model_dump_json())
    if report.predicted is not None:
        out.print(
            f"predicted {report.predicted.total_s:.2f} s, "
            f"{report.predicted.tokens_per_s:.1f} tokens/s for the planned workload"
        )


def _warn_of_crowding(plan: Plan, options: RunOptions) -> None:
    """Says so where a rehearsal cannot be true to its slowdowns on this machine."""
    from llmpq.runtime.rehearsal import available_cores, cores_needed

    roles = [plan.cluster.rehearse.get(stage.devices[0]) for stage in plan.stages]
    slowdowns = [role.slowdown for role in roles if role is not None]
    needed, cores = cores_needed(slowdowns), available_cores()
    if slowdowns and needed > cores:
        console(options.quiet).print(
            f"warning: this rehearsal needs {needed:.1f} cores and there are {cores}; its times "
            f"will be too long. Raise the slowdowns by {needed / cores:.2f}x or more."
        )


if __name__ == "__main__":
    main()
