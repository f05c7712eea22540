"""Records which tensors are alive while code runs, on the meta device or on a CPU.

`PeakMemory` adds up their bytes; `LiveTensors` takes a snapshot of the live tensors whenever one is
made. A linear layer is one snapshot, as its temporaries depend on its precision.

Not covered: temporaries inside torch's own kernels.
"""

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that ask for a value: without values they give False, as for a mask that hides tokens.
ASKS_FOR_A_VALUE = (
    torch.ops.aten.item.default,
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
)

ATTENTION = "attention"  # the name of fused attention in snapshots, beside those of linears

Bytes = Counter[int]  # the number of live tensors of each size in bytes


class PeakMemory(TorchDispatchMode):
    """Counts the peak bytes of tensors made inside; for CPUs, whose allocator does not."""

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in storages(args):  # tensors from outside existed before
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                weakref.finalize(storage, self._known.discard, storage._cdata)
        result = func(*args, **(kwargs or {}))
        self.note(result)
        return result

    def note(self, result: Any) -> None:
        """Counts the new tensors of a result."""
        for storage in storages(result):
            if storage._cdata not in self._known:
                self._count(storage)

    def _count(self, storage: Any) -> None:
        self._known.add(storage._cdata)
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size


def storages(tree: Any) -> list[Any]:
    """The storages of all tensors in a result."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [leaf.untyped_storage() for leaf in leaves if leaf.layout == torch.strided]


@dataclass(frozen=True)
class TensorSnapshot:
    """The tensors that were alive at one time, and the linear that was running (or empty)."""

    op: str
    biased: bool
    later: bool  # whether its layer is not the stage's first one
    kind: int | None  # of its layer, where layers differ
    live: Bytes


class LiveTensors(PeakMemory):
    """Takes a snapshot of the live tensors whenever a tensor is made."""

    def __init__(self) -> None:
        super().__init__()
        self.live: Bytes = Counter()
        self.snapshots: list[TensorSnapshot] = []
        self.later = False
        self.kind: int | None = None
        self._inside_linear = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKS_FOR_A_VALUE:
            return False
        if self._inside_linear:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            self._take(ATTENTION)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def enter_layer(self, later: bool, kind: int | None) -> None:
        """Marks the snapshots that follow as those of a layer; see `TensorSnapshot`."""
        self.later, self.kind = later, kind

    def enter_linear(self, op: str, biased: bool) -> None:
        """Takes a snapshot for a linear; its temporaries are ignored until it is left."""
        self._take(op, biased)
        self._inside_linear = True

    def leave_linear(self, output: torch.Tensor) -> None:
        """Counts the output of the linear."""
        self._inside_linear = False
        self.note(output)

    def _count(self, storage: Any) -> None:
        self.live[storage.nbytes()] += 1
        super()._count(storage)
        self._take()

    def _release(self, key: int, size: int) -> None:
        self.live[size] -= 1
        super()._release(key, size)

    def _take(self, op: str = "", biased: bool = False) -> None:
        self.snapshots.append(TensorSnapshot(op, biased, self.later, self.kind, +self.live))
