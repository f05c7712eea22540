"""Scores and continues token ids through the stages of one model in this process, in batches.

Requests of similar length share a batch and are padded on the right, where causal attention does
not look. Texts that are too long for the model lose their beginning.

Shapes: b prompts of a batch, S padded length, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

import torch

from llmpq.errors import UserError
from llmpq.evaluation.perplexity import LOGITS_AT_ONCE, TOKENS_AT_ONCE
from llmpq.job import Job, LaneShape, Member
from llmpq.models.lanes import LaneCache
from llmpq.models.stage_model import StageModel
from llmpq.prompts.request import Request
from llmpq.runtime.sampler import Sampling
from llmpq.runtime.steps import BROKEN, DecodeStepRunner, first_tokens, prefill

NOT_FINITE = "logits are not finite, as activations became NaN or infinite"

ScoredPair = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of its continuation


class NonFiniteLogits(UserError):
    """There is no score or continuation, as the model's logits are NaN or infinite."""


@dataclass(frozen=True)
class Scorer:
    """The stages of one model, in order; `max_positions` is the longest input they take."""

    stages: Sequence[StageModel]
    max_positions: int

    @torch.inference_mode()
    def score(
        self, pairs: Sequence[ScoredPair], on_scored: Callable[[int], None] = lambda _: None
    ) -> list[tuple[float, bool]]:
        """The log-likelihood (nats) of each continuation after its context, and whether greedy
        decoding gives it.

        Inputs that are too long lose their beginning. Raises `NonFiniteLogits` where a
        log-likelihood is not finite, as metrics would count that as a wrong answer.
        """
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        # The last token is only predicted, so that one more than the positions fits.
        most = self.max_positions + 1
        inputs = [[*context, *continuation][-most:-1] for context, continuation in pairs]
        done = 0
        for members in _batches([len(ids) for ids in inputs]):
            hidden = self._hidden([inputs[i] for i in members])
            for row, i in zip(hidden, members, strict=True):
                continuation = pairs[i][1]
                length = len(inputs[i])
                states = row[max(0, length - len(continuation)) : length]
                answers[i] = self._score(states, continuation[-len(states) :])
            done += len(members)
            on_scored(done)
        return answers

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        sampling: Sampling = Sampling(),
        ends: Callable[[list[int]], bool] = lambda _: False,
    ) -> list[list[int]]:
        """Up to `new_tokens` tokens after each prompt; fewer where `ends(tokens so far)` is true.

        Prompts lose their beginning where they leave no room for new tokens. Raises
        `NonFiniteLogits`
        where logits are not finite.
        """
        room = max(1, self.max_positions - new_tokens)
        requests = [Request(i, i, tuple(p[-room:]), new_tokens) for i, p in enumerate(prompts)]
        answers: list[list[int]] = [[] for _ in prompts]
        lengths = [len(request.prompt) + new_tokens for request in requests]
        for members in _batches(lengths):
            batch = [requests[i] for i in members]
            for i, tokens in zip(members, self._continue(batch, sampling, ends), strict=True):
                answers[i] = tokens
        return answers

    def _hidden(self, inputs: Sequence[Sequence[int]]) -> torch.Tensor:
        """Hidden states `[b, S, H]` after every token of `b` inputs, padded on the right."""
        hidden = self.stages[0].embed(_padded(inputs).to(self.stages[0].device))
        lengths = torch.tensor([len(ids) for ids in inputs], device=hidden.device)
        for stage in self.stages:
            hidden = stage.run(hidden, lengths=lengths)
        return hidden

    def _score(self, states: torch.Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
        """The score of a continuation of `c` tokens, from the states `[c, H]` that predict them."""
        last, total, greedy = self.stages[-1], 0.0, True
        rows = max(1, LOGITS_AT_ONCE // last.config.vocab_size)
        wanted = torch.tensor(continuation, device=states.device)[:, None]
        for some, tokens in zip(states.split(rows), wanted.split(rows), strict=True):
            scores = last.head(some).float().log_softmax(dim=-1)
            total += float(scores.gather(1, tokens).sum())
            greedy &= bool((scores.argmax(dim=-1, keepdim=True) == tokens).all())
        if not isfinite(total):
            raise NonFiniteLogits(NOT_FINITE)
        return total, greedy

    def _continue(
        self, requests: list[Request], sampling: Sampling, ends: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        """The new tokens of each request of one batch."""
        new_tokens = requests[0].new_tokens
        lane = LaneShape(len(requests), max(len(r.prompt) for r in requests) + new_tokens)
        caches = [LaneCache(s.layers.count, [lane], s.windows) for s in self.stages]
        steps = [
            DecodeStepRunner(*pair, sampling) for pair in zip(self.stages, caches, strict=True)
        ]
        answers: list[list[int]] = [[] for _ in requests]
        live = set(range(len(requests)))
        for position in range(new_tokens):
            members = tuple(
                Member(0, row, len(requests[row].prompt), requests[row].number, position)
                for row in sorted(live)
            )
            if position == 0:
                tokens = self._first(requests, members, steps)
            else:
                end = 1 + max(member.column for member in members)
                job, given = Job(False, members, 0, end, len(requests)), tokens.clamp(min=0)
                for step in steps:
                    given = step.run(job, given, 0, job.rows)
                tokens = given
            found = tokens.tolist()
            for i in sorted(live):
                if found[i] == BROKEN:
                    raise NonFiniteLogits(NOT_FINITE)
                answers[i].append(found[i])
                if ends(answers[i]):
                    live.remove(i)
            if not live:
                break
        return answers

    def _first(
        self,
        requests: Sequence[Request],
        members: tuple[Member, ...],
        steps: Sequence[DecodeStepRunner],
    ) -> torch.Tensor:
        """The tokens `[b]` after the prompts, whose states are then in the caches."""
        prompts = _padded([request.prompt for request in requests])
        job = Job(True, members, 0, prompts.shape[1], len(requests))
        hidden = prompts.to(self.stages[0].device)
        for step in steps:
            hidden = prefill(step.stage, step.cache, job, hidden, 0, job.rows)
        last = steps[-1]
        ids, chosen = first_tokens(last.stage, hidden, job, members, last.sampling)
        if last.keeps_ids:
            last.keep(members, ids)
        return chosen


def _padded(inputs: Sequence[Sequence[int]]) -> torch.Tensor:
    """`[b, S]` token ids, padded on the right."""
    longest = max(map(len, inputs))
    return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in inputs])


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Positions in `lengths`, longest first, cut where padding would go over `TOKENS_AT_ONCE`."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        count = max(1, TOKENS_AT_ONCE // max(1, lengths[order[0]]))
        yield order[:count]
        order = order[count:]
