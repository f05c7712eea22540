"""The changes from one plan to another, as a value that prints itself in short lines.

Two plans are compared by settings and predictions, which are names with values, and by the devices
and the precision of every layer. Values that differ become a `ValueChange`; neighbouring layers
that change alike become one `LayerRangeChange`, so that every changed layer lies in exactly one
range.

Equal devices of a node are interchangeable: they are numbered in the order of a plan's stages, and
a layer has moved where the number of its device differs.

Not covered: provenance, baselines and planning time, which `llmpq.plan_data.diff` does not compare.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class LayerPlacement:
    """Devices of a node that hold layers together; `numbers` count equal devices from 0.

    The stage `rank` is only shown: the same devices in another stage are the same placement.
    """

    node: str
    device_type: str
    numbers: tuple[int, ...]
    rank: int = field(compare=False)

    def __str__(self) -> str:
        count = f"{len(self.numbers)} x " if len(self.numbers) > 1 else ""
        number = f" no. {self.numbers[0] + 1}" if self.numbers[0] else ""
        return f"{count}{self.device_type}{number} on {self.node} (stage {self.rank})"


@dataclass(frozen=True)
class ValueChange:
    """A named value before and after; None where a plan does not have it."""

    name: str
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.name}: {_text(self.before)} -> {_text(self.after)}"


@dataclass(frozen=True)
class LayerRangeChange(Generic[T]):
    """Layers `first_layer` up to but not including `end_layer`, which change alike."""

    first_layer: int
    end_layer: int
    before: T
    after: T

    def __str__(self) -> str:
        last = self.end_layer - 1
        alone = last == self.first_layer
        layers = f"layer {last}" if alone else f"layers {self.first_layer}-{last}"
        return f"{layers}: {self.before} -> {self.after}"


@dataclass(frozen=True)
class PlanDiff:
    """The changes from one plan to another; false where there are none.

    `inputs` names inputs that differ, `settings` holds batch, micro-batches, devices in order,
    tensor parallelism and the like, `moves` and `precisions` hold the layers that change in either.
    """

    inputs: tuple[str, ...] = ()
    settings: tuple[ValueChange, ...] = ()
    moves: tuple[LayerRangeChange[LayerPlacement], ...] = ()
    precisions: tuple[LayerRangeChange[str], ...] = ()
    predicted: tuple[ValueChange, ...] = ()

    def __bool__(self) -> bool:
        return self != PlanDiff()

    def __str__(self) -> str:
        inputs = [f"another {name}" for name in self.inputs]
        parts = [*self.settings, *self.moves, *self.precisions, *self.predicted]
        return "\n".join([*inputs, *map(str, parts)]) or "no difference"


def changes(before: Mapping[str, object], after: Mapping[str, object]) -> tuple[ValueChange, ...]:
    """The values that differ, in the order of `before`, then names that only `after` has."""
    every = [ValueChange(name, before.get(name), after.get(name)) for name in {**before, **after}]
    return tuple(change for change in every if change.before != change.after)


def layer_ranges(before: Sequence[T], after: Sequence[T]) -> tuple[LayerRangeChange[T], ...]:
    """The layers that differ, as the fewest ranges; both sequences have an entry a layer."""
    ranges: list[LayerRangeChange[T]] = []
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        if old == new:
            continue
        last = ranges[-1] if ranges else None
        if last and (last.end_layer, last.before, last.after) == (layer, old, new):
            ranges[-1] = LayerRangeChange(last.first_layer, layer + 1, last.before, last.after)
        else:
            ranges.append(LayerRangeChange(layer, layer + 1, old, new))
    return tuple(ranges)


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
