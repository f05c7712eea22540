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

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmpq import kernel_table
from llmpq.costs.device_speed import Speed, efficiency, rounded_maximum, speed_of
from llmpq.costs.fits import Accuracy
from llmpq.costs.layer_kernels import (
    Busy,
    ExpertGroups,
    OfRows,
    by_kernels,
    decode_attention,
    expert_groups,
    experts_s,
    num_launches,
    prefill_attention,
    tokens_s,
)
from llmpq.costs.links import Seconds, Tokens
from llmpq.costs.routing import Routing, balanced
from llmpq.devices import DeviceType
from llmpq.kernel import (
    CPU_EXPERT_S,
    CPU_LAYER_S,
    EAGER_LAUNCH_S,
    EXPERT_LAUNCHES,
    GROUPED_LAUNCHES,
    HEAD_LAUNCHES,
    LAYER_LAUNCHES,
    ROUTER_LAUNCHES,
    START_S,
    Kernel,
)
from llmpq.machine import Machine, parse_capability
from llmpq.model_spec import ModelSpec


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
    if kernel.efficiency is kernel_table.PLAIN:
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


@dataclass(frozen=True)
class Launches:
    """What a call's launches add to the computing of its kernels.

    `starts_s`: gaps between kernels that are ready. `eager_s`: what the host takes to launch them
    one by one, while the device computes; 0 for a CUDA graph.
    """

    starts_s: float
    eager_s: float = 0.0


@dataclass(frozen=True)
class ExpertLaunches:
    """The launches of a layer's call with experts, by the tokens that it routes.

    Up to `most_at_once` tokens, all launches of the layer are `at_once`. Above, `each` expert that
    is `used` has some, beside the layer's others.
    """

    routed: Busy
    routing: Routing
    most_at_once: float
    at_once: Launches
    each: Launches

    def added_to(self, others: Launches, tokens: Any) -> tuple[Any, Any]:
        """Gaps between kernels, and the host's seconds."""
        grouped, used = tokens <= self.most_at_once, self.routing.used(tokens)
        starts_s = others.starts_s + used * self.each.starts_s
        eager_s = others.eager_s + used * self.each.eager_s
        return (
            np.where(grouped, self.at_once.starts_s, starts_s),
            np.where(grouped, self.at_once.eager_s, eager_s),
        )


