"""The outer search: orders of the devices, requests in flight, micro-batches of both phases.

Every setting waits in one queue by its lower bound. The best one is taken: its bound is made
tighter (closed form, then linear relaxation) or, where it is the relaxation's already, its integer
programme is solved for plans that beat the best one by the gap. It ends where the best bound left
is within the gap of the best plan, or at the time limit; the bound it returns holds in either case
over all settings that were searched.

A plan may leave devices out: of up to `MAX_FREE` devices any, above that all equal devices of a
node or none of them (beyond `MAX_KINDS` kinds: one kind, or all kinds but one).
Up to `MAX_SINGLE` devices, every distinct order is searched; above, equal devices of a node stay
side by side; never more than `MAX_ORDERS` orders of all devices, and as many of fewer devices.
`Space.notes` says so. Settings that the time limit left out count in no bound: there is none then.
"""

import heapq
import itertools
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from llmpq.cluster import Device
from llmpq.plan import Predicted
from llmpq.planner.baselines import Outcome
from llmpq.planner.evaluate import evaluate
from llmpq.planner.ilp import relaxed_bound, solve
from llmpq.planner.problem import (
    Assignment,
    Instance,
    Problem,
    Setting,
    make_instance,
    to_assignment,
)

T = TypeVar("T")

MAX_FREE = 4
MAX_KINDS = 8
MAX_SINGLE = 6
MAX_ORDERS = 720
AUTO_BATCHES = (8, 16, 32, 64)


@dataclass(frozen=True)
class Progress:
    """How far a phase of the search is."""

    done: int
    total: int
    best_tokens_per_s: float
    phase: str = "settings"


@dataclass(frozen=True)
class Space:
    """The settings to search with their bounds (infinity: hopeless), the least bound first."""

    settings: list[Setting]
    bounds: list[float]
    num_left_out: int
    notes: list[str]


@dataclass
class Search:
    """The best plan so far and what is known about all others."""

    problem: Problem
    gap: float
    deadline: float
    assignment: Assignment | None = None
    predicted: Predicted | None = None
    lower_bound: float = math.inf
    num_settings: int = 0
    num_solved: int = 0
    dive_at: float = math.inf
    timed_out: bool = False

    @property
    def best(self) -> float:
        """The objective of the best plan so far."""
        return self.predicted.objective if self.predicted else math.inf

    @property
    def target(self) -> float:
        """What a plan must be below to be worth having."""
        return self.best * (1 - self.gap)

    @property
    def seconds_left(self) -> float:
        """Until the time limit."""
        return self.deadline - time.monotonic()

    def offer(self, assignment: Assignment) -> None:
        """Keeps an assignment if it is the best."""
        predicted = evaluate(self.problem, assignment)
        if predicted.objective < self.best:
            self.assignment, self.predicted = assignment, predicted


def search(
    problem: Problem,
    space: Space,
    *,
    gap: float,
    deadline: float,
    seeds: Sequence[Outcome] = (),
    progress: Callable[[Progress], None] = lambda _: None,
) -> Search:
    """The best assignment over all settings of a space. `seeds`: plans to start from."""
    state = Search(problem, gap, deadline, num_settings=len(space.settings))
    for seed in seeds:
        if seed.assignment is not None and seed.within_budget:
            state.offer(seed.assignment)
    queue = _queue(space)
    state.dive_at = time.monotonic() + state.seconds_left / 2
    while queue and queue[0][0] < state.target:
        if state.seconds_left <= 0:
            state.timed_out = True
            break
        _step(state, queue)
        progress(_progress(state, queue))
    still_open = min((entry[0] for entry in queue), default=math.inf)
    state.lower_bound = min(state.lower_bound, state.best, still_open)
    if space.num_left_out:
        state.lower_bound = 0.0
        state.timed_out = True
    return state


Entry = tuple[
    float, int, int, Setting, bool
]  # bound, tie-breakers, setting, is it the relaxation's


def _queue(space: Space) -> list[Entry]:
    """Sorted by bound, and so a heap."""
    pairs = enumerate(zip(space.bounds, space.settings, strict=True))
    return [(bound, 0, i, setting, False) for i, (bound, setting) in pairs if bound < math.inf]


