"""The best layers for a simulated run: the run's own longest chains as rows of an ILP.

A simulated run is a grid, jobs down and servers (stages and links) across. A job starts on a server
once it has left the one before and the job before it has left this one; on the first server, once
tokens are back that it waits for. With the jobs in a fixed order the run takes as long as the
longest chain through this grid, and each chain's time is linear in how many layers the stages hold
at each precision. So: simulate, add the longest chain and the chains that stay with one stage as
rows, solve for the counts, simulate again, until nothing is gained.

The optimum of the ILP is a lower bound under the model that other layers leave the order of jobs as
it is. They may change it a little: what counts of a plan is its own simulation.
Not covered: other devices, batches and micro-batches (`confirm`).
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from llmpq.costs.simulate import Played
from llmpq.planner import counts
from llmpq.planner.counts import Columns, Rows, finite
from llmpq.planner.exact import realised
from llmpq.planner.instance import Instance, make_instance
from llmpq.planner.problem import Assignment, Place, Problem, Work, layer_work
from llmpq.planner.simulated import chunk_s, simulate
from llmpq.planner.solver import Programme, Solver
from llmpq.planner.value import to_assignment

ROUNDS = 4  # of simulating and solving, at most
GAP = 1e-3  # of one solve
SOLVE_S = 0.5  # at most, of one solve
POLISH_S = 0.05  # at most, to place layers of unequal sensitivity
LEAST_GAIN = 3e-3  # relative; less is not worth another round


@dataclass(frozen=True)
class Chain:
    """A chain's seconds: `fixed` + the sum over `layer` [N, B] times the counts of layers."""

    layer: np.ndarray
    fixed: float


def with_best_layers(
    problem: Problem, sample: Problem, assignment: Assignment, solver: Solver, deadline: float
) -> Assignment:
    """The layers with the shortest simulated run of a `sample`; devices and sizes stay.

    Never longer than that of `assignment`. Ends at `deadline` (`time.monotonic`).
    """
    instance = replace(make_instance(problem, assignment.setting), theta=sample.theta)
    chains: list[Chain] = []
    seen, best, best_value = {assignment}, assignment, math.inf
    current = assignment
    for _ in range(ROUNDS):
        played = simulate(sample, current, problem)
        omega = problem.quality.sum_omega(current.precisions)
        value = played.total_s + sample.theta * omega
        if value < best_value:
            gain, best, best_value = 1 - value / best_value, current, value
            if gain < LEAST_GAIN:
                break
        if time.monotonic() > deadline:
            break
        chains += chains_of(problem, current, played)
        found = _solved(problem, instance, current, chains, solver)
        if found is None or found in seen:
            break
        seen.add(found)
        current = found
    return best


def _solved(
    problem: Problem,
    instance: Instance,
    current: Assignment,
    chains: Sequence[Chain],
    solver: Solver,
) -> Assignment | None:
    programme = build(instance, chains)
    answer = solver.integers(programme, gap=GAP, time_limit=SOLVE_S)
    if answer.x is None:
        return None
    choice = realised(instance, counts.counts_of(instance, answer.x), POLISH_S)
    return None if choice is None else to_assignment(problem, current.setting, choice)


def build(instance: Instance, chains: Sequence[Chain]) -> Programme:
    """The least T above all chains, within memory and the budget; columns as `counts` has them.

    Where layers differ in sensitivity, which stage they lie on is left out, as in `counts.build`.
    """
    columns, groups = Columns(instance), instance.groups
    if len(groups.sizes) > 1:
        columns.add_transport(len(groups.sizes), instance.num_options)
    rows = Rows()
    scale = max(chain.fixed + _mean_layers(instance, chain) for chain in chains) or 1.0
    rows.add(instance.num_layers, instance.num_layers, (columns.c, 1.0))
    for held in columns.c:
        rows.add(1, math.inf, (held, 1.0))
    counts.memory_rows(rows, columns, instance)
    for chain in chains:
        held_s = columns.c, -chain.layer / scale
        rows.add(chain.fixed / scale, math.inf, (columns.T, 1.0), held_s)
    cost = np.zeros(columns.size)
    cost[columns.T] = 1.0
    if len(groups.sizes) > 1:
        counts.add_transport(rows, columns.y, columns.c, groups)
        where, omega = columns.y, groups.omega
    else:
        where, omega = columns.c, np.broadcast_to(groups.omega, columns.c.shape)
    counts.price_rows(rows, cost, instance, where, omega, scale)
    return counts.finished(rows, columns, instance, cost, math.inf, scale)


