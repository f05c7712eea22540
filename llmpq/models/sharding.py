"""How equal devices share every layer of a stage (tensor parallelism, as in Megatron-LM).

Each device (a shard) holds whole attention heads and an equal part of the feed-forward network's
inner values: q, k, v, gate and up are cut by their outputs, o and down by their inputs, and what
these two give is summed over the shards. Where there are fewer key-value heads than shards, several
shards hold the same one. Embedding and head are cut by the vocabulary; norms, learned positions and
what projects the embedding are on every shard. The cuts are those that `ModelSpec.shard` counts.

Every shard must make the same calls in the same order, with the same states.
Not covered: families whose attention is not listed here, experts, sequence parallelism.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from llmpq.errors import UserError
from llmpq.families import CUTS, TESTED, family_for
from llmpq.model_lookup import spec_from_config
from llmpq.model_spec import ModelSpec, shard_faults
from llmpq.quant import INPUTS, OUTPUTS, PlainLinear, QuantizedLinear, TensorPart

NUM_HEADS = "num_heads"  # what modules call their heads, where they keep the number
HEADS_PER_KEY = "num_key_value_groups"  # query heads that share a key-value head


@dataclass(frozen=True)
class Shard:
    """Device `index` of the `count` that share a stage."""

    index: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """The one that adds what is to be added once."""
        return self.index == 0


ALONE = Shard()


class ShardGroup(Protocol):
    """Connects the shards of a stage. All must call it in the same order."""

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of everyone's tensors, in place: the same bits on every shard."""

    def broadcast(self, tensor: Tensor) -> None:
        """The first shard's values into everyone's tensor."""


class Sharding:
    """How one shard of a model cuts its tensors; `Shard()` cuts nothing.

    Raises `UserError` where the model cannot be cut so.
    """

    def __init__(self, config: Any, shard: Shard) -> None:
        self.shard = shard
        self._spec = None if shard.count == 1 else _checked_spec(config, shard.count)

    def part(self, linear: str, out_features: int, in_features: int) -> TensorPart | None:
        """The part that this shard holds of a layer's linear, by its name inside the layer."""
        if self._spec is None:
            return None
        cut = CUTS[linear.rpartition(".")[2]]
        if cut == "in":
            return self._equal(INPUTS, in_features, self.shard.count)
        heads = self._spec.num_kv_heads if cut == "kv" else self.shard.count
        return self._equal(OUTPUTS, out_features, min(heads, self.shard.count))

    def vocabulary(self, size: int) -> TensorPart | None:
        """The tokens whose rows this shard holds of embedding and head; the last may hold fewer."""
        if self._spec is None:
            return None
        step = -(-size // self.shard.count)
        start = min(self.shard.index * step, size)
        return TensorPart(OUTPUTS, start, min(start + step, size), size)

    def tell_heads(self, layer: nn.Module) -> None:
        """Tells the attention of a layer how many heads it has left."""
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
        """One of `num_parts` equal parts; neighbouring shards share one where they are more."""
        step = size // num_parts
        start = self.shard.index * num_parts // self.shard.count * step
        return TensorPart(dim, start, start + step, size)


def sum_outputs(linear: PlainLinear | QuantizedLinear, group: ShardGroup) -> None:
    """Makes a linear cut by its inputs give the sum over all shards."""
    linear.register_forward_hook(lambda module, inputs, output: group.all_reduce(output))


def embed_part(
    embedding: nn.Module, part: TensorPart, token_ids: Tensor, group: ShardGroup
) -> Tensor:
    """The first shard's `[B, S]` tokens to `[B, S, H]`, each from the shard that holds its row."""
    group.broadcast(token_ids)
    rows = token_ids - part.start
    missing = (rows < 0) | (rows >= part.size)
    hidden: Tensor = embedding(rows.masked_fill(missing, 0))
    return group.all_reduce(hidden.masked_fill_(missing[..., None], 0))


def join_logits(logits: Tensor, part: TensorPart, group: ShardGroup) -> Tensor:
    """`[..., part of V]` from every shard to `[..., V]`."""
    whole = logits.new_zeros(*logits.shape[:-1], part.whole)
    whole[..., part.start : part.stop] = logits
    return group.all_reduce(whole)


def _checked_spec(config: Any, count: int) -> ModelSpec:
    kind = config.model_type
    if kind not in TESTED:
        raise UserError(
            f"how {count} devices share the layers of '{kind}' models is not known; known: "
            f"{', '.join(sorted(TESTED))}; use stages of one device"
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
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Leaves a layer its own heads' part of the arguments that are made for all heads.

    Such are BLOOM's slopes, `[B * heads, 1, T]`, which every layer is handed.
    """
    batch = args[0].shape[0]
    own = {
        name: kwargs[name].unflatten(0, (batch, shard.count, -1))[:, shard.index].flatten(0, 1)
        for name in names
        if name in kwargs
    }
    return args, kwargs | own
