"""What a piece of work took: seconds, and memory at its peak."""

import resource
import sys
import time
from types import TracebackType
from typing import Self

import torch

from llmpq.profiler.device_probe import resident_bytes


class Effort:
    """Time and memory between entering and leaving.

    Memory is that of tensors on a card; on a CPU, resident memory above what it was on entering.
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
            self.peak_memory_bytes = max(0, _most_resident_bytes() - self._before)


def _most_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