def _step(state: Search, queue: list[Entry]) -> None:
    """Tightens or solves the setting of the least bound."""
    bound, _, index, setting, relaxed = heapq.heappop(queue)
    instance = make_instance(state.problem, setting)
    if not relaxed:
        bound = max(bound, relaxed_bound(instance, state.seconds_left))
        if bound < math.inf:
            heapq.heappush(queue, (bound, -1, index, setting, True))
        if time.monotonic() > state.dive_at:
            _dive(state, queue)
        return
    cutoff = state.target
    found = solve(instance, gap=state.gap / 2, time_limit=state.seconds_left, cutoff=cutoff)
    state.num_solved += 1
    if found.choice is not None:
        state.offer(to_assignment(state.problem, setting, found.choice))
    state.timed_out |= found.status in ("feasible", "unknown")
    closed = cutoff if found.status == "infeasible" else max(bound, min(found.bound, cutoff))
    state.lower_bound = min(state.lower_bound, closed)


def _dive(state: Search, queue: list[Entry]) -> None:
    """Half the time went into bounds: half of the rest looks for a plan where the bound is least.

    The setting stays in the queue: what the solver learned of its bound is not used.
    """
    relaxed = [entry for entry in queue if entry[4] and entry[0] < state.target]
    if relaxed:
        setting, limit = min(relaxed)[3], state.seconds_left / 2
        instance = make_instance(state.problem, setting)
        found = solve(instance, gap=state.gap, time_limit=limit, cutoff=state.target)
        if found.choice is not None:
            state.offer(to_assignment(state.problem, setting, found.choice))
    state.dive_at = time.monotonic() + state.seconds_left / 2


def _progress(state: Search, queue: list[Entry]) -> Progress:
    open_settings = sum(entry[0] < state.target for entry in queue)
    speed = state.predicted.tokens_per_s if state.predicted else 0.0
    return Progress(state.num_settings - open_settings, state.num_settings, speed)


def simple_bound(instance: Instance) -> float:
    """Seconds that no choice is below: every layer at its fastest, work spread without remainder.

    Layers c_j >= 0 with sum c_j = L and c_j t_j <= M give M >= L / sum_j 1 / t_j.
    """
    once = instance.layer.prefill_once.min() * instance.num_layers
    once += instance.fixed.prefill_once.sum() + instance.link.prefill_once
    loop = instance.layer.decode_once.min() * instance.num_layers
    loop += instance.fixed.decode_once.sum() + instance.link.decode_once
    rest = max(_spread(instance, instance.layer.prefill_rest), float(instance.link.prefill_rest))
    every = _spread(instance, instance.layer.decode_every)
    return float(once) + rest + max(float(loop), every, float(instance.link.decode_every))


def _spread(instance: Instance, seconds: np.ndarray) -> float:
    fastest = seconds.min(axis=1)
    return 0.0 if (fastest <= 0).any() else instance.num_layers / float((1 / fastest).sum())


def is_hopeless(instance: Instance) -> bool:
    """Memory: not even the smallest option lets all layers on the devices, one each at least."""
    if instance.num_layers < instance.num_devices:
        return True
    held = most_layers(instance)
    return bool((held < 1).any() or held.sum() < instance.num_layers)


def most_layers(instance: Instance) -> np.ndarray:
    """[N]: how many layers a device holds at its smallest option."""
    room = instance.capacity * (1 + 1e-9)
    plain = _held(instance, instance.available & ~instance.packed, room)
    packed = _held(instance, instance.available & instance.packed, room - instance.unpacked_bytes)
    return np.maximum(plain, packed)


def _held(instance: Instance, options: np.ndarray, room: np.ndarray) -> np.ndarray:
    least = np.where(options, instance.layer_bytes, np.inf).min(axis=1)
    return np.maximum(np.floor(room / least), 0.0)


# ---- what there is to search


