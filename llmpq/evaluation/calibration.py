"""Measures calibration statistics: the second moments of the inputs of a running stage's linears.

H = X^T X / T of the inputs X `[T tokens, in]`, as blocks `[blocks, B, B]` along its diagonal (one
block unless asked otherwise). Linears with the same input share one H, under the name ("key") of
the first of them. `llmpq.checkpoint.calibration_file` keeps them.

A routed expert sees the tokens that are routed to it, and H is their mean. Experts are many, so
that blocks of their H have at most `EXPERT_BLOCK` columns unless asked otherwise. With fewer tokens
than `TOKENS_A_COLUMN` for each column of a block, an expert's linear is `rounded_to_nearest`: GPTQ
then fits its codes to chance. Against rounding to nearest at 4 bits, its error on random weights of
256 inputs was 1.85, 1.04 and 0.87 times as large with one, two and four tokens a column where the
inputs' moments fall slowly, and 0.72, 0.50 and 0.43 times where they fall fast, as in most layers
(`tests/unit/test_few_tokens.py` has a smaller case).
"""

from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from llmpq.models.family import is_of_expert
from llmpq.models.stage_model import StageModel
from llmpq.precision import group_size

CHUNK_TOKENS = 4096  # inputs held in fp32
EXPERT_BLOCK = 512
TOKENS_A_COLUMN = 2


class CalibrationMeter:
    """Accumulates the statistics of a stage's linears while it runs; a context manager.

    `block` is the most columns of a block; by default one block holds all columns.
    """

    def __init__(self, stage: StageModel, block: int | None = None) -> None:
        self.keys: dict[str, str] = {}
        self._block, self._sums, self._tokens = block, dict[str, Tensor](), dict[str, int]()
        self._last: tuple[Tensor, str] | None = None  # the input seen last, and its key
        stage.keep_experts_one_by_one()
        self._linears = stage.linears()
        self._hooks = [
            linear.register_forward_pre_hook(partial(self._see, name))
            for name, linear in self._linears.items()
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes the hooks from the stage."""
        for hook in self._hooks:
            hook.remove()
        self._last = None

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the linear that saw the most."""
        return max(self._tokens.values(), default=0)

    @property
    def seen(self) -> dict[str, int]:
        """The number of tokens so far, by key."""
        return dict(self._tokens)

    def rounded_to_nearest(self) -> list[str]:
        """The linears of experts that saw too few tokens so far for GPTQ."""
        return [
            name
            for name, linear in self._linears.items()
            if is_of_expert(name)
            and self._tokens.get(self.keys.get(name, ""), 0)
            < TOKENS_A_COLUMN * self._columns(name, linear.in_features)
        ]

    def statistics(self) -> dict[str, Tensor]:
        """The mean second moments so far, fp32 `[blocks, B, B]`, by key."""
        return {key: total / self._tokens[key] for key, total in self._sums.items()}

    def _see(self, name: str, linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if name not in self.keys:
            shared = self._last is not None and self._last[0] is x
            self.keys[name] = self._last[1] if self._last and shared else name
        self._last = x, self.keys[name]
        if self.keys[name] == name:
            self._add(name, x.detach().flatten(0, -2))

    def _add(self, key: str, x: Tensor) -> None:
        size = self._columns(key, x.shape[1])
        if key not in self._sums:
            shape = (x.shape[1] // size, size, size)
            self._sums[key] = torch.zeros(shape, dtype=torch.float32, device=x.device)
        self._tokens[key] = self._tokens.get(key, 0) + len(x)
        for part in x.split(CHUNK_TOKENS):
            for total, columns in zip(self._sums[key], part.float().split(size, 1), strict=True):
                total.addmm_(columns.t(), columns)

    def _columns(self, name: str, in_features: int) -> int:
        """The columns of a block of a linear's H."""
        return block_columns(in_features, default_block(is_of_expert(name), self._block))


def default_block(of_expert: bool, block: int | None) -> int | None:
    """The most columns of a block of a linear's H, where `block` is asked for, if any is."""
    return block or (EXPERT_BLOCK if of_expert else None)


def block_columns(in_features: int, block: int | None = None) -> int:
    """The largest divisor of `in_features` up to `block` that is whole groups; at least a group."""
    group = group_size(4, in_features)  # 3 bits have the same groups
    sizes = range(group, in_features + 1, group)
    fitting = [n for n in sizes if in_features % n == 0 and n <= (block or in_features)]
    return max(fitting, default=group)
