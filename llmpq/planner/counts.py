"""The ILP of one order over counts: how many layers each stage holds at each option.

Layers of a kind cost the same, so seconds and bytes need N x B whole numbers, not L x N x B
binaries. Which layers get the low precisions is a transport problem: layers of equal sensitivity
and kind (G groups) to options. `build` ignores where stages begin and end in it, so its optimum is
a bound, and exact where there is one group. `build_exact` keeps the stages: t[i, j] = 1 where layer
i lies on stage j or before, and a share z[i, j, b] of layer i on stage j at option b; once counts
and t are whole, a whole z is among the cheapest, as a transport problem's is.

Columns: c[j, b] counts, u[j] = 1: stage j holds a packed option and so an unpacked matrix, T the
run's seconds, R what the slowest resource takes for prefill jobs outside bursts, S the longer of
the loop and the slowest resource's pace, P[j] and E[j] the first prefill job's and the last decode
step's way down to stage j; then y[g, b] or t and z. The chains that T is above are those of
`costs.timeline.run_s`. Rows are scaled to about 1.
"""

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np

from llmpq.costs.timeline import ADDED, LOOP, SLOWEST
from llmpq.planner.instance import Instance
from llmpq.planner.layer_options import LayerGroups
from llmpq.planner.problem import OVER
from llmpq.planner.solver import LinearProgram

Term = tuple[Any, np.ndarray | float]  # columns, their coefficients


class Rows:
    """Rows under way: lower <= sum of terms <= upper."""

    def __init__(self) -> None:
        self._starts: list[int] = [0]
        self._lower: list[float] = []
        self._upper: list[float] = []
        self._index: list[int] = []
        self._value: list[float] = []

    def add(self, lower: float, upper: float, *terms: Term) -> None:
        """One row. Coefficients are one number for all columns, or an array like the columns."""
        for index, value in terms:
            columns = index.ravel().tolist() if isinstance(index, np.ndarray) else [index]
            many = isinstance(value, np.ndarray) and value.ndim > 0
            self._index += columns
            self._value += value.ravel().tolist() if many else [float(value)] * len(columns)  # type: ignore[union-attr]
        self._starts.append(len(self._index))
        self._lower.append(lower)
        self._upper.append(upper)

    def program(
        self,
        cost: np.ndarray,
        bounds: np.ndarray,
        integral: np.ndarray,
        scale: float,
        constant: float = 0.0,
    ) -> LinearProgram:
        """All rows; `bounds` [2, columns]."""
        return LinearProgram(
            cost=cost,
            constant=constant,
            start=np.array(self._starts, dtype=np.int32),
            index=np.array(self._index, dtype=np.int32),
            value=np.array(self._value, dtype=float),
            row_lower=np.array(self._lower, dtype=float),
            row_upper=np.array(self._upper, dtype=float),
            lower=bounds[0],
            upper=bounds[1],
            integral=integral,
            scale=scale,
        )


class Columns:
    """Where each variable lies."""

    def __init__(self, instance: Instance) -> None:
        stages, options = instance.num_stages, instance.num_options
        self.size = 0
        self.c = self._take(stages, options)
        self.u = self._take(stages)
        self.T, self.R, self.S = (self._take(1) for _ in range(3))
        self.P, self.E = (self._take(stages) for _ in range(2))
        self.y = self.t = self.z = np.zeros(0, dtype=int)

    def _take(self, *shape: int) -> np.ndarray:
        count = math.prod(shape)
        taken = np.arange(self.size, self.size + count).reshape(shape)
        self.size += count
        return taken

    def add_transport(self, groups: int, options: int) -> None:
        """y."""
        self.y = self._take(groups, options)

    def add_positions(self, layers: int, stages: int, options: int) -> None:
        """t and z."""
        self.t = self._take(layers, stages - 1)
        self.z = self._take(layers, stages, options)


def build(instance: Instance, cutoff: float = math.inf, any_order: bool = False) -> LinearProgram:
    """Counts alone. `any_order`: holds for every order of the stages between the ends."""
    columns = Columns(instance)
    groups = instance.groups
    if len(groups.sizes) > 1:
        columns.add_transport(len(groups.sizes), instance.num_options)
    rows, scale = Rows(), typical_seconds(instance)
    _common(rows, columns, instance, scale, any_order)
    cost = np.zeros(columns.size)
    cost[columns.T] = 1.0
    if len(groups.sizes) > 1:
        add_transport(rows, columns.y, columns.c, groups)
        price_rows(rows, cost, instance, columns.y, groups.omega, scale)
    else:
        omega = np.broadcast_to(groups.omega, columns.c.shape)
        price_rows(rows, cost, instance, columns.c, omega, scale)
    if any_order:
        _tell_twins_apart(rows, columns, instance)
    return finished(rows, columns, instance, cost, cutoff, scale)


