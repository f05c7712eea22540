"""The kernels that multiply the tokens of all experts of a layer in one launch, and their choice.

They read weights of all experts that lie in one tensor, packed as `llmpq.quant.linear` packs them,
or in 16 bits. A layer's experts use them where every matrix of an expert has one (`expert_choices`)
for the number of tokens; elsewhere experts are multiplied one after the other, by the kernels of
`llmpq.kernel_table` for the same stored weights. Runtime and planner ask here for the same
matrices.

Not covered: humming's grouped kernels (docs/gpu-kernels.md says why). No figure was measured yet.
"""

import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from llmpq import kernel_table, workspace
from llmpq.kernel import HALVES, Kernel, KernelEfficiency, Layout
from llmpq.kernel_table import TENSOR_CORES, TRITON_BANDWIDTH, UNPACK_OPERATIONS
from llmpq.machine import LIBRARIES, TRITON, Machine
from llmpq.model_spec import ModelSpec
from llmpq.precision import PRECISIONS, group_size
from llmpq.workspace import GROUPED_FEW_ROWS, GROUPED_MANY_ROWS, STREAMS

GROUPED_MULTIPLY = "Triton grouped multiply"
LAYOUTS: dict[str, Layout] = {"16": "plain", "8": "rows", "4": "grouped", "3": "grouped"}
# Tokens up to which cards without tensor cores in Triton multiply all experts at once; above,
# unpacked weights and cuBLAS are faster, by count of their arithmetic.
VECTOR_TOKENS = 64
# The same for experts of at least so many outputs and inputs (Mixtral's, Llama 4's) on tensor
# cores: with so many tokens, launches of single experts take less than their products gain.
LARGE_EXPERT, LARGE_TOKENS = (4096, 4096), 2048

GROUPED_TENSOR = (
    "estimate: bytes and arithmetic of our Triton kernel for few rows, at 16 bits nine tenths of a"
    " plain product's bytes and six tenths of its arithmetic; not measured"
)
GROUPED_VECTOR = "estimate: as our Triton kernel for few rows below 8.0; not measured"
GROUPED_BANDWIDTH = {"16": 0.9, **TRITON_BANDWIDTH}
GROUPED_PEAK = {"16": 0.6, "8": 0.29, "4": 0.29, "3": 0.29}


class ExpertKernels(NamedTuple):
    """The kernels of one matrix of an expert.

    `grouped` multiplies for all experts at once; None where no kernel does. `single` multiply for
    one expert, by rising numbers of its rows, and read the same stored weight.
    """

    grouped: Kernel | None
    single: tuple[Kernel, ...]

    @property
    def most_tokens(self) -> float:
        """The tokens of a layer up to which `grouped` serves: 0 for never, infinite for always."""
        if self.grouped is None:
            return 0
        return math.inf if self.grouped.max_rows is None else self.grouped.max_rows


@lru_cache(maxsize=4096)
def expert_choices(
    machine: Machine, precision: str, out_features: int, in_features: int, group: int = 0
) -> ExpertKernels:
    """The kernels of one matrix of an expert; `group` weights share a scale, 0 for our own grids.

    The stored layout is that of the grouped kernels where there are some.
    """
    group = group or group_size(PRECISIONS[precision].weight_bits, in_features)
    shape = out_features, in_features, group
    grouped = (k for k in GROUPED if k.precision == precision)
    found = next((k for k in grouped if k.why_not(machine, *shape) is None), None)
    layout = found.layout if found else None
    return ExpertKernels(found, kernel_table.choices(machine, precision, *shape, layout))


def expert_bytes(machine: Machine, precision: str, out_features: int, in_features: int) -> int:
    """The bytes of one expert's weight on this machine; packed bytes where no kernel serves it."""
    if expert_choices(machine, precision, out_features, in_features).grouped is None:
        return kernel_table.held_bytes(machine, precision, out_features, in_features)
    return PRECISIONS[precision].weight_bytes(out_features, in_features)


def most_tokens(machine: Machine, spec: ModelSpec, precision: str) -> float:
    """The tokens up to which a layer at this precision multiplies all its experts at once.

    0 means never, infinity always. Layers without experts have no limit.
    """
    return min(
        (
            expert_choices(
                machine, held.precision, held.op.out_features, held.op.in_features
            ).most_tokens
            for held in spec.held(precision)
            if held.of_experts
        ),
        default=math.inf,
    )


def _tensor(precision: str) -> Kernel:
    """On tensor cores; a block of rows reads the weight of its expert once."""
    return Kernel(
        name=GROUPED_MULTIPLY,
        layout=LAYOUTS[precision],
        precision=precision,
        kind="cuda",
        efficiency=KernelEfficiency(
            GROUPED_TENSOR,
            GROUPED_BANDWIDTH[precision],
            ((1, GROUPED_PEAK[precision]),),
            pass_rows=GROUPED_MANY_ROWS,
        ),
        workspace_bytes=workspace.output_alone,
        dtypes=HALVES,
        capability=TENSOR_CORES,
        library=TRITON,
        streams=STREAMS.get(int(precision), 0),
    )


def _tensor_for_large(precision: str) -> Kernel:
    return replace(_tensor(precision), least=LARGE_EXPERT, max_rows=LARGE_TOKENS)


def _vector(precision: str) -> Kernel:
    """On cards without tensor cores in Triton; a second launch adds the sums of chunks."""
    efficiency = KernelEfficiency(
        GROUPED_VECTOR,
        GROUPED_BANDWIDTH[precision],
        ((1, 0.5),),
        arithmetic="vector",
        unpack_operations=0.0 if precision == "16" else UNPACK_OPERATIONS,
        pass_rows=GROUPED_FEW_ROWS,
    )
    return replace(
        _tensor(precision),
        efficiency=efficiency,
        max_rows=VECTOR_TOKENS,
        capability=LIBRARIES[TRITON],
        below=TENSOR_CORES,
        launches=2,
    )


GROUPED = tuple(
    make(precision) for precision in LAYOUTS for make in (_tensor_for_large, _tensor, _vector)
)
