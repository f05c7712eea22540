"""What `llmpq-run` reads and checks before weights are loaded."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpq.cli.loading import open_cache
from llmpq.cli.run_options import RunOptions
from llmpq.errors import UserError
from llmpq.model_spec import load_model_spec
from llmpq.plan import Plan
from llmpq.workload import request_lengths

if TYPE_CHECKING:
    from llmpq.runtime.checkpoint import Checkpoint
    from llmpq.runtime.packed_cache import PackedCache
    from llmpq.runtime.prompts import PromptFile
    from llmpq.runtime.roundings import Roundings


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
    windows: Any = None  # [n, W] of the text on which quality is checked


def prepare(plan: Plan, options: RunOptions, leads: bool = True) -> Prepared:
    """Reads and checks all input; only the stage that leads needs the prompts."""
    from llmpq.cli.check_quality import check_windows
    from llmpq.models.stage_model import load_config
    from llmpq.models.tokenizer import end_tokens, load_tokenizer
    from llmpq.runtime.checkpoint import Checkpoint
    from llmpq.runtime.loader import model_folder
    from llmpq.runtime.prompts import Limits, check_prompts
    from llmpq.runtime.roundings import load_roundings

    folder = model_folder(options.model or plan.model.name)
    config = load_config(folder)
    _check_model(plan, folder)
    weights = Checkpoint(folder)
    roundings = load_roundings(plan.quantizer, options.moments, options.plan)
    cache = open_cache(plan, options, weights)
    eos_ids = frozenset() if options.ignore_eos else end_tokens(folder, config)
    if not leads:
        return Prepared(config, weights, None, None, eos_ids, roundings, cache)
    _check_files(options)
    tokenizer = load_tokenizer(folder)
    limits = Limits(
        new_tokens=max(new for _, new in request_lengths(plan.workload)),
        max_positions=plan.model.max_positions,
        vocab_size=plan.model.vocab_size,
    )
    prompts = check_prompts(options.prompts, tokenizer, limits, options.chat)
    _check_room(plan, prompts)
    prepared = Prepared(config, weights, tokenizer, prompts, eos_ids, roundings, cache)
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
    if spec.linears != plan.model.linears:
        raise UserError(f"{folder}: has other linear layers than the plan's model")


def _check_room(plan: Plan, prompts: "PromptFile") -> None:
    """Every request must fit into the cache that the plan reserves, at least alone."""
    from llmpq.runtime.engine import reserve_of

    reserved = reserve_of(plan).tokens
    for name, (prompt, new) in zip(prompts.ids, prompts.lengths, strict=True):
        if prompt + new > reserved:
            raise UserError(
                f"request {name!r} needs {prompt} + {new} tokens of cache; the plan reserves "
                f"{reserved} in all"
            )


def _check_files(options: RunOptions) -> None:
    """Finds out before the work, and not after it, that its result has no place."""
    if options.output.resolve() == options.prompts.resolve():
        raise UserError(f"{options.output}: --output is the prompts file")
    for path in (options.output, options.report, options.trace, options.json_path):
        if path is None or str(path) == "-":
            continue
        folder = next(p for p in path.absolute().parents if p.exists())
        if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
            raise UserError(f"{path}: cannot be written")
