"""Perplexity of the weights that are served, through the stages that serve them.

Protocol: the text is tokenised as one, cut into windows of equal length without overlap (the last,
shorter piece is dropped), and every token of a window but the first is predicted from those before.
Perplexity is exp of the mean loss over all predicted tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from llmpq.artifact import read_text
from llmpq.errors import UserError
from llmpq.models.stage_model import LayerRange, StageModel
from llmpq.runtime.checkpoint import Weights
from llmpq.runtime.loader import load_stage

TOKENS_AT_ONCE = 2048  # of hidden states and logits held in memory


@dataclass(frozen=True)
class Loss:
    """Summed loss (nats) over predicted tokens."""

    total: float
    num_tokens: int

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.total / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.mean)


def text_windows(
    path: Path, tokenizer: Any, window: int, max_windows: int | None = None
) -> torch.Tensor:
    """`[windows, window]` token ids of a text file."""
    if tokenizer is None:
        raise UserError(f"{path}: the model has no tokenizer, so text cannot be read")
    token_ids = tokenizer.encode(read_text(path), verbose=False)
    count = len(token_ids) // window
    if count == 0:
        raise UserError(
            f"{path}: holds {len(token_ids)} tokens, fewer than one window of {window}; "
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
) -> list[StageModel]:
    """The stages of a plan (or one stage of all layers) in this process."""
    total = config.num_hidden_layers
    return [
        load_stage(config, weights, LayerRange(a, b, total), list(precisions[a:b]), dtype, device)
        for a, b in cuts
    ]


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
        total += _loss(stages, part)
        count += part.shape[0] * (part.shape[1] - 1)
        on_windows(start + len(part))
    return Loss(total, count)


def _loss(stages: Sequence[StageModel], token_ids: torch.Tensor) -> float:
    hidden = stages[0].embed(token_ids)
    for stage in stages:
        hidden = stage.run(hidden, attention_mask=None, position_ids=None, cache=None)
    logits = stages[-1].head(hidden[:, :-1]).float()
    targets = token_ids[:, 1:]
    return float(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
