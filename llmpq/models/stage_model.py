"""Some consecutive layers of a decoder, as a module that runs alone.

`StageModel` is transformers' own causal language model built with fewer layers on the meta device
(no memory), its parts at the other ends of the pipeline passed over. Its linears are llmpq's
quantised ones. It holds no weights until `parameters_to_load` have been filled by a loader.

A stage may be one shard of several that share every layer (`sharding`): then `embed`, `run` and
`head` are called on all of them alike, and give the same on each.

Shapes: B requests, S tokens, H hidden size, V vocabulary.
Not covered: layers that keep other state than keys and values, encoders.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import Cache

from llmpq.errors import UserError
from llmpq.models.attention import implementation_for
from llmpq.models.buffers import compute_buffers, stored_buffers
from llmpq.models.family import Family, family_of, find, replace
from llmpq.models.sharding import (
    ALONE,
    Shard,
    ShardGroup,
    Sharding,
    embed_part,
    join_logits,
    sum_outputs,
)
from llmpq.quant import (
    INPUTS,
    PlainLinear,
    QuantizedLinear,
    Rounding,
    TensorPart,
    make_linear,
    quantize,
)

# Factors that some families put on the embedded input (Granite, MiniCPM).
INPUT_SCALES = ("embedding_multiplier", "scale_emb", "embedding_scale")

# Of all linears of a layer, or of each by its name inside the layer ("self_attn.q_proj").
LayerPrecision = str | Callable[[str], str]


@dataclass(frozen=True)
class LayerRange:
    """Layers `first` up to but not including `end`, of `total`."""

    first: int
    end: int
    total: int

    @property
    def is_first(self) -> bool:
        """Embeds the tokens."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Computes the logits."""
        return self.end == self.total


@dataclass(frozen=True)
class RawTensor:
    """A tensor of the checkpoint and the place that wants it, or a part of it."""

    name: str  # in the whole model's checkpoint
    module: nn.Module
    attribute: str
    shape: tuple[int, ...]  # of the whole tensor

    def part(self, rounding: Rounding = quantize) -> TensorPart | None:
        """The part that the place must be given, if weights are rounded so; None: all of it."""
        if isinstance(self.module, PlainLinear | QuantizedLinear):
            return self.module.part_to_read(self.attribute, rounding)
        return None if self.is_buffer else _part_of(self.module)

    @property
    def is_buffer(self) -> bool:
        """Whether it is no weight, but a constant that transformers stores beside the weights."""
        return self.attribute in self.module._buffers


