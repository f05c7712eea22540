"""One planning run as values: our own search, then what other methods would do.

The time limit covers all: a moment for a first plan by moves, the searches (a tenth, but 6
seconds at least: the first one, and those with a closed form that simulated runs have corrected),
and what is left for the other methods, in the same space. The best plans of the search and those
of the other methods within the budget are candidates alike: their simulated runs decide.
"""

import itertools
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from llmpq.errors import InfeasibleError, UserError
from llmpq.plan_data import Plan, Predicted
from llmpq.planner.baselines import BASELINES, Outcome, offloaded, run_baselines, with_baselines
from llmpq.planner.confirm import CLOSE, Confirmed, ScaledFor
from llmpq.planner.evaluate import bounded, evaluate, to_plan
from llmpq.planner.exact import first_choice
from llmpq.planner.flexgen import flexgen
from llmpq.planner.heuristic import heuristic
from llmpq.planner.plan_notes import doubts, idle
from llmpq.planner.price import still_fits
from llmpq.planner.problem import Assignment, Problem
from llmpq.planner.search import Progress, Search, search
from llmpq.planner.simulated import with_run
from llmpq.planner.sizes import sizes_near, spare_sizes
from llmpq.planner.solver import Solver, make_solver
from llmpq.planner.space import Space, make_space, rescaled
from llmpq.planner.tables import Table
from llmpq.planner.value import to_assignment

PREDICTED: Table[tuple[Hashable, ...], Predicted] = Table()
METHODS = ("auto", "ilp", "heuristic", *BASELINES)
SEARCH_SHARE = 4 / 5
SEARCH_S = 6.0  # that searches have, however short a tenth of the time limit is
FIRST_SHARE = 2 / 3  # of that, for the first one; the rest is for those with a corrected price
CONFIRM_SHARE = 9 / 10  # when plans are no longer compared by their runs
CONFIRM_S = 10.0  # at most, for that; on an idle machine it is done before
MOST_CORRECTIONS = 10  # of the closed form
ANY_GAP = 0.5  # where the time is over and there is no plan yet
RIVALS_S = 1.5  # at least, for the search that another method's better plan makes necessary
FINALISTS = 4  # plans of the search whose runs are simulated
LEAST_S = 0.5  # for a search, however short the time limit is
OPEN_S = 2.5  # or a quarter of the time limit: at most, to open parts of the space for that plan
MOVES_S, HEURISTIC_S = 0.25, 0.5  # for a first plan by moves, and where it is the whole method
OTHERS_S = 5.0  # or three times our own search: at most, for the other methods


@dataclass(frozen=True)
class Options:
    """How to search. `compare`: the other methods too. `simulate`: plans' runs, not only prices.

    `near`: only sizes like those of the plan that is given to `replan`.
    """

    method: str = "auto"
    gap: float = 0.005
    time_limit_s: float = 60.0
    compare: bool = True
    simulate: bool = True
    near: bool = False
    solver: Literal["highs", "gurobi"] = "highs"
    progress: Callable[[Progress], None] = lambda _: None


@dataclass(frozen=True)
class Planned:
    """The plan, what other methods would do, and what a reader should know."""

    plan: Plan
    outcomes: tuple[Outcome, ...] = ()
    notes: tuple[str, ...] = ()
    effort: str = ""


def make_plan(problem: Problem, options: Options, offered: Sequence[str]) -> Planned:
    """The best plan found; `InfeasibleError` where there is none. `offered`: all precisions.

    Raises `UserError` for a method that is not in `METHODS`.
    """
    if options.method not in METHODS:
        raise UserError(f"unknown method '{options.method}'; known: {', '.join(METHODS)}")
    run = _Run(problem, options, make_solver(options.solver), time.monotonic())
    space = make_space(run.unit)
    if options.method in BASELINES:
        plan, outcomes = _by_baseline(run, space)
        return _planned(run, space, with_baselines(plan, outcomes), outcomes)
    moved = _by_moves(run, space) if options.method == "heuristic" else None
    found = None
    if not moved:
        found, space = _searched(run, space)
        run, space, found = _corrected(run, space, found)
    if found is not None and found.assignment is None:
        raise _no_plan(run, found, offered)
    ours = found.assignment if found is not None else None
    known = [_best_run(run, found.finalists[:FINALISTS])] if found and options.simulate else []
    outcomes = _outcomes(run, space, BASELINES, ours) if options.compare else []
    if found is not None and (rivals := _rivals(outcomes)):
        run, space, found = _corrected(run, space, found, rivals)
    plan = moved or _plan_of(run, found, [*_rivals(outcomes), *known])
    return _planned(run, space, with_baselines(plan, outcomes), outcomes, found)


