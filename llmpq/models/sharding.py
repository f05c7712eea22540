"""Cuts the layers of a stage for equal devices (tensor parallelism, as in Megatron-LM).

Each device (a shard) holds whole attention heads and an equal part of the feed-forward network's
inner values: q, k, v, gate and up are cut by their outputs, o and down by their inputs, and the
outputs of these two are summed over the shards. Where there are fewer key-value heads than shards,
several shards hold the same one. Embedding and head are cut by the vocabulary; norms, learned
positions and projections of the embedding are on every shard. `ModelSpec.shard` counts these cuts.

Every shard must make the same calls in the same order, with the same states.
Not covered: families whose attention is not listed here, experts, sequence parallelism.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from llmpq.errors import UserError
from llmpq.families import CUTS, SHARED, family_for
from llmpq.model_lookup import spec_from_config
from llmpq.model_spec import ModelSpec, shard_faults
from llmpq.quant import INPUTS, OUTPUTS, PlainLinear, QuantizedLinear, TensorPart

NUM_HEADS = "num_heads"  # the attribute of modules that keep the number of heads
HEADS_PER_KEY = "num_key_value_groups"  # query heads that share a key-value head


@dataclass(frozen=True)
class Shard:
    """Device `index` of the `count` that share a stage."""

    index: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this shard adds the terms that are added once, and sends and receives."""
        return self.index == 0


ALONE = Shard()


class ShardGroup(Protocol):
    """Connects the shards of a stage. All must call it in the same order."""

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of everyone's tensors, in place: the same bits on every shard."""

    def broadcast(self, tensor: Tensor) -> None:
        """Copies the first shard's values into everyone's tensor."""


class Sharding:
    """Cuts the tensors of one shard of a model; `Shard()` cuts nothing.

    Raises `UserError` where the model cannot be cut so.
    """

    def __init__(self, config: Any, shard: Shard) -> None:
        self.shard = shard
        self._spec = None if shard.count == 1 else _checked_spec(config, shard.count)

    def part(self, linear: str, out_features: int, in_features: int) -> TensorPart | None:
        """The part of a layer's linear that this shard holds, by its name inside the layer."""
        if self._spec is None:
            return None
        cut = CUTS[linear.rpartition(".")[2]]
        if cut == "in":
            return self._equal(INPUTS, in_features, self.shard.count)
        heads = self._spec.num_kv_heads if cut == "kv" else self.shard.count
        return self._equal(OUTPUTS, out_features, min(heads, self.shard.count))

    def vocabulary(self, size: int) -> TensorPart | None:
        """The rows of embedding and head that this shard holds; the last may hold fewer."""
        if self._spec is None:
            return None
        step = -(-size // self.shard.count)
        start = min(self.shard.index * step, size)
        return TensorPart(OUTPUTS, start, min(start + step, size), size)

    def tell_heads(self, layer: nn.Module) -> None:
        """Sets the number of this shard's heads in the attention of a layer."""
        if self._spec is None:
            return
        own = self._spec.shard(self.shard.count)
        for module in layer.modules():
            if hasattr(module, HEADS_PER_KEY):
                setattr(module, HEADS_PER_KEY, own.num_heads // own.num_kv_heads)
            if hasattr(module, NUM_HEADS):
                setattr(module, NUM_HEADS, own.num_heads)
        names = family_for(self._spec.model_type).per_head
        if names:
            own_heads = partial(_own_heads, self.shard, names)
            layer.register_forward_pre_hook(own_heads, with_kwargs=True)

    def _equal(self, dim: int, size: int, num_parts: int) -> TensorPart:
        """One of `num_parts` equal parts; where there are more shards, neighbours share one."""
        step = size // num_parts
        start = self.shard.index * num_parts // self.shard.count * step
        return TensorPart(dim, start, start + step, size)


def sum_outputs(linear: PlainLinear | QuantizedLinear, group: ShardGroup) -> None:
    """Makes a linear that is cut by its inputs return the sum over all shards."""
    linear.register_forward_hook(lambda module, inputs, output: group.all_reduce(output))


def embed_part(
    embedding: nn.Module, part: TensorPart, token_ids: Tensor, group: ShardGroup
) -> Tensor:
    """Embeds the first shard's tokens `[B, S]` to `[B, S, H]`, by the shards with their rows."""
    group.broadcast(token_ids)
    rows = token_ids - part.start
    missing = (rows < 0) | (rows >= part.size)
    hidden: Tensor = embedding(rows.masked_fill(missing, 0))
    return group.all_reduce(hidden.masked_fill_(missing[..., None], 0))


def join_logits(logits: Tensor, part: TensorPart, group: ShardGroup) -> Tensor:
    """Joins the logits `[..., part of V]` of all shards to `[..., V]`."""
    whole = logits.new_zeros(*logits.shape[:-1], part.whole)
    whole[..., part.start : part.stop] = logits
    return group.all_reduce(whole)


def _checked_spec(config: Any, count: int) -> ModelSpec:
    kind = config.model_type
    if kind not in SHARED:
        raise UserError(
            f"llmpq cannot share the layers of '{kind}' models among {count} devices; supported: "
            f"{', '.join(sorted(SHARED))}; use stages of one device"
        )
    spec = spec_from_config(config.to_dict(), name=kind)
    if faults := shard_faults(spec, count):
        raise UserError(f"{count} devices cannot share a layer: {'; '.join(faults)}")
    return spec


def _own_heads(
    shard: Shard,
    names: tuple[str, ...],
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Cuts arguments of a layer that have values for all heads to those of this shard's heads.

    An example are BLOOM's slopes, `[B * heads, 1, T]`, an argument of every layer.
    """
    batch = args[0].shape[0]
    own = {
        name: kwargs[name].unflatten(0, (batch, shard.count, -1))[:, shard.index].flatten(0, 1)
        for name in names
        if name in kwargs
    }
    return args, {**kwargs, **own}
