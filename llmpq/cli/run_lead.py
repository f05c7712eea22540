"""The leading worker's part of `llmpq-run`: results, progress, the trace and the report."""

import time
from collections import deque
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpq.artifact import Provenance, write_json
from llmpq.cli.common import console, emit
from llmpq.cli.progress import Progress, progress
from llmpq.cli.run_options import RunOptions
from llmpq.cli.run_outcome import outcome
from llmpq.errors import FailedRequests
from llmpq.plan_data import Plan
from llmpq.report import Report, StageReport, duration
from llmpq.workload import request_lengths

if TYPE_CHECKING:
    from llmpq.cli.run_input import Prepared
    from llmpq.evaluation.perplexity import Loss
    from llmpq.prompts.prompts import PromptFile
    from llmpq.prompts.request import Finished, Request
    from llmpq.prompts.result_stream import ResultStream
    from llmpq.reliability.journal import Results
    from llmpq.runtime.leader import Ends, Status
    from llmpq.runtime.sampler import Sampling

NOW_S = 10.0  # what "now" means: the last so many seconds


def with_hashes(options: RunOptions) -> bool:
    """The weights' hashes are told in the report."""
    return options.report is not None or options.json_path is not None


def open_results(plan: Plan, options: RunOptions, prepared: "Prepared") -> "Results | ResultStream":
    """The output, before anything is loaded: a restart must not take an older one for its own."""
    from llmpq.prompts.result_lines import ResultWriter
    from llmpq.prompts.result_stream import ResultStream
    from llmpq.reliability.journal import Results

    prompts = prepared.prompts
    assert prompts is not None
    chosen = options.output_format
    writer = ResultWriter(prompts.form if chosen == "auto" else chosen, Path(plan.model.name).name)
    if options.streams:
        return ResultStream(writer)
    return Results(
        options.output,
        options.resume,
        options.fsync,
        _identity(plan, options) | {"weights": prepared.weights.fingerprint},
        prompts.checksums() if options.resume else None,
        options.keep_errors,
        writer,
    )


def needs_no_engine(
    results: "Results | ResultStream", prepared: "Prepared", options: RunOptions, restarted: bool
) -> bool:
    """Whether every request is done, and nothing is asked for that only a loaded model tells.

    `restarted`: torchrun has started this run again; what failed in it has been reported.
    """
    assert prepared.prompts is not None
    if len(results.finished) < len(prepared.prompts):
        return False
    measures = options.check_quality or options.trace is not None or with_hashes(options)
    return not measures or (restarted and bool(results.failed))


def told_outcome(
    results: "Results | ResultStream",
    prepared: "Prepared",
    options: RunOptions,
    under_torchrun: bool,
    dtype: Any = "",
    unmeasured: FailedRequests | None = None,
) -> FailedRequests | None:
    """The last line: told, or where something failed returned."""
    assert prepared.prompts is not None
    out = console(options.quiet)
    failed = outcome(results, prepared.prompts, options, under_torchrun, str(dtype), out)
    if failed is None or unmeasured is None:
        return failed or unmeasured
    return FailedRequests(f"{unmeasured}\n{failed}")


def lead(
    engine: Any,
    plan: Plan,
    options: RunOptions,
    prepared: "Prepared",
    results: "Results | ResultStream",
) -> "tuple[Report, Loss | None]":
    """Runs the requests; the report, and the served weights' loss where that is checked."""
    from llmpq.evaluation.pipeline_loss import lead_text

    assert prepared.prompts is not None
    out = console(options.quiet)
    say_first(plan, options, prepared, results)
    todo = prepared.prompts.todo(results.finished)
    with progress(out, "requests", len(todo)) as shown, closing(results):
        collector = _Collector(results, prepared, shown)
        collector.refuse()
        engine.start_clock(trace=options.trace is not None)
        collector.started = time.perf_counter()
        engine.lead(
            todo,
            prepared.prompts.request,
            collector.finish,
            collector.show,
            options.refill,
            options.prefill_chunk,
            _samplings(prepared.prompts, options),
            _ends(prepared.tokenizer),
        )
        total_s = time.perf_counter() - collector.started
        results.check_files()
        stages = engine.measure(with_hashes(options))
    if options.trace is not None:
        _write_trace(options.trace, plan, engine.trace())
    report = _report(plan, collector, total_s, stages)
    if prepared.windows is None:
        return report, None
    with progress(out, "checking quality, windows", len(prepared.windows)) as shown:
        return report, lead_text(engine, prepared.windows, shown.update)


