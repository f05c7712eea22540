"""Notices within seconds that a worker is gone, and says which one and why.

Each worker beats once a second on a board, the key-value store of torch.distributed, and looks at
the beats of the others. Who stops beating is lost, and the others end: a main thread that waits
for a message of the lost one would wait for ever. Workers with a parent that started them only
beat; the parent looks.
A worker that fails writes the cause on the board before it ends, so that all name the same.

Time is counted in looks and not in seconds: a process that was itself stopped for an hour has not
looked, and finds nobody guilty. Store operations may hang (a machine that is gone closes no
connection), so each monitor has two threads: one speaks with the store, the other sees that it
still does.

The store asks nobody for a password. What it holds is checked when it is read (`_read`), and what
is not as a worker writes it counts as not there; names are shortened and have no line feeds. Nobody
is kept from saying in due form that a run is lost.
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

PERIOD_S = 1.0  # between two beats, and between two looks
SILENT_LOOKS = 5  # so many without a new beat: lost
START_LOOKS = 300  # so many without a first beat
DONE = 1 << 40  # added to the beats of a worker that has ended in order
LOOK_S = 1.0  # at most, for a look out of turn
ENDED = "its process has ended"
NO_SIGN = f"no sign of life for {(SILENT_LOOKS + 1) * PERIOD_S:.0f} s"  # beats lie before looks


MOST_BYTES, MOST_CHARACTERS = 1 << 16, 1000  # of what a worker tells, and of a text in it

T = TypeVar("T")
Told = Annotated[str, AfterValidator(lambda text: plain_line(text[:MOST_CHARACTERS]))]


@dataclass(frozen=True)
class Who:
    """A worker's process, as it tells the others."""

    rank: NonNegativeInt
    name: Told
    host: Told
    pid: PositiveInt
    machine: Told = ""  # where process ids mean the same
    started: NonNegativeInt = 0  # tells the process from a later one of the same id

    def __str__(self) -> str:
        return f"worker {self.rank} ({self.name}, host {self.host}, pid {self.pid})"

    @classmethod
    def here(cls, rank: int, name: str) -> Self:
        """This process."""
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
        """By its own environment: whoever writes to the store could name any process."""
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
    """Who of the workers is to blame that the run ends, and how they ended.

    `bad_input`: the others will find it too. `device_lost`: a device no longer works.
    """

    ranks: tuple[NonNegativeInt, ...]
    how: Told
    bad_input: bool = False
    device_lost: bool = False


WHO, VERDICT = TypeAdapter(Who), TypeAdapter(Verdict)


def process_state(pid: int) -> tuple[str, int]:
    """The state's letter and the start time of a process here; ("", 0) where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[19])


def _machine() -> str:
    """The same for processes that see each other's ids; empty where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class Board:
    """What workers tell each other through a store; every thread needs a board of its own."""

    def __init__(self, store: dist.Store, size: int) -> None:
        self._store, self.size = store, size

    def join(self, who: Who) -> None:
        """Says who a worker is, with its first beat."""
        self._store.set(f"who/{who.rank}", json.dumps(asdict(who)))
        self.beat(who.rank)

    def beat(self, rank: int) -> None:
        """A sign of life."""
        self._store.add(f"beat/{rank}", 1)

    def done(self, rank: int) -> None:
        """The last sign of life: nobody needs to look any more."""
        self._store.add(f"beat/{rank}", DONE)

    def beats(self) -> list[int]:
        """Of every worker; 0 where there was none yet."""
        return [self._store.add(f"beat/{rank}", 0) for rank in range(self.size)]

    def conclude(self, verdict: Verdict) -> Verdict:
        """Says why the run ends; the first verdict, which is returned, stays."""
        self._store.compare_set("verdict", "", json.dumps(asdict(verdict)))
        return self.verdict() or verdict

    def verdict(self) -> Verdict | None:
        """The first one."""
        found = self._read("verdict", VERDICT)
        return found if found and found.ranks and max(found.ranks) < self.size else None

    def who(self, rank: int) -> Who | None:
        """None before it has joined."""
        found = self._read(f"who/{rank}", WHO)
        return found if found and found.rank == rank else None

    def _read(self, key: str, kind: TypeAdapter[T]) -> T | None:
        """What is there; None where nothing is, or something else."""
        if not self._store.check([key]):
            return None
        text = self._store.get(key)
        with suppress(ValueError):
            return kind.validate_json(text, strict=True) if len(text) <= MOST_BYTES else None
        return None


def open_board(size: int, store: dist.Store | None = None) -> Board:
    """A board on the store that is given, or with a connection of its own."""
    return Board(open_store("board", size, store), size)


def open_store(name: str, size: int, store: dist.Store | None = None) -> dist.Store:
    """The part `name` of the store that torchrun, the parent or rank 0 keeps, once it is there.

    torchrun keeps its store when it starts workers again: what earlier ones wrote is left aside.
    """
    prefix = f"llmpq/{name}/{restarts()}/{size}"
    return dist.PrefixStore(prefix, store or _connected())


def _connected() -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(hours=1)
    return dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


