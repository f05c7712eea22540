"""The first stage's part of a run: it issues jobs, takes tokens back, and ends requests."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from llmpq.job import Job
from llmpq.models.lanes import on_device
from llmpq.prompts.request import Finished, Reason, Request
from llmpq.runtime.inbox import Inbox
from llmpq.runtime.jobs import END
from llmpq.runtime.messages import Result
from llmpq.runtime.outbox import Outbox
from llmpq.runtime.steps import BROKEN
from llmpq.runtime.worker import Worker
from llmpq.schedule import Schedule

Ends = Callable[[Request, list[int]], bool]  # whether a request's new tokens are all it asks for


def never(request: Request, tokens: list[int]) -> bool:
    """No request ends by its text; only lengths and end-of-text tokens end requests."""
    return False


@dataclass(frozen=True)
class Status:
    """How far a run is. `busy_ms` holds each stage's milliseconds of computing, as last reported.

    `num_begun` counts requests that have their first token.
    """

    num_done: int
    num_tokens: int
    busy_ms: tuple[int, ...]
    cache_tokens: int
    cache_reserved: int
    num_begun: int = 0


@dataclass
class _Open:
    """A request that has begun."""

    request: Request
    tokens: list[int] = field(default_factory=list)


class Leader:
    """Runs requests through the stages; `fetch` reads a request when its turn has come."""

    def __init__(
        self,
        worker: Worker,
        schedule: Schedule,
        fetch: Callable[[int], Request],
        eos_ids: frozenset[int],
        on_finished: Callable[[Finished], None],
        on_status: Callable[[Status], None] = lambda _: None,
        ends: Ends = never,
    ) -> None:
        self.worker, self.eos_ids = worker, eos_ids
        self.on_finished, self.on_status, self._ends = on_finished, on_status, ends
        self._open: dict[int, _Open] = {}
        self._schedule, self._fetch = schedule, fetch
        self._results: deque[Result] = deque()  # results of a single stage that nobody took yet
        self._inbox: Inbox[list[int]] | None = None
        self._outbox: Outbox | None = None
        self._busy_ms: tuple[int, ...] = (0,) * worker.headers.num_stages
        self.num_done = self.num_tokens = self.num_begun = 0

    @torch.inference_mode()
    def run(self) -> None:
        """Runs until every request has ended; then ends the other stages."""
        schedule = self._schedule
        if not self.worker.is_last:
            self._inbox = Inbox(self._receive)
            self._outbox = Outbox(self._inbox.fail)
        while not schedule.is_done:
            self._deliver_what_is_here()
            job = schedule.next()
            if job is not None:
                self._issue(job)
            elif schedule.num_in_flight:
                self._wait()
        self.worker.end(self._outbox)
        if self._inbox is not None:
            self._inbox.get()

    def _issue(self, job: Job) -> None:
        worker = self.worker
        for member in job.members:
            if member.number not in self._open:
                self._open[member.number] = _Open(self._fetch(member.number))
        ids = self._token_ids(job)
        result = worker.do(job, None if ids is None else on_device(ids, worker.stage.device))
        if self._outbox is None:
            self._results.append(result)
        else:
            worker.hand_over(self._outbox, job, result, [worker.watch.busy_ms])

    def _token_ids(self, job: Job) -> torch.Tensor | None:
        """`[b, S]` padded prompts, or `[b]` last tokens; None where the device has them."""
        if not job.prefill:
            if self.worker.steps.keeps_ids:
                return None
            last = [0] * job.rows
            for member in job.members:
                last[member.row] = self._open[member.number].tokens[-1]
            return torch.tensor(last)
        ids = torch.zeros(job.rows, job.end - job.begin, dtype=torch.int64)
        for row, member in zip(ids, job.members, strict=True):
            prompt = self._open[member.number].request.prompt[job.begin : job.end]
            row[: len(prompt)] = torch.tensor(prompt)
        return ids

    # ---- the token return path

    def _receive(self) -> list[int] | None:
        """Receives the next message of tokens; runs in the inbox's thread."""
        buffer = torch.zeros(self.worker.messages.token_message_size(), dtype=torch.int32)
        self.worker.transport.receive_tokens(buffer).wait()
        answer: list[int] = buffer.tolist()
        return None if answer[0] == END else answer

    def _deliver_what_is_here(self) -> None:
        while self._results and self._results[0].is_here:
            self._deliver_result()
        while self._inbox is not None and (answer := self._inbox.get_if_here()):
            self._deliver(answer)

    def _wait(self) -> None:
        with self.worker.watch.idle():
            if self._inbox is None:
                self._results[0].wait()
            else:
                answer = self._inbox.get()
        if self._inbox is None:
            self._deliver_result()
        else:
            assert answer is not None
            self._deliver(answer)

    def _deliver_result(self) -> None:
        self._busy_ms = (self.worker.watch.busy_ms,)
        self._note(self._results.popleft().wait().tolist())

    def _deliver(self, answer: list[int]) -> None:
        count = answer[0]
        self._busy_ms = tuple(answer[-self.worker.headers.num_stages :])
        self._note(answer[1 : 1 + count])

    def _note(self, tokens: list[int]) -> None:
        """Takes the tokens of the oldest job; requests that had ended before it take none."""
        job = self._schedule.oldest
        stops = [
            token in self.eos_ids or token == BROKEN or self._has_ended(member.number, token)
            for member, token in zip(job.members, tokens, strict=job.chooses)
        ]
        ended = self._schedule.returned(stops)
        for member, token, last in zip(job.members, tokens, ended, strict=job.chooses):
            if member.number in self._open:
                self._take(member.number, token, last)
        self.on_status(self._status())

    def _has_ended(self, number: int, token: int) -> bool:
        """Whether the request ends with this token; False where it had ended before."""
        one = self._open.get(number)
        return one is not None and self._ends(one.request, [*one.tokens, token])

    def _take(self, number: int, token: int, last: bool) -> None:
        tokens = self._open[number].tokens
        if token != BROKEN:
            tokens.append(token)
            self.num_tokens += 1
            self.num_begun += len(tokens) == 1
        if not last:
            return
        request = self._open.pop(number).request
        self.num_done += 1
        stopped = token in self.eos_ids or self._ends(request, tokens)
        reason: Reason = "stop" if stopped else "length"
        error = None
        if token == BROKEN:
            reason = "error"
            error = f"activations became NaN or infinite at new token {len(tokens)}"
        self.on_finished(Finished(request, tuple(tokens), reason, error))

    def _status(self) -> Status:
        return Status(
            self.num_done,
            self.num_tokens,
            self._busy_ms,
            self._schedule.tokens_held,
            self._schedule.tokens_reserved,
            self.num_begun,
        )