def build_exact(
    instance: Instance, cutoff: float = math.inf, windows: np.ndarray | None = None
) -> LinearProgram:
    """Counts, and which stage each layer lies on.

    `windows` [N - 1, 2]: how many layers, at least and at most, lie on stage j or before.
    """
    columns = Columns(instance)
    columns.add_positions(instance.num_layers, instance.num_stages, instance.num_options)
    rows, scale = Rows(), typical_seconds(instance)
    _common(rows, columns, instance, scale)
    cost = np.zeros(columns.size)
    cost[columns.T] = 1.0
    _positions(rows, columns, instance)
    omega = np.broadcast_to(instance.omega[:, None, :], columns.z.shape)
    price_rows(rows, cost, instance, columns.z, omega, scale)
    program = finished(rows, columns, instance, cost, cutoff, scale)
    return program if windows is None else _within_windows(program, columns, windows)


def _within_windows(program: LinearProgram, columns: Columns, windows: np.ndarray) -> LinearProgram:
    """With the layers' stages fixed where the windows leave no choice."""
    lower, upper = program.lower.copy(), program.upper.copy()
    layers = np.arange(len(columns.t))[:, None]
    earliest, latest = windows[:, 0], windows[:, 1]
    lower[columns.t[layers < earliest]] = 1.0
    upper[columns.t[layers >= latest]] = 0.0
    after = layers >= np.concatenate([[0], earliest])
    before = layers < np.concatenate([latest, [len(layers)]])
    upper[columns.z[~(after & before)]] = 0.0
    return replace(program, lower=lower, upper=upper)


def build_plain(instance: Instance, cutoff: float = math.inf) -> LinearProgram:
    """The same as the papers have it: a binary for every layer, stage and option, for reference."""
    program = build_exact(instance, cutoff)
    layout = Columns(instance)
    layout.add_positions(instance.num_layers, instance.num_stages, instance.num_options)
    integral = np.zeros_like(program.integral)
    integral[layout.u] = integral[layout.z] = True
    return replace(program, integral=integral)


def counts_of(instance: Instance, x: np.ndarray) -> np.ndarray:
    """[N, B] from a solution of the ILP or its relaxation."""
    size = instance.num_stages * instance.num_options
    return np.round(x[:size]).astype(int).reshape(instance.num_stages, instance.num_options)


def typical_seconds(instance: Instance) -> float:
    """The unit of seconds in an ILP."""
    busy = instance.layer.busy
    finite = busy[np.isfinite(busy)]
    return (instance.num_layers * float(finite.mean()) if finite.size else 0.0) or 1.0


def most_packed(instance: Instance) -> np.ndarray:
    """[N]: how many packed layers a stage holds at most."""
    offered = instance.available & instance.packed
    least = np.where(offered, instance.layer_bytes, np.inf).min(axis=1)
    room = instance.capacity * OVER - instance.unpacked_bytes
    return np.clip(np.floor(room / least), 0, instance.num_layers)


# ---- blocks of rows


def _common(
    rows: Rows, columns: Columns, instance: Instance, scale: float, any_order: bool = False
) -> None:
    rows.add(instance.num_layers, instance.num_layers, (columns.c, 1.0))
    for j in range(instance.num_stages):
        rows.add(1, math.inf, (columns.c[j], 1.0))
    memory_rows(rows, columns, instance)
    _slowest(rows, columns, instance, scale)
    _passing(rows, columns, instance, scale)
    if any_order:
        _without_pause_in_any_order(rows, columns, instance, scale)
    else:
        _ways_down(rows, columns, instance, scale)
        _without_pause(rows, columns, instance, scale)


def memory_rows(rows: Rows, columns: Columns, instance: Instance) -> None:
    """Layers fit into every stage, an unpacked matrix beside packed ones."""
    most = most_packed(instance)
    for j, capacity in enumerate(instance.capacity):
        unit = max(capacity, 1.0)
        bytes_of = columns.c[j], instance.layer_bytes[j] / unit
        unpacked = columns.u[j], instance.unpacked_bytes[j] / unit
        rows.add(-math.inf, capacity / unit, bytes_of, unpacked)
        rows.add(-math.inf, 0, (columns.c[j][instance.packed], 1.0), (columns.u[j], -most[j]))


