"""The profile of one device from start to end: what is measured, and what becomes of it.

`profile_device` describes a device, measures the shapes that a `LayerRequest` asks for, keeps the
samples beside the output while the run lasts, and returns the profile. Without lists of shapes the
grid is adaptive: the cost model names the shapes where it is least sure. Not covered: which devices
are measured, and writing.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmpq.artifact import Provenance, read_json
from llmpq.cluster import GIB
from llmpq.errors import UserError
from llmpq.model_lookup import config_path
from llmpq.model_spec import ModelSpec
from llmpq.models.stage_model import load_config
from llmpq.precision import layer_precision, with_fewer_for_experts
from llmpq.profile_data import Profile, ProfiledDevice, ProfileRow
from llmpq.profiler.device_probe import Card, card_state, context_bytes, copy_gbs
from llmpq.profiler.grid import AdaptiveGrid, Choose, Grid, ShapeRange
from llmpq.profiler.host import cpu_memory_gib, cpu_name
from llmpq.profiler.layers import LayerMeasurements, LayerProfiler, ProfilingProgress
from llmpq.profiler.resume import Identity, PartialFile
from llmpq.profiler.stacks import Bench, stack_depth, stacked_layers
from llmpq.quant import available_precisions, machine_here, why_unavailable
from llmpq.serving import matrices_of, switch_rows

MIN_MEASURING = 0.5  # of the budget, however long loading took
# What is measured where nothing else is said: on a CPU, on a card.
MICRO_BATCHES = {
    "prefill_micro_batches": (1, 2, 4, 8),
    "decode_micro_batches": (1, 2, 4, 8, 16, 32),
}
TOKENS = ("prompt_tokens", "past_tokens")
LONGEST = {"cpu": 512, "cuda": 2048}
SHORTEST = 8


@dataclass(frozen=True)
class LayerRequest:
    """What to measure of a model.

    `lists`: shapes by their names in `MICRO_BATCHES` and `TOKENS`; where one is missing, the usual
    ones. `adaptive`: from the least of a list to its greatest, where the cost model is least sure.
    """

    model: str
    spec: ModelSpec
    lists: Mapping[str, tuple[int, ...]]
    adaptive: bool
    precisions: tuple[str, ...] | None
    budget_s: float
    resume: bool = True
    extend: bool = False

    @property
    def share_s(self) -> float:
        """Of the budget, for each kind of layer."""
        return self.budget_s / len(self.spec.kind_specs)


@dataclass(frozen=True)
class Target:
    """A device to measure, and where its profile goes. `type`, `card`: None where there is none."""

    device: torch.device
    dtype: torch.dtype
    type: str | None
    output: Path
    card: Card | None = None

    def partial_paths(self, spec: ModelSpec) -> list[Path]:
        """Where samples are kept while a run lasts, of each kind of layer."""
        names = ["partial", *(f"{place}.partial" for place in range(1, len(spec.kind_specs)))]
        return [self.output.with_name(f"{self.output.name}.{name}") for name in names]


@dataclass(frozen=True)
class KindMeasurements:
    """What was measured of one kind of layer, at which precisions; samples are in `partial`."""

    spec: ModelSpec
    measured: LayerMeasurements
    precisions: tuple[str, ...]
    partial: PartialFile


@dataclass(frozen=True)
class LayerProfile:
    """A profile, and what was measured for it now, of each kind of layer."""

    profile: Profile
    kinds: tuple[KindMeasurements, ...]


def profile_device(
    target: Target,
    request: LayerRequest,
    choose: Choose,
    on_resume: Callable[[int], None],
    on_visit: Callable[[ProfilingProgress], None],
) -> LayerProfile:
    """Measures one device. `choose`: names the shapes to measure next (`costs.fits.worst`).

    `on_resume` is told how many cells a killed run has left. Raises `UserError` for shapes and
    precisions that cannot be measured.
    """
    if target.card is not None:  # events and streams without a name are those of the current card
        torch.cuda.set_device(target.card.index)
    before = card_state(target.device)
    longest = longest_text(request, target.device)
    request = replace(request, spec=request.spec.within(longest))
    described = _describe(target)
    old = _old_profile(target.output, described) if request.extend else None
    kinds = tuple(
        _measure_kind(target, request, described, place, choose, on_resume, on_visit)
        for place in range(len(request.spec.kind_specs))
    )
    notes = [note for kind in kinds for note in kind.measured.notes]
    if before:
        notes.append(f"card before: {before}; after: {card_state(target.device)}")
    profile = Profile(
        device=described.model_copy(update={"reference_ms": kinds[0].measured.reference_ms}),
        rows=[row for kind in kinds for row in kind.measured.rows],
        memory=[row for kind in kinds for row in kind.measured.memory],
        notes=list(dict.fromkeys(notes)),
        provenance=Provenance.here(described.name),
    )
    return LayerProfile(extended(profile, old) if old else profile, kinds)


def longest_text(request: LayerRequest, device: torch.device) -> int:
    """The most tokens of a text that is measured; windows that are wider make no kinds of layers.

    Two tokens come after the past ones of a step: the one that it computes and the one it chooses.
    """
    usual = (LONGEST[device.type],)
    return 2 + max(max(request.lists.get(name, usual)) for name in TOKENS)


def _measure_kind(
    target: Target,
    request: LayerRequest,
    described: ProfiledDevice,
    place: int,
    choose: Choose,
    on_resume: Callable[[int], None],
    on_visit: Callable[[ProfilingProgress], None],
) -> KindMeasurements:
    """Measures the kind of layer at `place`, which has an equal share of the budget."""
    start_s, spec = time.monotonic(), request.spec.kind_specs[place]
    grid = make_grid(request, target, spec)
    partial, profiler = _profiler(target, request, described, grid, start_s, choose, place)
    if found := partial.load():
        on_resume(len(found.cells))
    before_s = place * request.share_s

    def visited(now: ProfilingProgress) -> None:
        on_visit(replace(now, spent_s=before_s + now.spent_s))

    try:
        measured = profiler.run(visited)
    except BaseException:  # a later run goes on from here
        profiler.save()
        raise
    return KindMeasurements(spec, measured, grid.precisions, partial)


def make_grid(
    request: LayerRequest, target: Target, spec: ModelSpec | None = None
) -> Grid | AdaptiveGrid:
    """The lists as they are; or ranges, from the least of a list to its greatest.

    `spec`: of the kind of layer that is measured.
    """
    spec = spec or request.spec
    max_positions = request.spec.max_positions
    for name in TOKENS:
        longest = max(request.lists.get(name, (0,)))
        if longest >= max_positions:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {longest}: the model has {max_positions} positions")
    precisions = _precisions(request, target, spec)
    longest = min(LONGEST[target.device.type], max_positions - 1)
    usual = tuple(n for n in (32, 128, 512) if n < max_positions) or (max(1, max_positions // 2),)
    if request.adaptive:
        usual = (min(SHORTEST, longest), max(1, longest))
    lists = {**MICRO_BATCHES, **dict.fromkeys(TOKENS, usual), **request.lists}
    if not request.adaptive:
        return Grid(precisions, **lists)
    ends = {name: (min(values), max(values)) for name, values in lists.items()}
    return AdaptiveGrid(
        precisions,
        ShapeRange(ends["prefill_micro_batches"], ends["prompt_tokens"]),
        ShapeRange(ends["decode_micro_batches"], ends["past_tokens"]),
        switch_rows(machine_here(target.device, target.dtype), matrices_of(spec, precisions)),
    )


def _precisions(request: LayerRequest, target: Target, spec: ModelSpec) -> tuple[str, ...]:
    """Those asked for, or all that the device serves; of experts also fewer bits than of the rest.

    Layers without experts are measured once for all precisions that differ in these alone.
    """
    place = target.device, target.dtype
    asked = request.precisions or available_precisions(*place)
    names = dict.fromkeys(name for p in asked for name in layer_precision(p))
    faults = [reason for name in names if (reason := why_unavailable(name, *place))]
    if faults:
        raise UserError(f"--precisions: {faults[0]}")
    if spec.experts is None:
        return tuple(dict.fromkeys(layer_precision(p).rest for p in asked))
    return tuple(asked) if request.precisions else with_fewer_for_experts(asked)


def _profiler(
    target: Target,
    request: LayerRequest,
    described: ProfiledDevice,
    grid: Grid | AdaptiveGrid,
    start_s: float,
    choose: Choose,
    place: int,
) -> tuple[PartialFile, LayerProfiler]:
    spec = request.spec.kind_specs[place]
    kinds, most = request.spec.kind_of_layers, stack_depth(2 * spec.layer_params)
    layers = stacked_layers(kinds, place, most)
    identity = Identity(
        model_key=spec.model_key,
        device=described.name,
        dtype=described.dtype or "",
        num_threads=described.num_threads,
        depth=layers.count,
    )
    partial = PartialFile(target.partial_paths(request.spec)[place], identity)
    if not request.resume:
        partial.remove()
    config = load_config(config_path(request.model))
    bench = Bench(config, grid.precisions, layers, target.dtype, target.device, grid.most_rows)
    left_s = request.share_s - (time.monotonic() - start_s)
    budget_s = max(MIN_MEASURING * request.share_s, left_s)
    scales = target.device.type == "cpu"
    return partial, LayerProfiler(spec, grid, bench, budget_s, choose, partial, scales=scales)


def _describe(target: Target) -> ProfiledDevice:
    """The device, with the bandwidth of a copy and the framework's own memory."""
    device, card = target.device, target.card
    described = ProfiledDevice(
        name=cpu_name(),
        type=target.type or device.type,
        memory_bytes=int(cpu_memory_gib() * GIB),
        dtype=str(target.dtype).removeprefix("torch."),
        context_bytes=context_bytes(device, card.used_before_bytes if card else 0),
        bandwidth_gbs=copy_gbs(device),
    )
    if card is None:
        return described.model_copy(update={"num_threads": torch.get_num_threads()})
    update = {
        "name": card.name,
        "memory_bytes": card.memory_bytes,
        "compute_capability": card.compute_capability,
    }
    return described.model_copy(update=update)


def _old_profile(path: Path, device: ProfiledDevice) -> Profile | None:
    """What the output holds of this device; `UserError` where it is of another."""
    if not path.exists():
        return None
    old = read_json(path, Profile)
    for field in ("name", "type", "dtype", "num_threads"):
        was, now = getattr(old.device, field), getattr(device, field)
        if was != now:
            raise UserError(
                f"{path}: --extend: the {field} of its device is {was}, here it is {now}"
            )
    return old


def extended(profile: Profile, old: Profile) -> Profile:
    """The profile with the old rows that were not measured anew."""
    keys = {row_key(row) for row in profile.rows}
    models = {row.model_key for row in profile.memory}
    rows = [row for row in old.rows if row_key(row) not in keys]
    memory = [row for row in old.memory if row.model_key not in models]
    update = {"rows": rows + profile.rows, "memory": memory + profile.memory}
    return profile.model_copy(update=update)


def row_key(row: ProfileRow) -> tuple[str, str, str, int, int, int]:
    """What a row is of: model, precision, phase, micro-batch, prompt and past tokens."""
    return (
        row.model_key,
        row.precision,
        row.phase,
        row.micro_batch,
        row.prompt_tokens,
        row.past_tokens,
    )
