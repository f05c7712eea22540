"""One kernel that multiplies by a layer's weights: where it serves, its bytes and its efficiency.

The speed of a kernel is given relative to a plain 16-bit product on the same device
(`KernelEfficiency`), because plain products were fitted on many GPUs (docs/device-library.md). Each
figure names its source: a measurement with card and date, or "estimate" and why. This module also
holds the costs that all kernels share: the time of a launch, with and without CUDA graphs, and the
memory that graphs take.

Not covered: which kernels there are (`llmpq.kernel_table`), and attention.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llmpq.machine import (
    BFLOAT16_CAPABILITY,
    BITSANDBYTES_EXTRA,
    GPU_EXTRA,
    LIBRARIES,
    Capability,
    Kind,
    Machine,
)
from llmpq.precision import PRECISIONS
from llmpq.workspace import Product, num_parts

# The layouts of a stored weight; each has a layer class in `llmpq.quant`.
Layout = Literal["plain", "grouped", "tiled", "rows", "token int8", "humming", "nf4", "8-bnb"]
HALVES = ("bfloat16", "float16")
RUN = 16  # the depth of a tensor core's product
DTYPES = (*HALVES, "float32", "float64")

# ---- the costs of launching kernels

# A decoder layer of LLaMA's launches 33 kernels beside its 7 linears (counted in transformers
# 5.23), and took 1.0 ms in eager torch at 16 bits, whatever the shape (H200, 2026-11-27).
LAYER_LAUNCHES = 33
HEAD_LAUNCHES = 10  # the last norm, the head, the choice of tokens
EAGER_LAUNCH_S = 25e-6
# From the end of one kernel to the start of the next in a CUDA graph, or where the launch queue is
# full: 9.34 ms a step of 32 such layers (H200, 2026-11-27), of which bytes explain 5 to 6.
START_S = 2.5e-6
# The cost of a layer's calls on a CPU, where they overlap with nothing.
CPU_LAYER_S = 200e-6
# Layers with routed experts (`llmpq.models.experts`), counted on Mixtral's in torch 2.13: choosing
# and sorting, in place of a dense activation; then for each expert that is used, beside its
# products, gathering its tokens, the activation (2), weighing and adding.
ROUTER_LAUNCHES = 15
EXPERT_LAUNCHES = 5
# Where all experts are multiplied at once: choosing (6), sorting and adding, beside the products.
GROUPED_LAUNCHES = 8
# Estimate: each took a third of what the rest of a tiny layer took (8 experts, two cores of an AMD
# EPYC, 2026-11-28).
CPU_EXPERT_S = 70e-6
# The cost of a stage's call beside its layers (masks, positions, copies of the message), measured
# by `llmpq-profile layers`: 0.7 to 1.2 ms in both phases on an H200's host, 0.6 to 0.9 ms on two
# cores of an AMD EPYC, whatever the shape (both 2026-11-27). The network's time is not included.
STAGE_CALL_S = 0.9e-3
CPU_STAGE_CALL_S = 0.7e-3
# Kernels that torch keeps on a CPU in each of two caches, by shape; 1024 by default, of 0.65 MiB
# each on a Xeon of 2023. A kernel that was dropped is compiled again, which takes 0.5 ms, longer
# than a small product. A stage has one for each shape of matrix (four in a layer of Llama) and
# number of rows, and jobs of different sizes alternate.
KERNELS_KEPT = 256

# ---- the memory of CUDA graphs

# Bytes of each graph, an estimate: vLLM reported 6 MiB a graph for 16 layers (its pull request
# 11349); a layer of ours launches more than twice as many kernels.
GRAPH_BYTES = 16 * 2**20
LEAST_GRAPH_TOKENS = 256


def graph_lengths(most_tokens: int) -> tuple[int, ...]:
    """The numbers of attended tokens that decode steps are captured for; each step uses the next.

    They are powers of two and the middles between them, from 256 on, and last `most_tokens` itself.
    """
    lengths, size = [], LEAST_GRAPH_TOKENS
    while size < most_tokens:
        lengths += [n for n in (size, size * 3 // 2) if n < most_tokens]
        size *= 2
    return (*lengths, most_tokens)


# ---- one kernel


@dataclass(frozen=True)
class KernelEfficiency:
    """The efficiency of a kernel, as shares of a plain 16-bit product's on the same device.

    `bandwidth` is the share while it reads the stored weight. `peak` is the share of the arithmetic
    at numbers of rows, interpolated by the logarithm of rows and constant beyond. `arithmetic` is
    "tensor" for the device's 16-bit rate, "int8" for its integer rate, and "vector" for its fp32
    rate, of which `peak` is a plain share and every weight costs `unpack_operations` more.
    `measured_on` is the capability of the measured card; None means an estimate. The weight is read
    again for each `pass_rows` rows; 0 means once. `error` is the mean relative error against the
    measurements.
    """

    source: str
    bandwidth: float = 1.0
    peak: tuple[tuple[int, float], ...] = ((1, 1.0),)
    measured_on: Capability | None = None
    error: float | None = None
    arithmetic: Literal["tensor", "vector", "int8"] = "tensor"
    unpack_operations: float = 0.0
    pass_rows: int = 0


@dataclass(frozen=True)
class Unpacking:
    """Passes that write a weight in 16 bits, part by part, before a plain product reads it.

    The passes read and write `bytes_a_weight`, at the share `bandwidth` of a plain product's.
    `launches` counts kernels for each part of `part_weights` weights, with the product.
    """

    part_weights: int
    bytes_a_weight: float
    bandwidth: float
    launches: int


@dataclass(frozen=True)
class Kernel:
    """One kernel for weights of one precision, and where it serves.

    `capability` and `below` bound the compute capability, `groups` the weights of a scale (None:
    any); `whole_rows` also allows one scale a row. Sizes of the weight (outputs, inputs) are at
    least `least`, and multiples of `out_step` and, after padding to 8, of `in_step`. A packed row
    has `streams` streams, each with whole runs of `RUN` codes with one scale; 0 needs no such runs.
    `max_rows` bounds the rows of the input; None takes any number. `stored_bytes` counts a weight
    (outputs, inputs, weights of a scale, dtype) that is not held as it was packed.
    """

    name: str
    layout: Layout
    precision: str
    kind: Kind
    efficiency: KernelEfficiency
    workspace_bytes: Callable[[Product], int]
    max_rows: int | None = None
    dtypes: tuple[str, ...] = DTYPES
    capability: Capability = (0, 0)
    below: Capability | None = None
    library: str | None = None
    feature: str | None = None
    groups: tuple[int, ...] | None = None
    whole_rows: bool = False
    least: tuple[int, int] = (1, 1)
    streams: int = 0
    out_step: int = 1
    in_step: int = 1
    launches: int = 1
    unpacking: Unpacking | None = None
    stored_bytes: Callable[[int, int, int, str], int] | None = None

    def why_not(
        self, machine: Machine, out_features: int, in_features: int, group: int
    ) -> str | None:
        """Why the kernel does not serve this matrix on this machine; None where it does."""
        return self.why_not_here(machine) or self._why_not_shape(out_features, in_features, group)

    def why_not_here(self, machine: Machine) -> str | None:
        """Why the kernel serves no matrix on this machine; None where it serves some."""
        if self.kind != machine.kind:
            return f"{self.name} runs on {self.kind} devices"
        if not self.covers(machine):
            return f"{self.name} needs compute capability {_span(self.capability, self.below)}"
        if self.library is not None and self.library not in machine.libraries:
            extra = GPU_EXTRA if self.library in LIBRARIES else BITSANDBYTES_EXTRA
            return f"{self.library} is not installed (pip install '{extra}')"
        if self.feature is not None and self.feature not in machine.features:
            return f"{self.name}: the CPU has no {self.feature}"
        old = self.library in LIBRARIES and machine.capability < BFLOAT16_CAPABILITY
        if machine.dtype not in self.dtypes or (old and machine.dtype == "bfloat16"):
            return f"{self.name} does not compute in {machine.dtype} here"
        return None

    def covers(self, machine: Machine) -> bool:
        """Whether the kernel is for this compute capability; True for CPUs, which have none."""
        below = self.below or (99, 0)
        return not machine.is_card or self.capability <= machine.capability < below

    def _why_not_shape(self, out_features: int, in_features: int, group: int) -> str | None:
        whole = self.whole_rows and group == in_features
        if self.groups is not None and group not in self.groups and not whole:
            return f"{self.name} does not support groups of {group} weights"
        if out_features < self.least[0] or in_features < self.least[1]:
            return f"{self.name}: {out_features} x {in_features} is below {self.least}"
        if out_features % self.out_step:
            return f"{self.name}: {out_features} outputs are not a multiple of {self.out_step}"
        if -(-in_features // 8) * 8 % self.in_step:
            return f"{self.name}: {in_features} inputs are not a multiple of {self.in_step}"
        if self.streams and group != in_features:
            stream = -(-in_features // 8) * 8 // self.streams
            if math.gcd(stream, group) % RUN:
                rows = f"rows of {in_features} weights with one scale per {group}"
                return f"{self.name}: {rows} do not suit it"
        return None

    def held_bytes(self, out_features: int, in_features: int, group: int, dtype: str) -> int:
        """The bytes of the weight in the form that this kernel reads."""
        if self.stored_bytes is not None:
            return self.stored_bytes(out_features, in_features, group, dtype)
        return PRECISIONS[self.precision].weight_bytes(out_features, in_features)

    def weight_bytes(self, out_features: int, in_features: int) -> int:
        """The bytes of the weight that the product reads, stored or unpacked."""
        held = PRECISIONS["16" if self.unpacking else self.precision]
        return held.weight_bytes(out_features, in_features)

    def unpacked_bytes(self, out_features: int, in_features: int) -> float:
        """The bytes that the passes before the product read and write."""
        weights = out_features * in_features
        return weights * self.unpacking.bytes_a_weight if self.unpacking else 0.0

    def num_launches(self, out_features: int, in_features: int) -> int:
        """The number of kernels that a call launches on a card."""
        if self.unpacking is None:
            return self.launches
        parts = num_parts(self.unpacking.part_weights, out_features, in_features)
        return self.launches - 1 + parts * self.unpacking.launches


def _span(least: Capability, below: Capability | None) -> str:
    text = f"{least[0]}.{least[1]}"
    return text + (f" to below {below[0]}.{below[1]}" if below else " or above")
