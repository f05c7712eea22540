"""Which tensors are alive while code runs: on the meta device, or on a CPU, which does not count.

`PeakMemory` adds up their bytes; `LiveTensors` remembers what was alive whenever a tensor was made,
and takes a linear layer as one moment, as what it takes inside depends on its precision.
Not covered: temporaries inside torch's own kernels.
"""

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Answers that a tensor without values gives: "no", so that a mask is taken to hide something.
ASKS_FOR_A_VALUE = (
    torch.ops.aten.item.default,
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
)

ATTENTION = "attention"  # the name of fused attention among the linears

Bytes = Counter[int]  # how many live tensors have so many bytes


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors made inside, at their peak. For CPUs, which do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in storages(args):  # what comes from outside was there before
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                weakref.finalize(storage, self._known.discard, storage._cdata)
        result = func(*args, **(kwargs or {}))
        self.note(result)
        return result

    def note(self, result: Any) -> None:
        """Counts the tensors of a result that are new."""
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
    """What was alive at once, and the linear that was computing (empty: none)."""

    op: str
    biased: bool
    later: bool  # in a layer after the stage's first one
    live: Bytes


class LiveTensors(PeakMemory):
    """Remembers what is alive whenever a tensor is made."""

    def __init__(self) -> None:
        super().__init__()
        self.live: Bytes = Counter()
        self.snapshots: list[TensorSnapshot] = []
        self.later = False
        self._inside_linear = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKS_FOR_A_VALUE:
            return False
        if self._inside_linear:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            self._take(ATTENTION)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def enter_linear(self, op: str, biased: bool) -> None:
        """What a linear makes is not looked at until it is left."""
        self._take(op, biased)
        self._inside_linear = True

    def leave_linear(self, output: torch.Tensor) -> None:
        """Only its output is left."""
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
        self.snapshots.append(TensorSnapshot(op, biased, self.later, +self.live))
