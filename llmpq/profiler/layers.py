"""Measures a model's layers on one device, at each precision, in both phases, within a budget.

Given ranges, it begins with few cells and asks a chooser for more (`cell_queue`); a fixed grid is
measured completely. Every cell is visited several times, for a few samples each, until the
confidence interval of its median is within 2 % or the budget ends, so that a slow period of the
machine affects few samples of many cells and not all samples of a few. A fixed computation is timed
meanwhile, and samples taken while the machine was slower are replaced (`drift`). Notes say what was
cut, skipped or left out. Memory is counted at each cell's first call.

Not covered: times beyond the ranges, which the cost model predicts.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from llmpq.model_spec import ModelSpec
from llmpq.profile_data import Candidate, MemoryRow, Phase, ProfileRow
from llmpq.profiler.cell_queue import SHARES, WAVE, CostModel, PhaseQueue, next_queue, work_of
from llmpq.profiler.cells import (
    SLOW_MS,
    Cell,
    Cells,
    memory_rows,
    profile_row,
    profile_rows,
    sample_notes,
)
from llmpq.profiler.drift import DriftMonitor, is_steady
from llmpq.profiler.grid import (
    ENDS,
    LAYER_PHASES,
    AdaptiveGrid,
    Choose,
    Grid,
    end_cells,
    farthest,
    layer_cells,
    stage_cell,
)
from llmpq.profiler.resume import PartialFile, restored
from llmpq.profiler.sampling import TARGET

SAMPLES = 5  # the least samples of a visit
SLOW_SAMPLES = 2
MOST_SAMPLES = 15
VISITS = 3  # a cell's share of its queue's budget is for this many visits
DEEP_ENOUGH_MS = 10.0  # a call needs no more layers than take this long
OVERRUN = 1.05  # share of the budget after which a cell is skipped
CACHE_VALUE_BYTES = 2


class OpenedCell(Protocol):
    """One cell that is ready on the device; see `stacks.Probe`."""

    max_depth: int

    def warm_up(self, depth: int) -> None:
        """Makes a call that is not timed."""

    def time_ms(self, depth: int) -> float:
        """Milliseconds of one call."""

    def peak_bytes(self) -> int:
        """The peak bytes of a call of one layer."""

    def experts_used(self) -> float | None:
        """How many different experts a call of one layer uses; None where it has none."""


class Workbench(Protocol):
    """The computations that can be timed; see `stacks.Bench`."""

    depth: int
    notes: list[str]

    def open(self, cell: Candidate) -> OpenedCell:
        """Prepares a cell."""

    def layer_bytes(self, precision: str) -> int:
        """Bytes of the weights of one layer."""

    def reference_ms(self) -> float:
        """Milliseconds of a fixed computation."""


@dataclass(frozen=True)
class LayerMeasurements:
    """The result of a run. `reference_ms` is the machine's speed that times are scaled to."""

    rows: list[ProfileRow]
    memory: list[MemoryRow]
    notes: list[str]
    reference_ms: float | None = None


@dataclass(frozen=True)
class ProfilingProgress:
    """How far a run is. `half_width` is the relative uncertainty of the last cell."""

    spent_s: float
    cell: Candidate
    num_cells: int
    half_width: float


