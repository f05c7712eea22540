"""Cells with their samples, and what they say: times of layers, rows of the profile.

A cell of a layer times a call of `depth` layers; the same shape's "stage" cell times a call of
none. The layer's time is their difference divided by `depth`: what a call costs once is not counted
with any layer, and noise is divided by `depth` too. Seen on a busy AMD EPYC, spread of one sample
of a 1 ms decode layer: 40 % as (3 layers - 1) / 2, 18 % as (6 - 1) / 5, 16 % as (6 - fixed) / 6.
Not covered: what a first layer costs above the others, which counts a `depth`-th with each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmpq.profile_data import Candidate, MemoryRow, ProfileRow
from llmpq.profiler.drift import Usual, steady
from llmpq.profiler.grid import LAYER_PHASES, STAGE_PHASE
from llmpq.profiler.sampling import FLOOR_MS, TARGET, Estimate, estimate

STAGE_TARGET = 0.05  # a stage's own cost is a small part of a call
MAX_SAMPLES = 150
MIN_VISITS = 2  # so that no cell rests on one moment of the machine
SLOW_MS = 100.0  # calls above this are sampled less
FEW, SLOW_FEW = 6, 3  # samples without which nothing is settled


@dataclass
class Cell:
    """What is known of one cell. Times and their references' levels in ms, per call."""

    key: Candidate
    depth: int = 0  # layers in a call; 0 where there are none
    times_ms: list[float] = field(default_factory=list)
    levels_ms: list[float] = field(default_factory=list)
    num_visits: int = 0
    call_s: float = 0.0  # wall time of a sample, its pause included
    peak_bytes: int | None = None
    found: Estimate | None = None  # of its latest visit
    half_width: float = float("inf")  # of that, as a share; more where the machine was unsteady
    skipped: bool = False

    @property
    def is_layer(self) -> bool:
        """Of a decoder layer, at a precision."""
        return self.key.phase in LAYER_PHASES

    @property
    def is_slow(self) -> bool:
        """Its calls are long."""
        return bool(self.times_ms) and min(self.times_ms) > SLOW_MS

    @property
    def is_settled(self) -> bool:
        """No more samples are wanted."""
        if len(self.times_ms) >= MAX_SAMPLES:
            return True
        target = STAGE_TARGET if self.key.phase in STAGE_PHASE.values() else TARGET
        few = SLOW_FEW if self.is_slow else FEW
        enough = len(self.times_ms) >= few and self.num_visits >= MIN_VISITS
        return enough and self.half_width <= target

    def steady_ms(self, usual: Usual) -> list[float]:
        """The samples that stand for the machine as usual."""
        return steady(self.times_ms, self.levels_ms, usual)


class Cells(dict[Candidate, Cell]):
    """All cells by their keys. A stage's own cost is measured at `stage_precision` alone."""

    def __init__(self, stage_precision: str) -> None:
        super().__init__()
        self._stage_precision = stage_precision

    def fixed_ms(self, key: Candidate, usual: Usual) -> float:
        """What a call of a layer's shape costs beside its layers; 0 where it was not measured."""
        if key.phase not in STAGE_PHASE:
            return 0.0
        phase = STAGE_PHASE[key.phase]
        found = self.get(Candidate(self._stage_precision, phase, key.micro_batch, key.tokens))
        if found is None or not found.times_ms:
            return 0.0
        return estimate(found.steady_ms(usual)).median_ms

    def estimate(self, cell: Cell, usual: Usual) -> Estimate:
        """Of one layer, or of the call where there is none."""
        fixed = self.fixed_ms(cell.key, usual)
        times = cell.steady_ms(usual)
        return estimate([max(FLOOR_MS, (t - fixed) / max(1, cell.depth)) for t in times])

    def measured(self) -> list[Cell]:
        """Cells with samples."""
        return [cell for cell in self.values() if cell.times_ms]


def profile_rows(cells: Cells, model_key: str, usual: Usual) -> list[ProfileRow]:
    """A row a measured cell."""
    return [
        profile_row(cell.key, cells.estimate(cell, usual), model_key) for cell in cells.measured()
    ]


def profile_row(key: Candidate, found: Estimate, model_key: str) -> ProfileRow:
    """An estimate as a row of the profile."""
    return ProfileRow(
        model_key=model_key,
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
    """Weights at each precision, the cache of a token, and each measured shape's activations."""
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
