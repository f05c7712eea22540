"""What Triton's interpreter makes of a decode step's attention; `test_triton_attention` runs it.

The interpreter multiplies bf16 wrongly: inputs are fp16 or fp32.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from llmpq.models.triton_attention import config_for, decode_attention
from llmpq.quant import triton_kernels

assert triton_kernels.interpreted(), "set TRITON_INTERPRET=1"

CARDS = [(7, 5), (8, 0)]  # without tensor cores and with
GARBAGE = torch.nan


@dataclass
class Step:
    """Rows of a cache in which what no mask shows is not a number."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    def attend(self, card: tuple[int, int]) -> Tensor:
        heads, size = self.query.shape[1], self.query.shape[3]
        config = config_for(card, self.query.dtype, heads, self.key.shape[1], size)
        given = self.query, self.key, self.value, self.mask, self.scale
        return decode_attention(*given, self.softcap, self.sinks, config)

    def rows(self, rows: slice) -> "Step":
        parts = (t[rows] for t in (self.query, self.key, self.value, self.mask))
        return Step(*parts, self.scale, self.softcap, self.sinks)

    def wanted(self) -> Tensor:
        """The same in float64, with repeated keys."""
        seen = self.mask[:, 0, 0, :, None].expand(-1, -1, self.key.shape[3])[:, None]
        group = self.query.shape[1] // self.key.shape[1]
        key, value = (
            torch.where(seen, t.double(), 0.0).repeat_interleave(group, 1)
            for t in (self.key, self.value)
        )
        scores = self.query.double() @ key.transpose(2, 3) * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~self.mask, -torch.inf)
        if self.sinks is not None:
            sinks = self.sinks.double().view(1, -1, 1, 1)
            scores = torch.cat((scores, sinks.expand(len(scores), -1, -1, -1)), -1)
        weights = torch.softmax(scores, -1)[..., : value.shape[2]]
        return weights.nan_to_num(0.0) @ value


def step_of(
    shown: list[tuple[int, int]],
    columns: int,
    heads: tuple[int, int],
    size: int,
    dtype: torch.dtype = torch.float16,
    softcap: float | None = None,
) -> Step:
    """Row `i` sees columns `shown[i]`; keys and values are slices of one larger buffer."""
    rows, (query_heads, kv_heads) = len(shown), heads
    torch.manual_seed(columns)
    mask = torch.zeros(rows, 1, 1, columns, dtype=torch.bool)
    for row, (first, end) in enumerate(shown):
        mask[row, ..., first:end] = True
    cache = torch.full((2, rows + 1, kv_heads, columns + 13, size), GARBAGE, dtype=dtype)
    lanes = cache[:, 1:, :, 5 : 5 + columns]
    data = torch.randn(lanes.shape).to(dtype)
    lanes.copy_(torch.where(mask[:, 0, 0, None, :, None], data, GARBAGE))
    query = torch.randn(rows, query_heads, 1, size).to(dtype)
    return Step(query, lanes[0], lanes[1], mask, 1.5 * size**-0.5, softcap)


def with_sinks(step: Step) -> Step:
    """The same step, with a sink for each head, from one that hardly counts to one that rules."""
    step.sinks = torch.linspace(-4, 9, step.query.shape[1]).to(step.query.dtype)
    return step


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


# Ragged lengths, padding on the left, windows, a single column; groups of 1, 4, 7 and 8.
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(
    "step",
    [
        step_of([(0, 300), (3, 70), (299, 300)], 300, (8, 2), 64),
        step_of([(0, 33), (0, 1)], 33, (3, 3), 80, torch.float32),
        step_of([(230, 300), (0, 40)], 300, (8, 1), 128, softcap=2.0),
        step_of([(0, 100), (50, 110)], 110, (7, 1), 96),
        step_of([(10, 40)], 65, (20, 1), 32),
        step_of([(0, 40)], 40, (2, 2), 256),
        with_sinks(step_of([(0, 300), (3, 70), (299, 300)], 300, (8, 2), 64)),
        with_sinks(step_of([(0, 33), (0, 0)], 33, (4, 1), 64, torch.float32)),
    ],
    ids=["ragged", "fp32", "softcap", "group of 7", "group of 20", "large heads", "sinks", "none"],
)
def test_against_float64(step: Step, card: tuple[int, int]) -> None:
    got = step.attend(card)
    assert got.shape == step.query.shape and got.dtype == step.query.dtype
    assert error(got, step.wanted()) < 1e-3


@pytest.mark.parametrize("card", CARDS)
def test_a_row_is_the_same_in_any_company(card: tuple[int, int]) -> None:
    """Alone, or beside others, or with more masked columns behind; and of no columns it is 0."""
    step = with_sinks(step_of([(220, 270), (0, 0), (0, 300)], 300, (4, 2), 32))
    together = step.attend(card)
    assert (together[1] == 0).all()
    for row in (0, 2):
        assert torch.equal(step.rows(slice(row, row + 1)).attend(card)[0], together[row])
    longer = with_sinks(step_of([(0, 0)] * 3, 700, (4, 2), 32))
    longer.key[:, :, :300], longer.value[:, :, :300] = step.key, step.value
    longer.query, longer.mask[..., :300] = step.query, step.mask
    longer.mask[..., 300:] = False
    assert torch.equal(longer.attend(card), together)


@pytest.mark.parametrize("card", CARDS)
def test_masks_with_holes_and_of_any_strides(card: tuple[int, int]) -> None:
    step = step_of([(0, 200), (0, 200)], 200, (4, 2), 32)
    holes = torch.zeros(200, 2, dtype=torch.bool)
    holes[::3] = True
    holes[64:140] = False
    step.mask = holes.t()[:1, None, None, :].expand(2, 1, 1, 200)
    for cached in (step.key, step.value):
        cached.masked_fill_(~step.mask[:, 0, 0, None, :, None], GARBAGE)
    assert error(step.attend(card), step.wanted()) < 1e-3


def test_a_query_that_is_not_a_number_shows() -> None:
    step = step_of([(0, 20), (0, 20)], 20, (2, 2), 32)
    step.query[0] = torch.nan
    got = step.attend((8, 0))
    assert got[0].isnan().all() and error(got[1:], step.wanted()[1:]) < 1e-3
