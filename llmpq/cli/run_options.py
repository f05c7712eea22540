"""The options of `llmpq-run`: what they are, which go together, and the files that they name."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from llmpq.cli.common import console
from llmpq.cli.options import FiniteRange, TorchOptions, option, required
from llmpq.cli.paths import Named, check_files, model_files, profile_files
from llmpq.errors import UserError
from llmpq.plan_data import Plan
from llmpq.prompts.prompt_rules import TooLong

if TYPE_CHECKING:
    from llmpq.runtime.run_inputs import RunInputs

FOR_REPLANNING = ("cluster", "profiles", "sensitivity", "max_quality_loss")


@dataclass(frozen=True, kw_only=True)
class RunOptions(TorchOptions):
    """What the command line of `llmpq-run` asks for."""

    plan: Path = required("The plan to run, a plan.json of llmpq-plan.")
    prompts: Path = required(
        "Requests: prompts.jsonl; also OpenAI batch files, CSV, JSON arrays, Parquet; compressed "
        "or not."
    )
    output: Path = required(
        "Results: out.jsonl; '-': standard output, which keeps nothing to resume.",
        type=click.Path(path_type=Path, allow_dash=True),
    )
    output_format: Literal["auto", "llmpq", "openai"] = option(
        "Format of OUTPUT; auto: openai (its batch output) if all prompts are OpenAI batch lines.",
        default="auto",
    )
    report: Path | None = option("Where to write report.json.")
    trace: Path | None = option("Where to write a Chrome trace of what ran, for Perfetto.")
    model: str | None = option("The model's directory, where it is not the plan's own.")
    moments: Path | None = option("Calibration statistics, where they are not at the plan's path.")
    check_quality: bool = option(
        "Measure the perplexity of the served weights against 16 bits.", default=False
    )
    check_text: Path | None = option("With --check-quality: the text; default: a shipped one.")
    check_windows: int | None = option(
        "With --check-quality: windows of 256 tokens; default: 80 at most.",
        type=click.IntRange(min=1),
    )
    cache_dir: Path | None = option("Folder where packed weights are kept, and found again.")
    dry_run: bool = option("Say what would be loaded where, and load nothing.", default=False)
    resume: bool = option(
        "Keep the finished requests of OUTPUT and do the others; failed ones again.", default=False
    )
    keep_errors: bool = option("With --resume: leave failed requests as they are.", default=False)
    too_long: TooLong = option(
        "A request that is too long: fails alone (error), loses its prompt's beginning "
        "(truncate), or refuses the run (fail).",
        default="error",
    )
    fsync: Literal["always", "interval", "never"] = option(
        "When results are forced to the disk; interval: every second.", default="interval"
    )
    chat: bool = option(
        "Treat a prompt that is a string as a user's message: apply the model's chat template.",
        default=False,
    )
    refill: bool = option(
        "Give the slots of finished requests to the next ones at once.", default=True
    )
    prefill_chunk: int | None = option(
        "Tokens of a prompt computed at once; default: as planned.", type=click.IntRange(min=16)
    )
    graphs: bool = option("On a GPU, run decode steps as CUDA graphs.", default=True)
    batch_invariant: bool = option(
        "Make no token depend on its micro-batch; may be slower.", default=False
    )
    temperature: float = option(
        "Sampling temperature; 0: greedy.", default=0.0, type=FiniteRange(min=0)
    )
    top_p: float = option(
        "Draw from the most likely tokens of this total probability.",
        default=1.0,
        type=FiniteRange(0, 1, min_open=True),
    )
    top_k: int = option(
        "Draw from so many of the most likely tokens; 0: all.",
        default=0,
        type=click.IntRange(min=0),
    )
    seed: int = option("Seed of sampling.", default=0)
    ignore_eos: bool = option("Always generate all new tokens.", default=False)
    replan_on_loss: bool = option("Go on without a worker that is lost.", default=False)
    cluster: Path | None = option(
        "With --replan-on-loss: the devices that are there; default: the plan's."
    )
    profiles: Path | None = option(
        "With --replan-on-loss: folder of profiles; default: estimates from spec sheets."
    )
    sensitivity: Path | None = option("With --replan-on-loss; default: a generic estimate.")
    max_quality_loss: float | None = option(
        "With --replan-on-loss: percent by which perplexity may rise; default: as little as fits.",
        type=FiniteRange(min=0),
    )

    @property
    def streams(self) -> bool:
        """Results go to standard output."""
        return str(self.output) == "-"

    @property
    def has_report(self) -> bool:
        """A report is written, which tells the weights' hashes."""
        return self.report is not None or self.json_path is not None


