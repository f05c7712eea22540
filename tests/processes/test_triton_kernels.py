"""Triton's kernels for packed weights: what they compute, interpreted, and what they compile to."""

import importlib.util
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llmpq.quant import triton_kernels

pytest.importorskip("triton", reason="Triton is not installed")

from triton_programs import Launch, check_fits, compile_for, recorded, run_interpreted  # noqa: E402

CAPABILITIES = [(7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (12, 0)]
DTYPES = {c: torch.bfloat16 if c >= (8, 0) else torch.float16 for c in CAPABILITIES}
META = torch.device("meta")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is taken from another run, and nothing is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def packed_weight(bits: int, out: int, columns: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """A packed weight, its scales and its zeros, without memory."""
    row_bytes = -(-columns // 8) * bits
    grids = (out,) if bits == 8 else (out, columns // group)
    grid = torch.empty(grids, dtype=torch.bfloat16, device=META)
    packed = torch.empty(out, row_bytes, dtype=torch.uint8, device=META)
    return packed, grid, torch.empty_like(grid)


def products(
    capability: tuple[int, int], dtype: torch.dtype, bits: int, columns: int, group: int
) -> list[Launch]:
    """What `multiply_few_rows` launches on such a card for 5 rows."""
    weight = packed_weight(bits, 4096, columns, group)
    x = torch.empty(5, columns, dtype=dtype, device=META)
    groups = 1 if bits == 8 else columns // group
    config = triton_kernels.config_for(capability, dtype, bits, 4096, columns, groups)
    with recorded(triton_kernels) as launches:
        triton_kernels.multiply_few_rows(x, *weight, bits, x[0, :1], config)
    return launches


def dequantizing(dtype: torch.dtype, bits: int) -> list[Launch]:
    """What `dequantize` launches on any card."""
    with recorded(triton_kernels) as launches:
        triton_kernels.dequantize(*packed_weight(bits, 4096, 4096, 128), bits, 4096, dtype)
    return launches


def test_interpreted() -> None:
    run_interpreted("triton_kernels_interpreted.py")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_products_do_not_spill(capability: tuple[int, int], bits: int) -> None:
    used = check_fits(products(capability, DTYPES[capability], bits, 4096, 128), capability)
    dots = capability >= (8, 0)
    assert set(used) == {"multiply_by_dots" if dots else "multiply_by_sums", "add_chunks"}
    print(capability, bits, {name: found.registers for name, found in used.items()})


@pytest.mark.parametrize(
    ("capability", "dtype", "bits", "columns", "group"),
    [
        ((7, 0), torch.float16, 3, 11008, 128),  # runs of 32 bytes share a scale
        ((8, 9), torch.float16, 3, 896, 128),  # of 16
        ((8, 0), torch.float32, 3, 4096, 16),
        ((9, 0), torch.bfloat16, 8, 4100, 4100),  # rows that are not aligned
    ],
)
def test_unusual_rows_do_not_spill(
    capability: tuple[int, int], dtype: torch.dtype, bits: int, columns: int, group: int
) -> None:
    check_fits(products(capability, dtype, bits, columns, group), capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_dequantizing_does_not_spill(capability: tuple[int, int]) -> None:
    for bits in (3, 4, 8) if capability == (8, 0) else (3,):
        used = check_fits(dequantizing(DTYPES[capability], bits), capability)
        print(capability, bits, {name: found.registers for name, found in used.items()})


def test_the_check_sees_spills() -> None:
    launch = products((7, 5), torch.float16, 4, 4096, 128)[0]
    assert compile_for((7, 5), launch, maxnreg=32).stack > 0


def test_which_rows_are_supported() -> None:
    for groups in (1, 4096 // 32, 4096 // 64, 4096 // 128):
        assert all(triton_kernels.supports(bits, 4096, groups) for bits in (3, 4, 8))
    assert triton_kernels.supports(3, 11008, 86)
    assert not triton_kernels.supports(4, 4096, 512), "groups of 8"
    assert not triton_kernels.supports(3, 17 * 64, 17), "streams of 136 bytes"
    assert not triton_kernels.supports(16, 4096, 1)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("out", [7, 1024, 28672])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_chunks_cover_the_inputs(bits: int, out: int, capability: tuple[int, int]) -> None:
    """Every byte of a stream is in a chunk, and no chunk is empty."""
    for columns in (64, 4096, 11008, 28672):
        groups = 1 if bits == 8 else columns // 64
        packing = triton_kernels.packing_of(bits, columns, groups)
        config = triton_kernels.config_for(capability, torch.float16, bits, out, columns, groups)
        at_once = config.constants.get("BLOCK_K") or (
            config.constants["GRANULES"] * config.constants["GRANULE"]
        )
        blocks = -(-packing.stream_bytes // at_once)
        a_chunk = -(-blocks // config.chunks)
        assert (config.chunks - 1) * a_chunk < blocks <= config.chunks * a_chunk


def test_where_the_kernels_are_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on a CPU, and not without Triton, though the module imports."""
    assert not triton_kernels.available(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("without_triton", triton_kernels.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "without_triton", module)
    spec.loader.exec_module(module)
    assert not module.available(torch.device("cuda"))
