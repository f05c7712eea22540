"""What stock vLLM runs: precisions by device and shape, sizes of heads, and its memory overheads.

The table was read from the source of vLLM 0.32.0 (`vllm/model_executor`), and its rows for CPUs
were run; those for cards were not. llmpq writes weight-only matrices with zero points, which
decides which of vLLM's kernels serve them. A precision that a device or a shape rules out is raised
to the next one that it has (`raised`); the quality never falls.

Not covered: cards of other makers than NVIDIA, and routed experts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llmpq.cluster import Cluster
from llmpq.machine import HUMMING, Capability, Kind, parse_capability
from llmpq.precision import group_size

VLLM = "0.32"
# The least compute capability: `CompressedTensorsWNA16.get_min_capability`, and Triton attention.
LEAST_CAPABILITY: Capability = (7, 5)
# int8 products need a capability below this (docs/features/quantization/int8 of vLLM 0.32).
INT8_BELOW: Capability = (10, 0)
# `CPUAttentionBackend.get_supported_head_sizes`.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
# Rows and columns of a packed matrix are multiples of this: 32 codes or zero points fill whole
# words at any number of bits, and `CPUWNA16LinearKernel.can_implement` asks for it.
STEP = 32
# Tokens of a block of the cache. 128 is vLLM's default on CPUs, 16 on cards.
BLOCK_TOKENS: dict[Kind, int] = {"cuda": 16, "cpu": 128}
# What precisions become where they are not served, in this order.
NEXT: dict[str, tuple[str, ...]] = {
    "3": ("3", "4", "8"),
    "nf4": ("4", "8"),
    "4": ("4", "8"),
    "8": ("8",),
    "8-bnb": ("8",),
    "8-w8a8": ("8-w8a8", "8"),
    "16": (),
}
# Linears that vLLM computes as one matrix, so that all parts need the same precision.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class VllmKernel:
    """One of vLLM's kernels for a precision. `capability` is the least of a card."""

    precision: str
    kind: Kind
    source: str  # its file under vllm/model_executor/kernels/linear
    capability: Capability = LEAST_CAPABILITY
    below: Capability | None = None
    packed: bool = True  # whether sizes must be multiples of STEP
    library: str | None = None  # that must be installed beside vLLM


KERNELS = (
    VllmKernel("4", "cpu", "mixed_precision/cpu.py: uint4 with zero points"),
    VllmKernel("8-w8a8", "cpu", "scaled_mm/cpu.py: int8 by token and channel", packed=False),
    VllmKernel("4", "cuda", "mixed_precision/marlin.py: uint4 with zero points"),
    VllmKernel("8", "cuda", "mixed_precision/humming.py: any number of bits", library=HUMMING),
    VllmKernel("3", "cuda", "mixed_precision/humming.py: any number of bits", library=HUMMING),
    VllmKernel("8-w8a8", "cuda", "scaled_mm/cutlass.py: int8", below=INT8_BELOW, packed=False),
)


@dataclass(frozen=True)
class VllmDevice:
    """A device as vLLM's choice of kernels sees it; `capability` is (0, 0) for a CPU."""

    kind: Kind
    capability: Capability = (0, 0)

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that this device runs in matrices of suitable shapes."""
        return ("16", *(kernel.precision for kernel in self._kernels()))

    def serves(self, precision: str, out_features: int, in_features: int) -> bool:
        """Whether a matrix `[out_features, in_features]` runs at this precision."""
        if precision == "16":
            return True
        fits = out_features % STEP == 0 and in_features % STEP == 0
        return any(
            kernel.precision == precision and (fits or not kernel.packed)
            for kernel in self._kernels()
        )

    def library_for(self, precision: str) -> str | None:
        """The library that must be installed beside vLLM for a precision, if any."""
        return next((k.library for k in self._kernels() if k.precision == precision), None)

    def _kernels(self) -> Iterator[VllmKernel]:
        for kernel in KERNELS:
            too_new = kernel.below is not None and self.capability >= kernel.below
            too_old = kernel.kind == "cuda" and self.capability < kernel.capability
            if kernel.kind == self.kind and not too_new and not too_old:
                yield kernel


CPU = VllmDevice("cpu")


def vllm_device(cluster: Cluster, device_type: str) -> VllmDevice:
    """A device type of a cluster; rehearsed devices are this machine's CPU."""
    if device_type in cluster.rehearse or cluster.kind_of(device_type) == "cpu":
        return CPU
    return VllmDevice("cuda", parse_capability(cluster.capability_of(device_type)))


def why_no_vllm(device: VllmDevice, head_dim: int) -> str | None:
    """Why vLLM cannot run a model with heads of this size on a device; None where it can."""
    if device.kind == "cuda" and device.capability < LEAST_CAPABILITY:
        found = ".".join(map(str, device.capability))
        least = ".".join(map(str, LEAST_CAPABILITY))
        return f"has compute capability {found}, and vLLM {VLLM} needs {least}"
    if device.kind == "cpu" and head_dim not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        return f"is a CPU, where vLLM {VLLM} has no attention for heads of {head_dim} (has {sizes})"
    return None


def raised(precision: str, device: VllmDevice, shapes: Iterable[tuple[int, int]]) -> str:
    """The precision at which vLLM runs all matrices `[out, in]` of one fused matrix.

    It is `precision` or the next above it that the device serves; 16 bits are always served.
    """
    sizes = list(shapes)
    for name in NEXT[precision]:
        if all(device.serves(name, *size) for size in sizes):
            return name
    return "16"


def group_fits_shards(bits: int, in_features: int, degree: int) -> bool:
    """Whether each of `degree` equal parts of the inputs holds whole groups of scales."""
    group = group_size(bits, in_features)
    return group == in_features or (in_features // degree) % group == 0
