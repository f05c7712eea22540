"""Notices within seconds that a worker is gone, and says which one and why.

Each worker writes a heartbeat once a second to a board, the key-value store of torch.distributed,
and looks at the heartbeats of the others. A worker whose heartbeats stop is lost, and the others
end: a main thread that waits for a message of the lost worker would wait for ever. Workers with a
parent that started them only write heartbeats; the parent looks.
A worker that fails writes the cause on the board before it ends, so that all report the same cause.

Time is counted in looks and not in seconds: a process that was itself stopped for an hour has not
looked, and blames nobody. Store operations may hang (a machine that is gone closes no connection),
so each monitor has two threads: one uses the store, the other checks that the store still answers.

The store has no password. Its contents are checked when they are read (`_read`), and whatever a
worker would not have written counts as absent; names are shortened and have no line feeds. A
program that reaches the store can still declare a run lost.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Self, TypeVar

import torch
import torch.distributed as dist
from pydantic import AfterValidator, NonNegativeInt, PositiveInt, TypeAdapter

from llmpq.errors import FailedRequests, LlmpqError, NeighbourLost, UserError
from llmpq.plain import plain_line
from llmpq.reliability.ending import RESUME, SUPERVISED, end_process

PERIOD_S = 1.0  # between two heartbeats, and between two looks
SILENT_LOOKS = 5  # looks without a new heartbeat after which a worker is lost
START_LOOKS = 300  # looks without a first heartbeat after which a worker is lost
DONE = 1 << 40  # added to the beats of a worker that has ended in order
LOOK_S = 1.0  # the time limit of a look out of turn
ENDED = "its process has ended"
NO_SIGN = f"no sign of life for {(SILENT_LOOKS + 1) * PERIOD_S:.0f} s"  # beats lie before looks


MOST_BYTES, MOST_CHARACTERS = 1 << 16, 1000  # limits of a worker's report and of a text in it

T = TypeVar("T")
ReportedText = Annotated[str, AfterValidator(lambda text: plain_line(text[:MOST_CHARACTERS]))]


@dataclass(frozen=True)
class WorkerIdentity:
    """The process of a worker, as it describes itself to the others."""

    rank: NonNegativeInt
    name: ReportedText
    host: ReportedText
    pid: PositiveInt
    machine: ReportedText = ""  # process ids are comparable within a machine
    started: NonNegativeInt = 0  # tells the process from a later one of the same id

    def __str__(self) -> str:
        return f"worker {self.rank} ({self.name}, host {self.host}, pid {self.pid})"

    @classmethod
    def here(cls, rank: int, name: str) -> Self:
        """The identity of this process."""
        pid = os.getpid()
        return cls(rank, name, socket.gethostname(), pid, _machine(), process_state(pid)[1])

    @property
    def is_gone(self) -> bool:
        """Whether its process has ended; False where that cannot be seen from here."""
        return self._is_near and process_state(self.pid) not in self._alive

    @property
    def is_there(self) -> bool:
        """Whether its process runs on this machine; False where that cannot be seen from here."""
        return self._is_near and process_state(self.pid) in self._alive

    def kill(self) -> None:
        """Ends a worker that hangs on this machine: it must not wake up and write."""
        if self.is_there and self._is_of_this_run:
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)

    @property
    def _is_of_this_run(self) -> bool:
        """Checks the environment of the process, as the store could name any process."""
        try:
            variables = Path(f"/proc/{self.pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False
        port = os.environ.get("MASTER_PORT", "")
        return {f"RANK={self.rank}".encode(), f"MASTER_PORT={port}".encode()} <= set(variables)

    @property
    def _is_near(self) -> bool:
        return bool(self.machine) and self.machine == _machine()

    @property
    def _alive(self) -> list[tuple[str, int]]:
        return [(state, self.started) for state in "RSDTtIWP"]


@dataclass(frozen=True)
class Verdict:
    """The workers that caused the end of the run, and how they ended.

    `bad_input` means that the others will find the same fault; `device_lost` means that a device no
    longer works.
    """

    ranks: tuple[NonNegativeInt, ...]
    how: ReportedText
    bad_input: bool = False
    device_lost: bool = False


WHO, VERDICT = TypeAdapter(WorkerIdentity), TypeAdapter(Verdict)


def process_state(pid: int) -> tuple[str, int]:
    """The state's letter and the start time of a process here; ("", 0) where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[19])


