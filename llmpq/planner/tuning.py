"""Micro-batches that suit the run and not only its closed form.

The closed form, on which the search rests, overlooks what requests of unequal lengths do to few
lanes: places that become free one by one, lanes that wait for newcomers. Where the simulated run of
a plan takes clearly longer than its price, its stages are tried with other micro-batches, and the
shortest simulated run is taken. Bound and gap stay those of the closed form, so the gap of a plan
that was tuned may be large.

Not covered: other layers, devices or requests in flight for the other micro-batches.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from llmpq.plan import Predicted
from llmpq.planner.evaluate import shortages
from llmpq.planner.problem import Assignment, Problem, Setting
from llmpq.planner.simulated import run_s, with_run

LONGER = 1.05  # than its price: a run that is worth tuning
BETTER = 0.98  # of the time so far: a setting that is worth taking
TUNING_JOBS = 4_000  # that a run plays while tuning


def tuned(
    problem: Problem, assignment: Assignment, price: Callable[[Assignment], Predicted]
) -> tuple[Assignment, Predicted]:
    """The stages with the best micro-batches, and the prediction of that run."""
    predicted = with_run(problem, assignment, price(assignment))
    if predicted.total_s < LONGER * predicted.priced_s:
        return assignment, predicted
    best, best_s = assignment, run_s(problem, assignment, TUNING_JOBS)
    for others in (_decode_sizes, _prefill_sizes):
        for setting in others(best.setting):
            candidate = replace(best, setting=setting)
            if shortages(problem, candidate):
                continue
            seconds = run_s(problem, candidate, TUNING_JOBS)
            if seconds < BETTER * best_s:
                best, best_s = candidate, seconds
    if best is assignment:
        return assignment, predicted
    return best, with_run(problem, best, price(best))


def _decode_sizes(setting: Setting) -> Iterator[Setting]:
    """More and smaller lanes first: what few lanes lack."""
    size = setting.decode_micro_batch
    for other in (size // 2, size // 4, 2 * size):
        if 1 <= other <= setting.batch:
            yield replace(setting, decode_micro_batch=other)


def _prefill_sizes(setting: Setting) -> Iterator[Setting]:
    size = setting.prefill_micro_batch
    for other in (2 * size, size // 2):
        if 1 <= other <= setting.batch:
            yield replace(setting, prefill_micro_batch=other)
