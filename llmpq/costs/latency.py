"""How long one layer takes on a device type: measured, fitted, or from the spec sheet.

`device_times` takes the best that is there: a profile of the type (`costs.fits`), a rehearsal's CPU
profile, the spec sheet (`costs.spec_sheet`), and labels it. What a profile's rows cannot tell, such
as what longer prompts cost where all have one length, comes from the spec sheet's formula; a
stage's call that was not measured costs a default (`StageCall`). Lengths may be numpy arrays; times
are seconds. Stages of several devices: `costs.shards`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from llmpq.cluster import Cluster, unknown_type
from llmpq.costs.anchored import OtherSheet, Sheet
from llmpq.costs.attended import attended_past
from llmpq.costs.fits import LAYER_PHASES, Accuracy, Fitted, fit_all
from llmpq.costs.links import Seconds, Tokens
from llmpq.costs.profile_rows import Profiled, profiled
from llmpq.costs.routing import Routing, measured_routing
from llmpq.costs.spec_sheet import provenance, rooflines
from llmpq.costs.stage_call import STAGE_PHASES, StageCall, default_calls
from llmpq.devices import DeviceType, device_library
from llmpq.errors import UserError
from llmpq.machine import TORCH_CARD, Machine, card, host_cpu, sheet_cpu
from llmpq.model_spec import ModelSpec
from llmpq.precision import (
    PRECISIONS,
    STANDARD,
    in_order,
    is_layer_precision,
    layer_precision,
    with_fewer_for_experts,
)
from llmpq.profile_data import ChosenModel, Profile, ProfiledDevice, ProfileRow

SPEC_SHEET = "spec sheet, not measured"
LIKE_A_CPU = "xeon-8380-256g"  # its proportions stand for those of a CPU without a sheet


class TimeModel(Protocol):
    """Seconds of one phase."""

    def seconds(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """For `micro_batch` requests of `tokens` prompt (decode: past) tokens."""

    def accuracy(self, micro_batch: int, tokens: float) -> Accuracy:
        """Where that figure comes from, and how far off it may be."""


@dataclass(frozen=True)
class LayerTimes:
    """Times of one decoder layer, the embedding, the head and a stage's call on a device type.

    `models` is by (precision, phase); phases that do not depend on the precision have "".
    `machine`: what does the computing, as kernels see it; in a rehearsal this machine's CPU.
    `kinds`: of a model with several kinds of layers, the times of each of them; what is no layer is
    of these times themselves. `window`: the most tokens that a decode step attends to.
    """

    models: Mapping[tuple[str, str], TimeModel]
    precisions: tuple[str, ...]
    provenance: str
    measured: bool = True
    machine: Machine = TORCH_CARD
    factor: float = 1.0
    kinds: tuple["LayerTimes", ...] = ()
    window: int | None = None

    def of_kind(self, kind: int) -> "LayerTimes":
        """The times of one kind of layer, by its place among `ModelSpec.kind_specs`."""
        return self.kinds[kind] if self.kinds else self

    @property
    def offered(self) -> tuple[str, ...]:
        """The precisions of plans that some kind of layers has times for."""
        return in_order(p for one in (self, *self.kinds) for p in one.precisions)

    def prefill_s(self, precision: str, micro_batch: int, prompt_tokens: Tokens) -> Seconds:
        """One layer on `micro_batch` whole prompts."""
        return self.seconds(precision, "prefill", micro_batch, prompt_tokens)

    def decode_s(self, precision: str, micro_batch: int, past_tokens: Tokens) -> Seconds:
        """One layer on one new token of each request."""
        return self.seconds(precision, "decode", micro_batch, past_tokens)

    def embedding_s(self, micro_batch: int, prompt_tokens: Tokens) -> Seconds:
        """Looking up all tokens of a micro-batch."""
        return self.seconds("", "embedding", micro_batch, prompt_tokens)

    def head_s(self, micro_batch: int) -> Seconds:
        """Final norm, logits and choice of one token a request."""
        return self.seconds("", "head", micro_batch, 0)

    def stage_prefill_s(self, micro_batch: int, prompt_tokens: Tokens) -> Seconds:
        """What one prefill call of a stage costs beside its layers."""
        return self.seconds("", "stage_prefill", micro_batch, prompt_tokens)

    def stage_decode_s(self, micro_batch: int, past_tokens: Tokens) -> Seconds:
        """What one decode call of a stage costs beside its layers."""
        return self.seconds("", "stage_decode", micro_batch, past_tokens)

    @property
    def assumed_call_s(self) -> float:
        """The default that a stage's call is taken to cost; 0 where both phases were measured."""
        calls = (self.models.get(("", phase)) for phase in STAGE_PHASES)
        return max((self.factor * c.call_s for c in calls if isinstance(c, StageCall)), default=0.0)

    def scaled(self, factor: float) -> "LayerTimes":
        """The same device, `factor` times slower."""
        kinds = tuple(kind.scaled(factor) for kind in self.kinds)
        return replace(self, factor=self.factor * factor, kinds=kinds)

    def accuracy(
        self, precision: str, phase: str, micro_batch: int, tokens: float
    ) -> Accuracy | None:
        """Of one prediction; `precision` is "" for all but layers. None: not priced."""
        model = self.models.get((precision, phase))
        past = attended_past(phase, tokens, self.window)
        return None if model is None else model.accuracy(micro_batch, float(past))

    def seconds(self, precision: str, phase: str, micro_batch: int, tokens: Tokens) -> Seconds:
        """Of a phase as profiles name it; `precision` is "" for all but layers."""
        model = self.models.get((precision, phase))
        if model is None:
            return 0.0 * np.asarray(tokens, dtype=float)
        return self.factor * model.seconds(micro_batch, attended_past(phase, tokens, self.window))


