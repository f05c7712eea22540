"""What one stage sends and receives in a run: jobs with hidden states, and the chosen tokens.

Messages travel in threads of their own (`Inbox`, `Outbox`). On a card each direction has its own
CUDA stream, so that no job holds a message back. A result that is sent may still be on its way from
the card to main memory: `Result.wait` returns when it is complete.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch

from llmpq.job import Job
from llmpq.models.stage_model import StageModel
from llmpq.runtime.jobs import END, Headers, shape
from llmpq.runtime.rehearsal import MessageMeter
from llmpq.runtime.transport import Pending, Transport, message_bytes, pack, unpack

Message = tuple[Job, list[int], torch.Tensor]  # a job, milliseconds of the stages before, a buffer


@dataclass(frozen=True)
class Result:
    """The result of a job: a message to send, or tokens in main memory or on the way there.

    `copied` is recorded when the tensor is complete, None where it is complete at once. `rows`
    selects the rows that belong to members of the job; None selects all.
    """

    tensor: torch.Tensor
    copied: "torch.cuda.Event | None" = None
    rows: Sequence[int] | None = None

    @property
    def is_here(self) -> bool:
        """Whether the tensor can be read without waiting."""
        return self.copied is None or self.copied.query()

    def wait(self) -> torch.Tensor:
        """The complete tensor."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensor if self.rows is None else self.tensor[list(self.rows)]


@dataclass
class StageMessages:
    """Packs, sends and receives the messages of one stage.

    Shapes: b rows of the micro-batch, S tokens of each, H hidden size.
    """

    stage: StageModel
    transport: Transport
    meter: MessageMeter
    headers: Headers
    _sends: deque[tuple[bool, tuple[Pending, ...]]] = field(default_factory=deque)

    @property
    def is_first(self) -> bool:
        """Whether this stage embeds tokens."""
        return self.transport.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage chooses tokens."""
        return self.transport.rank == self.transport.size - 1

    def token_message_size(self) -> int:
        """Numbers in a message of tokens: their count, the tokens, each stage's milliseconds."""
        return 1 + self.headers.rows + self.headers.num_stages

    def receive(self) -> Message | None:
        """The next job and its states; None at the end. Runs in the inbox's thread."""
        self._use_device()
        header = self.headers.empty()
        self.transport.receive_header(header).wait()
        read = self.headers.read(header)
        if read is None:
            return None
        rows, tokens = shape(read[0])
        with _on_stream(self._receiving):
            buffer = self._buffer(rows * tokens * self.stage.config.hidden_size)
            self.meter.count(buffer)
            self.transport.receive_hidden(buffer).wait()
            if buffer.is_cuda:  # NCCL's wait holds back the stream, not this thread
                torch.cuda.current_stream(buffer.device).synchronize()
                buffer.record_stream(torch.cuda.default_stream(buffer.device))
            unpack(buffer, self.stage.dtype)
        return *read, buffer

    def wait_for(self, result: Result) -> torch.Tensor:
        """The complete tensor of a result. Runs in the outbox's thread."""
        self._use_device()
        return result.wait()

    def send(self, job: Job, tensor: torch.Tensor, busy_ms: list[int], num_lanes: int) -> None:
        """Sends states to the next stage, or tokens from the last stage to the first."""
        if self.is_last:
            pending = [self.transport.send_tokens(self._token_message(tensor, busy_ms))]
        else:
            header = self.headers.write(job, busy_ms)
            pending = [self.transport.send_header(header)]
            with _on_stream(self._sending):
                self.meter.count(tensor)
                pending.append(self.transport.send_hidden(tensor))
        # Messages are kept until they must have arrived: no more of either phase are under way.
        self._sends.append((job.prefill, tuple(pending)))
        most = self.headers.num_stages + 1 if job.prefill else num_lanes
        while sum(prefill == job.prefill for prefill, _ in self._sends) > most:
            self._wait_for_oldest()

    def send_end(self) -> None:
        """Tells the next stage, or the first one, that nothing follows; waits for all messages."""
        if not self.is_last:
            self.transport.send_header(self.headers.empty()).wait()
        elif not self.is_first:
            message = torch.full((self.token_message_size(),), END, dtype=torch.int32)
            self.transport.send_tokens(message).wait()
        while self._sends:
            self._wait_for_oldest()

    def states_result(self, states: torch.Tensor) -> Result:
        """A copy of `[b, S, H]` in a message, as the next job may overwrite the states."""
        buffer = self._buffer(states.numel())
        return Result(pack(0, states, buffer), self._recorded())

    def tokens_result(self, job: Job, chosen: torch.Tensor) -> Result:
        """The members' tokens of a job, in main memory; empty where the job chooses none."""
        rows = None if job.prefill else [member.row for member in job.members]
        if not chosen.is_cuda:
            return Result(chosen if rows is None else chosen[rows])
        here = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
        return Result(here.copy_(chosen, non_blocking=True), self._recorded(), rows)

    def _use_device(self) -> None:
        """Selects this stage's card: a new thread would take memory on the first one."""
        if self.stage.device.type == "cuda":
            torch.cuda.set_device(self.stage.device)

    @cached_property
    def _sending(self) -> "torch.cuda.Stream | None":
        return self._message_stream()

    @cached_property
    def _receiving(self) -> "torch.cuda.Stream | None":
        return self._message_stream()

    def _message_stream(self) -> "torch.cuda.Stream | None":
        """A stream, made once for each direction: torch has 32 in all, and a capture needs one."""
        device = self.transport.message_device
        return torch.cuda.Stream(device) if device.type == "cuda" else None

    def _buffer(self, num_values: int) -> torch.Tensor:
        """Allocates a message's buffer; it is pinned for copies from a card to main memory."""
        device = self.transport.message_device
        num_bytes = message_bytes(num_values, self.stage.dtype)
        pinned = self.stage.device.type == "cuda" and device.type == "cpu"
        return torch.empty(num_bytes, dtype=torch.uint8, device=device, pin_memory=pinned)

    def _recorded(self) -> "torch.cuda.Event | None":
        """An event after all that this stage's card has been given so far."""
        if self.stage.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.stage.device))
        return event

    def _token_message(self, tokens: torch.Tensor, busy_ms: list[int]) -> torch.Tensor:
        message = torch.zeros(self.token_message_size(), dtype=torch.int32)
        message[0] = len(tokens)
        message[1 : 1 + len(tokens)] = tokens
        message[-self.headers.num_stages :] = torch.tensor(busy_ms)
        return message

    def _wait_for_oldest(self) -> None:
        for pending in self._sends.popleft()[1]:
            pending.wait()


def _on_stream(stream: "torch.cuda.Stream | None") -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
