"""What `llmpq-run` reads and checks before weights are loaded."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmpq.cli.loading import open_cache
from llmpq.cli.paths import Named, check_files, model_files
from llmpq.cli.run_options import RunOptions
from llmpq.model_lookup import check_model
from llmpq.plan_data import Plan

if TYPE_CHECKING:
    from llmpq.checkpoint.checkpoint import Checkpoint
    from llmpq.checkpoint.packed_cache import PackedCache
    from llmpq.checkpoint.roundings import Roundings
    from llmpq.prompts.prompts import PromptFile


@dataclass
class Prepared:
    """Everything that is read before weights are."""

    config: Any
    weights: "Checkpoint"
    tokenizer: Any
    prompts: "PromptFile | None"  # of the stage that leads
    eos_ids: frozenset[int]
    roundings: "Roundings"
    cache: "PackedCache | None"  # of --cache-dir
    notes: list[str] = field(default_factory=list)  # on what of the checkpoint is not read
    windows: Any = None  # [n, W] of the text on which quality is checked


def prepare(plan: Plan, options: RunOptions, leads: bool = True) -> Prepared:
    """Reads and checks all input; only the stage that leads needs the prompts."""
    from llmpq.checkpoint.checkpoint import Checkpoint
    from llmpq.checkpoint.inventory import check_checkpoint
    from llmpq.checkpoint.loader import model_folder
    from llmpq.checkpoint.roundings import load_roundings
    from llmpq.cli.check_quality import check_windows
    from llmpq.models.stage_model import load_config
    from llmpq.prompts.prompts import check_prompts
    from llmpq.prompts.tokenizer import end_tokens, load_tokenizer
    from llmpq.runtime.limits import limits_of

    folder = model_folder(options.model or plan.model.name)
    config = load_config(folder)
    check_model(folder, plan.model, f"the plan {options.plan}")
    weights = Checkpoint(folder)
    notes = check_checkpoint(config, weights)
    roundings = load_roundings(plan.quantizer, options.moments, options.plan)
    cache = open_cache(plan, options, weights)
    eos_ids = frozenset() if options.ignore_eos else end_tokens(folder, config)
    if not leads:
        return Prepared(config, weights, None, None, eos_ids, roundings, cache)
    _check_files(plan, options)
    tokenizer = load_tokenizer(folder)
    prompts = check_prompts(
        options.prompts, tokenizer, limits_of(plan, config, options.too_long), options.chat
    )
    prepared = Prepared(config, weights, tokenizer, prompts, eos_ids, roundings, cache, notes)
    if options.check_quality:
        most, positions = options.check_windows, plan.model.max_positions
        prepared.windows = check_windows(options.check_text, tokenizer, positions, most)
    return prepared


def output_files(plan: Plan, options: RunOptions) -> list[Named]:
    """All files that a run may write, and what earlier ones have kept beside the output."""
    from llmpq.cli.replan import plan_path
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
        plans = [plan_path(options, number + 1) for number in range(len(plan.stages))]
        # The one that runs was written by the run before it, which goes on with the next number.
        plans = [path for path in plans if path != options.plan]
        writes += [("a plan of --replan-on-loss,", path) for path in plans]
    return writes


def _check_files(plan: Plan, options: RunOptions) -> None:
    """Finds out before the work, and not after it, that its result has no place."""
    moments = plan.quantizer.moments
    reads: list[Named] = [
        ("--plan", options.plan),
        ("--prompts", options.prompts),
        ("--moments", options.moments),
        ("the plan's file of second moments", moments and options.plan.parent / moments),
        ("--check-text", options.check_text),
        *model_files(options.model or plan.model.name),
    ]
    check_files(reads, output_files(plan, options))
