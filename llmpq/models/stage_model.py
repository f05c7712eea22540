"""Some consecutive layers of a decoder, as a module that runs alone.

`StageModel` is transformers' own causal language model, built whole on the meta device (no memory).
The layers of other stages stay in the list, emptied: they return their input (`passing`), so that
an index of a layer means the same as in the whole model, and computations before the first layer
act once. Its linears are llmpq's quantized ones. A loader fills `parameters_to_load` with weights.

A stage may be one of several shards that share every layer (`sharding`): then `embed`, `run` and
`head` are called on all of them alike, and return the same on each.

Shapes: B requests, S tokens, H hidden size, V vocabulary.
Not covered: layers that keep other state than keys and values, encoders.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    __version__,
)

from llmpq.artifact import show_value
from llmpq.errors import UserError, one_line
from llmpq.model_lookup import read_config
from llmpq.models.adapt import adapt, mark_transposed
from llmpq.models.attention import implementation_for
from llmpq.models.buffers import compute_buffers
from llmpq.models.experts import MakeLinear, PackedExperts, pack_experts, routers
from llmpq.models.family import family_of, find, precision_of, replace
from llmpq.models.lanes import StageCache
from llmpq.models.linears import LinearMaker, is_plain
from llmpq.models.passing import Passing, gives_tuples, pass_over
from llmpq.models.raw_tensors import RawTensor, float32_names, held_bytes, held_part, raw_shapes
from llmpq.models.rope import decide_by_row
from llmpq.models.sharding import (
    ALONE,
    Shard,
    ShardGroup,
    Sharding,
    embed_part,
    join_logits,
    sum_outputs,
)
from llmpq.quant import INPUTS, PlainLinear, QuantizedLinear
from llmpq.windows import configured_windows

# One precision for a layer, or one for each linear by its name inside ("self_attn.q_proj").
LayerPrecision = str | Callable[[str], str]

# Settings that name code: the model's own, or a repository of kernels.
NAMES_OF_CODE = ("auto_map", "attn_implementation", "experts_implementation")


@dataclass(frozen=True)
class LayerRange:
    """Layers `first` up to but not including `end`, of `total`."""

    first: int
    end: int
    total: int

    @property
    def count(self) -> int:
        """The number of layers in the range."""
        return self.end - self.first

    @property
    def is_first(self) -> bool:
        """Whether the range holds the first layer, so that its stage embeds tokens."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Whether the range holds the last layer, so that its stage computes logits."""
        return self.end == self.total