def _samplings(prompts: "PromptFile", options: RunOptions) -> "list[Sampling]":
    """How the tokens of each request are drawn, by its number; empty where all are drawn alike."""
    from llmpq.runtime.sampler import Sampling

    run = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    samplings = [run] * len(prompts) if prompts.drawn else []
    for number, own in prompts.drawn.items():
        changes: dict[str, Any] = {**own, "own_seed": "seed" in own}
        samplings[number] = replace(run, **changes)
    return samplings


def _ends(tokenizer: Any) -> "Ends":
    """Whether a request's answer holds one of the texts where it stops."""
    from llmpq.prompts.own_settings import has_stopped, tail_tokens

    def ends(request: "Request", tokens: list[int]) -> bool:
        if not request.stops:
            return False
        tail = tokens[-tail_tokens(request.stops) :]
        try:
            text = tokenizer.decode(tail, skip_special_tokens=True)
        except Exception:  # tokenizers raise plain exceptions; told where all tokens are decoded
            return False
        return has_stopped(text, request.stops)

    return ends


def finish(
    report: Report,
    served: "Loss | None",
    options: RunOptions,
    prepared: "Prepared",
    dtype: Any,
    device: Any,
) -> FailedRequests | None:
    """When the other stages are done: the 16-bit model for comparison, and the report.

    Returns what to say where the quality could not be measured.
    """
    from llmpq.cli.check_quality import check_text, compare, sixteen_bits, summary

    out = console(options.quiet)
    if served is None:
        _write_report(report, options, out)
        return None
    if options.report is not None:
        write_json(options.report, report)  # whatever comes of the comparison
    config, weights, windows = prepared.config, prepared.weights, prepared.windows
    with progress(out, "16 bits for comparison, layers", config.num_hidden_layers) as shown:
        base = sixteen_bits(config, weights, windows, dtype, device, shown.update)
    quality = compare(report, served, base, options.check_text, windows.shape[1])
    _write_report(report.model_copy(update={"quality": quality}), options, out)
    if quality is None:
        return FailedRequests(
            f"the quality could not be measured: the loss on {check_text(options.check_text).name} "
            "is no finite number, as activations became NaN or infinite"
        )
    out.print(summary(quality))
    return None


def _identity(plan: Plan, options: RunOptions) -> dict[str, object]:
    """What results must have in common to lie in one file."""
    return {
        "model": f"{Path(plan.model.name).name} {plan.model.model_key}",
        "precisions": ",".join(plan.precisions),
        "quantizer": plan.quantizer.method,
        "dtype": options.dtype,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "seed": options.seed,
        "ignore_eos": options.ignore_eos,
    }


def say_first(
    plan: Plan, options: RunOptions, prepared: "Prepared", results: "Results | ResultStream"
) -> None:
    """What is to be known of the input and of earlier results before anything runs."""
    assert prepared.prompts is not None
    out = console(options.quiet)
    if note := prepared.weights.note(plan.precisions):
        out.print(f"warning: {note}")
    notes = [
        *prepared.notes,
        *prepared.prompts.notes,
        *_on_format(prepared.prompts, options),
        *results.notes,
    ]
    for note in notes:
        out.print(note, soft_wrap=True)
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


