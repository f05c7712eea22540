"""Communication between stages: tensors of known size, point to point, never pickled objects.

`Transport` is the interface. `DistributedTransport` uses torch.distributed (gloo on CPUs, NCCL
between cards of one process each, gloo through main memory where processes share a card);
`LocalTransport` connects stages that are threads of one process, for tests and evaluation.

A job arrives as a header of fixed size (`runtime.jobs`), then its hidden states as one byte buffer:
16 bytes (a number, the data type) and the states, whose size the header gives.
"""

import os
import queue
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from llmpq.errors import NeighbourLost, WorkerError

HEADER_BYTES = 16  # the micro-batch and the index of the data type in DTYPES, as 64-bit integers
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TIMEOUT = timedelta(days=1)  # loading may take hours; that a worker is lost, its monitor sees


class Pending(Protocol):
    """A transfer in flight."""

    def wait(self) -> object:
        """Returns when the tensor has been sent or filled."""


class Transport(Protocol):
    """Connects the stages 0 .. size-1. `message_device` is the device that sends hidden states.

    Where several workers share a stage, its first one sends and receives; all of them take part in
    `broadcast` and `gather`.
    """

    rank: int
    size: int
    message_device: torch.device

    def send_header(self, tensor: torch.Tensor) -> Pending:
        """Sends a header to the next stage, from main memory."""

    def receive_header(self, tensor: torch.Tensor) -> Pending:
        """Receives a header from the stage before into `tensor`."""

    def send_hidden(self, tensor: torch.Tensor) -> Pending:
        """Sends hidden states to the next stage."""

    def receive_hidden(self, tensor: torch.Tensor) -> Pending:
        """Receives hidden states from the stage before into `tensor`."""

    def send_tokens(self, tensor: torch.Tensor) -> Pending:
        """Sends chosen tokens to the first stage."""

    def receive_tokens(self, tensor: torch.Tensor) -> Pending:
        """Receives chosen tokens from the last stage into `tensor`."""

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Copies the first stage's values into every stage's tensor."""

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Returns every stage's tensor, on every worker."""


