"""What the worker that leads makes of requests: how they are drawn, where they stop, their results.

`Collector` writes each request as it ends and knows how far the run is. Not covered: how progress
is shown, and the run's report (`llmpq.run_report`).
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from llmpq.prompts.own_settings import cut_at, has_stopped, tail_tokens
from llmpq.prompts.prompts import PromptFile
from llmpq.prompts.request import Finished, Request
from llmpq.prompts.result_stream import ResultStream
from llmpq.reliability.journal import Results
from llmpq.runtime.leader import Ends, Status
from llmpq.runtime.sampler import Sampling

NOW_S = 10.0  # what "now" means: the last so many seconds


def samplings_of(prompts: PromptFile, run: Sampling) -> list[Sampling]:
    """How the tokens of each request are drawn, by its number; empty where all are drawn alike."""
    samplings = [run] * len(prompts) if prompts.drawn else []
    for number, own in prompts.drawn.items():
        changes: Any = {**own, "own_seed": "seed" in own}
        samplings[number] = replace(run, **changes)
    return samplings


def stops_of(tokenizer: Any) -> Ends:
    """Whether a request's answer holds one of the texts where it stops."""

    def ends(request: Request, tokens: list[int]) -> bool:
        if not request.stops:
            return False
        tail = tokens[-tail_tokens(request.stops) :]
        try:
            text = tokenizer.decode(tail, skip_special_tokens=True)
        except Exception:  # tokenizers raise plain exceptions; told where all tokens are decoded
            return False
        return has_stopped(text, request.stops)

    return ends


@dataclass
class Collector:
    """Writes each request as it ends, and counts. `tokenizer`: None where the model has none.

    `show` is called after every job with the requests that are done and how fast the run is, where
    `is_due` says that it would be seen.
    """

    results: Results | ResultStream
    tokenizer: Any
    show: Callable[[int, str], object] = lambda done, detail: None
    is_due: Callable[[], bool] = lambda: False
    num_done: int = 0
    num_tokens: int = 0
    num_failed: int = 0
    num_begun: int = 0
    begun_s: float = 0.0  # when the last request so far got its first token
    started: float = 0.0
    recent: "deque[tuple[float, int]]" = field(default_factory=deque)  # (seconds, tokens so far)

    def refuse(self, prompts: PromptFile) -> None:
        """Ends the requests that cannot be done as they are asked."""
        for number, reason in prompts.refused.items():
            if prompts.ids[number] not in self.results.finished:
                request = prompts.request(number)
                self.finish(Finished(request, (), "error", reason, refused=True))

    def finish(self, finished: Finished) -> None:
        """Writes one more request that has ended."""
        tokens = list(finished.token_ids)
        text = ""
        try:
            if self.tokenizer:
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            text = cut_at(text, finished.request.stops)
        except Exception as error:  # tokenizers raise plain exceptions
            why = f"the model's tokenizer cannot decode its tokens ({error})"
            finished = replace(finished, reason="error", error=finished.error or why)
        self.results.write(finished, text)
        self.num_done += 1
        self.num_tokens += len(tokens)
        self.num_failed += finished.reason == "error"

    def after_job(self, status: Status) -> None:
        """Notes how far the run is; the engine calls it after every job."""
        now = time.perf_counter() - self.started
        if status.num_begun > self.num_begun:
            self.num_begun, self.begun_s = status.num_begun, now
        self.recent.append((now, status.num_tokens))
        while now - self.recent[0][0] > NOW_S:
            self.recent.popleft()
        if self.is_due():
            self.show(status.num_done, self._detail(status, now))

    def _detail(self, status: Status, now: float) -> str:
        (since, before), mean = self.recent[0], status.num_tokens / now
        current = (status.num_tokens - before) / (now - since) if now > since else mean
        busy = " ".join(f"{ms / now / 10:.0f}" for ms in status.busy_ms)
        cache = 100 * status.cache_tokens / status.cache_reserved
        return (
            f"({current:.0f} tokens/s now, {mean:.0f} on average; stages busy {busy} %; "
            f"KV cache {cache:.0f} % used)"
        )
