"""Seconds of the kernels of one layer: matrices, norms and activations, attention.

Each matrix takes the larger of its arithmetic and its bytes (`product_s`), by the kernel of the
table that serves its number of rows. Of routed experts, those that are used are read
(`costs.routing`), by the rows that each has on average: by a kernel for all of them where there is
one (`llmpq.expert_kernels`), else one after the other. Latent attention reads the latents of the
cache, and every head multiplies all their values.

Numbers of rows may be arrays. Not covered: launches (`costs.spec_sheet`), experts with far more
rows than others.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llmpq import kernel_table
from llmpq.costs.device_speed import Speed, rounded_maximum
from llmpq.costs.links import Seconds, Tokens
from llmpq.costs.routing import Routing
from llmpq.expert_kernels import expert_choices, most_tokens
from llmpq.kernel import Kernel
from llmpq.machine import Machine
from llmpq.model_spec import LinearShape, ModelSpec
from llmpq.precision import PRECISIONS, group_size

Busy = Callable[[int, Tokens], Seconds]
OfRows = Callable[[np.ndarray], np.ndarray]
KernelGroups = Mapping[tuple[Kernel, ...], Sequence[LinearShape]]


def by_kernels(machine: Machine, spec: ModelSpec, precision: str) -> KernelGroups:
    """The matrices of a layer by the kernels that multiply by them, without routed experts."""
    found: dict[tuple[Kernel, ...], list[LinearShape]] = {}
    for held in spec.held(precision):
        if not held.of_experts:
            bits, op = PRECISIONS[held.precision].weight_bits, held.op
            shape = op.out_features, op.in_features, group_size(bits, op.in_features)
            found.setdefault(kernel_table.choices(machine, held.precision, *shape), []).append(op)
    return found


class ExpertGroups(NamedTuple):
    """The matrices of one expert by kernels: for all experts at once, and one after the other.

    The former serve up to `most_tokens` tokens of a layer.
    """

    at_once: KernelGroups
    single: KernelGroups
    most_tokens: float

    @property
    def kernels(self) -> list[Kernel]:
        """Those that serve some number of tokens."""
        at_once = self.at_once if self.most_tokens > 0 else {}
        single = self.single if self.most_tokens < math.inf else {}
        return [kernel for group in (*at_once, *single) for kernel in group]


def expert_groups(machine: Machine, spec: ModelSpec, precision: str) -> ExpertGroups:
    """The matrices of one expert of a layer by the kernels that multiply by them."""
    at_once: dict[tuple[Kernel, ...], list[LinearShape]] = {}
    single: dict[tuple[Kernel, ...], list[LinearShape]] = {}
    for held in spec.held(precision):
        if held.of_experts:
            op = held.op
            found = expert_choices(machine, held.precision, op.out_features, op.in_features)
            single.setdefault(found.single, []).append(op)
            if found.grouped is not None:
                at_once.setdefault((found.grouped,), []).append(op)
    return ExpertGroups(at_once, single, most_tokens(machine, spec, precision))


def num_launches(groups: KernelGroups) -> int:
    """The kernels that a call of all these matrices launches on a card."""
    return sum(
        kernels[-1].num_launches(op.out_features, op.in_features)
        for kernels, ops in groups.items()
        for op in ops
    )


def tokens_s(spec: ModelSpec, groups: KernelGroups, speed: Speed) -> OfRows:
    """Seconds of all that is done token by token, by rows, without routed experts."""
    products = [_products_s(kernels, ops, speed) for kernels, ops in groups.items()]
    others_s = _elementwise_bytes(spec) / speed.eager_bandwidth
    kept = 2.0 * spec.layer_other_params
    is_multiplied = spec.experts is not None or spec.kv_values is not None
    kept_s = kept / (speed.linear_bandwidth if is_multiplied else speed.eager_bandwidth)
    kept_row_s = kept / speed.linear_flops if is_multiplied else 0.0  # routers, expanded latents

    def seconds(rows: np.ndarray) -> np.ndarray:
        total = sum((product(rows) for product in products), np.zeros_like(rows))
        kept_total_s = rounded_maximum(kept_row_s * rows, kept_s, speed.sharpness)
        return np.asarray(total + others_s * rows + kept_total_s)

    return seconds


def experts_s(spec: ModelSpec, groups: ExpertGroups, routing: Routing, speed: Speed) -> OfRows:
    """Seconds of the routed experts that so many rows of the layer use."""
    assert spec.experts is not None
    at_once, single = (
        [_products_s(kernels, ops, speed) for kernels, ops in some.items()]
        for some in (groups.at_once, groups.single)
    )
    row_s = _expert_bytes(spec) / speed.eager_bandwidth

    def one(products: Sequence[OfRows], each: np.ndarray) -> np.ndarray:
        return sum((product(each) for product in products), np.zeros_like(each))

    def seconds(rows: np.ndarray) -> np.ndarray:
        used, each = routing.used(rows), routing.rows_each(rows)
        if groups.most_tokens in (0, math.inf):  # one of both serves any number of rows
            taken = one(at_once if groups.most_tokens else single, each)
        else:
            taken = np.where(rows <= groups.most_tokens, one(at_once, each), one(single, each))
        return np.asarray(used * taken + routing.per_token * rows * row_s)

    return seconds


def _products_s(kernels: Sequence[Kernel], ops: Sequence[LinearShape], speed: Speed) -> OfRows:
    """Seconds of some matrices, by the kernel for each number of rows."""
    each = [product_s(kernel, ops, speed) for kernel in kernels]
    limits = [kernel.max_rows for kernel in kernels[:-1]]

    def seconds(rows: np.ndarray) -> np.ndarray:
        total = each[-1](rows)
        for limit, kernel_s in reversed(list(zip(limits, each[:-1], strict=True))):
            total = np.where(rows <= limit, kernel_s(rows), total)
        return total

    return seconds


def product_s(kernel: Kernel, ops: Sequence[LinearShape], speed: Speed) -> OfRows:
    """Seconds of one kernel on some matrices, one after the other, by rows.

    Passes that unpack a weight come before the product, which then reads it at 16 bits.
    """
    reached = kernel.efficiency
    n, k = np.array([(op.out_features, op.in_features) for op in ops], dtype=float).T
    sizes = [(op.out_features, op.in_features) for op in ops]
    weights_s = np.array([kernel.weight_bytes(*size) for size in sizes]) / speed.linear_bandwidth
    values_s = 2.0 * (n + k) / speed.linear_bandwidth
    unpacked = sum(kernel.unpacked_bytes(*size) for size in sizes)
    share = kernel.unpacking.bandwidth if kernel.unpacking else 1.0
    before_s = unpacked / (speed.linear_bandwidth * share)
    rate = {
        "tensor": speed.linear_flops,
        "int8": speed.integer_flops,
        "vector": speed.vector_flops,
    }[reached.arithmetic]
    at, shares = np.array(reached.peak, dtype=float).T

    def seconds(rows: np.ndarray) -> np.ndarray:
        flops = rate * np.interp(np.log(np.maximum(rows, 1)), np.log(at), shares)
        m, flops = rows[..., None], np.asarray(flops)[..., None]
        compute_s = (2.0 * m + reached.unpack_operations) * n * k / flops
        passes = np.ceil(m / reached.pass_rows) if reached.pass_rows else 1.0
        memory_s = (passes * weights_s + m * values_s) / reached.bandwidth
        return rounded_maximum(compute_s, memory_s, speed.sharpness).sum(axis=-1) + before_s

    return seconds


def _elementwise_bytes(spec: ModelSpec) -> float:
    """Of one token: two norms and two sums, rotary positions, the activation; read and written."""
    num_wide = sum(op.out_features == spec.ffn_size for op in spec.linears)
    wide = (1 + num_wide) * spec.ffn_size if num_wide else 0
    rotated = 2 * spec.head_dim * (spec.num_heads + spec.num_kv_heads)
    return 2.0 * (8 * spec.hidden_size + rotated + wide)


def _expert_bytes(spec: ModelSpec) -> float:
    """Of one token in one expert: taken from all, the activation, weighed and added to the sum."""
    assert spec.experts is not None
    up = spec.experts.linears[0]
    num_wide = sum(op.out_features == up.out_features for op in spec.experts.linears)
    return 2.0 * (7 * up.in_features + (1 + num_wide) * up.out_features)


# ---- attention


def prefill_attention(spec: ModelSpec, speed: Speed) -> Busy:
    """Causal attention of whole prompts, whose arithmetic is the lower triangle's."""
    pair_s = 2.0 * spec.num_heads * spec.head_dim / speed.attention_flops
    return lambda p, s: pair_s * p * s * s


def decode_attention(spec: ModelSpec, speed: Speed) -> Busy:
    """Of one token a request: it reads the cache of the past and of this token."""
    width = spec.kv_values or spec.head_dim
    per_token_s = rounded_maximum(
        4.0 * spec.num_heads * width / speed.attention_flops,
        2.0 * spec.kv_values_per_token / speed.attention_bandwidth,
        speed.sharpness,
    )
    return lambda q, past: per_token_s * q * (past + 1)
