"""The `quantization_config` of an exported checkpoint, in the terms of compressed-tensors.

There is one group for each way of storing a matrix. Its targets are regular expressions that name
layers by number and linears by name. They name the matrix that vLLM makes of several (`qkv_proj`)
beside its parts, so that all parts match one group whatever vLLM looks up (vLLM issue 31623).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmpq.precision import PRECISIONS, group_size
from llmpq.vllm_support import FUSED


@dataclass(frozen=True, order=True)
class Storage:
    """How a matrix is stored. `group`: the weights of a row that share a scale; 0: the whole row"""

    precision: str
    group: int = 0

    @classmethod
    def of(cls, precision: str, in_features: int) -> "Storage":
        """How a matrix with so many inputs is stored at a precision below 16 bits."""
        held = PRECISIONS[precision]
        group = group_size(held.weight_bits, in_features) if held.weight_only else in_features
        return cls(precision, 0 if group == in_features else group)


@dataclass(frozen=True)
class StoredLinear:
    """A linear of a layer at a `path` inside it ("self_attn.q_proj"); `storage` None: 16 bits."""

    layer: int
    path: str
    storage: Storage | None


def quantization_config(layers_path: str, linears: Iterable[StoredLinear]) -> dict[str, object]:
    """The `quantization_config` of a model whose layers lie at `layers_path` ("model.layers")."""
    from compressed_tensors import __version__
    from compressed_tensors.quantization import QuantizationConfig

    found: dict[Storage | None, dict[int, set[str]]] = {}
    for linear in linears:
        by_layer = found.setdefault(linear.storage, {})
        by_layer.setdefault(linear.layer, set()).add(linear.path)
    stored = sorted(storage for storage in found if storage is not None)
    groups = {
        f"group_{number}": _group(storage, _targets(layers_path, found[storage]))
        for number, storage in enumerate(stored)
    }
    settings = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*_targets(layers_path, found.get(None, {})), "lm_head"],
    }
    return QuantizationConfig.model_validate(settings).to_dict() | {"version": __version__}


def _group(storage: Storage, targets: list[str]) -> dict[str, object]:
    held = PRECISIONS[storage.precision]
    weights: dict[str, object] = {"num_bits": held.weight_bits, "type": "int", "dynamic": False}
    weights["symmetric"] = not held.weight_only
    weights["strategy"] = "group" if storage.group else "channel"
    if storage.group:
        weights["group_size"] = storage.group
    if held.weight_only:
        return {"targets": targets, "weights": weights, "format": "pack-quantized"}
    by_token = {"num_bits": 8, "type": "int", "symmetric": True}
    by_token |= {"strategy": "token", "dynamic": True}
    activations = {"input_activations": by_token}
    return {"targets": targets, "weights": weights, **activations, "format": "int-quantized"}


def _targets(layers_path: str, by_layer: Mapping[int, set[str]]) -> list[str]:
    """Regular expressions of these linears; layers with the same linears share one."""
    alike: dict[frozenset[str], list[int]] = {}
    for layer, paths in by_layer.items():
        alike.setdefault(frozenset(paths), []).append(layer)
    last = re.escape(layers_path.rpartition(".")[2])
    numbered = {_any_of(map(str, sorted(layers))): paths for paths, layers in alike.items()}
    return [
        rf"re:(.*\.)?{last}\.({numbers})\.({_any_of(_with_fused(paths))})$"
        for numbers, paths in numbered.items()
    ]


def _any_of(texts: Iterable[str]) -> str:
    return "|".join(map(re.escape, texts))


def _with_fused(paths: Iterable[str]) -> list[str]:
    """The paths, and those of the matrices that vLLM makes of them."""
    whole = {part: name for name, parts in FUSED.items() for part in parts}
    found = set(paths)
    for path in paths:
        parent, dot, name = path.rpartition(".")
        if name in whole:
            found.add(f"{parent}{dot}{whole[name]}")
    return sorted(found)