def _slowest(rows: Rows, columns: Columns, instance: Instance, scale: float) -> None:
    """R and S are at least every stage's, S at least the loop; those of links are bounds."""
    layer, fixed, link = instance.layer, instance.fixed, instance.link
    for j in range(instance.num_stages):
        for column, name in zip((columns.R, columns.S), SLOWEST, strict=True):
            held = columns.c[j], -finite(getattr(layer, name)[j]) / scale
            rows.add(getattr(fixed, name)[j] / scale, math.inf, (column, 1.0), held)
    loop = (getattr(fixed, LOOP).sum() + getattr(link, LOOP).sum()) / scale
    held = columns.c, -finite(getattr(layer, LOOP)) / scale
    rows.add(loop, math.inf, (columns.S, 1.0), held)


def _passing(rows: Rows, columns: Columns, instance: Instance, scale: float) -> None:
    """Bursts that pass all resources, and between them the slowest one or the loop."""
    layer, fixed, link = instance.layer, instance.fixed, instance.link
    constant = float(sum((getattr(fixed, n) + getattr(link, n)).sum() for n in ADDED)) / scale
    held = columns.c, -finite(np.sum([getattr(layer, name) for name in ADDED], axis=0)) / scale
    rows.add(constant, math.inf, (columns.T, 1.0), (columns.R, -1.0), (columns.S, -1.0), held)


def _ways_down(rows: Rows, columns: Columns, instance: Instance, scale: float) -> None:
    """P[j] = P[j - 1] + link + stage, E alike."""
    layer, fixed, link = instance.layer, instance.fixed, instance.link
    ways = (
        (columns.P, layer.first, fixed.first, link.first),
        (columns.E, layer.step, fixed.step, link.step),
    )
    for way, each, beside, hop in ways:
        for j in range(instance.num_stages):
            constant = (beside[j] + (hop[j - 1] if j else 0.0)) / scale
            before = [(way[j - 1], -1.0)] if j else []
            held = columns.c[j], -finite(each[j]) / scale
            rows.add(constant, constant, (way[j], 1.0), *before, held)


def _without_pause(rows: Rows, columns: Columns, instance: Instance, scale: float) -> None:
    """T is at least what each stage, and each link, needs from the first job to the end."""
    layer, fixed, link = instance.layer, instance.fixed, instance.link
    busy, last = finite(layer.busy), instance.num_stages - 1
    run = (columns.T, 1.0)
    for j in range(last + 1):
        before: list[Term] = [(columns.P[j - 1], -1.0)] if j else []
        after: list[Term] = [] if j == last else [(columns.E[-1], -1.0), (columns.E[j], 1.0)]
        constant = fixed.busy[j] + (link.first[j - 1] if j else 0.0) + link.step[last]
        held = columns.c[j], -busy[j] / scale
        rows.add(constant / scale, math.inf, run, *before, held, *after)
        constant = link.busy[j] + (link.step[last] - link.step[j])
        rows.add(constant / scale, math.inf, run, (columns.P[j], -1.0), *after)


def _without_pause_in_any_order(
    rows: Rows, columns: Columns, instance: Instance, scale: float
) -> None:
    """The same with the least that a job takes the other resources, before or after."""
    layer, fixed, link = instance.layer, instance.fixed, instance.link
    busy, least = finite(layer.busy), finite(layer.least)
    others = fixed.least.sum() + link.least.sum()
    for j in range(instance.num_stages):
        each = least.copy()
        each[j] = busy[j]
        constant = others - fixed.least[j] + fixed.busy[j]
        rows.add(constant / scale, math.inf, (columns.T, 1.0), (columns.c, -each / scale))
    constant = others + float((link.busy - link.least).max())
    rows.add(constant / scale, math.inf, (columns.T, 1.0), (columns.c, -least / scale))


def add_transport(rows: Rows, y: np.ndarray, c: np.ndarray, groups: LayerGroups) -> None:
    """y[g, b]: layers of group g at option b; c[.., b]: those of all stages."""
    for g, size in enumerate(groups.sizes):
        rows.add(size, size, (y[g], 1.0))
    for b in range(c.shape[1]):
        rows.add(0, 0, (y[:, b], 1.0), (c[:, b], -1.0))