def _mean_layers(instance: Instance, chain: Chain) -> float:
    """The chain's seconds if all layers lay everywhere alike."""
    return instance.num_layers * float(chain.layer.mean())


# ---- the chains of a simulated run


def chains_of(problem: Problem, assignment: Assignment, played: Played) -> Iterator[Chain]:
    """The longest chain, and for each stage the one that stays with it."""
    num_jobs, num_servers = played.start_s.shape
    work = _Layers(problem, assignment, played)
    yield work.chain(longest(played))
    for server in range(0, num_servers, 2):
        stay = np.zeros((num_jobs, num_servers), dtype=bool)
        stay[0, :server] = stay[:, server] = stay[-1, server:] = True
        yield work.chain(stay)


def _prefill_s(work: Work, rows: int, past: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Seconds of whole prompts and, where some of their tokens are computed, of chunks."""
    whole = partial(work.prefill, rows)
    chunks = chunk_s(whole, np.maximum(past, 1), past + tokens)
    return np.where(past > 0, chunks, whole(tokens))


def longest(played: Played) -> np.ndarray:
    """[jobs, servers], booleans: the jobs of the chain that ends with the run.

    From the end back: to the server before, to the job before, or to the job that was waited for,
    whichever ended last.
    """
    start, end, parent = played.start_s, played.end_s, played.jobs.parent
    on_chain = np.zeros(start.shape, dtype=bool)
    job, server = start.shape[0] - 1, start.shape[1] - 1
    while job >= 0:
        on_chain[job, server] = True
        before = (job - 1, server)
        after = (job, server - 1) if server else (int(parent[job]), start.shape[1] - 1)
        ways = [way for way in (before, after) if way[0] >= 0]
        if not ways:
            break
        job, server = max(ways, key=lambda way: end[way])
    return on_chain


class _Layers:
    """What one layer takes on each stage at each precision, for each kind of job of a run."""

    def __init__(self, problem: Problem, assignment: Assignment, played: Played) -> None:
        jobs = played.jobs
        keys = np.stack([jobs.step > 0, jobs.rows, jobs.past, jobs.tokens], axis=1).astype(int)
        self.kinds, kind = np.unique(keys, axis=0, return_inverse=True)
        self.kind = kind.ravel()
        self.seconds = played.end_s - played.start_s
        self.held = np.array(
            [[stage.count(p) for p in problem.precisions] for stage in assignment.stages]
        )
        places = assignment.setting.places
        self.layer = np.stack([self._of(problem, place) for place in places])  # [N, B, kinds]

    def _of(self, problem: Problem, place: Place) -> np.ndarray:
        times = problem.times_at(place)
        each = [
            self._times(layer_work(times, name)) if name in times.precisions else None
            for name in problem.precisions
        ]
        never = np.zeros(len(self.kinds))  # such options are forbidden by their bounds
        return np.stack([never if seconds is None else seconds for seconds in each])

    def _times(self, work: Work) -> np.ndarray:
        """[kinds]; those of one phase and of as many rows at once."""
        found = np.zeros(len(self.kinds))
        for is_decode, rows in np.unique(self.kinds[:, :2], axis=0).tolist():
            mine = (self.kinds[:, :2] == (is_decode, rows)).all(axis=1)
            past, tokens = self.kinds[mine, 2:].T.astype(float)
            found[mine] = (
                work.decode(rows, past) if is_decode else _prefill_s(work, rows, past, tokens)
            )
        return found

    def chain(self, on_chain: np.ndarray) -> Chain:
        """As a linear function of the counts that is exact at the counts that were simulated."""
        total = float(self.seconds[on_chain].sum())
        stages = on_chain[:, ::2]
        width = len(self.kinds)
        number = np.stack(
            [np.bincount(self.kind[on_stage], minlength=width) for on_stage in stages.T]
        )
        layer = finite(np.einsum("nk,nbk->nb", number, self.layer))
        return Chain(layer, total - float((layer * self.held).sum()))
