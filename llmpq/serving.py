"""Which kernels serve a model on a machine, in words, and at which numbers of rows they change.

A run says it once when it starts, a plan says which kernels it counts on.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmpq.kernel import Kernel
from llmpq.kernel_table import TABLE, choices, kernels_of
from llmpq.machine import LIBRARIES, Machine
from llmpq.model_spec import ModelSpec
from llmpq.precision import PRECISIONS, group_size

Matrix = tuple[int, int]  # (outputs, inputs)


@dataclass(frozen=True)
class Service:
    """The kernels of a precision by rising numbers of rows, and why no better ones serve it."""

    kernels: tuple[str, ...]
    reason: str = ""

    @property
    def text(self) -> str:
        """All of it."""
        names = ", then ".join(self.kernels)
        return f"{names} ({self.reason})" if self.reason else names


def matrices_of(spec: ModelSpec, precisions: Iterable[str]) -> dict[str, list[Matrix]]:
    """By precisions of matrices, which ones layers of these precisions hold, of every kind."""
    found: dict[str, dict[Matrix, None]] = {}
    for precision in precisions:
        for kind in spec.kind_specs:
            for held in kind.held(precision):
                shape = held.op.out_features, held.op.in_features
                found.setdefault(held.precision, {})[shape] = None
    return {precision: list(shapes) for precision, shapes in found.items()}


def serving(machine: Machine, matrices: Mapping[str, Iterable[Matrix]]) -> dict[str, Service]:
    """Which kernels serve each precision on a machine, for matrices by precision, and why."""
    return {p: _service(machine, p, list(shapes)) for p, shapes in matrices.items()}


def _service(machine: Machine, precision: str, matrices: Sequence[Matrix]) -> Service:
    found: dict[str, None] = {}
    passed: dict[str, None] = {}
    for shape in _shapes(precision, matrices):
        kernels = choices(machine, precision, *shape)
        found |= dict.fromkeys(map(_with_rows, kernels))
        passed |= dict.fromkeys(_passed_over(machine, precision, shape, kernels))
    return Service(tuple(found), "; ".join(passed))


def _shapes(precision: str, matrices: Iterable[Matrix]) -> list[tuple[int, int, int]]:
    """Outputs, inputs and weights a scale."""
    bits = PRECISIONS[precision].weight_bits
    return [(out, cols, group_size(bits, cols)) for out, cols in matrices]


def _with_rows(kernel: Kernel) -> str:
    return kernel.name + (f" up to {kernel.max_rows} rows" if kernel.max_rows else "")


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
    theirs = [kernel for kernel in TABLE if kernel.library in LIBRARIES]
    return not {_with_rows(kernel) for kernel in theirs}.isdisjoint(names)


def switch_rows(machine: Machine, matrices: Mapping[str, Iterable[Matrix]]) -> tuple[int, ...]:
    """Numbers of rows at which kernels change: the last of one, the first of the next.

    `matrices` are by precision.
    """
    last = {
        kernel.max_rows
        for precision, shapes in matrices.items()
        for shape in _shapes(precision, shapes)
        for kernel in choices(machine, precision, *shape)
        if kernel.max_rows is not None
    }
    return tuple(rows + step for rows in sorted(last) for step in (0, 1))