def replan(problem: Problem, options: Options, like: Plan | None = None) -> Plan:
    """Our plan alone, to see what a change of the problem is worth.

    Starts from the plan `like` where that one still fits. Raises a plain `InfeasibleError` where
    nothing fits.
    """
    run = _Run(problem, options, make_solver(options.solver), time.monotonic())
    first = still_fits(run.unit, like) if like else None
    sizes = sizes_near(run.unit, first.configuration) if first and options.near else None
    space = make_space(run.unit, sizes or None)
    found, space = _searched(run, space, first)
    run, _, found = _corrected(run, space, found)
    if found.assignment is None:
        raise InfeasibleError("no plan fits")
    return _plan_of(run, found)


@dataclass(frozen=True)
class _Run:
    """What is asked, and since when."""

    problem: Problem
    options: Options
    solver: Solver
    start: float
    fastest: dict[ScaledFor, float] = field(default_factory=dict)  # as `Confirmed` has it

    @property
    def unit(self) -> Problem:
        """What is planned: of very many requests so many."""
        return self.problem.unit

    @property
    def times(self) -> float:
        """How often the problem holds `unit`."""
        return self.problem.repeats / self.unit.repeats

    @cached_property
    def _runs(self) -> Confirmed:
        return Confirmed(self.unit, 0.0, self.fastest)

    def compared(self, until: float, seconds: float) -> Confirmed:
        """Simulated runs, for as long as that; what was simulated is known."""
        deadline = min(until, time.monotonic() + seconds)
        return replace(self._runs, deadline=deadline)

    def by(self, share: float, least_s: float = 0.0) -> float:
        """When a share of the time limit is over (monotonic); `least_s` from now at least."""
        limit = self.start + share * self.options.time_limit_s
        return max(limit, time.monotonic() + least_s)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start


# ---- our own


def _searched(run: _Run, space: Space, first: Assignment | None = None) -> tuple[Search, Space]:
    """The search of a space; where it holds no plan, that of sizes that need less memory."""
    until = _search_until(run)
    if run.options.simulate:
        until = run.start + FIRST_SHARE * (until - run.start)
    gap, until = _loose_gap(run), max(until, time.monotonic() + LEAST_S)
    found = _search_of(run, space, [first] if first else [], gap, until)
    if found.assignment is None and found.timed_out:
        found = _search_of(run, space, [], ANY_GAP, _limit(run))
        found.timed_out = True
    if found.assignment is not None or found.timed_out:
        return found, space
    from llmpq.planner.explain import lacks_memory  # start-up time where there is a plan

    if lacks_memory(run.unit):
        return found, space
    space = make_space(run.unit, spare_sizes(run.unit))
    until = max(_search_until(run), time.monotonic() + LEAST_S)
    return _search_of(run, space, [], gap, until), space


def _loose_gap(run: _Run) -> float:
    """As the closed form is off by `CLOSE` at any rate, half of that is gap enough at first."""
    return max(run.options.gap, CLOSE / 2) if run.options.simulate else run.options.gap


