"""Which of several plans has the shortest simulated run, and what makes it shorter still.

The closed form, on which the search rests, ranks plans; it overlooks what requests of unequal
lengths do to few lanes: slots that become free one by one, lanes that wait for prefills. So the
candidates (the search's best plans at several sizes, and the other methods' plans) are simulated.
The shortest run is then varied as long as that helps: its batch, micro-batches and chunk, one at a
time, and its layers (`chains`). A run whose busiest stage never waits cannot get shorter that way.

Not covered: other devices or another order of them than the candidates have.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from llmpq.planner.chains import with_best_layers
from llmpq.planner.evaluate import shortages
from llmpq.planner.problem import Assignment, Problem, Setting
from llmpq.planner.simulated import run_s, sample_of
from llmpq.planner.solver import Solver
from llmpq.workload import LEAST_CHUNK_TOKENS

BETTER = 0.995  # of the time so far: what is worth taking
JOBS = 1_500  # that a run plays while plans are compared
LONG = 1024  # tokens: prompts that are alike and shorter are computed whole
ROUNDS = 2  # of varying sizes and layers, at most


@dataclass
class Confirmed:
    """Simulated runs of plans; `values`: seconds + theta * sensitivity of each."""

    problem: Problem
    solver: Solver
    deadline: float  # time.monotonic
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
        return run_s(self.problem, assignment, JOBS) + self.problem.theta * omega

    @property
    def is_over(self) -> bool:
        """The time limit is reached."""
        return time.monotonic() > self.deadline

    def best_of(self, candidates: Iterable[Assignment]) -> Assignment:
        """The one with the shortest run; the first ones where there is no time for all."""
        first, *others = candidates
        best = first
        for other in others:
            if self.is_over:
                break
            if self.value(other) < self.value(best):
                best = other
        return best

    def improved(self, best: Assignment) -> Assignment:
        """Other sizes and layers as long as the run gets shorter."""
        for _ in range(ROUNDS):
            before = best
            best = self.with_other_sizes(best)
            for setting in _batches(best.setting, len(self.problem.lengths)):
                best = self._better(best, replace(best, setting=setting))
            best = self._better(best, self._with_other_layers(best))
            if best is before or self.is_over:
                break
        return best

    def with_other_sizes(self, best: Assignment) -> Assignment:
        """The same layers and batch with other micro-batches and chunks where that is faster."""
        for sizes in (_decode_sizes, _prefill_sizes):
            for setting in sizes(best.setting):
                best = self._better(best, replace(best, setting=setting))
        return self._with_other_chunks(best)

    def _with_other_chunks(self, best: Assignment) -> Assignment:
        """Longer chunks, or shorter ones, for as long as the run gets shorter."""
        for factor in (2.0, 0.5):
            before = None
            while before is not best and (chunk := _chunk(self.problem, best.setting, factor)):
                before = best
                setting = best.setting.resized(chunk_tokens=chunk)
                best = self._better(best, replace(best, setting=setting))
        return best

    def _better(self, best: Assignment, other: Assignment) -> Assignment:
        if self.is_over or other == best:
            return best
        return other if self.value(other) < BETTER * self.value(best) else best

    def _with_other_layers(self, best: Assignment) -> Assignment:
        if self.is_over:
            return best
        sample = sample_of(self.problem, best.setting, JOBS)
        return with_best_layers(self.problem, sample, best, self.solver, self.deadline)


def _decode_sizes(setting: Setting) -> Iterator[Setting]:
    """More and smaller lanes first: what few lanes lack."""
    size = setting.decode_micro_batch
    for other in (size // 2, size // 4, 2 * size):
        if 1 <= other <= setting.batch:
            yield setting.resized(decode_micro_batch=other)


def _prefill_sizes(setting: Setting) -> Iterator[Setting]:
    size = setting.prefill_micro_batch
    for other in (2 * size, size // 2, size // 4):
        if 1 <= other <= setting.batch:
            yield setting.resized(prefill_micro_batch=other)


def _chunk(problem: Problem, setting: Setting, factor: float) -> int | None:
    """A longer or shorter chunk; None where there is none, or prompts are short and alike."""
    now, longest = problem.chunk_tokens(setting), problem.max_prompt_tokens
    alike = longest < LONG and min(prompt for prompt, _ in problem.lengths) == longest
    chunk = min(longest, round(now * factor))
    return None if alike or chunk == now or chunk < LEAST_CHUNK_TOKENS else chunk


def _batches(setting: Setting, num_requests: int) -> Iterator[Setting]:
    """More or fewer requests in flight: as many lanes, or lanes of the same size."""
    for batch in (2 * setting.batch, setting.batch // 2):
        if not 1 <= batch <= num_requests:
            continue
        prefill = min(setting.prefill_micro_batch, batch)
        for decode in (
            setting.decode_micro_batch,
            setting.decode_micro_batch * batch // setting.batch,
        ):
            if 1 <= decode <= batch:
                pair = {"prefill_micro_batch": prefill, "decode_micro_batch": decode}
                yield setting.resized(batch=batch, **pair)
