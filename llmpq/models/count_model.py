"""Makes the spec of a model by counting on transformers' own modules, on the meta device.

Layers are of one kind if their parameters have the same names and shapes, and if they attend to
windows of as many tokens. One layer of each kind is
cut out as a stage, as it would run, and counted: its linears, its routed experts, other parameters,
and what a token leaves in its cache. Snapshots of activations are those of all kinds together.

Not covered: weights, and layers that keep other state than keys and values.
"""

import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from llmpq.errors import UserError
from llmpq.job import LaneShape
from llmpq.model_known import num_experts
from llmpq.model_lookup import kind_name, refuse_plainly
from llmpq.model_spec import Activations, Experts, LayerKind, LinearShape, ModelSpec
from llmpq.models.buffers import stored_buffers
from llmpq.models.count import NUM_LAYERS, OTHER_PRIMES, count_activations, with_layers
from llmpq.models.experts import PackedExperts
from llmpq.models.family import family_of, find, part_of
from llmpq.models.lanes import LaneCache
from llmpq.models.live_tensors import LiveTensors
from llmpq.models.stage_memory import META, MicroBatchShape, run_on_meta
from llmpq.models.stage_model import LayerRange, StageModel, load_config
from llmpq.quant import PlainLinear
from llmpq.windows import configured_windows

FLOAT32_BYTES = 4
SEEN = 2  # tokens of the step that fills a cache


def count_model(path: Path) -> ModelSpec:
    """The spec of a model that `llmpq.families` has no sizes for.

    Raises `UserError` where llmpq cannot cut it into stages, or where its live bytes are no
    polynomial of the micro-batch's sizes.
    """
    spec = count_params(path)
    return spec.model_copy(update={"activations": _activations(load_config(path), spec, path)})


def count_params(path: Path) -> ModelSpec:
    """The same without activations, which take most of the time."""
    config = load_config(path)
    refuse_plainly({"model_type": config.model_type} | config.to_dict(), str(path))
    places, of_layers = layer_kinds(config)
    kinds = _named([_count_layer(config, place, path) for place in places])
    first = {name: value for name, value in kinds[0] if name != "name"}
    return ModelSpec(
        name=str(path),
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None) or 2048,
        tied=bool(config.tie_word_embeddings),
        kinds=kinds if len(kinds) > 1 else (),
        layer_kinds=of_layers if len(kinds) > 1 else (),
        **_ends(config),
        **first,
    )


def layer_kinds(config: Any) -> tuple[list[int], tuple[int, ...]]:
    """The first layer of each kind, and of every layer the place of its kind among these."""
    shapes = _shapes(config)
    known = list(dict.fromkeys(shapes))
    return [shapes.index(one) for one in known], tuple(known.index(one) for one in shapes)


def _shapes(config: Any) -> list[Hashable]:
    """Of every layer, its window, and the names and shapes of its parameters."""
    with torch.device(META):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, dtype=torch.bfloat16
        )
    family = family_of(model, config.model_type)
    layers = find(model, f"{family.decoder}.{family.layers}")
    assert isinstance(layers, nn.ModuleList)
    shapes = [tuple((n, tuple(t.shape)) for n, t in _held(layer)) for layer in layers]
    return list(zip(configured_windows(config), shapes, strict=True))


def _activations(config: Any, spec: ModelSpec, path: Path) -> Activations:
    """The snapshots of layers of all kinds, in a model of the first layers that has all of them."""
    kinds: list[int | None] | None = None
    if spec.kinds:
        last_new = max(map(spec.layer_kinds.index, range(len(spec.kinds))))
        known = dict(zip(_shapes(config), spec.layer_kinds, strict=True))
        few = with_layers(config, max(NUM_LAYERS, last_new + 2))
        kinds = [known.get(shapes) for shapes in _shapes(few)]
    activations = count_activations([config], {}, kinds=kinds)
    if activations != count_activations([config], {}, OTHER_PRIMES, kinds):
        raise UserError(
            f"{path}: the memory of its activations is not a polynomial of the micro-batch's "
            "sizes, which llmpq does not support"
        )
    return activations


# ---- one layer


@dataclass(frozen=True)
class _Ran:
    """What one call of a layer showed: values of a token in its cache, and experts of a token."""

    kv_values: int
    per_token: int


def _count_layer(config: Any, place: int, path: Path) -> LayerKind:
    """The sizes of the layer at `place`, as it is in a stage of its own."""
    layers = LayerRange(place, place + 1, config.num_hidden_layers)
    stage = StageModel(config, layers, ["16"], torch.bfloat16, META)
    (layer,) = stage.own_layers
    linears = tuple(_linears(_outside_experts(layer)))
    ran = _run(stage)
    if not linears or not ran.kv_values:
        raise UserError(
            f"{path}: layer {place} of this '{config.model_type}' model has no linears, or keeps "
            "no keys and values, which llmpq does not support"
        )
    experts = _experts(layer, ran, path)
    params = sum(op.out_features * op.in_features for op in linears)
    params += experts.params if experts else 0
    (window,) = stage.windows
    return LayerKind(
        name=kind_name(window, "dense" if experts is None else "experts"),
        window=window,
        linears=linears,
        layer_other_params=_num_params(layer) + _widened(stage) - params,
        ffn_size=_ffn_size(config, layer, experts),
        experts=experts,
        **_heads(config, ran.kv_values),
    )