def _corrected(
    run: _Run, space: Space, found: Search, rivals: Sequence[Assignment] = ()
) -> tuple[_Run, Space, Search]:
    """Searches again for as long as the simulated run of the best plan contradicts its price.

    Or that of another method's plan which is better than ours. The closed form is then scaled to
    the simulated runs of plans of these sizes. Where no run contradicts, it goes on to the gap that
    was asked for.
    """
    until = max(_search_until(run), time.monotonic() + (RIVALS_S if rivals else 0.0))
    gap = _loose_gap(run)
    for _ in range(MOST_CORRECTIONS if run.options.simulate else 0):
        if found.assignment is None or time.monotonic() > until:
            break
        runs = run.compared(run.by(CONFIRM_SHARE, LEAST_S), CONFIRM_S)
        scales = runs.scales(found.finalists[:FINALISTS], rivals)
        if runs.is_over:
            break
        before, seeds = run.unit, [*found.finalists, *rivals]
        space = replace(space, floor=found.lower_bound)
        if scales:
            run = replace(run, problem=run.problem.scaled(scales))
            space = rescaled(space, before, run.unit)
        elif gap > run.options.gap and not run.problem.scales:
            gap = run.options.gap
        else:
            break
        late = found.timed_out
        found = _search_of(run, space, seeds, gap, until)
        found.timed_out |= late and found.lower_bound < found.best * (1 - gap)
    return run, space, found


def _search_of(
    run: _Run, space: Space, seeds: Sequence[Assignment], gap: float, deadline: float
) -> Search:
    """From plans to start with, or from one that is made by moves."""
    options = run.options
    if not seeds:
        first = _moves(run, space, MOVES_S)
        seeds = [first] if first else []
        deadline = max(deadline, time.monotonic() + LEAST_S)
    return search(
        run.unit,
        space,
        run.solver,
        gap=gap,
        deadline=deadline,
        seeds=seeds,
        plain=options.method == "ilp",
        progress=options.progress,
    )


def _search_until(run: _Run) -> float:
    """A tenth of the time limit, or some seconds: of 60 random rigs all but one need less.

    That one needs minutes for the last percents of its bound.
    """
    if run.options.method == "ilp":
        return _limit(run)
    return min(_limit(run), max(run.by(1 / 10), run.start + SEARCH_S))


def _limit(run: _Run) -> float:
    """When no search goes on."""
    return run.by(SEARCH_SHARE if run.options.compare else 1.0, LEAST_S)


def _moves(run: _Run, space: Space, seconds: float) -> Assignment | None:
    """The best plan by moves over the configurations of least bound."""
    until = time.monotonic() + min(OPEN_S, run.options.time_limit_s / 4)
    configurations = space.best_first(run.unit, run.solver, until)
    first = next(configurations, None)  # which makes tables: no part of the time of moves
    rest = itertools.chain([first] if first else [], configurations)
    found = heuristic(run.unit, rest, time.monotonic() + seconds, first_choice)
    return to_assignment(run.unit, *found) if found else None


def _by_moves(run: _Run, space: Space) -> Plan | None:
    found = _moves(run, space, min(HEURISTIC_S, run.options.time_limit_s))
    if found is None:
        return None
    return _made(run, [found], space.bound, "heuristic")


def _made(
    run: _Run,
    candidates: Sequence[Assignment],
    bound: float,
    method: str,
    others: Sequence[Assignment] = (),
) -> Plan:
    """The plan of the candidate with the shortest run; of the first one without simulation.

    Or one of the `others`, should that be shorter after all.
    """
    best = _best_run(run, [*candidates, *others]) if run.options.simulate else candidates[0]
    best = min([best, *others], key=lambda one: _predicted(run, one).objective)
    predicted = bounded(_predicted(run, best), bound * run.times, run.seconds)
    return to_plan(run.problem, best, method, predicted)


def _best_run(run: _Run, candidates: Sequence[Assignment]) -> Assignment:
    """The candidate with the shortest run, with other sizes where they make it shorter."""
    runs = run.compared(run.by(CONFIRM_SHARE, LEAST_S), CONFIRM_S)
    return runs.improved(runs.best_of(candidates))


def _predicted(run: _Run, assignment: Assignment) -> Predicted:
    """Priced, and simulated where that is asked for."""

    def compute() -> Predicted:
        priced = evaluate(run.problem, assignment)
        return with_run(run.problem, assignment, priced) if run.options.simulate else priced

    key = run.options.simulate, assignment, run.problem.scale_of(assignment.configuration)
    return run.problem.cached(PREDICTED, key, compute)


