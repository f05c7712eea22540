"""What a decoder holds, counted on its own modules: parameters, cache and live tensors.

A stage is built on the meta device (no memory, no weights) and run there as the runtime runs it,
while `LiveTensors` watches which tensors are alive. Sizes are primes, so the bytes of a tensor
fall apart into what they are a product of: `requests`, `tokens`, and for the families that
`costs.memory` knows also `hidden`, `ffn` and so on. A `Moment` is all that was alive at once, as
such products; moments that never decide the peak are dropped. A linear layer counts as one moment,
as what it takes inside depends on its precision.

`python -m llmpq.models.count` prints the table of families that ships as assets/activations.json.
Not covered: temporaries inside torch's own kernels; models whose layers keep more than keys and
values, or that look at the values of tensors to decide what to do.
"""

import argparse
import json
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from llmpq.errors import UserError
from llmpq.job import LaneShape
from llmpq.model_spec import ALL_HEADS, Activations, Linear, ModelSpec, Moment
from llmpq.models.buffers import stored_buffers
from llmpq.models.family import find
from llmpq.models.lanes import LaneCache, Stored
from llmpq.models.stage_model import LayerRange, StageModel, load_config
from llmpq.quant import PlainLinear

META = torch.device("meta")
# Settings with lists that have nothing to do with layers, whatever their length.
ROPES = ("rope_parameters", "rope_scaling", "eos_token_id", "architectures")
NUM_LAYERS = 7  # as many as it takes to meet every kind of layer of a family
# Answers that a tensor without values gives: "no", so that a mask is taken to hide something.
ASKS_FOR_A_VALUE = (
    torch.ops.aten.item.default,
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
)

ATTENTION = "attention"  # the name of fused attention among the linears

Bytes = Counter[int]  # how many live tensors have so many bytes


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors made inside, at their peak. For CPUs, which do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in storages(args):  # what comes from outside was there before
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                weakref.finalize(storage, self._known.discard, storage._cdata)
        result = func(*args, **(kwargs or {}))
        self.note(result)
        return result

    def note(self, result: Any) -> None:
        """Counts the tensors of a result that are new."""
        for storage in storages(result):
            if storage._cdata not in self._known:
                self._count(storage)

    def _count(self, storage: Any) -> None:
        self._known.add(storage._cdata)
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size


def storages(tree: Any) -> list[Any]:
    """The storages of all tensors in a result."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [leaf.untyped_storage() for leaf in leaves if leaf.layout == torch.strided]


@dataclass(frozen=True)
class Snapshot:
    """What was alive at once, and the linear that was computing (empty: none)."""

    op: str
    biased: bool
    later: bool  # in a layer after the stage's first one
    live: Bytes


class LiveTensors(PeakMemory):
    """Remembers what is alive whenever a tensor is made."""

    def __init__(self) -> None:
        super().__init__()
        self.live: Bytes = Counter()
        self.snapshots: list[Snapshot] = []
        self.later = False
        self._inside_linear = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKS_FOR_A_VALUE:
            return False
        if self._inside_linear:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            self._take(ATTENTION)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def enter_linear(self, op: str, biased: bool) -> None:
        """What a linear makes is not looked at until it is left."""
        self._take(op, biased)
        self._inside_linear = True

    def leave_linear(self, output: torch.Tensor) -> None:
        """Only its output is left."""
        self._inside_linear = False
        self.note(output)

    def _count(self, storage: Any) -> None:
        self.live[storage.nbytes()] += 1
        super()._count(storage)
        self._take()

    def _release(self, key: int, size: int) -> None:
        self.live[size] -= 1
        super()._release(key, size)

    def _take(self, op: str = "", biased: bool = False) -> None:
        self.snapshots.append(Snapshot(op, biased, self.later, +self.live))


# ---- running a stage without memory


@dataclass(frozen=True)
class Shape:
    """A micro-batch: `requests` with `tokens` new ones each, which see `seen` tokens in all."""

    requests: int
    tokens: int
    seen: int


def snapshots(config: Any, layers: LayerRange, shape: Shape) -> list[Snapshot]:
    """What is alive while a stage runs one micro-batch, as the runtime's warm-up does."""
    stage = StageModel(config, layers, ["16"] * (layers.end - layers.first), torch.bfloat16, META)
    cache = LaneCache(layers.end - layers.first, [LaneShape(shape.requests, shape.seen)])
    watch = LiveTensors()
    with torch.inference_mode():
        with LiveTensors():
            _run(stage, cache, shape)  # makes the buffers of the cache
        for hook in _hooks(stage, watch):
            hook()
        with watch:
            _run(stage, cache, shape)
    return watch.snapshots


