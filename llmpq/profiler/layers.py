"""Measures a model's layers on one device, at each precision, in both phases, within a budget.

Where given ranges, it begins with few cells and asks a chooser for more (`schedule`); a fixed grid
is measured as it is. Every cell is visited several times, a few samples each, until the confidence
interval of its median is within 2 % or the budget ends: a slow moment of the machine then touches
few samples of many cells and not all samples of a few. A fixed computation is timed along, and
samples taken while the machine was slower are replaced (`drift`). What was cut, skipped or
left out is noted. Memory is counted at each cell's first call.
Not covered: times beyond the ranges, which are the cost model's business.
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
from llmpq.profiler.cells import SLOW_MS, Cell, Cells, memory_rows, profile_row, profile_rows
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
from llmpq.profiler.sampling import TARGET, is_outlier

SAMPLES = 5  # a visit, at least
SLOW_SAMPLES = 2
MOST_SAMPLES = 15
VISITS = 3  # that a cell may expect: its slice of a lane's budget
DEEP_ENOUGH_MS = 10.0  # calls need no more layers than this takes
OVERRUN = 1.05  # of the budget, before a cell is skipped
CACHE_VALUE_BYTES = 2


class OpenedCell(Protocol):
    """One cell ready on the device: see `stacks.Probe`."""

    max_depth: int

    def warm_up(self, depth: int) -> None:
        """One call that counts for nothing."""

    def time_ms(self, depth: int) -> float:
        """One timed call."""

    def peak_bytes(self) -> int:
        """Bytes that one layer's call takes."""


class Workbench(Protocol):
    """What can be timed: see `stacks.Bench`."""

    depth: int
    notes: list[str]

    def open(self, cell: Candidate) -> OpenedCell:
        """Makes a cell ready."""

    def layer_bytes(self, precision: str) -> int:
        """Weights of one layer."""

    def reference_ms(self) -> float:
        """A fixed computation."""


@dataclass(frozen=True)
class LayerMeasurements:
    """What a run gives. `reference_ms`: the machine's speed that the times are scaled to."""

    rows: list[ProfileRow]
    memory: list[MemoryRow]
    notes: list[str]
    reference_ms: float | None = None


