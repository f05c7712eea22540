"""Which shapes to measure: a fixed grid, or ranges from which to choose as the run goes on.

A cell is a `Candidate`: precision, phase, micro-batch and tokens. `Grid` holds exactly the lists
that a user gave. `AdaptiveGrid` begins with few cells (corners, the middle, micro-batch 1, and both
sides of the numbers of rows at which the packed kernels hand over to others) and offers a grid in
steps of sqrt(2) to choose more from. All functions are pure. Not covered: which cells the budget
can afford (`cell_queue`).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmpq.profile_data import Candidate, Phase, ProfileRow

LAYER_PHASES: tuple[Phase, ...] = ("prefill", "decode")
STAGE_PHASE: dict[Phase, Phase] = {"prefill": "stage_prefill", "decode": "stage_decode"}
ENDS = ("embedding", "head")
NUM_END_SHAPES = 6  # shapes of the embedding, and of the head

Choose = Callable[[Sequence[ProfileRow], Sequence[Candidate], int], list[Candidate]]
Pairs = list[tuple[int, int]]  # (micro-batch, tokens)


@dataclass(frozen=True)
class ShapeRange:
    """The least and greatest micro-batches and tokens of one phase."""

    micro_batches: tuple[int, int]
    tokens: tuple[int, int]

    def start(self, phase: Phase, switches: Sequence[int] = ()) -> Pairs:
        """A few initial pairs, small ones first, some of them with `switches` rows."""
        (few, many), (short, long) = self.micro_batches, self.tokens
        middle = _middle(few, many), _middle(short, long)
        pairs = {(b, t) for b in (few, many) for t in (short, long)} | {middle}
        pairs |= {(few, middle[1]), (many, middle[1]), (middle[0], short)}
        if phase == "prefill":
            pairs |= {(few, rows // few) for rows in switches if short <= rows // few <= long}
        else:
            pairs |= {(rows, middle[1]) for rows in switches if few <= rows <= many}
        return sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair))

    def dense(self) -> Pairs:
        """All pairs of values in steps of sqrt(2)."""
        return [(b, t) for b in _steps(*self.micro_batches) for t in _steps(*self.tokens)]


@dataclass(frozen=True)
class AdaptiveGrid:
    """Chooses cells within these ranges while measurements come in.

    `switches` holds the numbers of rows at which kernels change (`llmpq.serving.switch_rows`).
    """

    precisions: tuple[str, ...]
    prefill: ShapeRange
    decode: ShapeRange
    switches: tuple[int, ...] = ()

    def start(self, phase: Phase) -> Pairs:
        """The initial pairs of a phase."""
        return self._span(phase).start(phase, self.switches)

    def dense(self, phase: Phase) -> Pairs:
        """The pairs that may be added."""
        return self._span(phase).dense()

    @property
    def most_rows(self) -> int:
        """Rows of the largest product of a linear."""
        (_, prompts), (_, tokens) = self.prefill.micro_batches, self.prefill.tokens
        return max(prompts * tokens, self.decode.micro_batches[1])

    def _span(self, phase: Phase) -> ShapeRange:
        return self.prefill if phase == "prefill" else self.decode


@dataclass(frozen=True)
class Grid:
    """Measures exactly these shapes."""

    precisions: tuple[str, ...]
    prefill_micro_batches: tuple[int, ...]
    decode_micro_batches: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    past_tokens: tuple[int, ...]

    def start(self, phase: Phase) -> Pairs:
        """All pairs of a phase."""
        if phase == "prefill":
            batches, lengths = self.prefill_micro_batches, self.prompt_tokens
        else:
            batches, lengths = self.decode_micro_batches, self.past_tokens
        return [(b, t) for t in lengths for b in batches]

    def dense(self, phase: Phase) -> Pairs:
        """No pairs: a fixed grid adds none."""
        return []

    @property
    def most_rows(self) -> int:
        """Rows of the largest product of a linear."""
        prompts = max(self.prefill_micro_batches) * max(self.prompt_tokens)
        return max(prompts, *self.decode_micro_batches)


def layer_cells(precisions: Sequence[str], phase: Phase, pairs: Pairs) -> list[Candidate]:
    """The cells of each shape: a stage's call without layers, then every precision."""
    return [
        cell
        for batch, tokens in pairs
        for cell in (
            stage_cell(precisions, phase, batch, tokens),
            *(Candidate(p, phase, batch, tokens) for p in precisions),
        )
    ]


def stage_cell(precisions: Sequence[str], phase: Phase, batch: int, tokens: int) -> Candidate:
    """The cell of a stage's call without layers; it does not depend on the precision."""
    return Candidate(precisions[0], STAGE_PHASE[phase], batch, tokens)


def end_cells(prefills: Pairs, decodes: Pairs) -> list[Candidate]:
    """Cells of a few shapes of the embedding (by tokens) and of the head (by requests)."""
    lookups = {batch * tokens: (batch, tokens) for batch, tokens in prefills}
    lookups |= {batch: (batch, 1) for batch, _ in decodes}
    heads = sorted({batch for batch, _ in (*prefills, *decodes)})
    embedding = [Candidate("16", "embedding", *lookups[n]) for n in _spread(sorted(lookups))]
    return embedding + [Candidate("16", "head", n, 0) for n in _spread(heads)]


def farthest(
    rows: Sequence[ProfileRow], candidates: Sequence[Candidate], count: int
) -> list[Candidate]:
    """The candidates farthest from all measured cells of their precision and phase, in log space.

    This is the default where no cost model names the cells that it predicts worst.
    """
    known = defaultdict(list)
    for row in rows:
        cell = Candidate(row.precision, row.phase, row.micro_batch, row.tokens)
        known[cell[:2]].append(cell)
    near = {c: min((_distance(c, k) for k in known[c[:2]]), default=math.inf) for c in candidates}
    chosen: list[Candidate] = []
    while near and len(chosen) < count:
        best = max(near, key=lambda c: near[c])
        del near[best]
        chosen.append(best)
        near = {c: min(d, _distance(c, best)) for c, d in near.items()}
    return chosen


def _distance(one: Candidate, other: Candidate) -> float:
    if one[:2] != other[:2]:
        return math.inf
    batch = math.log(one.micro_batch / other.micro_batch)
    return math.hypot(batch, math.log(max(1, one.tokens) / max(1, other.tokens)))


def _middle(least: int, most: int) -> int:
    return round(math.sqrt(least * most))


def _steps(least: int, most: int) -> list[int]:
    """`least`, then powers of sqrt(2) rounded, then `most`."""
    count = math.ceil(2 * math.log2(most / least))
    inner = {round(least * 2 ** (i / 2)) for i in range(count)}
    return sorted(inner | {most})


def _spread(values: list[int]) -> list[int]:
    """At most `NUM_END_SHAPES` of ascending values, with the first and the last."""
    if len(values) <= NUM_END_SHAPES:
        return values
    last = NUM_END_SHAPES - 1
    return [values[round(i * (len(values) - 1) / last)] for i in range(NUM_END_SHAPES)]