def _run(stage: StageModel, cache: LaneCache, shape: Shape) -> None:
    """What a worker does with a job; what it is given stays alive to the end."""
    requests, tokens = shape.requests, shape.tokens
    if stage.layers.is_first:
        given = stage.embed(_integers(requests, tokens))  # ids are counted in `costs.memory`
    else:
        size = (requests, tokens, stage.config.hidden_size)
        given = torch.empty(size, dtype=stage.dtype, device=META)
    columns, positions = _integers(requests), _integers(requests, tokens)
    if tokens == shape.seen:
        every = _integers(requests * tokens)  # as good as: one prompt is a little shorter
        view = cache.prompts(Stored(every, every.clone(), every.clone()), 0)
    else:
        view = cache.step(0, range(requests), shape.seen, columns, columns)
    hidden = stage.run(given, positions, view)
    if stage.layers.is_last:
        logits = stage.head(hidden[:, -1])
        logits.argmax(dim=-1)
        torch.isfinite(logits).all(dim=-1)


def _integers(*shape: int) -> torch.Tensor:
    with torch.device(META):
        return torch.zeros(shape, dtype=torch.int64)


def _hooks(stage: StageModel, watch: LiveTensors) -> Iterator[Any]:
    """Each puts one hook in place: around every linear of the layers, and on the layers."""
    for index, layer in enumerate(stage.own_layers):
        yield lambda layer=layer, index=index: layer.register_forward_pre_hook(
            lambda *_: setattr(watch, "later", index > 0)
        )
        yield lambda layer=layer: layer.register_forward_hook(
            lambda *_: setattr(watch, "later", False)
        )
        for name, module in layer.named_modules():
            if isinstance(module, PlainLinear):
                yield lambda m=module, n=name: _watch_linear(m, n.rpartition(".")[2], watch)


def _watch_linear(module: PlainLinear, op: str, watch: LiveTensors) -> None:
    biased = module.bias is not None
    module.register_forward_pre_hook(lambda *_: watch.enter_linear(op, biased))
    module.register_forward_hook(lambda _module, _input, output: watch.leave_linear(output))


# ---- from bytes to products of named sizes


def moments(seen: Iterable[Snapshot], sizes: Mapping[str, int]) -> tuple[Moment, ...]:
    """The moments that may decide the peak, their bytes as products of the named `sizes`.

    A size is recognised by the largest prime in it, which no two sizes may share, but that a size
    may hold another one's (`heads` those of `kv_heads`).
    """
    terms: dict[int, tuple[str, float]] = {}
    found = [_moment(snapshot, sizes, terms) for snapshot in seen]
    return _deciding(found)


def _moment(
    snapshot: Snapshot, sizes: Mapping[str, int], terms: dict[int, tuple[str, float]]
) -> Moment:
    total: Counter[str] = Counter()
    for num_bytes, count in snapshot.live.items():
        if num_bytes not in terms:
            terms[num_bytes] = _product(num_bytes, sizes)
        name, factor = terms[num_bytes]
        total[name] += count * factor  # type: ignore[assignment]  # factors may be halves
    return Moment(
        op=snapshot.op, biased=snapshot.biased, later=snapshot.later, num_bytes=dict(total)
    )


def _product(num_bytes: int, sizes: Mapping[str, int]) -> tuple[str, float]:
    """`num_bytes` as names of sizes joined by "*", and the factor that is left."""
    names, rest = [], Fraction(num_bytes)
    for name, size in sorted(sizes.items(), key=lambda item: -_odd(item[1])):
        odd = _odd(size)
        while rest != 0 and odd > 1 and rest.numerator % odd == 0:
            names.append(name)
            rest /= size
    order = list(sizes)
    return "*".join(sorted(names, key=order.index)), float(rest)


def _odd(size: int) -> int:
    """The odd part, by which a size is recognised: halves and quarters of it are met too."""
    return size // (size & -size)