def with_calls(times: LayerTimes) -> LayerTimes:
    """The same with a default for stages' calls that were not measured."""
    defaults: dict[tuple[str, str], TimeModel] = dict(default_calls(times.machine))
    return replace(times, models=defaults | dict(times.models))


def device_times(
    cluster: Cluster, device_type: str, spec: ModelSpec, profiles: Sequence[Profile]
) -> LayerTimes:
    """The best times to be had: a profile of this type, a rehearsal's CPU profile, the spec sheet.

    Of a model with several kinds of layers, each kind's. Raises `UserError` where the type is
    rehearsed and nothing was measured to rehearse it with.
    """
    kinds = [_kind_times(cluster, device_type, kind, profiles) for kind in spec.kind_specs]
    return of_all_kinds(spec, kinds)


def of_all_kinds(spec: ModelSpec, kinds: Sequence[LayerTimes]) -> LayerTimes:
    """The times of a model from those of each kind of its layers.

    A stage's call is as of the kind that attends to most tokens.
    """
    if len(kinds) == 1:
        return kinds[0]
    offered = {precision for times in kinds for precision in times.precisions}
    kinds = [
        times if kind.experts else _without_experts(times, offered)
        for kind, times in zip(spec.kind_specs, kinds, strict=True)
    ]
    common = offered.intersection(*(times.precisions for times in kinds))
    most = max(kinds, key=lambda times: times.window or np.inf)
    return replace(most, kinds=tuple(kinds), precisions=in_order(common), window=None)


def _without_experts(times: LayerTimes, precisions: Iterable[str]) -> LayerTimes:
    """Those of a layer without experts, also by names that say how experts are held."""
    alike = {name: layer_precision(name).rest for name in precisions}
    models = {
        (name, phase): times.models[rest, phase]
        for name, rest in alike.items()
        for phase in LAYER_PHASES
        if rest in times.precisions
    }
    names = (name for name, rest in alike.items() if rest in times.precisions)
    return replace(times, models=models | dict(times.models), precisions=in_order(names))


