"""What `llmpq-run` reads and checks before weights are loaded."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpq.cli.loading import open_cache
from llmpq.cli.paths import Named, check_files, model_files
from llmpq.cli.run_options import RunOptions
from llmpq.errors import UserError
from llmpq.model_lookup import load_model_spec
from llmpq.plan_data import Plan, reserve_of
from llmpq.workload import planned_lengths

if TYPE_CHECKING:
    from llmpq.checkpoint.checkpoint import Checkpoint
    from llmpq.checkpoint.packed_cache import PackedCache
    from llmpq.checkpoint.roundings import Roundings
    from llmpq.prompts.prompt_rules import Limits
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

    folder = model_folder(options.model or plan.model.name)
    config = load_config(folder)
    _check_model(plan, options.plan, folder)
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
        options.prompts, tokenizer, _limits(plan, options, config), options.chat
    )
    prepared = Prepared(config, weights, tokenizer, prompts, eos_ids, roundings, cache, notes)
    if options.check_quality:
        most, positions = options.check_windows, plan.model.max_positions
        prepared.windows = check_windows(options.check_text, tokenizer, positions, most)
    return prepared


def _check_model(plan: Plan, path: Path, folder: Path) -> None:
    """Raises `UserError` where the plan in the file `path` is for another model."""
    spec = load_model_spec(str(folder))
    if (spec.num_layers, spec.model_key) != (plan.model.num_layers, plan.model.model_key):
        raise UserError(
            f"{folder}: has {spec.num_layers} layers, the plan {path} is for "
            f"{plan.model.num_layers} ({spec.model_key} against {plan.model.model_key})"
        )
    if spec.linears != plan.model.linears:
        raise UserError(f"{folder}: has other linear layers than the model of the plan {path}")


def _limits(plan: Plan, options: RunOptions, config: Any) -> "Limits":
    """What a request may ask for: of the model, and of the cache that the plan reserves."""
    from llmpq.models.rope import switches_at
    from llmpq.prompts.prompt_rules import Limits

    return Limits(
        new_tokens=max(new for _, new in planned_lengths(plan.workload)),
        max_positions=plan.model.max_positions,
        vocab_size=plan.model.vocab_size,
        cache_tokens=reserve_of(plan).tokens,
        too_long=options.too_long,
        switches_at=switches_at(config),
    )


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
