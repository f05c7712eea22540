"""Playing slower and smaller devices: waits, the memory account, the peak of what tensors take."""

import time

import pytest
import torch

from llmpq.errors import InfeasibleError
from llmpq.runtime import rehearsal
from llmpq.runtime.rehearsal import (
    MemoryAccount,
    PeakMemory,
    Throttle,
    available_cores,
    cores_needed,
    peak_bytes,
)

CPU = torch.device("cpu")
KIB = 1024


def spin(seconds: float) -> str:
    """Keeps this thread's own CPU time busy."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return "done"


class Clock:
    """In the place of `time`: moves only when something computes, waits or sleeps."""

    def __init__(self, overshoot: float = 0.0) -> None:
        self.now = self.own = 0.0
        self.overshoot = overshoot  # of every sleep

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.own

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.overshoot

    def compute(self, own: float, others: float) -> str:
        """Takes `own` seconds of this thread while others have the core for `others`."""
        self.own += own
        self.now += own + others
        return "done"


def throttled(monkeypatch, factor, own, others=0.0, overshoot=0.0) -> list[float]:
    """What ten computations took."""
    clock, times = Clock(overshoot), []
    monkeypatch.setattr(rehearsal, "time", clock)
    throttle = Throttle(factor, CPU)
    for _ in range(10):
        result = throttle.run(lambda: clock.compute(own, others), lambda s, _: times.append(s))
        assert result == "done"
    return times


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
def test_a_throttled_computation_takes_its_factor(monkeypatch, factor):
    assert throttled(monkeypatch, factor, 0.02) == pytest.approx([factor * 0.02] * 10)


def test_the_core_that_others_have_eats_into_the_wait(monkeypatch):
    assert throttled(monkeypatch, 4.0, 0.02, others=0.06) == pytest.approx([0.08] * 10)
    assert throttled(monkeypatch, 1.0, 0.02, others=0.06) == pytest.approx([0.08] * 10)


def test_a_wait_carries_its_overshoot_to_the_next(monkeypatch):
    times = throttled(monkeypatch, 4.0, 0.02, overshoot=0.005)
    assert sum(times) == pytest.approx(10 * 0.08 + 0.005)
    # What others took beyond 10 ms of it is lost: 0.02 too late at first, 0.01 made good.
    clock, times = Clock(), []
    monkeypatch.setattr(rehearsal, "time", clock)
    throttle = Throttle(2.0, CPU)
    for others in (0.04, 0.0):
        throttle.run(lambda o=others: clock.compute(0.02, o), lambda s, _: times.append(s))
    assert times == pytest.approx([0.06, 0.03])


def test_waiting_without_computing_is_not_stretched(monkeypatch):
    assert throttled(monkeypatch, 10.0, 0.0, others=0.05) == pytest.approx([0.05] * 10)


def test_no_real_computation_takes_less_than_its_factor():
    times = []
    assert Throttle(4.0, CPU).run(lambda: spin(0.02), lambda s, _: times.append(s)) == "done"
    assert times[0] >= 0.95 * 4 * 0.02


def test_an_exception_passes_through_a_throttle():
    with pytest.raises(ZeroDivisionError):
        Throttle(3.0, CPU).run(lambda: 1 / 0, lambda *_: None)


def test_cores_needed_adds_the_shares_of_all_workers():
    assert cores_needed([1.0, 2.0, 4.0]) == pytest.approx(1.75)
    assert cores_needed([]) == 0
    assert available_cores() >= 1


def test_an_account_complains_only_above_its_cap():
    account = MemoryAccount("stage 1 (slow on laptop)", cap_bytes=3 * KIB * KIB)
    account.weights, account.cache, account.activations = 2 * KIB * KIB, KIB * KIB, 0
    account.check()
    account.activations = 512 * KIB
    assert account.total == 3.5 * KIB * KIB
    with pytest.raises(InfeasibleError) as caught:
        account.check()
    for part in ("stage 1 (slow on laptop)", "3.50 MiB", "3.00 MiB", "0.50 MiB short"):
        assert part in str(caught.value)
    MemoryAccount("free", None, weights=10**15).check()


def test_peak_counts_what_is_alive_at_once():
    with PeakMemory() as counter:
        a = torch.zeros(KIB, dtype=torch.uint8)
        b = torch.zeros(2 * KIB, dtype=torch.uint8)
        del a
        c = torch.zeros(KIB // 2, dtype=torch.uint8)
    assert counter.peak == 3 * KIB
    assert counter.current == 2.5 * KIB
    del b, c
    assert counter.current == 0


def test_peak_ignores_views_in_place_and_what_was_there():
    outside = torch.zeros(4 * KIB, dtype=torch.uint8)
    with PeakMemory() as counter:
        outside.add_(1)
        inside = torch.zeros(KIB, dtype=torch.uint8)
        inside.view(32, 32).t()[3:5].mul_(2)
        outside[:10].copy_(inside[:10])
    assert counter.peak == KIB


def test_peak_bytes_of_a_product():
    a, b = torch.ones(64, 32), torch.ones(32, 16)
    assert peak_bytes(lambda: a @ b, CPU) == 64 * 16 * 4
    with_temporary = peak_bytes(lambda: (a @ b).relu().sum(), CPU)
    assert 2 * 64 * 16 * 4 <= with_temporary <= 2 * 64 * 16 * 4 + 64
