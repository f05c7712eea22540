"""Which kernels serve a model on a machine, in words, and at which numbers of rows they change.

A run says it once when it starts, a plan says which kernels it counts on.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmpq.expert_kernels import GROUPED, GROUPED_MULTIPLY, expert_choices
from llmpq.kernel import Kernel
from llmpq.kernel_table import TABLE, choices, kernels_of
from llmpq.machine import LIBRARIES, Machine
from llmpq.model_spec import ModelSpec
from llmpq.precision import PRECISIONS, group_size


class ServedMatrix(NamedTuple):
    """The sizes of a matrix, and whether each expert of a layer has one."""

    outputs: int
    inputs: int
    of_experts: bool = False


@dataclass(frozen=True)
class Service:
    """The kernels of a precision by rising numbers of rows, and why no better ones serve it."""

    kernels: tuple[str, ...]
    reason: str = ""

    @property
    def text(self) -> str:
        """All of it."""
        names = in_words(self.kernels)
        return f"{names} ({self.reason})" if self.reason else names


def in_words(kernels: Iterable[str]) -> str:
    """Names of kernels by rising numbers of rows; those for all experts at once stand apart."""
    names = list(kernels)
    others = [name for name in names if not name.startswith(GROUPED_MULTIPLY)]
    of_experts = [name for name in names if name.startswith(GROUPED_MULTIPLY)]
    return "; experts: ".join(", then ".join(some) for some in (others, of_experts) if some)


def matrices_of(spec: ModelSpec, precisions: Iterable[str]) -> dict[str, list[ServedMatrix]]:
    """By precisions of matrices, which ones layers of these precisions hold, of every kind."""
    found: dict[str, dict[ServedMatrix, None]] = {}
    for precision in precisions:
        for kind in spec.kind_specs:
            for held in kind.held(precision):
                matrix = ServedMatrix(held.op.out_features, held.op.in_features, held.of_experts)
                found.setdefault(held.precision, {})[matrix] = None
    return {precision: list(shapes) for precision, shapes in found.items()}


def serving(machine: Machine, matrices: Mapping[str, Iterable[ServedMatrix]]) -> dict[str, Service]:
    """Which kernels serve each precision on a machine, for matrices by precision, and why."""
    return {p: _service(machine, p, list(shapes)) for p, shapes in matrices.items()}


def _service(machine: Machine, precision: str, matrices: Sequence[ServedMatrix]) -> Service:
    found: dict[str, None] = {}
    passed: dict[str, None] = {}
    for matrix in sorted(matrices, key=lambda one: one.of_experts):
        kernels, shape = _kernels(machine, precision, matrix), _shape(precision, matrix)
        found |= dict.fromkeys(map(_with_rows, kernels))
        if not any(kernel in GROUPED for kernel in kernels):
            passed |= dict.fromkeys(_passed_over(machine, precision, shape, kernels))
    return Service(tuple(found), "; ".join(passed))


def _kernels(machine: Machine, precision: str, matrix: ServedMatrix) -> tuple[Kernel, ...]:
    """Those that multiply by a matrix, by rising numbers of rows."""
    if not matrix.of_experts:
        return choices(machine, precision, *_shape(precision, matrix))
    found = expert_choices(machine, precision, matrix.outputs, matrix.inputs)
    grouped = (found.grouped,) if found.grouped is not None else ()
    return grouped if found.most_tokens == math.inf else (*grouped, *found.single)


def _shape(precision: str, matrix: ServedMatrix) -> tuple[int, int, int]:
    """Outputs, inputs and weights a scale."""
    group = group_size(PRECISIONS[precision].weight_bits, matrix.inputs)
    return matrix.outputs, matrix.inputs, group


def _with_rows(kernel: Kernel) -> str:
    unit = "tokens" if kernel in GROUPED else "rows"
    return kernel.name + (f" up to {kernel.max_rows} {unit}" if kernel.max_rows else "")


def _passed_over(
    machine: Machine, precision: str, shape: tuple[int, int, int], chosen: Sequence[Kernel]
) -> Iterator[str]:
    """Why those do not serve that the table prefers to the first one that does.

    A name may stand there once for each range of capabilities: the fitting one counts.
    """
    kernels = kernels_of(machine, precision)
    settled = {kernel.name for kernel in chosen}
    covering = {kernel.name for kernel in kernels if kernel.covers(machine)}
    for kernel in kernels:
        if kernel in chosen[:1]:
            return
        reason = kernel.why_not(machine, *shape)
        fits = kernel.covers(machine) or kernel.name not in covering
        if reason is not None and fits and kernel.name not in settled:
            yield reason


def needs_library(names: Iterable[str]) -> bool:
    """Whether some of these kernels (`Service.kernels`) come with `llmpq[gpu]`."""
    theirs = [kernel for kernel in (*TABLE, *GROUPED) if kernel.library in LIBRARIES]
    return not {_with_rows(kernel) for kernel in theirs}.isdisjoint(names)


def switch_rows(
    machine: Machine, matrices: Mapping[str, Iterable[ServedMatrix]]
) -> tuple[int, ...]:
    """Numbers of rows at which kernels change: the last of one, the first of the next.

    `matrices` are by precision.
    """
    last = {
        kernel.max_rows
        for precision, shapes in matrices.items()
        for matrix in shapes
        for kernel in _kernels(machine, precision, matrix)
        if kernel.max_rows is not None
    }
    return tuple(rows + step for rows in sorted(last) for step in (0, 1))
