"""Perplexity through the pipeline itself: hidden states travel from stage to stage as in a run.

All stages take part. The first embeds some windows at a time and sends them on; the last, which
has received the tokens, adds up the loss. There is no cache, and a rehearsal's waits are left out.

Shapes: n windows, b of them at once, W tokens a window, H hidden size.
"""

from collections import deque
from collections.abc import Callable

import torch

from llmpq.evaluation.perplexity import TOKENS_AT_ONCE, Loss, next_token_loss
from llmpq.models.stage_model import StageModel
from llmpq.runtime.engine import StageEngine
from llmpq.runtime.transport import Pending, Transport, message_bytes, pack, payload, unpack

MESSAGES_IN_FLIGHT = 2  # between neighbouring stages


class PipelineLoss:
    """One stage's part of the evaluation: the first calls `lead`, all others `follow`."""

    def __init__(self, stage: StageModel, transport: Transport) -> None:
        self.stage, self.transport = stage, transport

    def lead(
        self,
        windows: torch.Tensor,
        tokens_at_once: int = TOKENS_AT_ONCE,
        on_windows: Callable[[int], None] = lambda _: None,
    ) -> Loss:
        """The loss of `[n, W]` windows through all stages (first stage only).

        `on_windows` is called with the number of windows that were sent. A stage holds the hidden
        states of `tokens_at_once` tokens, or of one window where that is more.
        """
        num_windows, window = windows.shape
        at_once = max(1, tokens_at_once // window)
        self.transport.broadcast(torch.tensor([num_windows, window, at_once]))
        self.transport.broadcast(windows.contiguous())
        return self._run(windows, at_once, on_windows)

    def follow(self) -> Loss:
        """The same loss (all stages but the first)."""
        header = torch.zeros(3, dtype=torch.int64)
        self.transport.broadcast(header)
        num_windows, window, at_once = header.tolist()
        windows = torch.zeros(num_windows, window, dtype=torch.int64)
        self.transport.broadcast(windows)
        return self._run(windows, at_once, lambda _: None)

    @torch.inference_mode()
    def _run(self, windows: torch.Tensor, at_once: int, on_windows: Callable[[int], None]) -> Loss:
        total, done = 0.0, 0
        sends: deque[Pending] = deque()
        parts = windows.split(at_once)
        incoming = self._post(parts[0])
        for index, part in enumerate(parts):
            hidden = self._states(part, incoming)
            if index + 1 < len(parts):
                incoming = self._post(parts[index + 1])
            hidden = self.stage.run(hidden)
            if self.stage.layers.is_last:
                total += next_token_loss(self.stage, hidden, part.to(self.stage.device))
            else:
                sends.append(self._send(index, hidden))
            while len(sends) > MESSAGES_IN_FLIGHT:
                sends.popleft().wait()
            done += len(part)
            on_windows(done)
        for send in sends:
            send.wait()
        totals = self.transport.gather(torch.tensor(total, dtype=torch.float64))
        return Loss(float(totals[-1]), windows.shape[0] * (windows.shape[1] - 1))

    def _post(self, part: torch.Tensor) -> tuple[torch.Tensor, Pending] | None:
        """Posts the receive buffer of a part; the first stage needs none."""
        if self.transport.rank == 0:
            return None
        buffer = self._buffer(part.numel() * self.stage.config.hidden_size)
        return buffer, self.transport.receive_hidden(buffer)

    def _states(
        self, part: torch.Tensor, incoming: tuple[torch.Tensor, Pending] | None
    ) -> torch.Tensor:
        """The input `[b, W, H]` of this stage's layers."""
        if incoming is None:
            return self.stage.embed(part.to(self.stage.device))
        buffer, pending = incoming
        pending.wait()
        unpack(buffer, self.stage.dtype)
        shape = (*part.shape, self.stage.config.hidden_size)
        return payload(buffer, shape, self.stage.dtype).to(self.stage.device)

    def _send(self, index: int, hidden: torch.Tensor) -> Pending:
        there = hidden.to(self.transport.message_device)
        return self.transport.send_hidden(pack(index, there, self._buffer(there.numel())))

    def _buffer(self, num_values: int) -> torch.Tensor:
        num_bytes = message_bytes(num_values, self.stage.dtype)
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.transport.message_device)


def lead_text(
    engine: StageEngine, windows: torch.Tensor, on_windows: Callable[[int], None] = lambda _: None
) -> Loss:
    """The loss of `[n, W]` windows through the loaded stages (first stage only).

    At most the tokens of the plan's largest prefill are in memory at a time, for which there is
    memory.
    """
    planned = engine.plan.prefill_micro_batch * engine.reserve.chunk_tokens
    pipeline = PipelineLoss(engine.worker.stage, engine.transport)
    return pipeline.lead(windows, min(TOKENS_AT_ONCE, planned), on_windows)


def follow_text(engine: StageEngine) -> Loss:
    """Takes part in `lead_text` (all stages but the first)."""
    return PipelineLoss(engine.worker.stage, engine.transport).follow()
