"""How long a run takes, in closed form: linear in what its jobs take each stage and link.

Stages, the links between them and the tokens' return to the first stage are alike here: resources
in a row that all jobs pass in one order. A run takes as long as its longest chain of jobs that wait
for each other, and two kinds of chains are long:
  - a resource works without a pause, from when the first prefill job reaches it until its last
    decode step leaves it (`busy`);
  - prefill jobs come in bursts, one for each round with newcomers. One job of a burst passes all
    resources (`bursts`), the others keep the slowest one busy (`others`), and the lanes wait
    behind them; a round of steps is hidden there. From one burst to the next either the longest
    lane goes through all resources again and again (`loop`), or the steps of all lanes keep the
    slowest one busy (`pace`). Where bursts come in each round, every second one is passed: the
    next one is already on its way then.
The jobs themselves come from `costs.job_counts` and depend on no times, so that `run_s` is linear
in the resources' seconds and in maxima over resources: the search optimizes exactly this.

Against the whole simulated runs (`costs.simulate`) of 22 plans for random rigs it is 6 % off in the
median and 20 % at worst, mostly below them: where lanes fall behind each other, more bursts pass
than are counted. `planner.problem.Problem.scales` corrects it where that matters.
Not covered: what `costs.simulate` does not cover.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from llmpq.costs.job_counts import JobCounts

# The chain of bursts, by the names of `Costs`: what all resources add to it, what only the slowest
# one does, and what all of them add where that is longer than the slowest one's `pace`.
ADDED = ("bursts", "step")
SLOWEST = ("others", "pace")
LOOP = "loop"
# The chain that stays with one resource.
STAYING = "busy"


@dataclass(frozen=True)
class Costs:
    """Seconds of a resource (or of a part of its work) over the whole run; arrays of one shape.

    prefill: all prefill jobs; busy: all jobs; first: one of the first prefill jobs; step: one
    decode step. Of the chain of bursts: bursts, others: prefill jobs that pass all resources, or
    the slowest one; loop, pace: decode steps of the longest lane, or of all lanes.
    """

    prefill: np.ndarray
    busy: np.ndarray
    first: np.ndarray
    step: np.ndarray
    bursts: np.ndarray
    others: np.ndarray
    loop: np.ndarray
    pace: np.ndarray

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Costs":
        """`change` done to each array."""
        return Costs(*(change(getattr(self, f.name)) for f in fields(self)))

    def times(self, scale: np.ndarray) -> "Costs":
        """Arrays [P, Q, ...] multiplied by `scale` [P, Q]."""
        if np.all(scale == 1.0):
            return self
        return self.map(lambda a: a * scale.reshape(scale.shape + (1,) * (a.ndim - scale.ndim)))

    @property
    def least(self) -> np.ndarray:
        """What a job of either kind takes at least."""
        return np.minimum(self.first, self.step)


def combined(costs: Sequence[Costs], how: Callable[..., np.ndarray], axis: int = 0) -> Costs:
    """Costs of several, array by array: `how` is np.stack, np.sum, np.min or np.max."""
    return Costs(*(how([getattr(c, f.name) for c in costs], axis=axis) for f in fields(Costs)))


@dataclass(frozen=True)
class Shares:
    """Which part of a run's jobs lies on the chain of bursts: from `JobCounts`, of one shape.

    Multiplied by the seconds of all first prefill jobs, of all refills, of all decode steps and of
    the longest lane's steps, they are `Costs`.
    """

    first: np.ndarray
    bursts: np.ndarray
    step: np.ndarray
    loop: np.ndarray
    pace: np.ndarray

    def costs(
        self, first_s: np.ndarray, refill_s: np.ndarray, steps_s: np.ndarray, longest_s: np.ndarray
    ) -> Costs:
        """From seconds of jobs in all."""
        first = self.first * first_s
        bursts = first + self.bursts * refill_s
        return Costs(
            prefill=first_s + refill_s,
            busy=first_s + refill_s + steps_s,
            first=first,
            step=self.step * steps_s,
            bursts=bursts,
            others=first_s + refill_s - bursts,
            loop=self.loop * longest_s,
            pace=self.pace * steps_s,
        )


def shares(counts: Sequence[JobCounts], shape: tuple[int, ...]) -> Shares:
    """Of several runs, in arrays of a shape."""
    columns = zip(*map(_shares, counts), strict=True)
    return Shares(*(np.array(column).reshape(shape) for column in columns))


def _shares(counts: JobCounts) -> tuple[float, ...]:
    steps, rounds, refills = counts.num_steps, counts.num_rounds, counts.num_refills
    passed = min(counts.num_bursts, refills, (rounds + counts.empty_rounds) / 2)
    of_loop = max(1.0, passed - counts.empty_rounds)  # `step` has one of each
    of_all = max(1.0, passed * counts.num_lanes - counts.empty_steps)
    return (
        1 / counts.num_first,
        passed / refills if refills else 0.0,
        1 / steps if steps else 0.0,
        1 - of_loop / rounds if rounds else 0.0,
        max(0.0, 1 - of_all / steps) if steps else 0.0,
    )


def run_s(stage: Costs, link: Costs) -> np.ndarray:
    """Seconds of a run, from costs [N, ...] of the stages and of the links after them.

    Linear in costs and maxima, so that the ILPs of `planner.counts` and `planner.pool_bounds` hold
    the same chains as rows.
    """

    def added(name: str) -> np.ndarray:
        return np.asarray((getattr(stage, name) + getattr(link, name)).sum(axis=0))

    others, pace = (np.maximum(getattr(stage, n), getattr(link, n)).max(axis=0) for n in SLOWEST)
    bursts, step = map(added, ADDED)
    passing = bursts + others + np.maximum(added(LOOP), pace) + step
    return np.maximum(passing, _without_pause(stage, link).max(axis=0))


def _without_pause(stage: Costs, link: Costs) -> np.ndarray:
    """The chain that stays with each stage, or with the link after it where that is longer."""
    down = np.cumsum(stage.first + link.first, axis=0) - link.first
    up = np.cumsum((stage.step + link.step)[::-1], axis=0)[::-1]
    at_stage = down - stage.first + stage.busy + up - stage.step
    at_link = down + link.busy + up - stage.step - link.step
    return np.asarray(np.maximum(at_stage, at_link))
