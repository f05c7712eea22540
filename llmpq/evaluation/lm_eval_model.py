"""lm-eval's model interface over a `Scorer`.

Only `harness` imports this module, when tasks are run, because the base class needs lm-eval.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.models.utils import postprocess_generated_text as without_stops
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llmpq.evaluation.scorer import ScoredPair, Scorer
from llmpq.runtime.sampler import Sampling

NEW_TOKENS = 256  # the number where a task gives none, as in lm-eval's own models


class PipelineModel(TemplateLM):
    """Answers lm-eval's requests by a `Scorer`; it encodes texts as lm-eval's `hf` model does.

    `on_done(done, total)` is called after each batch with the number of requests answered.
    """

    def __init__(self, scorer: Scorer, tokenizer: Any, on_done: Callable[[int, int], None]) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._scorer, self._on_done = scorer, on_done

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_length(self) -> int:
        return self._scorer.max_positions

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None and string.startswith(
            self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        more = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, verbose=False, **more))

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self._scorer.score(pairs, lambda done: self._on_done(done, len(pairs)))

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Log-likelihoods of whole texts, in windows; every token is predicted once."""
        owners: list[int] = []
        pairs: list[ScoredPair] = []
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
        scores = self._scorer.score(pairs, lambda done: self._on_done(done, len(pairs)))
        for owner, (score, _) in zip(owners, scores, strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Continues requests; those with the same settings share batches."""
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
            self._on_done(done, len(requests))
        return answers

    def _generate(self, requests: Sequence[tuple[str, Any]]) -> list[str]:
        asked = normalize_gen_kwargs(requests[0][1], NEW_TOKENS)
        until = handle_stop_sequences(asked.get("until"), self.tokenizer.decode(self.eot_token_id))
        sampling = Sampling(
            temperature=float(asked.get("temperature") or 0.0),
            top_k=int(asked.get("top_k") or 0),
            top_p=float(asked.get("top_p") or 1.0),
        )

        def ends(tokens: list[int]) -> bool:
            text = self.tokenizer.decode(tokens)
            return tokens[-1] == self.eot_token_id or any(stop in text for stop in until if stop)

        tokens = self._scorer.generate(
            [self.tok_encode(context) for context, _ in requests],
            int(asked["max_gen_toks"]),
            sampling,
            ends,
        )
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
        return [without_stops(text, until, None) for text in texts]