def _machine() -> str:
    """A text that is equal for processes that see each other's ids; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class Board:
    """The messages of workers to each other in a store; every thread needs its own board."""

    def __init__(self, store: dist.Store, size: int) -> None:
        self._store, self.size = store, size

    def join(self, who: WorkerIdentity) -> None:
        """Writes the identity of a worker, and its first heartbeat."""
        self._store.set(f"who/{who.rank}", json.dumps(asdict(who)))
        self.beat(who.rank)

    def beat(self, rank: int) -> None:
        """Writes a heartbeat."""
        self._store.add(f"beat/{rank}", 1)

    def done(self, rank: int) -> None:
        """Writes that a worker has ended in order, so that nobody misses its heartbeats."""
        self._store.add(f"beat/{rank}", DONE)

    def beats(self) -> list[int]:
        """The heartbeats of every worker; 0 where there was none yet."""
        return [self._store.add(f"beat/{rank}", 0) for rank in range(self.size)]

    def conclude(self, verdict: Verdict) -> Verdict:
        """Writes why the run ends; only the first verdict is kept, and it is returned."""
        self._store.compare_set("verdict", "", json.dumps(asdict(verdict)))
        return self.verdict() or verdict

    def verdict(self) -> Verdict | None:
        """The first verdict, if there is one."""
        found = self._read("verdict", VERDICT)
        return found if found and found.ranks and max(found.ranks) < self.size else None

    def who(self, rank: int) -> WorkerIdentity | None:
        """The identity of a worker; None before it has joined."""
        found = self._read(f"who/{rank}", WHO)
        return found if found and found.rank == rank else None

    def _read(self, key: str, kind: TypeAdapter[T]) -> T | None:
        """The value of a key; None where there is none or it is malformed."""
        if not self._store.check([key]):
            return None
        text = self._store.get(key)
        with suppress(ValueError):
            return kind.validate_json(text, strict=True) if len(text) <= MOST_BYTES else None
        return None


def open_board(size: int, store: dist.Store | None = None) -> Board:
    """A board on the given store, or on a new connection to the launch's store."""
    return Board(open_store("board", size, store), size)


def open_store(name: str, size: int, store: dist.Store | None = None) -> dist.Store:
    """The part `name` of the store that torchrun, the parent or rank 0 keeps, once it is there.

    torchrun keeps its store when it restarts workers: entries of earlier starts are ignored.
    """
    prefix = f"llmpq/{name}/{restarts()}/{size}"
    return dist.PrefixStore(prefix, store or _connected())


def _connected() -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(hours=1)
    return dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


