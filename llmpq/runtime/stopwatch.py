"""Measures where a stage's time goes: computing in each phase, waiting, and communicating.

Computing times are also kept call by call, and are reported by kind of call: phase, requests of the
micro-batch and length class. Length classes start with one prompt length or 16 past tokens each,
and double in width until there are at most `MAX_KINDS` kinds.
"""

import time
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from llmpq.run_report import MeasuredTime

MAX_KINDS = 160
PAST_CLASS_TOKENS = 16
TIME_COLUMNS = 6  # the columns of `Stopwatch.table`
SPAN_COLUMNS = 5  # `Stopwatch.spans` has: is prefill, micro-batch, tokens, start, end


class Call(NamedTuple):
    """The sizes that a call's time depends on; `tokens`: of the padded prompt, or in the cache."""

    prefill: bool
    micro_batch: int
    tokens: int


Calls = Mapping[Call, Sequence[float]]


def _no_calls() -> defaultdict[Call, "array[float]"]:
    return defaultdict(lambda: array("d"))


@dataclass
class Stopwatch:
    """Adds up the seconds of a stage since `started`."""

    busy_prefill_s: float = 0.0
    busy_decode_s: float = 0.0
    idle_s: float = 0.0
    comm_s: float = 0.0
    calls: defaultdict[Call, "array[float]"] = field(default_factory=_no_calls)
    spans: "array[float] | None" = None  # all calls, where a trace is wanted
    started: float = field(default_factory=time.perf_counter)

    def busy(
        self, prefill: bool, micro_batch: int, tokens: int, seconds: float, ago: float = 0.0
    ) -> None:
        """Adds the computing time of a call that ended `ago` seconds ago."""
        self.calls[Call(prefill, micro_batch, tokens)].append(seconds)
        if self.spans is not None:
            end = time.perf_counter() - self.started - ago
            self.spans.extend((prefill, micro_batch, tokens, end - seconds, end))
        if prefill:
            self.busy_prefill_s += seconds
        else:
            self.busy_decode_s += seconds

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Times a wait for another stage."""
        start = time.perf_counter()
        yield
        self.idle_s += time.perf_counter() - start

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Times packing and sending a message."""
        start = time.perf_counter()
        yield
        self.comm_s += time.perf_counter() - start

    @property
    def busy_ms(self) -> int:
        """Milliseconds of computing in both phases."""
        return round(1000 * (self.busy_prefill_s + self.busy_decode_s))

    def values(self) -> tuple[float, ...]:
        """The four sums, in the order of the fields."""
        return self.busy_prefill_s, self.busy_decode_s, self.idle_s, self.comm_s

    def table(self) -> list[list[float]]:
        """For each kind: is prefill, micro-batch, mean tokens, count, total and median seconds."""
        width, longest = 1, max((call.tokens for call in self.calls), default=0)
        while len(kinds := by_kind(self.calls, width)) > MAX_KINDS and width <= longest:
            width *= 2
        return [_row(kind, calls) for kind, calls in sorted(kinds.items())]


def by_kind(calls: Calls, width: int) -> dict[Call, dict[Call, Sequence[float]]]:
    """Groups calls by length classes `width` prompt tokens wide; the least length names a kind."""
    kinds: dict[Call, dict[Call, Sequence[float]]] = defaultdict(dict)
    for call, seconds in calls.items():
        step = width if call.prefill else width * PAST_CLASS_TOKENS
        kinds[call._replace(tokens=call.tokens // step * step)][call] = seconds
    return kinds


def measured_times(table: Sequence[Sequence[float]]) -> list[MeasuredTime]:
    """The rows of `Stopwatch.table` as a report holds them."""
    return [
        MeasuredTime(
            phase="prefill" if prefill else "decode",
            micro_batch=int(micro_batch),
            tokens=tokens,
            count=int(count),
            total_s=total_s,
            median_s=median_s,
        )
        for prefill, micro_batch, tokens, count, total_s, median_s in table
    ]


def _row(kind: Call, calls: Calls) -> list[float]:
    every = [second for seconds in calls.values() for second in seconds]
    tokens = sum(call.tokens * len(seconds) for call, seconds in calls.items()) / len(every)
    return [kind.prefill, kind.micro_batch, tokens, len(every), sum(every), median(every)]
