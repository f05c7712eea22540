"""Counts parameters, cache and live tensors of a decoder on its own modules.

`count_model` makes the spec of a model whose family has no sizes of its own (`llmpq.families`);
`count_activations` makes the allocation snapshots of models of a kind (`stage_memory`).

Not covered: models whose layers keep more than keys and values, or whose control flow depends on
values of tensors.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn
from transformers import AutoConfig

from llmpq.errors import UserError
from llmpq.job import LaneShape
from llmpq.model_spec import Activations, AllocationSnapshot, LinearShape, ModelSpec
from llmpq.models.buffers import stored_buffers
from llmpq.models.family import find
from llmpq.models.lanes import LaneCache
from llmpq.models.live_tensors import LiveTensors, TensorSnapshot
from llmpq.models.stage_memory import (
    META,
    MicroBatchShape,
    covers,
    run_on_meta,
    snapshot_table,
    snapshots,
)
from llmpq.models.stage_model import LayerRange, StageModel, load_config
from llmpq.quant import PlainLinear

# Settings with lists that are not lists of layers, whatever their length.
ROPES = ("rope_parameters", "rope_scaling", "eos_token_id", "architectures")
NUM_LAYERS = 7  # enough to have every kind of layer of a family


@dataclass(frozen=True)
class Primes:
    """Sizes of a micro-batch that share no factor with any size of a model."""

    requests: int
    tokens: int
    seen: int

    def named(self, phase: str) -> dict[str, int]:
        """The sizes of a phase by name; in prefill, the seen tokens are the new tokens."""
        length = {"tokens": self.tokens} if phase == "prefill" else {"seen": self.seen}
        return {"requests": self.requests} | length

    def shape(self, phase: str) -> MicroBatchShape:
        """The micro-batch of a phase."""
        if phase == "prefill":
            return MicroBatchShape(self.requests, self.tokens, self.tokens)
        return MicroBatchShape(self.requests, 1, self.seen)


PRIMES = Primes(10007, 20011, 40009)
OTHER_PRIMES = Primes(10009, 20021, 40013)


def count_activations(
    configs: Iterable[Any], sizes: Mapping[str, int], primes: Primes = PRIMES
) -> Activations:
    """The snapshots of similar models; `sizes` names their own sizes that may be factors."""
    found: dict[str, list[TensorSnapshot]] = defaultdict(list)
    for config in configs:
        whole = with_layers(config, NUM_LAYERS)
        for phase, start, end in product(PHASES, (0, 1), (NUM_LAYERS - 1, NUM_LAYERS)):
            layers = LayerRange(start, end, NUM_LAYERS)
            where = "_last" if layers.is_last else "_first" if layers.is_first else ""
            found[phase + where] += snapshots(whole, layers, primes.shape(phase))
    parts: dict[str, tuple[AllocationSnapshot, ...]] = {}
    for phase in PHASES:
        known: tuple[AllocationSnapshot, ...] = ()
        for where in (phase, f"{phase}_first", f"{phase}_last"):
            met = snapshot_table(found[where], {**primes.named(phase), **sizes})
            parts[where] = tuple(m for m in met if not any(covers(n, m) for n in known))
            known += parts[where]
    return Activations(**parts)


PHASES = ("prefill", "decode")


def with_layers(config: Any, total: int) -> Any:
    """The configuration with `total` layers, which repeat those of the model in order."""
    data, own = config.to_dict(), config.num_hidden_layers
    data.pop("model_type")
    data.pop(config.attribute_map.get("num_hidden_layers"), None)
    data |= {name: _spread(value, own, total) for name, value in data.items() if name not in ROPES}
    data["num_hidden_layers"] = total
    return AutoConfig.for_model(config.model_type, **data)


def _spread(value: Any, own: int, total: int) -> Any:
    """A setting with one entry for each of `own` layers, for `total` layers; others unchanged."""
    if isinstance(value, list | tuple) and len(value) == own:
        return [value[i % own] for i in range(total)]
    if not isinstance(value, dict):
        return value
    for key in (str, int):
        if value and set(value) == {key(i) for i in range(own)}:
            return {key(i): value[key(i % own)] for i in range(total)}
    return {name: _spread(each, own, total) for name, each in value.items()}


# ---- one model, from its configuration


def count_model(path: Path) -> ModelSpec:
    """The spec of a model that `model_spec` has no table for.

    Raises `UserError` where llmpq cannot cut it into stages, or where its live bytes are no
    polynomial of the micro-batch's sizes.
    """
    config = load_config(path)
    num_layers = config.num_hidden_layers
    whole = LayerRange(0, num_layers, num_layers)
    stage = StageModel(config, whole, ["16"] * num_layers, torch.bfloat16, META)
    layers = stage.own_layers
    linears = _linears(layers[0])
    kind = config.model_type
    if any("expert" in name for layer in layers for name, _ in layer.named_parameters()):
        raise UserError(f"{path}: mixture-of-experts models ({kind}) are not supported")
    if not linears or any(_linears(layer) != linears for layer in layers):
        raise UserError(
            f"{path}: layers of this '{kind}' model have no linears, or differ from each other, "
            "which llmpq does not support"
        )
    activations = count_activations([config], {})
    if activations != count_activations([config], {}, OTHER_PRIMES):
        raise UserError(
            f"{path}: the memory of its activations is not a polynomial of the micro-batch's "
            "sizes, which llmpq does not support"
        )
    return ModelSpec(
        name=str(path),
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None) or 2048,
        linears=linears,
        tied=stage.head_is_tied,
        activations=activations,
        **_heads(config, stage),
        **_params(stage, layers[0]),
    )


def _linears(layer: nn.Module) -> tuple[LinearShape, ...]:
    return tuple(
        LinearShape(
            name=name.rpartition(".")[2],
            out_features=module.out_features,
            in_features=module.in_features,
        )
        for name, module in layer.named_modules()
        if isinstance(module, PlainLinear)
    )


class _Heads(TypedDict):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int


class _Params(TypedDict):
    layer_other_params: int
    embedding_params: int
    head_params: int
    final_params: int


def _heads(config: Any, stage: StageModel) -> _Heads:
    """Heads and feed-forward width; key-value heads are counted in a filled cache."""
    num_layers, seen = config.num_hidden_layers, 2
    cache = LaneCache(num_layers, [LaneShape(1, seen)])
    with torch.inference_mode(), LiveTensors():
        run_on_meta(stage, cache, MicroBatchShape(1, 1, seen))
    held = cache.num_bytes // (num_layers * 2 * seen * torch.bfloat16.itemsize)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads, rest = divmod(held, head_dim)
    if rest:
        raise UserError(
            f"the KV cache of a layer holds {held} keys per token, which is not a multiple of "
            f"head_dim ({head_dim})"
        )
    widest = max(op.out_features for op in _linears(stage.own_layers[0]))
    return {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn_size": getattr(config, "intermediate_size", None) or widest,
    }


def _params(stage: StageModel, layer: nn.Module) -> _Params:
    weights = sum(op.out_features * op.in_features for op in _linears(layer))
    family = stage.family
    final = sum(_num_params(find(stage.model, f"{family.decoder}.{n}")) for n in family.final)
    head = _num_params(find(stage.model, family.head))
    outside = _num_params(stage.model) - sum(_num_params(each) for each in stage.own_layers)
    return {
        "layer_other_params": _num_params(layer) - weights,
        "embedding_params": outside - final - head,
        "head_params": head,
        "final_params": final,
    }


def _num_params(module: nn.Module | None) -> int:
    """The number of weights, and of values in the buffers that checkpoints hold."""
    if module is None:
        return 0
    buffers = [b for part in module.modules() for b in stored_buffers(part).values()]
    return sum(tensor.numel() for tensor in (*module.parameters(), *buffers))
