"""Zero-shot and few-shot tasks of lm-eval, answered by the stages of a plan in this process.

`Scorer` scores and continues token ids, batched; requests of like length share a batch, padded on
the right, where causal attention never looks. `harness_model` is the face that lm-eval knows,
`run_tasks` runs it.

lm-eval is an optional library and imported only when it is used.
Shapes: b prompts of a batch, S padded length, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from math import isfinite, nan
from typing import Any

import torch

from llmpq.errors import UserError
from llmpq.evaluation.perplexity import LOGITS_AT_ONCE, TOKENS_AT_ONCE
from llmpq.job import Job, LaneShape, Member
from llmpq.models.lanes import LaneCache
from llmpq.models.stage_model import StageModel
from llmpq.prompts.request import Request
from llmpq.runtime.sampler import Sampling
from llmpq.runtime.steps import BROKEN, DecodeStepRunner, first_tokens, prefill

FEWSHOT_SEED = 1234  # lm-eval's own default
BOOTSTRAPS = 1000  # for the standard errors of metrics that have no formula
NEW_TOKENS = 256  # where a task does not say, as lm-eval's own models do

NO_NUMBER = "logits are no finite numbers, as activations became NaN or infinite"

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of its continuation


class NoNumber(UserError):
    """A score or a continuation that cannot be had: the model's logits are NaN or infinite."""


