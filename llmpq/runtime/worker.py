"""What one stage does with a job: its layers on a micro-batch, then hands the result over.

The first stage embeds tokens; the last chooses tokens, which go back to the first; stages between
pass hidden states on. All stages do all jobs in one order, which the headers of messages tell, so
they need no other control. Messages are received ahead in a thread (`Inbox`) and sent in another
one (`Outbox`), which waits for results, so that the next job is started meanwhile: on a card, jobs
follow each other without the program waiting for it.

Where memory runs out, a micro-batch is cut in halves on the stage where it did, which the others
do not notice, and later ones are cut alike from the start.

Shapes: b rows of the micro-batch, S tokens of each, H hidden size, V vocabulary.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch

from llmpq.job import Job
from llmpq.models.lanes import LaneCache
from llmpq.models.stage_model import StageModel
from llmpq.runtime.inbox import Inbox
from llmpq.runtime.jobs import END, Headers, shape
from llmpq.runtime.outbox import Outbox
from llmpq.runtime.rehearsal import Throttle
from llmpq.runtime.sampler import Draws, Sampling
from llmpq.runtime.steps import DecodeStepRunner, first_tokens, prefill
from llmpq.runtime.stopwatch import Stopwatch
from llmpq.runtime.transport import Pending, Transport, message_bytes, pack, payload, unpack

NO_MEMORY = "can't allocate memory"  # what torch's allocator for main memory says
Message = tuple[Job, list[int], torch.Tensor]


@dataclass(frozen=True)
class Result:
    """What a job gave: a message to send, or tokens in main memory or on the way there.

    `copied`: when it has come, where that is not at once. `rows`: which of its rows are meant.
    """

    tensor: torch.Tensor
    copied: "torch.cuda.Event | None" = None
    rows: Sequence[int] | None = None

    @property
    def is_here(self) -> bool:
        """Reading it does not wait."""
        return self.copied is None or self.copied.query()

    def wait(self) -> torch.Tensor:
        """The tensor, complete."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensor if self.rows is None else self.tensor[list(self.rows)]


