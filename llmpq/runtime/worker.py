"""What one stage does with a batch: prefill micro-batches, then decode micro-batches, pipelined.

The first stage embeds tokens and decides who is done; the last chooses tokens and sends them back;
stages between pass hidden states on. Which micro-batches still run is in the header of each decode
message, so stages need no other control. All stages follow the same fixed order, and a receiver
posts its next buffer before it computes, so that transfers overlap with computing.

Shapes: b requests of a micro-batch, S padded prompt length, H hidden size.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from llmpq.models.kv_cache import KVCache
from llmpq.models.stage_model import StageModel
from llmpq.runtime.batching import BatchTable, micro_batches
from llmpq.runtime.rehearsal import Throttle
from llmpq.runtime.sampler import Sampling, choose
from llmpq.runtime.stopwatch import Stopwatch
from llmpq.runtime.transport import Pending, Transport, message_bytes, pack, payload, unpack
from llmpq.workload import prefill_size

END = -1  # the header of the message that ends a batch


@dataclass
class Worker:
    """One stage and all it needs to take part in a batch."""

    stage: StageModel
    transport: Transport
    cache: KVCache
    throttle: Throttle
    prefill_micro_batch: int
    decode_micro_batch: int
    planned_prompt_tokens: int
    sampling: Sampling
    eos_ids: frozenset[int]
    watch: Stopwatch = field(default_factory=Stopwatch)
    prefill_s: float = 0.0  # first stage: time until every request had its first token

    @property
    def is_first(self) -> bool:
        """Embeds tokens."""
        return self.transport.rank == 0

    @property
    def is_last(self) -> bool:
        """Chooses tokens."""
        return self.transport.rank == self.transport.size - 1

    @torch.inference_mode()
    def run(
        self,
        table: BatchTable,
        token_ids: torch.Tensor | None = None,
        on_token: Callable[[int, int, bool], None] | None = None,
    ) -> None:
        """Generates for one batch. The first stage needs `token_ids` `[B, S]`.

        `on_token(request in the batch, token, whether it is the last)` is called there.
        """
        self.cache.resize(*self._capacity(table))
        batch = _BatchRun(self, table)
        if self.is_first:
            assert token_ids is not None
            batch.drive(token_ids, on_token or (lambda *_: None))
        else:
            batch.follow()

    def _capacity(self, table: BatchTable) -> tuple[int, int]:
        """The cache's size: the reserved one, or the batch's own where that is longer."""
        needed = table.prompt_tokens + table.new_tokens
        if needed <= self.cache.max_tokens and table.num_requests <= self.cache.max_batch:
            return self.cache.max_batch, self.cache.max_tokens
        return table.num_requests, needed

    def forward(
        self, hidden: torch.Tensor, table: BatchTable, start: int, end: int, past: int
    ) -> torch.Tensor:
        """`[b, S, H]` through this stage's layers, with the cache of requests start..end."""
        count = hidden.shape[1]
        device = self.stage.device
        mask = table.mask(start, end, past + count)
        return self.stage.run(
            hidden,
            None if mask is None else mask.to(device),
            table.positions(start, end, past, count).to(device),
            self.cache.view(start, end, past),
        )

    def choose(self, hidden: torch.Tensor, requests: list[int], position: int) -> torch.Tensor:
        """`[b, S, H]` to the `[b]` tokens that follow the last position, in main memory."""
        logits = self.stage.head(hidden[:, -1])
        return choose(logits, self.sampling, requests, position).cpu()


