"""How long one layer takes on a device type: measured, fitted, or from the spec sheet.

Measured rows of one precision and phase give two models. A linear regression, weighted for
relative error: prefill of p prompts of s tokens on {p, s, p s, p s^2, 1}, decode of q requests on
{q (past + 1), q, past, 1}, embedding on {tokens, 1}, head on {q, 1}. And, where the asked
micro-batch itself was profiled at two lengths or more, the straight line between its measured
lengths (beyond them, along the nearest two): kernels switch with the batch, and one plane over
all batches smears that. Predictions never fall below half the shortest measured time.

Without a profile: a plain roofline of the spec sheet, labelled as such.

A stage of several devices (tensor parallelism) takes a shard's time and two all-reduces a layer.
A shard that was not profiled is priced from the whole layer: overhead, which the shortest runs
show, stays; the rest shrinks as the roofline does.
Lengths may be numpy arrays; times are seconds. Not covered: that small matrices reach less of
the peak; exchanges that overlap with computing.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from llmpq.cluster import Cluster, Link
from llmpq.costs import links
from llmpq.costs.links import Seconds, Tokens
from llmpq.devices import DeviceType, device_library
from llmpq.errors import UserError
from llmpq.model_spec import ModelSpec
from llmpq.precision import PRECISIONS
from llmpq.profile_data import Profile, ProfileRow

# What a kernel reaches of the spec sheet, and what starting a layer's kernels costs.
PEAK_SHARE = 0.5
BANDWIDTH_SHARE = 0.7
LAUNCH_S = 30e-6
SPEC_SHEET = "spec sheet, not measured"

Features = Callable[[float, Tokens], tuple[Any, ...]]


class TimeModel(Protocol):
    """Seconds of one phase."""

    def seconds(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """For `micro_batch` requests of `tokens` prompt (decode: past) tokens."""


@dataclass(frozen=True)
class LayerTimes:
    """Times of one decoder layer, the embedding, the head and a stage's call on a device type.

    `models` is by (precision, phase); phases that do not depend on the precision have "".
    """

    models: Mapping[tuple[str, str], TimeModel]
    precisions: tuple[str, ...]
    provenance: str
    measured: bool = True
    factor: float = 1.0

    def prefill_s(self, precision: str, micro_batch: int, prompt_tokens: Tokens) -> Seconds:
        """One layer on `micro_batch` whole prompts."""
        return self._seconds(precision, "prefill", micro_batch, prompt_tokens)

    def decode_s(self, precision: str, micro_batch: int, past_tokens: Tokens) -> Seconds:
        """One layer on one new token of each request."""
        return self._seconds(precision, "decode", micro_batch, past_tokens)

    def embedding_s(self, micro_batch: int, prompt_tokens: Tokens) -> Seconds:
        """Looking up all tokens of a micro-batch."""
        return self._seconds("", "embedding", micro_batch, prompt_tokens)

    def head_s(self, micro_batch: int) -> Seconds:
        """Final norm, logits and choice of one token a request."""
        return self._seconds("", "head", micro_batch, 0)

    def stage_prefill_s(self, micro_batch: int, prompt_tokens: Tokens) -> Seconds:
        """What one prefill call of a stage costs beside its layers."""
        return self._seconds("", "stage_prefill", micro_batch, prompt_tokens)

    def stage_decode_s(self, micro_batch: int, past_tokens: Tokens) -> Seconds:
        """What one decode call of a stage costs beside its layers."""
        return self._seconds("", "stage_decode", micro_batch, past_tokens)

    def scaled(self, factor: float) -> "LayerTimes":
        """The same device, `factor` times slower."""
        return replace(self, factor=self.factor * factor)

    def _seconds(self, precision: str, phase: str, micro_batch: int, tokens: Tokens) -> Seconds:
        model = self.models.get((precision, phase))
        if model is None:
            return 0.0 * np.asarray(tokens, dtype=float)
        return self.factor * model.seconds(micro_batch, tokens)


def device_times(
    cluster: Cluster, device_type: str, spec: ModelSpec, profiles: Sequence[Profile]
) -> LayerTimes:
    """The best times to be had: a profile of this type, a rehearsal's CPU profile, the spec sheet.

    Raises `UserError` where the type is rehearsed and nothing was measured to rehearse it with.
    """
    own = [p for p in profiles if p.device.type == device_type]
    if rows := _rows(own, spec):
        return measured_times(rows, f"measured on {own[0].device.name}")
    if device_type in cluster.rehearse:
        return _rehearsed(cluster, device_type, spec, profiles)
    times = spec_sheet_times(device_library()[device_type], spec)
    if own:
        why = f"; its profile holds no rows of {spec.model_key}"
        times = replace(times, provenance=times.provenance + why)
    return times


def measured_times(rows: Iterable[ProfileRow], source: str) -> LayerTimes:
    """Times from the profile rows of one device type and layer shape."""
    grouped = _grouped(rows)
    fits = {key: fit(group) for key, group in grouped.items()}
    precisions = tuple(p for p in PRECISIONS if {(p, "prefill"), (p, "decode")} <= fits.keys())
    return LayerTimes(fits, precisions, f"{source}; {_quality_of(fits, grouped)}")


def spec_sheet_times(device: DeviceType, spec: ModelSpec) -> LayerTimes:
    """A roofline: max(operations / reached peak, bytes / reached bandwidth) + launch."""
    precisions = tuple(name for name, p in PRECISIONS.items() if p.weight_only)
    return LayerTimes(_rooflines(device, spec, precisions), precisions, SPEC_SHEET, measured=False)


# ---- from measurements


@dataclass(frozen=True)
class Fitted:
    """A regression over all rows, and a curve for each micro-batch measured at two lengths."""

    features: Features
    coefficients: np.ndarray
    curves: Mapping[int, tuple[np.ndarray, np.ndarray]]
    floor_s: float
    mean_error: float  # relative, of the regression over its own rows

    def seconds(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """Along the micro-batch's own curve, else by regression."""
        if micro_batch in self.curves:
            value = _along(*self.curves[micro_batch], tokens)
        else:
            value = _columns(self.features, micro_batch, tokens) @ self.coefficients
        return np.maximum(self.floor_s, value)


