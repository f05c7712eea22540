"""Our Triton kernels for NVIDIA cards: they dequantize packed weights, or multiply few rows.

`dequantize` writes `(code - zero) * scale` in one pass, for a library's product of many rows.
`multiply_few_rows` reads the packed weights once for all rows, as reading weights limits a decode
step. It cuts the inputs into chunks, sums each chunk and adds the sums in order. The chunks depend
on the matrix and the card, never on the number of rows, and no sum uses atomics, so that a row's
result has the same bits whatever the other rows are.

Cards below capability 8.0 have no tensor cores in Triton: they multiply and sum in fp32. By count,
not by measurement, 4 bits take some 6 instructions a weight and one more a row, so that arithmetic
and not memory is the limit from a few rows on, and dequantizing is faster beyond about 16 rows.

Pure functions (`config_for`, `dequantize_config`) choose what to compile; Triton is imported when a
kernel is first launched. Not covered: which kernel serves which layer (`llmpq.kernel_table`).
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from llmpq.kernel_table import TENSOR_CORES
from llmpq.machine import LIBRARIES, TRITON, Capability
from llmpq.quant.packing import padded_columns
from llmpq.workspace import (
    TENSOR_LEAST_BLOCKS,
    TENSOR_PROGRAMS,
    TENSOR_TILES,
    VECTOR_CHUNK_BYTES,
)

INTERPRETED: Capability = (8, 0)  # the capability assumed for Triton's interpreter on a CPU

CODES = {8: (1, 1), 4: (2, 1), 3: (4, 2)}  # bits: codes in a byte, bytes that share third bits
LARGEST_GRANULE = 128
SMALLEST_GRANULE = 16  # of `multiply_few_rows`: the depth of a tensor core's product of 16 bits
# For each number of bits: outputs that a program holds at a time, beside `VECTOR_CHUNK_BYTES` of a
# stream: 64 weights a thread, which stay in registers for all rows.
SUM_OUTPUTS = {8: 16, 4: 16, 3: 8}
# For each number of bits: bytes of a stream and outputs that a program holds at a time, 32 weights
# a thread, which are only written.
DEQUANTIZE_TILES = {8: (512, 8), 4: (256, 8), 3: (128, 4)}
# For each number of bits: warps and pipeline stages of a program with a tile of `TENSOR_TILES`.
DOT_WARPS_AND_STAGES = {8: (8, 3), 4: (8, 4), 3: (4, 4)}
ALIGNED_BYTES, UNALIGNED_WIDTH = 16, 32
DOT_ROWS = 16  # the rows of a tensor core's product
ADD_BLOCK = 256


@dataclass(frozen=True)
class Packing:
    """The positions of the codes in a packed row; `triton_source` explains the terms.

    A byte has `fields` codes, `planes` bytes share a byte of third bits, and the codes of a byte
    belong to columns `stream_bytes` apart. Each `granule` consecutive bytes share a scale.
    """

    fields: int
    planes: int
    stream_bytes: int
    row_bytes: int
    group: int
    granule: int


@dataclass(frozen=True)
class Config:
    """A program of `triton_source`, its constants, and the number of its chunks."""

    program: str
    constants: dict[str, int]
    chunks: int
    num_warps: int = 4
    num_stages: int = 1

    @property
    def options(self) -> dict[str, int | bool]:
        """Options of the compiler. Sums rely on fused multiply-adds, which later versions omit."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


