"""What a run reads and checks before it loads weights: the model's files, prompts, packed weights.

Not covered: whether a file that is read would be written over (`cli.run_options`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.inventory import check_checkpoint
from llmpq.checkpoint.loader import model_folder
from llmpq.checkpoint.packed_cache import PackedCache
from llmpq.checkpoint.roundings import Roundings, load_roundings, rounding_key
from llmpq.model_lookup import check_model
from llmpq.models.stage_model import load_config
from llmpq.plan_data import Plan
from llmpq.prompts.prompt_rules import TooLong
from llmpq.prompts.prompts import PromptFile, check_prompts
from llmpq.prompts.tokenizer import end_tokens, load_tokenizer
from llmpq.runtime.limits import limits_of


@dataclass(frozen=True)
class RunFiles:
    """The files of a run, and how prompts are read.

    `model`, `moments`: other paths than the plan's. `cache`: a folder of packed weights.
    """

    plan: Path
    prompts: Path
    model: str | None = None
    moments: Path | None = None
    cache: Path | None = None
    too_long: TooLong = "fail"
    chat: bool = False
    ignore_eos: bool = False


@dataclass(frozen=True)
class RunInputs:
    """Everything that is read before weights are. Only the worker that leads has a tokenizer."""

    config: Any
    weights: Checkpoint
    eos_ids: frozenset[int]
    roundings: Roundings
    cache: PackedCache | None
    notes: list[str]  # on what of the checkpoint is not read, and on other roundings
    tokenizer: Any = None
    prompts: PromptFile | None = None
    windows: Any = None  # [n, W] token ids of the text on which quality is checked

    @property
    def led_prompts(self) -> PromptFile:
        """The prompts, in the worker that leads."""
        assert self.prompts is not None
        return self.prompts


def read_run_inputs(
    plan: Plan, files: RunFiles, leads: bool, warn: Callable[[str], None]
) -> RunInputs:
    """Reads and checks all input; only the worker that leads needs the prompts.

    `warn` is told what is wrong with the folder of packed weights later on. Raises `UserError`.
    """
    folder = model_folder(files.model or plan.model.name)
    config = load_config(folder)
    check_model(folder, plan.model, f"the plan {files.plan}")
    weights = Checkpoint(folder)
    notes = check_checkpoint(config, weights)
    roundings = load_roundings(plan.quantizer, files.moments, files.plan)
    notes += [roundings.note] if roundings.note else []
    cache = open_cache(plan, files, weights, warn)
    eos_ids = frozenset() if files.ignore_eos else end_tokens(folder, config)
    if not leads:
        return RunInputs(config, weights, eos_ids, roundings, cache, [])
    tokenizer = load_tokenizer(folder)
    limits = limits_of(plan, config, files.too_long)
    prompts = check_prompts(files.prompts, tokenizer, limits, files.chat)
    return RunInputs(config, weights, eos_ids, roundings, cache, notes, tokenizer, prompts)


def open_cache(
    plan: Plan, files: RunFiles, weights: Checkpoint, warn: Callable[[str], None]
) -> PackedCache | None:
    """The folder of packed weights; None without one. Raises `UserError` where it is no use."""
    if files.cache is None:
        return None
    rounding = rounding_key(plan.quantizer, files.moments, files.plan)
    return PackedCache(files.cache, weights.stamp, rounding, warn)
