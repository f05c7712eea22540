"""A twin of the kernels for all experts in plain torch, with the same tables and indices.

`launch` stands for that of `llmpq.quant.grouped`: it fills or multiplies the tensors that a program
would be given, slot by slot. Sums are those of one product a slot, in 32 bits.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmpq.quant.grouped import RoutingTable, num_slots
from llmpq.quant.packing import unpack
from llmpq.quant.triton_kernels import Config

BYTE_MIDDLE = 128


def routing_table(chosen: Tensor, experts: int, block_rows: int) -> RoutingTable:
    """The table that `sort_pairs` writes, computed in another way: expert by expert."""
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True).int()
    slots = torch.zeros(3, num_slots(len(flat), experts, block_rows), dtype=torch.int32)
    by_pair = slots.shape[1] == len(flat)
    before = 0
    for expert in range(experts):
        own = int((flat == expert).sum())
        first = before if by_pair else before // block_rows + expert
        for block in range(-(-own // block_rows)):
            done = block * block_rows
            rows = min(block_rows, own - done)
            assert slots[2, first + block] == 0, "two experts share a slot"
            slots[:, first + block] = torch.tensor([expert, before + done, rows])
        before += own
    return RoutingTable(flat, chosen.shape[-1], block_rows, order, slots)


def launch(program: Any, grid: Any, arguments: Mapping[str, Any], config: Config) -> None:
    """Does what a program would."""
    if config.program == "sort_pairs":
        table = routing_table(arguments["chosen"], grid[0], config.constants["BLOCK_ROWS"])
        arguments["order"].copy_(table.order)
        arguments["slots"].copy_(table.slots)
        return
    assert config.program == "multiply_experts_by_dots", config.program
    _multiply(arguments, config.constants)


def _multiply(given: Mapping[str, Any], constants: Mapping[str, int]) -> None:
    x, out, order = given["x"], given["out"], given["order"].long()
    for expert, first, count in given["slots"].T.tolist():
        if not count:
            continue
        assert count <= constants["BLOCK_M"]
        places = torch.arange(first, first + count)
        pairs = order[places]
        source, target = places, pairs
        if constants["FROM_TOKENS"]:
            source, target = pairs // given["per_token"], places
        sums = x[source].float() @ _weight(given, expert, constants["FIELDS"]).T
        factors = given["factors"].reshape(-1)[pairs].float()[:, None] if constants["FACTOR"] else 1
        if constants["FACTOR"] == 1:
            sums = sums * factors
        if constants["HAS_BIAS"]:
            sums = sums + given["bias"][expert].float()
        if constants["FACTOR"] == 2:
            sums = sums * factors
        out[target] = sums.to(out.dtype)


def _weight(given: Mapping[str, Any], expert: int, fields: int) -> Tensor:
    """The weight of one expert in 32 bits."""
    packed, columns = given["packed"][expert], given["in_features"]
    if fields == 0:
        return packed.float()
    scales, zeros = (given[n][expert].float() for n in ("scales", "zeros"))
    if fields == 1:
        codes = packed.view(torch.int8)[:, :columns].float()
        return (codes - zeros[:, None]) * scales[:, None]
    codes = unpack(packed, {2: 4, 4: 3}[fields], columns).float()
    steps = codes.view(*scales.shape, -1) - zeros[..., None]
    return (steps * scales[..., None]).view(codes.shape)
