"""Counts the bytes that one product of a linear layer allocates, with its output.

A `Product` is `x [rows, in]` times a weight `[out, in]`. Each function here counts the peak bytes
of one way of computing it, as `llmpq.quant` allocates them; `llmpq.kernel_table` says which kernel
computes how. Weights in fewer bits are unpacked some output rows at a time, a part: the layers and
these counts both use `part_rows`. The layers import sizes of kernels from here too.

Not covered: the weight and the input themselves, and temporaries inside a library's own kernels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from llmpq.precision import NF4_BLOCK

HALF = 2  # bytes of a 16-bit value
SINGLE = 4
DOUBLE = 8

TILE_ROWS = 64  # output rows of a tile of the CPU's int4 kernel; parts are whole tiles
CPU_PART_WEIGHTS = 2**20  # weights unpacked at a time on a CPU: near the size of its cache
CARD_PART_WEIGHTS = 2**25  # weights unpacked at a time on a card, where launches are expensive
EXPANDED_WEIGHTS = 2**22  # 3-bit weights expanded to nibbles at a time: 1.3x faster than 2**20
# A grid's scale and zero while they are read from tiles, and beside an unpacked part.
GRID_BYTES_READ = 8 + 8 + 4 + 4
GRID_BYTES_HELD = 8 + 4 + 1 + 2
PADDED = 8  # humming pads inputs and outputs to multiples of this: rows of 16 bytes
# Weights of humming: multiples of outputs and inputs (its docs/config.md), 32-bit locks that order
# the parts of a split sum, and the inputs for which it repeats the one scale of a row at float16.
HUMMING_OUT, HUMMING_IN, HUMMING_LOCKS, HUMMING_REPEATED = 256, 128, 2048, 128
# Our Triton product, whose inputs `llmpq.quant.triton_kernels` cuts into chunks: the streams of a
# packed row; bytes of a stream in a chunk without tensor cores; with tensor cores, bytes of a
# stream and outputs of a tile (small enough that two programs share a multiprocessor's registers),
# the least programs (a few for each multiprocessor of any card), and the least tiles of a chunk.
STREAMS = {8: 1, 4: 2, 3: 8}
VECTOR_CHUNK_BYTES = {8: 512, 4: 256, 3: 128}
TENSOR_TILES = {8: (128, 128), 4: (64, 128), 3: (32, 64)}
TENSOR_PROGRAMS, TENSOR_LEAST_BLOCKS = 512, 4
# Our product for all experts at once (`llmpq.quant.grouped`): rows of a block where experts have up
# to 16 rows on average and where they have more; inputs of a chunk of 16-bit weights without tensor
# cores.
GROUPED_FEW_ROWS, GROUPED_MANY_ROWS = 16, 64
PLAIN_CHUNK = 512
PARTITION = 256  # columns of the smallest partition of our attention kernel
MOST_PARTITIONS = 64
LARGE_COLUMNS = 64  # columns with large inputs that LLM.int8 multiplies at a time


@dataclass(frozen=True)
class Product:
    """`x [rows, in]` times `[out, in]` with a scale for `group` weights of a row, and a bias."""

    out_features: int
    in_features: int
    group: int
    rows: int
    biased: bool = False

    @property
    def output_bytes(self) -> int:
        """Bytes of the output in 16 bits."""
        return HALF * self.rows * self.out_features


def part_rows(weights: int, in_features: int) -> int:
    """The output rows that hold about `weights` weights, in whole tiles."""
    return max(1, weights // in_features // TILE_ROWS) * TILE_ROWS


def num_parts(weights: int, out_features: int, in_features: int) -> int:
    """The number of parts of about `weights` weights in a matrix."""
    return -(-out_features // part_rows(weights, in_features))


def output_alone(product: Product) -> int:
    """Bytes of a kernel that reads the stored weight and adds the bias itself."""
    return product.output_bytes


def _with_bias(num_bytes: float, product: Product) -> int:
    """The peak with a bias, which torch adds into a second output."""
    return math.ceil(max(num_bytes, 2 * product.output_bytes if product.biased else 0))


def packed_read(product: Product) -> int:
    """Bytes of a kernel that reads the packed weight."""
    return _with_bias(product.output_bytes, product)


def padded_read(product: Product) -> int:
    """Bytes of humming, which pads inputs and outputs to multiples of `PADDED`."""
    out, cols = round_up(product.out_features, PADDED), round_up(product.in_features, PADDED)
    inputs = HALF * product.rows * cols if cols != product.in_features else 0
    padded = HALF * product.rows * out if out != product.out_features else 0
    return _with_bias(inputs + padded + product.output_bytes, product)


def humming_weight(out_features: int, in_features: int, group: int, dtype: str, bits: int) -> int:
    """Bytes of a weight in humming's layout: codes, 16-bit scales, zeros of `bits`, locks."""
    out, cols = round_up(out_features, HUMMING_OUT), round_up(in_features, HUMMING_IN)
    groups = cols // group if group < in_features else 1
    if group == in_features and dtype == "float16":
        groups = cols // HUMMING_REPEATED
    return out * cols * bits // 8 + out * groups * (8 * HALF + bits) // 8 + SINGLE * HUMMING_LOCKS


def chunked_sums(product: Product, chunks: Callable[[Product], int]) -> int:
    """Bytes of our Triton product: 32-bit sums of every chunk of inputs, and the output."""
    partial = SINGLE * chunks(product) * product.rows * product.out_features
    return _with_bias(partial + product.output_bytes, product)


