"""The integer linear programme of one setting, solved by HiGHS through scipy.

z[i, j, b] = 1: layer i lies on device j at option b. Layers lie on devices in order: for each
device j, the layers up to j shrink as i grows. u[j] = 1: device j holds a packed option, and so
the bytes of an unpacked matrix. R and S are the slowest actor's seconds of the prefill and the
seconds of the decode. Minimise seconds + theta * summed sensitivity.

Rows are scaled to about 1 (memory by capacity, sensitivity by budget, seconds by a typical time).
A solve that ran out of time without a plan is "unknown", never "infeasible".
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

from llmpq.planner.problem import Choice, Costs, Instance, fits

TOLERANCE = 1e-6  # by which HiGHS may overstep a row

Status = Literal["optimal", "feasible", "infeasible", "unknown"]


@dataclass(frozen=True)
class Solution:
    """A choice (if one was found) and a bound that no choice is below."""

    status: Status
    choice: Choice | None
    bound: float


@dataclass(frozen=True)
class Programme:
    """Minimise cost @ x + constant, lower <= rows @ x <= upper, x integer where asked."""

    cost: np.ndarray
    constant: float
    rows: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    bounds: Bounds
    integral: np.ndarray
    scale: float  # seconds of one unit of the objective


def solve(
    instance: Instance, *, gap: float = 0.0, time_limit: float = math.inf, cutoff: float = math.inf
) -> Solution:
    """The best choice within `gap` (relative), if one is at most `cutoff`."""
    if instance.num_layers < instance.num_devices:
        return Solution("infeasible", None, math.inf)
    programme = build(instance, cutoff)
    result = _run(programme, programme.integral, gap, time_limit)
    if result.status == 2:
        return Solution("infeasible", None, math.inf)
    bound = _unscaled(programme, getattr(result, "mip_dual_bound", None))
    if result.x is None:
        return Solution("unknown", None, bound)
    status: Status = "optimal" if result.status == 0 else "feasible"
    choice: Choice | None = _choice(instance, result.x)
    if choice is not None and not fits(instance, choice):
        choice = _within(instance, gap, time_limit, cutoff)
    return Solution(status, choice, bound)


def _within(instance: Instance, gap: float, time_limit: float, cutoff: float) -> Choice | None:
    """For when the solver overstepped memory by its tolerance: solved with that much less of it."""
    less = instance.capacity - 2 * TOLERANCE * np.abs(instance.capacity)
    programme = build(replace(instance, capacity=less), cutoff)
    result = _run(programme, programme.integral, gap, time_limit)
    choice = None if result.x is None else _choice(instance, result.x)
    return choice if choice is not None and fits(instance, choice) else None


def relaxed_bound(instance: Instance, time_limit: float = math.inf) -> float:
    """The linear relaxation: no choice is below it; infinity where not even that is feasible."""
    if instance.num_layers < instance.num_devices:
        return math.inf
    programme = build(instance)
    result = _run(programme, np.zeros_like(programme.integral), 0.0, time_limit)
    if result.status == 2:
        return math.inf
    return _unscaled(programme, result.fun) if result.status == 0 else 0.0


def build(instance: Instance, cutoff: float = math.inf) -> Programme:
    """The programme of an instance."""
    scale = _typical_seconds(instance)
    cost = np.concatenate([_layer_cost(instance), np.zeros(instance.num_devices), [1.0, 1.0]])
    cost[:-2] /= scale
    constant = float(instance.fixed.prefill_once.sum() + instance.link.prefill_once) / scale
    blocks = [
        _structure(*instance.omega.shape, instance.num_devices, tuple(instance.packed.tolist())),
        _memory(instance),
        _pace(instance, scale),
        _quality(instance),
    ]
    if cutoff < math.inf:
        blocks.append((cost[None], np.array([-math.inf]), np.array([cutoff / scale - constant])))
    rows, lower, upper = (np.concatenate(part) for part in zip(*blocks, strict=True))
    integral = np.ones_like(cost)
    integral[-2:] = 0
    bounds = _bounds(instance, scale)
    return Programme(cost, constant, rows, lower, upper, bounds, integral, scale)


Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows, lower, upper


def _run(
    programme: Programme, integral: np.ndarray, gap: float, time_limit: float
) -> OptimizeResult:
    options = {"mip_rel_gap": gap}
    if time_limit < math.inf:
        options["time_limit"] = max(0.01, time_limit)
    rows = csr_array(programme.rows)
    constraint = LinearConstraint(rows, programme.lower, programme.upper)
    return milp(
        programme.cost,
        integrality=integral,
        bounds=programme.bounds,
        constraints=constraint,
        options=options,
    )


def _unscaled(programme: Programme, value: float | None) -> float:
    if value is None or not math.isfinite(value):
        return 0.0
    return (value + programme.constant) * programme.scale


def _choice(instance: Instance, x: np.ndarray) -> Choice:
    shape = (instance.num_layers, instance.num_devices * instance.num_options)
    best = x[: shape[0] * shape[1]].reshape(shape).argmax(axis=1)
    device, option = np.divmod(best, instance.num_options)
    return tuple(tuple(int(o) for o in option[device == j]) for j in range(instance.num_devices))


def _finite(costs: np.ndarray) -> np.ndarray:
    """Unavailable options are forbidden by their bounds; here they count 0."""
    return np.where(np.isfinite(costs), costs, 0.0)


def _typical_seconds(instance: Instance) -> float:
    busy = instance.busy
    finite = busy[np.isfinite(busy)]
    typical = instance.num_layers * float(finite.mean()) if finite.size else 0.0
    return typical or 1.0


def _layer_cost(instance: Instance) -> np.ndarray:
    seconds = _finite(instance.layer.prefill_once)[None]
    return (seconds + instance.theta * instance.omega[:, None, :]).ravel()


def _bounds(instance: Instance, scale: float) -> Bounds:
    """A layer's place leaves a layer for every device; hopeless options are forbidden."""
    layers, devices = instance.num_layers, instance.num_devices
    i, j = np.arange(layers)[:, None], np.arange(devices)[None]
    place = (j <= i) & (devices - j <= layers - i)
    need = instance.layer_bytes + instance.unpacked_bytes * instance.packed
    option = instance.available & (need <= instance.capacity[:, None] * (1 + 1e-9))
    quality = instance.omega <= instance.budget * (1 + 1e-9)
    allowed = place[:, :, None] & option[None] & quality[:, None, :]
    upper = np.concatenate([allowed.ravel(), np.ones(devices), [math.inf, math.inf]])
    lower = np.zeros_like(upper)
    lower[-2:] = [instance.link.prefill_rest / scale, instance.link.decode_every / scale]
    return Bounds(lower, upper)


