"""Seconds of a layer on a device that nobody has profiled, from the figures of its spec sheet.

Each matrix of the layer takes the larger of its arithmetic at the peak that products reach and its
bytes at the bandwidth that they reach; attention likewise with its own shares, and norms and
activations by their bytes. What a plain 16-bit product reaches is few shares, the same for all
devices, fitted to tables of times of ten NVIDIA GPUs (`assets/efficiency.yaml`, made by
`scripts/fit_efficiency.py`); `error` says how far off a GPU is that the fit has not seen. Below 16
bits the kernel that will serve is priced, by `llmpq.kernel_table`: it may read packed weights, or
unpack them first. On a card a layer's launches come on top: between the kernels of a decode step
that is a CUDA graph, or beside the computing of a prefill, which is as slow as the slower of both.

Lengths may be numpy arrays; times are seconds. Not covered: the scores that eager attention writes
to memory, what a stage's call costs beside its layers; CPUs, Apple's and AMD's devices other than
by the same formula (no table held them).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from llmpq import kernel_table
from llmpq.artifact import Strict, read_yaml
from llmpq.costs.fits import Accuracy
from llmpq.costs.links import Seconds, Tokens
from llmpq.devices import DeviceType
from llmpq.kernel import (
    CPU_LAYER_S,
    EAGER_LAUNCH_S,
    HEAD_LAUNCHES,
    LAYER_LAUNCHES,
    START_S,
    Kernel,
)
from llmpq.machine import Machine, parse_capability
from llmpq.model_spec import LinearShape, ModelSpec
from llmpq.precision import PRECISIONS, group_size

EFFICIENCY_PATH = Path(__file__).parents[1] / "assets" / "efficiency.yaml"
USUAL_WATTS = 300.0  # of a board whose sheet does not say


class Efficiency(Strict):
    """What 16-bit kernels reach of spec sheets: `assets/efficiency.yaml`."""

    sources: list[str]
    num_gpus: int
    coefficients: dict[str, float]
    errors: dict[str, float]  # by phase: mean over left-out GPUs of the mean relative error


@cache
def efficiency() -> Efficiency:
    """The fit that ships with llmpq."""
    return read_yaml(EFFICIENCY_PATH, Efficiency)


def error(device: DeviceType, phase: str, kernels: Iterable[Kernel] = ()) -> float | None:
    """Mean relative error on a GPU that the fit has not seen; None where it has seen none alike.

    With `kernels`, of times that rest on these: their own errors come on top, and nothing is known
    of kernels that were not measured on a card of this capability.
    """
    if not _is_covered(device):
        return None
    errors = [_kernel_error(kernel, device) for kernel in kernels]
    known = [one for one in errors if one is not None]
    return efficiency().errors[phase] + max(known, default=0.0) if known == errors else None


def _kernel_error(kernel: Kernel, device: DeviceType) -> float | None:
    """Beyond that of a plain product."""
    if kernel.layout == "plain":
        return 0.0
    measured = kernel.efficiency.measured_on == parse_capability(device.compute_capability)
    return kernel.efficiency.error if measured else None


def _is_covered(device: DeviceType) -> bool:
    """All devices of the fit were NVIDIA's, with tensor cores (capability 7.0 and above)."""
    return parse_capability(device.compute_capability) >= (7, 0)


def provenance(device: DeviceType) -> str:
    """Where the times come from and how far off they may be."""
    fit = f"estimated by a fit to {efficiency().num_gpus} GPUs"
    if not _is_covered(device):
        return f"{fit}, none of this kind, so the error is not known"
    of_phases = (f"{100 * (error(device, p) or 0):.0f} % in {p}" for p in ("prefill", "decode"))
    return f"{fit} (+-{' and '.join(of_phases)} on GPUs left out of it, at 16 bits)"


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
class Launches:
    """What a call's launches add to the computing of its kernels.

    `starts_s`: gaps between kernels that are ready. `eager_s`: what the host takes to launch them
    one by one, while the device computes; 0 for a CUDA graph.
    """

    starts_s: float
    eager_s: float = 0.0

    def with_busy(self, busy_s: Any, sharpness: float) -> Any:
        """Seconds of a call whose kernels take `busy_s`."""
        return rounded_maximum(busy_s + self.starts_s, self.eager_s, sharpness)


