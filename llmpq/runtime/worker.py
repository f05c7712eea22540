"""What one stage does with a job: its layers on a micro-batch, then hands the result over.

The first stage embeds tokens; the last chooses tokens, which go back to the first; stages between
pass hidden states on. All stages do all jobs in one order, which the headers of messages tell, so
they need no other control. Messages are received ahead in a thread (`Inbox`) and sent without
waiting, so that transfers overlap with computing.

Where memory runs out, a micro-batch is cut in halves on the stage where it did, which the others
do not notice, and later ones are cut alike from the start.

Shapes: b rows of the micro-batch, S tokens of each, H hidden size, V vocabulary.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from llmpq.models.lanes import LaneCache
from llmpq.models.stage_model import StageModel
from llmpq.runtime.inbox import Inbox
from llmpq.runtime.jobs import END, Headers, mask, positions, shape
from llmpq.runtime.rehearsal import Throttle
from llmpq.runtime.sampler import Sampling, choose
from llmpq.runtime.stopwatch import Stopwatch
from llmpq.runtime.transport import Pending, Transport, message_bytes, pack, payload, unpack
from llmpq.schedule import Job

BROKEN = -1  # in place of a token: the logits are not finite
NO_MEMORY = "can't allocate memory"  # what torch's allocator for main memory says


@dataclass
class Worker:
    """One stage and all it needs to take part in a run."""

    stage: StageModel
    transport: Transport
    cache: LaneCache
    throttle: Throttle
    sampling: Sampling
    headers: Headers
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
            states = torch.empty(0)
            if not self.is_first:
                device, dtype = self.stage.device, self.stage.dtype
                states = torch.empty(self._states_shape(read[0]), dtype=dtype, device=device)
                with self.watch.idle():
                    group.broadcast(states)
            self.run(read[0], partial(self._given, read[0], states))

    @torch.inference_mode()
    def follow(self) -> None:
        """Stages after the first: does what messages ask for, until they end."""
        inbox = Inbox(self._receive)
        while True:
            with self.watch.idle():
                message = inbox.get()
            if message is None:
                break
            job, busy_ms, buffer = message
            states = payload(buffer, self._states_shape(job), self.stage.dtype)
            result = self.do(job, partial(states.to, self.stage.device))
            self.hand_over(job, result, [*busy_ms, self.watch.busy_ms])
        self.end()

    def do(self, job: Job, source: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The job's `[b, S, H]`, or on the last stage int32 `[members]` tokens in main memory.

        `source` gives the `[b, S, H]` that come in.
        """
        group = self.stage.group
        if group is not None:
            group.broadcast(self.headers.write(job, []))
            if not self.is_first:
                states = source().contiguous()
                group.broadcast(states)
                return self.run(job, lambda: states)
        return self.run(job, source)

    def run(self, job: Job, source: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The same without telling others."""
        self.cache.rearrange(job)
        result, seconds = self.throttle.run(lambda: self.compute(job, source()))
        self.watch.busy(job.prefill, job.rows, job.end - job.begin - (not job.prefill), seconds)
        return result

    def hand_over(self, job: Job, result: torch.Tensor, busy_ms: list[int]) -> None:
        """To the next stage, or from the last to the first."""
        with self.watch.communicating():
            if self.is_last:
                self._sent(job, self.transport.send_tokens(self._answer(result, busy_ms)))
                return
            header = self.transport.send_header(self.headers.write(job, busy_ms))
            buffer = self._buffer(result.numel())
            states = result if buffer.is_pinned() else result.to(buffer.device)
            self._sent(job, header, self.transport.send_hidden(pack(0, states, buffer)))

    def end(self) -> None:
        """Tells the next stage that nothing follows; waits until all is sent."""
        with self.watch.idle():
            if self.stage.group is not None:
                self.stage.group.broadcast(self.headers.empty())
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

    def _receive(self) -> tuple[Job, list[int], torch.Tensor] | None:
        """The next job and its states, in the inbox's thread."""
        header = self.headers.empty()
        self.transport.receive_header(header).wait()
        read = self.headers.read(header)
        if read is None:
            return None
        rows, tokens, hidden = self._states_shape(read[0])
        buffer = self._buffer(rows * tokens * hidden)
        self.transport.receive_hidden(buffer).wait()
        if buffer.is_cuda:  # NCCL's wait holds back the stream, not this thread
            torch.cuda.current_stream(buffer.device).synchronize()
        unpack(buffer, self.stage.dtype)
        return *read, buffer

    def _buffer(self, num_values: int) -> torch.Tensor:
        """For a message; pinned where it goes from a card through main memory."""
        device = self.transport.message_device
        num_bytes = message_bytes(num_values, self.stage.dtype)
        pinned = self.stage.device.type == "cuda" and device.type == "cpu"
        return torch.empty(num_bytes, dtype=torch.uint8, device=device, pin_memory=pinned)

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

    def _given(self, job: Job, states: torch.Tensor) -> torch.Tensor:
        """What comes into a stage's other workers: the first stage's embed what its first does."""
        if not self.is_first:
            return states
        return self.stage.embed(torch.zeros(shape(job), dtype=torch.int64, device=states.device))

    def _states_shape(self, job: Job) -> tuple[int, int, int]:
        return *shape(job), self.stage.config.hidden_size

    # ---- computing

    def compute(self, job: Job, hidden: torch.Tensor) -> torch.Tensor:
        """From `[b, S, H]` to what `do` gives."""
        parts = self._in_parts(job, hidden, 0, job.rows)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _in_parts(self, job: Job, hidden: torch.Tensor, first: int, end: int) -> list[torch.Tensor]:
        """Rows `first` to `end`, in as many parts as memory asks for."""
        most = self.most_rows.get(job.prefill, end - first)
        if end - first > most:
            middle = first + most
            return [
                *self._in_parts(job, hidden, first, middle),
                *self._in_parts(job, hidden, middle, end),
            ]
        try:
            return [self._rows(job, hidden[first:end], first, end)]
        except RuntimeError as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError) or NO_MEMORY in str(error)
            if not out_of_memory or end - first == 1 or self.stage.group is not None:
                raise  # shards must make the same calls
        self.most_rows[job.prefill] = -(-(end - first) // 2)
        if self.stage.device.type == "cuda":
            torch.cuda.empty_cache()
        return self._in_parts(job, hidden, first, end)

    def _rows(self, job: Job, hidden: torch.Tensor, first: int, end: int) -> torch.Tensor:
        device = self.stage.device
        padded = mask(job, first, end)
        hidden = self.stage.run(
            hidden,
            None if padded is None else padded.to(device),
            positions(job, first, end).to(device),
            self.cache.view(job, first, end),
        )
        return self._choose(job, hidden, first, end) if self.is_last else hidden

    def _choose(self, job: Job, hidden: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """The tokens of the members among rows `first` to `end`, in their order."""
        members = job.members[first:end]
        rows = list(range(end - first))
        if not job.prefill:
            members = tuple(m for m in job.members if first <= m.row < end)
            rows = [member.row - first for member in members]
        if not job.chooses or not rows:
            return torch.empty(0, dtype=torch.int32)
        states = hidden[:, -1] if len(rows) == len(hidden) else hidden[rows, -1]
        logits = self.stage.head(states)
        numbers = [member.number for member in members]
        tokens = choose(logits, self.sampling, numbers, [m.position for m in members])
        finite = torch.isfinite(logits).all(dim=-1)
        return tokens.masked_fill(~finite, BROKEN).to(torch.int32).cpu()
