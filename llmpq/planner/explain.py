"""Why nothing fits: what is short, where and by how much.

What is short is said of the cheapest configuration: the lowest precision, the fewest requests in
flight, micro-batches of one, the best chunk of a prompt, the best order. Where memory would do and
the quality budget does not, the least loss that memory allows is named.

`may_fit` is the quick question below it all: has some layout room for all layers within the budget?
It looks at memory and sensitivity alone, at `NUM_PRICED` configurations at most where there is a
budget, and plans nothing.

Not covered: what would help (`fixes`).
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from itertools import islice

import numpy as np

from llmpq.costs import memory
from llmpq.model_spec import tensor_parallel_degrees
from llmpq.planner.baselines import amount, in_bits, least_omega
from llmpq.planner.instance import capacity, layer_bytes, most_room, unpacked_bytes
from llmpq.planner.layer_options import offers, options_of, places_at
from llmpq.planner.layouts import DeviceSubset, canonical, ends, subsets
from llmpq.planner.problem import OVER, Configuration, Problem
from llmpq.planner.sizes import batch_options, chunk_options
from llmpq.planner.tables import Table

LEAST_LAYERS: Table[tuple[Hashable, ...], list[tuple[str, int, int]]] = Table()

NUM_PRICED = 16  # configurations, of those with most room, that are looked at closely


def why(problem: Problem) -> str:
    """What is short, and by how much, without any change that would help."""
    if not roomiest_subsets(problem):
        return _too_few_layers(problem)
    if lacks_memory(problem):
        return _memory_text(problem)
    if may_fit(problem):
        return "no plan was found, though there is room for one within the quality budget"
    return _quality_text(problem)


def lacks_memory(problem: Problem) -> bool:
    """Not even the cheapest configurations have room for all layers."""
    return next(_roomy_configurations(problem), None) is None


def may_fit(problem: Problem) -> bool:
    """Some configuration has room for all layers within the quality budget."""
    if math.isinf(problem.budget):
        return not lacks_memory(problem)
    return _least_omega(problem) <= problem.budget * OVER


def _least_omega(problem: Problem) -> float:
    """The least summed sensitivity that memory allows; infinity where it allows no plan."""
    return least_omega(problem, list(islice(_roomy_configurations(problem), NUM_PRICED)))


def roomiest_subsets(problem: Problem) -> list[DeviceSubset]:
    """Choices of devices, those with most room first. Rehearsed devices run one a stage."""
    degrees = tensor_parallel_degrees(problem.spec, problem.max_tensor_parallel)
    found, _ = subsets(problem.cluster, degrees, problem.spec.num_layers)
    alone = problem.cluster.rehearse
    some = [m for m in found if all(p.tensor_parallel == 1 or p.type not in alone for p, _ in m)]
    return sorted(some, key=lambda subset: -_room_between(problem, subset))


def _cheapest_configurations(problem: Problem, subset: DeviceSubset) -> Iterator[Configuration]:
    """The fewest requests in flight, micro-batches of 1; an order for each first and last stage.

    Each with every chunk.

    Other orders between the same ends need the same memory. (Messages of larger micro-batches have
    fewer headers: for models a few dozen wide, that can outweigh what their computing takes.)
    """
    for first, last in ends(problem.cluster, subset):
        for sizes in _cheapest_sizes(problem):
            yield Configuration(canonical(subset, first, last), *sizes)


def _cheapest_sizes(problem: Problem) -> list[tuple[int, int, int, int]]:
    """The fewest requests in flight, micro-batches of 1, and each chunk."""
    return [(min(batch_options(problem)), 1, 1, chunk) for chunk in chunk_options(problem)]


def _roomy_configurations(problem: Problem) -> Iterator[Configuration]:
    """Cheapest configurations with room for all layers, about those with most room first."""
    for subset in roomiest_subsets(problem):
        if _room_between(problem, subset) < problem.spec.num_layers:
            return
        for configuration in _cheapest_configurations(problem, subset):
            held = _layers_held(problem, configuration)
            if held.min() >= 1 and held.sum() >= problem.spec.num_layers:
                yield configuration


def _room_between(problem: Problem, subset: DeviceSubset) -> int:
    """Layers that a subset holds if ends and messages take nothing; 0 where a stage holds none."""
    most = 0
    for sizes in _cheapest_sizes(problem):
        held = [
            (_held_between(problem, Configuration((devices,) * 3, *sizes)), n)
            for devices, n in subset
        ]
        if min(n for n, _ in held) >= 1:
            most = max(most, sum(n * count for n, count in held))
    return most


def _held_between(problem: Problem, configuration: Configuration) -> int:
    """Layers that the middle one of three equal stages holds, if messages take nothing."""
    room = most_room(problem, configuration.sizes, configuration.stage_devices[1], alone=False)
    return _held_in(int(room[0, 0]), _option_bytes(problem, configuration, 1))


# ---- what is short


def _memory_text(problem: Problem) -> str:
    ordered = roomiest_subsets(problem)
    some = dict.fromkeys([*ordered[:NUM_PRICED], *ordered[-NUM_PRICED:]])
    configurations = (
        configuration
        for subset in some
        for configuration in _cheapest_configurations(problem, subset)
    )
    best = min(configurations, key=lambda configuration: _missing_in_all(problem, configuration))
    lowest = _least_layer(problem, best, 0)[0]
    chunk = problem.chunk_tokens(best)
    chunks = f", chunks of {chunk} tokens" if chunk < problem.max_prompt_tokens else ""
    return (
        f"no plan fits the memory: {problem.spec.name} at {in_bits(lowest)} with "
        f"{in_flight(best.batch)}, micro-batches of 1{chunks}: {_where(problem, best)}"
    )


def in_flight(batch: int) -> str:
    """So many requests in flight, in words."""
    return "1 request in flight" if batch == 1 else f"{batch} requests in flight"


def missing_bytes(problem: Problem, configuration: Configuration) -> np.ndarray:
    """[N]: bytes that would have to be added; layers that fit nowhere go where least is missing."""
    ranks = range(len(configuration.stage_devices))
    least = np.array(
        [_least_layer(problem, configuration, rank)[1:] for rank in ranks], dtype=float
    )
    capacity = np.array([_room(problem, configuration, rank) for rank in ranks])
    need = np.maximum(_layers_held(problem, configuration), 1)
    spare = capacity - need * least[:, 0] - least[:, 1]
    while need.sum() < problem.spec.num_layers:
        j = int((spare - least[:, 0]).argmax())
        need[j] += 1
        spare[j] -= least[j, 0]
    return np.maximum(0.0, -spare)


def _layers_held(problem: Problem, configuration: Configuration) -> np.ndarray:
    """[N]: the most layers that each stage has room for."""
    return np.array(
        [_held_by(problem, configuration, rank) for rank in range(len(configuration.stage_devices))]
    )


def _held_by(problem: Problem, configuration: Configuration, rank: int) -> int:
    return _held_in(
        _room(problem, configuration, rank), _option_bytes(problem, configuration, rank)
    )


def _held_in(room: int, options: Sequence[tuple[str, int, int]]) -> int:
    """Layers that so many bytes hold at the best of these precisions (see `_option_bytes`)."""
    return max(0, *(int((room - unpacked) // size) for _, size, unpacked in options))


def _room(problem: Problem, configuration: Configuration, rank: int) -> int:
    """Bytes that layers may take on each device of a stage, beside ends and activations."""
    count = len(configuration.stage_devices)
    ends = rank == 0, rank == count - 1
    room = capacity(
        problem, configuration.sizes, configuration.stage_devices[rank], *ends, num_stages=count
    )
    return int(room[0, 0])


def _least_layer(problem: Problem, configuration: Configuration, rank: int) -> tuple[str, int, int]:
    """The smallest precision of a stage, a layer's bytes, bytes it unpacks beside all layers."""
    return min(_option_bytes(problem, configuration, rank), key=lambda option: option[1])


