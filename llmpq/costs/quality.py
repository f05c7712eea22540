"""What lower precisions cost in quality: a sensitivity a layer and precision, which add up.

Summed sensitivity x (nats a token) means 100 * (exp(scale * x) - 1) percent of perplexity.
Without a sensitivity file there is a prior, the same for all layers: its orders of magnitude are
those of round-to-nearest weights in groups of 128, as the GPTQ and AWQ papers publish them for
models of 7 to 13 billion parameters. It is no measurement of the model at hand, and says so.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmpq.errors import UserError
from llmpq.model_spec import ModelSpec
from llmpq.profile_data import Sensitivity

# Rise of the loss, in nats a token, when all layers are held at a precision.
PRIOR_NATS = {"16": 0.0, "8": 0.001, "8-w8a8": 0.01, "4": 0.05, "3": 0.25}
PRIOR_SOURCE = "prior, not measured for this model"
DEFAULT_MAX_LOSS_PERCENT = 1.0
MAX_EXPONENT = 700.0  # a little more has no exponential among floats


@dataclass(frozen=True)
class QualityModel:
    """`omega[precision][layer]`, and the fit that turns its sum into percent of perplexity."""

    omega: Mapping[str, Sequence[float]]
    scale: float
    source: str

    def percent(self, sum_omega: float) -> float:
        """Rise of the perplexity in percent."""
        return 100 * math.expm1(min(self.scale * sum_omega, MAX_EXPONENT))

    def budget(self, percent: float) -> float:
        """The largest summed sensitivity whose rise is at most `percent`."""
        return math.log1p(percent / 100) / self.scale if self.scale else math.inf

    def sum_omega(self, precisions: Sequence[str]) -> float:
        """Summed sensitivity of a precision for every layer."""
        return math.fsum(self.omega[p][layer] for layer, p in enumerate(precisions))


def prior_quality(num_layers: int) -> QualityModel:
    """The built-in prior, spread evenly over the layers."""
    omega = {name: [nats / num_layers] * num_layers for name, nats in PRIOR_NATS.items()}
    return QualityModel(omega, 1.0, PRIOR_SOURCE)


def measured_quality(sensitivity: Sensitivity, spec: ModelSpec, path: str) -> QualityModel:
    """From a sensitivity file; raises `UserError` where it is of another number of layers."""
    if sensitivity.num_layers != spec.num_layers:
        raise UserError(
            f"{path}: is of a model with {sensitivity.num_layers} layers, "
            f"{spec.name} has {spec.num_layers}"
        )
    source = f"{sensitivity.indicator}, {sensitivity.model}"
    return QualityModel(sensitivity.table(), sensitivity.fit.scale, source)
