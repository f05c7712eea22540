"""How long one resource (a stage, or the link after it) takes for a micro-batch, in both phases.

All prices of plans rest on these works: the exact one (`evaluate`), the arrays that the methods
optimise over (`instance`), and the simulation (`simulated`). Numbers or arrays of tokens go in.

Not covered: how works of several resources make a schedule.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmpq.costs import links
from llmpq.costs.latency import LayerTimes
from llmpq.costs.links import Seconds
from llmpq.planner.layer_options import LayerOption
from llmpq.planner.problem import Problem

Cost = Callable[[int, Any], Seconds]  # of a micro-batch's requests and its prompt or past tokens


@dataclass(frozen=True)
class Work:
    """What a resource does with a micro-batch in both phases."""

    prefill: Cost
    decode: Cost


def chunk_s(whole: Callable[[Any], Any], begin: Any, end: Any) -> np.ndarray:
    """Tokens `begin` (not 0) to `end` of prompts: what the longer prompt takes more, and a call.

    Of a stage whose whole prompts of so many tokens take `whole`; numbers or arrays. A call is
    priced as a prompt of one token: it reads all weights too.
    """
    return later_chunk_s(whole(end), whole(begin), whole(end - begin), whole(1))


def later_chunk_s(end_s: Any, begin_s: Any, own_s: Any, one_s: Any) -> np.ndarray:
    """`chunk_s` from seconds of whole prompts.

    They reach to the chunk's end, to its begin, have as many tokens as it has, and one.
    """
    return np.maximum(end_s - begin_s + one_s, own_s)


class _Remembered:
    """A cost that knows its last answer: the stages of a pipeline ask for the same after another.

    Arrays of tokens are told apart by identity.
    """

    def __init__(self, cost: Cost) -> None:
        self._cost = cost
        self._asked: tuple[int, Any] | None = None
        self._seconds: Seconds = 0.0

    def __call__(self, size: int, tokens: Any) -> Seconds:
        if self._asked is None or self._asked[0] != size or self._asked[1] is not tokens:
            self._asked, self._seconds = (size, tokens), self._cost(size, tokens)
        return self._seconds


def remembered(work: Work) -> Work:
    """The same work, where several ask for the same micro-batch after each other."""
    return Work(_Remembered(work.prefill), _Remembered(work.decode))


def layer_work(times: LayerTimes, option: LayerOption) -> Work:
    """One decoder layer."""
    own, precision = times.of_kind(option.kind), option.precision
    return Work(
        lambda size, tokens: own.prefill_s(precision, size, tokens),
        lambda size, past: own.decode_s(precision, size, past),
    )


def fixed_work(times: LayerTimes, first: bool, last: bool) -> Work:
    """What a stage does beside its layers: the call, the embedding, the head.

    In decode one token a request is embedded.
    """

    def cost(call: Cost, size: int, tokens: Any, embedded: Any) -> Seconds:
        seconds = call(size, tokens)
        seconds = seconds + (times.embedding_s(size, embedded) if first else 0.0)
        return seconds + (times.head_s(size) if last else 0.0)

    return Work(
        lambda size, tokens: cost(times.stage_prefill_s, size, tokens, tokens),
        lambda size, past: cost(times.stage_decode_s, size, past, 1),
    )


def stage_work(
    times: LayerTimes,
    first: bool,
    last: bool,
    counts: Mapping[LayerOption, int],
    layer_of: Callable[[LayerTimes, LayerOption], Work] = layer_work,
) -> Work:
    """A whole stage with so many layers at each option."""
    fixed = fixed_work(times, first, last)
    layers = {option: layer_of(times, option) for option in counts}

    def total(phase: str, size: int, tokens: Any) -> Seconds:
        each = sum(n * getattr(layers[o], phase)(size, tokens) for o, n in counts.items())
        return getattr(fixed, phase)(size, tokens) + each

    return Work(
        lambda *micro_batch: total("prefill", *micro_batch),
        lambda *micro_batch: total("decode", *micro_batch),
    )


def hop_works(problem: Problem, nodes: Sequence[str]) -> list[Work]:
    """The link after each stage: to the next one; after the last, the token return path."""
    down = [_hand_over(problem, a, b) for a, b in zip(nodes, nodes[1:], strict=False)]
    return [*down, _way_back(problem, nodes)]


def _hand_over(problem: Problem, node: str, other: str) -> Work:
    cluster, spec = problem.cluster, problem.spec
    return Work(
        lambda size, tokens: links.prefill_s(cluster, node, other, spec, size, tokens),
        lambda size, past: links.decode_s(cluster, node, other, spec, size) + 0.0 * past,
    )


def _way_back(problem: Problem, nodes: Sequence[str]) -> Work:
    """Nothing where one stage is first and last; in the prefill it hardly counts (`simulated`)."""
    if len(nodes) == 1:
        return Work(lambda size, tokens: 0.0 * tokens, lambda size, past: 0.0 * past)
    ends = nodes[-1], nodes[0]
    return Work(
        lambda size, tokens: 0.0 * tokens,
        lambda size, past: links.tokens_back_s(problem.cluster, *ends, size) + 0.0 * past,
    )