@dataclass
class LayerProfiler:
    """Measures one model's layers on one device within a budget of seconds."""

    spec: ModelSpec
    grid: Grid | AdaptiveGrid
    bench: Workbench
    budget_s: float
    choose: Choose = farthest
    partial: PartialFile | None = None
    clock: Callable[[], float] = time.monotonic
    scales: bool = False  # times by the machine's speed: see `drift`
    cells: Cells = field(init=False)
    queues: dict[str, PhaseQueue] = field(init=False)
    drift: DriftMonitor = field(init=False)

    def __post_init__(self) -> None:
        self.cells = Cells(self.grid.precisions[0])
        self.queues = {
            name: PhaseQueue(name, share * self.budget_s) for name, share in SHARES.items()
        }
        self.drift = DriftMonitor(self.bench.reference_ms, self.clock, scales=self.scales)
        self._costs = CostModel(work_of(self.spec))
        self._deadline_s = 0.0

    @torch.inference_mode()
    def run(
        self, on_visit: Callable[[ProfilingProgress], None] = lambda _: None
    ) -> LayerMeasurements:
        """Measures all rows. `on_visit` is called after each visit of a cell."""
        self._restore()
        self._enqueue_start()
        fixed = isinstance(self.grid, Grid)
        left_s = self.budget_s - sum(queue.spent_s for queue in self.queues.values())
        self._deadline_s = self.clock() + max(0.0, left_s)
        while queue := next_queue(self.queues.values(), all_first=fixed):
            cell = self._next_cell(queue)
            if cell is None:
                queue.is_open = False
                continue
            self._spend(queue, cell)
            spent_s, num_cells = sum(self._spent().values()), len(self.cells.measured())
            on_visit(ProfilingProgress(spent_s, cell.key, num_cells, cell.half_width))
        return self._result()

    def save(self) -> None:
        """Writes the samples so far, with which a later run continues."""
        if self.partial is not None:
            self.partial.save(self.cells.values(), self._spent(), self.drift.levels_ms, now=True)

    # ---- what to measure

    def _restore(self) -> None:
        found = self.partial.load() if self.partial is not None else None
        if found is None:
            return
        self.drift.levels_ms.extend(found.levels_ms)
        for saved in found.cells:
            if self._is_wanted(saved.key):
                self._add([saved.key], restored(saved))
        for name, spent_s in found.spent_s.items():
            self.queues[name].spent_s = spent_s
        for cell in self.cells.values():
            self._judge(cell)

    def _is_wanted(self, key: Candidate) -> bool:
        """Whether a restored cell is wanted: cells of the grid, and the embedding and head."""
        if key.phase in ENDS:
            return True
        if key.precision not in self.grid.precisions:
            return False
        if isinstance(self.grid, AdaptiveGrid):
            return True
        phase: Phase = "decode" if key.phase.endswith("decode") else "prefill"
        return (key.micro_batch, key.tokens) in self.grid.start(phase)

    def _enqueue_start(self) -> None:
        pairs = {phase: self.grid.start(phase) for phase in LAYER_PHASES}
        for phase in LAYER_PHASES:
            self._add(layer_cells(self.grid.precisions, phase, pairs[phase]))
        self._add(end_cells(pairs["prefill"], pairs["decode"]))

    def _add(self, keys: Sequence[Candidate], cell: Cell | None = None) -> None:
        """Adds cells to the queue of their phase, each once."""
        for key in keys:
            if key not in self.cells:
                self.cells[key] = cell or Cell(key)
                self._queue_of(key).cells.append(self.cells[key])

    def _queue_of(self, key: Candidate) -> PhaseQueue:
        return self.queues["ends" if key.phase in ENDS else key.phase.removeprefix("stage_")]

    def _next_cell(self, queue: PhaseQueue) -> Cell | None:
        """The next cell of a queue; None where no cell is wanted or affordable."""
        if cell := self._next_new(queue):
            return cell
        if queue.may_explore and self._explore(queue) and (cell := self._next_new(queue)):
            return cell
        cell = queue.least_certain()
        if cell is None and not self._is_late(0.0) and self._explore(queue):
            return self._next_new(queue)
        return None if cell is None or self._is_late(2 * cell.call_s) else cell

    def _next_new(self, queue: PhaseQueue) -> Cell | None:
        """The first cell without a visit whose estimated cost is affordable."""
        waiting = (cell for cell in queue.waiting if not self._is_too_much(queue, cell.key))
        return next(waiting, None)

    def _is_too_much(self, queue: PhaseQueue, key: Candidate) -> bool:
        if self._is_late(2 * self._costs.call_s(key)):
            return True
        if isinstance(self.grid, Grid) or queue.name == "ends":
            return False
        return self._costs.is_too_large(key, len(self._precisions), queue)

    def _explore(self, queue: PhaseQueue) -> bool:
        """Adds cells that the chooser names; False where there are no candidates."""
        if queue.name == "ends":
            return False
        phase: Phase = "prefill" if queue.name == "prefill" else "decode"
        keys = [Candidate(p, phase, *s) for s in self.grid.dense(phase) for p in self._precisions]
        new = [key for key in keys if key not in self.cells]
        offered = [key for key in new if not self._is_too_much(queue, key)]
        if not offered:
            return False
        name = self.spec.model_key
        rows = [profile_row(c, c.found, name) for c in self.cells.measured() if c.found]
        for cell in self.choose(rows, offered, WAVE):
            stage = stage_cell(self._precisions, phase, cell.micro_batch, cell.tokens)
            self._add([stage, cell])
        return bool(queue.waiting)

    @property
    def _precisions(self) -> tuple[str, ...]:
        return self.grid.precisions

    # ---- measuring

    def _is_late(self, more_s: float) -> bool:
        return self.clock() + more_s > self._deadline_s + (OVERRUN - 1) * self.budget_s

    def _spend(self, queue: PhaseQueue, cell: Cell) -> None:
        start_s = self.clock()
        self._visit(queue, cell)
        queue.spent_s += self.clock() - start_s
        if self.partial is not None:
            self.partial.save(self.cells.values(), self._spent(), self.drift.levels_ms)

    def _visit(self, queue: PhaseQueue, cell: Cell) -> None:
        """Takes samples of one cell. The first visit also counts memory and chooses the depth."""
        probe = self.bench.open(cell.key)
        if not cell.num_visits and not self._get_ready(cell, probe):
            return
        if 1000 * cell.call_s < SLOW_MS:
            probe.warm_up(cell.depth)
        if cell.is_layer and (used := probe.experts_used()) is not None:
            cell.experts_used.append(used)
        cell.num_visits += 1
        slice_s = queue.budget_s / (VISITS * len(queue.cells))
        start_s, walls_s = self.clock(), [self.clock()]
        for count in range(1, MOST_SAMPLES + 1):
            cell.times_ms.append(probe.time_ms(cell.depth))
            cell.levels_ms.append(self.drift.level_ms())
            walls_s.append(self.clock())
            cell.call_s = max(
                1e-9, float(np.diff(walls_s).min())
            )  # one slow call makes no slow cell
            is_enough = walls_s[-1] - start_s >= slice_s
            if (is_enough and count >= _least_samples(cell, slice_s)) or self._is_late(cell.call_s):
                break
        self._judge(cell)

    def _get_ready(self, cell: Cell, probe: OpenedCell) -> bool:
        """Counts memory and chooses the number of layers; False where time is too short."""
        if not cell.is_layer:
            probe.warm_up(0)
            return True
        start_s = self.clock()
        cell.peak_bytes = probe.peak_bytes()
        cell.call_s = self.clock() - start_s
        if 1000 * cell.call_s < SLOW_MS:  # counting takes a few ms itself
            start_s = self.clock()
            probe.warm_up(1)
            cell.call_s = self.clock() - start_s
        if self._is_late(cell.call_s):
            cell.skipped = True
            return False
        cell.depth = stacked(probe.max_depth, cell.call_s)
        return True

    def _judge(self, cell: Cell) -> None:
        """Updates a cell's estimate; it stays uncertain where the machine was mostly unsteady."""
        speed = self.drift.speed()
        cell.found = self.cells.estimate(cell, speed)
        cell.half_width = cell.found.half_width
        self._costs.learn(cell)
        if not is_steady(cell.levels_ms, speed):
            cell.half_width = max(cell.half_width, 2 * TARGET)

    # ---- the result

    def _spent(self) -> dict[str, float]:
        return {name: queue.spent_s for name, queue in self.queues.items()}

    def _result(self) -> LayerMeasurements:
        spec = self.spec
        layer_bytes = {p: self.bench.layer_bytes(p) for p in self._precisions}
        cache_bytes = spec.kv_values_per_token * CACHE_VALUE_BYTES
        rows = profile_rows(self.cells, spec.model_key, self.drift.speed())
        memory = memory_rows(self.cells, spec.model_key, layer_bytes, cache_bytes)
        reference_ms = self.drift.speed().level_ms if self.scales else None
        return LayerMeasurements(rows, memory, self.notes(), reference_ms)

    def notes(self) -> list[str]:
        """Notes on drift, outliers, cut shapes and wide intervals for readers of the rows."""
        return [
            *self.bench.notes,
            *self.drift.notes(),
            *self._cut_notes(),
            *sample_notes(self.cells.measured()),
        ]

    def _cut_notes(self) -> list[str]:
        return [
            f"{phase}: {count} shapes were too slow for this budget; measured up to "
            f"{self.cells.most_tokens(phase)} tokens in a call"
            for phase in LAYER_PHASES
            if (count := self._num_cut(phase))
        ]

    def _num_cut(self, phase: Phase) -> int:
        """The number of cells that were skipped or never offered because of their cost."""
        queue, count = self.queues[phase], len(self._precisions)
        skipped = sum(cell.is_layer and not cell.times_ms for cell in queue.cells)
        keys = [Candidate(p, phase, *s) for s in self.grid.dense(phase) for p in self._precisions]
        new = [key for key in keys if key not in self.cells]
        return skipped + sum(self._costs.is_too_large(key, count, queue) for key in new)


def stacked(max_depth: int, layer_s: float) -> int:
    """The layers of a call where one takes `layer_s`: enough for `DEEP_ENOUGH_MS`."""
    return min(max_depth, math.ceil(DEEP_ENOUGH_MS / 1000 / max(1e-6, layer_s)))


def _least_samples(cell: Cell, slice_s: float) -> int:
    """The least samples of a visit: fewer where calls are slow or the budget is short."""
    usual = SLOW_SAMPLES if cell.is_slow else SAMPLES
    return max(1, min(usual, int(2 * slice_s / cell.call_s)))
