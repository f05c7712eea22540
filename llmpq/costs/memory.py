"""Memory of a stage in bytes: weights, cache, activations, message buffers.

Weights and cache add up layer by layer, each a product of named factors; the cache has all lanes'
tokens. Activations are those of the largest micro-batch of either phase, a chunk that ends the
longest prompt included. Their peak is the greatest of a family's moments: what was alive at once
when `llmpq.models.count` ran the family's own modules without weights (assets/activations.json), as
products of sizes. To a moment at which a linear computes comes what that takes for itself, by its
kernel and number of rows (`llmpq.kernel_table`): some unpack a matrix in parts.
A card's decode steps are CUDA graphs: what they compute in is theirs for the whole run, and lies
beside what a prefill takes, with what the graphs hold themselves. Elsewhere the larger phase
counts.
Buffers are the messages between stages that are alive at once.
Not covered: the framework's own context, which `Device.memory_bytes` leaves out already and a CPU
worker's account does not hold; temporaries inside torch's kernels; sampling by top-k or top-p,
which takes some 40 bytes a logit.
"""

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from llmpq.job import LaneShape, cache_tokens
from llmpq.kernel import GRAPH_BYTES, graph_lengths
from llmpq.kernel_table import held_bytes, kernel_for
from llmpq.machine import TORCH_CARD, Machine
from llmpq.model_spec import (
    ALL_HEADS,
    ASSETS,
    Activations,
    AllocationSnapshot,
    LinearShape,
    ModelSpec,
)
from llmpq.plan_data import Plan, reserve_of
from llmpq.precision import PRECISIONS, group_size
from llmpq.workspace import HALF, SINGLE, Product, num_partitions

HEADER_BYTES = 16  # of a message
TOKEN_BYTES = 8
STEP_NUMBERS = 5  # for each row of a decode step: where it stands, what it is


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
    machine: Machine = TORCH_CARD,
    context: int = 0,
) -> StageMemory:
    """Memory of a stage with layers at `precisions`; `first` and `last` say what else it holds."""
    layers = sum(layer_weight_bytes(spec, p, machine) for p in precisions)
    return StageMemory(
        weights=layers + end_weight_bytes(spec, first=first, last=last),
        cache=len(precisions) * layer_cache_bytes(spec, cache_tokens(sizes.lanes)),
        activations=activation_bytes(
            spec,
            sizes,
            first=first,
            last=last,
            precisions=frozenset(precisions),
            single=len(precisions) == 1,
            machine=machine,
        ),
        buffers=buffer_bytes(spec, sizes, first=first, last=last),
        context=context,
    )


# ---- weights and cache


def layer_weight_bytes(spec: ModelSpec, precision: str, machine: Machine = TORCH_CARD) -> int:
    """One layer: its linears at `precision`, norms and biases at 16 bits."""
    linears = sum(
        held_bytes(machine, precision, op.out_features, op.in_features) for op in spec.linears
    )
    return linears + HALF * spec.layer_other_params


def layer_cache_bytes(spec: ModelSpec, cache_tokens: int) -> int:
    """Keys and values of so many tokens, for one layer.

    A sliding window cuts nothing off: the runtime keeps every token and hides it by the mask.
    """
    return cache_tokens * spec.kv_values_per_token * HALF


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
    single: bool = False,
    machine: Machine = TORCH_CARD,
) -> int:
    """The peak of both phases (`of_both_phases`), in a stage with layers at `precisions`.

    What decode steps keep beside it is included (`step_bytes`).
    `single`: the stage has just one layer, whose input is the stage's.
    """
    stage: dict[str, Any] = {"first": first, "last": last, "precisions": precisions}
    stage |= {"single": single, "machine": machine}
    chunk, prompt = sizes.chunk_tokens, sizes.prompt_tokens
    prefill = prefill_bytes(spec, sizes.prefill_micro_batch, chunk, prompt, **stage)
    decode = decode_bytes(spec, *sizes.largest, **stage) + graph_bytes(sizes.lanes, machine)
    kept = step_bytes(spec, sizes.lanes, first=first, last=last)
    return kept + int(of_both_phases(prefill, decode, machine))


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


def step_bytes(spec: ModelSpec, lanes: Iterable[LaneShape], *, first: bool, last: bool) -> int:
    """Buffers of decode steps that stay: numbers, the last tokens, states that come in and go out.

    As `llmpq.runtime.steps` makes them; those that a stage does not need have one value.
    """
    counts = [lane.rows for lane in lanes]
    rows, in_flight = max(counts), sum(counts)
    states = HALF * rows * spec.hidden_size
    numbers = TOKEN_BYTES * (STEP_NUMBERS * rows + in_flight) + SINGLE * rows
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
    single: bool = False,
    machine: Machine = TORCH_CARD,
) -> int:
    """The peak of `requests` with prompts of `tokens`, or of so many that end a `longest` one."""
    known = activations_of(spec)
    met = _met(known.prefill, known.prefill_first, known.prefill_last, first, last, single)
    jobs = [_MicroBatch(requests, tokens, tokens, machine)]
    if longest is not None and longest > tokens:
        jobs.append(_MicroBatch(1, tokens, longest, machine))
    return max(_peak(spec, job, met, precisions, first, last) for job in jobs)


def decode_bytes(
    spec: ModelSpec,
    requests: int,
    seen: int,
    *,
    first: bool,
    last: bool,
    precisions: Collection[str] = ("16",),
    single: bool = False,
    machine: Machine = TORCH_CARD,
) -> int:
    """The peak of `requests` with one new token each, which attends to `seen` tokens."""
    known = activations_of(spec)
    met = _met(known.decode, known.decode_first, known.decode_last, first, last, single)
    batch = _MicroBatch(requests, 1, seen, machine)
    return _peak(spec, batch, met, precisions, first, last)


