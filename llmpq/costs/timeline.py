"""How long a run takes, in closed form: linear in what its jobs take each stage and link.

Stages, the links between them and the tokens' return to the first stage are alike here: resources
in a row that all jobs pass in one order. A run takes as long as its longest chain of jobs that wait
for each other, and two kinds of chains are long:
  - a resource works without a pause, from when the first prefill job reaches it until its last
    decode step leaves it;
  - a prefill job passes all resources while the lanes behind it wait, then the lanes take their
    steps until the next one: `bursts`, one for each round with newcomers, and between them either
    the longest lane goes through all resources again and again (`loop`), or the steps of all lanes
    keep the slowest resource busy (`pace`). In the round of a burst the lanes' steps are hidden
    behind it (`hidden`).
The jobs themselves come from `costs.job_counts` and depend on no times, so that `run_s` is linear
in the resources' seconds and in maxima over resources: the search optimizes exactly this.

Measured against the simulated run (`costs.simulate`) on 288 random plans of 48 random rigs (1 to 10
stages, 1 to 64 lanes): 0.8 % off in the median for equal lengths (90 % of them within 8 %), 2.1 %
for unequal ones (9 %); worst 38 %: many prompts in one prefill job that the run splits, or lanes
that wait for one another in ways that no single chain shows.
Not covered: what `costs.simulate` does not cover.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from llmpq.costs.job_counts import JobCounts


@dataclass(frozen=True)
class Costs:
    """Seconds of a resource (or of a part of its work) over the whole run; arrays of one shape.

    first: one of the first prefill jobs; bursts: it, and one prefill job of each burst; others: all
    other prefill jobs. step: one decode step; loop: the longest lane's steps, pace: those of all
    lanes, both without the ones behind a burst; hidden: those of all lanes behind bursts.
    """

    first: np.ndarray
    bursts: np.ndarray
    others: np.ndarray
    step: np.ndarray
    loop: np.ndarray
    pace: np.ndarray
    hidden: np.ndarray

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Costs":
        """`change` done to each array."""
        return Costs(*(change(getattr(self, f.name)) for f in fields(self)))

    @property
    def prefill(self) -> np.ndarray:
        """All prefill jobs."""
        return np.asarray(self.bursts + self.others)

    @property
    def busy(self) -> np.ndarray:
        """All jobs."""
        return np.asarray(self.bursts + self.others + self.pace + self.hidden)

    @property
    def least(self) -> np.ndarray:
        """What a job of either kind takes at least."""
        return np.minimum(self.first, self.step)


def combined(costs: Sequence[Costs], how: Callable[..., np.ndarray], axis: int = 0) -> Costs:
    """Costs of several, array by array: `how` is np.stack, np.sum, np.min or np.max."""
    return Costs(*(how([getattr(c, f.name) for c in costs], axis=axis) for f in fields(Costs)))


@dataclass(frozen=True)
class Shares:
    """Which part of a run's jobs lies on which chain, from `JobCounts`; arrays of one shape.

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
        first, bursts = self.first * first_s, self.bursts * refill_s
        pace = self.pace * steps_s
        return Costs(
            first=first,
            bursts=first + bursts,
            others=first_s - first + refill_s - bursts,
            step=self.step * steps_s,
            loop=self.loop * longest_s,
            pace=pace,
            hidden=steps_s - pace,
        )


def shares(counts: Sequence[JobCounts], shape: tuple[int, ...]) -> Shares:
    """Of several runs, in arrays of a shape."""
    columns = zip(*map(_shares, counts), strict=True)
    return Shares(*(np.array(column).reshape(shape) for column in columns))


def _shares(counts: JobCounts) -> tuple[float, float, float, float, float]:
    """Between two bursts lanes take one step at least: bursts are half of the rounds at most."""
    steps, rounds, refills = counts.num_steps, counts.num_rounds, counts.num_refills
    bursts = min(counts.num_bursts, refills, rounds / 2)
    return (
        1 / counts.num_first,
        bursts / refills if refills else 0.0,
        1 / steps if steps else 0.0,
        1 - bursts / rounds if rounds else 0.0,
        max(0.0, 1 - bursts * counts.num_lanes / steps) if steps else 0.0,
    )


def run_s(stage: Costs, link: Costs) -> np.ndarray:
    """Seconds of a run, from costs [N, ...] of the stages and of the links after them.

    Linear in costs and maxima, so that the ILPs of `planner.counts` and `planner.pool` hold the
    same chains as rows.
    """
    bursts = (stage.bursts + link.bursts).sum(axis=0)
    step = (stage.step + link.step).sum(axis=0)
    loop = (stage.loop + link.loop).sum(axis=0)
    others = np.maximum(stage.others, link.others).max(axis=0)
    pace = np.maximum(stage.pace, link.pace).max(axis=0)
    passing = bursts + others + np.maximum(loop, pace) + step
    return np.maximum(passing, _without_pause(stage, link).max(axis=0))


def _without_pause(stage: Costs, link: Costs) -> np.ndarray:
    """The chain that stays with each stage, or with the link after it where that is longer."""
    down = np.cumsum(stage.first + link.first, axis=0) - link.first
    up = np.cumsum((stage.step + link.step)[::-1], axis=0)[::-1]
    at_stage = down - stage.first + stage.busy + up - stage.step
    at_link = down + link.busy + up - stage.step - link.step
    return np.asarray(np.maximum(at_stage, at_link))