@lru_cache(maxsize=1)
def _structure(layers: int, options: int, devices: int, packed: tuple[bool, ...]) -> Rows:
    """Each layer once, in order, each device at least once, u from z."""
    each = np.ones((1, options))
    on_device = np.kron(np.eye(devices), each)
    once = np.kron(np.eye(layers), np.ones((1, devices * options)))
    earlier = np.eye(layers, k=1)[:-1] - np.eye(layers)[:-1]
    up_to = np.tril(np.ones((devices, devices)))[:-1]
    order = np.kron(earlier, np.kron(up_to, each))
    used = np.kron(np.ones((1, layers)), on_device)
    holds = np.kron(np.eye(layers), np.kron(np.eye(devices), np.array([packed], dtype=float)))
    minus_u = np.kron(np.ones((layers, 1)), -np.eye(devices))
    rows = [_widen(once, devices), _widen(order, devices), _widen(used, devices)]
    rows.append(np.hstack([holds, minus_u, np.zeros((len(holds), 2))]))
    lower = [1.0] * len(once) + [-math.inf] * len(order) + [1.0] * devices
    upper = [1.0] * len(once) + [0.0] * len(order) + [math.inf] * devices
    lower += [-math.inf] * len(holds)
    upper += [0.0] * len(holds)
    return np.vstack(rows), np.array(lower), np.array(upper)


def _widen(rows: np.ndarray, devices: int) -> np.ndarray:
    """Columns of u, R and S."""
    return np.hstack([rows, np.zeros((len(rows), devices + 2))])


def _memory(instance: Instance) -> Rows:
    devices = instance.num_devices
    room = np.maximum(instance.capacity, 1.0)
    per_layer = np.kron(np.diag(1 / room), instance.layer_bytes[None])
    layers = np.kron(np.ones((1, instance.num_layers)), per_layer)
    unpacked = np.diag(instance.unpacked_bytes / room)
    rows = np.hstack([layers, unpacked, np.zeros((devices, 2))])
    return rows, np.full(devices, -math.inf), np.minimum(instance.capacity, room) / room


def _pace(instance: Instance, scale: float) -> Rows:
    """R and S are at least every stage's seconds; S is at least the loop's."""
    layers, devices = instance.num_layers, instance.num_devices
    rest = _per_device(instance.layer.prefill_rest, layers)
    every = _per_device(instance.layer.decode_every, layers)
    loop = np.tile(_finite(instance.layer.decode_once).ravel(), layers)[None]
    seconds = np.vstack([rest, every, loop]) / scale
    ends = np.zeros((2 * devices + 1, devices + 2))
    ends[:devices, -2] = ends[devices:, -1] = -1
    fixed = _fixed_pace(instance.fixed, instance.link) / scale
    return np.hstack([seconds, ends]), np.full(len(fixed), -math.inf), -fixed


def _per_device(seconds: np.ndarray, layers: int) -> np.ndarray:
    rows = np.kron(np.eye(len(seconds)), np.ones((1, seconds.shape[1])))
    return np.tile(rows * _finite(seconds).ravel(), (1, layers))


def _fixed_pace(fixed: Costs, link: Costs) -> np.ndarray:
    loop = fixed.decode_once.sum() + link.decode_once
    return np.concatenate([fixed.prefill_rest, fixed.decode_every, [loop]])


def _quality(instance: Instance) -> Rows:
    if instance.budget == math.inf:
        width = instance.omega.size * instance.num_devices + instance.num_devices + 2
        return np.zeros((0, width)), np.zeros(0), np.zeros(0)
    unit = instance.budget or 1.0
    per_layer = np.broadcast_to(
        instance.omega[:, None, :] / unit,
        (instance.num_layers, instance.num_devices, instance.num_options),
    )
    row = _widen(per_layer.reshape(1, -1), instance.num_devices)
    return row, np.array([-math.inf]), np.array([instance.budget / unit])
