"""Measures the quality cost of each precision in each layer, and fits percent to its sum.

Rows come from one of the indicators (`indicators`). Plans are measured as a whole with the weights
that would be served, and the fit from summed sensitivity to percent is a line through them
(`quality_fit`). Both are measured as divergence from the 16-bit model, not as rise of the loss: on
few tokens the rise is mostly chance (a first-order term in the change by rounding, whose mean is
zero), the divergence is not, and their means are close.

Text is split: calibration statistics come from its first half, all measurements from the second, so
that quality is not measured on the text that weights were fitted to.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmpq.checkpoint.calibration_file import CalibrationFile
from llmpq.evaluation.perplexity import LOGITS_AT_ONCE, Loss
from llmpq.evaluation.streaming import DamageSum, Streamed, Variant, stream
from llmpq.models.stage_model import LayerPrecision, StageModel
from llmpq.profile_data import LayerSensitivity, MeasuredPlan, QualityFit
from llmpq.profiler.indicators import (
    InputVariance,
    LoadableModel,
    SensitivityCell,
    hessian_rows,
    random_rows,
    sensitivity_cells,
    variance_rows,
)
from llmpq.profiler.quality_fit import draw_plans, fit_quality

Indicator = Literal["measured", "variance", "hessian", "random"]
Method = Literal["fast", "exact"]
Steps = Callable[[int, int], None]  # called with steps done and their total


@dataclass(frozen=True)
class MeasurementOptions:
    """What to measure; with `apart`, attention and FFN of each layer as well as the layer."""

    precisions: tuple[str, ...]
    indicator: Indicator = "measured"
    method: Method = "fast"
    apart: bool = False
    seed: int = 0


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of the linears' inputs at 16 bits, where the indicator needs them."""

    calibration: CalibrationFile | None = None
    variance: InputVariance | None = None


@dataclass(frozen=True)
class SensitivityResult:
    """The rows, the fit, and the 16-bit model's loss on the same windows."""

    rows: list[LayerSensitivity]
    fit: QualityFit
    base: Loss


def measure_sensitivity(
    loadable: LoadableModel,
    recipe: MeasurementOptions,
    windows: Tensor,
    inputs: InputStatistics = InputStatistics(),
    on_step: Steps = lambda done, total: None,
) -> SensitivityResult:
    """Measures every layer at every precision, and plans, on `[n, W]` windows.

    "fast" streams all variants through one layer after the other; "exact" holds the whole model
    at every precision and runs one variant after the other.
    """
    wanted = sensitivity_cells(loadable.num_layers, recipe.precisions, recipe.apart)
    measures = recipe.indicator == "measured"
    singles = [cell.variant(loadable.num_layers) for cell in wanted] if measures else []
    plans = draw_plans(loadable.num_layers, recipe.precisions, recipe.seed)
    variants: list[Variant] = [["16"] * loadable.num_layers, *singles, *plans]
    run = _streamed if recipe.method == "fast" else _whole
    base, *found = run(loadable, variants, windows, on_step)
    if measures:
        rows = [c.row(_divergence(one)) for c, one in zip(wanted, found, strict=False)]
    else:
        rows = _calculated(loadable, recipe, wanted, inputs, on_step)
    whole = [_divergence(one) for one in found[len(singles) :]]
    return SensitivityResult(rows, fit_quality(_points(rows, plans, whole)), base.loss)


def gather_input_variance(
    loadable: LoadableModel, windows: Tensor, on_layer: Callable[[int], None] = lambda _: None
) -> InputVariance:
    """The variance of every linear's inputs on `[n, W]` windows, at 16 bits."""
    variance = InputVariance()
    loadable.run(windows, variance.watch, on_layer)
    return variance


def _calculated(
    loadable: LoadableModel,
    recipe: MeasurementOptions,
    wanted: Sequence[SensitivityCell],
    inputs: InputStatistics,
    on_step: Steps,
) -> list[LayerSensitivity]:
    def on_layer(done: int) -> None:
        on_step(done, loadable.num_layers)

    if recipe.indicator == "variance":
        assert inputs.variance is not None
        return variance_rows(loadable, wanted, inputs.variance.of, on_layer)
    if recipe.indicator == "hessian":
        assert inputs.calibration is not None
        statistics, share = inputs.calibration.statistics, inputs.calibration.share
        return hessian_rows(loadable, wanted, statistics, on_layer, share)
    return random_rows(wanted, recipe.seed)


def _points(
    rows: Sequence[LayerSensitivity], plans: Sequence[list[str]], rises: Sequence[float]
) -> list[MeasuredPlan]:
    table = {(r.layer, r.precision): r.sensitivity for r in rows if r.part == "layer"}
    return [
        MeasuredPlan(
            precisions=plan,
            sum_sensitivity=sum(table.get(key, 0.0) for key in enumerate(plan)),
            rise=rise,
        )
        for plan, rise in zip(plans, rises, strict=True)
    ]


def _divergence(one: Streamed) -> float:
    assert one.divergence is not None
    return one.divergence


def _streamed(
    loadable: LoadableModel, variants: Sequence[Variant], windows: Tensor, on_step: Steps
) -> list[Streamed]:
    return stream(
        loadable.config,
        loadable.weights,
        variants,
        windows,
        loadable.dtype,
        loadable.device,
        loadable.roundings,
        on_layer=lambda done: on_step(done, loadable.num_layers),
    )


@torch.inference_mode()
def _whole(
    loadable: LoadableModel, variants: Sequence[Variant], windows: Tensor, on_step: Steps
) -> list[Streamed]:
    """Runs each variant as a whole model with exchanged layers; the first must be 16 bits."""
    needed = dict.fromkeys(precision for variant in variants for precision in variant)
    last = loadable.num_layers
    models = {p: loadable.load(0, last, [p] * last) for p in needed}
    sums = [DamageSum() for _ in variants]
    rows = max(1, LOGITS_AT_ONCE // loadable.config.vocab_size // windows.shape[1])
    pieces = windows.split(rows)
    for number, piece in enumerate(pieces):
        token_ids = piece.to(loadable.device)
        base: Tensor | None = None
        for at, (variant, total) in enumerate(zip(variants, sums, strict=True)):
            with _assembled(models, variant) as model:
                own = _log_probabilities(model, token_ids)
            base = own if base is None else base
            total.add(own, token_ids[:, 1:].flatten(), base)
            on_step(number * len(variants) + at + 1, len(pieces) * len(variants))
    return [total.result() for total in sums]


def _log_probabilities(model: StageModel, token_ids: Tensor) -> Tensor:
    """Log probabilities fp32 `[b (W - 1), V]` of the tokens `[b, W]`."""
    hidden = model.run(model.embed(token_ids))
    return model.head(hidden[:, :-1].flatten(0, 1)).float().log_softmax(-1)


@contextmanager
def _assembled(models: dict[LayerPrecision, StageModel], variant: Variant) -> Iterator[StageModel]:
    """The 16-bit model with the variant's layers in place of its own."""
    model = models["16"]
    layers = model.all_layers
    own = list(layers)
    for index, precision in enumerate(variant):
        if precision != "16":
            layers[index] = models[precision].all_layers[index]
    yield model
    for index, layer in enumerate(own):
        layers[index] = layer
