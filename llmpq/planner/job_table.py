"""From the jobs of a run to the seconds that a resource needs for them.

A `JobTable` holds the jobs of all pairs of micro-batches of some `Sizes` (`costs.job_counts`) as
numbers of each kind of job. The time of a kind on a resource is computed once for all pairs, so
that what a resource takes in a whole run is a product of arrays.

Not covered: which resources there are (`instance`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llmpq.costs.job_counts import DecodeSteps, PrefillJob
from llmpq.costs.timeline import Costs, Shares, shares
from llmpq.planner.problem import Problem, Sizes
from llmpq.planner.tables import Scope, Table
from llmpq.planner.works import Work, later_chunk_s

JOB_TABLES: Table[tuple[Sizes, float], "JobTable"] = Table(Scope.REQUESTS)


@dataclass(frozen=True, eq=False)
class JobTable:
    """The jobs of the runs of all pairs of micro-batches, by what a resource is asked for.

    Prefill jobs are told apart by rows and tokens, decode steps by rows and past; `first`,
    `refills`, `steps` and `longest` [P, Q, jobs] say how many of them a run has.
    """

    prefill: tuple[PrefillJob, ...]
    decode: tuple[tuple[int, float], ...]
    first: np.ndarray
    refills: np.ndarray
    steps: np.ndarray
    longest: np.ndarray
    shares: Shares

    def costs(self, work: Work) -> Costs:
        """[P, Q]: what a resource is asked for in the whole run."""
        prefill, decode = self._prefill_s(work), self._decode_s(work)
        return self.shares.costs(
            self.first @ prefill, self.refills @ prefill, self.steps @ decode, self.longest @ decode
        )

    @cached_property
    def _prefills(self) -> list["_Prefills"]:
        """By rows."""
        jobs = np.array(self.prefill, dtype=float)
        return [_prefills(jobs, rows) for rows in np.unique(jobs[:, 0])]

    @cached_property
    def _decodes(self) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """By rows: these, where the steps lie, and their past."""
        steps = np.array(self.decode, dtype=float).reshape(-1, 2)
        positions = [(rows, np.flatnonzero(steps[:, 0] == rows)) for rows in np.unique(steps[:, 0])]
        return [(int(rows), where, steps[where, 1]) for rows, where in positions]

    def _prefill_s(self, work: Work) -> np.ndarray:
        """Seconds of each prefill job."""
        seconds = np.zeros(len(self.prefill))
        for some in self._prefills:
            whole = np.broadcast_to(work.prefill(some.rows, some.lengths), some.lengths.shape)
            seconds[some.where] = some.seconds(whole)
        return seconds

    def _decode_s(self, work: Work) -> np.ndarray:
        """Seconds of each kind of decode step."""
        seconds = np.zeros(len(self.decode))
        for rows, where, past in self._decodes:
            seconds[where] = work.decode(rows, past)
        return seconds


@dataclass(frozen=True, eq=False)
class _Prefills:
    """Prefill jobs of as many rows. `where`: their positions among all jobs.

    `lengths`: all prompt lengths whose times they need; the rest are positions among these.
    """

    rows: int
    where: np.ndarray
    lengths: np.ndarray
    is_first: np.ndarray  # booleans: the job begins at the prompt's begin
    end: np.ndarray
    begin: np.ndarray
    own: np.ndarray  # of a prompt as long as the job
    one: np.ndarray  # of a prompt of one token

    def seconds(self, whole: np.ndarray) -> np.ndarray:
        """Of each job, from those of whole prompts of `lengths`."""
        end = whole[self.end]
        later = later_chunk_s(end, whole[self.begin], whole[self.own], whole[self.one])
        return np.where(self.is_first, end, later)


def _prefills(jobs: np.ndarray, rows: float) -> _Prefills:
    """Those of `jobs` [jobs, 3] with so many rows."""
    where = np.flatnonzero(jobs[:, 0] == rows)
    begin, end = jobs[where, 1], jobs[where, 2]
    asked = [end, np.where(begin > 0, begin, end), end - begin, np.ones_like(end)]
    lengths, positions = np.unique(np.concatenate(asked), return_inverse=True)
    end_at, begin_at, own_at, one_at = positions.reshape(4, -1)
    return _Prefills(int(rows), where, lengths, begin == 0, end_at, begin_at, own_at, one_at)


def table_of(problem: Problem, sizes: Sizes) -> JobTable:
    """The jobs of all pairs of micro-batches."""
    return problem.cached(JOB_TABLES, (sizes, problem.repeats), lambda: _make_table(problem, sizes))


def _make_table(problem: Problem, sizes: Sizes) -> JobTable:
    counts = [
        problem.job_counts(sizes, prefill, decode)
        for prefill in range(len(sizes.prefill))
        for decode in range(len(sizes.decode))
    ]
    prefills: dict[PrefillJob, int] = {}
    decodes: dict[tuple[int, float], int] = {}

    def of_prefills(jobs: Mapping[PrefillJob, float]) -> dict[int, float]:
        return {prefills.setdefault(job, len(prefills)): count for job, count in jobs.items()}

    def of_steps(steps: Sequence[DecodeSteps]) -> dict[int, float]:
        found: dict[int, float] = {}
        for rows, past, count in steps:
            at = decodes.setdefault((rows, past), len(decodes))
            found[at] = found.get(at, 0.0) + count
        return found

    columns = [
        (of_prefills(c.first), of_prefills(c.refills), of_steps(c.steps), of_steps(c.longest_lane))
        for c in counts
    ]
    widths = len(prefills), len(prefills), len(decodes), len(decodes)
    arrays = [np.zeros((len(counts), width)) for width in widths]
    for row, found in enumerate(columns):
        for array, some in zip(arrays, found, strict=True):
            array[row, list(some)] = list(some.values())
    first, refills, steps, longest = (array.reshape(*sizes.shape, -1) for array in arrays)
    return JobTable(
        prefill=tuple(prefills),
        decode=tuple(decodes),
        first=first,
        refills=refills,
        steps=steps,
        longest=longest,
        shares=shares(counts, sizes.shape),
    )
