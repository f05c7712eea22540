"""The profiler's loop, statistics, drift, budget and resumption, on a fake machine and clock."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from llmpq.model_lookup import load_model_spec
from llmpq.model_spec import ModelSpec
from llmpq.profile_data import Candidate, ProfileRow

pytest.importorskip("torch")

from llmpq.models.stage_model import LayerRange
from llmpq.profiler.cells import FEW, MAX_SAMPLES
from llmpq.profiler.drift import TOLERANCE, DriftMonitor, MachineSpeed, steady
from llmpq.profiler.grid import AdaptiveGrid, Grid, ShapeRange, end_cells, farthest
from llmpq.profiler.layers import LayerMeasurements, LayerProfiler
from llmpq.profiler.resume import Identity, PartialFile
from llmpq.profiler.sampling import estimate, interval_rank, is_outlier
from llmpq.profiler.stacks import stacked_layers

PRECISIONS = ("16", "4")
FIXED_MS = {"prefill": 2.0, "decode": 1.0}
PAUSE_MS = 5.0
RANGES = AdaptiveGrid(
    PRECISIONS, ShapeRange((1, 8), (8, 512)), ShapeRange((1, 32), (8, 512)), (16, 17, 64, 65)
)
GRID = Grid(PRECISIONS, (1, 2), (1, 4), (8, 16), (8, 24))


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return load_model_spec("tiny-tales")


@dataclass
class FakeMachine:
    """Computations whose true times are known, and a clock that only they move."""

    scale: float = 1.0  # of all layers' times
    noise: float = 0.0  # relative, of a sample
    spike_every: int = 0  # samples; such a one takes ten times as long
    slow: tuple[float, float] = (0.0, 0.0)  # seconds between which all takes 1.5 times as long
    dies_after: float = math.inf  # calls
    depth: int = 4
    experts_used: float | None = None
    notes: list[str] = field(default_factory=list)
    now_s: float = 0.0
    num_calls: int = 0
    opened: list[Candidate] = field(default_factory=list)
    rng: Any = field(default_factory=lambda: np.random.default_rng(0))

    def clock(self) -> float:
        return self.now_s

    def layer_ms(self, key: Candidate) -> float:
        tokens = key.micro_batch * (key.tokens if key.phase == "prefill" else 1)
        return self.scale * (0.5 + 0.01 * tokens) * (1 if key.precision == "16" else 1.5)

    def call_ms(self, key: Candidate, depth: int) -> float:
        self.num_calls += 1
        if self.num_calls > self.dies_after:
            raise KeyboardInterrupt
        phase = key.phase.removeprefix("stage_")
        layers = depth * self.layer_ms(key) if depth else 0.0
        ms = (FIXED_MS.get(phase, 0.5) + layers) * self.speed()
        ms *= max(0.5, 1 + self.noise * self.rng.standard_normal())
        if self.spike_every and self.num_calls % self.spike_every == 0:
            ms *= 10
        self.now_s += ms / 1000
        return ms

    def speed(self) -> float:
        start_s, end_s = self.slow
        return 1.5 if start_s <= self.now_s < end_s else 1.0

    def open(self, cell: Candidate) -> "FakeProbe":
        self.opened.append(cell)
        return FakeProbe(self, cell)

    def layer_bytes(self, precision: str) -> int:
        return 1000 * int(precision)

    def reference_ms(self) -> float:
        self.now_s += 0.001
        return self.speed()


@dataclass
class FakeProbe:
    machine: FakeMachine
    key: Candidate

    @property
    def max_depth(self) -> int:
        return self.machine.depth if self.key.phase in ("prefill", "decode") else 0

    def warm_up(self, depth: int) -> None:
        self.machine.call_ms(self.key, depth)

    def time_ms(self, depth: int) -> float:
        self.machine.now_s += PAUSE_MS / 1000
        return self.machine.call_ms(self.key, depth)

    def peak_bytes(self) -> int:
        self.machine.call_ms(self.key, 1)
        return 64 * self.key.micro_batch

    def experts_used(self) -> float | None:
        return self.machine.experts_used


def profiler(spec: ModelSpec, machine: FakeMachine, budget_s: float, **how: Any) -> LayerProfiler:
    how.setdefault("grid", RANGES)
    grid = how.pop("grid")
    return LayerProfiler(spec, grid, machine, budget_s, clock=machine.clock, **how)


def errors(measured: LayerMeasurements, machine: FakeMachine) -> list[float]:
    """Relative, of every layer's row."""
    rows = [row for row in measured.rows if row.phase in ("prefill", "decode")]
    return [abs(row.time_ms / machine.layer_ms(key_of(row)) - 1) for row in rows]


def key_of(row: ProfileRow) -> Candidate:
    return Candidate(row.precision, row.phase, row.micro_batch, row.tokens)


