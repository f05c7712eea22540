"""The rank, device and data type of a worker process, and how workers connect to each other.

Under torchrun all of these come from the environment. `start_workers` replaces torchrun on one
machine: it starts one process for each worker, on the loopback interface only. It keeps the store
through which workers meet, so that it knows their state, whichever of them ends.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from llmpq.errors import FailedRequests, InfeasibleError, NeighbourLost, UserError, WorkerError
from llmpq.models.sharding import ShardGroup
from llmpq.reliability.ending import RESUME, SHOW_CURSOR, SUPERVISED, Ended, interruptible
from llmpq.reliability.monitor import (
    NO_SIGN,
    PERIOD_S,
    Board,
    HeartbeatTracker,
    Verdict,
    open_board,
    open_store,
    process_state,
)
from llmpq.runtime.interface import name_interface
from llmpq.runtime.shard_group import distributed_shard_group
from llmpq.runtime.transport import (
    TIMEOUT,
    DistributedTransport,
    LocalHub,
    LocalTransport,
    Transport,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NO_CUDA = "--device cuda: torch sees no CUDA device here; use --device cpu"
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # torchrun keeps the store; else rank 0 does
LAUNCHER = (
    "the environment says that a launcher started this worker, but what torchrun sets is missing "
    "or invalid; start with torchrun, or unset RANK and WORLD_SIZE"
)
# How long the others may go on when one worker has ended: long enough to say why themselves, or,
# after a signal, long enough to see which others were ended by a signal too.
GRACE_S, KILLED_GRACE_S = 3.0, 0.3


@dataclass(frozen=True)
class Role:
    """The rank of this process among all workers, and among those of its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def role_from_environment(variables: Mapping[str, str] = os.environ) -> Role | None:
    """The role that torchrun (or `start_workers`) set in these variables; None outside of it.

    Raises `UserError` for values that no launcher sets.
    """
    if "RANK" not in variables or "WORLD_SIZE" not in variables:
        return None
    rank, size = _number(variables, "RANK"), _number(variables, "WORLD_SIZE", least=1)
    role = Role(
        rank,
        size,
        _number(variables, "LOCAL_RANK", other=rank),
        _number(variables, "LOCAL_WORLD_SIZE", least=1, other=size),
    )
    _number(variables, "TORCHELASTIC_RESTART_COUNT", other=0)
    if role.rank >= role.size or role.local_rank >= role.local_size:
        raise UserError(
            f"RANK={role.rank} of WORLD_SIZE={role.size}, LOCAL_RANK={role.local_rank} of "
            f"LOCAL_WORLD_SIZE={role.local_size}: {LAUNCHER}"
        )
    return role


def check_meeting_point(variables: Mapping[str, str] = os.environ) -> None:
    """Raises `UserError` where the launcher does not set MASTER_ADDR and MASTER_PORT."""
    _number(variables, "MASTER_PORT", least=1)
    if not variables.get("MASTER_ADDR"):
        raise UserError(f"MASTER_ADDR is not set: {LAUNCHER}")


def _number(
    variables: Mapping[str, str], name: str, least: int = 0, other: int | None = None
) -> int:
    """The number in a variable; `other` where it is not set."""
    text = variables.get(name)
    if text is None and other is not None:
        return other
    if text is None or not (text.isascii() and text.isdecimal() and int(text) >= least):
        found = "is not set" if text is None else f"is {text!r}, expected a number from {least}"
        raise UserError(f"{name} {found}: {LAUNCHER}")
    return int(text)


def card_device(index: int) -> torch.device:
    """The card with this index, made the current card of this process."""
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def choose_device(name: str, role: Role) -> torch.device:
    """The device of a process: `auto` takes a card where there is one; cards are shared in turn."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(NO_CUDA)
    return card_device(role.local_rank % torch.cuda.device_count())


def choose_dtype(
    name: str, device: torch.device, transport: Transport | None = None
) -> torch.dtype:
    """The data type: `auto` is bfloat16 where every worker's device has it, else float16."""
    if name != "auto":
        return DTYPES[name]
    old_card = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    mine = torch.tensor([0 if old_card else 1])
    everyone = transport.gather(mine) if transport is not None else [mine]
    return torch.bfloat16 if all(bool(one) for one in everyone) else torch.float16


