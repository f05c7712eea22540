"""What runs measured, against what plans were made with: corrected times of each device type.

A stage's call is predicted as a sum of parts: its layers at each precision, the call itself, and
on the ends of the pipeline the embedding and the head. Measured calls give each part a factor: in
each phase one for every precision and one for the call; one for the embedding, one for the head.
One plan tells few of them apart (all layers of a stage are timed together), so least squares of
relative errors pull each factor softly (`PULL`) towards one that its phase has in common: what the
data do not tell apart moves together, and a precision that no stage held takes the common factor.
What is then left over for a micro-batch is one more factor, of that phase and size.

Each stage of each report weighs the same in each phase, and its calls by their seconds. Lengths
have no factor of their own: predictions keep their slope. Not covered: links; stages of several
devices; whether the machine was busy with other work while it ran.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmpq.costs import links
from llmpq.costs.latency import LayerTimes
from llmpq.errors import UserError
from llmpq.plan_data import Plan, spec_of_run
from llmpq.run_report import Report

PULL = 2e-3  # squared: 1 % of relative error weighs as much as a factor 0.2 off its common one
ANCHOR = 1e-9  # keeps the common factor of a phase without data at 1
LEAST = 0.02  # of any factor
OWN = 0.25  # of a factor's variance before the data: above it, the data do not tell it apart
FEWEST_CALLS = 3  # of a micro-batch that gets a factor of its own
CALL, EMBEDDING, HEAD = "call", "embedding", "head"
PHASES: tuple[Literal["prefill", "decode"], ...] = ("prefill", "decode")

Part = tuple[
    str, str
]  # (precision or CALL, phase); the ends of a pipeline: (EMBEDDING or HEAD, "")
Size = tuple[str, int]  # (phase, micro-batch)


@dataclass(frozen=True)
class StageCalls:
    """Calls of one stage that are alike, as a report measured them; `seconds` of one of them."""

    report: int
    rank: int
    device_type: str
    first: bool
    last: bool
    precisions: tuple[str, ...]
    phase: Literal["prefill", "decode"]
    micro_batch: int
    tokens: float
    count: int
    seconds: float


@dataclass(frozen=True)
class Factor:
    """Measured over predicted time of a part. `spread`: relative standard deviation of what is
    left over in the calls that hold it. Not `own`: it is the one that the phase has in common,
    because the data do not tell it apart."""

    part: Part
    value: float
    spread: float
    own: bool


@dataclass(frozen=True)
class Correction:
    """Of one device type. Parts and sizes that are not here: `common` of their phase, and 1."""

    device_type: str
    factors: tuple[Factor, ...]
    common: Mapping[str, float]
    sizes: Mapping[Size, float]

    def of(self, part: Part) -> float:
        """The factor of a part."""
        values = {factor.part: factor.value for factor in self.factors}
        both = sum(self.common.values()) / len(self.common)
        return values.get(part, self.common.get(part[1], both))

    def seconds(self, parts: Mapping[Part, float], phase: str, micro_batch: int) -> float:
        """A call's corrected time from the predicted times of its parts."""
        total = sum(self.of(part) * seconds for part, seconds in parts.items())
        return total * self.sizes.get((phase, micro_batch), 1.0)


def stage_calls(reports: Sequence[tuple[Report, Plan]]) -> list[StageCalls]:
    """All that the reports measured, stages of several devices left out.

    Raises `UserError` where layers differ, as runs time whole stages.
    """
    if several := next((plan.model.name for _, plan in reports if spec_of_run(plan).kinds), None):
        raise UserError(
            f"{several}: has layers of several kinds, which runs do not time apart; profile them "
            "with 'llmpq-profile layers' instead"
        )
    return [
        StageCalls(
            number,
            stage.rank,
            plan.stages[stage.rank].devices[0],
            stage.rank == 0,
            stage.rank == len(plan.stages) - 1,
            tuple(plan.stages[stage.rank].precisions),
            time.phase,
            time.micro_batch,
            time.tokens,
            time.count,
            time.total_s / time.count,
        )
        for number, (report, plan) in enumerate(reports)
        for stage in report.stages
        if plan.stages[stage.rank].tensor_parallel == 1
        for time in stage.measured
        if time.total_s > 0
    ]


def parts_s(times: LayerTimes, calls: StageCalls) -> dict[Part, float]:
    """Predicted seconds of one call, by part."""
    phase, size, tokens = calls.phase, calls.micro_batch, calls.tokens
    layer, call = functions_of(times, phase)
    parts: dict[Part, float] = {}
    parts |= {(p, phase): n * layer(p, size, tokens) for p, n in Counter(calls.precisions).items()}
    parts[CALL, phase] = call(size, tokens)
    if calls.first:
        parts[EMBEDDING, ""] = times.embedding_s(size, tokens if phase == "prefill" else 1)
    if calls.last:
        parts[HEAD, ""] = times.head_s(size)
    return {part: float(seconds) for part, seconds in parts.items()}


def predicted_s(times: LayerTimes, calls: StageCalls) -> float:
    """Predicted seconds of one call."""
    return sum(parts_s(times, calls).values())