def _option_bytes(
    problem: Problem, configuration: Configuration, rank: int
) -> list[tuple[str, int, int]]:
    """What `_least_layer` says of one precision, of all that its devices offer.

    Of layers of several kinds, what they take on average.
    """
    devices = configuration.stage_devices[rank]
    first, last = rank == 0, rank == len(configuration.stage_devices) - 1

    def compute() -> list[tuple[str, int, int]]:
        held = layer_bytes(problem, configuration.sizes, devices)
        unpacked = int(unpacked_bytes(problem, configuration.sizes, devices, first, last)[0, 0])
        times, options = problem.times[devices.type], options_of(problem)
        found = []
        for name in problem.precisions:
            own = places_at(problem, name)
            if all(offers(times, options[place]) for place in own):
                size = round(float(held[own].mean()))
                found.append((name, size, unpacked * memory.is_packed(name)))
        return found

    key = devices.type, devices.tensor_parallel, first, last, configuration.sizes
    return problem.cached(LEAST_LAYERS, key, compute)


def _missing_in_all(problem: Problem, configuration: Configuration) -> float:
    degrees = np.array([devices.tensor_parallel for devices in configuration.stage_devices])
    return float((missing_bytes(problem, configuration) * degrees).sum())


def _where(problem: Problem, configuration: Configuration) -> str:
    missing = missing_bytes(problem, configuration)
    short = [_shortage(configuration, j, float(lack)) for j, lack in enumerate(missing) if lack > 0]
    total = f"the cluster is {amount(_missing_in_all(problem, configuration))} short in all"
    held = int(_layers_held(problem, configuration).sum())
    return "; ".join([*short, total, f"it has room for {held} of {problem.spec.num_layers} layers"])


def _shortage(configuration: Configuration, rank: int, num_bytes: float) -> str:
    devices = configuration.stage_devices[rank]
    if devices.tensor_parallel == 1:
        return f"{devices.type}#{rank} on {devices.node} is {amount(num_bytes)} short"
    several = f"{devices.tensor_parallel} x {devices.type}#{rank} on {devices.node}"
    return f"{several} are {amount(num_bytes)} short each"


def _quality_text(problem: Problem) -> str:
    asked, needed = problem.quality.percent(problem.budget), least_loss(problem)
    return (
        f"no plan keeps the quality budget: with this memory the quality loss is at least "
        f"{needed:.3g} % (quality: {problem.quality.source}), and at most {asked:.3g} % was asked "
        "for"
    )


def least_loss(problem: Problem) -> float:
    """Percent; infinity where memory allows no plan at all."""
    least = _least_omega(problem)
    return problem.quality.percent(least) if math.isfinite(least) else math.inf


def _too_few_layers(problem: Problem) -> str:
    layers, devices = problem.spec.num_layers, len(problem.cluster.devices())
    return (
        f"{problem.spec.name} has {layers} layers and the cluster {devices} devices; "
        f"every device of a plan needs a layer: name at most {layers} devices in the cluster file"
    )
