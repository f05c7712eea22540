"""Where a stage's time goes: computing in each phase, waiting for others, handing over."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass


@dataclass
class Stopwatch:
    """Seconds since it was made."""

    busy_prefill_s: float = 0.0
    busy_decode_s: float = 0.0
    idle_s: float = 0.0
    comm_s: float = 0.0

    def busy(self, prefill: bool, seconds: float) -> None:
        """Adds time of computing."""
        if prefill:
            self.busy_prefill_s += seconds
        else:
            self.busy_decode_s += seconds

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Waiting for another stage."""
        start = time.perf_counter()
        yield
        self.idle_s += time.perf_counter() - start

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Packing and handing over."""
        start = time.perf_counter()
        yield
        self.comm_s += time.perf_counter() - start

    def values(self) -> tuple[float, ...]:
        """All four, in the order of the fields."""
        return astuple(self)