class _Nothing(nn.Module):
    """Stands for learned positions on a stage that does not add them."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        return next(tensors).new_zeros(())  # on the device of the others


class StageModel(nn.Module):
    """Layers of a model at given precisions; `dtype` is that of activations and 16-bit weights.

    `shard`: which of the devices that share the layers this is; `group` connects them, and is
    needed to compute where there are several. Raises `UserError` where the model cannot be cut so.
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
        assert len(precisions) == layers.end - layers.first
        assert group is None or (group.rank, group.size) == (shard.index, shard.count)
        self.layers, self.dtype, self.device = layers, dtype, device
        self.config = _stage_config(config, layers)
        self.shard, self.group = shard, group
        self._sharding = Sharding(self.config, shard)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                self.config, dtype=dtype, attn_implementation=_attention_of(self.config)
            ).eval()
        self.family = family_of(model, self.config.model_type)
        self.model = model
        compute_buffers(model, device)
        _pass_over(model, self.family, layers)
        self._cut_embedding()
        self._quantise(precisions)
        decoder = find(model, self.family.decoder)
        assert decoder is not None
        self._decoder = [decoder]  # in a list: already registered as part of `model`
        model.requires_grad_(False)

    def parameters_to_load(self) -> Iterator["RawTensor"]:
        """Every tensor that a loader must fill, stored buffers among them, tied ones once."""
        seen: set[tuple[int, str]] = set()
        for prefix, module in self.model.named_modules():
            for name, shape in _raw_shapes(module).items():
                if (id(module), name) not in seen:
                    seen.add((id(module), name))
                    yield RawTensor(self._checkpoint_name(f"{prefix}.{name}"), module, name, shape)

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
    def embedding_name(self) -> str:
        """The checkpoint's name of the token embedding, which a tied head shares."""
        return f"{self.family.decoder}.{self.family.embedding}.weight"

    @property
    def head_name(self) -> str:
        """The checkpoint's name of the head's matrix."""
        return f"{self.family.head_in_files}.weight"

    @property
    def head_is_tied(self) -> bool:
        """config.json says that the head uses the embedding's matrix."""
        return bool(self.config.tie_word_embeddings)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`[B, S]` token ids to `[B, S, H]` (first stage only); shards get the first one's ids."""
        embedding = find(self._decoder[0], self.family.embedding)
        assert embedding is not None
        part = _part_of(embedding)
        if part is None:
            return embedding(token_ids)
        assert self.group is not None
        return embed_part(embedding, part, token_ids, self.group)

    def run(
        self,
        hidden: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """`[B, S, H]` through this stage's layers (and the final norm on the last stage).

        Rows are padded on the right, where attention does not look. `position_ids` `[B, S]` are
        places in each row's text; None: from 0 on.
        """
        output = self._decoder[0](
            inputs_embeds=hidden,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., H]` to logits `[..., V]` (last stage only)."""
        head = find(self.model, self.family.head)
        assert head is not None
        logits, part = head(hidden), _part_of(head)
        if part is not None:
            assert self.group is not None
            logits = join_logits(logits, part, self.group)
        cap = getattr(self.config, "final_logit_softcapping", None)
        if cap:
            logits = torch.tanh(logits / cap) * cap
        logits = logits * (getattr(self.config, "logit_scale", None) or 1)
        return logits / (getattr(self.config, "logits_scaling", None) or 1)

    def weight_bytes(self) -> int:
        """Bytes of all weights held, packed ones as packed; a shared matrix counts once."""
        seen: set[int] = set()
        return sum(_held_bytes(module, seen) for module in self.model.modules())

    def _quantise(self, precisions: Sequence[LayerPrecision]) -> None:
        """Replaces the linears of every layer by ones that own their precision."""
        layers = find(self.model, f"{self.family.decoder}.{self.family.layers}")
        assert isinstance(layers, nn.ModuleList)
        for layer, precision in zip(layers, precisions, strict=True):
            linears = [(n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]
            for name, linear in linears:
                own = precision if isinstance(precision, str) else precision(name)
                part = self._sharding.part(name, linear.out_features, linear.in_features)
                self.put(layer, name, self._linear(linear, own, part))
            self._sharding.tell_heads(layer)
        head = find(self.model, self.family.head)
        if isinstance(head, nn.Linear):
            part = self._sharding.vocabulary(head.out_features)
            replace(self.model, self.family.head, self._linear(head, "16", part))

    def put(self, within: nn.Module, path: str, linear: PlainLinear | QuantizedLinear) -> None:
        """Puts a linear at a dotted path of a module; one cut by inputs gives the shards' sum."""
        replace(within, path, linear)
        if self.group is not None and linear.part is not None and linear.part.dim == INPUTS:
            sum_outputs(linear, self.group)

    def _linear(
        self, like: nn.Linear, precision: str, part: TensorPart | None
    ) -> PlainLinear | QuantizedLinear:
        shape = (like.out_features, like.in_features)
        out_features, in_features = part.of_shape(shape) if part else shape
        added_elsewhere = part is not None and part.dim == INPUTS and not self.shard.leads
        return make_linear(
            precision,
            in_features,
            out_features,
            bias=like.bias is not None and not added_elsewhere,
            dtype=self.dtype,
            device=self.device,
            part=part,
        )

    def _cut_embedding(self) -> None:
        """Leaves the token embedding the rows that this shard holds."""
        embedding = find(self.model, f"{self.family.decoder}.{self.family.embedding}")
        if not isinstance(embedding, nn.Embedding):
            return
        part = self._sharding.vocabulary(embedding.num_embeddings)
        if part is not None:
            embedding.weight = nn.Parameter(part.of(embedding.weight), requires_grad=False)
            embedding.num_embeddings, embedding.padding_idx = part.size, None
            embedding.part = part  # type: ignore[assignment]

    def _checkpoint_name(self, name: str) -> str:
        if name == f"{self.family.head}.weight":
            return self.head_name
        prefix = f"{self.family.decoder}.{self.family.layers}."
        if not name.startswith(prefix):
            return name
        index, rest = name.removeprefix(prefix).split(".", 1)
        return f"{prefix}{int(index) + self.layers.first}.{rest}"


def load_config(model: Path) -> Any:
    """transformers' configuration of a model directory or `config.json`; never runs its code."""
    path = model / "config.json" if model.is_dir() else model
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        model_type = data.pop("model_type")
        data.pop("quantization_config", None)  # how files hold weights is the loader's business
        config = AutoConfig.for_model(model_type, **data)
    except Exception as error:  # strict configurations raise classes of their own
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: transformers cannot use this configuration: {reason}") from None
    return config.get_text_config(decoder=True)


def _attention_of(config: Any) -> str:
    """The attention that this model's class looks up; one without a class is refused later."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if model_class is None else implementation_for(model_class)


def _stage_config(config: Any, layers: LayerRange) -> Any:
    """The configuration of a model that has just these layers."""
    staged = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers.total and name.startswith("layer"):
            setattr(staged, name, value[layers.first : layers.end])
    if not layers.is_first:
        for name in INPUT_SCALES:  # applied to whatever comes in: only the first stage may
            if hasattr(staged, name):
                setattr(staged, name, 1.0)
    staged.num_hidden_layers = layers.end - layers.first
    staged.use_cache = True
    return staged


def _pass_over(model: nn.Module, family: Family, layers: LayerRange) -> None:
    """Removes what other stages own."""
    if not layers.is_first:
        replace(model, f"{family.decoder}.{family.embedding}", None)
        for name in family.input:
            _replace_if_there(model, f"{family.decoder}.{name}", nn.Identity())
        for name in family.positions:
            _replace_if_there(model, f"{family.decoder}.{name}", _Nothing())
    if not layers.is_last:
        replace(model, family.head, None)
        for name in family.final:
            _replace_if_there(model, f"{family.decoder}.{name}", nn.Identity())


def _replace_if_there(model: nn.Module, path: str, new: nn.Module) -> None:
    if find(model, path) is not None:
        replace(model, path, new)


def _raw_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """What a loader must fill, in the shapes of the whole; a linear of llmpq's says so itself."""
    if isinstance(module, PlainLinear | QuantizedLinear):
        return module.raw_shapes
    part = _part_of(module)
    own = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    whole = {name: part.whole_shape(s) if part else s for name, s in own.items()}
    return whole | {name: tuple(b.shape) for name, b in stored_buffers(module).items()}


def _part_of(module: nn.Module) -> TensorPart | None:
    """The part of a matrix that a module holds; None: all."""
    part: TensorPart | None = getattr(module, "part", None)
    return part


def _held_bytes(module: nn.Module, seen: set[int]) -> int:
    """Bytes a module's own weights take; constants it computes (rotary frequencies) are none."""
    if isinstance(module, PlainLinear | QuantizedLinear):
        packed = module.weight_bytes
        shared = _is_seen(getattr(module, "weight", None), seen)
        bias = getattr(module, "bias", None)
        return (0 if shared else packed) + (0 if bias is None else _num_bytes(bias))
    held = [*module.parameters(recurse=False), *stored_buffers(module).values()]
    return sum(_num_bytes(t) for t in held if not t.is_meta and not _is_seen(t, seen))


def _is_seen(tensor: object, seen: set[int]) -> bool:
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        return False
    known = tensor.data_ptr() in seen
    seen.add(tensor.data_ptr())
    return known


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
