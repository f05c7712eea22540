"""What other methods would do with the same machines, the same costs and the same search.

uniform: equal layer counts, one precision. pipeedge: one precision, the contiguous partition whose
busiest stage is least busy. adabits: the least summed sensitivity that memory allows, and of those
partitions the one whose busiest stage is least busy. A stage's busy time is the seconds it computes
over the whole workload. Each is tried at every order, batch and micro-batch that our own search
tries, those that leave devices out included. Of a method's plans the fastest within the quality
budget counts; where none is within, the one that loses least quality. With a theta there is no
budget: the least total + theta * omega.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmpq.cluster import MIB
from llmpq.plan import Predicted
from llmpq.planner.evaluate import evaluate
from llmpq.planner.partition import Fronts, least_bottleneck, least_sum, range_lengths
from llmpq.planner.problem import (
    Assignment,
    Choice,
    Instance,
    Problem,
    Setting,
    fits,
    make_instance,
    objective,
    sum_omega,
    to_assignment,
)

BASELINES = ("uniform", "pipeedge", "adabits")
OVER = 1 + 1e-9  # rounding of sums of sensitivities

Proposals = Iterator[tuple[Choice, str]]  # choices, and the precision (or "") each stands for


@dataclass(frozen=True)
class Outcome:
    """A method's best plan, or why it has none."""

    method: str
    assignment: Assignment | None
    predicted: Predicted | None
    within_budget: bool
    why_not: str

    @property
    def feasible(self) -> bool:
        """There is a plan that fits."""
        return self.assignment is not None


@dataclass
class _Best:
    """The best proposal so far of one method."""

    rank: tuple[float, ...] = (np.inf,)
    setting: Setting | None = None
    choice: Choice | None = None
    fitting: set[str] = field(default_factory=set)
    short: dict[str, tuple[float, str]] = field(default_factory=dict)


def run_baselines(
    problem: Problem,
    settings: Sequence[Setting],
    deadlines: tuple[float, float],
    methods: Sequence[str],
    progress: Callable[[int], None] = lambda _: None,
) -> list[Outcome]:
    """Every method's outcome. Stops at the first of `deadlines` (`time.monotonic`) once any plan
    is within the budget, at the second in any case."""
    best = {method: _Best() for method in methods}
    fronts = FrontCache()
    tried = 0
    for setting in settings:
        found = any(state.rank[0] == 0 for state in best.values())
        if time.monotonic() > deadlines[0 if found else 1]:
            break
        instance = make_instance(problem, setting)
        for method, state in best.items():
            _try(problem, setting, instance, method, state, fronts)
        tried += 1
        progress(tried)
    partial = f"only {tried} of {len(settings)} settings tried" if tried < len(settings) else ""
    return [_outcome(problem, method, state, partial) for method, state in best.items()]


def least_omega(problem: Problem, settings: Sequence[Setting]) -> float:
    """The least summed sensitivity that memory allows at any setting; infinity: nothing fits."""
    fronts = FrontCache()
    costs = (adabits_ranges(make_instance(problem, s), fronts).omega for s in settings)
    return min((least_sum(cost)[0] for cost in costs), default=np.inf)


def _try(
    problem: Problem,
    setting: Setting,
    instance: Instance,
    method: str,
    state: _Best,
    fronts: "FrontCache",
) -> None:
    if instance.num_layers < instance.num_devices:
        return
    for choice, precision in proposals(problem, instance, method, fronts):
        if not fits(instance, choice):
            _note_shortage(problem, setting, instance, choice, precision, state)
            continue
        state.fitting.add(precision)
        rank = rank_of(instance, choice)
        if rank < state.rank:
            state.rank, state.setting, state.choice = rank, setting, choice


def rank_of(instance: Instance, choice: Choice) -> tuple[float, ...]:
    """Smaller is better: within the budget the objective counts, above it the sensitivity."""
    omega, value = sum_omega(instance, choice), objective(instance, choice)
    return (0.0, value) if omega <= instance.budget * OVER else (1.0, omega, value)


def proposals(problem: Problem, instance: Instance, method: str, fronts: "FrontCache") -> Proposals:
    """The choices of a method at one setting; those that do not fit are proposed too."""
    if method == "adabits":
        choice = adabits(instance, fronts)
        if choice is not None:
            yield choice, ""
        return
    make: Callable[[Instance, int], Choice] = uniform if method == "uniform" else pipeedge
    for option, precision in enumerate(problem.precisions):
        if instance.available[:, option].all():
            yield make(instance, option), precision


def uniform(instance: Instance, option: int) -> Choice:
    """Equal layer counts; what remains goes to the first stages."""
    share, rest = divmod(instance.num_layers, instance.num_devices)
    return tuple((option,) * (share + (j < rest)) for j in range(instance.num_devices))


def pipeedge(instance: Instance, option: int) -> Choice:
    """One precision, least busy bottleneck; where memory allows no partition, disregarding it."""
    lengths = range_lengths(instance.num_layers)[None]
    busy = instance.busy[:, option, None, None] * lengths + instance.fixed_busy[:, None, None]
    busy = np.where(lengths > 0, busy, np.inf)
    used = lengths * instance.layer_bytes[option]
    used = used + instance.unpacked_bytes * instance.packed[option]
    fitting = np.where(used <= instance.capacity[:, None, None], busy, np.inf)
    worst, ends = least_bottleneck(fitting)
    if not np.isfinite(worst):
        _, ends = least_bottleneck(
            np.where(lengths > 0, used - instance.capacity[:, None, None], np.inf)
        )
    starts = [0, *ends[:-1]]
    return tuple((option,) * (e - a) for a, e in zip(starts, ends, strict=True))


