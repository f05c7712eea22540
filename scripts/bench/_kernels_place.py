"""Where the kernels benchmark measures, until when, and how it times one call.

On a card a call is timed by events around it, with the L2 cache overwritten before: that keeps the
card busy while the host launches, so launches count only where they take longer than the card's own
work. On a CPU the clock is the host's. A CPU stands in for a card where the scripts themselves are
tried out: everything is small there, and no number says anything about a card.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

FLUSH_BYTES = 2**28  # several times the L2 cache of any card
CALLS_S = 0.03  # of timed calls behind a figure
LEAST_CALLS, MOST_CALLS = 5, 40
COPY_BYTES = {"cuda": 2**31, "cpu": 2**24}
SQUARE = {"cuda": 8192, "cpu": 512}  # of the product that tells the ceiling of arithmetic

Call = Callable[[], object]


@dataclass(frozen=True)
class Place:
    """A device and the data type of its activations."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16

    @property
    def on_card(self) -> bool:
        """Whether this is a card; else everything is small."""
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        """What people call the device."""
        return torch.cuda.get_device_name(self.device) if self.on_card else "CPU"

    def wait(self) -> None:
        """Returns when the device has done all that was asked of it."""
        if self.on_card:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Gives unused memory back, for whoever comes next."""
        gc.collect()
        if self.on_card:
            torch.cuda.empty_cache()


def find_place(name: str) -> Place:
    """The first card, or the CPU. bfloat16 where a card has it, else float16."""
    device = torch.device(name, 0) if name == "cuda" else torch.device(name)
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return Place(device, torch.float16 if old else torch.bfloat16)


@dataclass(frozen=True)
class Deadline:
    """When a measurement should end of its own accord, by `time.monotonic`."""

    at_s: float = float("inf")

    @staticmethod
    def after(seconds: float) -> "Deadline":
        """So many seconds from now."""
        return Deadline(time.monotonic() + seconds)

    @property
    def left_s(self) -> float:
        """Seconds that are left, negative when it is over."""
        return self.at_s - time.monotonic()

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether work of so many seconds still ends in time."""
        return self.left_s > seconds


@dataclass
class Timer:
    """Times calls on one device."""

    place: Place
    _flush: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        size = FLUSH_BYTES if self.place.on_card else 0
        self._flush = torch.empty(size, dtype=torch.uint8, device=self.place.device)

    def median_ms(self, call: Call) -> float:
        """Milliseconds of one call, the median of `LEAST_CALLS` or more; the first do not count."""
        call()
        first = self._times_ms(call, 1)[0]
        count = int(CALLS_S * 1e3 / max(first, 1e-3))
        return statistics.median(self._times_ms(call, min(MOST_CALLS, max(LEAST_CALLS, count))))

    def first_s(self, call: Call) -> float:
        """Seconds of a call that may have to compile its kernel."""
        self.place.wait()
        start = time.perf_counter()
        call()
        self.place.wait()
        return time.perf_counter() - start

    def _times_ms(self, call: Call, count: int) -> list[float]:
        return self._by_events(call, count) if self.place.on_card else self._by_clock(call, count)

    def _by_events(self, call: Call, count: int) -> list[float]:
        pairs = []
        for _ in range(count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        self.place.wait()
        return [start.elapsed_time(end) for start, end in pairs]

    def _by_clock(self, call: Call, count: int) -> list[float]:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return times


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this run: a copy (read and written), and a product of squares."""

    copy_gb_per_s: float
    matmul_tflops: float


def measure_ceilings(timer: Timer) -> Ceilings:
    """The ceilings that shares are shares of."""
    return Ceilings(_copy_gb_per_s(timer), _matmul_tflops(timer))


def _copy_gb_per_s(timer: Timer) -> float:
    device = timer.place.device
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer.median_ms(lambda: target.copy_(source)) / 1e6


def _matmul_tflops(timer: Timer) -> float:
    device, size = timer.place.device, SQUARE[timer.place.device.type]
    square = torch.randn(size, size, device=device).to(timer.place.dtype)
    return 2 * size**3 / timer.median_ms(lambda: square @ square) / 1e9
