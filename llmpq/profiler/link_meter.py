"""Measures the links between ranks: latency and bandwidth of every ordered pair.

The source sends a message, the destination answers with a few bytes, and half the round trip of
two such small messages is subtracted, so that each direction of a large message is measured
separately. For small messages only the round trip can be measured without a common clock; both
directions get half of it. Messages use gloo between CPUs and shared cards, NCCL where each rank has
a card of its own. A buffer is posted when its message is due, as in a plain send and receive. The
runtime posts buffers ahead, which between processes of one machine was up to a third faster, so
that plans err on the safe side.

Pairs are measured one at a time while the others wait, all of them in a few rounds, so that a slow
period of a machine affects few samples of many pairs. Within a visit the source repeats sizes until
the medians are known to `TOLERANCE` or its share of the budget is spent.

Not covered: copies between a card and main memory where ranks share a card; collectives.
"""

import itertools
import math
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from llmpq.cluster import MIB, Link
from llmpq.errors import WorkerError
from llmpq.link_data import LinkPair, LinkRow, NodeLink
from llmpq.plain import plain_line
from llmpq.profiler.sampling import median_interval
from llmpq.runtime.transport import Transport

KIB = 1024
POOL = 2  # messages of the largest size that fit the pool; smaller ones rotate through it
# Three small sizes for the latency, three large ones for the bandwidth: in between, sockets and
# caches hold whole messages, and a byte takes less time than in any large message.
CPU_SIZES = (KIB, 8 * KIB, 64 * KIB, 512 * KIB, 4 * MIB, 8 * MIB, 16 * MIB)
CARD_SIZES = (*CPU_SIZES, 64 * MIB)
ACK_BYTES = 8
ROUNDS = 3
TOLERANCE = 0.02  # half the width of the median's 95 % confidence interval, relative
MIN_SAMPLES = 3  # the least samples of each size in a visit
MAX_SAMPLES = 400
BURST_S = 0.02  # about how long messages of one size are sent in a row
FEWEST_SIZES = 3  # measured even where the budget is over
NAME_BYTES = 64  # the most bytes of a host's name
LEAST_SHARE = 0.05  # the least share of a round trip that is a one-way time
LEAST_SLOPE = 1e-15  # seconds a byte, where times do not grow with size
SHARED_REPEATS = 10
END = -1

Pair = tuple[int, int]  # source, destination
Trips = dict[int, list[float]]  # seconds of round trips by message size


def fit_link(num_bytes: Sequence[int], seconds: Sequence[float]) -> tuple[Link, float]:
    """Fits latency + bytes / bandwidth by least squared relative errors; also their mean error.

    Neither is negative; where times do not grow with size the bandwidth is very large.
    """
    size, time_s = np.array(num_bytes, dtype=float), np.array(seconds, dtype=float)
    columns = np.stack([1 / time_s, size / time_s], axis=1)
    scale = columns.max(axis=0)
    latency, slope = np.linalg.lstsq(columns / scale, np.ones(len(size)), rcond=None)[0] / scale
    if latency < 0:
        latency, slope = 0.0, _alone(columns[:, 1])
    elif slope < LEAST_SLOPE:
        latency, slope = _alone(columns[:, 0]), LEAST_SLOPE
    error = float(np.abs((latency + slope * size) / time_s - 1).mean())
    return Link(latency_us=1e6 * float(latency), bandwidth_gbs=1e-9 / float(slope)), error


def _alone(column: np.ndarray) -> float:
    """The factor x with the least squares of column x - 1."""
    return float(column.sum() / (column @ column))


def uncertainty(samples: Sequence[float]) -> float:
    """Half the width of the median's 95 % confidence interval, relative to the median.

    It is infinite for fewer than six samples, which give no such interval.
    """
    if len(samples) < 6:
        return math.inf
    low, high = median_interval(np.sort(samples))
    return (high - low) / 2 / median(samples)


def one_way(trips: Trips) -> dict[int, list[float]]:
    """Seconds of messages, from their round trips with a small answer."""
    answer = median(trips[ACK_BYTES]) / 2
    return {
        size: [max(trip - answer, LEAST_SHARE * trip) for trip in times]
        for size, times in trips.items()
        if size != ACK_BYTES and times
    }


