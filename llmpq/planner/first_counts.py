"""Where bitwidth transfer starts: choices of layers that fit.

Spread by the stages' speeds at the options that take least memory, or with the least sensitivity
that two options a stage allow. Layers of several kinds are cut by dynamic programming over where
stages end. Not covered: the quality budget, which moves keep (`heuristic`).
"""

import itertools

import numpy as np

from llmpq.planner.adabits import FrontCache, adabits
from llmpq.planner.instance import Instance
from llmpq.planner.partition import least_bottleneck, of_ranges, range_lengths
from llmpq.planner.value import Choice


def fast_start(instance: Instance) -> Choice | None:
    """Layers spread by speed at the options that take least memory; None: none fit."""
    most, option = _most_layers(instance)
    if (most < 1).any() or most.sum() < instance.num_layers:
        return None
    busy = np.where(instance.available, instance.layer.busy, np.inf).min(axis=1)
    counts = np.zeros(instance.available.shape, dtype=int)
    stages = np.arange(instance.num_stages)
    counts[stages, option] = _spread(busy, most, instance.num_layers)
    return any_order(counts)


def _most_layers(instance: Instance) -> tuple[np.ndarray, np.ndarray]:
    """[N] each: how many layers a stage can hold, and at which option."""
    most, option = [], []
    for packed in (False, True):
        offered = instance.available & (instance.packed == packed)
        num_bytes = np.where(offered, instance.layer_bytes, np.inf)
        room = instance.capacity - packed * instance.unpacked_bytes
        most.append(np.maximum(np.floor(room / num_bytes.min(axis=1)), 0))
        option.append(num_bytes.argmin(axis=1))
    packed_more = most[1] > most[0]
    return np.where(packed_more, most[1], most[0]), np.where(packed_more, option[1], option[0])


def _spread(cost: np.ndarray, most: np.ndarray, num_layers: int) -> np.ndarray:
    """[N]: layers handed out one by one to the stage that is least busy with one more."""
    held = np.ones(len(cost), dtype=int)
    for _ in range(num_layers - len(cost)):
        after = np.where(held < most, (held + 1) * cost, np.inf)
        held[after.argmin()] += 1
    return held


def precise_start(instance: Instance) -> Choice | None:
    """The least sensitivity with two options a stage, as if layers were alike."""
    cost, counts = _two_options(instance)
    layers = np.arange(instance.num_layers + 1)
    shorter = layers[:, None] - layers[None]  # layers before a stage, by all up to it and its own
    best, held = np.where(layers == 0, 0.0, np.inf), []
    for stage in cost:
        total = np.where(shorter >= 0, best[shorter] + stage, np.inf)
        held.append(total.argmin(axis=1))
        best = total.min(axis=1)
    if not np.isfinite(best[-1]):
        return None
    left, chosen = instance.num_layers, []
    for stage in reversed(range(instance.num_stages)):
        chosen.append(counts[stage, held[stage][left]])
        left -= held[stage][left]
    return any_order(np.stack(chosen[::-1]))


def _two_options(instance: Instance) -> tuple[np.ndarray, np.ndarray]:
    """For each stage and number of layers: the least sensitivity [N, L + 1] and counts [.., B]."""
    shape = instance.num_stages, instance.num_layers + 1
    layers = np.arange(shape[1])
    cost = np.full(shape, np.inf)
    counts = np.zeros((*shape, instance.num_options), dtype=int)
    omega = instance.omega.mean(axis=0)
    for large, small in itertools.product(range(instance.num_options), repeat=2):
        packed = instance.packed[[large, small]].any()
        room = (instance.capacity - packed * instance.unpacked_bytes)[:, None]
        num_bytes, more = instance.layer_bytes[:, [small]], instance.layer_bytes[:, [large]]
        spare = room - num_bytes * layers
        at_large = np.floor(spare / np.maximum(more - num_bytes, 1e-9))
        at_large = np.clip(at_large, 0, layers)
        value = omega[large] * at_large + omega[small] * (layers - at_large)
        offered = instance.available[:, [large, small]].all(axis=1, keepdims=True)
        better = offered & (spare >= 0) & (layers > 0) & (value < cost)
        cost = np.where(better, value, cost)
        held = np.zeros_like(counts)
        held[..., large] += at_large.astype(int)
        held[..., small] += (layers - at_large).astype(int)
        counts = np.where(better[..., None], held, counts)
    return cost, counts


def any_order(counts: np.ndarray) -> Choice:
    return tuple(tuple(int(o) for o in np.repeat(np.arange(len(c)), c)) for c in counts)


# ---- layers of several kinds


def contiguous_start(instance: Instance) -> Choice | None:
    """The least busy bottleneck at the options that take least memory; None: none fit."""
    offered = instance.available[:, None, :] & np.isfinite(instance.omega)  # [N, L, B]
    option = np.where(offered, instance.layer_bytes[:, None, :], np.inf).argmin(axis=2)
    stages = np.arange(instance.num_stages)[:, None]
    used = of_ranges(instance.layer_bytes[stages, option]) + instance.unpacked_bytes[:, None, None]
    costs = np.where(instance.available, instance.layer.busy, 0.0)
    busy = of_ranges(costs[stages, option]) + instance.fixed.busy[:, None, None]
    whole = (range_lengths(instance.num_layers) > 0) & (of_ranges(~offered.any(axis=2) * 1.0) == 0)
    fits = whole & (used <= instance.capacity[:, None, None])
    worst, ends = least_bottleneck(np.where(fits, busy, np.inf))
    if not np.isfinite(worst):
        return None
    cut = zip(option, [0, *ends[:-1]], ends, strict=True)
    return tuple(tuple(row[a:e].tolist()) for row, a, e in cut)


def least_sensitive_start(instance: Instance) -> Choice | None:
    """The least sensitivity that memory allows, of any contiguous stages."""
    return adabits(instance, FrontCache())


STARTS = (fast_start, precise_start)
STARTS_OF_KINDS = (contiguous_start, least_sensitive_start)
