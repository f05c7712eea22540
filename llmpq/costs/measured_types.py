"""Device types that only a profile describes, and profiles that a plan does not use.

A type that the library does not have needs its memory in the cluster file, and either figures there
or a profile. What else a run must know of it (a card's compute capability, or that it is a CPU) is
taken from the profile into the plan's cluster.
"""

from collections.abc import Sequence

from llmpq.cluster import Cluster, DeviceGroup
from llmpq.costs.profile_rows import keys_of, rows_of
from llmpq.model_spec import ModelSpec, shard_faults
from llmpq.profile_data import Profile, ProfiledDevice

DEGREES = (2, 4, 8, 16, 32, 64)  # of stages that several devices share


def with_measured_types(cluster: Cluster, profiles: Sequence[Profile]) -> Cluster:
    """The cluster with what profiles say of the types that the library does not have."""
    measured = {p.device.type: p.device for p in reversed(profiles)}

    def described(group: DeviceGroup) -> DeviceGroup:
        device = measured.get(group.type)
        if device is None or cluster.is_in_library(group.type) or group.type in cluster.rehearse:
            return group
        return group.model_copy(update=_description(group, device))

    nodes = [
        node.model_copy(update={"devices": [described(group) for group in node.devices]})
        for node in cluster.nodes
    ]
    return cluster.model_copy(update={"nodes": nodes})


def _description(group: DeviceGroup, device: ProfiledDevice) -> dict[str, object]:
    """What the cluster file does not say itself."""
    kind = "cpu" if device.num_threads is not None else "gpu"
    capability = group.compute_capability or device.compute_capability
    return {"kind": group.kind or kind, "compute_capability": capability}


def unused_profiles(cluster: Cluster, spec: ModelSpec, profiles: Sequence[Profile]) -> list[str]:
    """A note for each profile that no time of this cluster comes from, with the reason."""
    degrees = [1, *(degree for degree in DEGREES if not shard_faults(spec, degree))]
    keys = {key for n in degrees for kind in spec.shard(n).kind_specs for key in keys_of(kind)}
    notes = []
    for profile in profiles:
        alike = [p for p in profiles if _kind(p) == _kind(profile)]
        why = _why_of_no_use(cluster, profile) or _why_no_rows(keys, spec, profile, alike)
        if why:
            notes.append(
                f"the profile of {profile.device.name} (type {profile.device.type}) is not used: "
                f"{why}"
            )
    return list(dict.fromkeys(notes))


def _kind(profile: Profile) -> tuple[str, int | None]:
    return profile.device.type, profile.device.num_threads


def _why_of_no_use(cluster: Cluster, profile: Profile) -> str:
    """Why no device of the cluster is timed by it; empty where one is."""
    types = {device.type for device in cluster.devices()}
    if profile.device.type in types:
        return ""
    rehearsed = types & set(cluster.rehearse)
    if rehearsed and (profile.device.type == "cuda" or _kind(profile) == ("cpu", 1)):
        return ""
    if rehearsed and profile.device.type == "cpu":
        return f"{', '.join(sorted(rehearsed))}: rehearsed on one thread (--threads 1 measures it)"
    return f"no device of the cluster is of this type, it has {', '.join(sorted(types))}"


def _why_no_rows(keys: set[str], spec: ModelSpec, profile: Profile, alike: list[Profile]) -> str:
    """Why its rows time no layer of this model; empty where they do."""
    rows = [row for row in profile.rows if row.model_key in keys]
    if not rows:
        others = ", ".join(dict.fromkeys(row.model_key for row in profile.rows))
        return f"it is for another model ({others}; this one is {spec.model_key})"
    whole = {key for kind in spec.kind_specs for key in keys_of(kind)}
    is_used = any(rows_of(alike, kind) for kind in spec.kind_specs)
    if is_used or any(row.model_key not in whole for row in rows):
        return ""
    phases = {row.phase for row in rows} & {"prefill", "decode"}
    if len(phases) < 2:
        return f"it has {f'{phases.pop()} rows only' if phases else 'no rows of layers'}"
    return "no precision was measured in both phases"
