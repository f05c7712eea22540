"""Which of several plans has the shortest simulated run, and how far the closed form is off it.

The closed form, on which the search rests, is off by a few percent, and by more where bursts of
prefill jobs meet few lanes. So the candidates (the search's best plans at several sizes, and the
other methods' plans) are simulated. Where runs and closed form are apart, the closed form of such
sizes is scaled to the runs (`Confirmed.scales`) and the search goes on. Then the chunk and the
micro-batches of the plan with the shortest run are varied as long as that makes it shorter still.

Not covered: scales of sizes that no candidate has; other devices, batches or layers than the
candidates have.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from llmpq.planner.evaluate import closed_form_s, shortages
from llmpq.planner.problem import Assignment, Configuration, Problem
from llmpq.planner.scaling import ScaledSizes
from llmpq.planner.simulated import run_s
from llmpq.planner.tables import Table
from llmpq.workload import LEAST_CHUNK_TOKENS

RUN_S: Table[Assignment, float] = Table()  # of the whole run

ScaledFor = tuple[ScaledSizes, int]  # and the number of stages

BETTER = 0.995  # of the time so far: what is worth taking
# Times in closed form, of the best plan's, above which none is simulated. On 58 random rigs none
# above 1.05 had the shorter run.
MUCH_SLOWER = 1.1
# The same of another method's plan, whose run is known. On 18 random rigs, of plans that were above
# it by both none came below 1.05 times our run by other sizes.
RIVAL = 1.05
CLOSE = 0.03  # of the closed form to the simulated run, as it is in the median
LONG = 1024  # tokens: prompts that are alike and shorter are computed whole
ROUNDS = 4  # of varying micro-batches, at most


@dataclass
class Confirmed:
    """Simulated runs of plans; `values`: seconds + theta * sensitivity of each.

    `fastest`: seconds of the fastest run of some sizes and number of stages.
    """

    problem: Problem
    deadline: float  # time.monotonic
    fastest: dict[ScaledFor, float] = field(default_factory=dict)
    values: dict[Assignment, float] = field(default_factory=dict)

    def value(self, assignment: Assignment) -> float:
        """Of the whole run; infinity where a stage does not fit."""
        if assignment not in self.values:
            self.values[assignment] = self._value(assignment)
        return self.values[assignment]

    def _value(self, assignment: Assignment) -> float:
        if shortages(self.problem, assignment):
            return math.inf
        omega = self.problem.quality.sum_omega(assignment.precisions)
        return self.seconds(assignment) + self.problem.theta * omega

    def seconds(self, assignment: Assignment) -> float:
        """Of the whole run."""
        return self.problem.cached(RUN_S, assignment, lambda: run_s(self.problem, assignment))

    def is_much_slower(self, other: Assignment, best: Assignment) -> bool:
        """In closed form it takes so much longer that its run is not worth simulating."""
        return self._priced(other) > MUCH_SLOWER * self._priced(best)

    def is_rival(self, other: Assignment, ours: Assignment) -> bool:
        """In closed form or by its run it may become better than ours with other micro-batches."""
        most = RIVAL * self._priced(ours)
        return self._priced(other) <= most or self.value(other) <= RIVAL * self.value(ours)

    def _priced(self, assignment: Assignment) -> float:
        omega = self.problem.quality.sum_omega(assignment.precisions)
        return closed_form_s(self.problem, assignment) + self.problem.theta * omega

    @property
    def is_over(self) -> bool:
        """The time limit is reached."""
        return time.monotonic() > self.deadline

    def scales(
        self, candidates: Sequence[Assignment], rivals: Sequence[Assignment] = ()
    ) -> dict[ScaledFor, float]:
        """Simulated seconds over those of the closed form, where they are apart and that matters.

        By sizes and number of stages. It matters for the first candidate, which is the best one in
        closed form, for the same layers with other prefill micro-batches, which tend to be off by
        as much, and for others that may be better than it: of the `rivals`, those that are.
        """
        first = candidates[0]
        best = self.seconds(first)
        found = self._scales_of(first, best)
        others = [*candidates[1:]]
        if found:
            sizes = _prefill_sizes(first.configuration)
            others += [replace(first, configuration=configuration) for configuration in sizes]
        for other in others:
            if self.is_over:
                break
            if self.is_much_slower(other, first) or shortages(self.problem, other):
                continue
            seconds = self.seconds(other)
            if min(seconds, closed_form_s(self.problem, other)) < best * (1 + CLOSE):
                found = self._scales_of(other, seconds) | found
        for rival in rivals:
            if self.seconds(rival) < best * BETTER:
                found |= self._scales_of(rival, self.seconds(rival))
        return found

    def _scales_of(self, one: Assignment, seconds: float) -> dict[ScaledFor, float]:
        """Of plans of the same sizes the fastest one counts: else two would take turns."""
        key = self.problem.scaled_sizes(one.configuration), len(one.configuration.stage_devices)
        if seconds > self.fastest.get(key, math.inf):
            return {}
        self.fastest[key] = seconds
        if abs(seconds / closed_form_s(self.problem, one) - 1) <= CLOSE:
            return {}
        plain = replace(self.problem, scales={})
        return {key: seconds / closed_form_s(plain, one)}

    def best_of(self, candidates: Iterable[Assignment]) -> Assignment:
        """The one with the shortest run; the first ones where there is no time for all."""
        first, *others = candidates
        best = first
        for other in others:
            if self.is_over:
                break
            if not self.is_much_slower(other, best) and self.value(other) < self.value(best):
                best = other
        return best

    def improved(self, best: Assignment) -> Assignment:
        """Another chunk and other micro-batches as long as the run gets shorter.

        Micro-batches stay where the closed form is close, as the search has chosen them by it.
        """
        best = self._with_other_chunks(best)
        if self.is_over:
            return best
        if abs(closed_form_s(self.problem, best) / self.seconds(best) - 1) < CLOSE:
            return best
        for _ in range(ROUNDS):
            before, best = best, self._with_other_sizes(best)
            if best is before or self.is_over:
                break
        return best

    def _with_other_sizes(self, best: Assignment) -> Assignment:
        """The same layers and batch with other micro-batches where that is faster."""
        for sizes in (_decode_sizes, _prefill_sizes):
            for configuration in sizes(best.configuration):
                best = self._better(best, replace(best, configuration=configuration))
        return best

    def _with_other_chunks(self, best: Assignment) -> Assignment:
        """Longer chunks, or shorter ones, for as long as the run gets shorter."""
        for factor in (2.0, 0.5):
            before = None
            while before is not best and (
                chunk := _chunk(self.problem, best.configuration, factor)
            ):
                before = best
                configuration = best.configuration.resized(chunk_tokens=chunk)
                best = self._better(best, replace(best, configuration=configuration))
        return best

    def _better(self, best: Assignment, other: Assignment) -> Assignment:
        if self.is_over or other == best or self.is_much_slower(other, best):
            return best
        return other if self.value(other) < BETTER * self.value(best) else best


def _decode_sizes(configuration: Configuration) -> Iterator[Configuration]:
    """More and smaller lanes first: what few lanes lack."""
    size = configuration.decode_micro_batch
    for other in (size // 2, size // 4, 2 * size):
        if 1 <= other <= configuration.batch:
            yield configuration.resized(decode_micro_batch=other)


def _prefill_sizes(configuration: Configuration) -> Iterator[Configuration]:
    size = configuration.prefill_micro_batch
    for other in (2 * size, 4 * size, size // 2, size // 4):
        if 1 <= other <= configuration.batch:
            yield configuration.resized(prefill_micro_batch=other)


def _chunk(problem: Problem, configuration: Configuration, factor: float) -> int | None:
    """A longer or shorter chunk; None where there is none, or prompts are short and alike."""
    now, longest = problem.chunk_tokens(configuration), problem.max_prompt_tokens
    alike = longest < LONG and min(prompt for prompt, _ in problem.lengths) == longest
    chunk = min(longest, round(now * factor))
    return None if alike or chunk == now or chunk < LEAST_CHUNK_TOKENS else chunk