@dataclass(frozen=True)
class Roofline:
    """One phase at one precision on one device: what its kernels take, and the launches.

    `busy` is without `attention`, which grows with the length beside the tokens. `experts`: of a
    layer that has some.
    """

    busy: Busy
    error: float | None
    launches: Launches
    attention: Busy | None = None
    experts: ExpertLaunches | None = None

    def seconds(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """By whichever of arithmetic and memory is the limit, kernel by kernel."""
        return self._launched(self.busy_s(micro_batch, tokens), micro_batch, tokens)

    def without_attention_s(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """The same if attention cost nothing: it depends on the rows of the products alone."""
        busy_s = self.busy(micro_batch, np.asarray(tokens, dtype=float))
        return self._launched(busy_s, micro_batch, tokens)

    def accuracy(self, micro_batch: int, tokens: float) -> Accuracy:
        """The same everywhere: how far off devices were that were left out of the fit."""
        return Accuracy("spec sheet", self.error)

    def busy_s(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """The same without the launches."""
        length = np.asarray(tokens, dtype=float)
        busy_s = self.busy(micro_batch, length)
        return busy_s if self.attention is None else busy_s + self.attention(micro_batch, length)

    def _launched(self, busy_s: Any, micro_batch: int, tokens: Tokens) -> Any:
        """Seconds of a call whose kernels take `busy_s`."""
        starts_s: Any = self.launches.starts_s
        eager_s: Any = self.launches.eager_s
        if self.experts is not None:
            routed = self.experts.routed(micro_batch, np.asarray(tokens, dtype=float))
            starts_s, eager_s = self.experts.added_to(self.launches, routed)
        sharpness = efficiency().coefficients["sharpness"]
        return rounded_maximum(busy_s + starts_s, eager_s, sharpness)


def rooflines(
    device: DeviceType,
    spec: ModelSpec,
    precisions: Iterable[str],
    machine: Machine,
    routing: Routing | None = None,
) -> dict[tuple[str, str], Roofline]:
    """By (precision, phase): layers in both phases, embedding and head.

    `machine`: the device as kernels see it. Precisions that none of its kernels serves are left
    out. `routing`: how many experts are used; None: as many as by a balanced router.
    """
    speed = speed_of(device)
    lookup, head = _launches(machine, 1), _launches(machine, HEAD_LAUNCHES, machine.graphs)
    found = {
        ("", "embedding"): Roofline(_embedding(spec, speed), error(device, "prefill"), lookup),
        ("", "head"): Roofline(_head(spec, speed), error(device, "decode"), head),
    }
    if spec.experts is not None and routing is None:
        routing = balanced(spec.experts)
    for precision in precisions:
        if all(kernel_table.serves(machine, held.precision) for held in spec.held(precision)):
            found |= _layer_rooflines(device, spec, precision, machine, routing)
    return found


def _layer_rooflines(
    device: DeviceType, spec: ModelSpec, precision: str, machine: Machine, routing: Routing | None
) -> dict[tuple[str, str], Roofline]:
    """Both phases of a layer at one precision. Those that run experts one by one have no graphs."""
    speed, groups = speed_of(device), by_kernels(machine, spec, precision)
    rows_s = tokens_s(spec, groups, speed)
    kernels = [kernel for group in groups for kernel in group]
    count = LAYER_LAUNCHES + num_launches(groups)
    in_prefill = in_decode = None
    graphs = machine.graphs
    if routing is not None:
        of_experts = expert_groups(machine, spec, precision)
        rows_s = _sum(rows_s, experts_s(spec, of_experts, routing, speed))
        kernels += of_experts.kernels
        in_prefill, in_decode = (
            _expert_launches(machine, of_experts, routing, count, routed, graph)
            for routed, graph in ((_tokens, False), (_requests, graphs))
        )
        count, graphs = count + ROUTER_LAUNCHES, False
    prefill = Roofline(
        lambda p, s: rows_s(p * s),
        error(device, "prefill", kernels),
        _launches(machine, count),
        prefill_attention(spec, speed),
        in_prefill,
    )
    decode = Roofline(
        lambda q, past: rows_s(np.asarray(q, dtype=float)) + 0.0 * past,
        error(device, "decode", kernels),
        _launches(machine, count, graphs),
        decode_attention(spec, speed),
        in_decode,
    )
    return {(precision, "prefill"): prefill, (precision, "decode"): decode}


def _tokens(prompts: int, length: Tokens) -> Any:
    return prompts * length


def _requests(requests: int, past: Tokens) -> Any:
    return requests + 0.0 * past


def _sum(one: OfRows, other: OfRows) -> OfRows:
    return lambda rows: one(rows) + other(rows)


def _launches(machine: Machine, count: int, graph: bool = False) -> Launches:
    """Of so many kernels, one by one or as a CUDA graph."""
    if not machine.is_card:
        return Launches(CPU_LAYER_S)
    return Launches(count * START_S, 0.0 if graph else count * EAGER_LAUNCH_S)


def _expert_launches(
    machine: Machine,
    groups: ExpertGroups,
    routing: Routing,
    others: int,
    routed: Busy,
    graph: bool,
) -> ExpertLaunches:
    """Of a layer that launches `others` kernels beside its experts."""
    inputs_and_outputs = [kernels[0].launches for kernels in groups.at_once]
    grouped = others + GROUPED_LAUNCHES + 2 * max(inputs_and_outputs, default=0)
    single = EXPERT_LAUNCHES + num_launches(groups.single)
    return ExpertLaunches(
        routed,
        routing,
        groups.most_tokens,
        _launches(machine, grouped, graph),
        _launches(machine, single) if machine.is_card else Launches(CPU_EXPERT_S),
    )


def _embedding(spec: ModelSpec, speed: Speed) -> Busy:
    """Rows are read and written."""
    token_s = 4.0 * spec.hidden_size / speed.copy_bandwidth
    return lambda p, s: token_s * p * s


def _head(spec: ModelSpec, speed: Speed) -> Busy:
    """One product with the whole vocabulary, a row a request, at 16 bits."""
    compute_s = 2.0 * spec.head_params / speed.linear_flops
    weights_s = 2.0 * spec.head_params / speed.linear_bandwidth
    return lambda q, past: rounded_maximum(compute_s * q, weights_s, speed.sharpness) + 0.0 * past
