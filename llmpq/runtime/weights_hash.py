"""Hashes of the served weights: equal hashes mean that two runs serve the same numbers."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from llmpq.models.raw_tensors import RawTensor
from llmpq.models.stage_model import StageModel
from llmpq.quant import QuantizedLinear
from llmpq.runtime.transport import Transport


def weights_hash(stage: StageModel) -> str:
    """SHA-256 of a stage's weights as they are held: packed codes, scales, zeros, by name, layer
    by layer. Equal where the same numbers are served; other devices and data types pack otherwise.
    """
    digest = hashlib.sha256()
    for raw in stage.parameters_to_load():
        for name, tensor in _held(raw):
            digest.update(f"{raw.name} {name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _held(raw: RawTensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a module holds for one tensor of the checkpoint."""
    names: tuple[str, ...] = (raw.attribute,)
    if isinstance(raw.module, QuantizedLinear) and raw.attribute == "weight":
        names = raw.module.weight_buffers
    held = ((name, getattr(raw.module, name)) for name in names)
    yield from ((name, tensor) for name, tensor in held if tensor is not None)


def _bytes_of(tensor: torch.Tensor) -> Any:
    plain = tensor.detach() if tensor.layout == torch.strided else tensor.to_dense()
    return plain.cpu().contiguous().flatten().view(torch.uint8).numpy()


def gather_hashes(stage: StageModel, transport: Transport) -> list[str]:
    """Every stage's `weights_hash`, on every stage; all must call this."""
    mine = bytes.fromhex(weights_hash(stage))
    gathered = transport.gather(torch.tensor(list(mine), dtype=torch.uint8))
    return [bytes(one.tolist()).hex() for one in gathered]
