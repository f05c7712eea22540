"""What a worker process is: its rank, its device, its data type, and how workers find each other.

Under torchrun all of it comes from the environment. `start_workers` is the same for one machine
without torchrun: it starts a process a stage, on the loopback interface only.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from llmpq.errors import InfeasibleError, UserError, WorkerError
from llmpq.runtime.transport import (
    TIMEOUT,
    DistributedTransport,
    LocalHub,
    LocalTransport,
    Transport,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SUPERVISED = "LLMPQ_SUPERVISED"  # set for workers whose parent reports how they ended
RESUME = "finished requests are in the output, run again with --resume to do the others"
GRACE_S = 3.0  # how long the others may take to notice that a worker has gone


@dataclass(frozen=True)
class Role:
    """This process among the workers."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def role_from_environment() -> Role | None:
    """What torchrun (or `start_workers`) set, or None outside of it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return Role(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def choose_device(name: str, role: Role) -> torch.device:
    """`auto` takes a CUDA card where there is one; processes share cards in turn."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu")
    device = torch.device("cuda", role.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def choose_dtype(
    name: str, device: torch.device, transport: Transport | None = None
) -> torch.dtype:
    """`auto`: bfloat16 where every worker's device has it, else float16 for all of them."""
    if name != "auto":
        return DTYPES[name]
    old_card = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    mine = torch.tensor([0 if old_card else 1])
    everyone = transport.gather(mine) if transport is not None else [mine]
    return torch.bfloat16 if all(bool(one) for one in everyone) else torch.float16


def connect(role: Role, device: torch.device) -> Transport:
    """Joins the other workers; alone, needs none. NCCL only where every worker has its own card."""
    if role.size == 1:
        return LocalTransport(0, LocalHub(1))
    own_card = device.type == "cuda" and role.local_size <= torch.cuda.device_count()
    try:
        dist.init_process_group("gloo", rank=role.rank, world_size=role.size, timeout=TIMEOUT)
        everyone = [torch.zeros(1, dtype=torch.int64) for _ in range(role.size)]
        dist.all_gather(everyone, torch.tensor([int(own_card)]))
        return DistributedTransport("nccl" if all(map(bool, everyone)) else "gloo", device)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        message = f"rank {role.rank}: could not reach the other workers: {reason}"
        raise WorkerError(message) from None


def disconnect() -> None:
    """Leaves the group of workers."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share_cores(role: Role, device: torch.device) -> None:
    """Workers that compute on the same CPU take an equal part of its threads."""
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // role.local_size))


def start_workers(
    arguments: Sequence[str], names: Sequence[str], module: str, advice: str = RESUME
) -> int:
    """Runs `python -m module ARGUMENTS` once a name, as workers; returns 0 or raises.

    When one worker fails the others are stopped. A worker's own exit code 2, 3 or 4 is kept.
    `advice`: what to do where a worker was lost.
    """
    signal.signal(signal.SIGTERM, _exit_on_signal)
    port = _free_port()
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(len(names)):
            workers.append(_start(rank, len(names), port, arguments, module))
        codes = _wait(workers)
    except BaseException:
        _stop(workers)
        raise
    failed = [rank for rank, code in enumerate(codes) if code != 0]
    if not failed:
        return 0
    raise _failure(codes, names, advice)


def _start(
    rank: int, size: int, port: int, arguments: Sequence[str], module: str
) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": _loopback(),
        SUPERVISED: "1",
    }
    return subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment)


def end_with_parent() -> None:
    """A supervised worker must not outlive the process that started it, however that ends."""
    if SUPERVISED not in os.environ or sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() == 1:  # it ended before the line above
        sys.exit(WorkerError.exit_code)


def _exit_on_signal(number: int, frame: object) -> None:
    """Ends the parent in order, so that its workers end too."""
    sys.exit(128 + number)


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name in ("lo", "lo0")), names[0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes; once one worker has failed the others get a moment, then are stopped."""
    deadline = None
    first_failure: int | None = None
    while any(worker.poll() is None for worker in workers):
        for rank, worker in enumerate(workers):
            if first_failure is None and worker.poll() not in (None, 0):
                first_failure, deadline = rank, time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            _stop(workers)
        time.sleep(0.05)
    return [int(worker.returncode) for worker in workers]


def _stop(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    deadline = time.monotonic() + GRACE_S
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _failure(codes: Sequence[int], names: Sequence[str], advice: str) -> Exception:
    """The error that stands for all workers: what the user did, else what was lost."""
    for code, kind in ((2, UserError), (3, InfeasibleError)):
        if code in codes:
            rank = codes.index(code)
            return kind(f"worker {rank} ({names[rank]}) stopped, see above")
    # Workers that lost a neighbour end with 4 or by our SIGTERM; the culprit ended otherwise.
    culprits = [r for r, code in enumerate(codes) if code not in (0, 4, -signal.SIGTERM)]
    rank = culprits[0] if culprits else next(r for r, code in enumerate(codes) if code != 0)
    code = codes[rank]
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return WorkerError(f"worker {rank} ({names[rank]}) {how}; {advice}")