def make_settings(
    problem: Problem,
    deadline: float = math.inf,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Space:
    """Every setting with its bound; those not reached by `deadline` (monotonic) are left out."""
    orders, notes = device_orders(problem.cluster.devices(), problem.spec.num_layers)
    settings = all_settings(problem, orders)
    random.Random(0).shuffle(settings)  # so that those left out are of all kinds
    built: list[tuple[float, Setting]] = []
    for setting in settings:
        if time.monotonic() > deadline:
            break
        built.append((bound_of(make_instance(problem, setting)), setting))
        if len(built) % 256 == 1:
            progress(Progress(len(built), len(settings), 0.0, "settings priced"))
    built.sort(key=lambda pair: pair[0])
    missed = len(settings) - len(built)
    if missed:
        notes.append(f"the time limit left {missed} of {len(settings)} settings out of the search")
    return Space([s for _, s in built], [bound for bound, _ in built], missed, notes)


def bound_of(instance: Instance) -> float:
    """The simple bound; infinity where memory is hopeless."""
    return math.inf if is_hopeless(instance) else simple_bound(instance)


def all_settings(problem: Problem, orders: Sequence[tuple[Device, ...]]) -> list[Setting]:
    """Every order with every batch and micro-batch."""
    return [
        Setting(order, batch, prefill, decode)
        for batch in batch_options(problem)
        for order in orders
        for prefill in micro_batch_options(batch)
        for decode in micro_batch_options(batch)
    ]


def batch_options(problem: Problem) -> list[int]:
    """Requests in flight that are tried."""
    count = len(problem.lengths)
    if problem.workload.batch != "auto":
        return [min(problem.workload.batch, count)]
    return sorted({min(batch, count) for batch in AUTO_BATCHES})


def micro_batch_options(batch: int) -> list[int]:
    """Powers of two up to the batch, and the batch itself."""
    return sorted({2**k for k in range(batch.bit_length()) if 2**k <= batch} | {batch})


def device_orders(
    devices: Sequence[Device], most: int = sys.maxsize
) -> tuple[list[tuple[Device, ...]], list[str]]:
    """Distinct orders of at most `most` devices, the most devices first, and what was left out."""
    parts = [part for part in device_subsets(devices) if part.total() <= most]
    if not parts:
        return [], []
    whole = _orders(parts[0])
    found = list(itertools.islice(whole, MAX_ORDERS))
    cut = next(whole, None) is not None
    fewer = _in_turn([_orders(part) for part in parts[1:]])
    found += sorted(itertools.islice(fewer, MAX_ORDERS), key=len, reverse=True)
    cut |= next(fewer, None) is not None
    notes = [f"only {len(found)} orders of the devices were searched"] if cut else []
    if parts[0].total() > MAX_SINGLE:
        notes.append("equal devices of a node are kept side by side: other orders not searched")
    if len(devices) > MAX_FREE and len(set(devices)) < len(devices):
        notes.append("plans that use only some of a node's equal devices were not searched")
    return found, notes


def device_subsets(devices: Sequence[Device]) -> list[Counter[Device]]:
    """What devices a plan may use, the most first: see the module's text."""
    groups = Counter(devices)
    if len(devices) <= MAX_FREE:
        counts = itertools.product(*(range(count + 1) for count in groups.values()))
        parts = [Counter(dict(zip(groups, count, strict=True))) for count in counts]
    else:
        kinds = len(groups)
        sizes = range(1, kinds + 1) if kinds <= MAX_KINDS else (1, kinds - 1, kinds)
        kept = itertools.chain.from_iterable(itertools.combinations(groups, n) for n in sizes)
        parts = [Counter({device: groups[device] for device in some}) for some in kept]
    return sorted((p for p in parts if p.total()), key=lambda p: p.total(), reverse=True)


def _orders(part: Counter[Device]) -> Iterator[tuple[Device, ...]]:
    """Distinct permutations; of many devices, those that keep equal ones side by side."""
    if part.total() <= MAX_SINGLE:
        return _distinct(Counter(part), part.total())
    permutations = itertools.permutations(device for device, count in part.items() if count)
    return (tuple(d for group in order for d in [group] * part[group]) for order in permutations)


def _in_turn(sources: list[Iterator[T]]) -> Iterator[T]:
    """One of each source, then the next of each."""
    while sources:
        left = []
        for source in sources:
            for item in itertools.islice(source, 1):
                left.append(source)
                yield item
        sources = left


def _distinct(left: Counter[Device], length: int) -> Iterator[tuple[Device, ...]]:
    """Permutations of a multiset."""
    if length == 0:
        yield ()
    for device in [d for d, count in left.items() if count]:
        left[device] -= 1
        for rest in _distinct(left, length - 1):
            yield (device, *rest)
        left[device] += 1
