"""Memory of a stage in bytes: weights, cache, activations, message buffers.

Weights and cache add up layer by layer, each a product of named factors; the cache has all lanes'
tokens, or of each slot those of a layer's window. Activations are those of the largest micro-batch
of either phase, a chunk that ends the longest prompt included. Their peak is the greatest of a
family's moments: what was alive at once when `llmpq.models.count` ran the family's own modules
without weights (assets/activations.json), as products of sizes. To a moment at which a linear
computes comes what that takes for itself, by its kernel and number of rows (`llmpq.kernel_table`):
some unpack a matrix in parts.
A card's decode steps are CUDA graphs: what they compute in is theirs for the whole run, and lies
beside what a prefill takes, with what the graphs hold themselves. Elsewhere the larger phase
counts.
Buffers are the messages between stages that are alive at once.
Not covered: the framework's own context, which `Device.memory_bytes` leaves out already and a CPU
worker's account does not hold; temporaries inside torch's kernels; sampling by top-k or top-p,
which takes some 40 bytes a logit.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmpq.costs.peak import (
    TOKEN_BYTES,
    MicroBatch,
    activations_of,
    moments_met,
    moments_of,
    peak_bytes,
)
from llmpq.expert_kernels import expert_bytes, most_tokens
from llmpq.job import LaneShape, bounding_window, cache_tokens
from llmpq.kernel import GRAPH_BYTES, graph_lengths
from llmpq.kernel_table import held_bytes
from llmpq.machine import TORCH_CARD, Machine
from llmpq.model_spec import LinearShape, ModelSpec
from llmpq.plan_data import Plan, reserve_of
from llmpq.precision import PRECISIONS, layer_precision
from llmpq.workspace import HALF, SINGLE

HEADER_BYTES = 16  # of a message
# For each row of a decode step: where it stands, what it is; and for each layout of slots one more.
STEP_NUMBERS = 4
STORE_NUMBERS = 3  # for each token of a prefill that is stored: which one it is, and where it goes


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage. `context` lies beside what a device offers and is not in `total`."""

    weights: int
    cache: int
    activations: int
    buffers: int = 0
    context: int = 0

    @property
    def total(self) -> int:
        """All that a device's memory must hold."""
        return self.weights + self.cache + self.activations + self.buffers


@dataclass(frozen=True)
class RunSizes:
    """What the memory of a run depends on.

    `prompt_tokens`: the longest prompt; `chunk_tokens`: how much of one is computed at once.
    """

    lanes: tuple[LaneShape, ...]
    prefill_micro_batch: int
    prompt_tokens: int
    chunk_tokens: int
    num_stages: int

    @property
    def largest(self) -> LaneShape:
        """The rows of the largest decode micro-batch, and the most tokens that it may see."""
        return LaneShape(*(max(sizes) for sizes in zip(*self.lanes, strict=True)))


def run_sizes(plan: Plan) -> RunSizes:
    """Those of a plan's run of its own workload."""
    reserve = reserve_of(plan)
    return RunSizes(
        lanes=reserve.lanes,
        prefill_micro_batch=plan.prefill_micro_batch,
        prompt_tokens=reserve.prompt_tokens,
        chunk_tokens=reserve.chunk_tokens,
        num_stages=len(plan.stages),
    )


def stage_memory(
    spec: ModelSpec,
    precisions: Sequence[str],
    *,
    first: bool,
    last: bool,
    sizes: RunSizes,
    kinds: Sequence[int] | None = None,
    machine: Machine = TORCH_CARD,
    context: int = 0,
) -> StageMemory:
    """Memory of a stage with layers at `precisions`; `first` and `last` say what else it holds.

    `kinds`: of every layer, the place of its kind among `spec.kind_specs`; None where there is one.
    """
    assert kinds is not None or not spec.kinds, "layers of several kinds need their places"
    of_layers = kinds or (0,) * len(precisions)
    alike = Counter(zip(of_layers, precisions, strict=True))
    layers = sum(
        count * layer_weight_bytes(spec.kind_specs[kind], precision, machine)
        for (kind, precision), count in alike.items()
    )
    cache = sum(
        count * layer_cache_bytes(spec.kind_specs[kind], sizes.lanes)
        for kind, count in Counter(of_layers).items()
    )
    return StageMemory(
        weights=layers + end_weight_bytes(spec, first=first, last=last),
        cache=cache,
        activations=activation_bytes(
            spec,
            sizes,
            first=first,
            last=last,
            precisions=frozenset(precisions),
            kinds=frozenset(of_layers),
            single=len(precisions) == 1,
            machine=machine,
        ),
        buffers=buffer_bytes(spec, sizes, first=first, last=last),
        context=context,
    )


# ---- weights and cache


def layer_weight_bytes(spec: ModelSpec, precision: str, machine: Machine = TORCH_CARD) -> int:
    """One layer of a model with one kind: its matrices at `precision`, all else at 16 bits."""
    rest, of_experts = layer_precision(precision)
    held = _matrices_bytes(machine, rest, spec.linears) + HALF * spec.layer_other_params
    if spec.experts is None:
        return held
    one = sum(
        expert_bytes(machine, of_experts, op.out_features, op.in_features)
        for op in spec.experts.linears
    )
    return held + spec.experts.count * (one + HALF * spec.experts.other_params)


