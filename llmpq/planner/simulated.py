"""A plan's whole run, played with the same times that price it in closed form.

The runtime's own schedule decides every job: lanes and chunks as a run cuts them, newcomers in the
slots of ended requests, caches that grow column by column. Every request has its own lengths.

Not covered: stop tokens (a request generates as many tokens as the workload says).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from llmpq.costs.simulate import Played, play
from llmpq.plan import Predicted
from llmpq.planner.evaluate import actor_works, evaluate, speeds
from llmpq.planner.problem import Assignment, Problem, Setting, Work
from llmpq.schedule import WINDOW, Item, Job, Schedule
from llmpq.workload import chunk_tokens, lanes, lanes_for

Lengths = Sequence[tuple[int, int]]  # (prompt tokens, new tokens) of every request
BLOCK = 256  # columns whose times are computed at once
MOST_JOBS = 10_000  # that a prediction plays; of more requests a sample
LEAST_WAVES = 8  # that a sample has, so that its tail does not outweigh the rest


def with_run(
    problem: Problem, assignment: Assignment, predicted: Predicted, most_jobs: int = MOST_JOBS
) -> Predicted:
    """The same prediction with the total, its parts and tokens/s of the simulated run.

    Of runs of about `most_jobs` and more a sample is played.
    """
    sample = _sample(problem, assignment.setting, most_jobs)
    window = -(-WINDOW * len(sample.lengths) // len(problem.lengths))  # looks as far ahead
    played = simulate(sample, assignment, problem.lengths, window=window)
    total = played.total_s
    if sample is not problem:
        total *= predicted.priced_s / evaluate(sample, assignment).total_s
    decode = played.decode_s  # of the last requests alone: the same in a sample
    update = {"total_s": total, "prefill_s": total - decode, "decode_s": decode}
    update |= {"prefill_share": played.prefill_share, "closed_form_s": predicted.priced_s}
    return predicted.model_copy(update=update | speeds(problem, total))


def run_s(problem: Problem, assignment: Assignment, most_jobs: int = MOST_JOBS) -> float:
    """Seconds of the whole run, as predictions have them."""
    return with_run(problem, assignment, evaluate(problem, assignment), most_jobs).total_s


def _sample(problem: Problem, setting: Setting, most_jobs: int) -> Problem:
    """As many of the requests, of all lengths, as can be played in a moment."""
    share = most_jobs / max(1, least_jobs(problem, setting))
    count = max(int(share * len(problem.lengths)), LEAST_WAVES * setting.batch)
    if count >= len(problem.lengths):
        return problem
    order = sorted(range(len(problem.lengths)), key=problem.lengths.__getitem__)
    chosen = sorted(order[int((i + 0.5) * len(order) / count)] for i in range(count))
    return replace(problem, lengths=tuple(problem.lengths[i] for i in chosen), _known={})


def simulate(
    problem: Problem,
    assignment: Assignment,
    planned: Lengths | None = None,
    *,
    refill: bool = True,
    window: int = WINDOW,
    told: Callable[[int], None] = lambda _: None,
) -> Played:
    """The run of all requests; `told` hears how many have ended.

    `planned`: the lengths that the plan was made for, where these are others than the workload's;
    `window`: how many requests are looked at ahead of their turn.
    Raises `UserError` where one request needs more cache than the whole plan has.
    """
    works = actor_works(problem, assignment)
    schedule = make_schedule(problem, assignment.setting, planned, refill=refill, window=window)
    return play(schedule, _Seconds(works), len(works), told)


def make_schedule(
    problem: Problem,
    setting: Setting,
    planned: Lengths | None = None,
    *,
    refill: bool = True,
    window: int = WINDOW,
) -> Schedule:
    """The runtime's schedule of the workload's requests."""
    foreseen, sizes = planned or problem.lengths, (setting.batch, setting.decode_micro_batch)
    return Schedule(
        lanes_for(problem.lengths, lanes(foreseen, *sizes), *sizes),
        setting.prefill_micro_batch,
        chunk_tokens(foreseen),
        len(setting.places),
        iter(Item(number, *lengths) for number, lengths in enumerate(problem.lengths)),
        refill=refill,
        window=window,
    )


def least_jobs(problem: Problem, setting: Setting) -> int:
    """A run has no fewer jobs."""
    steps = problem.num_new_tokens - len(problem.lengths)
    prefills = len(problem.lengths) / setting.prefill_micro_batch
    return int(prefills + steps / setting.decode_micro_batch)


class _Seconds:
    """What each server needs for a job; what was asked once is known."""

    def __init__(self, works: Sequence[Work]) -> None:
        self.works = works
        self.prefills: dict[tuple[int, int, int], list[float]] = {}
        self.decodes: dict[tuple[int, int], list[list[float]]] = {}

    def __call__(self, job: Job) -> list[float]:
        return self._prefill(job) if job.prefill else self._decode(job)

    def _prefill(self, job: Job) -> list[float]:
        key, tokens = (job.rows, job.begin, job.end), job.end - job.begin
        if key not in self.prefills:
            *_, way_back = self.works
            self.prefills[key] = [
                _chunk(work, *key) if place % 2 == 0 else _prefill(work, job.rows, tokens)
                for place, work in enumerate(self.works[:-1])
            ] + [float(way_back.decode(job.rows, 0.0))]
        return self.prefills[key]

    def _decode(self, job: Job) -> list[float]:
        block, place = divmod(job.end - job.begin - 1, BLOCK)
        key = job.rows, block
        if key not in self.decodes:
            past = np.arange(block * BLOCK, (block + 1) * BLOCK, dtype=float)
            each = [np.broadcast_to(w.decode(job.rows, past), past.shape) for w in self.works]
            self.decodes[key] = np.stack(each, axis=1).tolist()
        return self.decodes[key][place]


def _chunk(work: Work, rows: int, begin: int, end: int) -> float:
    """Tokens `begin` to `end` of prompts: what the longer prompt takes more, and a call.

    A call is priced as a prompt of one token: it reads all weights too.
    """
    if begin == 0:
        return _prefill(work, rows, end)
    more = _prefill(work, rows, end) - _prefill(work, rows, begin) + _prefill(work, rows, 1)
    return max(more, _prefill(work, rows, end - begin))


def _prefill(work: Work, rows: int, tokens: int) -> float:
    return float(work.prefill(rows, float(tokens)))
