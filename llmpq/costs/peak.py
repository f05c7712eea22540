"""The peak of what a stage's modules hold while one micro-batch is computed, in bytes.

It is the greatest of a family's moments: what was alive at once when `llmpq.models.count` ran the
family's own modules without weights (assets/activations.json), as products of sizes. To a moment at
which a linear computes comes what that takes for itself, by its kernel and number of rows
(`llmpq.kernel_table`): some unpack a matrix in parts.

Not covered: which micro-batches a stage meets, and what lies beside them (`costs.memory`).
"""

import json
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

from llmpq.expert_kernels import expert_choices, most_tokens
from llmpq.kernel_table import by_rows, kernel_for
from llmpq.machine import Machine
from llmpq.model_spec import (
    ALL_HEADS,
    ASSETS,
    Activations,
    AllocationSnapshot,
    LinearShape,
    ModelSpec,
)
from llmpq.precision import PRECISIONS, group_size, layer_precision
from llmpq.workspace import HALF, PLAIN_CHUNK, SINGLE, Product, num_partitions, vector_chunks

TOKEN_BYTES = 8
# All experts at once: the name of the linear with their outputs; inner values that activations keep
# beside their inputs, where experts have biases (gpt-oss) and elsewhere; of a pair, its place by
# expert and a slot.
LAST_OF_EXPERT = "down_proj"
BIASED_ACTIVATION, PLAIN_ACTIVATION = 8, 2
PAIR_BYTES = 16


def _projected_bytes(spec: ModelSpec, rows: int) -> int:
    """Where embeddings are narrower than the layers (OPT): states of that width, at both ends."""
    width = spec.head_params // spec.vocab_size
    return HALF * rows * width if width != spec.hidden_size else 0


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
class MicroBatch:
    """Requests with so many new tokens each, which attend to `seen` tokens."""

    requests: int
    tokens: int
    seen: int
    machine: Machine

    @property
    def rows(self) -> int:
        """Of the matrices that linears multiply."""
        return self.requests * self.tokens


def moments_met(
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


def moments_of(moments: Iterable[AllocationSnapshot], kind: int) -> list[AllocationSnapshot]:
    """Those that occur while a layer of this kind runs, or none."""
    return [moment for moment in moments if moment.kind in (None, kind)]


def peak_bytes(
    spec: ModelSpec,
    batch: MicroBatch,
    moments: Iterable[AllocationSnapshot],
    precisions: Collection[str],
    first: bool,
    last: bool,
) -> int:
    """The peak of a micro-batch in a stage with layers of one kind, which meets these moments."""
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


def _sizes(spec: ModelSpec, batch: MicroBatch) -> dict[str, int]:
    return {
        "requests": batch.requests,
        "tokens": batch.tokens,
        "seen": batch.seen,
        "columns": batch.seen + 1,  # with an attention sink
        "hidden": spec.hidden_size,
        "ffn": spec.ffn_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab": spec.vocab_size,
        "positions": spec.max_positions,
    }


def _live_bytes(moment: AllocationSnapshot, sizes: dict[str, int]) -> float:
    """A second "tokens" in a product of the prefill are those that are seen.

    A chunk has a mask, of a byte for each token that one might see, where whole prompts need none.
    """
    is_chunk = sizes["seen"] > sizes["tokens"] > 1
    masked = is_chunk and any(product.count("tokens") > 1 for product in moment.num_bytes)
    total = float(sizes["tokens"] * sizes["seen"]) if is_chunk and not masked else 0.0
    for product, factor in moment.num_bytes.items():
        for name in _sizes_of(product):
            factor *= sizes[name]
        total += factor
    return total


@lru_cache
def _sizes_of(product: str) -> tuple[str, ...]:
    """The sizes that are multiplied."""
    names = product.split("*") if product else []
    return tuple(
        "seen" if name == "tokens" in names[:index] else name for index, name in enumerate(names)
    )


def _op_bytes(
    spec: ModelSpec, batch: MicroBatch, op: str, biased: bool, precisions: Collection[str]
) -> float:
    """What an operator takes for itself, its output included.

    Less than nothing where layers of this kind do not have it: then its moment does not occur. An
    expert may be given every row, as no token goes to one expert twice; kernels for all experts at
    once have a row for each expert of a token.
    """
    if not op:
        return 0.0
    if op == "attention":
        return _attention_bytes(spec, batch)
    held = [layer_precision(precision) for precision in precisions]
    alone = [
        linear_bytes(name, linear, batch.rows, biased=biased, machine=batch.machine)
        for linear in spec.linears
        if linear.name == op
        for name in {one.rest for one in held}
    ]
    of_experts = () if spec.experts is None else spec.experts.linears
    single = [
        _single_bytes(name, linear, batch, biased)
        for linear in of_experts
        if linear.name == op
        for name in {one.experts for one in held}
    ]
    at_once = [
        _experts_bytes(spec, batch, name)
        for name in precisions
        if op in (linear.name for linear in of_experts)
    ]
    return max((*alone, *single, *at_once), default=-math.inf)


def _single_bytes(precision: str, op: LinearShape, batch: MicroBatch, biased: bool) -> int:
    """What a matrix of one expert takes by itself, with every row."""
    kernels = expert_choices(batch.machine, precision, op.out_features, op.in_features).single
    if not kernels:
        return linear_bytes(precision, op, batch.rows, biased=biased, machine=batch.machine)
    group = group_size(PRECISIONS[precision].weight_bits, op.in_features)
    product = Product(op.out_features, op.in_features, group, batch.rows, biased)
    return by_rows(kernels, batch.rows).workspace_bytes(product)


def _experts_bytes(spec: ModelSpec, batch: MicroBatch, precision: str) -> float:
    """What all experts take at once, as `llmpq.models.grouped_experts` runs them.

    These are the outputs of gate and `up`, the activation, its inner values and the outputs, each
    by pairs of a token and an expert; sums of chunks where a second launch adds them; the table.
    Of a micro-batch with more tokens than run at once, a smaller one with as many may follow.
    """
    experts, precision_of_experts = spec.experts, layer_precision(precision).experts
    assert experts is not None
    *inputs, output = sorted(experts.linears, key=lambda op: op.name == LAST_OF_EXPERT)
    pairs = int(min(batch.rows, most_tokens(batch.machine, spec, precision))) * experts.per_token
    wide, inner = sum(op.out_features for op in inputs), output.in_features
    temporaries = BIASED_ACTIVATION if experts.other_params else PLAIN_ACTIVATION
    sums = [
        SINGLE * pairs * chunks * outputs
        for op, outputs in ((inputs[0], wide), (output, output.out_features))
        for chunks in [_expert_chunks(batch.machine, precision_of_experts, op)]
    ]
    return PAIR_BYTES * pairs + max(
        HALF * pairs * wide + sums[0],
        HALF * pairs * (wide + temporaries * inner),
        HALF * pairs * (inner + output.out_features) + sums[1],
    )


def _expert_chunks(machine: Machine, precision: str, op: LinearShape) -> int:
    """The chunks of the inputs whose sums a grouped kernel keeps; 0 where it keeps none."""
    kernel = expert_choices(machine, precision, op.out_features, op.in_features).grouped
    if kernel is None or kernel.launches == 1:
        return 0
    bits = PRECISIONS[precision].weight_bits
    if bits == 16:
        return -(-op.in_features // PLAIN_CHUNK)
    return vector_chunks(Product(op.out_features, op.in_features, op.in_features, 1), bits)


def _attention_bytes(spec: ModelSpec, batch: MicroBatch) -> int:
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
