"""Memory of a stage in bytes: weights, cache, activations. Each a product of named factors.

Weights and cache add up layer by layer. Activations are those of the largest micro-batch in
either phase and depend on the micro-batches and on the stage's place, not on its number of
layers; they are meant a little high. A stage with any layer below 16 bits also holds its largest
matrix unpacked while it multiplies.
Not covered: the framework's own context, which `Device.memory_bytes` leaves out already.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llmpq.model_spec import ModelSpec
from llmpq.precision import PRECISIONS

HALF = 2  # bytes of a 16-bit value
# Tensors of [tokens, hidden] alive at once: residual, norm, query, key, value, attention output.
HIDDEN_TENSORS = 6
# Tensors of [tokens, ffn] alive at once: gate, up, their product.
FFN_TENSORS = 3
# An attention mask is kept as booleans and as 16-bit numbers.
MASK_BYTES = 1 + 2
# Scores of eager attention: the layer before's (kept as its output), 16 bits, with the mask added,
# a 32-bit softmax, 16 bits again. BLOOM holds them all at once, Gemma 2 two thirds.
SCORE_BYTES = 2 + 2 + 2 + 4 + 2
# Logits: 16 bits and 32 bits.
LOGIT_BYTES = 2 + 4
# A weight while it is multiplied: 16 bits unpacked, 2 bytes for its code.
UNPACKED_BYTES = 2 + 2
# A matrix is unpacked some rows at a time: this many weights at once on a card, fewer on a CPU.
UNPACKED_WEIGHTS = 2**25


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage."""

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.activations


def stage_memory(
    spec: ModelSpec,
    precisions: Sequence[str],
    *,
    first: bool,
    last: bool,
    batch: int,
    cache_tokens: int,
    prefill_micro_batch: int,
    prompt_tokens: int,
    decode_micro_batch: int,
) -> StageMemory:
    """Memory of a stage whose layers have `precisions`; `first` and `last` say what else it holds.

    `cache_tokens`: the longest padded prompt with its new tokens; `prompt_tokens`: the longest
    padded prompt.
    """
    layers = sum(layer_weight_bytes(spec, p) for p in precisions)
    activations = activation_bytes(
        spec,
        last=last,
        cache_tokens=cache_tokens,
        prefill_micro_batch=prefill_micro_batch,
        prompt_tokens=prompt_tokens,
        decode_micro_batch=decode_micro_batch,
    )
    if any(is_packed(p) for p in precisions):
        activations += unpacked_bytes(spec)
    return StageMemory(
        weights=layers + end_weight_bytes(spec, first=first, last=last),
        cache=len(precisions) * layer_cache_bytes(spec, batch, cache_tokens),
        activations=activations,
    )


def layer_weight_bytes(spec: ModelSpec, precision: str) -> int:
    """One layer: its linears at `precision`, norms and biases at 16 bits."""
    held = PRECISIONS[precision]
    linears = sum(held.weight_bytes(op.out_features, op.in_features) for op in spec.linears)
    return linears + HALF * spec.layer_other_params


def layer_cache_bytes(spec: ModelSpec, batch: int, cache_tokens: int) -> int:
    """Keys and values of all requests in flight, for one layer."""
    return batch * cache_tokens * spec.kv_values_per_token * HALF


def end_weight_bytes(spec: ModelSpec, *, first: bool, last: bool) -> int:
    """Embedding on the first stage, final norm and head on the last; a tied matrix once."""
    params = spec.embedding_params if first else 0
    params += spec.final_params if last else 0
    shared = first and last and spec.tied
    params += spec.head_params if last and not shared else 0
    return HALF * params


def activation_bytes(
    spec: ModelSpec,
    *,
    last: bool,
    cache_tokens: int,
    prefill_micro_batch: int,
    prompt_tokens: int,
    decode_micro_batch: int,
) -> int:
    """Activations of the larger of the two phases, without an unpacked matrix."""
    prefill = _phase_bytes(spec, prefill_micro_batch, prompt_tokens, prompt_tokens, last)
    decode = _phase_bytes(spec, decode_micro_batch, 1, cache_tokens, last)
    return max(prefill, decode)


def unpacked_bytes(spec: ModelSpec) -> int:
    """What is unpacked at once of a layer's largest matrix while it is multiplied."""
    largest = max(op.out_features * op.in_features for op in spec.linears)
    return UNPACKED_BYTES * min(largest, UNPACKED_WEIGHTS)


def is_packed(precision: str) -> bool:
    """Stored below 16 bits."""
    return PRECISIONS[precision].weight_bits < 16


def _phase_bytes(spec: ModelSpec, requests: int, tokens: int, seen: int, last: bool) -> int:
    """`requests` with `tokens` new tokens each, which attend to `seen` tokens."""
    width = max(spec.hidden_size, spec.num_heads * spec.head_dim)
    hidden = requests * tokens * width * HALF * HIDDEN_TENSORS
    ffn = requests * tokens * spec.ffn_size * HALF * FFN_TENSORS
    mask = requests * tokens * seen * MASK_BYTES
    scores = requests * spec.num_heads * tokens * seen * SCORE_BYTES if spec.eager_attention else 0
    logits = requests * spec.vocab_size * LOGIT_BYTES if last else 0
    return hidden + ffn + mask + scores + logits