def _deciding(found: Iterable[Moment]) -> tuple[Moment, ...]:
    """Without moments at which no more was alive, product by product, than at another one."""
    kept: list[Moment] = []
    for moment in sorted(found, key=lambda m: (m.later, bool(m.op), -sum(m.num_bytes.values()))):
        if not any(_covers(other, moment) for other in kept):
            kept = [other for other in kept if not _covers(moment, other)]
            kept.append(moment)
    return tuple(sorted(kept, key=lambda m: (m.later, m.op, sorted(m.num_bytes.items()))))


def _covers(more: Moment, less: Moment) -> bool:
    if more.later and not less.later:
        return False
    if less.op and (more.op, more.biased) != (less.op, less.biased):
        return False
    return all(more.num_bytes.get(name, 0.0) >= size for name, size in less.num_bytes.items())


# ---- the moments of models


@dataclass(frozen=True)
class Primes:
    """Sizes of a micro-batch that no size of a model shares a factor with."""

    requests: int
    tokens: int
    seen: int

    def named(self, phase: str) -> dict[str, int]:
        """The sizes that matter in a phase; in prefill, what is seen are the new tokens."""
        length = {"tokens": self.tokens} if phase == "prefill" else {"seen": self.seen}
        return {"requests": self.requests} | length

    def shape(self, phase: str) -> Shape:
        """The micro-batch of a phase."""
        if phase == "prefill":
            return Shape(self.requests, self.tokens, self.tokens)
        return Shape(self.requests, 1, self.seen)


PRIMES = Primes(10007, 20011, 40009)
OTHER_PRIMES = Primes(10009, 20021, 40013)


def count_activations(
    configs: Iterable[Any], sizes: Mapping[str, int], primes: Primes = PRIMES
) -> Activations:
    """The moments of models alike; `sizes` names their own sizes that may be factors."""
    found: dict[str, list[Snapshot]] = defaultdict(list)
    for config in configs:
        whole = with_layers(config, NUM_LAYERS)
        for phase, start, end in product(PHASES, (0, 1), (NUM_LAYERS - 1, NUM_LAYERS)):
            layers = LayerRange(start, end, NUM_LAYERS)
            place = "_last" if layers.is_last else "_first" if layers.is_first else ""
            found[phase + place] += snapshots(whole, layers, primes.shape(phase))
    parts: dict[str, tuple[Moment, ...]] = {}
    for phase in PHASES:
        known: tuple[Moment, ...] = ()
        for place in (phase, f"{phase}_first", f"{phase}_last"):
            met = moments(found[place], {**primes.named(phase), **sizes})
            parts[place] = tuple(m for m in met if not any(_covers(n, m) for n in known))
            known += parts[place]
    return Activations(**parts)


PHASES = ("prefill", "decode")


def with_layers(config: Any, total: int) -> Any:
    """The same model with `total` layers: those it has, in turn."""
    data, own = config.to_dict(), config.num_hidden_layers
    data.pop("model_type")
    data.pop(config.attribute_map.get("num_hidden_layers"), None)
    data |= {name: _spread(value, own, total) for name, value in data.items() if name not in ROPES}
    data["num_hidden_layers"] = total
    return AutoConfig.for_model(config.model_type, **data)


def _spread(value: Any, own: int, total: int) -> Any:
    """A setting of `own` layers, one by one, as one of `total` layers; any other as it is."""
    if isinstance(value, list | tuple) and len(value) == own:
        return [value[i % own] for i in range(total)]
    if not isinstance(value, dict):
        return value
    for key in (str, int):
        if value and set(value) == {key(i) for i in range(own)}:
            return {key(i): value[key(i % own)] for i in range(total)}
    return {name: _spread(each, own, total) for name, each in value.items()}


# ---- the families that ship