def restarts() -> int:
    """How often torchrun has started the workers again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


class HeartbeatTracker:
    """Decides who is lost from looks at the beats, one look a period."""

    def __init__(self, size: int) -> None:
        self._last = [0] * size
        self._same = [0] * size

    def look(self, beats: Sequence[int]) -> list[int]:
        """The ranks that are lost by now; those that are done never are."""
        for rank, beat in enumerate(beats):
            same = beat == self._last[rank] and beat < DONE
            self._same[rank] = self._same[rank] + 1 if same else 0
            self._last[rank] = beat
        limits = [SILENT_LOOKS if beat else START_LOOKS for beat in beats]
        return [rank for rank, limit in enumerate(limits) if self._same[rank] >= limit]


class Monitor:
    """Around a worker's work: beats, looks, and ends this process when another one is lost.

        with Monitor(rank, size, "t4-16g on node0"):
            work()

    An error that leaves the block is told to the others. `advice`: what to do after a loss.
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
        self._who = Who.here(rank, name)
        self._open, self._end = open_board, end
        self._is_watched = SUPERVISED in os.environ  # by the parent
        self._left, self._hurry = threading.Event(), threading.Event()
        self._last_words: Callable[[Board], object] = lambda board: board.done(rank)
        self._num_looks = 0
        self._patience = SILENT_LOOKS
        self._others: dict[int, Who] = {}
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._speak, self._guard)
        ]

    def __enter__(self) -> Self:
        if self.size > 1:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.size == 1:
            return
        if isinstance(error, NeighbourLost):
            self._wait_for_verdict()
        verdict = verdict_on(self.rank, error)
        if verdict is not None:
            self._last_words = lambda board: board.conclude(verdict)
        self._left.set()
        self._hurry.set()
        for thread in self._threads:
            thread.join(2 * PERIOD_S)

    def rename(self, name: str) -> None:
        """Tells the others what this worker is, once that is known better than at the start."""
        self._who = replace(self._who, name=name)

    def look_now(self) -> None:
        """Ends this process if another worker is to blame for something; else returns soon."""
        self._patience = 0
        before, end = self._num_looks, time.monotonic() + LOOK_S
        while self._num_looks < before + 2 and time.monotonic() < end:  # one may be under way
            self._hurry.set()
            time.sleep(0.01)

    def wait_for_others(self, seconds: float) -> None:
        """Returns when the others on this machine have ended, or after so many seconds.

        For a worker whose exit code makes torchrun end those that are still there.
        """
        end = time.monotonic() + seconds
        while any(who.is_there for who in self._others.values()) and time.monotonic() < end:
            time.sleep(0.05)

    def _wait_for_verdict(self) -> None:
        """A neighbour's connection is closed: who it was is known in a moment, and ends this."""
        if not self._is_watched:
            time.sleep((SILENT_LOOKS + 2) * PERIOD_S)

    def _speak(self) -> None:
        """The thread that uses the store."""
        try:
            board = self._open(self.size)
            told = self._who
            board.join(told)
            watch, self._num_looks = HeartbeatTracker(self.size), 1
            while not self._left.is_set():
                if self._who is not told:
                    told = self._who
                    board.join(told)
                board.beat(self.rank)
                if not self._is_watched:
                    self._look(board, watch)
                self._num_looks += 1
                self._hurry.wait(PERIOD_S)
                self._hurry.clear()
            self._last_words(board)
        except RuntimeError:  # the store has closed; `_guard` gives this process time to end
            if self._is_watched:
                self._end("")

    def _look(self, board: Board, watch: HeartbeatTracker) -> None:
        """Ends this process where another one is to blame for something."""
        gone = [rank for rank, who in self._others.items() if who.is_gone]
        beats = board.beats()  # after the processes: who has ended in order has said so before
        silent, verdict = watch.look(beats), board.verdict()
        ended = [rank for rank in gone if beats[rank] < DONE]
        if verdict is None and (ended or silent):
            how = f"was lost: {ENDED if ended else NO_SIGN}"
            verdict = board.conclude(Verdict(tuple(ended or silent), how))
            self._kill(silent)
        if verdict is not None and self._must_end(verdict):
            names = [str(board.who(rank) or f"worker {rank}") for rank in verdict.ranks]
            what = "; ".join(f"{name} {verdict.how}" for name in names)
            self._end(f"{what}; {self.advice}" if self._speaks(verdict.ranks) else "")
        for rank, beat in enumerate(beats):
            if beat and rank not in (self.rank, *self._others) and (who := board.who(rank)):
                self._others[rank] = who

    def _kill(self, ranks: Sequence[int]) -> None:
        for rank in self._others.keys() & set(ranks):
            self._others[rank].kill()

    def _must_end(self, verdict: Verdict) -> bool:
        """Bad input is left to this worker to find, for a while."""
        self._patience -= 1
        return not (verdict.bad_input and self._patience > 0)

    def _speaks(self, lost: Sequence[int]) -> bool:
        """The lowest rank that is left on a machine speaks for all of it."""
        near = [r for r, who in self._others.items() if who.host == self._who.host]
        return all(rank > self.rank for rank in near if rank not in lost)

    def _guard(self) -> None:
        """The thread that sees that the store still answers."""
        last, same = 0, 0
        while not self._left.wait(PERIOD_S):
            same = same + 1 if self._num_looks == last else 0
            last = self._num_looks
            if last and same > SILENT_LOOKS and not self._is_watched:
                where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                self._end(
                    f"worker {self.rank} ({self._who.host}): the meeting point of the workers, "
                    f"{where}, does not answer: {NO_SIGN}; {self.advice}"
                )


def verdict_on(rank: int, error: BaseException | None) -> Verdict | None:
    """What the others should know of how this worker ended; None: nothing."""
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
    """Whether an error means that the card, not the program, is broken."""
    kind = getattr(torch, "AcceleratorError", None)
    return kind is not None and isinstance(error, kind)
