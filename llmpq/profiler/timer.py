"""Times short computations on a CPU or a CUDA device."""

import time
from collections.abc import Callable

import torch


class Timer:
    """Times single runs by the clock that suits the device.

    On a card it uses CUDA events. On a CPU with one thread it uses the thread's own CPU time, which
    other processes cannot stretch (and which rehearsals slow down), after a pause: a stage of a
    pipeline waits between micro-batches, so that caches and clocks are colder than in a tight loop
    (measured: 10 to 20 % slower after 1 to 5 ms, 30 to 50 % after 20 ms; a layer's decode step of
    1.2 ms took 1.3 ms after 8 ms, 2.0 after 30 and 2.1 after 60). With more threads it uses wall
    time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own_time = device.type == "cpu" and torch.get_num_threads() == 1

    def time_ms(self, compute: Callable[[], object], pause_s: float = 0.0) -> float:
        """Milliseconds of one run; a CPU with one thread rests for `pause_s` before."""
        if self._device.type == "cuda":
            return self._cuda_ms(compute)
        if self._own_time:
            time.sleep(pause_s)
        clock = time.thread_time if self._own_time else time.perf_counter
        start = clock()
        compute()
        return 1000 * (clock() - start)

    def _cuda_ms(self, compute: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        compute()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