class _BatchRun:
    """The state of one batch on one stage."""

    def __init__(self, worker: Worker, table: BatchTable) -> None:
        self.worker, self.table = worker, table
        planned = worker.prefill_micro_batch, worker.planned_prompt_tokens
        size = prefill_size(planned[0], table.prompt_tokens, planned[1])
        self.prefills = micro_batches(table.num_requests, size)
        self.decodes = micro_batches(table.num_requests, worker.decode_micro_batch)
        self.numbers: list[int] = table.lengths[:, 2].tolist()
        self.sends: deque[Pending] = deque()
        self.incoming: tuple[torch.Tensor, Pending] | None = None

    # ---- the first stage

    def drive(self, token_ids: torch.Tensor, on_token: Callable[[int, int, bool], None]) -> None:
        """Prefill, then decode until every request is done."""
        started = time.perf_counter()
        returns = _TokenReturns(self, on_token)
        for start, end in self.prefills:
            ids = token_ids[start:end].to(self.worker.stage.device)
            self._compute(partial(self.worker.stage.embed, ids), start, end, past=0)
            returns.expect(start, end)
        live = list(range(len(self.decodes)))
        for step in range(1, self.table.new_tokens):
            live = [index for index in live if self._decode(index, step, returns)]
            if not live:
                break
        returns.finish()
        self.worker.prefill_s += returns.all_started - started
        self._send_end()
        self._drain()

    def _decode(self, index: int, step: int, returns: "_TokenReturns") -> bool:
        """One decode micro-batch, unless all its requests are done."""
        start, end = self.decodes[index]
        tokens = returns.wait_for(start, end, step - 1)
        if returns.all_done(start, end):
            return False
        ids = tokens[:, None].to(self.worker.stage.device)
        past = self.table.prompt_tokens + step - 1
        self._compute(partial(self.worker.stage.embed, ids), start, end, past, index)
        returns.expect(start, end)
        return True

    # ---- the other stages

    def follow(self) -> None:
        """Does what messages ask for, in the order they come."""
        sizes = self._message_sizes()
        self._post(next(sizes))
        for index, (start, end) in enumerate(self.prefills):
            buffer = self._take()
            unpack(buffer, self.worker.stage.dtype)
            self._post(next(sizes))
            states = partial(self._states, buffer, end - start, self.table.prompt_tokens)
            self._compute(states, start, end, 0, index)
        past = [self.table.prompt_tokens] * len(self.decodes)
        while True:
            buffer = self._take()
            index = unpack(buffer, self.worker.stage.dtype)
            if index == END:
                break
            self._post(next(sizes))
            start, end = self.decodes[index]
            states = partial(self._states, buffer, end - start, 1)
            self._compute(states, start, end, past[index], index)
            past[index] += 1
        self._send_end()
        self._drain()

    def _message_sizes(self) -> Iterator[int]:
        """Bytes of every message of this batch in order; decode messages without end."""
        for start, end in self.prefills:
            yield self._bytes(end - start, self.table.prompt_tokens)
        while True:
            yield self._bytes(self._decode_rows(), 1)

    def _post(self, num_bytes: int) -> None:
        device = self.worker.transport.message_device
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.incoming = (buffer, self.worker.transport.receive_hidden(buffer))

    def _take(self) -> torch.Tensor:
        assert self.incoming is not None
        buffer, pending = self.incoming
        with self.worker.watch.idle():
            pending.wait()
            if buffer.is_cuda:  # NCCL's wait holds back the stream, not this thread
                torch.cuda.current_stream(buffer.device).synchronize()
        return buffer

    def _states(self, buffer: torch.Tensor, rows: int, tokens: int) -> torch.Tensor:
        stage = self.worker.stage
        shape = (rows, tokens, stage.config.hidden_size)
        return payload(buffer, shape, stage.dtype).to(stage.device)

    # ---- every stage

    def _compute(
        self, source: Callable[[], torch.Tensor], start: int, end: int, past: int, index: int = 0
    ) -> None:
        """This stage's layers on one micro-batch, then hands the result over."""
        worker = self.worker

        def compute() -> torch.Tensor:
            hidden = worker.forward(source(), self.table, start, end, past)
            if not worker.is_last:
                return hidden
            position = past + hidden.shape[1] - self.table.prompt_tokens
            return worker.choose(hidden, self.numbers[start:end], position)

        result, seconds = worker.throttle.run(compute)
        tokens = self.table.prompt_tokens if past == 0 else past
        worker.watch.busy(past == 0, end - start, tokens, seconds)
        with worker.watch.communicating():
            if worker.is_last:
                self._sent(worker.transport.send_tokens(result))
            else:
                self._send_states(result, index, past)

    def _send_states(self, hidden: torch.Tensor, index: int, past: int) -> None:
        rows = hidden.shape[0] if past == 0 else self._decode_rows()
        tokens = hidden.shape[1]
        self._sent(self._send_message(index, hidden, self._bytes(rows, tokens)))

    def _send_message(self, index: int, hidden: torch.Tensor, num_bytes: int) -> Pending:
        transport = self.worker.transport
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=transport.message_device)
        return transport.send_hidden(pack(index, hidden.to(transport.message_device), buffer))

    def _send_end(self) -> None:
        if not self.worker.is_last:
            nothing = torch.empty(0, dtype=self.worker.stage.dtype)
            self._sent(self._send_message(END, nothing, self._bytes(self._decode_rows(), 1)))

    def _decode_rows(self) -> int:
        return min(self.worker.decode_micro_batch, self.table.num_requests)

    def _bytes(self, rows: int, tokens: int) -> int:
        stage = self.worker.stage
        return message_bytes(rows * tokens * stage.config.hidden_size, stage.dtype)

    def _sent(self, pending: Pending) -> None:
        """Keeps what is under way, and no more than one round of it."""
        self.sends.append(pending)
        while len(self.sends) > len(self.prefills) + len(self.decodes):
            self.sends.popleft().wait()

    def _drain(self) -> None:
        with self.worker.watch.idle():
            while self.sends:
                self.sends.popleft().wait()


class _TokenReturns:
    """Tokens that come back to the first stage, in the order the last stage chose them."""

    def __init__(self, run: _BatchRun, on_token: Callable[[int, int, bool], None]) -> None:
        self.run, self.on_token = run, on_token
        count = run.table.num_requests
        self.tokens = torch.zeros(count, dtype=torch.int64)
        self.num_new = [0] * count
        self.done = [False] * count
        self.all_started = 0.0  # when the last request got its first token
        self.expected: deque[tuple[int, int, torch.Tensor, Pending]] = deque()

    def expect(self, start: int, end: int) -> None:
        """Posts the buffer for the tokens of a micro-batch that has just set out."""
        buffer = torch.empty(end - start, dtype=torch.int64)
        pending = self.run.worker.transport.receive_tokens(buffer)
        self.expected.append((start, end, buffer, pending))

    def wait_for(self, start: int, end: int, step: int) -> torch.Tensor:
        """The `[end - start]` tokens of a step."""
        while any(count <= step for count in self.num_new[start:end]):
            self._receive()
        return self.tokens[start:end].clone()

    def finish(self) -> None:
        """Receives all that is still under way."""
        while self.expected:
            self._receive()

    def all_done(self, start: int, end: int) -> bool:
        """Every request of a slice has ended."""
        return all(self.done[start:end])

    def _receive(self) -> None:
        start, end, received, pending = self.expected.popleft()
        with self.run.worker.watch.idle():
            pending.wait()
        self.tokens[start:end] = received
        for request, token in enumerate(received.tolist(), start):
            self._note(request, token)

    def _note(self, request: int, token: int) -> None:
        self.num_new[request] += 1
        if self.num_new[request] == 1:
            self.all_started = time.perf_counter()
        if self.done[request]:
            return  # computed only because others of its micro-batch go on
        limit = int(self.run.table.lengths[request, 1])
        last = token in self.run.worker.eos_ids or self.num_new[request] >= limit
        self.done[request] = last
        self.on_token(request, token, last)
