"""Rehearses a slower, smaller device on this machine.

`Throttle` waits (factor - 1) t after t seconds of computing. On a CPU t is this thread's own CPU
time, so that sharing a core with other workers shortens the wait and does not change the result; a
wait that was too long shortens the next one. `cores_needed` says how many cores this needs.
`MemoryAccount` adds up weights, cache, activations and message buffers against a cap; above it the
worker stops. `MessageMeter` counts the message buffers that are alive.

Not counted: the process itself, its libraries, and temporaries inside torch's kernels.
"""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from llmpq.cluster import MIB
from llmpq.errors import InfeasibleError
from llmpq.models.live_tensors import PeakMemory

T = TypeVar("T")


Note = Callable[[float, float], None]  # seconds that a computation took, and since it ended


class Throttle:
    """Runs computations at the speed of a device `factor` times slower, and times them.

    On a card with factor 1 nothing waits: CUDA events give the time of each computation later.
    Until `settle` the times of the last few may be missing.
    """

    def __init__(self, factor: float, device: torch.device) -> None:
        self.factor = factor
        self._on_cpu = device.type == "cpu"
        self._device = device
        self._owed_s = 0.0
        self._running: deque[tuple[Any, Any, Note]] = deque()
        self._aside = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, compute: Callable[[], T], note: Note) -> T:
        """The result of `compute`; `note` is called with its seconds, the wait included."""
        if not self._on_cpu and self.factor == 1:
            return self._start(compute, note)
        start, cpu_start = time.perf_counter(), time.thread_time()
        result = compute()
        if not self._on_cpu:
            torch.cuda.current_stream(self._device).synchronize()  # a receive may wait on another
        elapsed = time.perf_counter() - start
        if self.factor > 1:
            busy = time.thread_time() - cpu_start if self._on_cpu else elapsed
            self._wait(busy * self.factor - elapsed)
        note(time.perf_counter() - start, 0.0)
        return result

    def settle(self) -> None:
        """Waits until `note` has been called for all computations."""
        while self._running:
            self._tell_oldest()

    def _start(self, compute: Callable[[], T], note: Note) -> T:
        """Starts a computation between two CUDA events."""
        while self._running and self._running[0][1].query():
            self._tell_oldest()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self._device)
        start.record(stream)
        result = compute()
        end.record(stream)
        self._running.append((start, end, note))
        return result

    def _tell_oldest(self) -> None:
        start, end, note = self._running.popleft()
        end.synchronize()
        now = torch.cuda.Event(enable_timing=True)
        now.record(self._aside)  # this stream does not wait for running kernels
        now.synchronize()
        note(start.elapsed_time(end) / 1000, end.elapsed_time(now) / 1000)

    def _wait(self, seconds: float) -> None:
        self._owed_s += seconds
        if self._owed_s > 0:
            start = time.perf_counter()
            time.sleep(self._owed_s)
            self._owed_s -= time.perf_counter() - start
        self._owed_s = max(self._owed_s, -0.01)  # what contention took beyond 10 ms is lost


def cores_needed(slowdowns: Iterable[float]) -> float:
    """The number of cores that workers of these slowdowns keep busy when all compute at once."""
    return sum(1 / slowdown for slowdown in slowdowns)


def available_cores() -> int:
    """The number of cores that this process may use."""
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
    """The bytes that a worker holds, and its cap (None: no cap)."""

    name: str
    cap_bytes: int | None
    weights: int = 0
    cache: int = 0
    activations: int = 0
    buffers: int = 0

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """The bytes of weights, cache, activations and buffers."""
        return self.weights, self.cache, self.activations, self.buffers

    @property
    def total(self) -> int:
        """All bytes accounted for."""
        return sum(self.parts)

    def check(self) -> None:
        """Raises `InfeasibleError` above the cap."""
        if self.cap_bytes is None or self.total <= self.cap_bytes:
            return
        short = self.total - self.cap_bytes
        raise InfeasibleError(
            f"{self.name}: needs {_mib(self.total)} (weights {_mib(self.weights)}, KV cache "
            f"{_mib(self.cache)}, activations {_mib(self.activations)}, messages "
            f"{_mib(self.buffers)}) but may use "
            f"{_mib(self.cap_bytes)}: {_mib(short)} short; fewer requests in flight, smaller "
            "micro-batches, fewer layers or fewer bits on this device would help"
        )


class MessageMeter:
    """Records the peak bytes of hidden states in flight in a memory account.

    The thread that receives and the one that sends use it at the same time.
    """

    def __init__(self, account: MemoryAccount) -> None:
        self._account = account
        self._alive = 0
        self._lock = threading.RLock()  # a buffer may be freed while another is counted

    def count(self, buffer: torch.Tensor) -> None:
        """Counts a buffer until it is freed; raises `InfeasibleError` above the account's cap."""
        storage = buffer.untyped_storage()
        with self._lock:
            self._alive += storage.nbytes()
            self._account.buffers = max(self._account.buffers, self._alive)
        weakref.finalize(storage, self._freed, storage.nbytes())
        self._account.check()

    def _freed(self, num_bytes: int) -> None:
        with self._lock:
            self._alive -= num_bytes


def peak_bytes(compute: Callable[[], object], device: torch.device) -> int:
    """The peak bytes of `compute`, less the bytes that are held afterwards."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        compute()
        held = torch.cuda.memory_allocated(device)
        return int(torch.cuda.max_memory_allocated(device) - held)
    with PeakMemory() as counter:
        compute()
    return counter.peak - counter.current


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.2f} MiB"
