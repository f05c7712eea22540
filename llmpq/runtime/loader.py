"""Fills a stage: read one tensor, quantise, place, free.

Peak host memory is the stage's packed weights plus two of its largest tensors: the raw tensor
just read and what quantising it takes. A test holds the loader to that.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmpq.errors import UserError
from llmpq.model_spec import config_path
from llmpq.models.family import find
from llmpq.models.stage_model import LayerRange, RawTensor, StageModel
from llmpq.quant import PlainLinear, QuantizedLinear
from llmpq.runtime.checkpoint import Weights


def model_folder(model: str) -> Path:
    """The directory of MODEL's config.json; for a hub id, its whole snapshot is fetched."""
    folder = config_path(model).parent
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
    except Exception as error:  # the hub client raises many kinds; each means: not to be had
        raise UserError(f"{model}: could not be fetched ({error})") from None


def load_stage(
    config: Any,
    weights: Weights,
    layers: LayerRange,
    precisions: list[str],
    dtype: torch.dtype,
    device: torch.device,
    on_tensor: Callable[[StageModel], None] | None = None,
) -> StageModel:
    """The stage with its weights in place. `on_tensor` is called after every tensor."""
    try:
        stage = StageModel(config, layers, precisions, dtype, device)
    except ValueError as error:  # a precision that this device cannot serve
        raise UserError(str(error)) from None
    for raw in stage.parameters_to_load():
        name = raw.name
        if _is_tied_head(stage, raw.module):
            if layers.is_first:
                continue  # shares the embedding's matrix, below
            name = stage.embedding_name
        place(raw, weights.read(name, raw.shape), dtype, device)
        if on_tensor is not None:
            on_tensor(stage)
    if stage.head_is_tied and layers.is_first and layers.is_last:
        _tie(stage)
    return stage.eval()


def place(raw: RawTensor, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Puts one raw tensor where it belongs; a quantised linear packs it."""
    if isinstance(raw.module, PlainLinear | QuantizedLinear):
        try:
            raw.module.swallow(raw.attribute, tensor)
        except ValueError as error:
            raise UserError(f"tensor '{raw.name}': {error}") from None
        return
    own = nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=False)
    raw.module.register_parameter(raw.attribute, own)


def _is_tied_head(stage: StageModel, module: nn.Module) -> bool:
    return stage.head_is_tied and module is find(stage.model, stage.family.head)


def _tie(stage: StageModel) -> None:
    head = find(stage.model, stage.family.head)
    embedding = find(stage.model, stage.embedding_name.removesuffix(".weight"))
    assert head is not None and embedding is not None
    head.register_parameter("weight", embedding.get_parameter("weight"))
