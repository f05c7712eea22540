"""Cells with their samples, and the rows of the profile that follow from them.

A cell of a layer times a call of `depth` layers; the "stage" cell of the same shape times a call
without layers. The layer's time is their difference divided by `depth`, so that costs of a call are
not counted with layers, and noise is divided by `depth` too. The spread of one sample of a 1 ms
decode layer on a busy AMD EPYC was 40 % as (3 layers - 1) / 2, 18 % as (6 - 1) / 5 and 16 % as
(6 - fixed) / 6.

Not covered: extra costs of the first layer, which are spread over all `depth` layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmpq.profile_data import Candidate, MemoryRow, Phase, ProfileRow
from llmpq.profiler.drift import MachineSpeed, steady
from llmpq.profiler.grid import LAYER_PHASES, STAGE_PHASE
from llmpq.profiler.sampling import FLOOR_MS, TARGET, Estimate, estimate, is_outlier

STAGE_TARGET = 0.05  # a stage's own cost is a small part of a call
MAX_SAMPLES = 150
MIN_VISITS = 2  # no cell is measured at one time only
SLOW_MS = 100.0  # slower calls are sampled less
FEW, SLOW_FEW = 6, 3  # the least samples of a settled cell, and of a slow one


@dataclass
class Cell:
    """The samples of one cell: times of calls, and reference times beside them, in ms."""

    key: Candidate
    depth: int = 0  # layers in a call; 0 where there are none
    times_ms: list[float] = field(default_factory=list)
    levels_ms: list[float] = field(default_factory=list)
    num_visits: int = 0
    call_s: float = 0.0  # wall time of a sample with its pause
    peak_bytes: int | None = None
    experts_used: list[float] = field(default_factory=list)  # by a call's layer, at each visit
    found: Estimate | None = None  # after the latest visit
    half_width: float = float("inf")  # relative; larger where the machine was unsteady
    skipped: bool = False

    @property
    def is_layer(self) -> bool:
        """Whether the cell is of a decoder layer at a precision."""
        return self.key.phase in LAYER_PHASES

    @property
    def is_slow(self) -> bool:
        """Whether calls are slow."""
        return bool(self.times_ms) and min(self.times_ms) > SLOW_MS

    @property
    def is_settled(self) -> bool:
        """Whether the cell needs no more samples."""
        if len(self.times_ms) >= MAX_SAMPLES:
            return True
        target = STAGE_TARGET if self.key.phase in STAGE_PHASE.values() else TARGET
        few = SLOW_FEW if self.is_slow else FEW
        enough = len(self.times_ms) >= few and self.num_visits >= MIN_VISITS
        return enough and self.half_width <= target

    def steady_ms(self, speed: MachineSpeed) -> list[float]:
        """The samples at the machine's normal speed; see `drift.steady`."""
        return steady(self.times_ms, self.levels_ms, speed)


class Cells(dict[Candidate, Cell]):
    """All cells by their keys. A stage's own cost is measured at `stage_precision` alone."""

    def __init__(self, stage_precision: str) -> None:
        super().__init__()
        self._stage_precision = stage_precision

    def fixed_ms(self, key: Candidate, speed: MachineSpeed) -> float:
        """The cost of a call of a layer's shape beside its layers; 0 where it was not measured."""
        if key.phase not in STAGE_PHASE:
            return 0.0
        phase = STAGE_PHASE[key.phase]
        found = self.get(Candidate(self._stage_precision, phase, key.micro_batch, key.tokens))
        if found is None or not found.times_ms:
            return 0.0
        return estimate(found.steady_ms(speed)).median_ms

    def estimate(self, cell: Cell, speed: MachineSpeed) -> Estimate:
        """The estimate for one layer, or for the call where there is no layer."""
        fixed = self.fixed_ms(cell.key, speed)
        times = cell.steady_ms(speed)
        return estimate([max(FLOOR_MS, (t - fixed) / max(1, cell.depth)) for t in times])

    def measured(self) -> list[Cell]:
        """The cells that have samples."""
        return [cell for cell in self.values() if cell.times_ms]

    def most_tokens(self, phase: Phase) -> int:
        """The most tokens of a measured call of this phase."""
        keys = [cell.key for cell in self.measured() if cell.key.phase == phase]
        return max(
            (k.micro_batch * (k.tokens if phase == "prefill" else 1) for k in keys), default=0
        )


def profile_rows(cells: Cells, model_key: str, speed: MachineSpeed) -> list[ProfileRow]:
    """A row of the profile for each measured cell."""
    return [profile_row(cell, cells.estimate(cell, speed), model_key) for cell in cells.measured()]


def profile_row(cell: Cell, found: Estimate, model_key: str) -> ProfileRow:
    """An estimate as a row of the profile."""
    key, used = cell.key, cell.experts_used
    return ProfileRow(
        model_key=model_key,
        experts_used=float(np.mean(used)) if used else None,
        precision=key.precision,
        phase=key.phase,
        micro_batch=key.micro_batch,
        time_ms=found.median_ms,
        time_ms_p10=found.p10_ms,
        time_ms_p90=found.p90_ms,
        num_samples=found.num_samples,
        **_tokens(key),
    )


def memory_rows(
    cells: Cells, model_key: str, layer_bytes: Mapping[str, int], cache_bytes: int
) -> list[MemoryRow]:
    """Bytes of weights at each precision, of a token's cache, and of each shape's activations."""
    rows = [
        MemoryRow(model_key=model_key, what="layer_weights", precision=p, num_bytes=n)
        for p, n in layer_bytes.items()
    ]
    rows.append(MemoryRow(model_key=model_key, what="cache", precision="16", num_bytes=cache_bytes))
    return rows + [
        MemoryRow(
            model_key=model_key,
            what="activations",
            precision=cell.key.precision,
            phase=cell.key.phase,
            micro_batch=cell.key.micro_batch,
            num_bytes=cell.peak_bytes,
            **_tokens(cell.key),
        )
        for cell in cells.measured()
        if cell.peak_bytes is not None
    ]


def _tokens(key: Candidate) -> dict[str, int]:
    """A candidate's tokens under the names of a row."""
    past = key.phase in ("decode", "stage_decode")
    return {"prompt_tokens": 0 if past else key.tokens, "past_tokens": key.tokens if past else 0}


def sample_notes(cells: Sequence[Cell]) -> list[str]:
    """Notes on outliers, and on medians that are less certain than the target."""
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
            f"{len(wide)} of {len(layers)} medians have a wider 95 % confidence interval than "
            f"+-{100 * TARGET:.0f} % (the widest: +-{100 * worst:.0f} %): a larger budget helps"
        )
    return notes
