"""The outer search: orders of the devices, requests in flight, micro-batches of both phases.

Every setting waits in one queue by its lower bound. The best one is taken: its bound is made
tighter (closed form, then linear relaxation) or, where it is the relaxation's already, its integer
programme is solved for plans that beat the best one by the gap. It ends where the best bound left
is within the gap of the best plan, or at the time limit; the bound it returns holds in either case
over all settings that were searched.

Up to `MAX_SINGLE` devices, every distinct order is searched; above, equal devices of a node stay
side by side; never more than `MAX_ORDERS` orders. `Search.notes` says so.
"""

import heapq
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

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

MAX_SINGLE = 6
MAX_ORDERS = 720
AUTO_BATCHES = (8, 16, 32, 64)


@dataclass(frozen=True)
class Progress:
    """How far a search is."""

    done: int
    total: int
    best_tokens_per_s: float


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
    timed_out: bool = False
    notes: list[str] = field(default_factory=list)

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
    settings: Sequence[Setting],
    *,
    gap: float,
    deadline: float,
    seeds: Sequence[Outcome] = (),
    progress: Callable[[Progress], None] = lambda _: None,
) -> Search:
    """The best assignment over all settings. `seeds`: plans to start from."""
    state = Search(problem, gap, deadline, num_settings=len(settings))
    for seed in seeds:
        if seed.assignment is not None and seed.within_budget:
            state.offer(seed.assignment)
    queue = _queue(problem, settings)
    while queue and queue[0][0] < state.target:
        if state.seconds_left <= 0:
            state.timed_out = True
            break
        _step(state, queue)
        progress(_progress(state, queue))
    still_open = min((entry[0] for entry in queue), default=math.inf)
    state.lower_bound = min(state.lower_bound, state.best, still_open)
    return state


Entry = tuple[
    float, int, int, Setting, bool
]  # bound, tie-breakers, setting, is it the relaxation's


def _queue(problem: Problem, settings: Sequence[Setting]) -> list[Entry]:
    queue: list[Entry] = []
    for index, setting in enumerate(settings):
        instance = make_instance(problem, setting)
        if not is_hopeless(instance):
            queue.append((simple_bound(instance), 0, index, setting, False))
    heapq.heapify(queue)
    return queue


def _step(state: Search, queue: list[Entry]) -> None:
    """Tightens or solves the setting of the least bound."""
    bound, _, index, setting, relaxed = heapq.heappop(queue)
    instance = make_instance(state.problem, setting)
    if not relaxed:
        bound = max(bound, relaxed_bound(instance, state.seconds_left))
        if bound < math.inf:
            heapq.heappush(queue, (bound, -1, index, setting, True))
        return
    cutoff = state.target
    found = solve(instance, gap=state.gap / 2, time_limit=state.seconds_left, cutoff=cutoff)
    state.num_solved += 1
    if found.choice is not None:
        state.offer(to_assignment(state.problem, setting, found.choice))
    state.timed_out |= found.status in ("feasible", "unknown")
    closed = cutoff if found.status == "infeasible" else max(bound, min(found.bound, cutoff))
    state.lower_bound = min(state.lower_bound, closed)


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


def make_settings(problem: Problem) -> tuple[list[Setting], list[str]]:
    """Every setting, the most promising first, and notes on what was left out."""
    orders, notes = device_orders(problem.cluster.devices())
    settings = all_settings(problem, orders)
    settings.sort(key=lambda setting: simple_bound(make_instance(problem, setting)))
    return settings, notes


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


def device_orders(devices: Sequence[Device]) -> tuple[list[tuple[Device, ...]], list[str]]:
    """Distinct orders of the devices, and a note where some are left out."""
    if len(devices) <= MAX_SINGLE:
        return list(_distinct(Counter(devices), len(devices))), []
    groups = Counter(devices)
    notes = ["equal devices of a node are kept side by side: other orders were not searched"]
    permutations = itertools.permutations(groups)
    orders = list(itertools.islice(permutations, MAX_ORDERS))
    if next(permutations, None) is not None:
        notes.append(f"only the first {MAX_ORDERS} orders of the device groups were searched")
    return [tuple(d for group in order for d in [group] * groups[group]) for order in orders], notes


def _distinct(left: Counter[Device], length: int) -> Iterator[tuple[Device, ...]]:
    """Permutations of a multiset."""
    if length == 0:
        yield ()
    for device in [d for d, count in left.items() if count]:
        left[device] -= 1
        for rest in _distinct(left, length - 1):
            yield (device, *rest)
        left[device] += 1
