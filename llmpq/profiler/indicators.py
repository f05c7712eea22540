"""Four indicators of the sensitivity of a layer at a precision, with all others at 16 bits.

    measured  the divergence from the 16-bit model's next-token distributions, nats a token
    variance  D S^2 G: inner dimension x squared step x variance of the inputs, summed over linears
              (LLM-PQ, arXiv 2403.01136, eq. 3: the variance that rounding adds to the outputs)
    hessian   tr(dW H dW^T) x the top eigenvalue of H, summed over linears; H = X^T X / T is the
              mean second moment of the inputs, dW the change by rounding
    random    random numbers, larger at fewer bits: the baseline for the other indicators

"measured" needs runs of variants, which this module only names; it computes the other three. A
layer at "8+experts@4" has the sum over experts' linears at 4 bits and all others at 8. An expert's
error counts for the share of tokens that it sees.
Not covered: the effect of 8-bit activations ("8-w8a8") in any indicator but "measured".
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmpq.checkpoint.checkpoint import Weights
from llmpq.checkpoint.loader import load_stage
from llmpq.checkpoint.roundings import NEAREST, Roundings
from llmpq.evaluation.streaming import LayerObserver, stream
from llmpq.models.family import PartOfLayer, is_of_expert, part_of
from llmpq.models.stage_model import LayerPrecision, LayerRange, StageModel
from llmpq.precision import PRECISIONS, group_size, layer_precision, variance_of_errors
from llmpq.profile_data import LayerSensitivity

LayerPart = Literal["layer", "attention", "ffn"]
POWER_STEPS, POWER_TOLERANCE = 500, 1e-6


@dataclass(frozen=True)
class LoadableModel:
    """A model and the settings with which it is loaded."""

    config: Any
    weights: Weights
    dtype: torch.dtype
    device: torch.device
    roundings: Roundings = NEAREST

    @property
    def num_layers(self) -> int:
        """All layers of the model."""
        return int(self.config.num_hidden_layers)

    def load(self, first: int, end: int, precisions: Sequence[LayerPrecision]) -> StageModel:
        """Loads layers `first` up to `end`."""
        layers = LayerRange(first, end, self.num_layers)
        return load_stage(
            self.config,
            self.weights,
            layers,
            precisions,
            self.dtype,
            self.device,
            roundings=self.roundings,
        )

    def run(self, windows: Tensor, watch: LayerObserver, on_layer: Callable[[int], None]) -> None:
        """Runs the 16-bit model on `[n, W]` windows under `watch`, with one layer in memory."""
        stream(
            self.config,
            self.weights,
            [],
            windows,
            self.dtype,
            self.device,
            watch=watch,
            on_layer=on_layer,
        )


@dataclass(frozen=True)
class SensitivityCell:
    """One layer, or a part of it, at one precision."""

    layer: int
    precision: str
    part: LayerPart = "layer"

    def variant(self, num_layers: int) -> list[LayerPrecision]:
        """The model with only this layer, or part, below 16 bits."""
        low = self.precision if self.part == "layer" else PartOfLayer(self.precision, self.part)
        return [low if layer == self.layer else "16" for layer in range(num_layers)]

    def row(self, sensitivity: float) -> LayerSensitivity:
        """The row of a sensitivity file."""
        return LayerSensitivity(
            layer=self.layer, precision=self.precision, part=self.part, sensitivity=sensitivity
        )


def sensitivity_cells(
    num_layers: int, precisions: Sequence[str], apart: bool = False
) -> list[SensitivityCell]:
    """Every layer at every precision below 16 bits; with `apart`, attention and FFN as well."""
    parts: tuple[LayerPart, ...] = ("layer", "attention", "ffn") if apart else ("layer",)
    return [
        SensitivityCell(layer, precision, part)
        for precision in precisions
        if precision != "16"
        for part in parts
        for layer in range(num_layers)
    ]


def random_rows(wanted: Sequence[SensitivityCell], seed: int) -> list[LayerSensitivity]:
    """A random number for each layer and part, times the variance of errors at its bits."""
    draw = random.Random(seed)
    keys = dict.fromkeys((cell.layer, cell.part) for cell in wanted)
    drawn = {key: draw.random() for key in keys}
    return [
        cell.row(drawn[cell.layer, cell.part] * variance_of_errors(cell.precision))
        for cell in wanted
    ]


@dataclass
class InputVariance:
    """The variance of the inputs of each linear, over tokens and features."""

    _sums: dict[str, list[float]] = field(default_factory=dict)
    _tokens: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def watch(self, stage: StageModel) -> Iterator[None]:
        """Adds the inputs of the stage's linears while the context is open."""
        stage.keep_experts_one_by_one()
        handles = [
            linear.register_forward_pre_hook(partial(self._add, name))
            for name, linear in stage.linears().items()
        ]
        yield
        for handle in handles:
            handle.remove()

    def of(self, name: str) -> float:
        """The variance of the inputs of the weight `name`, times the share of tokens it saw."""
        if name not in self._sums:  # an expert that no token was routed to
            return 0.0
        count, total, squares = self._sums[name]
        share = self._tokens[name] / max(self._tokens.values())
        return share * max(0.0, squares / count - (total / count) ** 2)

    def _add(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        self._tokens[name] += x[..., 0].numel()
        new = (x.numel(), float(x.sum(dtype=torch.float64)), float(x.square().sum()))
        old = self._sums.get(name, [0.0, 0.0, 0.0])
        self._sums[name] = [a + b for a, b in zip(old, new, strict=True)]


def variance_rows(
    loadable: LoadableModel,
    wanted: Sequence[SensitivityCell],
    variance: Callable[[str], float],
    on_layer: Callable[[int], None] = lambda _: None,
) -> list[LayerSensitivity]:
    """Rows of the variance indicator; `variance` maps a weight's name to that of its inputs."""

    def damage(name: str, linear: nn.Module, precision: str) -> float:
        raw = _raw(loadable, name, linear)
        step = mean_square_step(raw, PRECISIONS[precision].weight_bits)
        return raw.shape[1] * step * variance(name)

    return _operator_rows(loadable, wanted, damage, lambda _: "16", on_layer)


def hessian_rows(
    loadable: LoadableModel,
    wanted: Sequence[SensitivityCell],
    moments: Callable[[str], Tensor],
    on_layer: Callable[[int], None] = lambda _: None,
    share: Callable[[str], float] = lambda _: 1.0,
) -> list[LayerSensitivity]:
    """Rows of the Hessian indicator; `moments` maps weights to H, fp32 `[blocks, B, B]`.

    `share` maps them to the share of tokens that they see.
    """
    eigenvalues: dict[str, float] = {}

    def damage(name: str, linear: Any, precision: str) -> float:
        if not share(name):  # an expert that no token was routed to
            return 0.0
        blocks = moments(name)
        if name not in eigenvalues:
            eigenvalues[name] = max(top_eigenvalue(block) for block in blocks)
        lost = _raw(loadable, name, linear) - linear.dequantized_weight().float()
        return share(name) * output_error(lost, blocks) * eigenvalues[name]

    return _operator_rows(loadable, wanted, damage, lambda precision: precision, on_layer)


def mean_square_step(weight: Tensor, bits: int) -> float:
    """The mean squared step of the grids that cover each group of a weight `[out, in]`."""
    groups = weight.unflatten(1, (-1, group_size(bits, weight.shape[1])))
    span = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    return float((span / (2**bits - 1)).square().mean())


def output_error(lost: Tensor, moments: Tensor) -> float:
    """tr(dW H dW^T) of `lost [out, in]`: the summed squared error of outputs, for a token."""
    parts = lost.split(moments.shape[-1], dim=1)
    return sum(
        float((part @ block.to(part)).mul_(part).sum())
        for part, block in zip(parts, moments, strict=True)
    )


def top_eigenvalue(matrix: Tensor) -> float:
    """The top eigenvalue of a positive semi-definite `[B, B]`, by power iteration."""
    vector = matrix.sum(0) + matrix.diagonal()
    found = 0.0
    for _ in range(POWER_STEPS):
        length = float(vector.norm())
        if length == 0.0:
            return 0.0
        vector = matrix @ (vector / length)
        before, found = found, float(vector.norm())
        if abs(found - before) <= POWER_TOLERANCE * found:
            break
    return found


def _operator_rows(
    loadable: LoadableModel,
    wanted: Sequence[SensitivityCell],
    damage: Callable[[str, Any, str], float],
    loaded_at: Callable[[str], str],
    on_layer: Callable[[int], None],
) -> list[LayerSensitivity]:
    """Sums `damage(name, linear, precision)` over the linears of every cell, layer by layer.

    The linears are those of the layer at precision `loaded_at(precision)`. Each precision is
    computed once, whatever the number of pairs for experts and the rest that have it.
    """
    sums = defaultdict[tuple[int, str, LayerPart, bool], float](float)
    alone = dict.fromkeys(part for cell in wanted for part in layer_precision(cell.precision))
    for layer in range(loadable.num_layers):
        for precision in (p for p in alone if p != "16"):
            stage = loadable.load(layer, layer + 1, [loaded_at(precision)])
            for name, linear in stage.linears().items():
                lost = damage(name, linear, precision)
                parts: tuple[LayerPart, ...] = ("layer", part_of(name))
                for part in parts:
                    sums[layer, precision, part, is_of_expert(name)] += lost
            del stage
        on_layer(layer + 1)

    def total(cell: SensitivityCell) -> float:
        rest, experts = layer_precision(cell.precision)
        pairs = ((rest, False), (experts, True))
        return sum(sums[cell.layer, precision, cell.part, one] for precision, one in pairs)

    return [cell.row(total(cell)) for cell in wanted]


def _raw(loadable: LoadableModel, name: str, linear: Any) -> Tensor:
    shape = (linear.out_features, linear.in_features)
    return loadable.weights.read(name, shape).to(loadable.device).float()
