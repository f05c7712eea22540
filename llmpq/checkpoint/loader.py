"""Fills a stage with weights: reads one tensor, quantizes it, loads it into its module, frees it.

Peak host memory is the stage's packed weights plus two of its largest tensors: the raw tensor just
read, and the temporaries of quantizing it; a test checks this. (One of several shards may need
whole tensors of which it keeps a part: at 8 bits, and for GPTQ.) Rounding by GPTQ also holds the
statistics of one layer input: with n inputs, two n x n matrices of fp32 (twice that while it
prepares), and 512 rows of the weight in fp64.
"""

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmpq.checkpoint.checkpoint import Weights
from llmpq.checkpoint.packed_cache import NO_CACHE, WeightCache
from llmpq.checkpoint.roundings import NEAREST, Roundings
from llmpq.errors import UserError
from llmpq.model_lookup import config_path
from llmpq.models.family import find
from llmpq.models.raw_tensors import RawTensor
from llmpq.models.sharding import ALONE, Shard, ShardGroup
from llmpq.models.stage_model import LayerPrecision, LayerRange, StageModel
from llmpq.quant import (
    PackedWeight,
    PlainLinear,
    QuantizedLinear,
    Rounding,
    keep_codes,
    quantize,
)


def model_folder(model: str) -> Path:
    """The directory of MODEL's config.json; the whole snapshot of a hub id is fetched."""
    path = config_path(model)
    if path.name != "config.json":
        raise UserError(f"{model}: is a file, expected the directory of a model")
    folder = path.parent
    if Path(model).exists() or "/" not in model:
        return folder
    folder = _fetch(model, ["*.json", "*.safetensors", "*.model", "*.txt"])
    if not any(folder.glob("*.safetensors")):
        folder = _fetch(model, ["pytorch_model*.bin*"])
    return folder


def _fetch(model: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds, all of which mean failure
        raise UserError(f"{model}: could not be fetched ({error})") from None


def load_stage(
    config: Any,
    weights: Weights,
    layers: LayerRange,
    precisions: Sequence[LayerPrecision],
    dtype: torch.dtype,
    device: torch.device,
    on_tensor: Callable[[StageModel], None] | None = None,
    roundings: Roundings = NEAREST,
    cache: WeightCache = NO_CACHE,
    shard: Shard = ALONE,
    group: ShardGroup | None = None,
) -> StageModel:
    """The stage with its weights loaded. `on_tensor` is called after every tensor.

    `roundings` gives the rounding of each weight. Weights that are quantized already keep their
    codes where the stage has the same bits there. Weights in `cache` are neither read nor rounded.
    One of several shards gets the same codes as the whole matrices, and reads only the parts that
    this needs.
    """
    stage = StageModel(config, layers, precisions, dtype, device, shard, group)
    roundings = copy(roundings)  # factors kept from one weight for the next end with this call
    tensors = raw_tensors(stage, weights)
    paths = {id(module): path for path, module in stage.model.named_modules()}
    for raw, name in tensors:
        packed = weights.packed(name, raw.shape)
        own = keep_codes(raw.module, packed) if packed else None
        if own is not None:
            if own is not raw.module:
                stage.put(stage.model, paths[id(raw.module)], own)
        else:
            rounding = roundings.of(name)
            read = partial(_read, weights, name, raw, packed, rounding)
            take = partial(load_tensor, raw, dtype=dtype, device=device, rounding=rounding)
            cache.fill(raw, name, read, take)
        if on_tensor is not None:
            on_tensor(stage)
    if layers.is_first and layers.is_last and not any(_is_head(stage, raw) for raw, _ in tensors):
        _tie(stage)
    return stage.eval()


def raw_tensors(stage: StageModel, weights: Weights) -> list[tuple[RawTensor, str]]:
    """The tensors that a stage reads, each with its name in the checkpoint; shared ones once.

    Where config.json says that the head is tied but files hold another matrix for it, that matrix
    is the head, as in transformers (`tie_weights`, 5.23); a missing embedding is the head's matrix.
    """
    found = [(raw, _source(stage, weights, raw)) for raw in stage.parameters_to_load()]
    return [(raw, name) for raw, name in found if name is not None]


def _source(stage: StageModel, weights: Weights, raw: RawTensor) -> str | None:
    """The name a tensor is read by; None for the embedding's matrix, which the stage holds."""
    embedding, is_head = stage.embedding_name, _is_head(stage, raw)
    if not stage.head_is_tied or not (is_head or raw.name == embedding):
        return raw.name
    head = stage.head_name
    if not is_head:
        return head if weights.stores(head) and not weights.stores(embedding) else embedding
    own = weights.stores(head)
    if not stage.layers.is_first:
        return head if own else embedding
    both = own and weights.stores(embedding)
    return head if both and not weights.equal(head, embedding, raw.shape) else None


def load_tensor(
    raw: RawTensor,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    rounding: Rounding = quantize,
) -> None:
    """Loads one raw tensor into its module; a quantized linear packs it."""
    if isinstance(raw.module, PlainLinear | QuantizedLinear):
        try:
            raw.module.load_weight(raw.attribute, tensor, rounding)
        except ValueError as error:
            raise UserError(f"tensor '{raw.name}': {error}") from None
        return
    dtype = torch.float32 if raw.is_float32 else dtype
    if raw.is_buffer:
        held_type = raw.module.get_buffer(raw.attribute).dtype  # integers and flags among them
        own_type = dtype if raw.is_float32 else held_type
        raw.module.register_buffer(raw.attribute, tensor.to(device, own_type, copy=True))
        return
    own = nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=False)
    raw.module.register_parameter(raw.attribute, own)


def _read(
    weights: Weights, name: str, raw: RawTensor, packed: PackedWeight | None, rounding: Rounding
) -> torch.Tensor:
    """The tensor, or the part of it that is wanted."""
    part = raw.part(rounding)
    if packed is not None:
        return part.of(packed.dequantized()) if part else packed.dequantized()
    return weights.read_part(name, raw.shape, part) if part else weights.read(name, raw.shape)


def _is_head(stage: StageModel, raw: RawTensor) -> bool:
    return raw.name == stage.head_name


def _tie(stage: StageModel) -> None:
    head = find(stage.model, stage.family.head)
    embedding = find(stage.model, stage.embedding_name.removesuffix(".weight"))
    assert head is not None and embedding is not None
    head.register_parameter("weight", embedding.get_parameter("weight"))
