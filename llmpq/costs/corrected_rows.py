"""The rows of a device type's profile with the factors that runs have shown.

A type that has been profiled keeps its rows, each times the factor of its part, phase and
micro-batch; one that was priced by its spec sheet gets rows of the sheet's times at the sizes that
ran. Not covered: what the factors are (`costs.recalibrate`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmpq.cluster import MIB, Cluster
from llmpq.costs.latency import LayerTimes
from llmpq.costs.profile_rows import profiled
from llmpq.costs.recalibrate import (
    CALL,
    EMBEDDING,
    HEAD,
    PHASES,
    Correction,
    StageCalls,
    functions_of,
)
from llmpq.model_spec import ModelSpec
from llmpq.profile_data import MemoryRow, Phase, Profile, ProfiledDevice, ProfileRow


@dataclass(frozen=True)
class Base:
    """What a device type was planned with: rows and how many times slower it simulates them."""

    device: ProfiledDevice
    rows: tuple[ProfileRow, ...]
    memory: tuple[MemoryRow, ...] = ()
    slowdown: float = 1.0


def base_of(
    cluster: Cluster, device_type: str, spec: ModelSpec, profiles: Sequence[Profile]
) -> Base | None:
    """What `device_times` prices the type with; None where that is the spec sheet."""
    found = profiled(cluster, device_type, spec, profiles)
    if found is None:
        return None
    return Base(found.device, tuple(found.rows), tuple(found.memory), found.slowdown or 1.0)


def corrected_rows(
    base: Base | None,
    times: LayerTimes,
    found: Correction,
    measured: Sequence[StageCalls],
    spec: ModelSpec,
) -> list[ProfileRow]:
    """Full rows of a device type: what it was planned with, times the factors.

    Micro-batches that ran get rows at all lengths of the profile and at the ends of those that
    ran. Without a profile: the spec sheet's times on a small grid.
    """
    rows = _sheet_rows(times, spec) if base is None else list(base.rows)
    slowdown = base.slowdown if base else 1.0
    rows += _ran_rows(rows, times.scaled(1 / slowdown), measured, spec)
    return [_scaled(row, slowdown * _factor(row, found)) for row in rows]


def corrected_device(
    base: Base | None, device_type: str, cluster: Cluster, num_reports: int
) -> ProfiledDevice:
    """What the rows are of, and where they come from, in its name."""
    runs = f"corrected by {num_reports} run{'s' if num_reports > 1 else ''}"
    if base is None:
        sheet = cluster.figures_of(device_type)
        assert sheet is not None, "times without a profile come from figures"
        memory = int(sheet.memory_gib * 1024 * MIB)
        name = f"{sheet.name} (spec sheet, {runs})"
        return ProfiledDevice(name=name, type=device_type, memory_bytes=memory)
    role = cluster.rehearse.get(device_type)
    slower = f"x{base.slowdown:g} slowdown, " if base.slowdown != 1 else ""
    changed = {"type": device_type, "name": f"{base.device.name} ({slower}{runs})"}
    memory = int(role.memory_mib * MIB) if role else base.device.memory_bytes
    return base.device.model_copy(update=changed | {"memory_bytes": memory})


def _factor(row: ProfileRow, found: Correction) -> float:
    """Of a profile's row; what happens in both phases at any size knows no size."""
    if row.phase in (EMBEDDING, HEAD):
        return found.of((row.phase, ""))
    phase = row.phase.removeprefix("stage_")
    part = (CALL if row.phase != phase else row.precision, phase)
    return found.of(part) * found.sizes.get((phase, row.micro_batch), 1.0)


def _scaled(row: ProfileRow, factor: float) -> ProfileRow:
    names = ("time_ms", "time_ms_p10", "time_ms_p90")
    return row.model_copy(update={name: factor * getattr(row, name) for name in names})


def _ran_rows(
    rows: Sequence[ProfileRow], times: LayerTimes, measured: Sequence[StageCalls], spec: ModelSpec
) -> list[ProfileRow]:
    """Rows, not corrected yet, of sizes and lengths that ran and that `rows` lack."""
    known = {(r.precision, r.phase, r.micro_batch, r.tokens) for r in rows}
    phases = {r.phase for r in rows}
    added = []
    for phase, size in dict.fromkeys((c.phase, c.micro_batch) for c in measured):
        mine = [c for c in measured if (c.phase, c.micro_batch) == (phase, size)]
        lengths = {row.tokens for row in rows if row.phase == phase}
        lengths |= {round(pick(c.tokens for c in mine)) for pick in (min, max)}
        count = sum(c.count for c in mine)
        for length in sorted(lengths):
            for row in _rows_at(times, phase, size, length, count, spec):
                key = (row.precision, row.phase, size, length)
                if key not in known and row.phase in phases:
                    added.append(row)
    return added


def _rows_at(
    times: LayerTimes, phase: str, size: int, length: int, count: int, spec: ModelSpec
) -> Iterable[ProfileRow]:
    """A layer at each precision, and the call, at one size and length."""
    layer, call = functions_of(times, phase)
    for precision in times.precisions:
        seconds = float(layer(precision, size, length))
        yield _row(spec, precision, phase, size, length, seconds, count)
    if seconds := float(call(size, length)):
        yield _row(spec, "16", f"stage_{phase}", size, length, seconds, count)


def _sheet_rows(times: LayerTimes, spec: ModelSpec) -> list[ProfileRow]:
    """The spec sheet's times on a small grid."""
    lengths = [n for n in (16, 128, 512, 2048) if n < spec.max_positions] or [1]
    sizes = (1, 2, 4, 8, 16, 32)
    rows = [
        row
        for phase in PHASES
        for size in sizes
        for length in lengths
        for row in _rows_at(times, phase, size, length, 1, spec)
    ]
    for size in sizes:
        rows.append(_row(spec, "16", HEAD, size, 0, float(times.head_s(size)), 1))
        for n in (1, *lengths):
            seconds = float(times.embedding_s(size, n))
            rows.append(_row(spec, "16", EMBEDDING, size, n, seconds, 1))
    return rows


def _row(
    spec: ModelSpec, precision: str, phase: str, size: int, length: int, seconds: float, count: int
) -> ProfileRow:
    time_ms = max(1e-6, 1000 * seconds)
    name: Phase = phase  # type: ignore[assignment]
    return ProfileRow(
        model_key=spec.model_key,
        precision=precision,
        phase=name,
        micro_batch=size,
        prompt_tokens=0 if phase.endswith("decode") else length,
        past_tokens=length if phase.endswith("decode") else 0,
        time_ms=time_ms,
        time_ms_p10=time_ms,
        time_ms_p90=time_ms,
        num_samples=count,
    )
