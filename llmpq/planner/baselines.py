"""What other methods would do with the same machines, the same costs and the same search.

uniform: equal layer counts, one precision. pipeedge: one precision, the contiguous partition whose
busiest stage is least busy. adabits: the least summed sensitivity that memory allows, and of those
partitions the one whose busiest stage is least busy. A stage's busy time is the seconds it computes
over the whole workload. Each is tried at the orders, batches and micro-batches of our own search,
those that leave devices out included, the most promising first. Of a method's plans the fastest
within the quality budget counts; where none is within, the one that loses least quality. With a
theta there is no budget: the least total + theta * omega.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from llmpq.cluster import MIB
from llmpq.errors import UserError
from llmpq.plan_data import Baseline, Plan, Predicted
from llmpq.planner.adabits import FrontCache, adabits, adabits_ranges
from llmpq.planner.evaluate import evaluate
from llmpq.planner.instance import Instance, make_instance
from llmpq.planner.layer_options import places_at
from llmpq.planner.partition import least_bottleneck, least_sum, of_ranges, range_lengths
from llmpq.planner.problem import OVER, Assignment, Configuration, Problem
from llmpq.planner.value import (
    Choice,
    count_options,
    fits,
    objective,
    shortage,
    sum_omega,
    to_assignment,
)

if TYPE_CHECKING:
    from llmpq.planner.flexgen import OffloadPlan

PATIENCE = 80  # configurations, the most promising first
NO_PLAN_PATIENCE = 160

# Choices, and the precision (or "") each stands for. Every stage holds layers, and every layer has
# an option that its stage's devices offer; whether a choice fits the memory is checked outside.
Proposals = Iterator[tuple[Choice, str]]
Proposer = Callable[[Problem, Instance, FrontCache], Proposals]  # of a method, at one configuration


@dataclass(frozen=True)
class Outcome:
    """A method's best plan, or why it has none."""

    method: str
    assignment: Assignment | None
    predicted: Predicted | None
    within_budget: bool
    why_not: str
    offload: "OffloadPlan | None" = None

    @property
    def feasible(self) -> bool:
        """There is a plan that fits."""
        return self.assignment is not None or self.offload is not None


@dataclass
class _Best:
    """The best proposal so far of one method."""

    rank: tuple[float, ...] = (np.inf,)
    configuration: Configuration | None = None
    choice: Choice | None = None
    found_at: int = 0  # configurations that were tried before
    fitting: set[str] = field(default_factory=set)
    short: dict[str, tuple[float, str]] = field(default_factory=dict)

    @property
    def patience(self) -> int:
        """How many configurations may bring nothing better: more while none keeps the budget."""
        return PATIENCE if self.rank[0] == 0.0 else NO_PLAN_PATIENCE

    @property
    def worth(self) -> float:
        """Below it a plan would be better."""
        return self.rank[1] if self.rank[0] == 0.0 else np.inf


def run_baselines(
    problem: Problem,
    configurations: Iterable[tuple[float, Configuration]],
    deadline: float,
    methods: Sequence[str],
    smallest: Sequence[Configuration] = (),
    progress: Callable[[int], None] = lambda _: None,
) -> list[Outcome]:
    """Every method's outcome.

    `configurations` come with a bound that no plan is below, the least first: where it is above a
    method's plan, or `PATIENCE` configurations have brought it nothing better, that method is done.
    All stop at `deadline` (`time.monotonic`). What is short is told of the `smallest`
    configurations where there are no others. Raises `UserError` for a method that is not in
    `PROPOSERS`.
    """
    best = {known_method(method): _Best() for method in methods}
    fronts = FrontCache()
    partial = ""
    for tried, (bound, configuration) in enumerate(configurations):
        states = ((method, best[method]) for method in methods)
        left = [m for m, one in states if bound < one.worth and tried < one.found_at + one.patience]
        if not left:
            break
        if time.monotonic() > deadline:
            partial = f"the time limit ended it after {tried} configurations"
            break
        instance = make_instance(problem, configuration)
        for method in left:
            before = best[method].rank
            _try(problem, configuration, instance, method, best[method], fronts)
            if best[method].rank < before:
                best[method].found_at = tried
        progress(tried)
    for method, state in best.items():
        for configuration in smallest if not (state.short or state.configuration) else ():
            _try(
                problem, configuration, make_instance(problem, configuration), method, state, fronts
            )
    return [_outcome(problem, method, state, partial) for method, state in best.items()]


def least_omega(problem: Problem, configurations: Sequence[Configuration]) -> float:
    """The least summed sensitivity that memory allows at any configuration;

    infinity: nothing fits.
    """
    fronts = FrontCache()
    costs = (adabits_ranges(make_instance(problem, s), fronts).omega for s in configurations)
    return min((least_sum(cost)[0] for cost in costs), default=np.inf)


def _try(
    problem: Problem,
    configuration: Configuration,
    instance: Instance,
    method: str,
    state: _Best,
    fronts: FrontCache,
) -> None:
    if instance.num_layers < instance.num_stages:
        return
    for choice, precision in PROPOSERS[method](problem, instance, fronts):
        assert is_whole(instance, choice), (
            f"not an option on offer for every layer: {method}, {choice}"
        )
        if not fits(instance, choice):
            _note_shortage(configuration, instance, choice, precision, state)
            continue
        state.fitting.add(precision)
        rank = rank_of(instance, choice)
        if rank < state.rank:
            state.rank, state.configuration, state.choice = rank, configuration, choice


def rank_of(instance: Instance, choice: Choice) -> tuple[float, ...]:
    """Smaller is better: within the budget the objective counts, above it the sensitivity."""
    omega, value = sum_omega(instance, choice), objective(instance, choice)
    return (0.0, value) if omega <= instance.budget * OVER else (1.0, omega, value)