# ---- adabits


@dataclass(frozen=True)
class Ranges:
    """For every device and range of layers: least omega, its busy time, and how to get it."""

    omega: np.ndarray  # [N, L + 1, L + 1]
    busy: np.ndarray
    sources: tuple["DeviceRanges", ...]


@dataclass(frozen=True)
class DeviceRanges:
    """The least omega of every range on a device of some capacity."""

    omega: np.ndarray  # [L + 1, L + 1]
    counts: np.ndarray  # [L + 1, L + 1, B]
    choices: dict[tuple[int, int], tuple[Fronts, int]]


class FrontCache:
    """Fronts and ranges that settings share: they depend on options and capacity alone."""

    def __init__(self) -> None:
        self._fronts: dict[bytes, Fronts] = {}
        self._ranges: dict[tuple[bytes, float, float], DeviceRanges] = {}

    def fronts(self, instance: Instance, mask: np.ndarray) -> Fronts:
        """The fronts of a mask of options."""
        key = mask.tobytes()
        if key not in self._fronts:
            self._fronts[key] = Fronts(instance, mask)
        return self._fronts[key]

    def ranges(self, instance: Instance, rank: int) -> DeviceRanges:
        """The least omega of every range on one device."""
        mask = instance.available[rank]
        capacity = float(instance.capacity[rank])
        key = (mask.tobytes(), capacity, float(instance.layer_bytes.sum()))
        if key not in self._ranges:
            self._ranges[key] = _device_ranges(self, instance, mask, capacity)
        return self._ranges[key]


def adabits(instance: Instance, fronts: FrontCache) -> Choice | None:
    """Least sensitivity under memory, then the least busy bottleneck."""
    ranges = adabits_ranges(instance, fronts)
    least, on_way = least_sum(ranges.omega)
    if not np.isfinite(least):
        return None
    _, ends = least_bottleneck(np.where(on_way, ranges.busy, np.inf))
    starts = [0, *ends[:-1]]
    cuts = zip(ranges.sources, starts, ends, strict=True)
    return tuple(_range_choice(source, a, e) for source, a, e in cuts)


def adabits_ranges(instance: Instance, fronts: FrontCache) -> Ranges:
    """The ranges of every device."""
    sources = tuple(fronts.ranges(instance, j) for j in range(instance.num_devices))
    per_layer = np.where(instance.available, instance.busy, 0.0)
    busy = [s.counts @ per_layer[j] + instance.fixed_busy[j] for j, s in enumerate(sources)]
    return Ranges(np.stack([s.omega for s in sources]), np.stack(busy), sources)


def _device_ranges(
    cache: FrontCache, instance: Instance, mask: np.ndarray, capacity: float
) -> DeviceRanges:
    width = instance.num_layers + 1
    found = DeviceRanges(
        np.full((width, width), np.inf), np.zeros((width, width, instance.num_options)), {}
    )
    plain = mask & ~instance.packed
    for options, room in ((plain, capacity), (mask, capacity - instance.unpacked_bytes)):
        if options.any():
            _improve(found, cache.fronts(instance, options), instance, room)
    return found


def _improve(found: DeviceRanges, fronts: Fronts, instance: Instance, room: float) -> None:
    least = float(instance.layer_bytes[fronts.options].min())
    for start in range(instance.num_layers):
        for end in range(start + 1, instance.num_layers + 1):
            slack = room - (end - start) * least
            if slack < 0:
                break
            front = fronts.front(start, end)
            point = front.best(slack)
            if front.omega[point] < found.omega[start, end]:
                found.omega[start, end] = front.omega[point]
                found.counts[start, end] = front.counts[point]
                found.choices[start, end] = fronts, point


def _range_choice(source: DeviceRanges, start: int, end: int) -> tuple[int, ...]:
    fronts, point = source.choices[start, end]
    return fronts.choice(start, end, point)


# ---- what came of it


def shortage(instance: Instance, choice: Choice) -> np.ndarray:
    """[N]: bytes short on each device (negative: to spare)."""
    used = [sum(instance.layer_bytes[o] for o in stage) for stage in choice]
    unpacked = [instance.unpacked_bytes * any(instance.packed[o] for o in s) for s in choice]
    return np.array(used) + unpacked - instance.capacity


def _note_shortage(
    problem: Problem,
    setting: Setting,
    instance: Instance,
    choice: Choice,
    precision: str,
    state: _Best,
) -> None:
    short = shortage(instance, choice)
    worst = int(short.argmax())
    name = f"{setting.devices[worst].type}#{worst}"
    if precision not in state.short or short[worst] < state.short[precision][0]:
        state.short[precision] = float(short[worst]), name


def _outcome(problem: Problem, method: str, state: _Best, partial: str) -> Outcome:
    notes = [_shortage_text(p, *state.short[p]) for p in state.short if p not in state.fitting]
    if state.setting is None or state.choice is None:
        why = "; ".join([*notes, partial]).strip("; ") or "no precisions fit the memory"
        return Outcome(method, None, None, False, why)
    assignment = to_assignment(problem, state.setting, state.choice)
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
