"""Perplexity of the weights that are served, through the stages that serve them.

The protocol: the whole text is tokenized and cut into windows of equal length without overlap (a
shorter last piece is dropped); every token of a window but the first is predicted from those
before. Perplexity is exp of the mean loss over all predicted tokens. By default a window has as
many tokens as the model has positions, 2,048 at most, as in GPTQ and most papers since.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from llmpq.artifact import read_text
from llmpq.checkpoint.checkpoint import Weights
from llmpq.checkpoint.kernel_setup import prepare_kernels
from llmpq.checkpoint.loader import load_stage
from llmpq.checkpoint.roundings import NEAREST, Roundings
from llmpq.errors import UserError
from llmpq.models.stage_model import LayerRange, StageModel

LONGEST_WINDOW = 2048  # tokens, in the standard protocol
TOKENS_AT_ONCE = 2048  # tokens whose hidden states are in memory at a time
LOGITS_AT_ONCE = 2**24  # values in memory at a time


@dataclass(frozen=True)
class Loss:
    """Summed loss (nats) over predicted tokens."""

    total: float
    num_tokens: int

    @property
    def mean(self) -> float:
        """The mean loss in nats a token."""
        return self.total / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; infinite where that overflows."""
        try:
            return math.exp(self.mean)
        except OverflowError:
            return math.inf

    @property
    def is_finite(self) -> bool:
        """Whether the perplexity is finite, so that no activation became NaN or infinite."""
        return math.isfinite(self.perplexity)


def window_tokens(asked: int | None, max_positions: int) -> int:
    """Tokens of a window: `asked`, or else the model's positions, 2,048 at most.

    Raises `UserError` where more is asked for than the model can see.
    """
    if asked is not None and asked > max_positions:
        raise UserError(f"--window {asked}: the model has {max_positions} positions")
    return asked or min(LONGEST_WINDOW, max_positions)


def text_windows(
    path: Path, tokenizer: Any, window: int, max_windows: int | None = None
) -> torch.Tensor:
    """`[windows, window]` token ids of a text file."""
    return windows_of(read_text(path), path, tokenizer, window, max_windows)


def windows_of(
    text: str, source: Path | str, tokenizer: Any, window: int, max_windows: int | None = None
) -> torch.Tensor:
    """`[windows, window]` token ids of a text. Raises `UserError` for less than one window."""
    if tokenizer is None:
        raise UserError(f"{source}: the model has no tokenizer, so text cannot be read")
    token_ids = tokenizer.encode(text, verbose=False)
    count = len(token_ids) // window
    if count == 0:
        raise UserError(
            f"{source}: holds {len(token_ids)} tokens, fewer than one window of {window}; "
            "use --window with a smaller number or a longer text"
        )
    count = min(count, max_windows or count)
    return torch.tensor(token_ids[: count * window]).view(count, window)


def load_stages(
    config: Any,
    weights: Weights,
    cuts: Sequence[tuple[int, int]],
    precisions: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    roundings: Roundings = NEAREST,
) -> list[StageModel]:
    """The stages of a plan (or one stage of all layers) in this process."""
    total = config.num_hidden_layers
    stages = [
        load_stage(
            config,
            weights,
            LayerRange(a, b, total),
            list(precisions[a:b]),
            dtype,
            device,
            roundings=roundings,
        )
        for a, b in cuts
    ]
    for stage in stages:
        prepare_kernels(stage, TOKENS_AT_ONCE)
    return stages


@torch.inference_mode()
def evaluate(
    stages: Sequence[StageModel],
    windows: torch.Tensor,
    on_windows: Callable[[int], None] = lambda _: None,
) -> Loss:
    """The loss of `[n, W]` windows through the stages in order."""
    at_once = max(1, TOKENS_AT_ONCE // windows.shape[1])
    total, count = 0.0, 0
    for start in range(0, len(windows), at_once):
        part = windows[start : start + at_once].to(stages[0].device)
        hidden = stages[0].embed(part)
        for stage in stages:
            hidden = stage.run(hidden)
        total += next_token_loss(stages[-1], hidden, part)
        count += part.shape[0] * (part.shape[1] - 1)
        on_windows(start + len(part))
    return Loss(total, count)


def next_token_loss(last: StageModel, hidden: torch.Tensor, token_ids: torch.Tensor) -> float:
    """The summed loss (nats) of the tokens `[b, W]`, without the first of each row.

    `hidden` `[b, W, H]` comes from the last stage. Logits are computed for some tokens at a time,
    as they are the largest tensor.
    """
    states, targets = hidden[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten()
    rows = max(1, LOGITS_AT_ONCE // last.config.vocab_size)
    parts = zip(states.split(rows), targets.split(rows), strict=True)
    return math.fsum(
        float(cross_entropy(last.head(some).float(), wanted, reduction="sum"))
        for some, wanted in parts
    )
