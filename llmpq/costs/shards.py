"""Times of a stage of several devices that share every layer (tensor parallelism).

It takes a shard's time and two all-reduces a layer. A shard that was not profiled is priced from
the whole layer: overhead, which the shortest runs show, stays; the rest shrinks as the roofline
does. Not covered: that small matrices reach less of the peak; exchanges that overlap with
computing.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmpq.cluster import Cluster, Link
from llmpq.costs import links
from llmpq.costs.fits import Accuracy
from llmpq.costs.latency import (
    Figures,
    LayerTimes,
    TimeModel,
    device_times,
    machine_of,
    measured_times,
    of_all_kinds,
    with_calls,
)
from llmpq.costs.links import Seconds, Tokens
from llmpq.costs.profile_rows import rows_of
from llmpq.costs.recipes import grouped
from llmpq.costs.spec_sheet import Roofline, rooflines
from llmpq.devices import DeviceType
from llmpq.errors import UserError
from llmpq.kernel import LAYER_LAUNCHES, START_S
from llmpq.machine import Machine
from llmpq.model_spec import ModelSpec
from llmpq.profile_data import Profile, ProfileRow

Exchange = Callable[[int, Tokens], Seconds]


def tensor_parallel_times(
    cluster: Cluster,
    device_type: str,
    node_name: str,
    spec: ModelSpec,
    degree: int,
    profiles: Sequence[Profile],
) -> LayerTimes:
    """Times of a stage of `degree` devices of one type and node, which share every layer.

    Raises `UserError` where the type is rehearsed or the model cannot be cut so.
    """
    if degree == 1:
        return device_times(cluster, device_type, spec, profiles)
    if device_type in cluster.rehearse:
        raise UserError(
            f"device type '{device_type}' is rehearsed: a stage of {degree} such devices cannot be "
            "priced, as CPU processes do not share layers; plan with --tensor-parallel off"
        )
    link = cluster.link_between(node_name, node_name)
    exchange = _exchanges(link, degree, spec)
    note = f"; {degree} devices per stage, all-reduce over the link of {node_name}"
    kinds = [
        _with_exchanges(_shard_times(cluster, device_type, kind, degree, profiles), exchange, note)
        for kind in spec.kind_specs
    ]
    return of_all_kinds(spec, kinds)


def _with_exchanges(times: LayerTimes, exchange: Mapping[str, Exchange], note: str) -> LayerTimes:
    """Times of what a device computes, with the exchanges of each phase on top."""
    models = {
        key: WithExchange(model, exchange[key[1]]) if key[1] in exchange else model
        for key, model in times.models.items()
    }
    return replace(times, models=models, provenance=times.provenance + note)


@dataclass(frozen=True)
class WithExchange:
    """What a device computes, then what the devices of its stage tell each other."""

    compute: TimeModel
    exchange: Exchange

    def seconds(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """One after the other."""
        return self.compute.seconds(micro_batch, tokens) + self.exchange(micro_batch, tokens)

    def accuracy(self, micro_batch: int, tokens: float) -> Accuracy:
        """That of the computing; links are taken at their word."""
        return self.compute.accuracy(micro_batch, tokens)


def _exchanges(link: Link, degree: int, spec: ModelSpec) -> dict[str, Exchange]:
    """By phase. A layer sums what attention and feed-forward network give: two all-reduces."""

    def all_reduce(num_tokens: Tokens) -> Seconds:
        num_bytes = links.activation_message_bytes(spec, num_tokens)
        return links.all_reduce_s(link, degree, num_bytes)

    return {
        "prefill": lambda p, s: 2 * all_reduce(p * s),
        "decode": lambda q, _: 2 * all_reduce(q),
        "embedding": lambda p, s: all_reduce(p * s),
        "head": lambda q, _: links.best_token_s(link, degree, q),
    }


def _shard_times(
    cluster: Cluster, device_type: str, spec: ModelSpec, degree: int, profiles: Sequence[Profile]
) -> LayerTimes:
    """What one of the devices computes: from its own profile, the whole layer's, the spec sheet."""
    shard = spec.shard(degree)
    own = [p for p in profiles if p.device.type == device_type]
    rows = rows_of(own, spec)
    if rows_of(own, shard) or not rows:
        return device_times(cluster, device_type, shard, profiles)
    machine = machine_of(cluster, device_type)
    sheet = cluster.figures_of(device_type)
    if sheet is None:
        raise UserError(
            f"device type '{device_type}': a stage of several devices cannot be predicted, as "
            "there is neither a profile of shards nor bandwidth_gbs and tflops in the cluster "
            "file; plan with --tensor-parallel off"
        )
    source = f"whole layers measured on {own[0].device.name}"
    whole = measured_times(rows, source, (), Figures(sheet, spec, machine, True))
    whole = with_calls(replace(whole, machine=machine))
    models = _cut_models(whole, rows, sheet, machine, (spec, shard))
    note = f"; one of {degree} parts by the spec sheet, no shard was measured"
    return replace(whole, models=models, provenance=whole.provenance + note)


def _cut_models(
    whole: LayerTimes,
    rows: Sequence[ProfileRow],
    device: DeviceType,
    machine: Machine,
    specs: tuple[ModelSpec, ModelSpec],
) -> dict[tuple[str, str], TimeModel]:
    """A shard's times by (precision, phase); what no roofline covers, each device does in full.

    `specs`: of the whole model and of the shard.
    """
    before, after = (rooflines(device, spec, whole.precisions, machine) for spec in specs)
    overheads = _overheads_s(grouped(rows), before)

    def cut(key: tuple[str, str], model: TimeModel) -> TimeModel:
        if key not in before:
            return model
        if isinstance(model, Roofline):  # nothing of it was measured
            return after[key]
        return CutTime(model, overheads[key[1]], before[key], after[key])

    return {key: cut(key, model) for key, model in whole.models.items()}


@dataclass(frozen=True)
class CutTime:
    """A whole layer's time, of which all but the overhead shrinks as its roofline does."""

    whole: TimeModel
    overhead_s: float
    before: Roofline
    after: Roofline

    def seconds(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """Between a fair share of the whole layer's time and all of it."""
        seconds = self.whole.seconds(micro_batch, tokens)
        overhead = np.minimum(self.overhead_s, seconds)
        share = self.after.busy_s(micro_batch, tokens) / self.before.busy_s(micro_batch, tokens)
        return overhead + (seconds - overhead) * share

    def accuracy(self, micro_batch: int, tokens: float) -> Accuracy:
        """That of the roofline which cuts, and of the whole layer."""
        whole = self.whole.accuracy(micro_batch, tokens)
        cut = self.after.accuracy(micro_batch, tokens)
        if whole.error is None or cut.error is None:
            return Accuracy(cut.source, None)
        return Accuracy(cut.source, max(whole.error, cut.error))


def _overheads_s(
    rows: Mapping[tuple[str, str], Sequence[ProfileRow]],
    rooflines: Mapping[tuple[str, str], Roofline],
) -> dict[str, float]:
    """By phase: launches and the like, what the shortest runs take beyond their rooflines.

    The least over the precisions counts: others may unpack slowly, which is work that shrinks.
    """
    beyond: dict[str, list[float]] = defaultdict(list)
    for key, roofline in rooflines.items():
        if key in rows:
            shortest = min(rows[key], key=lambda row: row.time_ms)
            busy_s = float(roofline.busy_s(shortest.micro_batch, shortest.tokens))
            beyond[key[1]].append(shortest.time_ms / 1000 - busy_s)
    return {phase: max(LAYER_LAUNCHES * START_S, min(seconds)) for phase, seconds in beyond.items()}
