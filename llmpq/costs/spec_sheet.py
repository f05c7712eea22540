"""Seconds of a layer on a device that nobody has profiled, from the figures of its spec sheet.

Each matrix of the layer takes the larger of its arithmetic at the peak that products reach and its
bytes at the bandwidth that they reach; attention likewise with its own shares, and norms and
activations by their bytes. A layer's calls cost a fixed overhead on top. The shares are few, the
same for all devices, and fitted to tables of times of ten NVIDIA GPUs (`assets/efficiency.yaml`,
made by `scripts/fit_efficiency.py`); `error` says how far off a GPU is that the fit has not seen.

Lengths may be numpy arrays; times are seconds. Not covered: the scores that eager attention writes
to memory, CPUs, Apple's and AMD's devices other than by the same formula (no table held them), and
kernels less tuned than the tables' (a 4-bit product that unpacks its weights first).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from llmpq.artifact import Strict, read_yaml
from llmpq.costs.fits import Accuracy
from llmpq.costs.links import Seconds, Tokens
from llmpq.devices import DeviceType
from llmpq.model_spec import ModelSpec
from llmpq.precision import PRECISIONS

EFFICIENCY_PATH = Path(__file__).parents[1] / "assets" / "efficiency.yaml"
USUAL_WATTS = 300.0  # of a board whose sheet does not say
# What a layer's kernels take to start and to drain: 12 of them, 3.4 us each (`kernel_us`).
STARTS_S = 40e-6
# That, and an engine's calls: whole layers took 0.15 ms longer in one than their kernels did. Only
# one source of the fit shows it, and software changes it: hence one round figure.
LAUNCH_S = 200e-6


class Share(Strict):
    """What products at one precision reach, as a share of what they reach at 16 bits.

    `errors`: by phase, of these ratios on a GPU that their fit had not seen.
    """

    peak: float
    bandwidth: float
    errors: dict[str, float]


class Efficiency(Strict):
    """What kernels reach of spec sheets: `assets/efficiency.yaml`."""

    sources: list[str]
    num_gpus: int
    coefficients: dict[str, float]
    precisions: dict[str, Share]
    errors: dict[str, float]  # by phase: mean over left-out GPUs of the mean relative error


@cache
def efficiency() -> Efficiency:
    """The fit that ships with llmpq."""
    return read_yaml(EFFICIENCY_PATH, Efficiency)


def error(device: DeviceType, phase: str, precision: str = "16") -> float | None:
    """Mean relative error on a GPU that the fit has not seen; None where it has seen none alike."""
    if not _is_covered(device):
        return None
    return efficiency().errors[phase] + efficiency().precisions[precision].errors[phase]


def _is_covered(device: DeviceType) -> bool:
    """All devices of the fit were NVIDIA's, with tensor cores (capability 7.0 and above)."""
    major = device.compute_capability.partition(".")[0]
    return major.isdigit() and int(major) >= 7


def provenance(device: DeviceType) -> str:
    """Where the times come from and how far off they may be."""
    source = f"kernels fitted on {efficiency().num_gpus} GPUs"
    if not _is_covered(device):
        return f"{source}, none of them of this kind: how far off is not known"
    of_phases = (f"{100 * (error(device, p) or 0):.0f} % in {p}" for p in ("prefill", "decode"))
    return f"{source}, a left-out one off by {' and '.join(of_phases)} at 16 bits"


def kernel_s(operations: Any, num_bytes: Any, flops: Any, bandwidth: Any, sharpness: float) -> Any:
    """Seconds of one kernel, or of an array of them: a maximum with a round corner.

    (compute**sharpness + memory**sharpness) ** (1 / sharpness): where arithmetic and memory take
    about as long, a kernel does not hide one behind the other fully.
    """
    return rounded_maximum(operations / flops, num_bytes / bandwidth, sharpness)


def rounded_maximum(one: Any, other: Any, sharpness: float) -> Any:
    """At least the larger, at most 2 ** (1 / sharpness) times that."""
    larger = np.maximum(one, other)
    ratio = np.minimum(one, other) / np.maximum(larger, 1e-30)
    return larger * (1.0 + ratio**sharpness) ** (1.0 / sharpness)


def reached_peak(device: DeviceType, c: Mapping[str, float], share: str = "linear_peak") -> float:
    """What share of its peak a large matrix product (or attention) reaches on a device.

    A board shares its power with memory and the rest (`board_watts`), so small boards slow their
    clocks down. GeForce tensor cores work at half rate with fp32 sums: easier to keep busy, and
    the clock rises above the sheet's.
    """
    watts = device.board_watts or USUAL_WATTS
    gain = c["half_rate_peak"] if device.fp16_accumulate_tflops is not None else 1.0
    return min(1.0, c[share] * gain * watts / (watts + c["board_watts"]))


Busy = Callable[[int, Tokens], Seconds]


