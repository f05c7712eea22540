"""Evaluates many variants of a model at once, with one layer in memory at a time.

A *variant* is a precision for every layer. One pass carries the hidden states of all variants
through the layers: each layer is loaded once at every precision that some variant has there (16
bits first), and is freed before the next is loaded. Variants share states up to the first layer
where they differ. States are in files of a temporary folder (of $TMPDIR), in pieces of a few
windows.

Peak memory is that of loading and running one layer (with the embedding before the first and the
head after the last one) on `TOKENS_AT_ONCE` tokens, whatever the number of layers, variants and
windows, so that models larger than memory can be measured.

Shapes: n windows of W tokens, T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmpq.checkpoint.checkpoint import Weights
from llmpq.checkpoint.loader import load_stage
from llmpq.checkpoint.roundings import NEAREST, Roundings
from llmpq.evaluation.perplexity import LOGITS_AT_ONCE, TOKENS_AT_ONCE, Loss
from llmpq.models.stage_model import LayerPrecision, LayerRange, StageModel

Variant = Sequence[LayerPrecision]
Prefix = tuple[LayerPrecision, ...]  # the precisions of the layers passed so far
LayerObserver = Callable[[StageModel], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Streamed:
    """The loss of a variant, and its divergence from the 16-bit model.

    `divergence` is the mean KL divergence of its next-token distributions from the 16-bit model's,
    in nats a token, never negative; None where it was not asked for.
    """

    loss: Loss
    divergence: float | None = None


@torch.inference_mode()
def stream(
    config: Any,
    weights: Weights,
    variants: Sequence[Variant],
    windows: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    roundings: Roundings = NEAREST,
    *,
    divergence: bool = True,
    watch: LayerObserver | None = None,
    on_layer: Callable[[int], None] = lambda _: None,
) -> list[Streamed]:
    """Loss and divergence of every variant on `[n, W]` windows, in the order of `variants`.

    `divergence` False spares the 16-bit model's own pass where no variant needs it. `watch(stage)`
    is entered around a layer's 16-bit run on all windows, before the layer is loaded at any other
    precision. `on_layer(done)` is called after each layer. Raises `UserError` where a tensor is
    missing or a precision cannot be served.
    """
    sixteen: Prefix = ("16",) * config.num_hidden_layers
    asked = [tuple(variant) for variant in variants]
    carried = list(dict.fromkeys([sixteen, *asked] if divergence or watch else asked))
    pieces = windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1]))
    with TemporaryDirectory(prefix="llmpq-") as folder:
        states = _States(Path(folder))
        stage: StageModel | None = None
        for layer in range(len(sixteen)):
            passed = list(dict.fromkeys(variant[: layer + 1] for variant in carried))
            precisions = dict.fromkeys(prefix[-1] for prefix in passed)
            for precision in sorted(precisions, key=lambda precision: precision != "16"):
                stage = None  # frees the last one before the next is loaded
                layers = LayerRange(layer, layer + 1, len(sixteen))
                stage = load_stage(
                    config, weights, layers, [precision], dtype, device, roundings=roundings
                )
                for prefix in (p for p in passed if p[-1] == precision):
                    is_watched = watch is not None and prefix == sixteen[: layer + 1]
                    with watch(stage) if watch and is_watched else nullcontext():
                        _pass(stage, states, prefix, pieces)
            states.drop({prefix[:-1] for prefix in passed})
            on_layer(layer + 1)
        assert stage is not None
        judged = _judge(stage, states, set(asked), pieces, sixteen if divergence else None)
    return [judged[variant] for variant in asked]


class _States:
    """Hidden states in files, one for each prefix and piece of windows."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers: dict[Prefix, int] = {}
        self._made = 0

    def save(self, prefix: Prefix, piece: int, hidden: Tensor) -> None:
        """Writes the states `[..., H]` of one piece."""
        if prefix not in self._numbers:
            self._made += 1
            self._numbers[prefix] = self._made
        save_file({"hidden": hidden.contiguous()}, self._path(prefix, piece))

    def load(self, prefix: Prefix, piece: int, device: torch.device) -> Tensor:
        """Reads the states of a piece."""
        with safe_open(self._path(prefix, piece), framework="pt", device="cpu") as file:
            return file.get_tensor("hidden").to(device)

    def rows(self, prefix: Prefix, piece: int, rows: slice, device: torch.device) -> Tensor:
        """Reads some rows of a piece, along its first dimension."""
        with safe_open(self._path(prefix, piece), framework="pt", device="cpu") as file:
            return file.get_slice("hidden")[rows.start : rows.stop].to(device)

    def drop(self, prefixes: set[Prefix]) -> None:
        """Deletes the files of these prefixes."""
        for prefix in prefixes:
            number = self._numbers.pop(prefix, None)
            for path in self._folder.glob(f"{number}-*"):
                path.unlink()

    def _path(self, prefix: Prefix, piece: int) -> Path:
        return self._folder / f"{self._numbers[prefix]}-{piece}.safetensors"