def _positions(rows: Rows, columns: Columns, instance: Instance) -> None:
    """Layers lie on stages in order, and each stage's as its counts say."""
    layers, stages = instance.num_layers, instance.num_stages
    for j in range(stages - 1):
        rows.add(0, 0, (columns.t[:, j], 1.0), (columns.c[: j + 1], -1.0))
        for i in range(layers - 1):
            rows.add(0, 1, (columns.t[i, j], 1.0), (columns.t[i + 1, j], -1.0))
    for i in range(layers):
        for j in range(stages):
            upto = [(columns.t[i, j], -1.0)] if j < stages - 1 else []
            before = [(columns.t[i, j - 1], 1.0)] if j else []
            one = 1.0 if j == stages - 1 else 0.0
            rows.add(one, one, (columns.z[i, j], 1.0), *upto, *before)
    for j in range(stages):
        for b in range(instance.num_options):
            rows.add(0, 0, (columns.z[:, j, b], 1.0), (columns.c[j, b], -1.0))


def price_rows(
    rows: Rows,
    cost: np.ndarray,
    instance: Instance,
    where: np.ndarray,
    omega: np.ndarray,
    scale: float,
) -> None:
    """Adds sensitivity to the objective (theta) and holds it within the budget.

    Options of other kinds of layers are forbidden by their bounds (`finished`).
    """
    omega = finite(omega)
    np.add.at(cost, where.ravel(), instance.theta * omega.ravel() / scale)
    if instance.budget < math.inf:
        unit = instance.budget or 1.0
        rows.add(-math.inf, instance.budget / unit, (where, omega / unit))


def _tell_twins_apart(rows: Rows, columns: Columns, instance: Instance) -> None:
    """Of equal neighbours, the earlier one holds no fewer layers."""
    for j in range(1, instance.num_stages - 2):
        if _are_twins(instance, j, j + 1):
            rows.add(0, math.inf, (columns.c[j], 1.0), (columns.c[j + 1], -1.0))


def _are_twins(instance: Instance, j: int, k: int) -> bool:
    arrays = [instance.layer_bytes, instance.capacity, instance.unpacked_bytes]
    for costs in (instance.layer, instance.fixed):
        arrays += [getattr(costs, f.name) for f in fields(costs)]
    return all(np.array_equal(array[j], array[k]) for array in arrays)


def finished(
    rows: Rows, columns: Columns, instance: Instance, cost: np.ndarray, cutoff: float, scale: float
) -> LinearProgram:
    """The ILP with its bounds, whole counts, and a cutoff where one is given."""
    if cutoff < math.inf:
        priced = np.flatnonzero(cost)
        rows.add(-math.inf, cutoff / scale, (priced, cost[priced]))
    bounds = np.zeros((2, columns.size))
    bounds[1] = math.inf
    bounds[1, columns.c] = _most(instance)
    bounds[1, columns.u] = 1.0
    for array in (columns.y, columns.t, columns.z):
        bounds[1, array] = instance.num_layers if array is columns.y else 1.0
    if columns.y.size:
        bounds[1, columns.y[np.isinf(instance.groups.omega)]] = 0.0
    if columns.z.size:
        bounds[1, columns.z.swapaxes(1, 2)[np.isinf(instance.omega)]] = 0.0
    bounds[0, columns.R] = instance.link.others.max() / scale
    bounds[0, columns.S] = instance.link.pace.max() / scale
    integral = np.zeros(columns.size, dtype=bool)
    for array in (columns.c, columns.u, columns.t):
        integral[array] = True
    return rows.program(cost, bounds, integral, scale)


def _most(instance: Instance) -> np.ndarray:
    """[N, B]: most layers of an option on a stage; a layer is left for every other stage."""
    room = instance.capacity[:, None] - instance.unpacked_bytes[:, None] * instance.packed
    held = np.floor(np.maximum(room, 0.0) * OVER / np.maximum(instance.layer_bytes, 1e-9))
    most = np.minimum(held, instance.num_layers - instance.num_stages + 1)
    allowed = (instance.omega <= instance.budget * OVER) & np.isfinite(instance.omega)
    most = np.minimum(most, np.isfinite(instance.omega).sum(axis=0))
    return np.where(instance.available & allowed.any(axis=0), np.maximum(most, 0.0), 0.0)


def finite(costs: np.ndarray) -> np.ndarray:
    """Unavailable options are forbidden by their bounds; here they count 0."""
    return np.where(np.isfinite(costs), costs, 0.0)