@dataclass(frozen=True)
class Roofline:
    """One phase at one precision on one device: what its kernels take, and the launches."""

    busy: Busy
    error: float | None

    def seconds(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """By whichever of arithmetic and memory is the limit, kernel by kernel."""
        return self.busy_s(micro_batch, tokens) + LAUNCH_S

    def accuracy(self, micro_batch: int, tokens: float) -> Accuracy:
        """The same everywhere: how far off devices were that were left out of the fit."""
        return Accuracy("spec sheet", self.error)

    def busy_s(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """The same without the launches."""
        return self.busy(micro_batch, np.asarray(tokens, dtype=float))


def rooflines(
    device: DeviceType, spec: ModelSpec, precisions: Iterable[str]
) -> dict[tuple[str, str], Roofline]:
    """By (precision, phase): layers in both phases, embedding and head."""
    speed = _speed(device)
    found = {
        ("", "embedding"): Roofline(_embedding(spec, speed), error(device, "prefill")),
        ("", "head"): Roofline(_head(spec, speed), error(device, "decode")),
    }
    for precision in precisions:
        tokens_s = _tokens_s(device, spec, precision, speed)
        prefill, decode = _prefill(spec, speed, tokens_s), _decode(spec, speed, tokens_s)
        found[precision, "prefill"] = Roofline(prefill, error(device, "prefill", precision))
        found[precision, "decode"] = Roofline(decode, error(device, "decode", precision))
    return found


@dataclass(frozen=True)
class _Speed:
    """What kernels at 16 bits reach on one device: operations and bytes a second."""

    linear_flops: float
    attention_flops: float
    linear_bandwidth: float
    attention_bandwidth: float
    copy_bandwidth: float
    eager_bandwidth: float
    sharpness: float


def _speed(device: DeviceType) -> _Speed:
    c = efficiency().coefficients
    peak, bandwidth = device.fp16_tflops * 1e12, device.bandwidth_gbs * 1e9
    return _Speed(
        linear_flops=peak * reached_peak(device, c),
        attention_flops=peak * reached_peak(device, c, "attention_peak"),
        linear_bandwidth=bandwidth * c["linear_bandwidth"],
        attention_bandwidth=bandwidth * c["attention_bandwidth"],
        copy_bandwidth=bandwidth * c["elementwise_bandwidth"],
        eager_bandwidth=bandwidth * c["eager_bandwidth"],
        sharpness=c["sharpness"],
    )


def _tokens_s(
    device: DeviceType, spec: ModelSpec, precision: str, speed: _Speed
) -> Callable[[Any], Any]:
    """Seconds of all that is done token by token: matrices, norms, activations."""
    held, share = PRECISIONS[precision], efficiency().precisions[precision]
    integer = 1.0 if held.weight_only else (device.int8_tops or 0.0) / device.fp16_tflops
    sizes = [(op.out_features, op.in_features) for op in spec.linears]
    flops = speed.linear_flops * share.peak * (integer or 1.0)  # without int8: as at 16 bits
    bandwidth = speed.linear_bandwidth * share.bandwidth
    compute_s = np.array([2.0 * n * k / flops for n, k in sizes])
    weights_s = np.array([held.weight_bytes(n, k) / bandwidth for n, k in sizes])
    values_s = np.array([2.0 * (n + k) / bandwidth for n, k in sizes])
    others_s = _elementwise_bytes(spec) / speed.eager_bandwidth
    norms_s = 2.0 * spec.layer_other_params / speed.eager_bandwidth

    def seconds(num_tokens: Any) -> Any:
        m = np.asarray(num_tokens, dtype=float)[..., None]
        each = rounded_maximum(m * compute_s, weights_s + m * values_s, speed.sharpness)
        return each.sum(axis=-1) + others_s * m[..., 0] + norms_s

    return seconds


def _elementwise_bytes(spec: ModelSpec) -> float:
    """Of one token: two norms and two sums, rotary positions, the activation; read and written."""
    num_wide = 1 + sum(op.out_features == spec.ffn_size for op in spec.linears)
    rotated = 2 * spec.head_dim * (spec.num_heads + spec.num_kv_heads)
    return 2.0 * (8 * spec.hidden_size + rotated + num_wide * spec.ffn_size)


def _prefill(spec: ModelSpec, speed: _Speed, tokens_s: Callable[[Any], Any]) -> Busy:
    """All tokens; causal attention, whose arithmetic is the lower triangle's."""
    attention_s = 2.0 * spec.num_heads * spec.head_dim / speed.attention_flops
    return lambda p, s: tokens_s(p * s) + attention_s * p * s * s


def _decode(spec: ModelSpec, speed: _Speed, tokens_s: Callable[[Any], Any]) -> Busy:
    """One token a request; attention reads the cache of the past and of this token."""
    per_token_s = rounded_maximum(
        4.0 * spec.num_heads * spec.head_dim / speed.attention_flops,
        2.0 * spec.kv_values_per_token / speed.attention_bandwidth,
        speed.sharpness,
    )
    return lambda q, past: tokens_s(q) + per_token_s * q * (past + 1)


def _embedding(spec: ModelSpec, speed: _Speed) -> Busy:
    """Rows are read and written."""
    token_s = 4.0 * spec.hidden_size / speed.copy_bandwidth
    return lambda p, s: token_s * p * s


def _head(spec: ModelSpec, speed: _Speed) -> Busy:
    """One product with the whole vocabulary, a row a request, at 16 bits."""
    compute_s = 2.0 * spec.head_params / speed.linear_flops
    weights_s = 2.0 * spec.head_params / speed.linear_bandwidth
    return lambda q, past: rounded_maximum(compute_s * q, weights_s, speed.sharpness) + 0.0 * past