@dataclass
class _Collector:
    """Writes each request as it ends, and shows how far the run is."""

    results: "Results | ResultStream"
    prepared: "Prepared"
    shown: Progress
    num_done: int = 0
    num_tokens: int = 0
    num_failed: int = 0
    num_begun: int = 0
    begun_s: float = 0.0  # when the last request so far got its first token
    started: float = 0.0
    recent: "deque[tuple[float, int]]" = field(default_factory=deque)  # (seconds, tokens so far)

    def refuse(self) -> None:
        """Ends the requests that cannot be done as they are asked."""
        from llmpq.prompts.request import Finished

        prompts = self.prepared.prompts
        assert prompts is not None
        for number, reason in prompts.refused.items():
            if prompts.ids[number] not in self.results.finished:
                request = prompts.request(number)
                self.finish(Finished(request, (), "error", reason, refused=True))

    def finish(self, finished: "Finished") -> None:
        """One more request has ended."""
        from llmpq.prompts.own_settings import cut_at

        tokenizer, tokens = self.prepared.tokenizer, list(finished.token_ids)
        text = ""
        try:
            text = tokenizer.decode(tokens, skip_special_tokens=True) if tokenizer else ""
            text = cut_at(text, finished.request.stops)
        except Exception as error:  # tokenizers raise plain exceptions
            why = f"the model's tokenizer cannot decode its tokens ({error})"
            finished = replace(finished, reason="error", error=finished.error or why)
        self.results.write(finished, text)
        self.num_done += 1
        self.num_tokens += len(tokens)
        self.num_failed += finished.reason == "error"

    def show(self, status: "Status") -> None:
        """Called after every job."""
        now = time.perf_counter() - self.started
        if status.num_begun > self.num_begun:
            self.num_begun, self.begun_s = status.num_begun, now
        self.recent.append((now, status.num_tokens))
        while now - self.recent[0][0] > NOW_S:
            self.recent.popleft()
        if self.shown.is_due():
            self.shown.update(status.num_done, self._detail(status, now))

    def _detail(self, status: "Status", now: float) -> str:
        (since, before), mean = self.recent[0], status.num_tokens / now
        current = (status.num_tokens - before) / (now - since) if now > since else mean
        busy = " ".join(f"{ms / now / 10:.0f}" for ms in status.busy_ms)
        cache = 100 * status.cache_tokens / status.cache_reserved
        return (
            f"({current:.0f} tokens/s now, {mean:.0f} mean; stages busy {busy} %; "
            f"cache {cache:.0f} % used)"
        )


def _report(plan: Plan, collector: _Collector, total_s: float, stages: list[StageReport]) -> Report:
    def busy_s(stage: StageReport) -> float:
        return stage.busy_prefill_s + stage.busy_decode_s

    busiest = max(stages, key=busy_s)
    shares = [stage.model_copy(update={"busy_share": busy_s(stage) / total_s}) for stage in stages]
    return Report(
        tokens_per_s=collector.num_tokens / total_s,
        requests_per_s=(collector.num_done - collector.num_failed) / total_s,
        prefill_share=busiest.busy_prefill_s / (busy_s(busiest) or 1.0),
        prefill_s=collector.begun_s,
        decode_s=total_s - collector.begun_s,
        total_s=total_s,
        load_s=max(stage.load_s for stage in stages),
        num_requests=collector.num_done,
        num_new_tokens=collector.num_tokens,
        num_failed=collector.num_failed,
        stages=shares,
        predicted=plan.predicted,
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
        f"{duration(report.total_s)}: {report.tokens_per_s:.1f} tokens/s, "
        f"{report.requests_per_s:.3g} requests/s"
    )
    for stage in report.stages:
        _say_halved(stage, out)
        if options.verbose:
            out.print(stage.model_dump_json())
    if report.predicted is not None:
        out.print(
            f"predicted {duration(report.predicted.total_s)}, "
            f"{report.predicted.tokens_per_s:.1f} tokens/s for the planned workload"
        )


def _say_halved(stage: StageReport, out: Any) -> None:
    sizes = {"prefill": stage.most_prefill_rows, "decode": stage.most_decode_rows}
    for phase, rows in sizes.items():
        if rows is not None:
            went_on = f"{phase} went on with {rows} requests at once"
            out.print(f"stage {stage.rank} ran out of memory: {went_on}")


def _write_trace(path: Path, plan: Plan, spans: list[list[list[float]]]) -> None:
    """What every stage computed, as the simulator's trace shows what it expects."""
    from llmpq.cli.trace_file import call, stage_names, write_events

    events = list(stage_names(plan))
    for rank, rows in enumerate(spans):
        for prefill, micro_batch, tokens, start_s, end_s in rows:
            kind = "prefill" if prefill else "decode"
            name = f"{kind} {micro_batch:.0f} x {tokens:.0f}"
            sizes = {"requests": int(micro_batch), "tokens": int(tokens)}
            times = 1e6 * start_s, 1e6 * (end_s - start_s)
            events.append(call(rank, kind, name, *times, sizes))
    write_events(path, events)