def correction(device_type: str, times: LayerTimes, measured: Sequence[StageCalls]) -> Correction:
    """The factors of one device type from its measured calls; all 1 where there are none."""
    split = [parts_s(times, calls) for calls in measured]
    parts = sorted({part for one in split for part in one})
    weights = _weights(measured)
    design = np.array([[one.get(part, 0.0) for part in parts] for one in split])
    design = design.reshape(len(measured), len(parts))
    seconds = np.array([calls.seconds for calls in measured])
    counts = np.array([calls.count for calls in measured], dtype=float)
    together = _over_lengths(measured)
    totals = _sums(counts * seconds, together)
    shares = _sums(design * counts[:, None], together) / totals[:, None]
    values, common, variance = _solve(shares, _sums(weights, together), parts)
    left = seconds / np.maximum(design @ values, 1e-300)
    sizes = _by_size(measured, weights, left)
    left = left / np.array([sizes.get((c.phase, c.micro_batch), 1.0) for c in measured])
    factors = tuple(
        Factor(part, float(value), _spread(left, weights * (column > 0)), bool(unsure < OWN))
        for part, value, unsure, column in zip(parts, values, variance, design.T, strict=True)
    )
    return Correction(device_type, factors, dict(zip(PHASES, common.tolist(), strict=True)), sizes)


def total_error(times: LayerTimes, measured: Sequence[StageCalls]) -> float:
    """Predicted over measured seconds of all these calls, less 1."""
    predicted = sum(calls.count * predicted_s(times, calls) for calls in measured)
    return predicted / sum(calls.count * calls.seconds for calls in measured) - 1


def link_s(plan: Plan, measured: Sequence[StageCalls]) -> float:
    """Predicted seconds that the links carry what these calls of one stage hand on."""
    nodes = [stage.node for stage in plan.stages]
    total = 0.0
    for calls in measured:
        here, there = nodes[calls.rank], nodes[(calls.rank + 1) % len(nodes)]
        tokens = calls.micro_batch * (calls.tokens if calls.phase == "prefill" else 1)
        if calls.last:
            num_bytes = links.TOKEN_BYTES * calls.micro_batch
        else:
            num_bytes = links.activation_message_bytes(plan.model, tokens)
            num_bytes += links.header_bytes(calls.micro_batch)
        total += calls.count * float(links.message_s(plan.cluster, here, there, num_bytes))
    return total


# ---- the factors


def functions_of(times: LayerTimes, phase: str):  # type: ignore[no-untyped-def]
    """A layer's time, and a call's."""
    if phase == "prefill":
        return times.prefill_s, times.stage_prefill_s
    return times.decode_s, times.stage_decode_s


def _weights(measured: Sequence[StageCalls]) -> np.ndarray:
    """By seconds; 1 in all for each stage of a report and phase."""
    totals: dict[tuple[int, int, str], float] = defaultdict(float)
    for calls in measured:
        totals[calls.report, calls.rank, calls.phase] += calls.count * calls.seconds
    return np.array(
        [c.count * c.seconds / totals[c.report, c.rank, c.phase] for c in measured], dtype=float
    )


def _over_lengths(measured: Sequence[StageCalls]) -> np.ndarray:
    """For each of the calls the number of its stage, phase and micro-batch.

    Lengths are summed over: where a prediction grows with length in another way than the calls
    do, that must not look like layers and calls being told apart.
    """
    keys = [(c.report, c.rank, c.phase, c.micro_batch) for c in measured]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], dtype=int)


def _sums(values: np.ndarray, together: np.ndarray) -> np.ndarray:
    """Sums of rows that belong together."""
    total = np.zeros((int(together.max(initial=-1)) + 1, *values.shape[1:]))
    np.add.at(total, together, values)
    return total


def _solve(
    design: np.ndarray, weights: np.ndarray, parts: Sequence[Part]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors of the parts, the phases' common factors, and each factor's share of variance left.

    Minimises sum w (design f - 1)^2 + PULL sum (f - its common)^2 over f >= LEAST.
    """
    count = len(parts)
    toward = np.array([_toward(part) for part in parts]).reshape(count, len(PHASES))
    pull = np.hstack([np.eye(count), -toward])
    wide = np.hstack([design, np.zeros((len(design), len(PHASES)))])
    anchor = np.diag([0.0] * count + [ANCHOR] * len(PHASES))
    matrix = wide.T @ (weights[:, None] * wide) + PULL * pull.T @ pull + anchor
    values = _above(matrix, wide.T @ weights + anchor.sum(axis=1))
    variance = PULL * np.diag(np.linalg.inv(matrix))[:count]
    return values[:count], values[count:], variance


def _toward(part: Part) -> list[float]:
    """Which common factors a part is pulled to: its phase's, or half and half."""
    phase = part[1]
    return [1.0 if one == phase else 0.0 if phase else 1 / len(PHASES) for one in PHASES]


def _above(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The minimum of x matrix x / 2 - right x, what falls below LEAST held there."""
    held = np.zeros(len(right), dtype=bool)
    while True:
        values = np.full(len(right), LEAST)
        rest = right[~held] - LEAST * matrix[np.ix_(~held, held)].sum(axis=1)
        values[~held] = np.linalg.solve(matrix[np.ix_(~held, ~held)], rest)
        below = values < LEAST
        if not below.any():
            return values
        held |= below


def _by_size(
    measured: Sequence[StageCalls], weights: np.ndarray, left: np.ndarray
) -> dict[Size, float]:
    """What is left over for each phase and micro-batch, where there are enough calls.

    Weights are measured seconds, so this is measured over corrected seconds in all.
    """
    found: dict[Size, float] = {}
    for size in dict.fromkeys((c.phase, c.micro_batch) for c in measured):
        mine = np.array([(c.phase, c.micro_batch) == size for c in measured])
        calls = sum(c.count for c, is_mine in zip(measured, mine, strict=True) if is_mine)
        if calls >= FEWEST_CALLS:
            found[size] = float(weights[mine].sum() / (weights[mine] / left[mine]).sum())
    return found


def _spread(left: np.ndarray, weights: np.ndarray) -> float:
    """Relative standard deviation around 1."""
    if not weights.sum():
        return 0.0
    return float(np.sqrt(np.average((left - 1) ** 2, weights=weights)))