@dataclass
class Worker:
    """One stage and all it needs to take part in a run."""

    stage: StageModel
    transport: Transport
    cache: LaneCache
    throttle: Throttle
    sampling: Sampling | Draws
    headers: Headers
    graphs: bool = True
    watch: Stopwatch = field(default_factory=Stopwatch)
    most_rows: dict[bool, int] = field(default_factory=dict)  # by phase, since memory ran out
    _sends: deque[tuple[bool, tuple[Pending, ...]]] = field(default_factory=deque)

    @property
    def is_first(self) -> bool:
        """Embeds tokens."""
        return self.transport.rank == 0

    @property
    def is_last(self) -> bool:
        """Chooses tokens."""
        return self.transport.rank == self.transport.size - 1

    @cached_property
    def steps(self) -> DecodeStepRunner:
        """The decode steps that fill the cache."""
        return DecodeStepRunner(self.stage, self.cache, self.sampling, self.graphs)

    def use_cache(self, cache: LaneCache) -> None:
        """Takes another cache in place of this one."""
        self.cache = cache
        self.__dict__.pop("steps", None)

    def use_sampling(self, sampling: Sampling | Draws) -> None:
        """Chooses tokens otherwise from now on; steps that were captured are captured anew."""
        if self.is_last and sampling is not self.sampling:
            here = sampling.to(self.stage.device) if isinstance(sampling, Draws) else sampling
            self.sampling = here
            self.__dict__.pop("steps", None)

    @torch.inference_mode()
    def assist(self) -> None:
        """A stage's workers after the first: compute what the first shares, hand nothing over."""
        group = self.stage.group
        assert group is not None
        while True:
            header = self.headers.empty()
            with self.watch.idle():
                group.broadcast(header)
            read = self.headers.read(header)
            if read is None:
                return
            job = read[0]
            given = torch.zeros(
                self.given_shape(job), dtype=self.given_kind(), device=self.stage.device
            )
            if not self.is_first:
                with self.watch.idle():
                    group.broadcast(given)
            self.run(job, given)
            self.throttle.settle()

    @torch.inference_mode()
    def follow(self) -> None:
        """Stages after the first: does what messages ask for, until they end."""
        inbox: Inbox[Message] = Inbox(self._receive)
        outbox = Outbox(inbox.fail)
        while True:
            with self.watch.idle():
                message = inbox.get()
            if message is None:
                break
            job, busy_ms, buffer = message
            states = payload(buffer, self.given_shape(job), self.stage.dtype)
            result = self.do(job, states.to(self.stage.device, non_blocking=True))
            self.hand_over(outbox, job, result, [*busy_ms, self.watch.busy_ms])
        self.end(outbox)

    def do(self, job: Job, given: torch.Tensor | None) -> Result:
        """The job's `[b, S, H]`, or on the last stage int32 `[members]` tokens.

        `given`: the `[b, S, H]` that come in; at the first stage ids `[b, S]` of prompts, or `[b]`
        of a step's tokens, which a stage alone needs not be given.
        """
        group = self.stage.group
        if group is not None:
            group.broadcast(self.headers.write(job, []))
            if not self.is_first:
                assert given is not None
                given = given.contiguous()
                group.broadcast(given)
        return self.run(job, given)

    def run(self, job: Job, given: torch.Tensor | None) -> Result:
        """The same without telling others."""
        self.cache.rearrange(job)
        self.steps.rearrange(job)
        tokens = job.end - job.begin - (not job.prefill)

        def note(seconds: float, ago: float) -> None:
            self.watch.busy(job.prefill, job.rows, tokens, seconds, ago)

        result = self.throttle.run(lambda: self.compute(job, given), note)
        return self._tokens(job, result) if self.is_last else self._message(result)

    def hand_over(self, outbox: Outbox, job: Job, result: Result, busy_ms: list[int]) -> None:
        """To the next stage, or from the last to the first, as soon as the result is there."""

        def send() -> None:
            self._be_on_device()
            tensor = result.wait()
            with self.watch.communicating():
                if self.is_last:
                    pending = [self.transport.send_tokens(self._answer(tensor, busy_ms))]
                else:
                    header = self.headers.write(job, busy_ms)
                    pending = [self.transport.send_header(header)]
                    with _on_stream(self._sending):
                        pending.append(self.transport.send_hidden(tensor))
                self._sent(job, *pending)

        outbox.put(send)

    def end(self, outbox: Outbox | None) -> None:
        """Tells the next stage that nothing follows; waits until all is sent."""
        self.throttle.settle()
        with self.watch.idle():
            if self.stage.group is not None:
                self.stage.group.broadcast(self.headers.empty())
            if outbox is not None:
                outbox.put(self._send_end)
                outbox.close()

    def _send_end(self) -> None:
        if not self.is_last:
            self.transport.send_header(self.headers.empty()).wait()
        elif not self.is_first:
            answer = torch.full((self.answer_size(),), END, dtype=torch.int32)
            self.transport.send_tokens(answer).wait()
        while self._sends:
            self._wait_for_oldest()

    def answer_size(self) -> int:
        """Numbers of a message of tokens: how many, they, and every stage's milliseconds."""
        return 1 + self.headers.rows + self.headers.num_stages

    # ---- messages

    def _receive(self) -> Message | None:
        """The next job and its states, in the inbox's thread."""
        self._be_on_device()
        header = self.headers.empty()
        self.transport.receive_header(header).wait()
        read = self.headers.read(header)
        if read is None:
            return None
        rows, tokens, hidden = self.given_shape(read[0])
        with _on_stream(self._receiving):
            buffer = self._buffer(rows * tokens * hidden)
            self.transport.receive_hidden(buffer).wait()
            if buffer.is_cuda:  # NCCL's wait holds back the stream, not this thread
                torch.cuda.current_stream(buffer.device).synchronize()
                buffer.record_stream(torch.cuda.default_stream(buffer.device))
            unpack(buffer, self.stage.dtype)
        return *read, buffer

    def _be_on_device(self) -> None:
        """A thread begins on the first card, and would take memory there."""
        if self.stage.device.type == "cuda":
            torch.cuda.set_device(self.stage.device)

    @cached_property
    def _sending(self) -> "torch.cuda.Stream | None":
        """Messages on a card have a stream for each direction, so that no job holds them back."""
        return self._message_stream()

    @cached_property
    def _receiving(self) -> "torch.cuda.Stream | None":
        return self._message_stream()

    def _message_stream(self) -> "torch.cuda.Stream | None":
        """Made once each: torch has 32 streams in all, and a capture must have one for itself."""
        device = self.transport.message_device
        return torch.cuda.Stream(device) if device.type == "cuda" else None

    def _buffer(self, num_values: int) -> torch.Tensor:
        """For a message; pinned where it goes from a card through main memory."""
        device = self.transport.message_device
        num_bytes = message_bytes(num_values, self.stage.dtype)
        pinned = self.stage.device.type == "cuda" and device.type == "cpu"
        return torch.empty(num_bytes, dtype=torch.uint8, device=device, pin_memory=pinned)

    def _message(self, states: torch.Tensor) -> Result:
        """A buffer with the states, which the next job may overwrite where they are."""
        buffer = self._buffer(states.numel())
        return Result(pack(0, states, buffer), self._recorded())

    def _tokens(self, job: Job, chosen: torch.Tensor) -> Result:
        """The members' tokens of a job, in main memory; none where it chooses none."""
        rows = None if job.prefill else [member.row for member in job.members]
        if not chosen.is_cuda:
            return Result(chosen if rows is None else chosen[rows])
        here = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
        return Result(here.copy_(chosen, non_blocking=True), self._recorded(), rows)

    def _recorded(self) -> "torch.cuda.Event | None":
        if self.stage.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.stage.device))
        return event

    def _answer(self, tokens: torch.Tensor, busy_ms: list[int]) -> torch.Tensor:
        answer = torch.zeros(self.answer_size(), dtype=torch.int32)
        answer[0] = len(tokens)
        answer[1 : 1 + len(tokens)] = tokens
        answer[-self.headers.num_stages :] = torch.tensor(busy_ms)
        return answer

    def _sent(self, job: Job, *pending: Pending) -> None:
        """Keeps messages until they must have come: no more of either phase are under way."""
        self._sends.append((job.prefill, pending))
        most = self.headers.num_stages + 1 if job.prefill else len(self.cache.shapes)
        while sum(prefill == job.prefill for prefill, _ in self._sends) > most:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        for pending in self._sends.popleft()[1]:
            pending.wait()

    def given_shape(self, job: Job) -> tuple[int, ...]:
        """What a stage is given: states, or the first one tokens."""
        rows, tokens = shape(job)
        if not self.is_first:
            return rows, tokens, self.stage.config.hidden_size
        return (rows, tokens) if job.prefill else (rows,)

    def given_kind(self) -> torch.dtype:
        """The data type of that."""
        return torch.int64 if self.is_first else self.stage.dtype

    # ---- computing

    def compute(self, job: Job, given: torch.Tensor | None) -> torch.Tensor:
        """What `do` gives, on the device; a later step may overwrite it there.

        The last stage's tokens are those of all rows of a step, and of the members of a prefill.
        """
        parts = self._in_parts(job, given, 0, job.rows)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _in_parts(
        self, job: Job, given: torch.Tensor | None, first: int, end: int
    ) -> list[torch.Tensor]:
        """Rows `first` to `end`, in as many parts as memory asks for."""
        most = self.most_rows.get(job.prefill, end - first)
        if end - first > most:
            middle = first + most
            return [
                *self._in_parts(job, given, first, middle),
                *self._in_parts(job, given, middle, end),
            ]
        try:
            return [self._rows(job, given, first, end)]
        except RuntimeError as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError) or NO_MEMORY in str(error)
            if not out_of_memory or end - first == 1 or self.stage.group is not None:
                raise  # shards must make the same calls
        self.most_rows[job.prefill] = -(-(end - first) // 2)
        if self.stage.device.type == "cuda":
            torch.cuda.empty_cache()
        return self._in_parts(job, given, first, end)

    def _rows(self, job: Job, given: torch.Tensor | None, first: int, end: int) -> torch.Tensor:
        if not job.prefill:
            return self.steps.run(job, given, first, end)
        assert given is not None
        hidden = prefill(self.stage, self.cache, job, given, first, end)
        if not self.is_last:
            return hidden
        if not job.chooses:
            return torch.empty(0, dtype=torch.int32, device=hidden.device)
        members = job.members[first:end]
        ids, chosen = first_tokens(self.stage, hidden, job, members, self.sampling)
        if self.steps.keeps_ids:
            self.steps.keep(members, ids)
        return chosen


def _on_stream(stream: "torch.cuda.Stream | None") -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