@dataclass(frozen=True)
class Roofline:
    """One phase at one precision on one device: what its kernels take, and the launches.

    `busy` is without `attention`, which grows with the length beside the tokens.
    """

    busy: Busy
    error: float | None
    launches: Launches
    attention: Busy | None = None

    def seconds(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """By whichever of arithmetic and memory is the limit, kernel by kernel."""
        sharpness = efficiency().coefficients["sharpness"]
        return self.launches.with_busy(self.busy_s(micro_batch, tokens), sharpness)

    def without_attention_s(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """The same if attention cost nothing: it depends on the rows of the products alone."""
        sharpness = efficiency().coefficients["sharpness"]
        busy_s = self.busy(micro_batch, np.asarray(tokens, dtype=float))
        return self.launches.with_busy(busy_s, sharpness)

    def accuracy(self, micro_batch: int, tokens: float) -> Accuracy:
        """The same everywhere: how far off devices were that were left out of the fit."""
        return Accuracy("spec sheet", self.error)

    def busy_s(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """The same without the launches."""
        length = np.asarray(tokens, dtype=float)
        busy_s = self.busy(micro_batch, length)
        return busy_s if self.attention is None else busy_s + self.attention(micro_batch, length)


def rooflines(
    device: DeviceType, spec: ModelSpec, precisions: Iterable[str], machine: Machine
) -> dict[tuple[str, str], Roofline]:
    """By (precision, phase): layers in both phases, embedding and head.

    `machine`: the device as kernels see it. Precisions that none of its kernels serves are left
    out.
    """
    speed = speed_of(device)
    lookup, (_, head) = _launches(machine, 1)[0], _launches(machine, HEAD_LAUNCHES)
    found = {
        ("", "embedding"): Roofline(_embedding(spec, speed), error(device, "prefill"), lookup),
        ("", "head"): Roofline(_head(spec, speed), error(device, "decode"), head),
    }
    for precision in precisions:
        if kernel_table.serves(machine, precision):
            found |= _layer_rooflines(device, spec, precision, machine)
    return found


def _layer_rooflines(
    device: DeviceType, spec: ModelSpec, precision: str, machine: Machine
) -> dict[tuple[str, str], Roofline]:
    """Both phases of a layer at one precision."""
    speed = speed_of(device)
    groups = by_kernels(machine, spec, precision)
    tokens_s = _tokens_s(spec, groups, speed)
    kernels = [kernel for group in groups for kernel in group]
    launched = LAYER_LAUNCHES + sum(
        kernels[-1].num_launches(op.out_features, op.in_features)
        for kernels, ops in groups.items()
        for op in ops
    )
    eager, graph = _launches(machine, launched)
    errors = {phase: error(device, phase, kernels) for phase in ("prefill", "decode")}
    prefill = Roofline(
        lambda p, s: tokens_s(p * s), errors["prefill"], eager, _prefill_attention(spec, speed)
    )
    decode = Roofline(
        lambda q, past: tokens_s(q) + 0.0 * past,
        errors["decode"],
        graph,
        _decode_attention(spec, speed),
    )
    return {(precision, "prefill"): prefill, (precision, "decode"): decode}


def _launches(machine: Machine, count: int) -> tuple[Launches, Launches]:
    """Of a prefill, which is eager, and of a decode step."""
    if not machine.is_card:
        return Launches(CPU_LAYER_S), Launches(CPU_LAYER_S)
    eager = Launches(count * START_S, count * EAGER_LAUNCH_S)
    return eager, Launches(count * START_S) if machine.graphs else eager


KernelGroups = Mapping[tuple[Kernel, ...], Sequence[LinearShape]]


def by_kernels(machine: Machine, spec: ModelSpec, precision: str) -> KernelGroups:
    """A layer's matrices by the kernels that multiply by them."""
    bits = PRECISIONS[precision].weight_bits
    found: dict[tuple[Kernel, ...], list[LinearShape]] = {}
    for op in spec.linears:
        shape = op.out_features, op.in_features, group_size(bits, op.in_features)
        found.setdefault(kernel_table.choices(machine, precision, *shape), []).append(op)
    return found


@dataclass(frozen=True)
class Speed:
    """What kernels reach on one device: operations and bytes a second.

    `vector_flops` is the peak of arithmetic without tensor cores; others are what 16-bit kernels
    reach. `integer_flops` is at 8 bits; without such a rate, that of 16.
    """

    linear_flops: float
    integer_flops: float
    vector_flops: float
    attention_flops: float
    linear_bandwidth: float
    attention_bandwidth: float
    copy_bandwidth: float
    eager_bandwidth: float
    sharpness: float


def speed_of(device: DeviceType) -> Speed:
    c = efficiency().coefficients
    peak, bandwidth = device.fp16_tflops * 1e12, device.bandwidth_gbs * 1e9
    reached = reached_peak(device, c)
    return Speed(
        linear_flops=peak * reached,
        integer_flops=(device.int8_tops or device.fp16_tflops) * 1e12 * reached,
        vector_flops=(device.fp32_tflops or device.fp16_tflops) * 1e12,
        attention_flops=peak * reached_peak(device, c, "attention_peak"),
        linear_bandwidth=bandwidth * c["linear_bandwidth"],
        attention_bandwidth=bandwidth * c["attention_bandwidth"],
        copy_bandwidth=bandwidth * c["elementwise_bandwidth"],
        eager_bandwidth=bandwidth * c["eager_bandwidth"],
        sharpness=c["sharpness"],
    )


def _tokens_s(spec: ModelSpec, groups: KernelGroups, speed: Speed) -> Callable[[Any], Any]:
    """Seconds of all that is done token by token: matrices, norms, activations."""
    products = [_products_s(kernels, ops, speed) for kernels, ops in groups.items()]
    others_s = _elementwise_bytes(spec) / speed.eager_bandwidth
    norms_s = 2.0 * spec.layer_other_params / speed.eager_bandwidth

    def seconds(num_tokens: Any) -> Any:
        m = np.asarray(num_tokens, dtype=float)
        return sum(product(m) for product in products) + others_s * m + norms_s

    return seconds


def _products_s(
    kernels: Sequence[Kernel], ops: Sequence[LinearShape], speed: Speed
) -> Callable[[np.ndarray], np.ndarray]:
    """Seconds of some matrices, by the kernel for each number of rows."""
    each = [product_s(kernel, ops, speed) for kernel in kernels]
    limits = [kernel.max_rows for kernel in kernels[:-1]]

    def seconds(rows: np.ndarray) -> np.ndarray:
        total = each[-1](rows)
        for limit, kernel_s in reversed(list(zip(limits, each[:-1], strict=True))):
            total = np.where(rows <= limit, kernel_s(rows), total)
        return total

    return seconds


def product_s(
    kernel: Kernel, ops: Sequence[LinearShape], speed: Speed
) -> Callable[[np.ndarray], np.ndarray]:
    """Seconds of one kernel on some matrices, one after the other, by rows.

    Passes that unpack a weight come before the product, which then reads it at 16 bits.
    """
    reached = kernel.efficiency
    n, k = np.array([(op.out_features, op.in_features) for op in ops], dtype=float).T
    sizes = [(op.out_features, op.in_features) for op in ops]
    weights_s = np.array([kernel.weight_bytes(*size) for size in sizes]) / speed.linear_bandwidth
    values_s = 2.0 * (n + k) / speed.linear_bandwidth
    unpacked = sum(kernel.unpacked_bytes(*size) for size in sizes)
    share = kernel.unpacking.bandwidth if kernel.unpacking else 1.0
    before_s = unpacked / (speed.linear_bandwidth * share)
    rate = {
        "tensor": speed.linear_flops,
        "int8": speed.integer_flops,
        "vector": speed.vector_flops,
    }[reached.arithmetic]
    at, shares = np.array(reached.peak, dtype=float).T

    def seconds(rows: np.ndarray) -> np.ndarray:
        flops = rate * np.interp(np.log(np.maximum(rows, 1)), np.log(at), shares)
        m, flops = rows[..., None], np.asarray(flops)[..., None]
        compute_s = (2.0 * m + reached.unpack_operations) * n * k / flops
        passes = np.ceil(m / reached.pass_rows) if reached.pass_rows else 1.0
        memory_s = (passes * weights_s + m * values_s) / reached.bandwidth
        return rounded_maximum(compute_s, memory_s, speed.sharpness).sum(axis=-1) + before_s

    return seconds


def _elementwise_bytes(spec: ModelSpec) -> float:
    """Of one token: two norms and two sums, rotary positions, the activation; read and written."""
    num_wide = 1 + sum(op.out_features == spec.ffn_size for op in spec.linears)
    rotated = 2 * spec.head_dim * (spec.num_heads + spec.num_kv_heads)
    return 2.0 * (8 * spec.hidden_size + rotated + num_wide * spec.ffn_size)


def _prefill_attention(spec: ModelSpec, speed: Speed) -> Busy:
    """Causal attention of whole prompts, whose arithmetic is the lower triangle's."""
    pair_s = 2.0 * spec.num_heads * spec.head_dim / speed.attention_flops
    return lambda p, s: pair_s * p * s * s


def _decode_attention(spec: ModelSpec, speed: Speed) -> Busy:
    """Of one token a request: it reads the cache of the past and of this token."""
    per_token_s = rounded_maximum(
        4.0 * spec.num_heads * spec.head_dim / speed.attention_flops,
        2.0 * spec.kv_values_per_token / speed.attention_bandwidth,
        speed.sharpness,
    )
    return lambda q, past: per_token_s * q * (past + 1)


def _embedding(spec: ModelSpec, speed: Speed) -> Busy:
    """Rows are read and written."""
    token_s = 4.0 * spec.hidden_size / speed.copy_bandwidth
    return lambda p, s: token_s * p * s


def _head(spec: ModelSpec, speed: Speed) -> Busy:
    """One product with the whole vocabulary, a row a request, at 16 bits."""
    compute_s = 2.0 * spec.head_params / speed.linear_flops
    weights_s = 2.0 * spec.head_params / speed.linear_bandwidth
    return lambda q, past: rounded_maximum(compute_s * q, weights_s, speed.sharpness) + 0.0 * past