def join(role: Role) -> None:
    """Connects to the other workers of the launch, where that has not happened yet.

    Raises `NeighbourLost` where they cannot be reached.
    """
    if dist.is_initialized():
        return
    name_interface(os.environ, role.size == role.local_size)
    with _reaching(role):
        is_kept = SUPERVISED in os.environ or os.environ.get(AGENT_STORE) == str(True)
        store = open_store("group", role.size) if is_kept else None
        dist.init_process_group("gloo", None, TIMEOUT, role.size, role.rank, store)


@contextmanager
def _reaching(role: Role) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        message = f"rank {role.rank}: could not reach the other workers: {reason}"
        raise NeighbourLost(message) from None


def connect(
    role: Role, device: torch.device, stages: Sequence[Sequence[int]] | None = None
) -> tuple[Transport, ShardGroup | None]:
    """The transport between stages, and the group of the workers that share this one's stage.

    NCCL is used only where every worker has its own card. `stages` holds the ranks of each stage's
    workers; None means one worker a stage. The group is None where a stage has one worker.
    """
    if role.size == 1:
        return LocalTransport(0, LocalHub(1)), None
    own_card = device.type == "cuda" and role.local_size <= torch.cuda.device_count()
    everyone = all_gather(torch.tensor([int(own_card)]), role)
    with _reaching(role):
        backend = "nccl" if all(map(bool, everyone)) else "gloo"
        group = distributed_shard_group(stages or [], backend, device)
        return DistributedTransport(backend, device, stages), group


def all_gather(tensor: torch.Tensor, role: Role) -> list[torch.Tensor]:
    """The tensor of every worker, by rank; all have one shape. Joins the workers first.

    Raises `NeighbourLost` where one cannot be reached.
    """
    if role.size == 1:
        return [tensor]
    join(role)
    found = [torch.empty_like(tensor) for _ in range(role.size)]
    with _reaching(role):
        dist.all_gather(found, tensor)
    return found


def disconnect() -> None:
    """Leaves the group of workers."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share_cores(role: Role, device: torch.device) -> None:
    """Workers that compute on the same CPU take an equal part of its threads."""
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // role.local_size))


class LostWorkers(WorkerError, Ended):
    """Workers were ended from outside, hung, or lost their device; `ranks` names them."""

    def __init__(self, what: str, advice: str, ranks: Sequence[int]) -> None:
        super().__init__(f"{what}; {advice}")
        self.what, self.ranks = what, tuple(ranks)


def start_workers(
    arguments: Sequence[str],
    names: Sequence[str],
    module: str,
    advice: str = RESUME,
    environment: Mapping[str, str] = {},
) -> int:
    """Runs `python -m module ARGUMENTS` once for each name, as workers; returns 0 or raises.

    When one worker fails the others are stopped. A worker's own exit code 2, 3 or 5 is kept. A lost
    worker raises `LostWorkers`, Ctrl-C and SIGTERM raise `Interrupted`. `advice` says what the user
    can do then.
    """
    processes = _WorkerProcesses(names, advice)
    with interruptible(advice):
        try:
            for rank in range(len(names)):
                processes.workers.append(_start(processes, rank, arguments, module, environment))
            error = processes.watch()
        except RuntimeError as error:  # torch.distributed reports faults of the store so
            raise WorkerError(f"the workers' rendezvous store failed: {error}; {advice}") from None
        finally:
            processes.stop()
    if error is not None:
        raise error
    return 0


def _start(
    processes: "_WorkerProcesses",
    rank: int,
    arguments: Sequence[str],
    module: str,
    more: Mapping[str, str],
) -> subprocess.Popen[bytes]:
    """Starts one worker, with SIGINT blocked: the parent ends workers when Ctrl-C is pressed."""
    size = str(len(processes.names))
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(processes.store.port),
        SUPERVISED: str(os.getpid()),
        **more,
    }
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Makes the system kill this worker when the process that started it ends in any way."""
    if SUPERVISED not in os.environ or sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(os.environ[SUPERVISED]):  # it ended before the line above
        sys.exit(WorkerError.exit_code)


def _local_store() -> dist.TCPStore:
    """A store that only processes of this machine can reach."""
    listener = socket.create_server(("127.0.0.1", 0))
    port, handle = listener.getsockname()[1], listener.detach()
    return dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=handle
    )