def restarts() -> int:
    """The number of times that torchrun has restarted the workers."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


class HeartbeatTracker:
    """Decides which workers are lost from their heartbeats, one look a period."""

    def __init__(self, size: int) -> None:
        self._last = [0] * size
        self._same = [0] * size

    def look(self, beats: Sequence[int]) -> list[int]:
        """The ranks that are lost by now; workers that have ended in order never are."""
        for rank, beat in enumerate(beats):
            same = beat == self._last[rank] and beat < DONE
            self._same[rank] = self._same[rank] + 1 if same else 0
            self._last[rank] = beat
        limits = [SILENT_LOOKS if beat else START_LOOKS for beat in beats]
        return [rank for rank, limit in enumerate(limits) if self._same[rank] >= limit]


class Monitor:
    """Writes heartbeats during a worker's work, and ends this process when another one is lost.

        with Monitor(rank, size, "t4-16g on node0"):
            work()

    An error that leaves the block is reported to the others. `advice` says what to do after a loss.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        name: str,
        advice: str = RESUME,
        open_board: Callable[[int], Board] = open_board,
        end: Callable[[str], object] = end_process,
    ) -> None:
        self.rank, self.size, self.advice = rank, size, advice
        self._who = WorkerIdentity.here(rank, name)
        self._open, self._end = open_board, end
        self._is_watched = SUPERVISED in os.environ  # the parent process watches this one
        self._ended, self._wake = threading.Event(), threading.Event()
        self._write_end: Callable[[Board], object] = lambda board: board.done(rank)
        self._num_looks = 0
        self._patience = SILENT_LOOKS
        self._others: dict[int, WorkerIdentity] = {}
        self._threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._use_store, self._check_store)
        ]

    def __enter__(self) -> Self:
        if self.size > 1:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.size == 1:
            return
        if isinstance(error, NeighbourLost) and not self._is_watched:
            time.sleep((SILENT_LOOKS + 2) * PERIOD_S)  # a look finds who it was, and ends this
        verdict = verdict_on(self.rank, error)
        if verdict is not None:
            self._write_end = lambda board: board.conclude(verdict)
        self._ended.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(2 * PERIOD_S)

    def rename(self, name: str) -> None:
        """Replaces the name by which the others know this worker."""
        self._who = replace(self._who, name=name)

    def look_now(self) -> None:
        """Looks at once: ends this process if another worker failed, else returns soon."""
        self._patience = 0
        before, end = self._num_looks, time.monotonic() + LOOK_S
        while self._num_looks < before + 2 and time.monotonic() < end:  # one may be under way
            self._wake.set()
            time.sleep(0.01)

    def wait_for_others(self, seconds: float) -> None:
        """Waits until the other workers of this machine have ended, for `seconds` at most.

        This is for a worker whose exit code makes torchrun end the workers that still run.
        """
        end = time.monotonic() + seconds
        while any(who.is_there for who in self._others.values()) and time.monotonic() < end:
            time.sleep(0.05)

    def _use_store(self) -> None:
        """Writes heartbeats and looks; the thread that uses the store."""
        try:
            board = self._open(self.size)
            announced = self._who
            board.join(announced)
            watch, self._num_looks = HeartbeatTracker(self.size), 1
            while not self._ended.is_set():
                if self._who is not announced:
                    announced = self._who
                    board.join(announced)
                board.beat(self.rank)
                if not self._is_watched:
                    self._look(board, watch)
                self._num_looks += 1
                self._wake.wait(PERIOD_S)
                self._wake.clear()
            self._write_end(board)
        except RuntimeError:  # the store has closed; `_check_store` gives this process time to end
            if self._is_watched:
                self._end("")

    def _look(self, board: Board, watch: HeartbeatTracker) -> None:
        """Looks at all workers, and ends this process where another one has failed or is lost."""
        gone = [rank for rank, who in self._others.items() if who.is_gone]
        beats = board.beats()  # after the processes: who has ended in order has said so before
        silent, verdict = watch.look(beats), board.verdict()
        ended = [rank for rank in gone if beats[rank] < DONE]
        if verdict is None and (ended or silent):
            how = f"was lost: {ENDED if ended else NO_SIGN}"
            verdict = board.conclude(Verdict(tuple(ended or silent), how))
            for rank in self._others.keys() & set(silent):
                self._others[rank].kill()
        if verdict is not None and self._must_end(verdict):
            names = [str(board.who(rank) or f"worker {rank}") for rank in verdict.ranks]
            what = "; ".join(f"{name} {verdict.how}" for name in names)
            self._end(f"{what}; {self.advice}" if self._speaks(verdict.ranks) else "")
        for rank, beat in enumerate(beats):
            if beat and rank not in (self.rank, *self._others) and (who := board.who(rank)):
                self._others[rank] = who

    def _must_end(self, verdict: Verdict) -> bool:
        """Whether to end now; bad input is left to this worker to find itself, for a while."""
        self._patience -= 1
        return not (verdict.bad_input and self._patience > 0)

    def _speaks(self, lost: Sequence[int]) -> bool:
        """Whether this worker prints the message: the lowest rank left on its machine does."""
        near = [r for r, who in self._others.items() if who.host == self._who.host]
        return all(rank > self.rank for rank in near if rank not in lost)

    def _check_store(self) -> None:
        """Checks that the store still answers; runs in a thread of its own."""
        last, same = 0, 0
        while not self._ended.wait(PERIOD_S):
            same = same + 1 if self._num_looks == last else 0
            last = self._num_looks
            if last and same > SILENT_LOOKS and not self._is_watched:
                where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                self._end(
                    f"worker {self.rank} ({self._who.host}): the meeting point of the workers, "
                    f"{where}, does not answer: {NO_SIGN}; {self.advice}"
                )


def verdict_on(rank: int, error: BaseException | None) -> Verdict | None:
    """The verdict that the others need of how this worker ended; None where they need none."""
    if isinstance(error, SystemExit):
        if error.code in (None, 0):
            return None
        error = error.__context__ or error
    if error is None or isinstance(error, NeighbourLost | FailedRequests):
        return None
    first = next(iter(str(error).strip().splitlines()), "")
    kind = "" if isinstance(error, LlmpqError) else f"{type(error).__name__}: "
    how = f"failed: {kind}{first}"[:MOST_CHARACTERS]
    return Verdict((rank,), how, isinstance(error, UserError), is_device_lost(error))


def is_device_lost(error: BaseException) -> bool:
    """Whether an error means that the device is broken, not the program."""
    kind = getattr(torch, "AcceleratorError", None)
    return kind is not None and isinstance(error, kind)
