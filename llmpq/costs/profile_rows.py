"""Which rows of profiles time the layers of a model, for each device type.

A device type's own profiles come first. A rehearsed type is timed by the one thread of a CPU that
rehearses it, or by a card. Rows are found by the key of the layer shape (`ModelSpec.model_key`).

Not covered: what the rows say (`costs.fits`), and types that no profile times (`costs.latency`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmpq.cluster import Cluster
from llmpq.costs.fits import LAYER_PHASES
from llmpq.model_spec import ModelSpec
from llmpq.profile_data import ChosenModel, MemoryRow, Profile, ProfiledDevice, ProfileRow


@dataclass(frozen=True)
class Profiled:
    """What was measured of a device type. `slowdown`: of its rehearsal; None where it is itself."""

    name: str
    device: ProfiledDevice
    rows: list[ProfileRow]
    models: list[ChosenModel]
    memory: list[MemoryRow]
    slowdown: float | None = None


def profiled(
    cluster: Cluster, device_type: str, spec: ModelSpec, profiles: Sequence[Profile]
) -> Profiled | None:
    """The type's own profiles; else, where it is rehearsed, one thread of the CPU or a card."""
    own = [p for p in profiles if p.device.type == device_type]
    if rows := rows_of(own, spec):
        return _profiled(own, rows, own[0].device.name)
    role = cluster.rehearse.get(device_type)
    return _rehearsed(profiles, spec, role.slowdown) if role else None


def rows_of(profiles: Sequence[Profile], spec: ModelSpec) -> list[ProfileRow]:
    """The rows of this layer shape, if they hold a precision in both phases.

    Where a window has none, those of layers alike that attend to all tokens, as older profiles
    have them.
    """
    for key in keys_of(spec):
        rows = [row for p in profiles for row in p.rows if row.model_key == key]
        phases = [{r.precision for r in rows if r.phase == phase} for phase in LAYER_PHASES]
        if phases[0] & phases[1]:
            return rows
    return []


def keys_of(spec: ModelSpec) -> list[str]:
    """The keys of the rows that time the layers of a model with one kind, best first."""
    wide = spec.model_copy(update={"window": None})
    return list(dict.fromkeys((spec.model_key, wide.model_key)))


def _profiled(profiles: Sequence[Profile], rows: list[ProfileRow], name: str) -> Profiled:
    key = rows[0].model_key
    models = [m for p in profiles for m in p.models if m.model_key == key]
    memory = [row for p in profiles for row in p.memory if row.model_key == key]
    return Profiled(name, profiles[0].device, rows, models, memory)


def _rehearsed(profiles: Sequence[Profile], spec: ModelSpec, slowdown: float) -> Profiled | None:
    """One device: rehearsals run on one thread of the CPU, else they share a card."""
    one_thread = [p for p in profiles if (p.device.type, p.device.num_threads) == ("cpu", 1)]
    cards = [p for p in profiles if p.device.type == "cuda"]
    for what, group in (("one CPU thread", one_thread), ("CUDA", cards)):
        for name in dict.fromkeys(p.device.name for p in group):
            same = [p for p in group if p.device.name == name]
            if rows := rows_of(same, spec):
                found = _profiled(same, rows, f"{name} ({what})")
                return replace(found, slowdown=slowdown)
    return None