def planning_links(pairs: Sequence[LinkPair]) -> tuple[list[NodeLink], Link | None]:
    """The link inside each node and the one between nodes: medians over their pairs."""
    names = dict.fromkeys(pair.source_node for pair in pairs)
    nodes = []
    for name in names:
        inside = [p for p in pairs if p.source_node == p.destination_node == name]
        if inside:
            nodes.append(NodeLink(node=name, link=_median_link(inside)))
    between = [p for p in pairs if p.source_node != p.destination_node]
    return nodes, _median_link(between) if between else None


def _median_link(pairs: Sequence[LinkPair]) -> Link:
    return Link(
        latency_us=median(pair.latency_us for pair in pairs),
        bandwidth_gbs=median(pair.bandwidth_gbs for pair in pairs),
    )


@dataclass
class LinkMeter:
    """Measures links between the ranks of a transport; every rank must make the same calls."""

    transport: Transport
    sizes: tuple[int, ...]
    trips: dict[Pair, Trips] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = self.transport.message_device
        self.backend = "nccl" if self.device.type == "cuda" else "gloo"
        self._group = dist.new_group(backend=self.backend)
        self._orders = dist.new_group(backend="gloo")
        self._pool = self._ones(POOL * self.sizes[-1])
        self._num_messages = 0

    @property
    def pairs(self) -> list[Pair]:
        """Every ordered pair of ranks."""
        return list(itertools.permutations(range(self.transport.size), 2))

    def run(self, budget_s: float, on_visit: Callable[[int], None]) -> list[LinkPair]:
        """All pairs, each visited several times; `on_visit(visits done)`. On every rank."""
        visits = ROUNDS * len(self.pairs)
        self.wait_for_all()
        start = time.monotonic()
        for number, pair in enumerate(self.pairs * ROUNDS):
            self.visit(pair, start + budget_s * (number + 1) / visits)
            on_visit(number + 1)
        return self.result(self.pairs, self._shared())

    def visit(self, pair: Pair, deadline: float) -> None:
        """Takes samples of one pair until `deadline` (monotonic); the other ranks wait."""
        source, destination = pair
        if self.transport.rank == source:
            self._lead(self.trips.setdefault(pair, {}), destination, deadline)
        elif self.transport.rank == destination:
            self._follow(source)
        self.wait_for_all()

    def wait_for_all(self) -> None:
        """Waits until every rank has called this."""
        self.transport.gather(torch.zeros(1))

    def result(self, pairs: Sequence[Pair], shared: Sequence[float] = ()) -> list[LinkPair]:
        """The links of these pairs, which must have been visited, on every rank.

        `shared` holds the GB/s from each rank to the next while all of them send.
        """
        table = torch.zeros(len(pairs), len(self.sizes), 4, dtype=torch.float64)
        for number, pair in enumerate(pairs):
            times = one_way(self.trips[pair]) if pair in self.trips else {}
            for column, size in enumerate(self.sizes):
                if times.get(size):
                    p10, p50, p90 = np.percentile(times[size], (10, 50, 90))
                    table[number, column] = torch.tensor([p50, p10, p90, len(times[size])])
        tables = self.transport.gather(table)
        names = self._node_names()
        found = []
        for number, (source, destination) in enumerate(pairs):
            rows = _rows(self.sizes, tables[source][number].tolist())
            neighbours = destination == source + 1 and shared
            found.append(
                _link_pair(
                    (source, destination),
                    (names[source], names[destination]),
                    rows,
                    shared[source] if neighbours else None,
                )
            )
        return found

    def _node_names(self) -> list[str]:
        name = socket.gethostname().encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0")
        everyone = self.transport.gather(torch.frombuffer(bytearray(name), dtype=torch.uint8))
        names = (bytes(one.tolist()).rstrip(b"\0").decode(errors="replace") for one in everyone)
        return [plain_line(name) for name in names]

    # ---- one pair

    def _lead(self, trips: Trips, peer: int, deadline: float) -> None:
        """Sends bursts of one size after the other until all medians are certain enough."""
        sizes = (ACK_BYTES, *self.sizes)
        for number, size in enumerate(sizes):
            if number > FEWEST_SIZES and time.monotonic() > deadline:
                break
            self._burst(trips.setdefault(size, []), peer, size, MIN_SAMPLES)
        while time.monotonic() < deadline:
            unsure = [
                size
                for size, times in trips.items()
                if len(times) < MAX_SAMPLES and uncertainty(times) > TOLERANCE
            ]
            if not unsure:
                break
            for size in unsure:
                count = max(1, int(BURST_S / median(trips[size])))
                self._burst(trips[size], peer, size, min(count, MAX_SAMPLES))
                if time.monotonic() > deadline:
                    break
        dist.send(torch.tensor([END, 0]), peer, group=self._orders)

    def _burst(self, times: list[float], peer: int, size: int, count: int) -> None:
        """Sends some messages of one size; the first is not counted, as caches are cold."""
        dist.send(torch.tensor([size, 1 + count]), peer, group=self._orders)
        answer = self._ones(ACK_BYTES)
        for number in range(1 + count):
            message = self._message(size)
            start = time.perf_counter()
            answered = dist.irecv(answer, peer, group=self._group)
            self._finish(dist.isend(message, peer, group=self._group))
            self._finish(answered)
            if number:
                times.append(time.perf_counter() - start)

    def _follow(self, peer: int) -> None:
        """Answers every message; the next buffer is posted after the answer was sent."""
        order = torch.zeros(2, dtype=torch.int64)
        while True:
            dist.recv(order, peer, group=self._orders)
            size, count = order.tolist()
            if size == END:
                return
            answer = self._ones(ACK_BYTES)
            for _ in range(count):
                self._finish(dist.irecv(self._message(size), peer, group=self._group))
                self._finish(dist.isend(answer, peer, group=self._group))

    def _message(self, size: int) -> torch.Tensor:
        """The next part of the pool, which is in no cache, as the states of a run are not."""
        self._num_messages += 1
        start = self._num_messages % (len(self._pool) // size) * size
        return self._pool[start : start + size]

    def _ones(self, count: int) -> torch.Tensor:
        """A buffer whose memory is really allocated; unwritten zeros may not be."""
        return torch.ones(count, dtype=torch.uint8, device=self.device)

    def _finish(self, work: "dist.Work | None") -> None:
        """Waits for a transfer; NCCL's own wait holds back only the stream."""
        assert work is not None
        work.wait()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    # ---- all neighbours at once

    def _shared(self) -> list[float]:
        """GB/s from each rank to the next while all of them send, at the largest size."""
        rank, last = self.transport.rank, self.transport.size - 1
        message, buffer = self._ones(self.sizes[-1]), self._ones(self.sizes[-1])
        self.wait_for_all()
        start = time.perf_counter()
        for number in range(1 + SHARED_REPEATS):
            works = [dist.irecv(buffer, rank - 1, group=self._group)] if rank > 0 else []
            works += [dist.isend(message, rank + 1, group=self._group)] if rank < last else []
            for work in works:
                self._finish(work)
            start = time.perf_counter() if number == 0 else start
        each_s = (time.perf_counter() - start) / SHARED_REPEATS
        times = self.transport.gather(torch.tensor([each_s], dtype=torch.float64))
        return [1e-9 * self.sizes[-1] / float(times[r]) for r in range(1, last + 1)]


def measure(
    transport: Transport, sizes: tuple[int, ...], budget_s: float, on_visit: Callable[[int], None]
) -> tuple[str, list[LinkPair]]:
    """The backend, and the links of all pairs; raises `WorkerError` where a rank is lost."""
    try:
        meter = LinkMeter(transport, sizes)
        return meter.backend, meter.run(budget_s, on_visit)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        message = f"rank {transport.rank}: another rank was lost ({reason})"
        raise WorkerError(message) from None


def _rows(sizes: Sequence[int], table: Sequence[Sequence[float]]) -> list[LinkRow]:
    return [
        LinkRow(
            num_bytes=size,
            time_us=1e6 * p50,
            time_us_p10=1e6 * p10,
            time_us_p90=1e6 * p90,
            num_samples=int(count),
        )
        for size, (p50, p10, p90, count) in zip(sizes, table, strict=True)
        if count
    ]


def _link_pair(
    pair: Pair, nodes: tuple[str, str], rows: list[LinkRow], shared: float | None
) -> LinkPair:
    link, error = fit_link([r.num_bytes for r in rows], [1e-6 * r.time_us for r in rows])
    return LinkPair(
        source=pair[0],
        destination=pair[1],
        source_node=nodes[0],
        destination_node=nodes[1],
        latency_us=link.latency_us,
        bandwidth_gbs=link.bandwidth_gbs,
        mean_error=error,
        shared_bandwidth_gbs=shared,
        rows=rows,
    )
