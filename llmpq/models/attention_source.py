# mypy: allow-untyped-defs
"""The Triton programs of `triton_attention`: one query a row over the keys of its cache.

Only `triton_attention` imports this module, when a kernel is first launched, because the decorators
need Triton. `attend_partition` attends a row's query heads to one partition of the columns and
stores sums and maximum; `merge_partitions` adds the weighted sums of the partitions. Scores are in
units of log 2, as cards compute powers of two.

Triton compiles specialized programs where a number is 1 or a multiple of 16. Numbers that differ
from step to step are excluded from this, as another program might add in another order.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(float("-inf"))  # the maximum score of no keys


@triton.jit
def _scores(queries, keys, index, USE_DOTS: tl.constexpr):
    """Scores fp32 `[H, T]` of `queries` `[H, D]` and `keys` `[T, D]`; `index` counts H heads."""
    if USE_DOTS:
        return tl.dot(queries, tl.trans(keys))
    scores = tl.zeros((index.shape[0], keys.shape[0]), tl.float32)
    keys = keys.to(tl.float32)
    for head in tl.static_range(index.shape[0]):
        query = tl.sum(tl.where(index[:, None] == head, queries.to(tl.float32), 0.0), 0)
        products = tl.sum(keys * query[None, :], 1)
        scores = tl.where(index[:, None] == head, products[None, :], scores)
    return scores


@triton.jit
def _weighted(weights, values, index, USE_DOTS: tl.constexpr):
    """Sums fp32 `[H, D]` of `values` `[T, D]` with fp32 `weights` `[H, T]`."""
    if USE_DOTS:
        return tl.dot(weights.to(values.dtype), values)
    output = tl.zeros((index.shape[0], values.shape[1]), tl.float32)
    values = values.to(tl.float32)
    for head in tl.static_range(index.shape[0]):
        weight = tl.sum(tl.where(index[:, None] == head, weights, 0.0), 0)
        products = tl.sum(weight[:, None] * values, 0)
        output = tl.where(index[:, None] == head, products[None, :], output)
    return output


@triton.jit
def _capped(scores, softcap, HAS_SOFTCAP: tl.constexpr):
    """`softcap * tanh(scores / softcap)`, written with an exponential that may overflow."""
    if HAS_SOFTCAP:
        scores = softcap - 2 * softcap / (tl.exp(scores * (2 / softcap)) + 1)
    return scores


@triton.jit
def _attended(mask, mask_column, at, columns):
    """Whether the mask shows the columns `at`; False past the end."""
    shown = tl.load(mask + at.to(tl.int64) * mask_column, mask=at < columns, other=0)
    return shown != 0


@triton.jit
def _blocks_to_attend(
    mask, mask_column, first, columns, PARTITION: tl.constexpr, BLOCK_T: tl.constexpr
):
    """The first block of a partition that has a shown column, and the end of the last."""
    place = tl.arange(0, PARTITION)
    attended = _attended(mask, mask_column, first + place, columns)
    begin = tl.min(tl.where(attended, place, PARTITION), 0) // BLOCK_T
    end = tl.max(tl.where(attended, place + BLOCK_T, 0), 0) // BLOCK_T
    return begin, end


@triton.jit(do_not_specialize=["columns", "mask_row", "mask_column"])
def attend_partition(
    query, key, value, mask, sums, totals, tops,
    columns, scale, softcap,
    query_row, query_head, key_row, key_head, key_column, value_row, value_head, value_column,
    mask_row, mask_column,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PARTITION: tl.constexpr, USE_DOTS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attends up to BLOCK_H query heads of a key head, of one row, to one partition of columns.

    `sums` `[R, Hq, partitions, D]` gets the values weighted by `2 ** (score - top)`, `totals` the
    sum of those weights and `tops` the largest score, each `[R, Hq, partitions]`.
    """
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    kv_head, row = tl.program_id(0) // HEAD_BLOCKS, tl.program_id(2).to(tl.int64)
    index = tl.arange(0, BLOCK_H)
    in_group = tl.program_id(0) % HEAD_BLOCKS * BLOCK_H + index
    heads, own = kv_head * GROUP + in_group, in_group < GROUP
    size = tl.arange(0, BLOCK_D)
    has_size = size < SIZE
    first = tl.program_id(1) * PARTITION
    mask += row * mask_row
    begin, end = _blocks_to_attend(mask, mask_column, first, columns, PARTITION, BLOCK_T)
    queries = tl.load(
        query + row * query_row + heads[:, None] * query_head + size[None, :],
        mask=own[:, None] & has_size[None, :],
        other=0.0,
    )
    key += row * key_row + kv_head.to(tl.int64) * key_head
    value += row * value_row + kv_head.to(tl.int64) * value_head
    top = tl.full((BLOCK_H,), NOTHING, tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    output = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for block in range(begin, end):
        at = first + block * BLOCK_T + tl.arange(0, BLOCK_T)
        attended = _attended(mask, mask_column, at, columns)
        wanted = attended[:, None] & has_size[None, :]
        at = at.to(tl.int64)
        keys = tl.load(key + at[:, None] * key_column + size[None, :], mask=wanted, other=0.0)
        values = tl.load(value + at[:, None] * value_column + size[None, :], mask=wanted, other=0.0)
        scores = _scores(queries, keys, index, USE_DOTS) * scale
        scores = _capped(scores, softcap, HAS_SOFTCAP) * LOG2_E
        scores = tl.where(attended[None, :], scores, NOTHING)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fading = tl.exp2(top - higher)
        total = total * fading + tl.sum(weights, 1)
        output = output * fading[:, None] + _weighted(weights, values, index, USE_DOTS)
        top = higher
    slot = (row * (KV_HEADS * GROUP) + heads) * tl.num_programs(1) + tl.program_id(1)
    tl.store(tops + slot, top, mask=own)
    tl.store(totals + slot, total, mask=own)
    tl.store(
        sums + slot[:, None] * SIZE + size[None, :], output, mask=own[:, None] & has_size[None, :]
    )


@triton.jit(do_not_specialize=["partitions"])
def merge_partitions(
    sums, totals, tops, sinks, out, partitions,
    HEADS: tl.constexpr, SIZE: tl.constexpr, HAS_SINKS: tl.constexpr, BLOCK_D: tl.constexpr,
    MOST: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Adds the weighted sums of a head's partitions in order: `[D]`, 0 without any keys.

    With sinks `[HEADS]`, the total of the weights has that of the head's sink.
    """
    head = tl.program_id(0).to(tl.int64)
    size = tl.arange(0, BLOCK_D)
    has_size = size < SIZE
    every = tl.arange(0, MOST)
    top = tl.max(
        tl.load(tops + head * partitions + every, mask=every < partitions, other=NOTHING), 0
    )
    output = tl.zeros((BLOCK_D,), tl.float32)
    total = 0.0
    if HAS_SINKS:
        sink = tl.load(sinks + head % HEADS).to(tl.float32) * LOG2_E
        top = tl.maximum(top, sink)
        total = tl.exp2(sink - top)
    for first in range(0, partitions, AT_ONCE):
        at = first + tl.arange(0, AT_ONCE)
        slot = head * partitions + at
        totals_here = tl.load(totals + slot, mask=at < partitions, other=0.0)
        attended = totals_here != 0
        tops_here = tl.load(tops + slot, mask=attended, other=NOTHING)
        weights = tl.where(attended, tl.exp2(tops_here - top), 0.0)
        sums_here = tl.load(
            sums + slot[:, None] * SIZE + size[None, :],
            mask=attended[:, None] & has_size[None, :],
            other=0.0,
        )
        total += tl.sum(weights * totals_here, 0)
        output += tl.sum(weights[:, None] * sums_here, 0)
    output = tl.where(total == 0, 0.0, output / total)
    tl.store(out + head * SIZE + size, output.to(out.dtype.element_ty), mask=has_size)
