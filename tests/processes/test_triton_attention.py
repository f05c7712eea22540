"""Triton's attention of a decode step: what it computes, interpreted, and what it compiles to."""

from collections.abc import Iterator

import pytest
import torch

from llmpq.models import triton_attention
from llmpq.workspace import partition_for

pytest.importorskip("triton", reason="Triton is not installed")

from triton_programs import check_fits, recorded, run_interpreted  # noqa: E402

CAPABILITIES = [(7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (12, 0)]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is taken from another run, and nothing is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def test_interpreted() -> None:
    run_interpreted("triton_attention_interpreted.py")


def compiled(
    capability: tuple[int, int],
    dtype: torch.dtype,
    group: int,
    size: int,
    softcap: float | None = None,
    sinks: bool = False,
) -> None:
    """Compiles what a step of 3 rows over 1000 columns launches on such a card."""
    query = torch.empty(3, 2 * group, 1, size, dtype=dtype, device="meta")
    cache = torch.empty(3, 2, 1024, size, dtype=dtype, device="meta")[:, :, :1000]
    mask = torch.empty(3, 1, 1, 1000, dtype=torch.bool, device="meta")
    config = triton_attention.config_for(capability, dtype, 2 * group, 2, size)
    own = torch.empty(2 * group, dtype=dtype, device="meta") if sinks else None
    with recorded(triton_attention) as launches:
        triton_attention.decode_attention(query, cache, cache, mask, 0.1, softcap, own, config)
    used = check_fits(launches, capability)
    assert set(used) == {"attend_partition", "merge_partitions"}
    print(capability, group, size, {name: found.registers for name, found in used.items()})


# Group and head size of Llama 3 8B, of Gemma 2 9B with its cap, and of gpt-oss with its sinks.
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_card_spills(capability: tuple[int, int]) -> None:
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    compiled(capability, dtype, 4, 128)
    compiled(capability, dtype, 2, 256, 50.0)
    compiled(capability, dtype, 8, 64, sinks=True)


@pytest.mark.parametrize(
    ("capability", "dtype", "group", "size"),
    [
        ((7, 0), torch.float16, 8, 256),
        ((7, 0), torch.float32, 4, 96),
        ((7, 5), torch.float16, 8, 128),
        ((7, 5), torch.float16, 1, 64),
        ((8, 0), torch.float32, 8, 128),
        ((8, 9), torch.float16, 71, 64),
        ((12, 0), torch.bfloat16, 1, 80),
    ],
)
def test_other_shapes_do_not_spill(
    capability: tuple[int, int], dtype: torch.dtype, group: int, size: int
) -> None:
    compiled(capability, dtype, group, size)


def test_partitions_are_few_and_do_not_depend_on_short_lengths() -> None:
    assert {partition_for(columns) for columns in (1, 256, 16384)} == {256}
    for columns in (16385, 100_000, 1_000_000):
        partition = partition_for(columns)
        assert partition * 32 < columns <= partition * 64


def test_what_is_supported() -> None:
    query, key = torch.empty(2, 8, 1, 64), torch.empty(2, 4, 10, 64)
    assert triton_attention.supports(query, key, key)
    assert not triton_attention.supports(query, key, key[..., :48])
    assert not triton_attention.supports(query.expand(2, 8, 3, 64), key, key)
    assert not triton_attention.supports(query.half(), key, key)
    assert not triton_attention.supports(query[:, :6], key, key)
    wide = key.repeat(1, 1, 1, 5)
    assert not triton_attention.supports(query.repeat(1, 1, 1, 5), wide, wide)
