"""Layers of other stages, emptied, in their places among a stage's own.

A decoder runs all layers of the whole model. Those that a stage does not own hand on the states
that they are given. The last one before the stage's own gives what came from the stage before
instead, whatever the decoder did to its input; the first one after them keeps what goes to the next
stage. So an index of a layer means the same everywhere, and what a decoder computes before its
first layer or after its last acts only where it belongs.

Not covered: layers that exchange more than one tensor of states.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmpq.families import Family
from llmpq.models.family import find, replace


class Passing:
    """Empties all `layers` but `first` up to `end`; `tuples`: layers give tuples of tensors."""

    def __init__(self, layers: nn.ModuleList, first: int, end: int, tuples: bool) -> None:
        self.received: Tensor | None = None
        self.sent: Tensor | None = None
        for index, layer in enumerate(layers):
            if not first <= index < end:
                layer._modules.clear()  # what a decoder asks of a layer beside stays there
                layer._parameters.clear()
                layer._buffers.clear()
                is_before, is_after = index == first - 1, index == end
                layer.forward = _PassedOver(self, is_before, is_after, tuples)  # type: ignore[assignment]

    @contextmanager
    def given(self, hidden: Tensor) -> Iterator["Passing"]:
        """The states that came in, for one run; `sent` are then those that go out, if any."""
        self.received, self.sent = hidden, None
        try:
            yield self
        finally:
            self.received = self.sent = None


@dataclass(frozen=True)
class _PassedOver:
    """The `forward` of an emptied layer."""

    passing: Passing
    gives_received: bool
    keeps_sent: bool
    tuples: bool

    def __call__(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        if self.keeps_sent:
            self.passing.sent = hidden_states
        if self.gives_received:
            assert self.passing.received is not None
            hidden_states = self.passing.received
        return (hidden_states,) if self.tuples else hidden_states


def pass_over(model: nn.Module, family: Family, is_first: bool, is_last: bool) -> None:
    """Removes what other stages own beside layers."""
    if not is_first:
        replace(model, f"{family.decoder}.{family.embedding}", None)
        for name in family.input:
            _replace_if_there(model, f"{family.decoder}.{name}", nn.Identity())
        for name in family.positions:
            _replace_if_there(model, f"{family.decoder}.{name}", _Nothing())
    if not is_last:
        replace(model, family.head, None)
        for name in family.final:
            _replace_if_there(model, f"{family.decoder}.{name}", nn.Identity())


def _replace_if_there(model: nn.Module, path: str, new: nn.Module) -> None:
    """One without parameters costs nothing, and may act in two places (NanoChat's norm)."""
    old = find(model, path)
    if old is not None and next(old.parameters(), None) is not None:
        replace(model, path, new)


class _Nothing(nn.Module):
    """Stands for learned positions on a stage that does not add them."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        return next(tensors).new_zeros(())  # on the device of the others


class _Reached(Exception):
    """The layer that was waited for has run."""


def gives_tuples(
    decoder: nn.Module, first_layer: nn.Module, width: int, dtype: torch.dtype
) -> bool:
    """Whether layers give tuples, found by running a decoder on the meta device up to its first.

    `width`: of its input. A decoder that cannot run without values is taken to have layers that
    give tensors.
    """
    found: list[object] = []

    def reached(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(output)
        raise _Reached

    hook = first_layer.register_forward_hook(reached)
    states = torch.empty(1, 1, width, dtype=dtype, device="meta")
    with torch.inference_mode(), suppress(Exception):  # of any kind: then nothing is found
        decoder(inputs_embeds=states, use_cache=False)
    hook.remove()
    return bool(found) and isinstance(found[0], tuple)