def check_options(options: RunOptions) -> None:
    """Raises `UserError` where options do not go together."""
    if not options.replan_on_loss:
        given = [name for name in FOR_REPLANNING if getattr(options, name) is not None]
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{names}: only with --replan-on-loss")
    if not options.check_quality and (options.check_text or options.check_windows):
        raise UserError("--check-text, --check-windows: only with --check-quality")
    if options.keep_errors and not options.resume:
        raise UserError("--keep-errors: only with --resume; a new run has no errors to keep")
    if options.streams and (options.resume or options.replan_on_loss):
        name = "--resume" if options.resume else "--replan-on-loss"
        raise UserError(f"{name}: needs an --output that is a file; '-' keeps no results")


def replan_path(options: RunOptions, number: int) -> Path:
    """Returns where the new plan after so many losses is written."""
    return options.output.with_name(f"{options.output.name}.replan-{number}.json")


def read_inputs(plan: Plan, options: RunOptions, leads: bool = True) -> "RunInputs":
    """Reads and checks all input; the worker that leads also checks the files to be written."""
    from llmpq.runtime.run_inputs import RunFiles, read_run_inputs

    if leads:
        _check_files(plan, options)
    files = RunFiles(
        plan=options.plan,
        prompts=options.prompts,
        model=options.model,
        moments=options.moments,
        cache=options.cache_dir,
        too_long=options.too_long,
        chat=options.chat,
        ignore_eos=options.ignore_eos,
    )
    say = console(options.quiet).print
    inputs = read_run_inputs(
        plan, files, leads, lambda line: say(f"warning: {line}", soft_wrap=True)
    )
    if not (leads and options.check_quality):
        return inputs
    from llmpq.evaluation.quality_check import check_windows

    most, positions = options.check_windows, plan.model.max_positions
    windows = check_windows(options.check_text, inputs.tokenizer, positions, most)
    return replace(inputs, windows=windows)


def _check_files(plan: Plan, options: RunOptions) -> None:
    """Raises `UserError` where a file to be written is read, is another one, or cannot be."""
    from llmpq.reliability.journal import files_beside

    writes: list[Named] = [
        ("--output", options.output),
        ("--report", options.report),
        ("--trace", options.trace),
        ("--json", options.json_path),
    ]
    if not options.streams:
        kept = files_beside(options.output)
        writes += [("a file that --output keeps beside it,", path) for path in kept]
        plans = [replan_path(options, number + 1) for number in range(len(plan.stages))]
        # The plan that runs now was written after a loss; the next one has the next number.
        plans = [path for path in plans if path != options.plan]
        writes += [("a plan of --replan-on-loss,", path) for path in plans]
    moments = plan.quantizer.moments
    reads: list[Named] = [
        ("--plan", options.plan),
        ("--prompts", options.prompts),
        ("--moments", options.moments),
        ("the plan's calibration statistics", moments and options.plan.parent / moments),
        ("--check-text", options.check_text),
        ("--cluster", options.cluster),
        ("--sensitivity", options.sensitivity),
        *model_files(options.model or plan.model.name),
        *profile_files(options.profiles, writes),
    ]
    check_files(reads, writes)
