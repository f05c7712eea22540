"""How much quality a precision costs in each layer: the measured rise of the loss.

Indicator "measured": the model is held at 16 bits, one layer at a time goes to a lower precision,
and the loss on the calibration text is taken with the very weights that would be served. The sum
over layers is turned into percent of perplexity by a factor fitted to a few mixed plans measured
whole, and the error of that fit is kept beside it.
Not covered: the paper's variance and Hessian indicators; models larger than memory.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llmpq.models.family import find
from llmpq.models.stage_model import StageModel
from llmpq.profile_data import LayerSensitivity, QualityFit
from llmpq.runtime.checkpoint import Weights
from llmpq.runtime.evaluate import evaluate, load_stages

NUM_MIXED_PLANS = 6


class SensitivityMeter:
    """The model once at every precision, sharing nothing; layers are exchanged between them."""

    def __init__(
        self,
        config: Any,
        weights: Weights,
        precisions: Sequence[str],
        windows: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device,
        on_step: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.num_layers: int = config.num_hidden_layers
        self.precisions = [p for p in precisions if p != "16"]
        self.windows, self._on_step, self._steps = windows, on_step, 0
        cuts = [(0, self.num_layers)]
        models = {
            p: load_stages(config, weights, cuts, [p] * self.num_layers, dtype, device)[0]
            for p in ("16", *self.precisions)
        }
        self.model = models["16"]
        self._layers = {p: list(_layers(model)) for p, model in models.items()}
        self.base_loss = self._loss(["16"] * self.num_layers)

    def rows(self) -> list[LayerSensitivity]:
        """Every layer at every precision, alone."""
        return [
            LayerSensitivity(
                layer=layer,
                precision=precision,
                sensitivity=self._rise(self._one(layer, precision)),
            )
            for precision in self.precisions
            for layer in range(self.num_layers)
        ]

    def fit(self, rows: Sequence[LayerSensitivity]) -> QualityFit:
        """The factor from summed sensitivity to rise of loss, over uniform and mixed plans."""
        table = {(r.layer, r.precision): max(0.0, r.sensitivity) for r in rows}
        plans = [[p] * self.num_layers for p in self.precisions] + self._mixed()
        points = [
            (sum(table.get((i, p), 0.0) for i, p in enumerate(plan)), self._rise(plan))
            for plan in plans
        ]
        return fit_quality(points)

    def _mixed(self) -> list[list[str]]:
        draw = random.Random(0)
        choices = ["16", *self.precisions]
        return [draw.choices(choices, k=self.num_layers) for _ in range(NUM_MIXED_PLANS)]

    def _one(self, layer: int, precision: str) -> list[str]:
        return [precision if i == layer else "16" for i in range(self.num_layers)]

    def _rise(self, precisions: list[str]) -> float:
        return self._loss(precisions) - self.base_loss

    def _loss(self, precisions: list[str]) -> float:
        with self._set(precisions):
            loss = evaluate([self.model], self.windows).mean
        self._steps += 1
        self._on_step(self._steps)
        return loss

    @contextmanager
    def _set(self, precisions: list[str]) -> Iterator[None]:
        layers = _layers(self.model)
        for index, precision in enumerate(precisions):
            layers[index] = self._layers[precision][index]
        yield
        for index in range(self.num_layers):
            layers[index] = self._layers["16"][index]


def num_evaluations(num_layers: int, precisions: Sequence[str]) -> int:
    """Evaluations that a meter, its `rows` and its `fit` take."""
    lower = [p for p in precisions if p != "16"]
    return 1 + len(lower) * (num_layers + 1) + NUM_MIXED_PLANS


def fit_quality(points: Sequence[tuple[float, float]]) -> QualityFit:
    """Least squares through the origin of (summed sensitivity, measured rise of loss).

    Points are weighted for relative error, so that small rises, where budgets lie, count.
    The error is the mean difference in percent of perplexity.
    """
    usable = [(x, y) for x, y in points if x > 0]
    weights = [1 / (x + 0.002) ** 2 for x, _ in usable]
    above = sum(w * x * y for w, (x, y) in zip(weights, usable, strict=True))
    below = sum(w * x * x for w, (x, _) in zip(weights, usable, strict=True))
    scale = max(0.0, above / below) if below else 1.0
    errors = [abs(_percent(scale * x) - _percent(y)) for x, y in usable]
    mean_error = sum(errors) / len(errors) if errors else 0.0
    return QualityFit(scale=scale, mean_abs_error_percent=mean_error, num_plans=len(usable))


def _percent(rise: float) -> float:
    return 100 * math.expm1(rise)


def _layers(model: StageModel) -> nn.ModuleList:
    layers = find(model.model, f"{model.family.decoder}.{model.family.layers}")
    assert isinstance(layers, nn.ModuleList)
    return layers