# ---- statistics


def test_ranks_of_the_median_s_interval() -> None:
    # By tables of the binomial: of 6 values 1..6, of 10 2..9, of 20 6..15, of 50 18..33.
    assert [interval_rank(n) for n in (1, 3, 5, 6, 9, 10, 20, 50)] == [1, 1, 1, 1, 2, 2, 6, 18]


def test_the_interval_encloses_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    samples = np.sort(rng.lognormal(0.0, 0.3, (2000, 21)), axis=1)
    rank = interval_rank(21)
    inside = (samples[:, rank - 1] <= 1.0) & (samples[:, -rank] >= 1.0)
    assert 0.94 < inside.mean() < 0.99


def test_outliers_are_counted_and_left_out() -> None:
    times = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 9.0, 1.01]
    found = estimate(times)
    assert found.num_outliers == 1 and found.num_samples == 7
    assert found.high_ms <= 1.02 and found.p90_ms <= 1.02
    assert not is_outlier(np.array([1.0, 1.0, 1.0, 1.04])).any()  # within 5 % none is


def test_few_values_are_as_sure_as_their_range() -> None:
    assert estimate([1.0, 1.1, 1.2]).half_width == pytest.approx(0.1 / 1.1)


# ---- drift


def test_unsteady_samples_are_left_out_where_there_are_steady_ones() -> None:
    times, levels = [1.0, 1.0, 1.0, 1.5, 1.5], [2.0, 2.0, 2.0, 3.0, 3.0]
    assert steady(times, levels, MachineSpeed(2.0)) == [1.0, 1.0, 1.0]
    assert steady(times, levels, MachineSpeed(3.0)) == times  # only two are near


def test_times_are_given_for_the_usual_speed_where_they_are_scaled() -> None:
    usual = MachineSpeed(2.0, scales=True)
    assert steady([1.0, 1.5, 0.5], [2.0, 3.0, 1.0], usual) == [1.0, 1.0, 1.0]
    machine = FakeMachine()
    watch = DriftMonitor(machine.reference_ms, machine.clock, scales=True)
    for _ in range(10):
        watch.level_ms()
    assert len(watch.levels_ms) == 10 and watch.notes() == []
    changing = DriftMonitor(lambda: 1.0, lambda: 0.0, [1.0, 1.4] * 20, scales=True)
    assert any("median" in note for note in changing.notes())


def test_a_machine_whose_speed_changes_gives_the_times_of_one_speed(spec: ModelSpec) -> None:
    machine = FakeMachine(slow=(3.0, 20.0))
    found = profiler(spec, machine, 60.0, grid=GRID, scales=True).run()
    level = found.reference_ms
    assert level in (1.0, 1.5)
    rows = [row for row in found.rows if row.phase in ("prefill", "decode")]
    assert max(abs(r.time_ms / machine.layer_ms(key_of(r)) / level - 1) for r in rows) < 0.01


def test_a_noisy_reference_is_no_drift_and_a_slow_stretch_is() -> None:
    rng = np.random.default_rng(3)
    noisy = DriftMonitor(lambda: 1.0, lambda: 0.0, list(1 + 0.08 * rng.standard_normal(60)))
    assert sum(not noisy.speed().holds(level) for level in noisy.levels_ms) <= 2
    assert any("busy" in note for note in noisy.notes())
    slowed = DriftMonitor(lambda: 1.0, lambda: 0.0, [1.0, 1.01] * 20 + [1.1, 1.11] * 10)
    assert sum(not slowed.speed().holds(level) for level in slowed.levels_ms) == 20
    assert ["drifted" in note for note in slowed.notes()] == [True]


def test_the_reference_is_timed_now_and_then() -> None:
    machine = FakeMachine()
    watch = DriftMonitor(machine.reference_ms, machine.clock)
    for _ in range(100):
        watch.level_ms()
        machine.now_s += 0.1
    assert 9 <= len(watch.levels_ms) <= 11
    assert watch.notes() == []


def test_a_slow_stretch_is_said_and_its_samples_replaced(spec: ModelSpec) -> None:
    machine = FakeMachine(slow=(3.0, 5.0))
    measured = profiler(spec, machine, 60.0, grid=GRID).run()
    assert any("drifted" in note for note in measured.notes)
    assert max(errors(measured, machine)) < TOLERANCE


# ---- grids


def test_a_start_has_corners_and_both_sides_of_the_kernels_switches() -> None:
    pairs = RANGES.start("prefill")
    assert {(1, 8), (1, 512), (8, 8), (8, 512), (1, 16), (1, 17), (1, 64), (1, 65)} <= set(pairs)
    assert {(16, 64), (17, 64)} <= set(RANGES.start("decode"))
    assert all(1 <= b <= 8 and 8 <= t <= 512 for b, t in pairs)
    assert {(1, 8), (8, 512)} <= set(RANGES.dense("prefill"))