def vector_chunks(product: Product, bits: int) -> int:
    """The chunks of the inputs of the product without tensor cores."""
    return -(-_stream(product.in_features, bits) // VECTOR_CHUNK_BYTES[bits])


def tensor_chunks(product: Product, bits: int) -> int:
    """The chunks of the inputs of the product on tensor cores: more where outputs are few."""
    width, outputs = TENSOR_TILES[bits]
    stream = _stream(product.in_features, bits)
    if product.group < product.in_features:
        common = math.gcd(stream, product.group)
        width = min(width, common & -common)  # a tile has one scale an output
    blocks = -(-stream // width)
    wanted = -(-TENSOR_PROGRAMS // -(-product.out_features // outputs))
    chunk = -(-blocks // min(wanted, -(-blocks // TENSOR_LEAST_BLOCKS)))
    return -(-blocks // chunk)


def _stream(in_features: int, bits: int) -> int:
    """The bytes of a stream of a packed row."""
    return round_up(in_features, 8) // STREAMS[bits]


def grouped_parts(product: Product, part_weights: int) -> int:
    """Bytes of unpacking plain nibbles: code, value and grid of every weight of a part."""
    return _with_bias(_by_parts(product, part_weights, 3 + 1 / product.group), product)


def fused_parts(product: Product) -> int:
    """Bytes of a part in 16 bits, written by one kernel of a card."""
    return _with_bias(_by_parts(product, CARD_PART_WEIGHTS, HALF), product)


def tiled_parts(product: Product, bits: int) -> int:
    """Bytes of unpacking tiles: expanded to 4 bits, reordered, then less their zeros."""
    nibbles = 0.5 if bits == 3 else 0.0
    read, held = GRID_BYTES_READ / product.group, GRID_BYTES_HELD / product.group
    bytes_a_weight = nibbles + max(1.5 + read, 3 + held)
    return _with_bias(_by_parts(product, CPU_PART_WEIGHTS, bytes_a_weight), product)


def tiled_read(product: Product, bits: int) -> int:
    """Bytes of torch's int4 kernel, before which 3 bits are expanded to 4."""
    if bits == 4:
        return packed_read(product)
    part = part_rows(EXPANDED_WEIGHTS, product.in_features)
    if part >= product.out_features:
        weights = product.out_features * product.in_features
        return _with_bias(max(weights, weights // 2 + product.output_bytes), product)
    expanded = part * product.in_features
    grids = 2 * HALF * expanded // product.group
    held = max(product.output_bytes + expanded + grids, 2 * product.output_bytes)
    return _with_bias(held, product)


def rows_read(product: Product) -> int:
    """Bytes of torch's int8 kernel; zeros are added back in 32 bits."""
    rows, out, padded = product.rows, product.out_features, round_up(product.in_features, 8)
    inputs = HALF * rows * padded + SINGLE * rows
    return _with_bias(inputs + out * max(14 * rows, 6 * rows + 12), product)


def rows_parts(product: Product, part_weights: int) -> int:
    """Bytes of a part's integers in 16 bits; then of the whole output and its scaled copy."""
    held = max(_by_parts(product, part_weights, HALF), 2 * product.output_bytes)
    return _with_bias(held, product)


def token_int8(product: Product) -> int:
    """Bytes of quantizing inputs in 32 bits, of 32-bit results, and of the output beside them."""
    rows, outputs = product.rows, product.rows * product.out_features
    scales, result = SINGLE * rows, SINGLE * outputs
    quantizing = 3 * SINGLE * rows * product.in_features
    multiplying = rows * product.in_features + result + SINGLE * product.out_features
    closing = result + (SINGLE if product.biased else HALF) * outputs
    return max(quantizing + scales, multiplying + scales, closing)


def llm_int8(product: Product) -> int:
    """Bytes of LLM.int8: quantized inputs, 32-bit sums, large inputs multiplied in 64 bits."""
    inputs, outputs = product.rows * product.in_features, product.rows * product.out_features
    large = (1 + 1 + HALF) * inputs  # a mask, codes, and the large ones by themselves
    columns = DOUBLE * product.in_features
    columns += LARGE_COLUMNS * (
        (DOUBLE + 1) * product.out_features + (DOUBLE + HALF) * product.rows
    )
    return max(
        11 * inputs + SINGLE * product.rows,
        2 * inputs + 2 * SINGLE * outputs,
        large + (SINGLE + DOUBLE) * outputs + columns,
        (2 * SINGLE if product.biased else SINGLE + HALF) * outputs,
    )


def nf4_parts(product: Product, part_weights: int) -> int:
    """Bytes of parts in 16 bits; rows and inputs are padded to whole blocks."""
    padded = round_up(product.in_features, NF4_BLOCK)
    inputs = HALF * product.rows * padded if padded != product.in_features else 0
    whole = replace(product, in_features=padded)
    return _with_bias(inputs + _by_parts(whole, part_weights, HALF), product)


def _by_parts(product: Product, part_weights: int, bytes_a_weight: float) -> float:
    """Bytes of unpacking some output rows at a time and multiplying them in 16 bits."""
    part = min(part_rows(part_weights, product.in_features), product.out_features)
    weights = part * product.in_features
    unpacking = bytes_a_weight * weights
    multiplying = HALF * weights + HALF * product.rows * part
    collected = product.output_bytes if part < product.out_features else 0
    return collected + max(unpacking, multiplying)


def round_up(size: int, step: int) -> int:
    """`size` rounded up to a multiple of `step`."""
    return -(-size // step) * step


# ---- attention of a decode step


def partition_for(columns: int) -> int:
    """The columns of a partition of our attention kernel, for `columns` in all."""
    partition = PARTITION
    while partition * MOST_PARTITIONS < columns:
        partition *= 2
    return partition


def num_partitions(columns: int) -> int:
    """The partitions of `columns`; the kernel keeps a sum for each head and partition."""
    return -(-columns // partition_for(columns))