def pack(index: int, hidden: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Writes header and states into a byte buffer that may be longer.

    From a card to main memory this does not wait; an event recorded now tells when it has happened.
    """
    payload = hidden.contiguous().view(torch.uint8).flatten()
    header = torch.tensor([index, DTYPES.index(hidden.dtype)])
    header = header.view(torch.uint8)
    header = header.pin_memory() if buffer.is_cuda else header
    buffer[:HEADER_BYTES].copy_(header, non_blocking=True)
    buffer[HEADER_BYTES : HEADER_BYTES + payload.numel()].copy_(payload, non_blocking=True)
    return buffer


def unpack(buffer: torch.Tensor, dtype: torch.dtype) -> int:
    """The number of a message; its states must be of `dtype`."""
    index, kind = buffer[:HEADER_BYTES].view(torch.int64).tolist()
    if DTYPES[kind] != dtype:
        raise WorkerError(
            f"a neighbouring worker sends {DTYPES[kind]}, this one computes in {dtype}"
        )
    return int(index)


def payload(buffer: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The states in a message, as a view of its buffer."""
    count = 1
    for size in shape:
        count *= size
    num_bytes = count * dtype.itemsize
    return buffer[HEADER_BYTES : HEADER_BYTES + num_bytes].view(dtype).view(shape)


def message_bytes(num_values: int, dtype: torch.dtype) -> int:
    """Bytes of a message that carries so many values."""
    return HEADER_BYTES + num_values * dtype.itemsize


class DistributedTransport:
    """Connects processes by torch.distributed; `stages` holds the ranks of each stage's workers."""

    def __init__(
        self, backend: str, device: torch.device, stages: Sequence[Sequence[int]] | None = None
    ) -> None:
        worker = dist.get_rank()
        stages = stages or [[rank] for rank in range(dist.get_world_size())]
        self._firsts = [ranks[0] for ranks in stages]
        self.rank = next(stage for stage, ranks in enumerate(stages) if worker in ranks)
        self.size = len(stages)
        self.message_device = device if backend == "nccl" else torch.device("cpu")
        self._hidden = dist.new_group(backend=backend, timeout=TIMEOUT)
        self._control = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def send_header(self, tensor: torch.Tensor) -> Pending:
        """Sends a header to the next stage."""
        return _start(dist.isend, tensor, self._firsts[self.rank + 1], self._control)

    def receive_header(self, tensor: torch.Tensor) -> Pending:
        """Receives a header from the stage before into `tensor`."""
        return _start(dist.irecv, tensor, self._firsts[self.rank - 1], self._control)

    def send_hidden(self, tensor: torch.Tensor) -> Pending:
        """Sends hidden states to the next stage."""
        return _start(dist.isend, tensor, self._firsts[self.rank + 1], self._hidden)

    def receive_hidden(self, tensor: torch.Tensor) -> Pending:
        """Receives hidden states from the stage before into `tensor`."""
        return _start(dist.irecv, tensor, self._firsts[self.rank - 1], self._hidden)

    def send_tokens(self, tensor: torch.Tensor) -> Pending:
        """Sends chosen tokens to the first stage."""
        return _start(dist.isend, tensor, self._firsts[0], self._control)

    def receive_tokens(self, tensor: torch.Tensor) -> Pending:
        """Receives chosen tokens from the last stage into `tensor`."""
        return _start(dist.irecv, tensor, self._firsts[-1], self._control)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Copies the first stage's values into every stage's tensor."""
        _checked(lambda: dist.broadcast(tensor, self._firsts[0], group=self._control))

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Returns every stage's tensor."""
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        _checked(lambda: dist.all_gather(gathered, tensor, group=self._control))
        return [gathered[rank] for rank in self._firsts]


class LocalTransport:
    """Connects stages that are threads of this process."""

    message_device = torch.device("cpu")

    def __init__(self, rank: int, hub: "LocalHub", shard: int = 0) -> None:
        self.rank, self.size, self._hub = rank, hub.size, hub
        self._worker = sum(hub.shards[:rank]) + shard

    def send_header(self, tensor: torch.Tensor) -> Pending:
        """Sends a header to the next stage."""
        return _QueuedSend(self._hub.headers[self.rank + 1], tensor)

    def receive_header(self, tensor: torch.Tensor) -> Pending:
        """Receives a header from the stage before into `tensor`."""
        return _QueuedReceive(self._hub.headers[self.rank], tensor)

    def send_hidden(self, tensor: torch.Tensor) -> Pending:
        """Sends hidden states to the next stage."""
        return _QueuedSend(self._hub.hidden[self.rank + 1], tensor)

    def receive_hidden(self, tensor: torch.Tensor) -> Pending:
        """Receives hidden states from the stage before into `tensor`."""
        return _QueuedReceive(self._hub.hidden[self.rank], tensor)

    def send_tokens(self, tensor: torch.Tensor) -> Pending:
        """Sends chosen tokens to the first stage."""
        return _QueuedSend(self._hub.tokens, tensor)

    def receive_tokens(self, tensor: torch.Tensor) -> Pending:
        """Receives chosen tokens from the last stage into `tensor`."""
        return _QueuedReceive(self._hub.tokens, tensor)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Copies the first stage's values into every stage's tensor."""
        tensor.copy_(self._hub.exchange(self._worker, tensor.clone())[0])

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Returns every stage's tensor."""
        return self._hub.exchange(self._worker, tensor.clone())


class ThreadExchange:
    """Exchanges tensors between `size` threads of this process; messages call them `name`."""

    def __init__(self, size: int, name: str) -> None:
        self.size, self._name = size, name
        self._tensors: list[torch.Tensor] = [torch.empty(0)] * size
        self._barrier = threading.Barrier(size)

    def exchange(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all threads, once all have called this; none may be written to."""
        self._tensors[rank] = tensor
        try:
            self._barrier.wait(timeout=TIMEOUT.total_seconds())
            everyone = list(self._tensors)
            self._barrier.wait(timeout=TIMEOUT.total_seconds())
        except threading.BrokenBarrierError:
            raise WorkerError(f"{self._name} {rank}: another {self._name} has stopped") from None
        return everyone

    def abort(self) -> None:
        """Wakes all threads that wait, after one has failed."""
        self._barrier.abort()


class LocalHub:
    """The state that the threads of a `LocalTransport` share; `shards`: workers of each stage."""

    def __init__(self, size: int, shards: Sequence[int] | None = None) -> None:
        self.size = size
        self.shards = list(shards or [1] * size)
        self.headers = [_Channel() for _ in range(size)]
        self.hidden = [_Channel() for _ in range(size)]
        self.tokens = _Channel()
        self._workers = ThreadExchange(sum(self.shards), "worker")

    def exchange(self, worker: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensor of every stage's first worker, once all workers have called this."""
        everyone = self._workers.exchange(worker, tensor)
        return [everyone[sum(self.shards[:stage])] for stage in range(self.size)]

    def abort(self) -> None:
        """Wakes all threads that wait, after a stage has failed."""
        self._workers.abort()
        for channel in (*self.headers, *self.hidden, self.tokens):
            channel.put(None)


class _Channel(queue.SimpleQueue[torch.Tensor | None]):
    """A queue of tensors; None means that the other end has failed."""


class _QueuedSend:
    def __init__(self, channel: Any, tensor: torch.Tensor) -> None:
        channel.put(tensor.clone())

    def wait(self) -> None:
        return None


class _QueuedReceive:
    def __init__(self, channel: Any, tensor: torch.Tensor) -> None:
        self._channel, self._tensor = channel, tensor

    def wait(self) -> None:
        received = self._channel.get()
        if received is None:
            raise WorkerError("another stage has stopped")
        self._tensor.copy_(received)


class _Checked:
    """A torch.distributed transfer whose failure names what happened."""

    def __init__(self, work: Any, tensor: torch.Tensor) -> None:
        self._work, self._tensor = work, tensor  # the tensor must live until the end

    def wait(self) -> None:
        _checked(self._work.wait)


def _start(transfer: Callable[..., Any], tensor: torch.Tensor, peer: int, group: Any) -> Pending:
    return _Checked(_checked(lambda: transfer(tensor, peer, group=group)), tensor)


def _checked(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except RuntimeError as error:
        rank = dist.get_rank() if dist.is_initialized() else os.environ.get("RANK", "?")
        reason = str(error).splitlines()[0]
        raise NeighbourLost(f"rank {rank}: a neighbouring worker was lost ({reason})") from None