@dataclass(frozen=True)
class Scorer:
    """The stages of one model, in order. `max_positions`: the longest input they can see."""

    stages: Sequence[StageModel]
    max_positions: int

    @torch.inference_mode()
    def score(
        self, pairs: Sequence[Pair], on_scored: Callable[[int], None] = lambda _: None
    ) -> list[tuple[float, bool]]:
        """For each pair the log-likelihood (nats) of the continuation after the context, and
        whether greedy decoding would give it. What is too long loses its beginning. Raises
        `NoNumber` where a log-likelihood is not finite: metrics would take it for a wrong answer.
        """
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        inputs = [self._cut([*context, *continuation])[:-1] for context, continuation in pairs]
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

        Prompts lose their beginning where they leave no room for new tokens. Raises `NoNumber`
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

    def _cut(self, token_ids: list[int]) -> list[int]:
        """The last token is only predicted, so one more than the positions."""
        return token_ids[-(self.max_positions + 1) :]

    def _hidden(self, inputs: Sequence[Sequence[int]]) -> torch.Tensor:
        """`[b, S, H]` after every token of `b` inputs, padded on the right."""
        hidden = self.stages[0].embed(_padded(inputs).to(self.stages[0].device))
        lengths = torch.tensor([len(ids) for ids in inputs], device=hidden.device)
        for stage in self.stages:
            hidden = stage.run(hidden, lengths=lengths)
        return hidden

    def _score(self, states: torch.Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
        """From the hidden states `[c, H]` that predict the `c` tokens of a continuation."""
        last, total, greedy = self.stages[-1], 0.0, True
        rows = max(1, LOGITS_AT_ONCE // last.config.vocab_size)
        wanted = torch.tensor(continuation, device=states.device)[:, None]
        for some, tokens in zip(states.split(rows), wanted.split(rows), strict=True):
            scores = last.head(some).float().log_softmax(dim=-1)
            total += float(scores.gather(1, tokens).sum())
            greedy &= bool((scores.argmax(dim=-1, keepdim=True) == tokens).all())
        if not isfinite(total):
            raise NoNumber(NO_NUMBER)
        return total, greedy

    def _continue(
        self, requests: list[Request], sampling: Sampling, ends: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        """New tokens of each request of one batch."""
        new_tokens = requests[0].new_tokens
        lane = LaneShape(len(requests), max(len(r.prompt) for r in requests) + new_tokens)
        caches = [LaneCache(s.layers.end - s.layers.first, [lane]) for s in self.stages]
        steps = [
            DecodeStepRunner(*pair, sampling) for pair in zip(self.stages, caches, strict=True)
        ]
        answers: list[list[int]] = [[] for _ in requests]
        live = set(range(len(requests)))
        for position in range(new_tokens):
            members = tuple(_member(row, requests[row], position) for row in sorted(live))
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
                    raise NoNumber(NO_NUMBER)
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
        """`[b]` tokens after the prompts, whose states are then in the caches."""
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


def _member(row: int, request: Request, position: int) -> Member:
    return Member(0, row, len(request.prompt), request.number, position)


def harness_model(
    scorer: Scorer, tokenizer: Any, on_done: Callable[[int, int], None] = lambda *_: None
) -> Any:
    """An `lm_eval.api.model.LM` over `scorer`; `on_done(requests answered, of so many)`."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.models.utils import postprocess_generated_text as without_stops
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class PipelineModel(TemplateLM):
        """Tokenises as lm-eval's own `hf` model does."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            begin = tokenizer.bos_token_id
            return self.eot_token_id if begin is None else int(begin)

        @property
        def max_length(self) -> int:
            return scorer.max_positions

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            if add_special_tokens is None and string.startswith(
                tokenizer.decode(self.prefix_token_id)
            ):
                add_special_tokens = False
            more = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return list(tokenizer.encode(string, verbose=False, **more))

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return scorer.score(pairs, lambda done: on_done(done, len(pairs)))

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            """Windows of the model's length; every token of a text is predicted once."""
            owners: list[int] = []
            pairs: list[Pair] = []
            for owner, request in enumerate(requests):
                windows = get_rolling_token_windows(
                    self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                for window in windows:
                    owners.append(owner)
                    pairs.append(make_disjoint_window(window))
            totals = [0.0] * len(requests)
            scores = scorer.score(pairs, lambda done: on_done(done, len(pairs)))
            for owner, (score, _) in zip(owners, scores, strict=True):
                totals[owner] += score
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            """Requests that ask for the same kind of text are continued together."""
            answers = [""] * len(requests)
            kinds: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                kinds.setdefault(repr(request.args[1]), []).append(i)
            done = 0
            for members in kinds.values():
                texts = self._generate([requests[i].args for i in members])
                for i, text in zip(members, texts, strict=True):
                    answers[i] = text
                done += len(members)
                on_done(done, len(requests))
            return answers

        def _generate(self, requests: list[tuple[str, dict[str, Any]]]) -> list[str]:
            asked = normalize_gen_kwargs(requests[0][1], NEW_TOKENS)
            until = handle_stop_sequences(asked.get("until"), tokenizer.decode(self.eot_token_id))
            sampling = Sampling(
                temperature=float(asked.get("temperature") or 0.0),
                top_k=int(asked.get("top_k") or 0),
                top_p=float(asked.get("top_p") or 1.0),
            )

            def ends(tokens: list[int]) -> bool:
                text = tokenizer.decode(tokens)
                return tokens[-1] == self.eot_token_id or any(
                    stop in text for stop in until if stop
                )

            tokens = scorer.generate(
                [self.tok_encode(context) for context, _ in requests],
                int(asked["max_gen_toks"]),
                sampling,
                ends,
            )
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
            return [without_stops(text, until, None) for text in texts]

    return PipelineModel()


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task. `error`: its standard error, None where it has none."""

    task: str
    metric: str
    value: float
    error: float | None
    num_samples: int
    num_fewshot: int


def run_tasks(tasks: Any, model: Any, limit: int | None) -> list[TaskScore]:
    """Every metric of lm-eval's loaded tasks (see `load_tasks`); `limit`: samples a task.

    Where the model's logits are no numbers, each task has one score, which is NaN.
    """
    from lm_eval.evaluator import evaluate

    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)  # the same examples for every model
    more = {"limit": limit, "bootstrap_iters": BOOTSTRAPS, "log_samples": False, "verbosity": None}
    try:
        with redirect_stdout(StringIO()):  # it prints there what belongs to nobody's result
            found = evaluate(model, tasks, **more)
    except NoNumber:
        return [TaskScore(str(name), "no metric", nan, None, 0, 0) for name in tasks["tasks"]]
    return [score for name in found["results"] for score in _scores(name, found)]


def _scores(name: str, found: dict[str, Any]) -> Iterator[TaskScore]:
    """lm-eval's keys are "metric,filter", with the standard error as "metric_stderr,filter"."""
    metrics = found["results"][name]
    counts = found["n-samples"].get(name, {})
    for key, value in metrics.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{metric}_stderr,{chosen}")
        yield TaskScore(
            task=name,
            metric=metric if chosen == "none" else f"{metric} ({chosen})",
            value=float(value),
            error=float(error) if isinstance(error, int | float) else None,
            num_samples=int(counts.get("effective", 0)),
            num_fewshot=int(found["n-shot"].get(name) or 0),
        )


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Positions in `lengths`, longest first, cut where padding would go over `TOKENS_AT_ONCE`."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        count = max(1, TOKENS_AT_ONCE // max(1, lengths[order[0]]))
        yield order[:count]
        order = order[count:]
