"""Finds and replaces the modules of a model, by the paths in its family's row.

A stage is transformers' own causal language model with the layers of other stages emptied. Modules
that act on the input are replaced on every stage but the first, and modules that act on the output
on every stage but the last (`llmpq.families.Family`).
"""

import re
from dataclasses import dataclass
from typing import Literal

from torch import nn

from llmpq.errors import UserError
from llmpq.families import FAMILIES, Family, family_for
from llmpq.precision import layer_precision

LayerPart = Literal["attention", "ffn"]
OF_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
ATTENTION = ("attn", "attention")  # in the names of linears that attend, in every family


@dataclass(frozen=True)
class PartOfLayer:
    """A precision for the linears of one part of a layer; the others have 16 bits.

    `StageModel` calls it with a linear's name inside the layer.
    """

    precision: str
    part: LayerPart

    def __call__(self, linear: str) -> str:
        return precision_of(self.precision, linear) if part_of(linear) == self.part else "16"


def part_of(linear: str) -> LayerPart:
    """The part of a layer that a linear belongs to, by its name."""
    return "attention" if any(word in linear for word in ATTENTION) else "ffn"


def is_of_expert(linear: str) -> bool:
    """Whether a linear is one of a routed expert's, by its name inside of a layer or model."""
    return OF_EXPERT.search(linear) is not None


def precision_of(layer: str, linear: str) -> str:
    """The precision of a linear in a layer with the precision `layer`, such as "8+experts@4"."""
    rest, experts = layer_precision(layer)
    return experts if is_of_expert(linear) else rest


def family_of(model: nn.Module, model_type: str) -> Family:
    """The family of `model`; a model of an unlisted family must be laid out like LLaMA."""
    family = family_for(model_type)
    inner = (f"{family.decoder}.{name}" for name in (family.layers, family.embedding))
    for path in (family.decoder, family.head, *inner):
        if find(model, path) is None:
            raise UserError(
                f"models of type '{model_type}' have a layout that llmpq does not know "
                f"(no '{path}'); known: LLaMA-like, {', '.join(sorted(FAMILIES))}"
            )
    return family


def find(module: nn.Module, path: str) -> nn.Module | None:
    """The sub-module at a dotted path, or None."""
    found: nn.Module | None = module
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return None
    return found


def replace(module: nn.Module, path: str, new: nn.Module | None) -> None:
    """Sets the sub-module at a dotted path."""
    parent, _, name = path.rpartition(".")
    owner = find(module, parent) if parent else module
    assert owner is not None, path
    setattr(owner, name, new)
