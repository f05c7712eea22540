"""The table of kernels that multiply by a layer's weights, for layers, planner and profiler.

A linear layer asks which kernel to call for a number of rows, the planner which kernel a device
will call and what it costs, the profiler at which numbers of rows kernels change. `choices` returns
the kernels of one matrix on one `Machine`: the first kernel of `TABLE` that serves it decides how
the weight is stored (its layout), and others of the same layout follow above its `max_rows`. Equal
inputs always use the same kernel, as no choice depends on timing.

Not covered: the seconds of a call (`llmpq.costs.spec_sheet`), and attention.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import get_args

from llmpq import workspace
from llmpq.errors import UserError
from llmpq.kernel import HALVES, Kernel, KernelEfficiency, Layout, Unpacking
from llmpq.machine import (
    BITSANDBYTES,
    HUMMING,
    INT4_TILES,
    LIBRARIES,
    TRITON,
    VNNI,
    Kind,
    Machine,
)
from llmpq.precision import PRECISIONS, group_size
from llmpq.workspace import CARD_PART_WEIGHTS, CPU_PART_WEIGHTS, STREAMS, TILE_ROWS, Product

# Names by which layers select kernels.
FEW_ROWS, FUSED_UNPACKING = "Triton few-row multiply", "Triton unpacking + cuBLAS"
INT4_READ, INT8_READ = "int4 tiles", "int8 rows"

# The efficiency that all others are relative to.
PLAIN = KernelEfficiency(
    "fitted on ten GPUs, docs/device-library.md", measured_on=(7, 0), error=0.0
)

# ---- humming (cards)

# bf16, groups of 128, medians of timings with a flushed cache, less three starts of 2.5 us each.
# One of 20 points differs much: 53 us at 4 bits for 8192 x 8192 with 8 rows, predicted as 23.
H100 = "measured on an H100 80GB, 2026-11-27, humming-kernels 0.1.19, 28672 x 8192"
HUMMING_EFFICIENCY = {
    "8": KernelEfficiency(H100, 0.93, ((64, 0.62), (256, 0.755), (2048, 0.84)), (9, 0), 0.01),
    "4": KernelEfficiency(H100, 0.855, ((64, 0.58), (256, 0.85), (2048, 0.97)), (9, 0), 0.09),
    "3": KernelEfficiency(H100, 0.735, ((64, 0.55), (256, 0.78), (2048, 0.96)), (9, 0), 0.02),
}
# A call takes 6 us more than cuBLAS's in a graph and 67 us more in eager torch, as much as two more
# launches (H200, 2026-11-27, steps of 32 layers of LLaMA-8B).
HUMMING_LAUNCHES = 3
HUMMING_GROUPS = (32, 64, 128, 256)  # and whole rows
HUMMING_LEAST = (64, 32)  # outputs, inputs

# ---- our own kernels in Triton (cards), none of which was measured yet

TRITON_TENSOR = (
    "estimate: Triton kernels that torch's compiler writes reach 0.77 and 0.62 of a plain product's"
    " bandwidth at 8 and 4 bits (gpt-fast, A100), again for each 16 rows; half of humming's peak"
)
TRITON_VECTOR = (
    "estimate: bytes as above 8.0; half of the fp32 rate, as Triton has no tensor-core products"
    " below 8.0, and four multiply-adds to unpack a weight"
)
TRITON_BANDWIDTH = {"8": 0.77, "4": 0.62, "3": 0.55}
TENSOR_CORES = (8, 0)  # the least capability at which Triton multiplies on them
# Rows up to which reading packed weights is faster than unpacking them, by these estimates.
TENSOR_MAX_ROWS, VECTOR_MAX_ROWS = 64, 16
UNPACK_OPERATIONS = 8.0
TENSOR_PASS_ROWS = 16  # the kernel reads the weight once for each 16 rows
FUSED = "estimate: one pass over the weight, as fast as the fused elementwise kernels of the fit"
FUSED_BANDWIDTH = 0.9
FUSED_BYTES = {"8": 3.0, "4": 2.53, "3": 2.41}  # read of code and grid, written in 16 bits

# ---- torch's operators alone (cards)

TORCH = "measured on an H100 80GB, 2026-11-27, torch 2.11, 1 to 2,048 rows"
# For each number of bits: bytes that the operators of `llmpq.quant` read and write for a weight,
# their share of a plain product's bandwidth, and their number for each part. Then the mean errors.
TORCH_PASSES = {"8": (7.0, 0.42, 4), "4": (13.0, 0.48, 10), "3": (18.0, 0.5, 24)}
TORCH_PASSES_SCALED = (11.0, 0.42, 5)  # 8 bits in other dtypes than bf16, which scale the weight
TORCH_ERRORS = {"8": 0.09, "4": 0.06, "3": 0.17}

# ---- CPUs

EPYC = "measured on two cores of an AMD EPYC (AVX-512), torch 2.13, against bf16 linear"
# Rows up to which the packed kernels are used. Speed against bf16 linear, kernel / chunks, one
# thread of an AVX-512 CPU, by M (out x in):
#   4 bits 2048x5504: 3.7/0.2 at 1, 1.2/0.2 at 8, 0.45/0.26 at 32, 0.44/0.40 at 64, 0.46/0.59 at 128
#   4 bits  256x704:  1.4/0.3 at 1, 1.1/0.3 at 8, 0.69/0.35 at 32, 0.54/0.40 at 64, 0.45/0.49 at 128
#   3 bits 2048x5504: 1.3/0.2 at 1, 0.7/0.2 at 8, 0.40/0.25 at 32, 0.45/0.44 at 64, 0.35/0.49 at 128
#   8 bits 2048x5504: 2.7/0.4 at 1, 1.1/0.4 at 8, 0.52/0.44 at 16, 0.42/0.47 at 32
#   8 bits  256x704:  0.8/0.5 at 1, 0.6/0.6 at 8, 0.57/0.57 at 16, 0.48/0.61 at 32
INT4_MAX_ROWS = 64
INT8_MAX_ROWS = 16
INT4_GROUPS = (32, 64, 128, 256)  # the groups that torch's int4 kernel knows
INT8_COLUMN_STEP = 16  # torch's int8 kernel reads past the end of rows that are no multiple of this
# Shares that match these speeds on larger matrices with two threads. bf16 linear itself reaches a
# third of the bandwidth, which the packed kernels exceed.
TILES = {
    "4": KernelEfficiency(EPYC, 1.19, ((1, 0.45),)),
    "3": KernelEfficiency(EPYC, 0.27, ((1, 0.45),)),
}
INT8_ROWS = KernelEfficiency(EPYC, 1.19, ((1, 0.28),))
TOKEN_INT8 = KernelEfficiency(EPYC, 1.19, ((1, 0.75),), arithmetic="int8")
# Unpacking a part in the cache takes as long as reading the weight in 16 bits.
CPU_UNPACKING = Unpacking(CPU_PART_WEIGHTS, 2.0, 1.0, launches=1)
UNPACKED = KernelEfficiency(EPYC)

# ---- bitsandbytes

LIKE_FUSED = "estimate: as our fused unpacking; not measured"
LIKE_INT8 = (
    "estimate: half of a plain product's arithmetic, inputs quantized by torch; not measured"
)
NF4_UNPACKING = Unpacking(CARD_PART_WEIGHTS, 2.56, FUSED_BANDWIDTH, launches=2)
LLM_INT8 = KernelEfficiency(LIKE_INT8, 0.8, ((1, 0.5),))


def _card(precision: str) -> Iterator[Kernel]:
    """The kernels of a card at 8, 4 or 3 bits, in order of preference."""
    yield Kernel(
        name="humming",
        layout="humming",
        precision=precision,
        kind="cuda",
        efficiency=HUMMING_EFFICIENCY[precision],
        workspace_bytes=workspace.padded_read,
        dtypes=HALVES,
        capability=LIBRARIES[HUMMING],
        library=HUMMING,
        groups=HUMMING_GROUPS,
        whole_rows=True,
        least=HUMMING_LEAST,
        stored_bytes=partial(workspace.humming_weight, bits=int(precision)),
        launches=HUMMING_LAUNCHES,
    )
    yield from (_few_rows(precision, vector) for vector in (False, True))
    yield Kernel(
        name=FUSED_UNPACKING,
        layout=_stored(precision),
        precision=precision,
        kind="cuda",
        efficiency=KernelEfficiency(FUSED),
        workspace_bytes=workspace.fused_parts,
        dtypes=HALVES,
        capability=LIBRARIES[TRITON],
        library=TRITON,
        unpacking=Unpacking(CARD_PART_WEIGHTS, FUSED_BYTES[precision], FUSED_BANDWIDTH, 2),
    )
    yield from _torch_alone(precision)


def _few_rows(precision: str, vector: bool) -> Kernel:
    """Our product by packed weights: on tensor cores, or (`vector`) on cards without them."""
    bits, bandwidth = int(precision), TRITON_BANDWIDTH[precision]
    tensor = KernelEfficiency(TRITON_TENSOR, bandwidth, ((64, 0.29),), pass_rows=TENSOR_PASS_ROWS)
    plain = KernelEfficiency(
        TRITON_VECTOR,
        bandwidth,
        ((1, 0.5),),
        arithmetic="vector",
        unpack_operations=UNPACK_OPERATIONS,
    )
    chunks = partial(workspace.vector_chunks if vector else workspace.tensor_chunks, bits=bits)
    return Kernel(
        name=FEW_ROWS,
        layout=_stored(precision),
        precision=precision,
        kind="cuda",
        efficiency=plain if vector else tensor,
        workspace_bytes=partial(workspace.chunked_sums, chunks=chunks),
        max_rows=VECTOR_MAX_ROWS if vector else TENSOR_MAX_ROWS,
        dtypes=HALVES,
        capability=LIBRARIES[TRITON] if vector else TENSOR_CORES,
        below=TENSOR_CORES if vector else None,
        library=TRITON,
        streams=STREAMS[bits],
        launches=2,
    )


def _torch_alone(precision: str) -> Iterator[Kernel]:
    """The kernels of every card. At 8 bits, bf16 scales the output and other dtypes the weight."""
    parts = partial(workspace.grouped_parts, part_weights=CARD_PART_WEIGHTS)
    kernel = Kernel(
        name="torch unpacking + cuBLAS",
        layout=_stored(precision),
        precision=precision,
        kind="cuda",
        efficiency=KernelEfficiency(TORCH, measured_on=(9, 0), error=TORCH_ERRORS[precision]),
        workspace_bytes=parts,
        unpacking=Unpacking(CARD_PART_WEIGHTS, *TORCH_PASSES[precision]),
    )
    if precision != "8":
        yield kernel
        return
    rows = partial(workspace.rows_parts, part_weights=CARD_PART_WEIGHTS)
    yield replace(kernel, workspace_bytes=rows, dtypes=("bfloat16",))
    scaled = Unpacking(CARD_PART_WEIGHTS, *TORCH_PASSES_SCALED)
    yield replace(kernel, workspace_bytes=workspace.fused_parts, unpacking=scaled)


def _stored(precision: str) -> Layout:
    return "rows" if precision == "8" else "grouped"


def _cpu_grouped(precision: str) -> Iterator[Kernel]:
    """The kernels of a CPU at 4 or 3 bits."""
    read, parts = (
        partial(f, bits=int(precision)) for f in (workspace.tiled_read, workspace.tiled_parts)
    )
    few_rows = Kernel(
        name=INT4_READ,
        layout="tiled",
        precision=precision,
        kind="cpu",
        efficiency=TILES[precision],
        workspace_bytes=read,
        max_rows=INT4_MAX_ROWS,
        dtypes=("bfloat16",),
        feature=INT4_TILES,
        groups=INT4_GROUPS,
        out_step=TILE_ROWS,
    )
    yield few_rows
    yield replace(
        few_rows,
        name="unpacking + linear",
        efficiency=UNPACKED,
        workspace_bytes=parts,
        max_rows=None,
        unpacking=CPU_UNPACKING,
    )
    plain = partial(workspace.grouped_parts, part_weights=CPU_PART_WEIGHTS)
    yield _cpu_unpacking("grouped", precision, plain)


def _cpu_eight() -> Iterator[Kernel]:
    """The kernels of a CPU at 8 bits."""
    yield Kernel(
        name=INT8_READ,
        layout="rows",
        precision="8",
        kind="cpu",
        efficiency=INT8_ROWS,
        workspace_bytes=workspace.rows_read,
        max_rows=INT8_MAX_ROWS,
        dtypes=("bfloat16",),
        in_step=INT8_COLUMN_STEP,
    )
    parts = partial(workspace.rows_parts, part_weights=CPU_PART_WEIGHTS)
    yield _cpu_unpacking("rows", "8", parts)
    yield Kernel(
        name="token int8",
        layout="token int8",
        precision="8-w8a8",
        kind="cpu",
        efficiency=TOKEN_INT8,
        workspace_bytes=workspace.token_int8,
        feature=VNNI,
    )


def _cpu_unpacking(layout: Layout, precision: str, parts: Callable[[Product], int]) -> Kernel:
    return Kernel(
        "unpacking + linear", layout, precision, "cpu", UNPACKED, parts, unpacking=CPU_UNPACKING
    )


def _bitsandbytes(kind: Kind) -> Iterator[Kernel]:
    """The kernels of the precisions that plans ask for by name."""
    unpacking = NF4_UNPACKING if kind == "cuda" else CPU_UNPACKING
    parts = partial(workspace.nf4_parts, part_weights=unpacking.part_weights)
    fused = KernelEfficiency(LIKE_FUSED)
    for kernel in (
        Kernel("bitsandbytes nf4", "nf4", "nf4", kind, fused, parts, unpacking=unpacking),
        Kernel("LLM.int8", "8-bnb", "8-bnb", kind, LLM_INT8, workspace.llm_int8, launches=15),
    ):
        yield replace(kernel, dtypes=(*HALVES, "float32"), library=BITSANDBYTES)


TABLE: tuple[Kernel, ...] = (
    Kernel("cuBLAS", "plain", "16", "cuda", PLAIN, workspace.output_alone),
    *(kernel for precision in ("8", "4", "3") for kernel in _card(precision)),
    Kernel("linear", "plain", "16", "cpu", PLAIN, workspace.output_alone),
    *_cpu_eight(),
    *(kernel for precision in ("4", "3") for kernel in _cpu_grouped(precision)),
    *(kernel for kind in get_args(Kind) for kernel in _bitsandbytes(kind)),
)

# All numbers of rows at which one kernel follows another.
MAX_ROWS = tuple(sorted({kernel.max_rows for kernel in TABLE if kernel.max_rows is not None}))


# ---- the choice


@lru_cache(maxsize=4096)
def choices(
    machine: Machine,
    precision: str,
    out_features: int,
    in_features: int,
    group: int,
    layout: Layout | None = None,
) -> tuple[Kernel, ...]:
    """The kernels of one matrix in the order of their numbers of rows; empty where none serves.

    `group` weights of a row share a scale. `layout` is that of a stored weight; None is the layout
    of the preferred kernel. The last kernel takes any number of rows.
    """
    shape = out_features, in_features, group
    serving = [k for k in kernels_of(machine, precision) if k.why_not(machine, *shape) is None]
    stored = layout or (serving[0].layout if serving else None)
    found: list[Kernel] = []
    for kernel in serving:
        if kernel.layout == stored:
            found.append(kernel)
            if kernel.max_rows is None:
                break
    return tuple(found)


def by_rows(kernels: Sequence[Kernel], rows: int) -> Kernel:
    """The kernel of `choices` for this number of rows."""
    return next(k for k in kernels if k.max_rows is None or rows <= k.max_rows)


def kernel_for(
    machine: Machine, precision: str, out_features: int, in_features: int, group: int, rows: int
) -> Kernel:
    """The kernel that multiplies `[rows, in]` by a weight `[out, in]` on this machine.

    Raises `UserError` where none serves the precision.
    """
    kernels = choices(machine, precision, out_features, in_features, group)
    if not kernels:
        others = ", ".join(name for name in PRECISIONS if serves(machine, name))
        what = "a card" if machine.is_card else "a CPU"
        raise UserError(f"precision {precision!r} has no kernel on {what} like this: use {others}")
    return by_rows(kernels, rows)


def held_bytes(machine: Machine, precision: str, out_features: int, in_features: int) -> int:
    """The bytes of a whole weight on this machine; packed bytes where no kernel serves it."""
    held = PRECISIONS[precision]
    shape = out_features, in_features, group_size(held.weight_bits, in_features)
    kernels = choices(machine, precision, *shape)
    return (
        kernels[0].held_bytes(*shape, machine.dtype) if kernels else held.weight_bytes(*shape[:2])
    )


def serves(machine: Machine, precision: str) -> bool:
    """Whether some kernel serves a precision, whatever the shape of the weight."""
    return any(kernel.why_not_here(machine) is None for kernel in kernels_of(machine, precision))


def kernels_of(machine: Machine, precision: str) -> list[Kernel]:
    """The kernels of a precision for this kind of device, in order of preference."""
    return [k for k in TABLE if (k.kind, k.precision) == (machine.kind, precision)]