@dataclass
class _WorkerProcesses:
    """The worker processes that this process has started, and their store."""

    names: Sequence[str]
    advice: str
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    store: dist.TCPStore = field(default_factory=_local_store)

    def watch(self) -> Exception | None:
        """Waits until all have ended or the rest must stop; returns the error, or None."""
        board = open_board(len(self.names), self.store)
        watch, next_look, deadline = HeartbeatTracker(len(self.names)), 0.0, float("inf")
        silent: list[int] = []
        while (now := time.monotonic()) < deadline and None in self._codes() and not silent:
            if now >= next_look:
                next_look = max(next_look, now - PERIOD_S) + PERIOD_S
                lost = watch.look(self._beats(board))
                silent = [rank for rank in lost if self.workers[rank].poll() is None]
            deadline = min(deadline, now + _grace_s(self._codes()))
            time.sleep(0.05)
        described = self._described(board)
        return conclusion(self._codes(), silent, board.verdict(), described, self.advice)

    def stop(self) -> None:
        """Kills the workers that still run; results that they have written are safe."""
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.wait()
        if self.workers and sys.stderr.isatty():
            sys.stderr.write(SHOW_CURSOR)

    def _codes(self) -> list[int | None]:
        return [worker.poll() for worker in self.workers]

    def _beats(self, board: Board) -> list[int]:
        """The beats of every worker; -1 for one that was stopped before its first beat."""
        stopped = [process_state(worker.pid)[0] in ("T", "t") for worker in self.workers]
        return [beat or -int(here) for beat, here in zip(board.beats(), stopped, strict=True)]

    def _described(self, board: Board) -> list[str]:
        found = [board.who(rank) for rank in range(len(self.names))]
        names = [f"worker {rank} ({name})" for rank, name in enumerate(self.names)]
        return [str(who or name) for who, name in zip(found, names, strict=True)]


def _grace_s(codes: Sequence[int | None]) -> float:
    """How long to wait for the other workers, given the exit codes so far."""
    if any(code is not None and code < 0 for code in codes):
        return KILLED_GRACE_S
    in_order = (None, 0, FailedRequests.exit_code)
    return GRACE_S if any(code not in in_order for code in codes) else float("inf")


def conclusion(
    codes: Sequence[int | None],
    silent: Sequence[int],
    verdict: Verdict | None,
    workers: Sequence[str],
    advice: str,
) -> Exception | None:
    """The one error for all workers: the user's own fault first, else who was lost or failed.

    `codes` holds exit codes, None for workers that still run; `silent` names those of them that
    hang.
    """
    for code, kind in ((2, UserError), (3, InfeasibleError)):
        if code in codes:
            return kind(f"{workers[codes.index(code)]} stopped, see above")
    ended = {rank: -code for rank, code in enumerate(codes) if code is not None and code < 0}
    if ended:
        names = {rank: signal.Signals(number).name for rank, number in ended.items()}
        what = "; ".join(f"{workers[rank]} was ended by {name}" for rank, name in names.items())
        lost = LostWorkers(what, advice, tuple(ended))
        if set(ended.values()) == {signal.SIGTERM}:  # a machine that must be given back ends so
            lost.exit_code = 128 + signal.SIGTERM
        return lost
    if verdict is not None:
        what = "; ".join(f"{workers[rank]} {verdict.how}" for rank in verdict.ranks)
        if verdict.device_lost:
            return LostWorkers(what, advice, verdict.ranks)
        return WorkerError(f"{what}; {advice}")
    if silent:
        what = "; ".join(f"{workers[rank]} was lost: {NO_SIGN}" for rank in silent)
        return LostWorkers(what, advice, silent)
    # Who ends with 4 has lost a neighbour; the culprit ended otherwise.
    failed = [rank for rank, code in enumerate(codes) if code]
    failed = [rank for rank in failed if codes[rank] != WorkerError.exit_code] or failed
    if not failed:
        return None
    if {codes[rank] for rank in failed} == {FailedRequests.exit_code}:
        return FailedRequests("")  # the worker that leads has said which and why
    return WorkerError(f"{workers[failed[0]]} ended with code {codes[failed[0]]}; {advice}")
