"""Measures the seconds and the peak memory of a piece of work."""

import time
from types import TracebackType
from typing import Self

import torch

from llmpq.profiler.device_probe import most_resident_bytes, resident_bytes


class Effort:
    """A context manager that measures time and peak memory.

    On a card, memory is that of tensors; on a CPU, resident memory above that on entering.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds, self.peak_memory_bytes = 0.0, 0
        self._device = device

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._before = resident_bytes()
        self._start = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.monotonic() - self._start
        if self._device.type == "cuda":
            self.peak_memory_bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            self.peak_memory_bytes = max(0, most_resident_bytes() - self._before)
