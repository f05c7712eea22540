"""One planning run: baselines, then our own search from the best of them, as values.

The time limit covers all: a quarter at most to list and bound the settings, then the baselines up
to a half of it (to three quarters where they have no plan yet), the rest is our own search's.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmpq.errors import InfeasibleError
from llmpq.plan import Baseline, Plan
from llmpq.planner.baselines import BASELINES, Outcome, run_baselines
from llmpq.planner.evaluate import bounded, to_plan
from llmpq.planner.explain import infeasible, lacks_memory
from llmpq.planner.problem import Problem
from llmpq.planner.search import Progress, Search, Space, make_settings, search

SETTINGS_SHARE, BASELINES_SHARE, FIRST_PLAN_SHARE = 1 / 4, 1 / 2, 3 / 4
LEAST_S = 0.5  # for the settings, and for a first plan, however short the time limit is
TIMED_OUT = "the time limit ended the search; a longer --time-limit may find better"
UNEQUAL = (
    "the gap is above the one asked for: the bound takes one device to be the slowest for all "
    "batches, but here it differs between batches of unequal size"
)


@dataclass(frozen=True)
class Options:
    """How to search."""

    method: str = "ilp"
    gap: float = 0.005
    time_limit_s: float = 60.0
    progress: Callable[[Progress], None] = lambda _: None


@dataclass(frozen=True)
class Planned:
    """The plan, what other methods would do, and what a reader should know."""

    plan: Plan
    outcomes: tuple[Outcome, ...] = ()
    notes: tuple[str, ...] = ()
    effort: str = ""


def make_plan(problem: Problem, options: Options, offered: Sequence[str]) -> Planned:
    """The best plan found; `InfeasibleError` where there is none. `offered`: all precisions."""
    start = time.monotonic()
    limit = options.time_limit_s
    built_by = start + max(LEAST_S, limit * SETTINGS_SHARE)
    space = make_settings(problem, built_by, options.progress)
    if not space.settings:
        raise infeasible(problem, offered)
    outcomes = _baselines(problem, space, start, options)
    if options.method in BASELINES:
        plan = _baseline_plan(problem, options.method, outcomes, start)
        return Planned(plan, tuple(outcomes), (*space.notes, *_idle(plan)))
    found = search(
        problem,
        space,
        gap=options.gap,
        deadline=start + limit,
        seeds=outcomes,
        progress=options.progress,
    )
    plan = _searched_plan(problem, found, offered, time.monotonic() - start)
    notes = [*space.notes, *_idle(plan), *_doubts(found, plan, options.gap)]
    effort = f"{found.num_settings} settings searched, {found.num_solved} solved exactly"
    return Planned(with_baselines(plan, outcomes), tuple(outcomes), tuple(notes), effort)


def _baselines(problem: Problem, space: Space, start: float, options: Options) -> list[Outcome]:
    now, limit = time.monotonic(), options.time_limit_s
    deadline = start + limit * BASELINES_SHARE
    last = max(now + LEAST_S, start + limit * FIRST_PLAN_SHARE)

    def told(done: int) -> None:
        options.progress(Progress(done, len(space.settings), 0.0, "settings by other methods"))

    return run_baselines(problem, space.settings, (deadline, last), BASELINES, told)


def _idle(plan: Plan) -> list[str]:
    """What the plan leaves out."""
    idle = Counter((device.type, device.node) for device in plan.cluster.devices())
    idle.subtract((stage.devices[0], stage.node) for stage in plan.stages)
    names = [f"{f'{n} x ' if n > 1 else ''}{d} on {node}" for (d, node), n in idle.items() if n > 0]
    why = "only slows the rest, or does not fit"
    return [f"left out: {', '.join(names)} ({why})"] if names else []


def baseline_plan(problem: Problem, outcome: Outcome, planning_s: float = 0.0) -> Plan | None:
    """A baseline's plan, to be written and run like ours."""
    if outcome.assignment is None or outcome.predicted is None:
        return None
    predicted = bounded(outcome.predicted, 0.0, planning_s)
    return to_plan(problem, outcome.assignment, outcome.method, predicted)


def with_baselines(plan: Plan, outcomes: Sequence[Outcome]) -> Plan:
    """The plan with the other methods' figures."""
    return plan.model_copy(update={"baselines": [_baseline(outcome) for outcome in outcomes]})


def _baseline(outcome: Outcome) -> Baseline:
    predicted = outcome.predicted
    return Baseline(
        method=outcome.method,
        feasible=outcome.feasible,
        tokens_per_s=predicted.tokens_per_s if predicted else None,
        quality_loss_percent=predicted.quality_loss_percent if predicted else None,
        why_not=outcome.why_not or None,
    )


def _baseline_plan(
    problem: Problem, method: str, outcomes: Sequence[Outcome], start: float
) -> Plan:
    outcome = next(o for o in outcomes if o.method == method)
    plan = baseline_plan(problem, outcome, time.monotonic() - start)
    if plan is None:
        raise InfeasibleError(f"{method} has no plan that fits: {outcome.why_not}")
    return with_baselines(plan, outcomes)


def _searched_plan(
    problem: Problem, found: Search, offered: Sequence[str], planning_s: float
) -> Plan:
    if found.assignment is not None and found.predicted is not None:
        predicted = bounded(found.predicted, found.lower_bound, planning_s)
        return to_plan(problem, found.assignment, "ilp", predicted)
    if found.timed_out and not lacks_memory(problem):
        raise InfeasibleError(
            f"no plan was found within {planning_s:.0f} s, which does not mean that none fits; "
            "give a longer --time-limit"
        )
    raise infeasible(problem, offered)


def _doubts(found: Search, plan: Plan, gap: float) -> list[str]:
    """What keeps the gap from being the one asked for."""
    if found.timed_out:
        return [TIMED_OUT]
    reached = plan.predicted.gap if plan.predicted else 0.0
    return [UNEQUAL] if reached > gap + 1e-6 else []
