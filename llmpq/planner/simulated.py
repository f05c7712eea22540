"""A plan's whole run, simulated with the same times that price it in closed form.

The runtime's own schedule decides every job: lanes and chunks as the plan has them, newcomers in
the slots of ended requests, caches that grow column by column. Every request has its own lengths.

Not covered: stop tokens (a request generates as many tokens as the workload says).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from llmpq.costs.simulate import SimulatedRun, simulate_schedule
from llmpq.job import Item, Job, widths_near
from llmpq.plan_data import Predicted
from llmpq.planner.evaluate import closed_form_s, resource_works, speeds
from llmpq.planner.problem import Assignment, Configuration, Problem
from llmpq.planner.tables import Scope, Table
from llmpq.planner.works import Work, chunk_s
from llmpq.schedule import Schedule

RUNS: Table[tuple[Assignment, int, float], "RunTimes"] = Table(Scope.MACHINES)
JOB_SECONDS: Table[tuple[Hashable, ...], "Seconds"] = Table(Scope.MACHINES)
SAMPLES: Table[tuple[int, int], Problem] = Table()

Lengths = Sequence[tuple[int, int]]  # (prompt tokens, new tokens) of every request
BLOCK = 256  # columns whose times are computed at once
MOST_JOBS = 6_000  # that a prediction simulates; of more requests a sample
TOKENS_OF_A_JOB = 30  # that take as long to simulate as a job beside its tokens
LEAST_WAVES = 2  # of requests in flight that a sample has


class RunTimes(NamedTuple):
    """A simulated run:

    its seconds, those of them after the last prefill, and `SimulatedRun`'s share.
    """

    total_s: float
    decode_s: float
    prefill_share: float


def with_run(
    problem: Problem, assignment: Assignment, predicted: Predicted, most_jobs: int = MOST_JOBS
) -> Predicted:
    """The same prediction with the total, its parts and tokens/s of the simulated run.

    Of runs of about `most_jobs` and more a sample is simulated.
    """
    run = _whole_run(problem, assignment, most_jobs)
    total, decode = run.total_s, run.decode_s  # of the last requests alone: the same in a sample
    update = {"total_s": total, "prefill_s": total - decode, "decode_s": decode}
    update["objective"] = total + problem.theta * predicted.sum_sensitivity
    update |= {"prefill_share": run.prefill_share, "closed_form_s": predicted.priced_s}
    return predicted.model_copy(update=update | speeds(problem, total))


def run_s(problem: Problem, assignment: Assignment, most_jobs: int = MOST_JOBS) -> float:
    """Seconds of the whole run, as predictions have them."""
    return _whole_run(problem, assignment, most_jobs).total_s


def _whole_run(problem: Problem, assignment: Assignment, most_jobs: int) -> RunTimes:
    """The whole run, from a sample's run.

    The whole run takes as much longer as it does in closed form, which knows all tokens.
    """
    sample = sample_of(problem, assignment.configuration, most_jobs)
    key = assignment, len(sample.lengths), min(problem.repeats, problem.unit.repeats)
    run = problem.cached(RUNS, key, lambda: _of_sample(problem, sample, assignment))
    if sample is problem:
        return run
    same = replace(assignment, configuration=problem.resolved(assignment.configuration))
    plain = replace(problem, scales={})
    times = closed_form_s(plain, same) / closed_form_s(sample, same)
    return run._replace(total_s=run.total_s * times)


def _of_sample(problem: Problem, sample: Problem, assignment: Assignment) -> RunTimes:
    """The run of a sample with the chunk and lanes of the whole one."""
    grain = _grain(sample, problem.resolved(assignment.configuration))
    key = assignment.configuration.stage_devices, assignment.stages, grain
    seconds = problem.cached(
        JOB_SECONDS, key, lambda: Seconds(resource_works(problem, assignment), grain)
    )
    run = simulate(sample, assignment, problem, seconds=seconds)
    return RunTimes(run.total_s, run.decode_s, run.prefill_share)


def _grain(problem: Problem, configuration: Configuration) -> int:
    """How many requests can be simulated as one: equal ones that come and go together.

    Prompts that are computed in chunks come one by one. The configuration's lanes are known.
    """
    if (
        len(set(problem.lengths)) > 1
        or problem.chunk_tokens(configuration) < problem.max_prompt_tokens
    ):
        return 1
    sizes = configuration.batch, configuration.prefill_micro_batch, configuration.decode_micro_batch
    rows = [lane.rows for lane in configuration.lanes or ()]
    return math.gcd(*sizes, *rows, len(problem.lengths))


def sample_of(problem: Problem, configuration: Configuration, most_jobs: int) -> Problem:
    """As many of the requests, of all lengths, as can be simulated in a moment; whole batches.

    The problem itself where that is all of them.
    """
    in_all = round(problem.repeats * len(problem.lengths))
    tokens = sum(new for _, new in problem.lengths)
    share = most_jobs / max(1.0, least_jobs(problem, configuration) + tokens / TOKENS_OF_A_JOB)
    waves = max(int(share * len(problem.lengths)) // configuration.batch, LEAST_WAVES)
    waves = min(waves, math.ceil(in_all / configuration.batch))
    if waves * configuration.batch >= in_all and problem.repeats == 1:
        return problem

    def compute() -> Problem:
        return these_alone(problem, problem.waves(waves, configuration.batch))

    return problem.cached(SAMPLES, (waves, configuration.batch), compute)


def these_alone(problem: Problem, lengths: Lengths) -> Problem:
    """Requests of these lengths alone; sensitivity costs as much in relation to their time."""
    in_all = problem.repeats * len(problem.lengths)
    theta = problem.theta * len(lengths) / in_all
    return replace(
        problem, lengths=tuple(lengths), num_requests=None, theta=theta, scales={}, _known={}
    )


def simulate(
    problem: Problem,
    assignment: Assignment,
    planned: Problem | None = None,
    *,
    refill: bool = True,
    told: Callable[[int], None] = lambda _: None,
    seconds: "Seconds | None" = None,
) -> SimulatedRun:
    """The run of all requests that are listed; `told` hears how many have ended.

    `planned`: the problem whose lengths say what the configuration leaves open, where these are
    others; `seconds`: what is known of jobs. Raises `UserError` where one request needs more cache
    than the whole plan has.
    """
    seconds = seconds or Seconds(resource_works(problem, assignment))
    configuration, grain = (planned or problem).resolved(assignment.configuration), seconds.grain
    if grain > 1:
        problem = replace(problem, lengths=problem.lengths[::grain], _known={})
        configuration = _coarser(configuration, grain)
    schedule = make_schedule(problem, configuration, refill=refill)
    run = simulate_schedule(schedule, seconds, len(seconds.works), told)
    jobs = replace(run.jobs, requests=grain * run.jobs.requests, rows=grain * run.jobs.rows)
    return replace(run, jobs=jobs)


def _coarser(configuration: Configuration, grain: int) -> Configuration:
    """The configuration, whose lanes are known, for requests that stand for so many each."""
    return Configuration(
        configuration.stage_devices,
        configuration.batch // grain,
        configuration.prefill_micro_batch // grain,
        configuration.decode_micro_batch // grain,
        configuration.chunk_tokens,
        tuple(lane._replace(rows=lane.rows // grain) for lane in configuration.lanes or ()),
    )


def make_schedule(
    problem: Problem, configuration: Configuration, *, refill: bool = True
) -> Schedule:
    """The runtime's schedule of the workload's requests.

    Raises `UserError` where one request needs more cache than the configuration's lanes have.
    """
    return Schedule(
        problem.lanes(configuration.sizes, configuration.decode_micro_batch),
        configuration.prefill_micro_batch,
        problem.chunk_tokens(configuration),
        len(configuration.stage_devices),
        iter(Item(number, *lengths) for number, lengths in enumerate(problem.lengths)),
        refill=refill,
        names_members=False,
    )


def least_jobs(problem: Problem, configuration: Configuration) -> int:
    """A run has no fewer jobs."""
    steps = sum(new for _, new in problem.lengths) - len(problem.lengths)
    prefills = len(problem.lengths) / configuration.prefill_micro_batch
    return int(prefills + steps / configuration.decode_micro_batch)


class Seconds:
    """What each server needs for a job; what was asked once is known.

    `grain`: so many equal requests are simulated as one.
    """

    def __init__(self, works: Sequence[Work], grain: int = 1) -> None:
        self.works, self.grain = works, grain
        self.prefills: dict[tuple[int, int, int], list[float]] = {}
        self.whole: dict[tuple[int, int], np.ndarray] = {}
        self.decodes: dict[tuple[int, int], list[float]] = {}

    def __call__(self, job: Job) -> list[float]:
        return self._prefill(job) if job.prefill else self._decode(job)

    def _prefill(self, job: Job) -> list[float]:
        rows, tokens = self.grain * job.rows, job.end - job.begin
        key = rows, job.begin, job.end
        if key not in self.prefills:
            *forward, way_back = self.works
            each = (
                self._chunk(*key)
                if job.begin
                else [_prefill(work, rows, tokens) for work in forward]
            )
            self.prefills[key] = [*each, float(way_back.decode(rows, 0.0))]
        return self.prefills[key]

    def _chunk(self, rows: int, begin: int, end: int) -> list[float]:
        """As `chunk_s` on stages; links take what a prompt of the chunk's tokens does."""
        whole = partial(self._whole, rows)
        seconds = whole(end - begin).copy()
        seconds[::2] = chunk_s(whole, begin, end)[::2]
        return list(seconds.tolist())

    def _whole(self, rows: int, tokens: int) -> np.ndarray:
        """[servers but the token return path] for whole prompts; those of a block of lengths at
        once.

        Chunks of unequal prompts end at almost any length.
        """
        block, devices = divmod(tokens - 1, BLOCK)
        key = rows, block
        if key not in self.whole:
            lengths = np.arange(block * BLOCK + 1, (block + 1) * BLOCK + 1, dtype=float)
            each = [w.prefill(rows, lengths) for w in self.works[:-1]]
            self.whole[key] = np.stack([np.broadcast_to(e, lengths.shape) for e in each], axis=1)
        return np.asarray(self.whole[key][devices])

    def _decode(self, job: Job) -> list[float]:
        rows, width = self.grain * job.rows, job.end
        if (rows, width) not in self.decodes:
            widths = widths_near(width)
            past = np.array(widths, dtype=float) - 1
            each = [np.broadcast_to(w.decode(rows, past), past.shape) for w in self.works]
            seconds = np.stack(each, axis=1).tolist()
            self.decodes |= {(rows, w): s for w, s in zip(widths, seconds, strict=True)}
        return self.decodes[rows, width]


def _prefill(work: Work, rows: int, tokens: int) -> float:
    return float(work.prefill(rows, float(tokens)))