def _widened(stage: StageModel) -> int:
    """The values of 16 bits that the loader keeps in 32, which count once more."""
    return sum(
        math.prod(raw.shape)
        for raw in stage.parameters_to_load()
        if raw.is_float32 and getattr(raw.module, raw.attribute).itemsize < FLOAT32_BYTES
    )


def _run(stage: StageModel) -> _Ran:
    """Runs one token through a stage of one layer."""
    cache = LaneCache(1, [LaneShape(1, SEEN)])
    chosen: list[int] = []
    for module in stage.modules():
        if isinstance(module, PackedExperts):
            module.register_forward_pre_hook(lambda _, given: chosen.append(given[1].shape[-1]))
    with torch.inference_mode(), LiveTensors():
        run_on_meta(stage, cache, MicroBatchShape(1, 1, SEEN))
    held = cache.num_bytes // (SEEN * torch.bfloat16.itemsize)
    return _Ran(held, max(chosen, default=0))


def _experts(layer: nn.Module, ran: _Ran, path: Path) -> Experts | None:
    """The routed experts of a layer; all of a layer's are alike."""
    found = [module for module in layer.modules() if isinstance(module, PackedExperts)]
    if not found:
        return None
    if len(found) > 1:
        raise UserError(f"{path}: layers with {len(found)} groups of experts are not supported")
    one = found[0][0]
    linears = tuple(_linears(one.named_modules()))
    weights = sum(op.out_features * op.in_features for op in linears)
    return Experts(
        count=len(found[0]),
        per_token=ran.per_token,
        linears=linears,
        other_params=_num_params(one) - weights,
    )


def _outside_experts(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a layer by name, without those of its routed experts."""
    inner = tuple(f"{n}." for n, m in layer.named_modules() if isinstance(m, PackedExperts))
    return ((n, m) for n, m in layer.named_modules() if not n.startswith(inner or "\0"))


def _linears(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[LinearShape]:
    for name, module in modules:
        if isinstance(module, PlainLinear):
            yield LinearShape(
                name=name.rpartition(".")[2],
                out_features=module.out_features,
                in_features=module.in_features,
            )


class _Heads(TypedDict):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_values: int | None


def _heads(config: Any, kv_values: int) -> _Heads:
    """The heads of a layer whose tokens leave so many values in the cache.

    Where these are no keys and values of the configured heads (latent attention), `kv_values` says
    how many there are.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "kv_lora_rank", None):
        whole = getattr(config, "qk_head_dim", None) or head_dim
        own = None if kv_values == 2 * heads * whole else kv_values
        return _Heads(num_heads=heads, num_kv_heads=heads, head_dim=whole, kv_values=own)
    kv_heads, rest = divmod(kv_values, 2 * head_dim)
    if rest:
        raise UserError(
            f"the KV cache of a layer holds {kv_values} values per token, which is not a multiple "
            f"of keys and values of head_dim ({head_dim})"
        )
    return _Heads(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, kv_values=None)


def _ffn_size(config: Any, layer: nn.Module, experts: Experts | None) -> int:
    """The width of what all tokens pass through; where experts are all there is, that of one."""
    linears = {n: m for n, m in _outside_experts(layer) if isinstance(m, PlainLinear)}
    inner = [
        module.out_features
        for name, module in linears.items()
        if part_of(name) == "ffn" and module.in_features == config.hidden_size
    ]
    if experts is not None:
        return max(inner, default=experts.linears[0].out_features)
    configured: int | None = getattr(config, "intermediate_size", None)
    if configured and (configured in inner or num_experts(config.to_dict()) <= 1):
        return configured
    return max(inner or (module.out_features for module in linears.values()))


def _named(counted: list[LayerKind]) -> tuple[LayerKind, ...]:
    """The same with names that differ: several of one name are numbered."""
    names = [kind.name for kind in counted]
    numbers = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return tuple(
        kind.model_copy(update={"name": f"{kind.name} {number}"}) if number > 1 else kind
        for kind, number in zip(counted, numbers, strict=True)
    )


# ---- embedding and head


class _Ends(TypedDict):
    embedding_params: int
    head_params: int
    final_params: int


def _ends(config: Any) -> _Ends:
    """The parameters outside the layers, counted on a model with one layer."""
    stage = StageModel(with_layers(config, 1), LayerRange(0, 1, 1), ["16"], torch.bfloat16, META)
    family, (layer,) = stage.family, stage.own_layers
    final = sum(_num_params(find(stage.model, f"{family.decoder}.{n}")) for n in family.final)
    head = _num_params(find(stage.model, family.head))
    outside = _num_params(stage.model) - _num_params(layer)
    return {
        "embedding_params": outside - final - head,
        "head_params": head,
        "final_params": final,
    }


def _num_params(module: nn.Module | None) -> int:
    """The number of weights, and of values in the buffers that checkpoints hold.

    Buffers of 32 bits count twice, as others have 16.
    """
    held = () if module is None else _held(module)
    return sum(tensor.numel() * tensor.itemsize // torch.bfloat16.itemsize for _, tensor in held)


def _held(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a module and the buffers that checkpoints hold, by name."""
    yield from module.named_parameters()
    for prefix, part in module.named_modules():
        yield from ((f"{prefix}.{name}", b) for name, b in stored_buffers(part).items())