class StageModel(nn.Module):
    """Layers of a model at given precisions; `dtype` is that of activations and 16-bit weights.

    `shard` is this device among those that share the layers; `group` connects them, and is needed
    for computing where there are several. Raises `UserError` where the model cannot be cut so, or
    where this device cannot serve a precision.
    """

    def __init__(
        self,
        config: Any,
        layers: LayerRange,
        precisions: Sequence[LayerPrecision],
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard = ALONE,
        group: ShardGroup | None = None,
    ) -> None:
        super().__init__()
        assert len(precisions) == layers.count
        assert layers.total == config.num_hidden_layers
        assert group is None or (group.rank, group.size) == (shard.index, shard.count)
        self.layers, self.dtype, self.device = layers, dtype, device
        self.config = copy.deepcopy(config)
        self.config.use_cache = True
        self.shard, self.group = shard, group
        self._sharding = Sharding(self.config, shard)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                self.config,
                trust_remote_code=False,
                dtype=dtype,
                attn_implementation=_attention_of(self.config),
            ).eval()
        self.family = family_of(model, self.config.model_type)
        self.model = model
        transposed = adapt(model)
        pass_over(model, self.family, layers.is_first, layers.is_last)
        self._passing = Passing(
            self.all_layers, layers.first, layers.end, _layers_give_tuples(self)
        )
        compute_buffers(model, device)
        self._row_ropes = decide_by_row(model)
        self._cut_embedding()
        self._quantize(precisions)
        mark_transposed(model, transposed)
        decoder = find(model, self.family.decoder)
        assert decoder is not None
        self._decoder = [decoder]  # in a list: already registered as part of `model`
        model.requires_grad_(False)

    def parameters_to_load(self) -> Iterator[RawTensor]:
        """Yields every tensor that a loader must fill, with stored buffers; tied ones once."""
        seen: set[tuple[int, str]] = set()
        float32 = float32_names(self.model)
        for prefix, module in self.model.named_modules():
            for name, shape in raw_shapes(module).items():
                if (id(module), name) not in seen:
                    seen.add((id(module), name))
                    stored = self._checkpoint_name(f"{prefix}.{name}")
                    is_float32 = float32 is not None and bool(float32.search(stored))
                    yield RawTensor(stored, module, name, shape, is_float32)

    def linears(self) -> dict[str, PlainLinear | QuantizedLinear]:
        """The linears of the layers, by the checkpoint's name of their weight."""
        head = find(self.model, self.family.head)
        return {
            raw.name: raw.module
            for raw in self.parameters_to_load()
            if isinstance(raw.module, PlainLinear | QuantizedLinear)
            and raw.attribute == "weight"
            and raw.module is not head
        }

    @property
    def all_layers(self) -> nn.ModuleList:
        """The layers of the whole model; those of other stages are empty."""
        layers = find(self.model, f"{self.family.decoder}.{self.family.layers}")
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def own_layers(self) -> list[nn.Module]:
        """The layers of this stage."""
        return list(self.all_layers)[self.layers.first : self.layers.end]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer of this stage the most tokens that it attends to; None: all of them."""
        return configured_windows(self.config)[self.layers.first : self.layers.end]

    @property
    def looks_at_lengths(self) -> bool:
        """Whether positions depend on the length of a row's text, which `run` then needs."""
        return bool(self._row_ropes)

    @property
    def embedding_name(self) -> str:
        """The checkpoint's name of the token embedding, which a tied head shares."""
        return f"{self.family.decoder}.{self.family.embedding}.weight"

    @property
    def head_name(self) -> str:
        """The checkpoint's name of the head's matrix."""
        return f"{self.family.head_in_files}.weight"

    @property
    def head_is_tied(self) -> bool:
        """Whether config.json says that the head uses the embedding's matrix."""
        return bool(self.config.tie_word_embeddings)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeds ids `[B, S]` to `[B, S, H]` (first stage); shards use the first one's ids."""
        embedding = find(self._decoder[0], self.family.embedding)
        assert embedding is not None
        part = held_part(embedding)
        if part is None:
            return embedding(token_ids)
        assert self.group is not None
        return embed_part(embedding, part, token_ids, self.group)

    def run(
        self,
        hidden: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        cache: StageCache | None = None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs `[B, S, H]` through this stage's layers (and the last stage's final norm).

        Rows are padded on the right, where attention does not look. `position_ids` `[B, S]` are
        positions in each row's text; None counts from 0. `lengths` `[B]` is the number of tokens of
        each row's text so far, without padding; None means up to the last position.
        """
        for rope in self._row_ropes:
            rope.lengths = lengths
        with self._passing.given(hidden) as passing:
            output = self._decoder[0](
                inputs_embeds=hidden,
                position_ids=position_ids,
                past_key_values=cache and cache.from_layer(self.layers.first),
                use_cache=cache is not None,
            )
            return output.last_hidden_state if passing.sent is None else passing.sent

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits `[..., V]` of states `[..., H]` (last stage only)."""
        head = find(self.model, self.family.head)
        assert head is not None
        logits, part = head(hidden), held_part(head)
        if part is not None:
            assert self.group is not None
            logits = join_logits(logits, part, self.group)
        cap = getattr(self.config, self.family.logit_cap, None)
        if cap:
            logits = torch.tanh(logits / cap) * cap
        logits = logits * (getattr(self.config, self.family.logit_factor, None) or 1)
        return logits / (getattr(self.config, self.family.logit_divisor, None) or 1)

    def keep_experts_one_by_one(self) -> None:
        """Lets every linear be called by itself, so that hooks on linears see all inputs."""
        for module in self.model.modules():
            if isinstance(module, PackedExperts):
                module.keep_one_by_one()

    def weight_bytes(self) -> int:
        """Bytes of all weights, packed ones as packed; a shared matrix counts once."""
        seen: set[int] = set()
        return sum(held_bytes(module, seen) for module in self.model.modules())

    def _quantize(self, precisions: Sequence[LayerPrecision]) -> None:
        """Replaces the linears of every layer by those of its precision, experts among them."""
        make = LinearMaker(self.dtype, self.device, leads=self.shard.leads)
        for layer, precision in zip(self.own_layers, precisions, strict=True):
            kept = routers(layer)
            pack_experts(layer, _expert_maker(make, precision))
            for name, linear in list(layer.named_modules()):
                if is_plain(linear) and name not in kept:
                    part = self._sharding.part(name, linear.out_features, linear.in_features)
                    own = _precision_of(precision, name)
                    self.put(layer, name, make.like(linear, own, part))
            self._sharding.tell_heads(layer)
        head = find(self.model, self.family.head)
        if isinstance(head, nn.Linear):
            part = self._sharding.vocabulary(head.out_features)
            replace(self.model, self.family.head, make.like(head, "16", part))

    def put(self, within: nn.Module, path: str, linear: PlainLinear | QuantizedLinear) -> None:
        """Sets a linear at a dotted path; one that is cut by inputs returns the shards' sum."""
        replace(within, path, linear)
        if self.group is not None and linear.part is not None and linear.part.dim == INPUTS:
            sum_outputs(linear, self.group)

    def _cut_embedding(self) -> None:
        """Cuts the token embedding to the rows that this shard holds."""
        embedding = find(self.model, f"{self.family.decoder}.{self.family.embedding}")
        if not isinstance(embedding, nn.Embedding):
            return
        part = self._sharding.vocabulary(embedding.num_embeddings)
        if part is not None:
            embedding.weight = nn.Parameter(part.of(embedding.weight), requires_grad=False)
            embedding.num_embeddings, embedding.padding_idx = part.size, None
            embedding.part = part  # type: ignore[assignment]

    def _checkpoint_name(self, name: str) -> str:
        return self.head_name if name == f"{self.family.head}.weight" else name


