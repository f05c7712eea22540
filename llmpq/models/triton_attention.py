"""Attention of a decode step in Triton: one query a row over the keys that its mask shows.

Query heads that share a key head are processed together, so that keys and values are read once and
never repeated. The columns are cut into partitions that depend on their number alone; each
partition's sums are stored and then merged in order, without atomics. So a row's output has the
same bits whatever the other rows are, and, up to 16384 columns, however many masked columns follow
its own. A masked key or value is never loaded, and runs of masked columns at the ends of a
partition are skipped: the cost of a row depends on its own length or window.

Not covered: more than one query a row (prefill), values of another size than keys, and keys that
are not stored in 16 or 32 bits.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmpq.kernel_table import TENSOR_CORES
from llmpq.machine import Capability
from llmpq.quant.triton_kernels import Config, capability_of, cdiv, launch
from llmpq.workspace import MOST_PARTITIONS, partition_for

HEAD_SIZES = range(16, 257)
MERGED_AT_ONCE = 16  # partitions merged at a time
DOT_HEADS = 16  # query heads of a product on tensor cores; fewer are padded
SUM_HEADS = 8  # the most query heads of a program without tensor cores
SUM_TILE = 2048  # elements of keys, and of values, that such a program holds at a time
MOST_COLUMNS = 64  # the most columns that any program holds at a time


def supports(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `decode_attention` takes `query` `[R, Hq, 1, D]` and such keys `[R, Hkv, T, D]`."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return (
        query.shape[2] == 1
        and query.shape[3] in HEAD_SIZES
        and key.shape == value.shape
        and query.shape[1] % key.shape[1] == 0
        and query.dtype == key.dtype
        and query.dtype in dtypes
    )


def config_for(
    capability: Capability, dtype: torch.dtype, query_heads: int, kv_heads: int, head_size: int
) -> Config:
    """The program of `decode_attention` on a card of this capability, without the partition."""
    use_dots = capability >= TENSOR_CORES and dtype != torch.float32
    group, padded = query_heads // kv_heads, _power_of_2(head_size)
    heads = DOT_HEADS if use_dots else min(SUM_HEADS, _power_of_2(group))
    # Few heads of a usual size leave registers for twice as many columns.
    tile = SUM_TILE * (2 if heads < SUM_HEADS and padded <= 128 else 1)
    constants = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "SIZE": head_size,
        "USE_DOTS": use_dots,
        "BLOCK_H": heads,
        "BLOCK_T": MOST_COLUMNS if use_dots else min(MOST_COLUMNS, tile // padded),
        "BLOCK_D": padded,
    }
    num_warps = 8 if use_dots and padded > 128 else 4
    return Config("attend_partition", constants, 1, num_warps, num_stages=2 if use_dots else 1)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Computes `softmax(softcap(query key^T * scale)) value` over the columns of each row's mask.

    `query` `[R, Hq, 1, D]`, `key` and `value` `[R, Hkv, T, D]` with any strides but a last one of
    1, `mask` bool `[R, 1, 1, T]`, True where a column is attended, with any strides. Returns
    `[R, Hq, 1, D]`, contiguous; a row that attends to nothing gets zeros. With `softcap`, scores
    become `softcap * tanh(score / softcap)`. `sinks` `[Hq]` are scores that take part in the
    softmax without a value. The call does not wait for the device and allocates only the output and
    a workspace in fp32, so that a CUDA graph can hold all but the first call of a kind, which
    compiles. `config` is that of `config_for` for the query's card, unless given.
    """
    rows, query_heads, _, size = query.shape
    kv_heads, columns = key.shape[1], key.shape[2]
    assert supports(query, key, value), (query.shape, query.dtype, key.shape, key.dtype)
    assert mask.shape == (rows, 1, 1, columns) and mask.dtype == torch.bool, mask.shape
    assert query.stride(3) == key.stride(3) == value.stride(3) == 1, "the last stride must be 1"
    config = config or config_for(
        capability_of(query.device), query.dtype, query_heads, kv_heads, size
    )
    partition = partition_for(columns)
    own = {"PARTITION": partition, "HAS_SOFTCAP": softcap is not None}
    config = replace(config, constants=config.constants | own)
    partitions = cdiv(columns, partition)
    sums = query.new_empty(rows, query_heads, partitions, size, dtype=torch.float32)
    totals, tops = sums.new_empty(2, *sums.shape[:3])
    head_blocks = cdiv(query_heads // kv_heads, config.constants["BLOCK_H"])
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "mask": mask.view(torch.uint8),
        "sums": sums,
        "totals": totals,
        "tops": tops,
        "columns": columns,
        "scale": scale,
        "softcap": softcap or 0.0,
        **_strides(query, key, value, mask),
    }
    grid = (kv_heads * head_blocks, partitions, rows)
    launch(_programs().attend_partition, grid, arguments, config)
    return _merge(sums, totals, tops, sinks, query.dtype)


def _merge(
    sums: Tensor, totals: Tensor, tops: Tensor, sinks: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Merges the partitions' sums `[R, H, partitions, D]` to `[R, H, 1, D]` in `dtype`."""
    rows, heads, partitions, size = sums.shape
    out = torch.empty(rows, heads, 1, size, dtype=dtype, device=sums.device)
    arguments = {
        "sums": sums,
        "totals": totals,
        "tops": tops,
        "sinks": tops if sinks is None else sinks.contiguous(),  # not read where there are none
        "out": out,
        "partitions": partitions,
    }
    constants = {
        "HEADS": heads,
        "SIZE": size,
        "HAS_SINKS": sinks is not None,
        "BLOCK_D": _power_of_2(size),
        "MOST": MOST_PARTITIONS,
        "AT_ONCE": MERGED_AT_ONCE,
    }
    config = Config("merge_partitions", constants, chunks=partitions)
    launch(_programs().merge_partitions, (rows * heads,), arguments, config)
    return out


def _strides(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> dict[str, int]:
    """The strides of each dimension but the last, in elements."""
    return {
        "query_row": query.stride(0),
        "query_head": query.stride(1),
        "key_row": key.stride(0),
        "key_head": key.stride(1),
        "key_column": key.stride(2),
        "value_row": value.stride(0),
        "value_head": value.stride(1),
        "value_column": value.stride(2),
        "mask_row": mask.stride(0),
        "mask_column": mask.stride(3),
    }


def _power_of_2(size: int) -> int:
    """The smallest power of 2 that is no less."""
    return 1 << (size - 1).bit_length()


def _programs() -> Any:
    from llmpq.models import attention_source

    return attention_source
