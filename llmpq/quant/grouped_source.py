# mypy: allow-untyped-defs
"""The Triton programs of `grouped`: they multiply the tokens of all experts in one launch.

A *pair* is a token and one of its experts; pair `p` belongs to token `p // per_token`. `sort_pairs`
puts pairs in the order of their experts, and cuts those of each expert into *slots* of BLOCK_ROWS
rows. The number of slots depends on the numbers of pairs and experts alone, so that the host need
not know the routing; slots without rows return at once. Columns, streams and granules are those of
`triton_source`.

Weights are stacked: row `e * out_features + n` computes output `n` of expert `e`. With FIELDS = 0
the weight has 16 bits, and rows of `in_features`.
"""

import triton
import triton.language as tl

from llmpq.quant.triton_source import _packed_sums, _tile

NO_EXPERT = tl.constexpr(2**30)


@triton.jit(do_not_specialize=["pairs", "num_slots"])
def sort_pairs(
    chosen, order, slots, pairs, num_slots,
    BLOCK_ROWS: tl.constexpr, SLOT_A_PAIR: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes the pairs and slots of one expert; see `grouped.RoutingTable` for their tensors.

    The slots of expert `e`, of which `before` pairs come before, begin at `before`, or at
    `before // BLOCK_ROWS + e` where those are fewer in all: never less than earlier experts need.
    """
    expert = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    less, equal = tl.zeros((CHUNK,), tl.int32), tl.zeros((CHUNK,), tl.int32)
    for start in range(0, pairs, CHUNK):
        pair = start + lane
        experts = tl.load(chosen + pair, mask=pair < pairs, other=NO_EXPERT)
        less += (experts < expert).to(tl.int32)
        equal += (experts == expert).to(tl.int32)
    before, own = tl.sum(less, 0), tl.sum(equal, 0)
    place = before
    for start in range(0, pairs, CHUNK):
        pair = start + lane
        experts = tl.load(chosen + pair, mask=pair < pairs, other=NO_EXPERT)
        is_own = (experts == expert).to(tl.int32)
        tl.store(order + place + tl.cumsum(is_own, 0) - 1, pair, mask=is_own > 0)
        place += tl.sum(is_own, 0)
    first, end = before, before + own
    if not SLOT_A_PAIR:
        first, end = first // BLOCK_ROWS + expert, end // BLOCK_ROWS + expert + 1
    for start in range(first, end, CHUNK):
        slot = start + lane
        offset = (slot - first) * BLOCK_ROWS
        rows = tl.minimum(tl.maximum(own - offset, 0), BLOCK_ROWS)
        inside = slot < end
        tl.store(slots + slot, slot * 0 + expert, mask=inside)
        tl.store(slots + num_slots + slot, before + offset, mask=inside)
        tl.store(slots + 2 * num_slots + slot, rows, mask=inside)


@triton.jit
def _plain_sums(
    inputs_at, has_row, weight, matrix_rows, in_matrix, in_features,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """fp32 products `[BLOCK_M, BLOCK_N]` of rows at `inputs_at` `[M, 1]` with 16-bit weights."""
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    weights_at = weight + matrix_rows[None, :] * in_features
    for first in range(0, in_features, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        exists = column < in_features
        wanted = has_row[:, None] & exists[None, :]
        inputs = tl.load(inputs_at + column[None, :], mask=wanted, other=0.0)
        wanted = exists[:, None] & in_matrix[None, :]
        weights = tl.load(weights_at + column[:, None], mask=wanted, other=0.0)
        sums = tl.dot(inputs, weights, sums)
    return sums


@triton.jit(do_not_specialize=["num_slots"])
def multiply_experts_by_dots(
    x, packed, scales, zeros, bias, factors, order, slots, out,
    num_slots, per_token, out_features, in_features, stream_bytes, row_bytes, groups, group,
    FIELDS: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    FROM_TOKENS: tl.constexpr, FACTOR: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Computes some outputs of one slot, on tensor cores.

    With FROM_TOKENS, `x` holds a row a token and `out` a row a pair by expert; otherwise `x` holds
    the latter and `out` a row a pair. FACTOR 1 scales the product by the pair's factor, as if its
    input were scaled, and FACTOR 2 the output, bias included.
    """
    slot = tl.program_id(1)
    count = tl.load(slots + 2 * num_slots + slot)
    if count == 0:
        return
    expert = tl.load(slots + slot).to(tl.int64)
    lane = tl.arange(0, BLOCK_M)
    has_row = lane < count
    place = tl.load(slots + num_slots + slot) + lane
    pair = tl.load(order + place, mask=has_row, other=0)
    source, target = place, pair
    if FROM_TOKENS:
        source, target = pair // per_token, place
    inputs_at = x + source.to(tl.int64)[:, None] * in_features
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_matrix = outs < out_features
    matrix_rows = expert * out_features + outs
    if FIELDS == 0:
        sums = _plain_sums(
            inputs_at, has_row, packed, matrix_rows, in_matrix, in_features,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        sums = _packed_sums(
            inputs_at, has_row, packed, scales, zeros, matrix_rows, in_matrix,
            0, tl.cdiv(stream_bytes, BLOCK_K),
            in_features, stream_bytes, row_bytes, groups, group,
            FIELDS, PLANES, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if FACTOR > 0:
        factor = tl.load(factors + pair, mask=has_row, other=0.0).to(tl.float32)
    if FACTOR == 1:
        sums *= factor[:, None]
    if HAS_BIAS:
        sums += tl.load(bias + matrix_rows, mask=in_matrix, other=0.0).to(tl.float32)[None, :]
    if FACTOR == 2:
        sums *= factor[:, None]
    out_at = out + target.to(tl.int64)[:, None] * out_features + outs[None, :]
    tl.store(out_at, sums.to(out.dtype.element_ty), mask=has_row[:, None] & in_matrix[None, :])


@triton.jit(do_not_specialize=["num_slots", "pairs"])
def multiply_experts_by_sums(
    x, packed, scales, zeros, order, slots, partial,
    num_slots, pairs, per_token,
    out_features, in_features, stream_bytes, row_bytes, groups, group,
    FIELDS: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr, GRANULES: tl.constexpr, GRANULE: tl.constexpr,
    FROM_TOKENS: tl.constexpr,
):  # fmt: skip
    """Computes some outputs of one slot over one chunk of the inputs, without tensor cores.

    It writes fp32 sums to `partial` `[chunks, pairs, out_features]`, whose rows are pairs by
    expert. The weights stay in registers while rows are processed one at a time.
    """
    slot = tl.program_id(1)
    count = tl.load(slots + 2 * num_slots + slot)
    if count == 0:
        return
    expert = tl.load(slots + slot)
    place = tl.load(slots + num_slots + slot)
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_matrix = outs < out_features
    rows = expert * out_features + outs
    first = tl.program_id(2) * (GRANULES * GRANULE)
    if FIELDS == 0:
        column = first + tl.arange(0, GRANULE)
        exists = column < in_features
        weights = tl.load(
            packed + rows.to(tl.int64)[:, None] * in_features + column[None, :],
            mask=in_matrix[:, None] & exists[None, :],
            other=0.0,
        ).to(tl.float32)
    else:
        steps, scale, column, exists = _tile(
            packed, scales, zeros, rows, in_matrix, first,
            in_features, stream_bytes, row_bytes, groups, group,
            FIELDS, PLANES, GRANULES, GRANULE,
        )  # fmt: skip
        weights = steps * scale[:, :, :, :, None]
    out = partial + (tl.program_id(2).to(tl.int64) * pairs + place) * out_features + outs
    for lane in range(count):
        source = place + lane
        if FROM_TOKENS:
            source = tl.load(order + source) // per_token
        inputs_at = x + source.to(tl.int64) * in_features
        inputs = tl.load(inputs_at + column, mask=exists, other=0.0).to(tl.float32)
        products = weights * inputs[None]
        if FIELDS == 0:
            sums = tl.sum(products, 1)
        else:
            sums = tl.sum(products.reshape(BLOCK_N, FIELDS * PLANES * GRANULES * GRANULE), 1)
        tl.store(out, sums, mask=in_matrix)
        out += out_features


@triton.jit(do_not_specialize=["pairs"])
def add_expert_chunks(
    partial, bias, factors, order, chosen, out, chunks, pairs, out_features,
    FROM_TOKENS: tl.constexpr, FACTOR: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums the chunks of one row in order; factor and bias as in `multiply_experts_by_dots`."""
    place = tl.program_id(1)
    outs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = outs < out_features
    pair = tl.load(order + place)
    at = partial + place.to(tl.int64) * out_features + outs
    sums = tl.zeros((BLOCK,), tl.float32)
    for _ in range(chunks):
        sums += tl.load(at, mask=inside, other=0.0)
        at += pairs.to(tl.int64) * out_features
    if FACTOR > 0:
        factor = tl.load(factors + pair).to(tl.float32)
    if FACTOR == 1:
        sums *= factor
    if HAS_BIAS:
        row = tl.load(chosen + pair).to(tl.int64) * out_features
        sums += tl.load(bias + row + outs, mask=inside, other=0.0).to(tl.float32)
    if FACTOR == 2:
        sums *= factor
    target = pair
    if FROM_TOKENS:
        target = place
    out_at = out + target.to(tl.int64) * out_features + outs
    tl.store(out_at, sums.to(out.dtype.element_ty), mask=inside)
