"""The shape of a decoder model: the sizes that planning needs.

`ModelSpec` holds the linear operators of a layer (which are quantized), the other parameters, the
embedding, the head and the cache's width. `ModelSpec.shard` gives the sizes on one of several
devices that share every layer (tensor parallelism, cut as in Megatron-LM, arXiv 1909.08053).
`llmpq.model_lookup` reads a spec from a configuration, by the rows of `llmpq.families`.

A layer may hold routed experts beside its other matrices (`Experts`). A model may have layers of
several kinds (`LayerKind`): `kind_specs` holds a spec for each of them, of a model that has layers
of this kind alone, so that whatever prices one layer needs not know of others. Layers that differ
in their window of attention are of several kinds; `ModelSpec.within` joins those that do not differ
on texts that are no longer than that.

Not covered: encoders, models of text and images, layers that keep other state than keys and values.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, model_validator

from llmpq.artifact import Strict
from llmpq.errors import UserError
from llmpq.families import CUTS, SHARED
from llmpq.precision import layer_precision

ASSETS = Path(__file__).parent / "assets"

ALL_HEADS = "as many key-value heads"  # in the table of activations: no grouped heads


class LinearShape(Strict):
    """A weight matrix `[out_features, in_features]` of a layer."""

    name: str
    out_features: int = Field(gt=0)
    in_features: int = Field(gt=0)


class Experts(Strict):
    """The routed experts of a layer: `count` alike, of which each token uses `per_token`.

    `linears` are the matrices of one expert, `other_params` its biases. What all tokens use
    (shared experts, the router) is part of the layer itself.
    """

    count: int = Field(gt=0)
    per_token: int = Field(gt=0)
    linears: tuple[LinearShape, ...]
    other_params: int = Field(default=0, ge=0)

    @property
    def params(self) -> int:
        """Parameters of all experts of a layer."""
        each = sum(op.out_features * op.in_features for op in self.linears)
        return self.count * (each + self.other_params)


class LayerKind(Strict):
    """The sizes of one kind of layer, as `ModelSpec` has them; `name` is for readers."""

    name: str
    linears: tuple[LinearShape, ...]
    layer_other_params: int = Field(ge=0)
    ffn_size: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    kv_values: int | None = None
    window: int | None = Field(default=None, gt=0)
    experts: Experts | None = None

    def is_bound(self, tokens: int) -> bool:
        """Whether the window hides something of a text of so many tokens.

        The last one is chosen, but never computed with.
        """
        return self.window is not None and tokens > self.window + 1


def experts_in(model_key: str) -> tuple[int, int] | None:
    """The experts of a layer, and those of a token, as `ModelSpec.model_key` names them."""
    found = re.search(r"-e(\d+)x\d+k(\d+)$", model_key)
    return (int(found[1]), int(found[2])) if found else None


def window_in(model_key: str) -> int | None:
    """The most tokens that a layer attends to, as `ModelSpec.model_key` names them."""
    found = re.search(r"-w(\d+)(-e|$)", model_key)
    return int(found[1]) if found else None


class HeldMatrix(NamedTuple):
    """A matrix that a layer holds `number` times at a precision; `op.name` is its own."""

    op: LinearShape
    precision: str
    number: int
    of_experts: bool


class AllocationSnapshot(Strict):
    """The memory that a stage has allocated at one time, beside weights and cache.

    `num_bytes` maps products of sizes ("requests*tokens*hidden") to a factor in bytes. `op` is the
    linear that runs at that time, whose workspace is added; empty where none runs. `later` tells
    whether this occurs only after the stage's first layer. `kind` is that of the layer that runs,
    by its place among `ModelSpec.kinds`; None where it may be any, or where none runs.
    """

    op: str = ""
    biased: bool = False
    later: bool = False
    kind: int | None = None
    num_bytes: dict[str, float]


class Activations(Strict):
    """The snapshots of each phase that may be its peak.

    Those named `_first` occur only in a stage that embeds tokens, `_last` in one with the head.
    """

    prefill: tuple[AllocationSnapshot, ...]
    decode: tuple[AllocationSnapshot, ...]
    prefill_first: tuple[AllocationSnapshot, ...]
    decode_first: tuple[AllocationSnapshot, ...]
    prefill_last: tuple[AllocationSnapshot, ...]
    decode_last: tuple[AllocationSnapshot, ...]

    def of_kinds(self, places: Sequence[int], several: bool) -> "Activations":
        """The same where each kind of layers has another place; of one kind, where not `several`.

        `places` is by the place that a kind has now.
        """

        def moved(snapshot: AllocationSnapshot) -> AllocationSnapshot:
            kind = None if snapshot.kind is None or not several else places[snapshot.kind]
            return snapshot.model_copy(update={"kind": kind})

        def different(snapshots: Iterable[AllocationSnapshot]) -> tuple[AllocationSnapshot, ...]:
            return tuple({one.model_dump_json(): one for one in snapshots}.values())

        return Activations(**{name: different(map(moved, some)) for name, some in self})


class ModelSpec(Strict):
    """Sizes of one decoder-only model. Counts are numbers of parameters, not bytes."""

    name: str
    model_type: str
    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    ffn_size: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    max_positions: int = Field(gt=0)
    linears: tuple[LinearShape, ...]
    layer_other_params: int = Field(ge=0)  # norms and biases of one layer
    embedding_params: int = Field(ge=0)  # token and position embeddings and their norm
    head_params: int = Field(ge=0)  # the output matrix, also where it is tied to the embedding
    final_params: int = Field(ge=0)  # the norm after the last layer
    tied: bool
    eager_attention: bool = False  # attention scores are held in memory, [batch, heads, s, s]
    kv_values: int | None = Field(
        default=None, gt=0
    )  # of a token in a layer's cache, where not all heads
    window: int | None = Field(default=None, gt=0)  # the most tokens that a layer attends to
    experts: Experts | None = None
    kinds: tuple[LayerKind, ...] = ()  # where layers differ; the sizes above are of the first
    layer_kinds: tuple[int, ...] = ()  # of every layer, its place among `kinds`
    activations: Activations | None = None  # counted on this model; None: those of its family
    guessed: bool = False
    has_other_parts: bool = False  # beside the language model, for images; they are not served

    @property
    def model_key(self) -> str:
        """The name of the layer shape; profiles of equal keys are interchangeable."""
        extras = f"-c{self.kv_values}" if self.kv_values else ""
        extras += f"-w{self.window}" if self.window else ""
        if self.experts is not None:
            width = self.experts.linears[0].out_features
            extras += f"-e{self.experts.count}x{width}k{self.experts.per_token}"
        return (
            f"{self.model_type}-h{self.hidden_size}-f{self.ffn_size}-a{self.num_heads}"
            f"-kv{self.num_kv_heads}-d{self.head_dim}-v{self.vocab_size}{extras}"
        )

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values that one token leaves in the cache of one layer."""
        return self.kv_values or 2 * self.num_kv_heads * self.head_dim

    @property
    def layer_params(self) -> int:
        """Parameters of one decoder layer."""
        weights = sum(op.out_features * op.in_features for op in self.linears)
        of_experts = self.experts.params if self.experts else 0
        return weights + self.layer_other_params + of_experts

    @cached_property
    def kind_specs(self) -> tuple["ModelSpec", ...]:
        """For each kind of layer, the spec of a model that has layers of this kind alone."""
        if not self.kinds:
            return (self,)
        names = set(LayerKind.model_fields) - {"name"}
        alone = {"kinds": (), "layer_kinds": ()}
        return tuple(
            self.model_copy(update={name: getattr(kind, name) for name in names} | alone)
            for kind in self.kinds
        )

    def model_copy(
        self, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> "ModelSpec":
        """A copy; `kind_specs`, which pydantic would copy as they were, are those of the copy."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("kind_specs", None)
        return copied

    @property
    def kind_of_layers(self) -> tuple[int, ...]:
        """The place of every layer's spec among `kind_specs`."""
        return self.layer_kinds or (0,) * self.num_layers

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of every layer the most tokens that it attends to; None where there is no limit."""
        return tuple(self.kind_specs[kind].window for kind in self.kind_of_layers)

    def within(self, tokens: int) -> "ModelSpec":
        """The model for texts of up to so many tokens: kinds that do not differ on them are one.

        Of several windows that hide nothing the widest stays, so that its profile is found.
        """
        wide = {"name": "", "window": None}
        alike = [k if k.is_bound(tokens) else k.model_copy(update=wide) for k in self.kinds]
        known = list(dict.fromkeys(alike))
        if len(known) == len(self.kinds):
            return self
        places = [known.index(kind) for kind in alike]
        kinds = tuple(
            max(
                (kind for kind, own in zip(self.kinds, places, strict=True) if own == place),
                key=lambda kind: kind.window or math.inf,
            )
            for place in range(len(known))
        )
        first = {name: value for name, value in kinds[0] if name != "name"}
        several = len(kinds) > 1
        return self.model_copy(
            update={
                **first,
                "kinds": kinds if several else (),
                "layer_kinds": tuple(places[k] for k in self.layer_kinds) if several else (),
                "activations": self.activations and self.activations.of_kinds(places, several),
            }
        )

    def without_windows(self) -> "ModelSpec":
        """The model as if all layers attended to all tokens."""
        wide = {"window": None}
        kinds = tuple(kind.model_copy(update=wide) for kind in self.kinds)
        return self.model_copy(update=wide | {"kinds": kinds}).within(0)

    def held(self, precision: str) -> Iterator[HeldMatrix]:
        """The matrices of a layer at a precision of plans; of a model with one kind of layer."""
        rest, experts = layer_precision(precision)
        for op in self.linears:
            yield HeldMatrix(op, rest, 1, False)
        if self.experts is not None:
            for op in self.experts.linears:
                yield HeldMatrix(op, experts, self.experts.count, True)

    @model_validator(mode="after")
    def _check_kinds(self) -> "ModelSpec":
        if bool(self.kinds) != bool(self.layer_kinds):
            raise ValueError("'kinds' and 'layer_kinds' belong together")
        if self.kinds and len(self.layer_kinds) != self.num_layers:
            raise ValueError(f"'layer_kinds' names {len(self.layer_kinds)} layers")
        if self.kinds and not set(self.layer_kinds) <= set(range(len(self.kinds))):
            raise ValueError("'layer_kinds' names a kind that 'kinds' does not have")
        return self

    def shard(self, degree: int) -> "ModelSpec":
        """The sizes on one of `degree` devices that share every layer.

        Embedding and head are cut by the vocabulary; norms, biases and positions are on each
        device. Raises `UserError` where the model cannot be cut so.
        """
        if degree == 1:
            return self
        if faults := shard_faults(self, degree):
            raise UserError(f"{self.name}: {'; '.join(faults)}")
        # Every family's token embedding has as many parameters as its head.
        token_params = min(self.head_params, self.embedding_params)
        other_params = self.embedding_params - token_params
        layer = {
            "ffn_size": self.ffn_size // degree,
            "num_heads": self.num_heads // degree,
            "num_kv_heads": max(1, self.num_kv_heads // degree),
            "linears": tuple(_cut(self, op, degree) for op in self.linears),
        }
        return self.model_copy(
            update={
                **layer,
                "kinds": tuple(kind.model_copy(update=layer) for kind in self.kinds),
                "vocab_size": _part(self.vocab_size, degree),
                "embedding_params": other_params + _part(token_params, degree),
                "head_params": _part(self.head_params, degree),
            }
        )


def shard_faults(spec: ModelSpec, degree: int) -> list[str]:
    """The reasons why `degree` devices cannot share a layer of this model, if any."""
    if spec.model_type not in SHARED:
        return [f"how devices share the layers of '{spec.model_type}' models is not known"]
    if spec.experts is not None or spec.without_windows().kinds:
        return ["devices cannot share layers with experts, or layers of several kinds, yet"]
    faults = []
    for what, size in (("attention heads", spec.num_heads), ("feed-forward width", spec.ffn_size)):
        if size % degree:
            faults.append(f"{what} {size} cannot be cut into {degree} equal parts")
    heads = spec.num_kv_heads
    if heads % degree and degree % heads:
        faults.append(
            f"{heads} key-value heads can be neither cut nor repeated for {degree} devices"
        )
    for op in spec.linears:
        if op.name not in CUTS:
            faults.append(f"how to cut the matrix '{op.name}' is not known")
        elif _cut_size(op) % _num_parts(spec, op, degree):
            faults.append(f"{op.name} ({_cut_size(op)}) cannot be cut into {degree} equal parts")
    return faults


def tensor_parallel_degrees(spec: ModelSpec, most: int) -> tuple[int, ...]:
    """1, and the powers of two up to `most` devices that can share a layer of this model."""
    powers = (2**exponent for exponent in range(1, most.bit_length()))
    return (1, *(degree for degree in powers if not shard_faults(spec, degree)))


def _part(size: int, degree: int) -> int:
    """The largest of `degree` nearly equal parts."""
    return -(-size // degree)


def _cut_size(op: LinearShape) -> int:
    return op.in_features if CUTS[op.name] == "in" else op.out_features


def _num_parts(spec: ModelSpec, op: LinearShape, degree: int) -> int:
    """The number of different parts of a matrix."""
    return min(degree, spec.num_kv_heads) if CUTS[op.name] == "kv" else degree


def _cut(spec: ModelSpec, op: LinearShape, degree: int) -> LinearShape:
    side = "in_features" if CUTS[op.name] == "in" else "out_features"
    return op.model_copy(update={side: _cut_size(op) // _num_parts(spec, op, degree)})
