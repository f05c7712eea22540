"""Empties the layers of other stages, which stay in the list of layers.

A decoder runs all layers of the whole model. Layers that a stage does not own return their input
states. The last one before the stage's own layers returns the states from the stage before instead,
whatever the decoder did to its input; the first one after them keeps the states for the next stage.
So an index of a layer means the same on every stage, and what a decoder computes before its first
layer or after its last layer acts only on the first or last stage.

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
    """Empties all `layers` but `first` up to `end`; `tuples`: layers return tuples."""

    def __init__(self, layers: nn.ModuleList, first: int, end: int, tuples: bool) -> None:
        self.received: Tensor | None = None
        self.sent: Tensor | None = None
        for index, layer in enumerate(layers):
            if not first <= index < end:
                layer._modules.clear()  # other attributes, which a decoder may read, are kept
                layer._parameters.clear()
                layer._buffers.clear()
                is_before, is_after = index == first - 1, index == end
                layer.forward = _PassedOver(self, is_before, is_after, tuples)  # type: ignore[assignment]

    @contextmanager
    def given(self, hidden: Tensor) -> Iterator["Passing"]:
        """Sets the states that came in, for one run; `sent` then holds those that go out."""
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
    """Removes the modules of other stages beside layers."""
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
    """Replaces a module with parameters; one without may act in two places (NanoChat's norm)."""
    old = find(model, path)
    if old is not None and next(old.parameters(), None) is not None:
        replace(model, path, new)


class _Nothing(nn.Module):
    """Replaces learned positions on a stage that does not add them."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        return next(tensors).new_zeros(())  # it is on the device of the other tensors


class _Reached(Exception):
    """Ends a forward pass once the first layer has run."""


def gives_tuples(
    decoder: nn.Module, first_layer: nn.Module, width: int, dtype: torch.dtype
) -> bool:
    """Whether layers return tuples, found by running a decoder on the meta device.

    `width` is the size of its input. A decoder that cannot run without values is assumed to have
    layers that return tensors.
    """
    found: list[object] = []

    def reached(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(output)
        raise _Reached

    hook = first_layer.register_forward_hook(reached)
    states = torch.empty(1, 1, width, dtype=dtype, device="meta")
    with torch.inference_mode(), suppress(Exception):  # after any error nothing is found
        decoder(inputs_embeds=states, use_cache=False)
    hook.remove()
    return bool(found) and isinstance(found[0], tuple)
