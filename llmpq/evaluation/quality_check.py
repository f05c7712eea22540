"""What the precisions of a run cost in quality, measured beside what was predicted.

The stages of a run evaluate a text with the weights they have just served, through their own
transport (`pipeline_loss`). The loss of the 16-bit model on the same windows is measured here,
layer by layer, on the first worker when the others are done, and kept for the next check
(XDG_CACHE_HOME/llmpq).
"""

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat, PositiveInt

from llmpq.artifact import Strict, cache_folder, read_json, read_text, write_json
from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.errors import UserError
from llmpq.evaluation.perplexity import Loss, text_windows
from llmpq.evaluation.streaming import stream
from llmpq.model_spec import ASSETS
from llmpq.run_report import Quality, Report

# Windows as those that sensitivity is measured on, so that both percentages mean the same.
WINDOW_TOKENS = 256
MOST_NATS = 700.0  # of a rise: above, exp of it is no number
MAX_WINDOWS = 80  # 20,400 predicted tokens
WEIGHT_FILES = (".safetensors", ".bin")


class KeptLoss(Strict):
    """The summed loss of the 16-bit model, as it is kept."""

    total: NonNegativeFloat
    num_tokens: PositiveInt


def check_text(asked: Path | None) -> Path:
    """The text that quality is checked on."""
    return asked or ASSETS / "evaluation.txt"


def check_windows(
    asked: Path | None, tokenizer: Any, max_positions: int, max_windows: int | None
) -> Any:
    """`[n, W]` token ids. Raises `UserError` where the text cannot be read or is too short."""
    window = min(WINDOW_TOKENS, max_positions)
    return text_windows(check_text(asked), tokenizer, window, max_windows or MAX_WINDOWS)


def sixteen_bits(
    config: Any,
    weights: Checkpoint,
    windows: Any,
    dtype: Any,
    device: Any,
    on_layer: Callable[[int], None],
) -> Loss:
    """The loss of `[n, W]` windows at 16 bits, from an earlier check where nothing has changed."""
    path = cache_folder() / "baselines" / f"{_key(weights.folder, windows, dtype, device)}.json"
    with suppress(UserError):  # not there, or broken: measured anew
        kept = read_json(path, KeptLoss)
        return Loss(kept.total, kept.num_tokens)
    sixteen = ["16"] * config.num_hidden_layers
    [found] = stream(
        config, weights, [sixteen], windows, dtype, device, divergence=False, on_layer=on_layer
    )
    if found.loss.is_finite:
        with suppress(UserError):  # a cache that cannot be written is none
            write_json(path, KeptLoss(total=found.loss.total, num_tokens=found.loss.num_tokens))
    return found.loss


def compare(
    report: Report, served: Loss, base: Loss, asked: Path | None, window: int
) -> Quality | None:
    """The rise of the perplexity, measured and predicted; None where one of them is no number."""
    predicted = report.predicted
    if not (served.is_finite and base.is_finite and served.mean - base.mean < MOST_NATS):
        return None
    return Quality(
        text=check_text(asked).name,
        window=window,
        num_tokens=served.num_tokens,
        perplexity=served.perplexity,
        baseline_perplexity=base.perplexity,
        measured_percent=100 * math.expm1(served.mean - base.mean),
        predicted_percent=None if predicted is None else predicted.quality_loss_percent,
    )


def summary(quality: Quality) -> str:
    """One line for people."""
    predicted = quality.predicted_percent
    said = "nothing was predicted" if predicted is None else f"predicted {predicted:+.2f} %"
    return (
        f"quality: {said}, measured {quality.measured_percent:+.2f} % (perplexity "
        f"{quality.baseline_perplexity:.2f} -> {quality.perplexity:.2f} on {quality.text}, "
        f"{quality.num_tokens:,} tokens)"
    )


def _key(folder: Path, windows: Any, dtype: Any, device: Any) -> str:
    """Changes with the configuration, the weight files, the tokens and how they are computed."""
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_FILES)
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    config = read_text(folder / "config.json")
    about = [config, stats, list(windows.shape), str(dtype), device.type]
    digest = hashlib.sha256(json.dumps(about).encode())
    digest.update(windows.contiguous().numpy().tobytes())
    return digest.hexdigest()