def _precision_of(precision: LayerPrecision, linear: str) -> str:
    """The precision of a linear of a layer, by its name inside."""
    return precision_of(precision, linear) if isinstance(precision, str) else precision(linear)


def _expert_maker(make: LinearMaker, precision: LayerPrecision) -> MakeLinear:
    """Makes the linears of a layer's experts at the layer's precision."""
    return lambda name, inputs, outputs, bias: make(
        _precision_of(precision, name), inputs, outputs, bias, of_experts=True
    )


def load_config(model: Path) -> Any:
    """transformers' configuration of a model directory or `config.json`; runs no code of it."""
    path = model / "config.json" if model.is_dir() else model
    data = _without_code(read_config(path))
    model_type = data.pop("model_type", None)
    data.pop("quantization_config", None)  # the loader reads how files hold weights
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        kind = show_value(model_type)
        raise UserError(f"{path}: transformers {__version__} has no models of type {kind}")
    try:
        return AutoConfig.for_model(model_type, **data).get_text_config(decoder=True)
    except Exception as error:  # strict configurations raise classes of their own
        reason = one_line(error)
        raise UserError(f"{path}: transformers cannot use this configuration: {reason}") from None


def _without_code(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings without those that name code: the model's own, or kernels of the hub."""
    return {
        key: _without_code(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key.lstrip("_").removesuffix("_internal") not in NAMES_OF_CODE
    }


def _attention_of(config: Any) -> str:
    """The attention that this model's class uses; a model without a class is refused later."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if model_class is None else implementation_for(model_class)


def _layers_give_tuples(stage: StageModel) -> bool:
    """Whether a layer returns a tuple, which emptied layers must do too."""
    if stage.layers.is_first and stage.layers.is_last:
        return False
    decoder = find(stage.model, stage.family.decoder)
    assert decoder is not None
    embedding = find(decoder, stage.family.embedding)
    width = getattr(embedding, "embedding_dim", stage.config.hidden_size)
    return gives_tuples(decoder, stage.all_layers[0], width, stage.dtype)