def is_whole(instance: Instance, choice: Choice) -> bool:
    """Every stage holds layers, and every layer has one option that its devices offer."""
    counts = [len(stage) for stage in choice]
    if len(counts) != instance.num_stages or sum(counts) != instance.num_layers:
        return False
    if not np.isfinite(sum_omega(instance, choice)):  # an option of another kind of layers
        return False
    return all(counts) and not count_options(instance, choice)[~instance.available].any()


def known_method(method: str) -> str:
    """The name of a method that there is; raises `UserError` for any other."""
    if method not in PROPOSERS:
        raise UserError(f"unknown method '{method}'; known: {', '.join(PROPOSERS)}")
    return method


def _of_each_precision(make: Callable[[Instance, Sequence[int]], Choice]) -> Proposer:
    """Proposes one choice for each precision that every stage has; also those that do not fit."""

    def propose(problem: Problem, instance: Instance, fronts: FrontCache) -> Proposals:
        for precision in problem.precisions:
            options = places_at(problem, precision)
            if instance.available[:, options].all():
                yield make(instance, options), precision

    return propose


def _least_sensitive(problem: Problem, instance: Instance, fronts: FrontCache) -> Proposals:
    choice = adabits(instance, fronts)
    if choice is not None:
        yield choice, ""


def uniform(instance: Instance, options: Sequence[int]) -> Choice:
    """Equal layer counts; what remains goes to the first stages. `options`: of every layer."""
    share, rest = divmod(instance.num_layers, instance.num_stages)
    ends = np.cumsum([share + (j < rest) for j in range(instance.num_stages)])
    return _cut(options, ends.tolist())


def _cut(options: Sequence[int], ends: Sequence[int]) -> Choice:
    """The options of every layer, stage by stage."""
    return tuple(tuple(options[a:e]) for a, e in zip([0, *ends[:-1]], ends, strict=True))


def pipeedge(instance: Instance, options: Sequence[int]) -> Choice:
    """One precision, least busy bottleneck; where memory allows no partition, disregarding it."""
    some = range_lengths(instance.num_layers)[None] > 0
    busy = of_ranges(instance.layer.busy[:, options]) + instance.fixed.busy[:, None, None]
    busy = np.where(some, busy, np.inf)
    used = of_ranges(instance.layer_bytes[:, options])
    packed = of_ranges(instance.packed[None, options].astype(float)) > 0
    used = used + instance.unpacked_bytes[:, None, None] * packed
    fitting = np.where(used <= instance.capacity[:, None, None], busy, np.inf)
    worst, ends = least_bottleneck(fitting)
    if not np.isfinite(worst):
        _, ends = least_bottleneck(np.where(some, used - instance.capacity[:, None, None], np.inf))
    return _cut(options, ends)


# ---- what came of it


def _note_shortage(
    configuration: Configuration,
    instance: Instance,
    choice: Choice,
    precision: str,
    state: _Best,
) -> None:
    short = shortage(instance, count_options(instance, choice))
    worst = int(short.argmax())
    name = f"{configuration.stage_devices[worst].type}#{worst}"
    if precision not in state.short or short[worst] < state.short[precision][0]:
        state.short[precision] = float(short[worst]), name


def _outcome(problem: Problem, method: str, state: _Best, partial: str) -> Outcome:
    notes = [_shortage_text(p, *state.short[p]) for p in state.short if p not in state.fitting]
    if state.configuration is None or state.choice is None:
        why = "; ".join([*notes, partial]).strip("; ") or "no precisions fit the memory"
        return Outcome(method, None, None, False, why)
    assignment = to_assignment(problem, state.configuration, state.choice)
    within = state.rank[0] == 0.0
    notes += [] if within else ["over the quality budget"]
    why = "; ".join(note for note in [*notes, partial] if note)
    return Outcome(method, assignment, evaluate(problem, assignment), within, why)


def _shortage_text(precision: str, num_bytes: float, device: str) -> str:
    return f"{in_bits(precision)}: {amount(num_bytes)} short on {device}"


def in_bits(precision: str) -> str:
    """A precision as people say it."""
    return f"{precision} bits" if precision.isdigit() else precision


def amount(num_bytes: float) -> str:
    """Bytes as MiB or GiB."""
    mib = num_bytes / MIB
    return f"{mib / 1024:.2f} GiB" if mib >= 1024 else f"{mib:.2f} MiB"


def offloaded(plan: "OffloadPlan | None") -> Outcome:
    """Off-loading as a row beside the others; it has no plan file."""
    if plan is None:
        return Outcome("flexgen", None, None, False, "no precision keeps the quality budget")
    if not plan.feasible:
        return Outcome("flexgen", None, None, False, plan.why_not)
    return Outcome("flexgen", None, None, True, "", offload=plan)


def with_baselines(plan: Plan, outcomes: Sequence[Outcome]) -> Plan:
    """The plan with the other methods' figures."""
    return plan.model_copy(update={"baselines": [_baseline(outcome) for outcome in outcomes]})


def _baseline(outcome: Outcome) -> Baseline:
    figures = outcome.offload or outcome.predicted
    return Baseline(
        method=outcome.method,
        feasible=outcome.feasible,
        tokens_per_s=figures.tokens_per_s if figures else None,
        quality_loss_percent=figures.quality_loss_percent if figures else None,
        why_not=outcome.why_not or None,
    )


# ---- the methods by name

PROPOSERS: dict[str, Proposer] = {
    "uniform": _of_each_precision(uniform),
    "pipeedge": _of_each_precision(pipeedge),
    "adabits": _least_sensitive,
}
BASELINES = tuple(PROPOSERS)