def _plan_of(run: _Run, found: Search | None, others: Sequence[Assignment] = ()) -> Plan:
    """Ours, or one of the `others` where that one is faster: they are within the budget."""
    assert found is not None
    finalists = found.finalists[:FINALISTS]
    return _made(run, finalists, found.lower_bound, run.options.method, others)


def _rivals(outcomes: Sequence[Outcome]) -> list[Assignment]:
    """The other methods' plans within the budget."""
    return [o.assignment for o in outcomes if o.assignment is not None and o.within_budget]


def _no_plan(run: _Run, found: Search, offered: Sequence[str]) -> InfeasibleError:
    """Imports what explains it only here: where there is a plan, that would be start-up time."""
    from llmpq.planner.explain import lacks_memory
    from llmpq.planner.fixes import infeasible

    if found.timed_out and not lacks_memory(run.problem):
        return InfeasibleError(
            f"no plan was found within {run.seconds:.0f} s, which does not mean that none fits; "
            "give a longer --time-limit"
        )
    quick = Options(gap=0.05, time_limit_s=2.0, compare=False)
    return infeasible(run.problem, offered, lambda changed: replan(changed, quick))


# ---- the other methods


def _outcomes(
    run: _Run, space: Space, methods: Sequence[str], ours: Assignment | None = None
) -> list[Outcome]:
    total = space.num_configurations

    def told(done: int) -> None:
        run.options.progress(Progress(done, total, 0.0, "configurations by other methods"))

    now = time.monotonic()
    until = min(run.by(1.0, LEAST_S), now + max(OTHERS_S, 3 * run.seconds))
    configurations = space.configurations(run.unit, run.solver, now + (until - now) / 2)
    smallest = space.smallest(run.unit)
    found = run_baselines(run.unit, configurations, until, methods, smallest, told)
    return [*(_simulated(run, outcome, ours) for outcome in found), offloaded(flexgen(run.problem))]


def _simulated(run: _Run, outcome: Outcome, ours: Assignment | None) -> Outcome:
    """With its run simulated as that of our own plan.

    Its sizes are varied as those of `ours` are, unless it is above the budget or too far behind for
    that to matter.
    """
    if outcome.assignment is None:
        return outcome
    best = outcome.assignment
    if run.options.simulate:
        runs = run.compared(run.by(1.0, LEAST_S), CONFIRM_S / len(BASELINES))
        if ours is None or (outcome.within_budget and runs.is_rival(best, ours)):
            best = runs.improved(best)
    return replace(outcome, assignment=best, predicted=_predicted(run, best))


def _by_baseline(run: _Run, space: Space) -> tuple[Plan, list[Outcome]]:
    method = run.options.method
    outcomes = _outcomes(run, space, BASELINES if run.options.compare else [method])
    outcome = next(o for o in outcomes if o.method == method)
    plan = baseline_plan(run.problem, outcome, run.seconds)
    if plan is None:
        raise InfeasibleError(f"{method} has no plan that fits: {outcome.why_not}")
    return plan, outcomes


def baseline_plan(problem: Problem, outcome: Outcome, planning_s: float = 0.0) -> Plan | None:
    """A baseline's plan, to be written and run like ours."""
    if outcome.assignment is None or outcome.predicted is None:
        return None
    predicted = bounded(outcome.predicted, 0.0, planning_s)
    return to_plan(problem, outcome.assignment, outcome.method, predicted)


def _planned(
    run: _Run, space: Space, plan: Plan, outcomes: Sequence[Outcome], found: Search | None = None
) -> Planned:
    notes = [*space.notes, *run.solver.notes, *idle(plan)]
    effort = f"{space.num_configurations} configurations"
    if found is not None:
        notes += doubts(found, plan, run.options.gap, run.options.time_limit_s, SEARCH_S)
        effort += f", {found.num_relaxed} relaxed, {found.num_solved} solved in whole layers"
    return Planned(plan, tuple(outcomes), tuple(notes), effort)