def _matrices_bytes(machine: Machine, precision: str, linears: Iterable[LinearShape]) -> int:
    return sum(held_bytes(machine, precision, op.out_features, op.in_features) for op in linears)


def layer_cache_bytes(spec: ModelSpec, lanes: Iterable[LaneShape]) -> int:
    """Keys and values of one layer, of a model with one kind: a slot keeps no more than a window.

    `cache_tokens` is what the runtime allocates by, too.
    """
    return cache_tokens(lanes, spec.window) * spec.kv_values_per_token * HALF


def end_weight_bytes(spec: ModelSpec, *, first: bool, last: bool) -> int:
    """Embedding on the first stage, final norm and head on the last; a tied matrix once."""
    params = spec.embedding_params if first else 0
    params += spec.final_params if last else 0
    shared = first and last and spec.tied
    params += spec.head_params if last and not shared else 0
    return HALF * params


# ---- messages


def buffer_bytes(spec: ModelSpec, sizes: RunSizes, *, first: bool, last: bool) -> int:
    """Messages alive at once where all that is under way waits at one stage.

    Those are a prefill more than there are stages, and a decode step of each lane; whole prompts
    are under way once each, so their prefills have no more rows than requests in flight. Sent ones
    are kept until as many others are, however few rows those have. What was computed on last stays
    until the next one is asked for; at the first stage, what is sent next comes on top of what is
    kept.
    """
    if first and last:
        return 0
    row = sizes.chunk_tokens * spec.hidden_size * HALF
    steps = [HEADER_BYTES + lane.rows * spec.hidden_size * HALF for lane in sizes.lanes]
    most = sizes.num_stages + 1
    prefill = HEADER_BYTES + sizes.prefill_micro_batch * row
    waiting = most * HEADER_BYTES + rows_under_way(sizes) * row + sum(steps)
    sent = most * prefill + sum(steps)
    return (0 if first else waiting) + (0 if last else sent) + max(prefill, *steps)


def rows_under_way(sizes: RunSizes) -> int:
    """Of all prefills under way. A prompt in chunks has a row in several of them."""
    most = (sizes.num_stages + 1) * sizes.prefill_micro_batch
    in_flight = sum(lane.rows for lane in sizes.lanes)
    return min(most, in_flight) if sizes.chunk_tokens >= sizes.prompt_tokens else most


# ---- activations


def activation_bytes(
    spec: ModelSpec,
    sizes: RunSizes,
    *,
    first: bool,
    last: bool,
    precisions: Collection[str] = ("16",),
    kinds: Collection[int] | None = None,
    single: bool = False,
    machine: Machine = TORCH_CARD,
) -> int:
    """The peak of both phases (`of_both_phases`), in a stage with layers at `precisions`.

    What decode steps keep beside it is included (`step_bytes`).
    `kinds`: those of the stage's layers, None for all that the model has.
    `single`: the stage has just one layer, whose input is the stage's.
    """
    machine = stage_machine(spec, kinds, machine, precisions, sizes.largest[0])
    stage: dict[str, Any] = {"first": first, "last": last, "precisions": precisions}
    stage |= {"single": single, "machine": machine, "kinds": kinds}
    chunk, prompt = sizes.chunk_tokens, sizes.prompt_tokens
    prefill = prefill_bytes(spec, sizes.prefill_micro_batch, chunk, prompt, **stage)
    decode = decode_bytes(spec, *sizes.largest, **stage) + graph_bytes(sizes.lanes, machine)
    kept = step_bytes(spec, sizes.lanes, first=first, last=last, kinds=kinds)
    return kept + int(of_both_phases(prefill, decode, machine))


def stage_machine(
    spec: ModelSpec,
    kinds: Collection[int] | None,
    machine: Machine,
    precisions: Collection[str],
    rows: int,
) -> Machine:
    """The machine as a stage with these kinds of layers uses it, for lanes of up to `rows`.

    Where a layer's experts are multiplied one by one, it asks the device how many tokens each of
    them has, which no CUDA graph can hold. Graphs are counted unless no precision avoids this.
    """
    at_once = all(
        any(rows <= most_tokens(machine, spec.kind_specs[kind], name) for name in precisions)
        for kind in _kinds(spec, kinds)
    )
    return machine if at_once else replace(machine, graphs=False)


def of_both_phases(prefill: Any, decode: Any, machine: Machine) -> Any:
    """Bytes of prefill and decode together, numbers or arrays.

    CUDA graphs keep what decode steps compute in; else both phases use the same memory in turn.
    """
    return prefill + decode if has_graphs(machine) else np.maximum(prefill, decode)


def has_graphs(machine: Machine) -> bool:
    """Whether decode steps run as CUDA graphs."""
    return machine.is_card and machine.graphs