def fit(rows: Sequence[ProfileRow]) -> Fitted:
    """Least squares of relative errors over rows of one phase and precision."""
    features = FEATURES[rows[0].phase]
    batch = np.array([row.micro_batch for row in rows], dtype=float)
    length = np.array([_length(row) for row in rows], dtype=float)
    seconds = np.array([row.time_ms for row in rows]) / 1000
    columns = np.stack(np.broadcast_arrays(*features(batch, length)), axis=-1)  # type: ignore[arg-type]
    relative = columns / seconds[:, None]
    scale = np.maximum(np.abs(relative).max(axis=0), 1e-300)
    solution = np.linalg.lstsq(relative / scale, np.ones(len(rows)), rcond=1e-10)[0] / scale
    floor_s = float(seconds.min()) / 2
    error = np.abs(np.maximum(columns @ solution, floor_s) / seconds - 1).mean()
    return Fitted(features, solution, _curves(batch, length, seconds), floor_s, float(error))


def _curves(
    batch: np.ndarray, length: np.ndarray, seconds: np.ndarray
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    curves = {}
    for size in np.unique(batch):
        mine = batch == size
        lengths, where = np.unique(length[mine], return_inverse=True)
        if len(lengths) >= 2:
            means = np.bincount(where, weights=seconds[mine]) / np.bincount(where)
            curves[int(size)] = (lengths, means)
    return curves


def _along(lengths: np.ndarray, seconds: np.ndarray, tokens: Tokens) -> Seconds:
    """On the line between the two nearest measured lengths, or their extension."""
    right = np.clip(np.searchsorted(lengths, tokens), 1, len(lengths) - 1)
    left = right - 1
    share = (tokens - lengths[left]) / (lengths[right] - lengths[left])
    return seconds[left] + share * (seconds[right] - seconds[left])


def _columns(features: Features, micro_batch: float, tokens: Tokens) -> np.ndarray:
    values = features(micro_batch, np.asarray(tokens, dtype=float))
    return np.stack(np.broadcast_arrays(*values), axis=-1)


def _prefill_features(p: float, s: Tokens) -> tuple[Any, ...]:
    return p, s, p * s, p * s * s, 1.0


def _decode_features(q: float, past: Tokens) -> tuple[Any, ...]:
    return q * (past + 1), q, past, 1.0


FEATURES: dict[str, Features] = {
    "prefill": _prefill_features,
    "stage_prefill": _prefill_features,
    "decode": _decode_features,
    "stage_decode": _decode_features,
    "embedding": lambda p, s: (p * s, 1.0),
    "head": lambda q, _: (q, 1.0),
}


def _length(row: ProfileRow) -> int:
    if row.phase in ("decode", "stage_decode"):
        return row.past_tokens
    return 0 if row.phase == "head" else row.prompt_tokens


def _grouped(rows: Iterable[ProfileRow]) -> dict[tuple[str, str], list[ProfileRow]]:
    """By (precision, phase); "" where the precision does not matter."""
    grouped: dict[tuple[str, str], list[ProfileRow]] = defaultdict(list)
    for row in rows:
        precision = row.precision if row.phase in ("prefill", "decode") else ""
        grouped[precision, row.phase].append(row)
    return grouped


def _rows(profiles: Sequence[Profile], spec: ModelSpec) -> list[ProfileRow]:
    """The rows of this layer shape, if they hold a precision in both phases."""
    rows = [row for p in profiles for row in p.rows if row.model_key == spec.model_key]
    phases = [{r.precision for r in rows if r.phase == phase} for phase in ("prefill", "decode")]
    return rows if phases[0] & phases[1] else []


def _quality_of(
    fits: Mapping[tuple[str, str], Fitted], rows: Mapping[tuple[str, str], Sequence[ProfileRow]]
) -> str:
    layers = [key for key in fits if key[0]]
    count = sum(len(rows[key]) for key in layers)
    error = sum(fits[key].mean_error * len(rows[key]) for key in layers) / max(1, count)
    missing = [p for p in ("embedding", "head") if ("", p) not in fits]
    text = f"fitted, {100 * error:.1f} % mean error"
    return f"{text}; no {' or '.join(missing)} rows, counted as 0" if missing else text


def _rehearsed(
    cluster: Cluster, device_type: str, spec: ModelSpec, profiles: Sequence[Profile]
) -> LayerTimes:
    found = _rehearsal_rows(profiles, spec)
    if found is None:
        raise UserError(
            f"device type '{device_type}' is rehearsed on the CPU, which has no profile of "
            f"{spec.model_key} with one thread; make it with 'llmpq-profile layers --model "
            f"{spec.name} --threads 1 -o DIR/cpu.json' and plan with '--profiles DIR'"
        )
    slowdown = cluster.rehearse[device_type].slowdown
    times = measured_times(found[1], f"measured on {found[0]}")
    return replace(times.scaled(slowdown), provenance=f"{times.provenance}; x{slowdown:g} slowdown")


def _rehearsal_rows(
    profiles: Sequence[Profile], spec: ModelSpec
) -> tuple[str, list[ProfileRow]] | None:
    """One device and its rows: rehearsals run on one thread of the CPU, else share a card."""
    one_thread = [p for p in profiles if (p.device.type, p.device.num_threads) == ("cpu", 1)]
    for what, group in (
        ("one CPU thread", one_thread),
        ("CUDA", [p for p in profiles if p.device.type == "cuda"]),
    ):
        for name in dict.fromkeys(p.device.name for p in group):
            if rows := _rows([p for p in group if p.device.name == name], spec):
                return f"{name} ({what})", rows
    return None


# ---- from the spec sheet

Work = Callable[[int, Tokens], tuple[Any, Any]]  # operations, bytes


@dataclass(frozen=True)
class Roofline:
    """max(operations / flops, bytes / bandwidth) + launch."""

    work: Work
    flops: float
    bandwidth: float

    def seconds(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """By whichever of arithmetic and memory is the limit."""
        return self.busy_s(micro_batch, tokens) + LAUNCH_S

    def busy_s(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """The same without the launch."""
        operations, num_bytes = self.work(micro_batch, np.asarray(tokens, dtype=float))
        return np.maximum(operations / self.flops, num_bytes / self.bandwidth)


def _rooflines(
    device: DeviceType, spec: ModelSpec, precisions: Iterable[str]
) -> dict[tuple[str, str], Roofline]:
    """By (precision, phase): layers in both phases, embedding and head."""
    flops = device.fp16_tflops * 1e12 * PEAK_SHARE
    bandwidth = device.bandwidth_gbs * 1e9 * BANDWIDTH_SHARE
    work: dict[tuple[str, str], Work] = {}
    for precision in precisions:
        work[precision, "prefill"] = _prefill_work(spec, precision)
        work[precision, "decode"] = _decode_work(spec, precision)
    work["", "embedding"] = lambda p, s: (0.0 * s, 4.0 * spec.hidden_size * p * s)
    work["", "head"] = lambda q, _: (2.0 * spec.head_params * q, 2.0 * spec.head_params)
    return {key: Roofline(one, flops, bandwidth) for key, one in work.items()}


def _prefill_work(spec: ModelSpec, precision: str) -> Work:
    """Linears on all tokens; causal attention; weights read and cache written once."""
    weights, weight_bytes = _weights(spec, precision)
    attention = 2.0 * spec.num_heads * spec.head_dim  # 2 matrices x 2 operations / 2 (causal)

    def work(p: int, s: Tokens) -> tuple[Any, Any]:
        operations = 2.0 * weights * p * s + attention * p * s * s
        return operations, weight_bytes + 2.0 * spec.kv_values_per_token * p * s

    return work


def _decode_work(spec: ModelSpec, precision: str) -> Work:
    """Linears on one token a request; attention over the past; weights and cache read once."""
    weights, weight_bytes = _weights(spec, precision)
    attention = 4.0 * spec.num_heads * spec.head_dim

    def work(q: int, past: Tokens) -> tuple[Any, Any]:
        operations = 2.0 * weights * q + attention * q * (past + 1)
        return operations, weight_bytes + 2.0 * spec.kv_values_per_token * q * (past + 1)

    return work


def _weights(spec: ModelSpec, precision: str) -> tuple[int, int]:
    """Weights of a layer's linears, and the bytes of the whole layer."""
    weights = sum(op.out_features * op.in_features for op in spec.linears)
    held = PRECISIONS[precision]
    num_bytes = sum(held.weight_bytes(op.out_features, op.in_features) for op in spec.linears)
    return weights, num_bytes + 2 * spec.layer_other_params


# ---- several devices a stage


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
    times = _shard_times(cluster, device_type, spec, degree, profiles)
    exchange = _exchanges(cluster.link_between(node_name, node_name), degree, spec)
    models = {
        key: WithExchange(model, exchange[key[1]]) if key[1] in exchange else model
        for key, model in times.models.items()
    }
    note = f"; {degree} devices a stage, all-reduce over the link of {node_name}"
    return replace(times, models=models, provenance=times.provenance + note)


@dataclass(frozen=True)
class WithExchange:
    """What a device computes, then what the devices of its stage tell each other."""

    compute: TimeModel
    exchange: Callable[[int, Tokens], Seconds]

    def seconds(self, micro_batch: int, tokens: Tokens) -> Seconds:
        """One after the other."""
        return self.compute.seconds(micro_batch, tokens) + self.exchange(micro_batch, tokens)


def _exchanges(
    link: Link, degree: int, spec: ModelSpec
) -> dict[str, Callable[[int, Tokens], Seconds]]:
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
    rows = _rows(own, spec)
    if _rows(own, shard) or not rows:
        return device_times(cluster, device_type, shard, profiles)
    whole = measured_times(rows, f"whole layers measured on {own[0].device.name}")
    models = _cut_models(whole, rows, device_library()[device_type], spec, shard)
    note = f"; one of {degree} parts by the spec sheet, no shard was measured"
    return replace(whole, models=models, provenance=whole.provenance + note)


def _cut_models(
    whole: LayerTimes,
    rows: Sequence[ProfileRow],
    device: DeviceType,
    spec: ModelSpec,
    shard: ModelSpec,
) -> dict[tuple[str, str], TimeModel]:
    """A shard's times by (precision, phase); what no roofline covers, each device does in full."""
    before = _rooflines(device, spec, whole.precisions)
    after = _rooflines(device, shard, whole.precisions)
    overheads = _overheads_s(_grouped(rows), before)
    return {
        key: CutTime(model, overheads[key[1]], before[key], after[key]) if key in before else model
        for key, model in whole.models.items()
    }


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
            busy_s = float(roofline.busy_s(shortest.micro_batch, _length(shortest)))
            beyond[key[1]].append(shortest.time_ms / 1000 - busy_s)
    return {phase: max(LAUNCH_S, min(seconds)) for phase, seconds in beyond.items()}