def _projected_bytes(spec: ModelSpec, rows: int) -> int:
    """Where embeddings are narrower than the layers (OPT): states of that width, at both ends."""
    width = spec.head_params // spec.vocab_size
    return HALF * rows * width if width != spec.hidden_size else 0


def is_packed(precision: str) -> bool:
    """Stored below 16 bits."""
    return PRECISIONS[precision].weight_bits < 16


def activations_of(spec: ModelSpec) -> Activations:
    """The moments of a model: its own where they were counted, else its family's."""
    if spec.activations is not None:
        return spec.activations
    table = _shipped_activations()
    grouped = spec.num_kv_heads < spec.num_heads
    family = spec.model_type if spec.model_type in table else "llama"
    return table.get(family if grouped else f"{family}, {ALL_HEADS}", table[family])


@lru_cache(maxsize=1)
def _shipped_activations() -> dict[str, Activations]:
    data = json.loads((ASSETS / "activations.json").read_text(encoding="utf-8"))
    return {name: Activations.model_validate(value) for name, value in data.items()}


@dataclass(frozen=True)
class _MicroBatch:
    """Requests with so many new tokens each, which attend to `seen` tokens."""

    requests: int
    tokens: int
    seen: int
    machine: Machine

    @property
    def rows(self) -> int:
        """Of the matrices that linears multiply."""
        return self.requests * self.tokens


def _met(
    inside: tuple[AllocationSnapshot, ...],
    at_first: tuple[AllocationSnapshot, ...],
    at_last: tuple[AllocationSnapshot, ...],
    first: bool,
    last: bool,
    single: bool,
) -> list[AllocationSnapshot]:
    """The moments of a phase that a stage meets."""
    met = inside + (at_first if first else ()) + (at_last if last else ())
    return [moment for moment in met if not (single and moment.later)]


def _peak(
    spec: ModelSpec,
    batch: _MicroBatch,
    moments: Iterable[AllocationSnapshot],
    precisions: Collection[str],
    first: bool,
    last: bool,
) -> int:
    sizes = _sizes(spec, batch)
    own: dict[tuple[str, bool], float] = {}
    most = 0.0
    for moment in moments:
        op = moment.op, moment.biased
        if op not in own:
            own[op] = _op_bytes(spec, batch, *op, precisions)
        most = max(most, own[op] + _live_bytes(moment, sizes))
    ids = TOKEN_BYTES * batch.rows if first else 0
    return math.ceil(most) + ids + (_projected_bytes(spec, batch.rows) if first or last else 0)


def _sizes(spec: ModelSpec, batch: _MicroBatch) -> dict[str, int]:
    return {
        "requests": batch.requests,
        "tokens": batch.tokens,
        "seen": batch.seen,
        "hidden": spec.hidden_size,
        "ffn": spec.ffn_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab": spec.vocab_size,
    }


def _live_bytes(moment: AllocationSnapshot, sizes: dict[str, int]) -> float:
    """A second "tokens" in a product of the prefill are those that are seen.

    A chunk has a mask, of a byte for each token that one might see, where whole prompts need none.
    """
    is_chunk = sizes["seen"] > sizes["tokens"] > 1
    masked = any(product.count("tokens") > 1 for product in moment.num_bytes)
    total = float(sizes["tokens"] * sizes["seen"]) if is_chunk and not masked else 0.0
    for product, factor in moment.num_bytes.items():
        names = product.split("*") if product else []
        for place, name in enumerate(names):
            factor *= sizes["seen" if name == "tokens" in names[:place] else name]
        total += factor
    return total


def _op_bytes(
    spec: ModelSpec, batch: _MicroBatch, op: str, biased: bool, precisions: Collection[str]
) -> float:
    """What an operator takes for itself, its output included."""
    if not op:
        return 0.0
    if op == "attention":
        return _attention_bytes(spec, batch)
    matrices = [linear for linear in spec.linears if linear.name == op]
    return max(
        linear_bytes(p, linear, batch.rows, biased=biased, machine=batch.machine)
        for p in precisions
        for linear in matrices
    )


def _attention_bytes(spec: ModelSpec, batch: _MicroBatch) -> int:
    """Fused attention. On a card also what the kernel that takes most of them keeps for itself.

    Decode: our kernel's sums of each partition of the columns, in fp32, or a mask as 16-bit
    numbers, again in aligned rows, for the query heads of a key head. Prefill: such a mask for a
    chunk's tokens, keys and values repeated for each query head, and sums.
    """
    output = batch.rows * spec.num_heads * spec.head_dim * HALF
    if not batch.machine.is_card:
        return output
    group = spec.num_heads // spec.num_kv_heads
    row_bytes = (batch.seen + batch.seen + 16) * HALF
    if batch.tokens == 1:
        parts = num_partitions(batch.seen) * (spec.head_dim + 2)
        sums = batch.requests * spec.num_heads * parts * SINGLE
        return output + max(sums, batch.requests * group * row_bytes)
    repeated = 2 * batch.requests * batch.seen * spec.num_heads * spec.head_dim * HALF
    repeated = repeated if group > 1 else 0
    return output + batch.tokens * row_bytes + repeated + batch.rows * spec.num_heads * SINGLE


# ---- linears


def linear_bytes(
    precision: str, op: LinearShape, rows: int, *, biased: bool, machine: Machine
) -> int:
    """What a linear takes while it multiplies `rows`, its output included, by the kernel's count.

    Raises `UserError` where no kernel of the machine serves the precision.
    """
    group = group_size(PRECISIONS[precision].weight_bits, op.in_features)
    shape = op.out_features, op.in_features, group
    kernel = kernel_for(machine, precision, *shape, rows)
    return kernel.workspace_bytes(Product(*shape, rows, biased))