def graph_bytes(lanes: Iterable[LaneShape], machine: Machine) -> int:
    """What the graphs themselves hold: one for each lane and attended length."""
    if not has_graphs(machine):
        return 0
    return GRAPH_BYTES * sum(len(graph_lengths(lane.tokens)) for lane in lanes)


def step_bytes(
    spec: ModelSpec,
    lanes: Sequence[LaneShape],
    *,
    first: bool,
    last: bool,
    kinds: Collection[int] | None = None,
) -> int:
    """Buffers of decode steps that stay: numbers, the last tokens, states that come in and go out.

    As `llmpq.runtime.steps` makes them; those that a stage does not need have one value.
    """
    counts = [lane.rows for lane in lanes]
    rows, in_flight = max(counts), sum(counts)
    states = HALF * rows * spec.hidden_size
    windows = (spec.kind_specs[kind].window for kind in _kinds(spec, kinds))
    layouts = len({bounding_window(lanes, window) for window in windows})
    numbers = TOKEN_BYTES * ((STEP_NUMBERS + layouts) * rows + in_flight) + SINGLE * rows
    return numbers + (HALF if first else states) + (HALF if last else states)


def prefill_bytes(
    spec: ModelSpec,
    requests: int,
    tokens: int,
    longest: int | None = None,
    *,
    first: bool,
    last: bool,
    precisions: Collection[str] = ("16",),
    kinds: Collection[int] | None = None,
    single: bool = False,
    machine: Machine = TORCH_CARD,
) -> int:
    """The peak of `requests` with prompts of `tokens`, or of so many that end a `longest` one."""
    known = activations_of(spec)
    met = moments_met(known.prefill, known.prefill_first, known.prefill_last, first, last, single)
    jobs = [MicroBatch(requests, tokens, tokens, machine)]
    if longest is not None and longest > tokens:
        jobs.append(MicroBatch(1, tokens, longest, machine))
    windows = {spec.kind_specs[kind].window for kind in _kinds(spec, kinds)}
    return max(
        peak_bytes(one, job, moments_of(met, kind), precisions, first, last)
        + seen_bytes(one, job)
        + index_bytes(windows, job)
        for job in jobs
        for kind in _kinds(spec, kinds)
        for one in (spec.kind_specs[kind],)
    )


def index_bytes(windows: Collection[int | None], job: MicroBatch) -> int:
    """Where a prefill's states are stored, for all layouts of slots but one, which moments have."""
    kept = sorted(min(job.tokens, window or job.tokens) for window in windows)
    return STORE_NUMBERS * TOKEN_BYTES * job.requests * sum(kept[:-1])


def seen_bytes(spec: ModelSpec, chunk: MicroBatch) -> int:
    """What a chunk makes of the keys and values that it sees, beside what moments count.

    A layer with a window puts them together: its own and those of the window before it, where that
    does not hold all earlier ones. Latents of earlier tokens are expanded.
    """
    before = chunk.seen - chunk.tokens
    if before == 0:
        return 0
    if spec.kv_values is not None:
        return before * _expanded_values(spec) * HALF
    if spec.window is None:
        return 0
    return (min(before, spec.window) + chunk.tokens) * spec.kv_values_per_token * HALF


def _expanded_values(spec: ModelSpec) -> int:
    """Of a token's latent, at most: its keys twice, and what both keys and values are cut from.

    Keys of all heads are as many values as queries, values as many as the attention's outputs.
    """
    sizes = {op.name: op for op in spec.linears}
    makers = [sizes[name].out_features for name in ("q_b_proj", "q_proj") if name in sizes]
    queries = max(makers, default=spec.num_heads * spec.head_dim)
    return 3 * queries + (sizes["o_proj"].in_features if "o_proj" in sizes else queries)


def decode_bytes(
    spec: ModelSpec,
    requests: int,
    seen: int,
    *,
    first: bool,
    last: bool,
    precisions: Collection[str] = ("16",),
    kinds: Collection[int] | None = None,
    single: bool = False,
    machine: Machine = TORCH_CARD,
) -> int:
    """The peak of `requests` with one new token each, which attends to `seen` tokens or a window.

    With a window, the mask is made of the positions that its columns hold.
    """
    known = activations_of(spec)
    met = moments_met(known.decode, known.decode_first, known.decode_last, first, last, single)
    most = 0
    for kind in _kinds(spec, kinds):
        one, moments = spec.kind_specs[kind], moments_of(met, kind)
        columns = seen if one.window is None else min(seen, one.window)
        batch = MicroBatch(requests, 1, columns, machine)
        positions = 0 if one.window is None else TOKEN_BYTES * requests * columns
        most = max(most, positions + peak_bytes(one, batch, moments, precisions, first, last))
    return most


def _kinds(spec: ModelSpec, kinds: Collection[int] | None) -> Collection[int]:
    """These kinds of layers; None: all that the model has."""
    return range(len(spec.kind_specs)) if kinds is None else kinds


def is_packed(precision: str) -> bool:
    """Whether a layer at this precision holds some matrix below 16 bits."""
    return any(PRECISIONS[part].weight_bits < 16 for part in layer_precision(precision))
