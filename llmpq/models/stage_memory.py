"""Which tensors a stage holds in one micro-batch, as allocation snapshots in named sizes.

A stage is built on the meta device (no memory, no weights) and run there as the runtime runs it,
while `LiveTensors` records every allocation. Sizes are primes, so the bytes of a tensor factor into
the sizes that they are a product of: `requests`, `tokens`, and for the families that `costs.memory`
knows also `hidden`, `ffn` and so on. An `AllocationSnapshot` holds all tensors that were alive at
one time, as such products; snapshots that can never be the peak are dropped.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from llmpq.job import LaneShape
from llmpq.model_spec import AllocationSnapshot
from llmpq.models.lanes import LaneCache, StoreIndex
from llmpq.models.live_tensors import LiveTensors, TensorSnapshot
from llmpq.models.stage_model import LayerRange, StageModel
from llmpq.quant import PlainLinear

META = torch.device("meta")


@dataclass(frozen=True)
class MicroBatchShape:
    """A micro-batch of `requests` with `tokens` new tokens each, which see `seen` tokens."""

    requests: int
    tokens: int
    seen: int


def snapshots(
    config: Any,
    layers: LayerRange,
    shape: MicroBatchShape,
    kinds: Sequence[int | None] | None = None,
) -> list[TensorSnapshot]:
    """Snapshots of a stage that runs one micro-batch, as in the runtime's warm-up.

    `kinds` of all layers of the model, where these differ.
    """
    stage = StageModel(config, layers, ["16"] * layers.count, torch.bfloat16, META)
    cache = LaneCache(layers.count, [LaneShape(shape.requests, shape.seen)])
    watch = LiveTensors()
    with torch.inference_mode():
        with LiveTensors():
            run_on_meta(stage, cache, shape)  # makes the buffers of the cache
        own = [None] * layers.count if kinds is None else kinds[layers.first : layers.end]
        for hook in _hooks(stage, watch, own):
            hook()
        with watch:
            run_on_meta(stage, cache, shape)
    return watch.snapshots


def run_on_meta(stage: StageModel, cache: LaneCache, shape: MicroBatchShape) -> None:
    """Runs a job as a worker does; its input stays alive to the end."""
    requests, tokens = shape.requests, shape.tokens
    if stage.layers.is_first:
        given = stage.embed(_integers(requests, tokens))  # ids are counted in `costs.memory`
    else:
        size = (requests, tokens, stage.config.hidden_size)
        given = torch.empty(size, dtype=stage.dtype, device=META)
    columns, positions = _integers(requests), _integers(requests, tokens)
    if tokens == shape.seen:
        every = _integers(requests * tokens)  # as if one prompt were a little shorter
        view = cache.prompts([StoreIndex(every, every.clone(), every.clone())])
    else:
        view = cache.step(0, range(requests), shape.seen, columns, columns[None])
    hidden = stage.run(given, positions, view)
    if stage.layers.is_last:
        logits = stage.head(hidden[:, -1])
        logits.argmax(dim=-1)
        torch.isfinite(logits).all(dim=-1)


def _integers(*shape: int) -> torch.Tensor:
    with torch.device(META):
        return torch.zeros(shape, dtype=torch.int64)


def _hooks(stage: StageModel, watch: LiveTensors, kinds: Sequence[int | None]) -> Iterator[Any]:
    """Functions that each install one hook: around every linear, and on the layers."""
    for index, layer in enumerate(stage.own_layers):
        yield lambda layer=layer, index=index: layer.register_forward_pre_hook(
            lambda *_: watch.enter_layer(index > 0, kinds[index])
        )
        yield lambda layer=layer: layer.register_forward_hook(
            lambda *_: watch.enter_layer(False, None)
        )
        for name, module in layer.named_modules():
            if isinstance(module, PlainLinear):
                yield lambda m=module, n=name: _watch_linear(m, n.rpartition(".")[2], watch)


def _watch_linear(module: PlainLinear, op: str, watch: LiveTensors) -> None:
    biased = module.bias is not None
    module.register_forward_pre_hook(lambda *_: watch.enter_linear(op, biased))
    module.register_forward_hook(lambda _module, _input, output: watch.leave_linear(output))


# ---- from bytes to products of named sizes


def snapshot_table(
    seen: Iterable[TensorSnapshot], sizes: Mapping[str, int]
) -> tuple[AllocationSnapshot, ...]:
    """The snapshots that may be the peak, with bytes as products of the named `sizes`.

    A size is recognized by its largest prime, which no two sizes may share; only a multiple of
    another size may (`heads` of `kv_heads`).
    """
    terms: dict[int, tuple[str, float]] = {}
    found = [_moment(snapshot, sizes, terms) for snapshot in seen]
    return _deciding(found)


def _moment(
    snapshot: TensorSnapshot, sizes: Mapping[str, int], terms: dict[int, tuple[str, float]]
) -> AllocationSnapshot:
    total: Counter[str] = Counter()
    for num_bytes, count in snapshot.live.items():
        if num_bytes not in terms:
            terms[num_bytes] = _product(num_bytes, sizes)
        name, factor = terms[num_bytes]
        total[name] += count * factor  # type: ignore[assignment]  # factors may be halves
    return AllocationSnapshot(
        op=snapshot.op,
        biased=snapshot.biased,
        later=snapshot.later,
        kind=snapshot.kind,
        num_bytes=dict(total),
    )


def _product(num_bytes: int, sizes: Mapping[str, int]) -> tuple[str, float]:
    """`num_bytes` as names of sizes joined by "*", and the remaining factor."""
    names, rest = [], Fraction(num_bytes)
    for name, size in sorted(sizes.items(), key=lambda item: -_odd(item[1])):
        odd = _odd(size)
        while rest != 0 and odd > 1 and rest.numerator % odd == 0:
            names.append(name)
            rest /= size
    order = list(sizes)
    return "*".join(sorted(names, key=order.index)), float(rest)


def _odd(size: int) -> int:
    """The odd part, by which a size is recognized, as halves and quarters of it occur too."""
    return size // (size & -size)


def _deciding(found: Iterable[AllocationSnapshot]) -> tuple[AllocationSnapshot, ...]:
    """The snapshots that no other one covers, product by product."""
    kept: list[AllocationSnapshot] = []
    for snapshot in sorted(found, key=lambda m: (m.later, bool(m.op), -sum(m.num_bytes.values()))):
        if not any(covers(other, snapshot) for other in kept):
            kept = [other for other in kept if not covers(snapshot, other)]
            kept.append(snapshot)
    return tuple(
        sorted(kept, key=lambda m: (m.later, m.op, sorted(m.num_bytes.items()), m.kind or 0))
    )


def covers(more: AllocationSnapshot, less: AllocationSnapshot) -> bool:
    """Whether `more` needs at least the memory of `less` at all sizes."""
    if (more.later and not less.later) or more.kind not in (None, less.kind):
        return False
    if less.op and (more.op, more.biased) != (less.op, less.biased):
        return False
    return all(more.num_bytes.get(name, 0.0) >= size for name, size in less.num_bytes.items())