def _pass(stage: StageModel, states: _States, prefix: Prefix, pieces: Sequence[Tensor]) -> None:
    """Runs all windows of a variant through a layer; the last keeps only predicting positions."""
    for number, piece in enumerate(pieces):
        if stage.layers.is_first:
            hidden = stage.embed(piece.to(stage.device))
        else:
            hidden = states.load(prefix[:-1], number, stage.device)
        hidden = stage.run(hidden)
        if stage.layers.is_last:
            hidden = hidden[:, :-1].flatten(0, 1)
        states.save(prefix, number, hidden)


def _judge(
    last: StageModel,
    states: _States,
    variants: set[Prefix],
    pieces: Sequence[Tensor],
    sixteen: Prefix | None,
) -> dict[Prefix, Streamed]:
    """The loss and divergence of final states, through the head of the `last` stage."""
    sums = {variant: DamageSum() for variant in variants}
    step = max(1, LOGITS_AT_ONCE // last.config.vocab_size)
    for number, piece in enumerate(pieces if variants else ()):
        targets = piece[:, 1:].flatten().to(last.device)
        for start in range(0, len(targets), step):
            rows = slice(start, min(start + step, len(targets)))

            def log_probabilities(variant: Prefix, at: int = number, rows: slice = rows) -> Tensor:
                hidden = states.rows(variant, at, rows, last.device)
                return last.head(hidden).float().log_softmax(-1)

            base = None if sixteen is None else log_probabilities(sixteen)
            for variant, total in sums.items():
                own = log_probabilities(variant) if variant != sixteen or base is None else base
                total.add(own, targets[rows], base)
    return {variant: total.result() for variant, total in sums.items()}


class DamageSum:
    """Adds up loss and divergence over chunks of tokens."""

    def __init__(self) -> None:
        self._loss, self._divergence, self._num_tokens = 0.0, 0.0, 0
        self._compared = True

    def add(self, own: Tensor, targets: Tensor, base: Tensor | None) -> None:
        """Adds T tokens: log probabilities fp32 `[T, V]`, targets `[T]`, 16-bit ones `[T, V]`.

        The divergence is summed as p (e^d - 1 - d) for d = log q - log p: probabilities sum to 1,
        so the terms p (e^d - 1) cancel, and no term is a difference of large numbers.
        """
        self._loss -= float(own.gather(1, targets[:, None]).double().sum())
        self._num_tokens += len(targets)
        self._compared &= base is not None
        if base is not None and base is not own:
            gap = own - base
            terms = torch.expm1(gap).sub_(gap).mul_(base.exp())
            self._divergence += float(terms.sum(-1).double().sum())

    def result(self) -> Streamed:
        """The means over all tokens."""
        mean = max(0.0, self._divergence) / self._num_tokens if self._compared else None
        return Streamed(Loss(self._loss, self._num_tokens), mean)