def test_a_range_of_one_value_is_a_range() -> None:
    span = ShapeRange((2, 2), (64, 64))
    assert span.dense() == [(2, 64)] and set(span.start("decode")) == {(2, 64)}


def test_ends_are_measured_at_few_shapes() -> None:
    cells = end_cells(RANGES.dense("prefill"), RANGES.dense("decode"))
    assert len(cells) == 12
    assert {(c.micro_batch, c.tokens) for c in cells} >= {(8, 512), (1, 0), (32, 0)}


def test_the_farthest_candidate_is_chosen_first(spec: ModelSpec) -> None:
    row = ProfileRow(
        model_key="m", precision="16", phase="prefill", micro_batch=1, prompt_tokens=8,
        time_ms=1, time_ms_p10=1, time_ms_p90=1, num_samples=1,
    )  # fmt: skip
    near, far = (Candidate("16", "prefill", b, t) for b, t in ((1, 11), (8, 512)))
    unseen = Candidate("4", "prefill", 1, 8)
    assert farthest([row], [near, far, unseen], 2) == [unseen, far]


# ---- the loop


def test_layers_and_a_call_s_own_cost_are_told_apart(spec: ModelSpec) -> None:
    machine = FakeMachine()
    measured = profiler(spec, machine, 30.0, grid=GRID).run()
    assert max(errors(measured, machine)) < 1e-6
    stages = {row.phase: row.time_ms for row in measured.rows if row.phase.startswith("stage_")}
    assert stages == pytest.approx({"stage_prefill": 2.0, "stage_decode": 1.0})
    assert {"embedding", "head"} < {row.phase for row in measured.rows}


def test_a_fixed_grid_is_measured_exactly(spec: ModelSpec) -> None:
    measured = profiler(spec, FakeMachine(), 30.0, grid=GRID).run()
    layers = {key_of(row) for row in measured.rows if row.phase in ("prefill", "decode")}
    prefills = {Candidate(p, "prefill", b, t) for p in PRECISIONS for b in (1, 2) for t in (8, 16)}
    decodes = {Candidate(p, "decode", b, t) for p in PRECISIONS for b in (1, 4) for t in (8, 24)}
    assert layers == prefills | decodes
    assert measured.notes == []


def test_sure_cells_are_left_alone_and_unsure_ones_sampled_on(spec: ModelSpec) -> None:
    quiet, noisy = FakeMachine(), FakeMachine(noise=0.08)
    few = profiler(spec, quiet, 60.0, grid=GRID).run()
    many = profiler(spec, noisy, 60.0, grid=GRID).run()
    assert quiet.now_s < 0.6 * noisy.now_s < 40  # one ends long before its budget
    layers = [[r.num_samples for r in m.rows if r.phase == "decode"] for m in (few, many)]
    assert min(layers[0]) >= FEW and max(layers[0]) <= 30
    assert np.mean(layers[1]) > 1.5 * np.mean(layers[0]) and max(layers[1]) <= MAX_SAMPLES
    assert max(errors(many, noisy)) < 0.04


def test_outliers_are_said_and_do_not_move_the_median(spec: ModelSpec) -> None:
    machine = FakeMachine(spike_every=11)
    measured = profiler(spec, machine, 30.0, grid=GRID).run()
    assert any("outliers" in note for note in measured.notes)
    assert max(errors(measured, machine)) < 0.01


def test_more_cells_are_chosen_until_the_budget_ends(spec: ModelSpec) -> None:
    machine = FakeMachine(noise=0.02)
    asked: list[int] = []

    def choose(rows: Any, candidates: Any, count: int) -> list[Candidate]:
        asked.append(len(candidates))
        return list(candidates[:4])

    made = profiler(spec, machine, 60.0, choose=choose)
    measured = made.run()
    assert asked and machine.now_s <= 66
    start = sum(len(RANGES.start(p)) for p in ("prefill", "decode")) * len(PRECISIONS)
    assert sum(r.phase in ("prefill", "decode") for r in measured.rows) > start
    spent = [made.queues[name].spent_s for name in ("prefill", "decode")]
    assert max(spent) < 1.5 * min(spent)
    assert max(errors(measured, machine)) < 0.1


@pytest.mark.parametrize("budget_s", [2.0, 10.0, 40.0])
@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("grid", [GRID, RANGES])
def test_the_budget_is_kept(spec: ModelSpec, budget_s: float, scale: float, grid: Any) -> None:
    machine = FakeMachine(scale=scale, noise=0.05)
    profiler(spec, machine, budget_s, grid=grid).run()
    assert machine.now_s <= 1.1 * budget_s