def cdiv(total: int, part: int) -> int:
    """The number of parts that cover the total."""
    return -(-total // part)


def available(device: torch.device) -> bool:
    """Whether these kernels run on a device: NVIDIA from capability 7.0, or interpreted."""
    device = torch.device(device)
    if find_spec("triton") is None:
        return False
    if device.type == "cuda":
        return torch.version.cuda is not None and capability_of(device) >= LIBRARIES[TRITON]
    return interpreted()


def interpreted() -> bool:
    """Whether Triton interprets programs on the CPU (`TRITON_INTERPRET=1`)."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def capability_of(device: torch.device) -> Capability:
    """The compute capability that programs for this device are compiled for."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else INTERPRETED


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Makes this card the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def packing_of(bits: int, in_features: int, groups: int) -> Packing:
    """How a row of `in_features` codes with `groups` scales is packed."""
    fields, planes = CODES[bits]
    columns = padded_columns(in_features)
    stream = columns // (fields * planes)
    # Padded columns belong to the last group; a single group has no borders.
    group, granule = columns, LARGEST_GRANULE
    if groups > 1:
        group = in_features // groups
        common = math.gcd(stream, group)
        granule = min(LARGEST_GRANULE, common & -common)
    return Packing(fields, planes, stream, columns * bits // 8, group, granule)


def supports(bits: int, in_features: int, groups: int) -> bool:
    """Whether `multiply_few_rows` takes such rows; `dequantize` takes all rows.

    Every stream of a row must hold whole runs of 16 codes with one scale: this holds for groups of
    32, 64 or 128 in the usual sizes, and for rows with one scale; it does not for groups of 8.
    """
    return bits in CODES and packing_of(bits, in_features, groups).granule >= SMALLEST_GRANULE


def config_for(
    capability: Capability,
    dtype: torch.dtype,
    bits: int,
    out_features: int,
    in_features: int,
    groups: int,
) -> Config:
    """The program that `multiply_few_rows` launches on such a card for inputs of `dtype`."""
    packing = packing_of(bits, in_features, groups)
    if capability < TENSOR_CORES or dtype == torch.float32:
        return _sums_config(bits, packing)
    return _dots_config(bits, packing, out_features)


def _sums_config(bits: int, packing: Packing) -> Config:
    width, rows = VECTOR_CHUNK_BYTES[bits], SUM_OUTPUTS[bits]
    constants = _tile(packing, width, rows)
    return Config("multiply_by_sums", constants, chunks=cdiv(packing.stream_bytes, width))


def _dots_config(bits: int, packing: Packing, out_features: int) -> Config:
    (width, outputs), (num_warps, num_stages) = TENSOR_TILES[bits], DOT_WARPS_AND_STAGES[bits]
    width = min(width, packing.granule)
    if packing.stream_bytes % ALIGNED_BYTES:  # bytes are read one by one
        width = min(width, UNALIGNED_WIDTH)
    blocks = cdiv(packing.stream_bytes, width)
    wanted = cdiv(TENSOR_PROGRAMS, cdiv(out_features, outputs))
    chunk = cdiv(blocks, min(wanted, cdiv(blocks, TENSOR_LEAST_BLOCKS)))
    constants = {
        "FIELDS": packing.fields,
        "PLANES": packing.planes,
        "BLOCK_M": DOT_ROWS,
        "BLOCK_N": outputs,
        "BLOCK_K": width,
    }
    return Config("multiply_by_dots", constants, cdiv(blocks, chunk), num_warps, num_stages)


def dequantize_config(bits: int, in_features: int, groups: int) -> Config:
    """The program that `dequantize` launches on any card."""
    packing = packing_of(bits, in_features, groups)
    width, rows = DEQUANTIZE_TILES[bits]
    constants = _tile(packing, width, rows)
    return Config("dequantize", constants, chunks=cdiv(packing.stream_bytes, width))


def _tile(packing: Packing, width: int, rows: int) -> dict[str, int]:
    """The constants of a program that holds `width` bytes of each stream of `rows` rows."""
    return {
        "FIELDS": packing.fields,
        "PLANES": packing.planes,
        "BLOCK_N": rows,
        "GRANULES": width // packing.granule,
        "GRANULE": packing.granule,
    }


def dequantize(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    in_features: int,
    dtype: torch.dtype,
    *,
    rows: slice | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rows `[rows, in]` of a packed weight in `dtype`, equal to those of `dequantized_weight()`.

    3 and 4 bits: `packed` uint8 `[out, bits * ceil(in / 8)]`, `scales` and `zeros` bf16
    `[out, groups]`, as `GroupedLinear` keeps them. 8 bits: `packed` int8 `[out, in padded to 8]`,
    grids bf16 `[out]`, as `RowLinear` does. `rows` selects all rows unless given; its step must be
    1. `out`, where given, is contiguous, has room for the weights in `dtype`, and is written.
    """
    start, stop, _ = (rows or slice(None)).indices(packed.shape[0])
    if out is None:
        out = torch.empty(stop - start, in_features, dtype=dtype, device=packed.device)
    weight = out.view(-1)[: (stop - start) * in_features].view(stop - start, in_features)
    config = dequantize_config(bits, in_features, _groups(scales))
    arguments: dict[str, Tensor | int] = {
        "packed": packed.view(torch.uint8),
        "scales": scales,
        "zeros": zeros,
        "out": weight,
        "first_row": start,
        "num_rows": stop - start,
        "in_features": in_features,
        **_row_arguments(bits, in_features, _groups(scales)),
    }
    grid = (cdiv(stop - start, config.constants["BLOCK_N"]), config.chunks)
    launch(_programs().dequantize, grid, arguments, config)
    return weight


def multiply_few_rows(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    bias: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Multiplies `x [M, in]`, contiguous, by a packed weight, plus `bias [out]`: `[M, out]`.

    `packed`, `scales`, `zeros` are those of `dequantize`, and `supports` must hold. The result has
    x's dtype. Any M works; the time grows with every row (without tensor cores) or every 16 rows.
    The workspace is `4 * chunks * M * out` bytes. The first call of a kind compiles, which a CUDA
    graph must not hold. `config` is that of `config_for` for x's card, unless given.
    """
    out_features, groups = packed.shape[0], _groups(scales)
    assert supports(bits, x.shape[1], groups) and x.is_contiguous(), (bits, x.shape, groups)
    config = config or config_for(
        capability_of(x.device), x.dtype, bits, out_features, x.shape[1], groups
    )
    partial = x.new_empty(config.chunks, x.shape[0], out_features, dtype=torch.float32)
    arguments: dict[str, Tensor | int] = {
        "x": x,
        "packed": packed.view(torch.uint8),
        "scales": scales,
        "zeros": zeros,
        "partial": partial,
        "num_rows": x.shape[0],
        "out_features": out_features,
        "in_features": x.shape[1],
        **_row_arguments(bits, x.shape[1], groups),
    }
    grid: tuple[int, ...] = (cdiv(out_features, config.constants["BLOCK_N"]), config.chunks)
    if config.program == "multiply_by_dots":
        blocks = cdiv(int(arguments["stream_bytes"]), config.constants["BLOCK_K"])
        arguments["blocks"] = cdiv(blocks, config.chunks)
        grid = (cdiv(x.shape[0], DOT_ROWS), *grid)
    launch(getattr(_programs(), config.program), grid, arguments, config)
    return _add_chunks(partial, bias, x.dtype)


def _add_chunks(partial: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sums `partial` `[chunks, M, out]` in order, adds the bias: `[M, out]` in `dtype`."""
    chunks, rows, out_features = partial.shape
    out = torch.empty(rows, out_features, dtype=dtype, device=partial.device)
    arguments: dict[str, Tensor | int] = {
        "partial": partial,
        "bias": out if bias is None else bias,
        "out": out,
        "chunks": chunks,
        "size": rows * out_features,
        "out_features": out_features,
    }
    config = Config("add_chunks", {"HAS_BIAS": bias is not None, "BLOCK": ADD_BLOCK}, chunks)
    grid = (cdiv(rows * out_features, ADD_BLOCK),)
    launch(_programs().add_chunks, grid, arguments, config)
    return out


def launch(
    program: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config
) -> None:
    """Starts a Triton program `grid` times on the card that its tensors are on."""
    if 0 in grid:
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with on_device(device):
        program[grid](**arguments, **config.constants, **config.options)


def _row_arguments(bits: int, in_features: int, groups: int) -> dict[str, int]:
    packing = packing_of(bits, in_features, groups)
    return {
        "stream_bytes": packing.stream_bytes,
        "row_bytes": packing.row_bytes,
        "groups": groups,
        "group": packing.group,
    }


def _groups(scales: Tensor) -> int:
    return scales.shape[1] if scales.dim() == 2 else 1


def _programs() -> Any:
    from llmpq.quant import triton_source

    return triton_source
