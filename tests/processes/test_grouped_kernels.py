"""Kernels for all experts at once: what they compute, interpreted, and what they compile to."""

from collections.abc import Iterator

import pytest
import torch

from llmpq.quant import grouped

pytest.importorskip("triton", reason="Triton is not installed")

from test_triton_kernels import CAPABILITIES, DTYPES  # noqa: E402
from triton_programs import Launch, check_fits, recorded, run_interpreted  # noqa: E402

META = torch.device("meta")
EXPERTS, OUTPUTS, INPUTS, GROUP = 64, 3072, 4096, 128


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is taken from another run, and nothing is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def weight_of(
    bits: int, dtype: torch.dtype, inputs: int = INPUTS, group: int = GROUP
) -> grouped.StackedWeight:
    """The weights of all experts, without memory."""
    bias = torch.empty(EXPERTS, OUTPUTS, dtype=dtype, device=META)
    if bits == 16:
        packed = torch.empty(EXPERTS, OUTPUTS, inputs, dtype=dtype, device=META)
        return grouped.StackedWeight(packed, None, None, bias, 16, inputs)
    packed = torch.empty(EXPERTS, OUTPUTS, inputs * bits // 8, dtype=torch.uint8, device=META)
    grids = (EXPERTS, OUTPUTS) if bits == 8 else (EXPERTS, OUTPUTS, inputs // group)
    grid = torch.empty(grids, dtype=torch.bfloat16, device=META)
    return grouped.StackedWeight(packed, grid, torch.empty_like(grid), bias, bits, inputs)


def launches_of(
    capability: tuple[int, int],
    bits: int,
    tokens: int,
    from_tokens: bool,
    inputs: int = INPUTS,
    group: int = GROUP,
) -> list[Launch]:
    """What a product of all experts launches on such a card, with the table before it."""
    dtype = DTYPES[capability]
    weight = weight_of(bits, dtype, inputs, group)
    chosen = torch.empty(tokens, 8, dtype=torch.int64, device=META)
    block_rows = grouped.block_rows_for(chosen.numel(), EXPERTS)
    config = grouped.config_for_experts(capability, bits, inputs, weight.groups, block_rows)
    x = torch.empty(tokens if from_tokens else tokens * 8, inputs, dtype=dtype, device=META)
    factors = torch.empty(tokens * 8, dtype=torch.float32, device=META)
    with recorded(grouped) as launches:
        table = grouped.sort_pairs(chosen, EXPERTS, block_rows)
        how = grouped.SCALED_INPUTS if from_tokens else grouped.SCALED_OUTPUTS
        grouped.multiply_experts(x, weight, table, from_tokens, factors, how, config)
    return launches


def test_interpreted() -> None:
    run_interpreted("grouped_interpreted.py")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_products_of_few_rows_do_not_spill(capability: tuple[int, int], bits: int) -> None:
    used = check_fits(launches_of(capability, bits, 4, bits != 4), capability)
    dots = {"multiply_experts_by_dots"}
    sums = {"multiply_experts_by_sums", "add_expert_chunks"}
    assert set(used) == {"sort_pairs"} | (dots if capability >= (8, 0) else sums)
    print(capability, bits, {name: found.registers for name, found in used.items()})


@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if c >= (8, 0)])
@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_products_of_many_rows_do_not_spill(capability: tuple[int, int], bits: int) -> None:
    launches = launches_of(capability, bits, 1000, True)
    assert launches[-1].config.constants["BLOCK_M"] == 64
    used = check_fits(launches, capability)
    print(capability, bits, {name: found.registers for name, found in used.items()})


@pytest.mark.parametrize(
    ("capability", "bits", "tokens", "inputs", "group"),
    [
        ((7, 5), 4, 4, 2880, 64),  # gpt-oss: runs of 32 bytes share a scale
        ((8, 0), 4, 4, 2880, 64),
        ((9, 0), 4, 1000, 2880, 64),
        ((8, 9), 3, 1000, 1536, 128),
        ((12, 0), 8, 4, 2880, 2880),
    ],
)
def test_unusual_rows_do_not_spill(capability, bits, tokens, inputs, group) -> None:
    check_fits(launches_of(capability, bits, tokens, True, inputs, group), capability)


@pytest.mark.parametrize("tokens", [1, 7, 64, 4096])
@pytest.mark.parametrize(("experts", "per_token"), [(8, 2), (64, 8), (256, 8), (5, 5), (16, 1)])
def test_slots_are_bounded_by_sizes_alone(tokens: int, experts: int, per_token: int) -> None:
    """No routing needs more, and the worst one needs nearly as many."""
    pairs = tokens * per_token
    for block_rows in (16, 64):
        most = grouped.num_slots(pairs, experts, block_rows)
        assert most <= pairs
        counts = [pairs // experts + (i < pairs % experts) for i in range(experts)]
        assert sum(-(-count // block_rows) for count in counts) <= most
