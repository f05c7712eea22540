"""What one stage does with a job: it computes its layers and hands the result over.

The first stage embeds tokens; the last chooses tokens, which return to the first; stages between
pass hidden states on. All stages do all jobs in one order, which the headers of messages tell, so
they need no other control. Messages are received ahead in a thread (`Inbox`) and sent in another
one (`Outbox`), which waits for results, so that the next job starts meanwhile: on a card, jobs
follow each other without the program waiting for it.

Where memory runs out, the stage where it did cuts the micro-batch in halves, which the others
do not notice, and cuts later ones alike from the start.

Shapes: b rows of the micro-batch, S tokens of each, H hidden size, V vocabulary.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch

from llmpq.job import Job
from llmpq.models.lanes import LaneCache
from llmpq.models.stage_model import StageModel
from llmpq.runtime.inbox import Inbox
from llmpq.runtime.jobs import Headers, shape
from llmpq.runtime.messages import Message, Result, StageMessages
from llmpq.runtime.outbox import Outbox
from llmpq.runtime.rehearsal import MessageMeter, Throttle
from llmpq.runtime.sampler import Draws, Sampling
from llmpq.runtime.steps import DecodeStepRunner, first_tokens, prefill
from llmpq.runtime.stopwatch import Stopwatch
from llmpq.runtime.transport import Transport, payload

NO_MEMORY = "can't allocate memory"  # what torch's allocator for main memory says


@dataclass
class Worker:
    """One stage and all it needs to take part in a run."""

    stage: StageModel
    transport: Transport
    meter: MessageMeter
    cache: LaneCache
    throttle: Throttle
    sampling: Sampling | Draws
    headers: Headers
    graphs: bool = True
    watch: Stopwatch = field(default_factory=Stopwatch)
    # The most rows at a time in each phase (is prefill), since memory ran out.
    most_rows: dict[bool, int] = field(default_factory=dict)

    @cached_property
    def messages(self) -> StageMessages:
        """The messages that this stage sends and receives."""
        return StageMessages(self.stage, self.transport, self.meter, self.headers)

    @property
    def is_first(self) -> bool:
        """Whether this stage embeds tokens."""
        return self.messages.is_first

    @property
    def is_last(self) -> bool:
        """Whether this stage chooses tokens."""
        return self.messages.is_last

    @cached_property
    def steps(self) -> DecodeStepRunner:
        """Runs the decode steps that fill the cache."""
        return DecodeStepRunner(self.stage, self.cache, self.sampling, self.graphs)

    def use_cache(self, cache: LaneCache) -> None:
        """Replaces the cache; steps that were captured are captured anew."""
        self.cache = cache
        self.__dict__.pop("steps", None)

    def use_sampling(self, sampling: Sampling | Draws) -> None:
        """Replaces how tokens are chosen; steps that were captured are captured anew."""
        if self.is_last and sampling is not self.sampling:
            here = sampling.to(self.stage.device) if isinstance(sampling, Draws) else sampling
            self.sampling = here
            self.__dict__.pop("steps", None)

    @torch.inference_mode()
    def assist(self) -> None:
        """Runs the jobs that the first worker of this stage broadcasts; for its other workers."""
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
        """Runs the jobs that messages bring until they end; for stages after the first."""
        inbox: Inbox[Message] = Inbox(self.messages.receive)
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
        """Computes a job: its `[b, S, H]`, or on the last stage int32 `[members]` tokens.

        `given` holds the states `[b, S, H]` that came in; at the first stage, token ids `[b, S]` of
        prompts or `[b]` of a decode step. It may be None for a decode step where one stage has all
        layers, which keeps its tokens on the device.
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
        """Computes a job as `do`, without broadcasting it to the other workers of the stage."""
        self.cache.rearrange(job)
        self.steps.rearrange(job)
        tokens = job.end - job.begin - (not job.prefill)

        def note(seconds: float, ago: float) -> None:
            self.watch.busy(job.prefill, job.rows, tokens, seconds, ago)

        result = self.throttle.run(lambda: self.compute(job, given), note)
        if self.is_last:
            return self.messages.tokens_result(job, result)
        return self.messages.states_result(result)

    def hand_over(self, outbox: Outbox, job: Job, result: Result, busy_ms: list[int]) -> None:
        """Sends a result to the next stage, or from the last to the first, once it is complete."""

        def send() -> None:
            tensor = self.messages.wait_for(result)
            with self.watch.communicating():
                self.messages.send(job, tensor, busy_ms, len(self.cache.shapes))

        outbox.put(send)

    def end(self, outbox: Outbox | None) -> None:
        """Tells the next stage that no job follows, and waits until all messages are sent."""
        self.throttle.settle()
        with self.watch.idle():
            if self.stage.group is not None:
                self.stage.group.broadcast(self.headers.empty())
            if outbox is not None:
                outbox.put(self.messages.send_end)
                outbox.close()

    def given_shape(self, job: Job) -> tuple[int, ...]:
        """The shape of what a job gives this stage: states, or tokens at the first stage."""
        rows, tokens = shape(job)
        if not self.is_first:
            return rows, tokens, self.stage.config.hidden_size
        return (rows, tokens) if job.prefill else (rows,)

    def given_kind(self) -> torch.dtype:
        """The data type of what a job gives this stage."""
        return torch.int64 if self.is_first else self.stage.dtype

    # ---- computing

    def compute(self, job: Job, given: torch.Tensor | None) -> torch.Tensor:
        """The result of a job on the device, where a later step may overwrite it.

        The last stage gives tokens for all rows of a decode step, and for the members of a prefill.
        """
        parts = self._in_parts(job, given, 0, job.rows)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _in_parts(
        self, job: Job, given: torch.Tensor | None, first: int, end: int
    ) -> list[torch.Tensor]:
        """Computes rows `first` to `end` in as many parts as memory makes necessary."""
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
