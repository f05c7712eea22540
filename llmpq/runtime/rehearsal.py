"""Playing a slower, smaller device on this machine.

`Throttle`: after t seconds of computing, wait (factor - 1) t. On a CPU t is this thread's own CPU
time, so that sharing a core with other workers eats into the wait and not into the result; the
wait carries its overshoot to the next one. `cores_needed` says whether that can be true at all.
`MemoryAccount`: weights, cache and activations against a cap; above it the worker stops.
"""

import os
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmpq.cluster import MIB
from llmpq.errors import InfeasibleError

T = TypeVar("T")


class Throttle:
    """Runs computations as a device `factor` times slower would."""

    def __init__(self, factor: float, device: torch.device) -> None:
        self.factor = factor
        self._on_cpu = device.type == "cpu"
        self._device = device
        self._owed_s = 0.0

    def run(self, compute: Callable[[], T]) -> tuple[T, float]:
        """The result, and the seconds that passed, the wait included."""
        start, cpu_start = time.perf_counter(), time.thread_time()
        result = compute()
        if not self._on_cpu:
            torch.cuda.current_stream(self._device).synchronize()  # a receive may wait on another
        elapsed = time.perf_counter() - start
        if self.factor > 1:
            busy = time.thread_time() - cpu_start if self._on_cpu else elapsed
            self._wait(busy * self.factor - elapsed)
        return result, time.perf_counter() - start

    def _wait(self, seconds: float) -> None:
        self._owed_s += seconds
        if self._owed_s > 0:
            start = time.perf_counter()
            time.sleep(self._owed_s)
            self._owed_s -= time.perf_counter() - start
        self._owed_s = max(self._owed_s, -0.01)  # what contention took beyond 10 ms is lost


def cores_needed(slowdowns: Iterable[float]) -> float:
    """Cores that workers of these slowdowns keep busy when all compute at once."""
    return sum(1 / slowdown for slowdown in slowdowns)


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_core(rank: int, num_workers: int) -> None:
    """Pins this process to a core of its own, where there are enough of them."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if num_workers <= len(cores):
        os.sched_setaffinity(0, {cores[rank]})


@dataclass
class MemoryAccount:
    """Bytes a worker holds, against its cap (None: no cap)."""

    name: str
    cap_bytes: int | None
    weights: int = 0
    cache: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All bytes accounted for."""
        return self.weights + self.cache + self.activations

    def check(self) -> None:
        """Raises `InfeasibleError` above the cap."""
        if self.cap_bytes is None or self.total <= self.cap_bytes:
            return
        short = self.total - self.cap_bytes
        raise InfeasibleError(
            f"{self.name}: needs {_mib(self.total)} (weights {_mib(self.weights)}, cache "
            f"{_mib(self.cache)}, activations {_mib(self.activations)}) but may use "
            f"{_mib(self.cap_bytes)}: {_mib(short)} short; fewer requests in flight, smaller "
            "micro-batches, fewer layers or fewer bits on this device would help"
        )


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors made inside, at their peak. For CPUs, which do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages(args):  # what comes from outside was there before
            self._known.add(storage._cdata)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self._known:
                self._count(storage)
        return result

    def _count(self, storage: Any) -> None:
        self._known.add(storage._cdata)
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size


def _storages(tree: Any) -> list[Any]:
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [leaf.untyped_storage() for leaf in leaves if leaf.layout == torch.strided]


def peak_bytes(compute: Callable[[], object], device: torch.device) -> int:
    """Bytes that `compute` takes at its peak beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        compute()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with PeakMemory() as counter:
        compute()
    return counter.peak


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.2f} MiB"
