"""What lower precisions cost in quality: a sensitivity a layer and precision, which add up.

Summed sensitivity x means 100 * (exp(scale * x) - 1) percent of perplexity. Budgets are held with
`upper_scale`, which nearly all measured plans stayed below; what is shown is the expected rise.
Without a sensitivity file there is a generic estimate, the same for all layers: its orders of
magnitude are those of round-to-nearest weights in groups of 128, as the GPTQ and AWQ papers publish
them for models of 7 to 13 billion parameters. It is no measurement of the model at hand, and says
so.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmpq.errors import UserError
from llmpq.model_spec import ModelSpec
from llmpq.precision import LayerPrecision, layer_precision
from llmpq.profile_data import Sensitivity
from llmpq.quantizer import Quantizer

# Rise of the loss, in nats a token, when all layers are held at a precision.
PRIOR_NATS = {"16": 0.0, "8": 0.001, "8-w8a8": 0.01, "4": 0.05, "3": 0.25} | {
    "nf4": 0.04,
    "8-bnb": 0.001,
}
GENERIC_ESTIMATE = "generic estimate, not measured for this model"
DEFAULT_MAX_LOSS_PERCENT = 1.0
MAX_EXPONENT = 700.0  # a little more has no exponential among floats


@dataclass(frozen=True)
class QualityModel:
    """`omega[precision][layer]`, and the fit that turns its sum into percent of perplexity.

    `quantizer`: how the weights are rounded for which this holds; `model`: the one that was
    measured, "" for the generic estimate.
    """

    omega: Mapping[str, Sequence[float]]
    scale: float
    source: str
    upper_scale: float | None = None
    quantizer: Quantizer = Quantizer()
    model: str = ""

    def expected_percent(self, sum_omega: float) -> float:
        """The rise of the perplexity in percent that is to be expected."""
        return _percent(self.scale * sum_omega)

    def percent(self, sum_omega: float) -> float:
        """The rise that is hardly exceeded: what budgets are held against."""
        return _percent(self._held * sum_omega)

    def budget(self, percent: float) -> float:
        """The largest summed sensitivity whose rise hardly exceeds `percent`."""
        return math.log1p(percent / 100) / self._held if self._held else math.inf

    @property
    def _held(self) -> float:
        return self.scale if self.upper_scale is None else max(self.scale, self.upper_scale)

    def sum_omega(self, precisions: Sequence[str]) -> float:
        """Summed sensitivity of a precision for every layer."""
        return math.fsum(self.omega[p][layer] for layer, p in enumerate(precisions))


def for_all_layers(quality: QualityModel, spec: ModelSpec) -> QualityModel:
    """With what layers without experts lose at the rest of names with experts apart.

    Plans hold such a layer at "8" where the others are at "8+experts@4", and only that name may be
    known. Layers with experts lose infinitely much at a name that was not measured.
    """
    omega = dict(quality.omega)
    plain = [spec.kind_specs[kind].experts is None for kind in spec.kind_of_layers]
    for name, values in quality.omega.items():
        rest = layer_precision(name).rest
        if any(plain) and rest not in quality.omega:
            pairs = zip(plain, values, strict=True)
            omega[rest] = [value if alone else math.inf for alone, value in pairs]
    return replace(quality, omega=omega)


def _percent(nats: float) -> float:
    return 100 * math.expm1(min(nats, MAX_EXPONENT))


def prior_quality(num_layers: int) -> QualityModel:
    """The built-in generic estimate, spread evenly over the layers."""
    omega = {name: [nats / num_layers] * num_layers for name, nats in PRIOR_NATS.items()}
    return QualityModel(omega, 1.0, GENERIC_ESTIMATE)


def prior_of(spec: ModelSpec) -> QualityModel:
    """The generic estimate for a model. Of layers with experts also where these have fewer bits.

    Experts and the rest count by the parameters that a token meets in them: errors of matrices that
    it does not meet do it no harm.
    """
    plain = prior_quality(spec.num_layers)
    if all(kind.experts is None for kind in spec.kind_specs):
        return plain
    omega: dict[str, Sequence[float]] = dict(plain.omega)
    by_kind = [_share_of_experts(kind) for kind in spec.kind_specs]
    shares = [by_kind[kind] for kind in spec.kind_of_layers]
    for rest, experts in itertools.permutations(plain.omega, 2):
        each = zip(shares, plain.omega[rest], plain.omega[experts], strict=True)
        name = LayerPrecision(rest, experts).name
        omega[name] = [share * low + (1 - share) * high for share, high, low in each]
    return QualityModel(omega, 1.0, GENERIC_ESTIMATE)


def _share_of_experts(kind: ModelSpec) -> float:
    """The experts' share of the parameters that a token meets in a layer."""
    if kind.experts is None:
        return 0.0
    met = kind.experts.params * kind.experts.per_token / kind.experts.count
    return met / (met + kind.layer_params - kind.experts.params)


def measured_quality(sensitivity: Sensitivity, spec: ModelSpec, path: str) -> QualityModel:
    """From a sensitivity file; raises `UserError` where it is of another number of layers."""
    if sensitivity.num_layers != spec.num_layers:
        raise UserError(
            f"{path}: is of a model with {sensitivity.num_layers} layers, "
            f"{spec.name} has {spec.num_layers}"
        )
    fit, quantizer = sensitivity.fit, sensitivity.quantizer
    source = (
        f"{sensitivity.indicator}, {sensitivity.model}, {quantizer.method} weights; "
        f"fit +-{fit.mean_abs_error_percent:.2g} points"
    )
    table = sensitivity.table()
    return QualityModel(table, fit.scale, source, fit.upper_scale, quantizer, sensitivity.model)
