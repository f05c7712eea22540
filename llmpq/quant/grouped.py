"""Multiplies the tokens of all experts of a layer by their packed weights, in one Triton launch.

`sort_pairs` puts the pairs of tokens and experts in the order of their experts and cuts them into
slots, blocks of rows of one expert, whose number depends on sizes alone. `multiply_experts` then
starts a program for each slot and block of outputs. The host never waits for the routing, so that a
CUDA graph can hold both. No sum uses atomics; with equal block sizes a row's result has the same
bits whatever the other rows are.

`ExpertStack` is how weights come to lie in one tensor: each expert's linear packs into a view of
it, and is named, rounded, cached and multiplied alone like any other linear.

Not covered: which layers use this (`llmpq.expert_kernels`), and the activation between products.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmpq.kernel_table import TENSOR_CORES
from llmpq.machine import Capability
from llmpq.quant.triton_kernels import (
    ALIGNED_BYTES,
    SUM_OUTPUTS,
    UNALIGNED_WIDTH,
    Config,
    Packing,
    capability_of,
    cdiv,
    launch,
    packing_of,
)
from llmpq.workspace import (
    GROUPED_FEW_ROWS,
    GROUPED_MANY_ROWS,
    PLAIN_CHUNK,
    VECTOR_CHUNK_BYTES,
)

PLAIN_BITS = 16
# For each number of bits, with blocks of few rows and of many: bytes of a stream (inputs at 16)
# and outputs of a tile, warps, pipeline stages. With these, registers suffice on every card.
FEW_ROWS_TILES = {16: (64, 128, 4, 3), 8: (128, 128, 8, 3), 4: (64, 64, 4, 4), 3: (32, 64, 4, 4)}
MANY_ROWS_TILES = FEW_ROWS_TILES | {4: (32, 128, 8, 3), 3: (16, 128, 8, 3)}
PLAIN_OUTPUTS = 16
SORTED_AT_ONCE = 1024  # pairs that a program of `sort_pairs` reads at a time
ADDED_AT_ONCE = 256
# What the scores of pairs scale.
Factor = Literal[0, 1, 2]
NOTHING: Factor = 0
SCALED_INPUTS: Factor = 1
SCALED_OUTPUTS: Factor = 2


@dataclass(frozen=True)
class RoutingTable:
    """Pairs by expert, and the slots that they are cut into; int32 tensors of static shapes.

    `order` `[pairs]` holds pairs in the order of their experts. `slots` `[3, slots]` holds each
    slot's expert, its first place in `order`, and its number of rows, which may be 0.
    """

    chosen: Tensor  # [pairs], the expert of each
    per_token: int
    block_rows: int
    order: Tensor
    slots: Tensor


@dataclass(frozen=True)
class StackedWeight:
    """The weights of one linear of all E experts, as `GroupedLinear` or `RowLinear` pack them.

    `packed` `[E, out, bytes of a row]`, or 16-bit weights `[E, out, in]`; `scales` and `zeros`
    `[E, out]` or `[E, out, groups]`, None at 16 bits; `bias` `[E, out]` or None.
    """

    packed: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    bias: Tensor | None
    bits: int
    in_features: int

    @property
    def out_features(self) -> int:
        """The outputs of one expert."""
        return self.packed.shape[1]

    @property
    def groups(self) -> int:
        """The scales of a row."""
        return self.scales.shape[2] if self.scales is not None and self.scales.dim() == 3 else 1


def block_rows_for(pairs: int, experts: int) -> int:
    """The rows of a block: few where experts have few rows on average over all of them."""
    return GROUPED_FEW_ROWS if pairs <= GROUPED_FEW_ROWS * experts else GROUPED_MANY_ROWS


def num_slots(pairs: int, experts: int, block_rows: int) -> int:
    """The most slots that any routing of so many pairs needs."""
    return min(pairs, pairs // block_rows + experts)


def sort_pairs(chosen: Tensor, experts: int, block_rows: int) -> RoutingTable:
    """The routing table of `chosen` `[T, k]`, the experts of each token, all below `experts`."""
    flat = chosen.reshape(-1)
    pairs = len(flat)
    slots = num_slots(pairs, experts, block_rows)
    order = torch.empty(pairs, dtype=torch.int32, device=flat.device)
    table = torch.empty(3, slots, dtype=torch.int32, device=flat.device)
    arguments: dict[str, Tensor | int] = {
        "chosen": flat,
        "order": order,
        "slots": table,
        "pairs": pairs,
        "num_slots": slots,
    }
    constants = {"BLOCK_ROWS": block_rows, "SLOT_A_PAIR": slots == pairs, "CHUNK": SORTED_AT_ONCE}
    launch(_programs().sort_pairs, (experts,), arguments, Config("sort_pairs", constants, 1))
    return RoutingTable(flat, chosen.shape[-1], block_rows, order, table)


def config_for_experts(
    capability: Capability, bits: int, in_features: int, groups: int, block_rows: int
) -> Config:
    """The program that `multiply_experts` launches on such a card."""
    packing = None if bits == PLAIN_BITS else packing_of(bits, in_features, groups)
    if capability < TENSOR_CORES:
        return _sums_config(bits, in_features, packing)
    tiles = FEW_ROWS_TILES if block_rows <= GROUPED_FEW_ROWS else MANY_ROWS_TILES
    width, outputs, num_warps, num_stages = tiles[bits]
    if packing is not None:
        width = min(width, packing.granule)
        if packing.stream_bytes % ALIGNED_BYTES:  # bytes are read one by one
            width = min(width, UNALIGNED_WIDTH)
    constants = _codes_of(packing) | {
        "BLOCK_M": block_rows,
        "BLOCK_N": outputs,
        "BLOCK_K": width,
    }
    return Config("multiply_experts_by_dots", constants, 1, num_warps, num_stages)


def _sums_config(bits: int, in_features: int, packing: Packing | None) -> Config:
    if packing is None:
        tile = {"BLOCK_N": PLAIN_OUTPUTS, "GRANULES": 1, "GRANULE": PLAIN_CHUNK}
        chunks = cdiv(in_features, PLAIN_CHUNK)
    else:
        width = VECTOR_CHUNK_BYTES[bits]
        tile = {"BLOCK_N": SUM_OUTPUTS[bits], "GRANULE": packing.granule}
        tile["GRANULES"] = width // packing.granule
        chunks = cdiv(packing.stream_bytes, width)
    return Config("multiply_experts_by_sums", _codes_of(packing) | tile, chunks)


def _codes_of(packing: Packing | None) -> dict[str, int]:
    if packing is None:
        return {"FIELDS": 0, "PLANES": 1}
    return {"FIELDS": packing.fields, "PLANES": packing.planes}


def multiply_experts(
    x: Tensor,
    weight: StackedWeight,
    table: RoutingTable,
    from_tokens: bool,
    factors: Tensor | None = None,
    factor: Factor = NOTHING,
    config: Config | None = None,
) -> Tensor:
    """Multiplies each pair's row by its expert's weight, in x's dtype: `[pairs, out]`.

    With `from_tokens`, `x` `[T, in]` holds tokens, and the result's rows are pairs in the order of
    `table`; otherwise `x` `[pairs, in]` has those rows, and the result's are pairs by token.
    `factors` `[pairs]` by token scale the inputs or the outputs, bias included, as
    `factor` says.
    """
    assert x.is_contiguous() and x.shape[1] == weight.in_features, (x.shape, weight.in_features)
    config = config or config_for_experts(
        capability_of(x.device), weight.bits, weight.in_features, weight.groups, table.block_rows
    )
    pairs, outputs = len(table.order), weight.out_features
    out = x.new_empty(pairs, outputs)
    how = {"FROM_TOKENS": from_tokens}
    scaled = {"FACTOR": int(factor), "HAS_BIAS": weight.bias is not None}
    common: dict[str, Tensor | int] = {"order": table.order, "out_features": outputs}
    extra: dict[str, Tensor | int] = {
        "bias": out if weight.bias is None else weight.bias,
        "factors": out if factors is None else factors,
        "out": out,
    }
    arguments = common | _weight_arguments(weight) | {"x": x, "per_token": table.per_token}
    arguments |= {"slots": table.slots, "num_slots": table.slots.shape[1]}
    grid = (cdiv(outputs, config.constants["BLOCK_N"]), table.slots.shape[1])
    program = getattr(_programs(), config.program)
    if config.program == "multiply_experts_by_dots":
        launch(program, grid, arguments | extra, _with(config, how | scaled))
        return out
    partial = x.new_empty(config.chunks, pairs, outputs, dtype=torch.float32)
    arguments |= {"pairs": pairs, "partial": partial}
    launch(program, (*grid, config.chunks), arguments, _with(config, how))
    added = common | extra | {"partial": partial, "chosen": table.chosen, "pairs": pairs}
    added |= {"chunks": config.chunks}
    adding = Config("add_expert_chunks", how | scaled | {"BLOCK": ADDED_AT_ONCE}, config.chunks)
    launch(_programs().add_expert_chunks, (cdiv(outputs, ADDED_AT_ONCE), pairs), added, adding)
    return out


def _weight_arguments(weight: StackedWeight) -> dict[str, Tensor | int]:
    if weight.scales is None or weight.zeros is None:
        sizes = {"stream_bytes": 0, "row_bytes": 0, "groups": 1, "group": weight.in_features}
        tensors = dict.fromkeys(("packed", "scales", "zeros"), weight.packed)
    else:
        packing = packing_of(weight.bits, weight.in_features, weight.groups)
        sizes = {
            "stream_bytes": packing.stream_bytes,
            "row_bytes": packing.row_bytes,
            "groups": weight.groups,
            "group": packing.group,
        }
        packed = weight.packed.view(torch.uint8)
        tensors = {"packed": packed, "scales": weight.scales, "zeros": weight.zeros}
    return {**tensors, **sizes, "in_features": weight.in_features}


def _with(config: Config, constants: Mapping[str, int]) -> Config:
    return Config(
        config.program,
        config.constants | dict(constants),
        config.chunks,
        config.num_warps,
        config.num_stages,
    )


def _programs() -> Any:
    from llmpq.quant import grouped_source

    return grouped_source


# ---- where stacked weights come from


@dataclass(frozen=True)
class StackPlace:
    """A linear's place in a stack."""

    stack: "ExpertStack"
    index: int

    def room(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A view for one of the linear's buffers; a tensor of its own where it does not fit in."""
        return self.stack.room(self.index, name, tuple(shape), dtype)


class ExpertStack:
    """Tensors `[count, ...]` that hold the buffers of `count` linears, made when first needed."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._count, self._device = count, device
        self._tensors: dict[str, Tensor] = {}

    def place(self, index: int) -> StackPlace:
        """The place of one linear."""
        return StackPlace(self, index)

    def room(self, index: int, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The view for the buffer `name` of one linear; see `StackPlace.room`."""
        held = self._tensors.get(name)
        if held is None:
            held = torch.empty(self._count, *shape, dtype=dtype, device=self._device)
            self._tensors[name] = held
        if held.shape[1:] != shape or held.dtype != dtype:
            return torch.empty(shape, dtype=dtype, device=self._device)
        return held[index]

    def whole(self, name: str, views: Sequence[Tensor | None], experts: int) -> Tensor | None:
        """The tensor `[experts, ...]` of which these are all views in order; None if it is none.

        Where an expert has several linears in the stack, their outputs follow one another.
        """
        held = self._tensors.get(name)
        if held is None or len(views) != self._count:
            return None
        size = math.prod(held.shape[1:])
        for index, view in enumerate(views):
            if view is None or view.shape != held.shape[1:] or view.dtype != held.dtype:
                return None
            same = view.untyped_storage()._cdata == held.untyped_storage()._cdata
            if not same or view.storage_offset() != index * size:
                return None
        return held.view(experts, self._count // experts * held.shape[1], *held.shape[2:])