@dataclass(frozen=True)
class ProfilingProgress:
    """How far a run is, for those who wait. `half_width`: of the last cell, relative."""

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
    lanes: dict[str, PhaseQueue] = field(init=False)
    watch: DriftMonitor = field(init=False)

    def __post_init__(self) -> None:
        self.cells = Cells(self.grid.precisions[0])
        self.lanes = {
            name: PhaseQueue(name, share * self.budget_s) for name, share in SHARES.items()
        }
        self.watch = DriftMonitor(self.bench.reference_ms, self.clock, scales=self.scales)
        self._costs = CostModel(work_of(self.spec))
        self._deadline_s = 0.0

    @torch.inference_mode()
    def run(
        self, on_visit: Callable[[ProfilingProgress], None] = lambda _: None
    ) -> LayerMeasurements:
        """All rows. `on_visit` is called after each visit of a cell."""
        self._restore()
        self._enqueue_start()
        fixed = isinstance(self.grid, Grid)
        left_s = self.budget_s - sum(lane.spent_s for lane in self.lanes.values())
        self._deadline_s = self.clock() + max(0.0, left_s)
        while lane := next_queue(self.lanes.values(), all_first=fixed):
            cell = self._next_cell(lane)
            if cell is None:
                lane.is_open = False
                continue
            self._spend(lane, cell)
            on_visit(self._moment(cell))
        return self._result()

    def save(self) -> None:
        """Writes what there is, for a later run to go on with."""
        if self.partial is not None:
            self.partial.save(self.cells.values(), self._spent(), self.watch.levels_ms, now=True)

    # ---- what to measure

    def _restore(self) -> None:
        found = self.partial.load() if self.partial is not None else None
        if found is None:
            return
        self.watch.levels_ms.extend(found.levels_ms)
        for saved in found.cells:
            if self._is_wanted(saved.key):
                self._add([saved.key], restored(saved))
        for name, spent_s in found.spent_s.items():
            self.lanes[name].spent_s = spent_s
        for cell in self.cells.values():
            self._judge(cell)

    def _is_wanted(self, key: Candidate) -> bool:
        """Cells of a fixed grid are just those it names; the ends are always at 16 bits."""
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
        """Puts cells into the lane of their phase, each once."""
        for key in keys:
            if key not in self.cells:
                self.cells[key] = cell or Cell(key)
                self._lane_of(key).cells.append(self.cells[key])

    def _lane_of(self, key: Candidate) -> PhaseQueue:
        return self.lanes["ends" if key.phase in ENDS else key.phase.removeprefix("stage_")]

    def _next_cell(self, lane: PhaseQueue) -> Cell | None:
        """The next cell of a lane; None where nothing more is wanted or affordable."""
        if cell := self._next_new(lane):
            return cell
        if lane.may_explore and self._explore(lane) and (cell := self._next_new(lane)):
            return cell
        cell = lane.least_certain()
        if cell is None and not self._is_late(0.0) and self._explore(lane):
            return self._next_new(lane)
        return None if cell is None or self._is_late(2 * cell.call_s) else cell

    def _next_new(self, lane: PhaseQueue) -> Cell | None:
        """The first cell without a visit that can be afforded, by what is known now."""
        waiting = (cell for cell in lane.waiting if not self._is_too_much(lane, cell.key))
        return next(waiting, None)

    def _is_too_much(self, lane: PhaseQueue, key: Candidate) -> bool:
        if self._is_late(2 * self._costs.call_s(key)):
            return True
        if isinstance(self.grid, Grid) or lane.name == "ends":
            return False
        return self._costs.is_too_large(key, len(self._precisions), lane)

    def _explore(self, lane: PhaseQueue) -> bool:
        """Adds a wave of cells that the chooser names; False where there is nothing to choose."""
        if lane.name == "ends":
            return False
        phase: Phase = "prefill" if lane.name == "prefill" else "decode"
        keys = [Candidate(p, phase, *s) for s in self.grid.dense(phase) for p in self._precisions]
        new = [key for key in keys if key not in self.cells]
        offered = [key for key in new if not self._is_too_much(lane, key)]
        if not offered:
            return False
        name = self.spec.model_key
        rows = [profile_row(c.key, c.found, name) for c in self.cells.measured() if c.found]
        for cell in self.choose(rows, offered, WAVE):
            stage = stage_cell(self._precisions, phase, cell.micro_batch, cell.tokens)
            self._add([stage, cell])
        return bool(lane.waiting)

    @property
    def _precisions(self) -> tuple[str, ...]:
        return self.grid.precisions

    # ---- measuring

    def _is_late(self, more_s: float) -> bool:
        return self.clock() + more_s > self._deadline_s + (OVERRUN - 1) * self.budget_s

    def _spend(self, lane: PhaseQueue, cell: Cell) -> None:
        start_s = self.clock()
        self._visit(lane, cell)
        lane.spent_s += self.clock() - start_s
        if self.partial is not None:
            self.partial.save(self.cells.values(), self._spent(), self.watch.levels_ms)

    def _visit(self, lane: PhaseQueue, cell: Cell) -> None:
        """More samples of one cell. The first visit also counts memory and finds the depth."""
        probe = self.bench.open(cell.key)
        if not cell.num_visits and not self._get_ready(cell, probe):
            return
        if 1000 * cell.call_s < SLOW_MS:
            probe.warm_up(cell.depth)
        cell.num_visits += 1
        slice_s = lane.budget_s / (VISITS * len(lane.cells))
        start_s, walls_s = self.clock(), [self.clock()]
        for count in range(1, MOST_SAMPLES + 1):
            cell.times_ms.append(probe.time_ms(cell.depth))
            cell.levels_ms.append(self.watch.level_ms())
            walls_s.append(self.clock())
            cell.call_s = max(1e-9, float(np.diff(walls_s).min()))  # one hiccup is no slow cell
            is_enough = walls_s[-1] - start_s >= slice_s
            if (is_enough and count >= _least_samples(cell, slice_s)) or self._is_late(cell.call_s):
                break
        self._judge(cell)

    def _get_ready(self, cell: Cell, probe: OpenedCell) -> bool:
        """Counts memory, and chooses how many layers to stack; False where time is too short."""
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
        """How sure the cell is by now; not yet, where most samples are of an unusual moment."""
        usual = self.watch.usual()
        cell.found = self.cells.estimate(cell, usual)
        cell.half_width = cell.found.half_width
        self._costs.learn(cell)
        if not is_steady(cell.levels_ms, usual):
            cell.half_width = max(cell.half_width, 2 * TARGET)

    # ---- what comes of it

    def _rows(self) -> list[ProfileRow]:
        return profile_rows(self.cells, self.spec.model_key, self.watch.usual())

    def _spent(self) -> dict[str, float]:
        return {name: lane.spent_s for name, lane in self.lanes.items()}

    def _moment(self, cell: Cell) -> ProfilingProgress:
        measured = len(self.cells.measured())
        return ProfilingProgress(sum(self._spent().values()), cell.key, measured, cell.half_width)

    def _result(self) -> LayerMeasurements:
        spec = self.spec
        layer_bytes = {p: self.bench.layer_bytes(p) for p in self._precisions}
        cache_bytes = spec.kv_values_per_token * CACHE_VALUE_BYTES
        memory = memory_rows(self.cells, spec.model_key, layer_bytes, cache_bytes)
        reference_ms = self.watch.usual().level_ms if self.scales else None
        return LayerMeasurements(self._rows(), memory, self.notes(), reference_ms)

    def notes(self) -> list[str]:
        """What a reader of the rows must know: drift, outliers, cut shapes, wide intervals."""
        return [
            *self.bench.notes,
            *self.watch.notes(),
            *self._cut_notes(),
            *self._sample_notes(),
        ]

    def _cut_notes(self) -> list[str]:
        return [
            f"{phase}: {count} cells were too slow for this budget; measured up to "
            f"{self._most_tokens(phase)} tokens in a call"
            for phase in LAYER_PHASES
            if (count := self._num_cut(phase))
        ]

    def _num_cut(self, phase: Phase) -> int:
        """Cells that were skipped, or never offered, for what they would take."""
        lane, count = self.lanes[phase], len(self._precisions)
        skipped = sum(cell.is_layer and not cell.times_ms for cell in lane.cells)
        keys = [Candidate(p, phase, *s) for s in self.grid.dense(phase) for p in self._precisions]
        new = [key for key in keys if key not in self.cells]
        return skipped + sum(self._costs.is_too_large(key, count, lane) for key in new)

    def _most_tokens(self, phase: Phase) -> int:
        keys = [cell.key for cell in self.cells.measured() if cell.key.phase == phase]
        per_request = (key.tokens if phase == "prefill" else 1 for key in keys)
        return max((k.micro_batch * n for k, n in zip(keys, per_request, strict=True)), default=0)

    def _sample_notes(self) -> list[str]:
        cells = self.cells.measured()
        num_samples = sum(len(cell.times_ms) for cell in cells)
        num_outliers = sum(int(is_outlier(np.array(cell.times_ms)).sum()) for cell in cells)
        layers = [cell for cell in cells if cell.is_layer]
        wide = [cell for cell in layers if cell.half_width > TARGET]
        notes = []
        if num_outliers:
            notes.append(f"{num_outliers} of {num_samples} samples were outliers and left out")
        if wide:
            worst = max(cell.half_width for cell in wide)
            notes.append(
                f"{len(wide)} of {len(layers)} medians are less sure than {100 * TARGET:.0f} % "
                f"(95 % confidence; the worst {100 * worst:.0f} %): a larger budget helps"
            )
        return notes


def stacked(max_depth: int, layer_s: float) -> int:
    """Layers to call at once where one takes `layer_s`: no more than noise asks for."""
    return min(max_depth, math.ceil(DEEP_ENOUGH_MS / 1000 / max(1e-6, layer_s)))


def _least_samples(cell: Cell, slice_s: float) -> int:
    """Of a visit: fewer where calls are long, or the budget is short for so many cells."""
    usual = SLOW_SAMPLES if cell.is_slow else SAMPLES
    return max(1, min(usual, int(2 * slice_s / cell.call_s)))