def test_shapes_that_are_too_slow_are_cut_and_said(spec: ModelSpec) -> None:
    machine = FakeMachine(scale=50.0)  # 512 tokens at 16 bits take 0.28 s, 8 x 512 take 2.1 s
    measured = profiler(spec, machine, 60.0).run()
    rows = [row for row in measured.rows if row.phase == "prefill"]
    assert max(row.micro_batch * row.prompt_tokens for row in rows) < 8 * 512
    assert any(note.startswith("prefill: ") and "too slow" in note for note in measured.notes)
    assert {row.precision for row in rows} == set(PRECISIONS)
    assert not any(note.startswith("decode: ") for note in measured.notes)


def test_memory_is_counted_beside_time(spec: ModelSpec) -> None:
    measured = profiler(spec, FakeMachine(), 30.0, grid=GRID).run()
    weights = {r.precision: r.num_bytes for r in measured.memory if r.what == "layer_weights"}
    assert weights == {"16": 16000, "4": 4000}
    (cache,) = [r for r in measured.memory if r.what == "cache"]
    assert cache.num_bytes == 2 * spec.kv_values_per_token
    peaks = [r for r in measured.memory if r.what == "activations"]
    assert len(peaks) == 16 and all(r.num_bytes == 64 * r.micro_batch for r in peaks)


# ---- resumption


def identity(**changed: Any) -> Identity:
    values: dict[str, Any] = {
        "model_key": "m",
        "device": "d",
        "dtype": "bfloat16",
        "num_threads": 1,
        "depth": 4,
    }
    return Identity(**(values | changed))


def test_a_killed_run_goes_on_where_it_was(spec: ModelSpec, tmp_path: Any) -> None:
    file = PartialFile(tmp_path / "p.json.partial", identity(), every_s=0.0)
    first = FakeMachine(dies_after=700)
    with pytest.raises(KeyboardInterrupt):
        profiler(spec, first, 60.0, grid=GRID, partial=file).run()
    saved = file.load()
    assert saved is not None and 0 < len(saved.cells) <= len(set(first.opened))
    second = FakeMachine()
    measured = profiler(spec, second, 60.0, grid=GRID, partial=file).run()
    counts = {tuple(cell.key): len(cell.times_ms) for cell in saved.cells}
    rows = {tuple(key_of(row)): row.num_samples for row in measured.rows}
    assert all(rows[key] >= count for key, count in counts.items())
    settled = {tuple(cell.key) for cell in saved.cells if cell.num_visits >= 2}
    assert settled and not settled & {tuple(key) for key in second.opened}
    assert max(errors(measured, second)) < 1e-6


def test_time_spent_before_counts(spec: ModelSpec, tmp_path: Any) -> None:
    file = PartialFile(tmp_path / "p.partial", identity())
    first = FakeMachine(noise=0.05, dies_after=1000)
    killed = profiler(spec, first, 30.0, partial=file)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    killed.save()
    second = FakeMachine(noise=0.05)
    profiler(spec, second, 30.0, partial=file).run()
    assert first.now_s + second.now_s < 33


@pytest.mark.parametrize("change", [{"model_key": "n"}, {"dtype": "float32"}, {"num_threads": 2}])
def test_another_run_s_samples_do_not_count(
    spec: ModelSpec, tmp_path: Any, change: dict[str, Any]
) -> None:
    path = tmp_path / "p.partial"
    made = profiler(spec, FakeMachine(), 9.0, grid=GRID, partial=PartialFile(path, identity()))
    made.run()
    made.save()
    assert PartialFile(path, identity()).load() is not None
    assert PartialFile(path, identity(**change)).load() is None
    path.write_text("{ half a file")
    assert PartialFile(path, identity()).load() is None
    PartialFile(path, identity()).remove()
    assert not path.exists()


def test_layers_of_one_kind_are_stacked_as_far_as_they_go() -> None:
    assert stacked_layers((0,) * 4, 0, 6) == LayerRange(1, 7, 8)
    kinds = (0, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1)
    dense, experts = (stacked_layers(kinds, kind, 4) for kind in (0, 1))
    assert (dense.first, dense.end, dense.total) == (0, 3, 4)
    assert (experts.first, experts.end, experts.total) == (6, 10, 11)
    assert not dense.is_first and not dense.is_last and not experts.is_last
    assert stacked_layers(kinds, 1, 1).first == 3


def test_rows_say_how_many_experts_were_used(spec: ModelSpec) -> None:
    machine = FakeMachine(experts_used=6.5)
    measured = profiler(spec, machine, 3.0).run()
    used = {row.phase: row.experts_used for row in measured.rows}
    assert used["decode"] == used["prefill"] == 6.5
    assert used["embedding"] is None and used["stage_decode"] is None
    plain = profiler(spec, FakeMachine(), 3.0).run()
    assert all(row.experts_used is None for row in plain.rows)