KV_HEADS, HEADS, HEAD_DIM = 13, 13 * 7, 8 * 17
NAMED = {
    "hidden": 2 * 1009 * HEADS,
    "ffn": 2 * 1013,
    "heads": HEADS,
    "kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab": 2 * 1019,
}
# Families whose heads fill the hidden size; what else each may be built with.
WHOLE = NAMED | {"hidden": HEADS * HEAD_DIM}
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "llama": ({},),
    "mistral": ({"sliding_window": None}, {"sliding_window": 4096}),
    "qwen2": ({}, {"use_sliding_window": True, "max_window_layers": 3}),
    "qwen3": ({}, {"use_sliding_window": True, "max_window_layers": 3}),
    "gemma2": ({},),
    "gemma3_text": ({},),
    "opt": ({}, {"enable_bias": False}),
    "bloom": ({}, {"apply_residual_connection_post_layernorm": True}),
    "gpt_neox": ({}, {"use_parallel_residual": False}, {"rotary_pct": 1.0}),
}
FILLED = ("opt", "bloom", "gpt_neox")


def count_families() -> dict[str, Activations]:
    """The table that ships, by family."""
    counted = {}
    for family in VARIANTS:
        if family in FILLED:
            counted[family] = count_family(family, WHOLE)
        else:
            counted[family] = count_family(family, NAMED)
            counted[f"{family}, {ALL_HEADS}"] = count_family(family, NAMED | {"kv_heads": HEADS})
    return counted


def count_family(family: str, sizes: dict[str, int]) -> Activations:
    """The moments of one family at these sizes, of all its variants."""
    configs = [
        AutoConfig.for_model(family, **_configuration(sizes), **variant)
        for variant in VARIANTS[family]
    ]
    named = dict(sizes)
    if sizes["kv_heads"] == sizes["heads"]:
        del named["kv_heads"]
    return count_activations(configs, named)


def _configuration(sizes: Mapping[str, int]) -> dict[str, Any]:
    """Of any family: each takes the keys that it knows."""
    return {
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        "ffn_dim": sizes["ffn"],
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": sizes["heads"],
        "n_head": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "head_dim": sizes["head_dim"],
        "vocab_size": sizes["vocab"],
        "word_embed_proj_dim": sizes["hidden"],
        "max_position_embeddings": 10**6,
        "pad_token_id": 0,
    }


# ---- one model, from its configuration


def count_model(path: Path) -> ModelSpec:
    """The spec of a model that `model_spec` has no table for.

    Raises `UserError` where llmpq cannot cut it into stages, or where what it has alive is no
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
        raise UserError(f"{path}: what it has alive does not grow with its micro-batch")
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


def _linears(layer: nn.Module) -> tuple[Linear, ...]:
    return tuple(
        Linear(
            name=name.rpartition(".")[2],
            out_features=module.out_features,
            in_features=module.in_features,
        )
        for name, module in layer.named_modules()
        if isinstance(module, PlainLinear)
    )


def _heads(config: Any, stage: StageModel) -> dict[str, Any]:
    """Heads and feed-forward width; key-value heads as the cache was really filled."""
    num_layers, seen = config.num_hidden_layers, 2
    cache = LaneCache(num_layers, [LaneShape(1, seen)])
    with torch.inference_mode(), LiveTensors():
        _run(stage, cache, Shape(1, 1, seen))
    held = cache.num_bytes // (num_layers * 2 * seen * torch.bfloat16.itemsize)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads, rest = divmod(held, head_dim)
    if rest:
        raise UserError(f"a token leaves {held} keys, which are no whole heads of {head_dim}")
    widest = max(op.out_features for op in _linears(stage.own_layers[0]))
    return {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn_size": getattr(config, "intermediate_size", None) or widest,
    }


def _params(stage: StageModel, layer: nn.Module) -> dict[str, Any]:
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
    """Weights and the buffers that checkpoints hold, which a stage holds too."""
    if module is None:
        return 0
    buffers = [b for part in module.modules() for b in stored_buffers(part).values()]
    return sum(tensor.numel() for tensor in (*module.parameters(), *buffers))


# ---- on the command line


def main() -> int:
    """Prints the table of all families as JSON."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    print(families_text(count_families()))
    return 0


def families_text(counted: Mapping[str, Activations]) -> str:
    """JSON with one moment a line."""
    blocks = []
    for name, activations in counted.items():
        places = activations.model_dump(mode="json", exclude_defaults=True)
        lines = [
            f' "{place}": [\n' + ",\n".join(f"  {json.dumps(m)}" for m in some) + "\n ]"
            for place, some in places.items()
        ]
        blocks.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(blocks) + "\n}"


if __name__ == "__main__":
    sys.exit(main())
