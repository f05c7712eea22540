"""Writes the checkpoint of an export: safetensors shards with their index, and the other files.

Tensors are read, rounded and written one after the other. Memory holds one shard, and what a tensor
takes while it is rounded.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmpq.artifact import parse_json, write_text
from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.loader import raw_tensors
from llmpq.checkpoint.roundings import Roundings
from llmpq.errors import UserError
from llmpq.export.packed_tensors import packed_tensors
from llmpq.export.quantization import Storage, StoredLinear, quantization_config
from llmpq.export.served import Served
from llmpq.models.stage_model import LayerRange, StageModel, load_config
from llmpq.quant import PlainLinear, QuantizedLinear

SHARD_BYTES = 2 << 30
FILE_MODE = 0o644  # safetensors writes files that only their owner reads
# What engines read of a model's folder, beside its weights and its configuration.
OTHER_FILES = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "chat_template*", "*.model"),
)


@dataclass(frozen=True)
class WrittenCheckpoint:
    """What was written. `layer_bytes` are of the layers alone, `num_bytes` of all tensors."""

    num_bytes: int
    layer_bytes: int
    num_shards: int


@dataclass
class _Shards:
    """Collects tensors into shards of about `SHARD_BYTES`, which get their numbers at the end."""

    folder: Path
    held: dict[str, Tensor] = field(default_factory=dict)
    held_bytes: int = 0
    written: list[list[str]] = field(default_factory=list)
    num_bytes: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds a tensor; writes a shard where this fills one."""
        if self.held and self.held_bytes + tensor.nbytes > SHARD_BYTES:
            self.flush()
        self.held[name] = tensor.contiguous()
        self.held_bytes += tensor.nbytes
        self.num_bytes += tensor.nbytes

    def flush(self) -> None:
        """Writes the tensors that are held."""
        path = self._temporary(len(self.written))
        try:
            save_file(self.held, path, metadata={"format": "pt"})
        except SafetensorError as error:  # such as a full disk
            raise OSError(0, str(error), str(path)) from None
        self.written.append(list(self.held))
        self.held, self.held_bytes = {}, 0

    def finish(self) -> None:
        """Writes the last shard and the index, and gives the shards their names."""
        if self.held:
            self.flush()
        index: dict[str, str] = {}
        for number, names in enumerate(self.written):
            name = f"model-{number + 1:05}-of-{len(self.written):05}.safetensors"
            self._temporary(number).rename(self.folder / name)
            (self.folder / name).chmod(FILE_MODE)
            index |= dict.fromkeys(names, name)
        data = {"metadata": {"total_size": self.num_bytes}, "weight_map": index}
        write_text(self.folder / "model.safetensors.index.json", json.dumps(data, indent=1) + "\n")

    def _temporary(self, number: int) -> Path:
        return self.folder / f"shard-{number}.part"


def write_checkpoint(
    model: Path,
    served: Served,
    roundings: Roundings,
    folder: Path,
    on_tensor: Callable[[int, int], None] | None = None,
) -> WrittenCheckpoint:
    """Writes the model of the directory `model` into `folder`, at the precisions of `served`.

    `on_tensor` is called with the number of tensors that are done, and of all. Raises `UserError`
    for models that cannot be exported.
    """
    weights = Checkpoint(model)
    _refuse_odd(weights)
    config, num_layers = load_config(model), len(served.layers)
    layers = LayerRange(0, num_layers, num_layers)
    cpu = torch.device("cpu")
    stage = StageModel(config, layers, ["16"] * num_layers, torch.bfloat16, cpu)
    linears = _stored_linears(stage, served)
    shards, layer_bytes = _Shards(folder), 0
    tensors = raw_tensors(stage, weights)
    prefix = f"{_layers_path(stage)}."
    for done, (raw, source) in enumerate(tensors):
        linear = raw.name.removesuffix(".weight")
        tensor = weights.read(source, raw.shape)
        own = linears.get(linear) if raw.name != linear else None
        found = {raw.name: tensor}
        if own is not None and own.storage is not None:
            found = _packed(linear, tensor, own.storage, roundings, source)
        for name, one in found.items():
            shards.add(name, one)
            layer_bytes += one.nbytes if name.startswith(prefix) else 0
        if on_tensor is not None:
            on_tensor(done + 1, len(tensors))
    shards.finish()
    _write_settings(
        model, folder, stage, linears, any(r.name == stage.head_name for r, _ in tensors)
    )
    return WrittenCheckpoint(shards.num_bytes, layer_bytes, len(shards.written))


def _refuse_odd(weights: Checkpoint) -> None:
    packed = next(
        (name for name in weights.stored if name.endswith((".weight_packed", ".qweight"))), None
    )
    if packed is not None:
        raise UserError(
            f"{weights.folder}: the weights are quantized already ({packed}); export the model "
            "that they were made from"
        )
    if weights.has_other_parts:
        raise UserError(
            f"{weights.folder}: has parts beside its language model, which cannot be exported yet"
        )


def _layers_path(stage: StageModel) -> str:
    return f"{stage.family.decoder}.{stage.family.layers}"


def _stored_linears(stage: StageModel, served: Served) -> dict[str, StoredLinear]:
    """Every linear of the layers, by its name in the model."""
    found = {}
    for number, layer in enumerate(stage.own_layers):
        for path, module in layer.named_modules():
            if isinstance(module, PlainLinear | QuantizedLinear):
                precision = served.of(number, path.rpartition(".")[2])
                if precision != "16" and module.is_transposed:
                    raise UserError(
                        f"models of type '{stage.config.model_type}' store matrices transposed, "
                        "which vLLM does not read in packed form; llmpq-run serves the plan"
                    )
                storage = None if precision == "16" else Storage.of(precision, module.in_features)
                name = f"{_layers_path(stage)}.{number}.{path}"
                found[name] = StoredLinear(number, path, storage)
    return found


def _packed(
    linear: str, tensor: Tensor, storage: Storage, roundings: Roundings, source: str
) -> dict[str, Tensor]:
    try:
        return packed_tensors(linear, tensor, storage.precision, roundings.of(source))
    except ValueError as error:
        raise UserError(f"tensor '{source}': {error}") from None


def _write_settings(
    model: Path,
    folder: Path,
    stage: StageModel,
    linears: dict[str, StoredLinear],
    has_head: bool,
) -> None:
    """Writes config.json with the quantization, and copies what else engines read."""
    config = parse_json(model / "config.json")
    for name in ("quantization_config", "transformers_weights", "auto_map"):
        config.pop(name, None)
    if any(linear.storage is not None for linear in linears.values()):
        config["quantization_config"] = quantization_config(_layers_path(stage), linears.values())
    if stage.head_is_tied and has_head:
        config["tie_word_embeddings"] = False  # the files hold another matrix for the head
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    for path in other_files(model):
        shutil.copyfile(path, folder / path.name)


def other_files(model: Path) -> Iterator[Path]:
    """The files of a model's folder that are copied unchanged."""
    yield from sorted(
        path for pattern in OTHER_FILES for path in model.glob(pattern) if path.is_file()
    )
