"""Rotary positions that depend on the length of a text ("longrope"), decided for each row.

transformers decides for a whole batch by its longest text, so that a request's tokens would depend
on its batch. Here the positions are encoded in both ways, and each row selects its own: the long
factors where its text is longer than `original_max_position_embeddings`.

"dynamic" positions change only beyond `max_position_embeddings`, which no request may exceed.
Shapes: B rows, S tokens, D rotated values of a head.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LONG = "longrope"


@dataclass
class RowRope:
    """The `forward` of a module of rotary positions; `lengths` is that of `StageModel.run`."""

    module: Any
    plain: Callable[..., tuple[Tensor, Tensor]]  # without a decision by length
    lengths: Tensor | None = None
    long: dict[str, Tensor] = field(default_factory=dict)  # frequencies, by the buffer's name

    def __call__(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """The cosines and sines, each `[B, S, D]`."""
        more = {} if layer_type is None else {"layer_type": layer_type}
        settings = _settings(self.module.config, layer_type)
        if settings.get("rope_type") != LONG:
            return self.plain(self.module, x, position_ids, **more)
        limit = settings["original_max_position_embeddings"]
        name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        short = getattr(self.module, name)
        if name not in self.long:
            init = ROPE_INIT_FUNCTIONS[LONG]
            self.long[name], _ = init(self.module.config, x.device, seq_len=limit + 1, **more)
        lengths = position_ids.amax(dim=-1) + 1 if self.lengths is None else self.lengths
        is_long = (lengths > limit).view(-1, 1, 1)
        near = self.plain(self.module, x, position_ids, **more)
        setattr(self.module, name, self.long[name])
        far = self.plain(self.module, x, position_ids, **more)
        setattr(self.module, name, short)
        return torch.where(is_long, far[0], near[0]), torch.where(is_long, far[1], near[1])


def decide_by_row(model: nn.Module) -> list[RowRope]:
    """Installs a `RowRope` wherever a model would decide for a whole batch."""
    ropes = []
    for module in model.modules():
        forward = type(module).forward
        plain = inspect.unwrap(forward)
        if plain is not forward and _changes(getattr(module, "rope_type", None)):
            module.forward = rope = RowRope(module, plain)  # type: ignore[assignment]
            ropes.append(rope)
    return ropes


def switches_at(config: Any) -> int | None:
    """The length beyond which a model encodes positions differently; None: there is none."""
    parameters = getattr(config, "rope_parameters", None) or {}
    some = [parameters, *(each for each in parameters.values() if isinstance(each, Mapping))]
    limits = [
        each.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        for each in some
        if each.get("rope_type") == LONG
    ]
    return min((limit for limit in limits if limit), default=None)


def _changes(kind: Any) -> bool:
    kinds = kind.values() if isinstance(kind, Mapping) else [kind]
    return any(isinstance(each, str) and (each == LONG or "dynamic" in each) for each in kinds)


def _settings(config: Any, layer_type: str | None) -> Mapping[str, Any]:
    parameters: Mapping[str, Any] = config.rope_parameters
    return parameters if layer_type is None else parameters[layer_type]