def _kind_times(
    cluster: Cluster, device_type: str, spec: ModelSpec, profiles: Sequence[Profile]
) -> LayerTimes:
    """The times of a model with one kind of layer."""
    if found := profiled(cluster, device_type, spec, profiles):
        times = with_calls(_times_of(cluster, device_type, spec, found))
        return times if found.slowdown is None else _slowed(times, found.slowdown)
    if device_type in cluster.rehearse:
        raise UserError(
            f"device type '{device_type}' is rehearsed on the CPU, which has no profile of "
            f"{spec.model_key} with one thread; make it with 'llmpq-profile layers --model "
            f"{spec.name} --threads 1 -o DIR/cpu.json' and plan with '--profiles DIR'"
        )
    sheet, machine = cluster.figures_of(device_type), machine_of(cluster, device_type)
    if sheet is None:
        raise UserError(_why_no_times(device_type, spec, profiles))
    times = with_calls(spec_sheet_times(sheet, spec, machine))
    if any(p.device.type == device_type for p in profiles):
        why = f"; its profile holds no rows of {spec.model_key}"
        times = replace(times, provenance=times.provenance + why)
    return times


def _times_of(cluster: Cluster, device_type: str, spec: ModelSpec, found: Profiled) -> LayerTimes:
    """From a profile, before any slowdown."""
    machine = _profiled_machine(cluster, device_type, found.device)
    rehearsed = found.slowdown is not None or found.device.num_threads is not None
    own = None if rehearsed else cluster.figures_of(device_type)
    figures = Figures(own or alike(found.device), spec, machine, own is not None)
    times = measured_times(found.rows, f"measured on {found.name}", found.models, figures)
    return replace(times, machine=machine)


class Figures(NamedTuple):
    """What the spec sheet's formula needs; `own`: the sheet is of the measured device itself."""

    device: DeviceType
    spec: ModelSpec
    machine: Machine
    own: bool


def alike(device: ProfiledDevice) -> DeviceType:
    """The device of the library that stands for one without a sheet: a CPU, or a card as fast.

    Only its proportions count: how much of a layer is attention.
    """
    library = device_library()
    if device.num_threads is not None:
        return library[LIKE_A_CPU]
    cards = [sheet for sheet in library.values() if sheet.kind == "gpu"]
    wanted = device.bandwidth_gbs or float(np.median([sheet.bandwidth_gbs for sheet in cards]))
    return min(cards, key=lambda sheet: abs(np.log(sheet.bandwidth_gbs / wanted)))


def machine_of(cluster: Cluster, device_type: str) -> Machine:
    """A device type as kernels see it: what its cluster says is installed, else `llmpq[gpu]`.

    A rehearsed type is simulated by this machine's CPU.
    """
    if device_type in cluster.rehearse:
        return host_cpu()
    sheet = cluster.figures_of(device_type)
    if sheet is not None:
        return device_machine(sheet, cluster.kernels_of(device_type))
    capability = cluster.capability_of(device_type)
    if cluster.kind_of(device_type) == "cpu":
        return sheet_cpu(capability)
    return card(capability, cluster.kernels_of(device_type))


def _why_no_times(device_type: str, spec: ModelSpec, profiles: Sequence[Profile]) -> str:
    """Nothing says how fast a type is that the library does not have."""
    make = (
        f"'llmpq-profile layers --model {spec.name} --type {device_type} -o DIR/{device_type}.json'"
        " on it measures it ('--profiles DIR'); bandwidth_gbs and tflops in the cluster file give "
        "its spec sheet's figures"
    )
    if any(p.device.type == device_type for p in profiles):
        return f"device type '{device_type}': its profile holds no rows of {spec.model_key}; {make}"
    return f"{unknown_type(device_type, device_library())}; {make}"


def device_machine(device: DeviceType, libraries: Iterable[str] | None = None) -> Machine:
    """A device of the library with these libraries of kernels; None: those of `llmpq[gpu]`."""
    if device.kind == "cpu":
        return sheet_cpu(device.compute_capability)
    return card(device.compute_capability, libraries)


def _profiled_machine(cluster: Cluster, device_type: str, device: ProfiledDevice) -> Machine:
    """What computed the rows of a profile, or simulates the device that they were scaled for."""
    if device.num_threads is not None:
        return host_cpu()
    if device_type in cluster.rehearse:
        return card(device.compute_capability or "")
    return machine_of(cluster, device_type)


def measured_times(
    rows: Iterable[ProfileRow],
    source: str,
    models: Iterable[ChosenModel] = (),
    figures: Figures | None = None,
) -> LayerTimes:
    """Times from the profile rows of one device type and layer shape.

    `models`: those that were chosen when the rows were measured; others are chosen now. `figures`:
    of the device, for what the rows cannot tell, an embedding or head without rows included.
    """
    if figures is not None:  # what was counted of its memory tells no time, and cannot be hashed
        figures = figures._replace(spec=figures.spec.model_copy(update={"activations": None}))
    fits = _fits(tuple(rows), tuple(models), figures)
    names = {p for p, _ in fits if {(p, phase) for phase in LAYER_PHASES} <= fits.keys()}
    precisions = in_order(filter(is_layer_precision, names))
    ends: dict[tuple[str, str], TimeModel] = {}
    if figures is not None and figures.own:
        ends |= rooflines(figures.device, figures.spec, (), figures.machine)
    source = f"{source}; {_quality_of(fits, bool(ends))}"
    window = figures.spec.window if figures is not None else None
    return LayerTimes(ends | fits, precisions, source, window=window)


def spec_sheet_times(
    device: DeviceType, spec: ModelSpec, machine: Machine | None = None
) -> LayerTimes:
    """A roofline of every kernel, and its launches, on `machine`; None: with `llmpq[gpu]`."""
    machine = machine or device_machine(device)
    precisions = tuple(name for name in STANDARD if PRECISIONS[name].weight_only)
    if spec.experts is not None:
        precisions = with_fewer_for_experts(precisions)
    source = f"{SPEC_SHEET}; {provenance(device)}"
    models = rooflines(device, spec, precisions, machine)
    return LayerTimes(
        models, precisions, source, measured=False, machine=machine, window=spec.window
    )


@lru_cache(maxsize=16)
def _fits(
    rows: tuple[ProfileRow, ...], models: tuple[ChosenModel, ...], figures: Figures | None
) -> dict[tuple[str, str], Fitted]:
    """By (precision, phase). Kept, as all rehearsed types share the rows of one CPU."""
    names = {row.precision for row in rows}
    sheets = _sheets(figures, names, measured_routing(rows)) if figures else {}
    return fit_all(rows, {(one.precision, one.phase): one for one in models}, sheets)


def _sheets(
    figures: Figures, precisions: Iterable[str], routing: Routing | None
) -> dict[tuple[str, str], Sheet]:
    """The formula by (precision, phase); where no kernel is known, that of 16 bits stands in."""
    device, spec, machine, own = figures
    found = rooflines(device, spec, {"16", *precisions}, machine, routing)
    stand_ins: dict[tuple[str, str], Sheet] = {
        (precision, phase): OtherSheet(found["16", phase])
        for precision in precisions
        for phase in ("prefill", "decode")
    }
    sheets = {key: one if own else OtherSheet(one) for key, one in found.items()}
    return stand_ins | sheets | dict(default_calls(machine))


def _quality_of(fits: Mapping[tuple[str, str], Fitted], has_sheet: bool) -> str:
    layers = [found for key, found in fits.items() if key[0]]
    count = sum(len(found.points) for found in layers)
    error = sum(found.mean_error * len(found.points) for found in layers) / max(1, count)
    missing = [p for p in ("embedding", "head") if ("", p) not in fits]
    text = f"fitted, unseen points within {100 * error:.1f} % on average"
    instead = "taken from the spec sheet" if has_sheet else "counted as 0"
    return f"{text}; no {' or '.join(missing)} rows, {instead}" if missing else text


def _slowed(times: LayerTimes, slowdown: float) -> LayerTimes:
    return replace(times.scaled(slowdown), provenance=f"{times.provenance}; x{slowdown:g} slowdown")
