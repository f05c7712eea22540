"""One device that keeps part of the weights and of the cache in its host's memory.

After FlexGen (arXiv 2303.06865): a block of requests, several micro-batches of them, goes through
the model layer by layer, so that all share one load of a layer's weights. What a layer needs of
the host comes while the layer before it computes, and what it leaves there goes meanwhile: a layer
takes as long as the slowest of its arithmetic, its loads (weights and cache share the way in) and
its stores (new cache; the way out is a wire of its own). What lies on the device is free.

On the device: the shares of weights and cache that stay there; for what does not, room for two
layers' weights and for a micro-batch's cache of one layer; embedding, head and activations whole.
Bytes are linear in the shares. Not covered: disks, attention computed on the host, a packed cache,
activations kept on the host, latencies of transfers, how much memory the host has.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmpq.costs import memory
from llmpq.costs.links import Seconds
from llmpq.job import LaneShape
from llmpq.machine import TORCH_CARD, Machine
from llmpq.model_spec import ModelSpec

Share = Any  # a float from 0 to 1, or a numpy array of them

BUFFERED_LAYERS = 2  # one computes, the next one is loaded
STEPS = 40  # of the weights' share, where it is searched


@dataclass(frozen=True)
class OffloadMemory:
    """Bytes of a whole model and of a block's cache; buffers are for what is not on the device."""

    always: int
    weights: int
    cache: int
    weights_buffer: int
    cache_buffer: int

    def device_bytes(self, weights_share: Share, cache_share: Share) -> Any:
        """What the device holds where these shares stay on it."""
        weights = _part(weights_share, self.weights, self.weights_buffer)
        return self.always + weights + _part(cache_share, self.cache, self.cache_buffer)

    def host_bytes(self, weights_share: Share, cache_share: Share) -> Any:
        """What the host holds of the rest."""
        return (1 - weights_share) * self.weights + (1 - cache_share) * self.cache


def _part(share: Share, whole: int, buffer: int) -> Any:
    return share * whole + (1 - share) * buffer


def offload_memory(
    spec: ModelSpec,
    precision: str,
    *,
    batch: int,
    micro_batch: int,
    cache_tokens: int,
    prompt_tokens: int,
    machine: Machine = TORCH_CARD,
) -> OffloadMemory:
    """Memory of a block of `batch` requests; prompts padded to the longest."""
    number = Counter(spec.kind_of_layers)
    weights = [memory.layer_weight_bytes(kind, precision, machine) for kind in spec.kind_specs]
    one = [LaneShape(1, cache_tokens)]
    cache = [memory.layer_cache_bytes(kind, one) for kind in spec.kind_specs]
    lanes = (LaneShape(micro_batch, cache_tokens),) * -(-batch // micro_batch)
    sizes = memory.RunSizes(lanes, micro_batch, prompt_tokens, prompt_tokens, num_stages=1)
    machine = replace(machine, graphs=False)  # weights come and go between the layers of a step
    activations = memory.activation_bytes(
        spec, sizes, first=True, last=True, precisions=(precision,), machine=machine
    )
    ends = memory.end_weight_bytes(spec, first=True, last=True)
    return OffloadMemory(
        always=ends + activations,
        weights=sum(number[kind] * num_bytes for kind, num_bytes in enumerate(weights)),
        cache=batch * sum(number[kind] * num_bytes for kind, num_bytes in enumerate(cache)),
        weights_buffer=min(spec.num_layers, BUFFERED_LAYERS) * max(weights),
        cache_buffer=micro_batch * max(cache),
    )


def shares(held: OffloadMemory, capacity: float) -> tuple[np.ndarray, np.ndarray]:
    """Shares of weights and of cache on the device, [K] each, that fill it; none where K = 0.

    More of either is never slower, so only these count: the weights' share in steps from where the
    cache just fits whole up to the largest; the cache's as large as is left.
    """
    room = capacity - held.device_bytes(0.0, 0.0)
    if room < 0:
        return np.zeros(0), np.zeros(0)
    weights = max(held.weights - held.weights_buffer, 1)
    cache = max(held.cache - held.cache_buffer, 1)
    least = float(np.clip((room - cache) / weights, 0.0, 1.0))
    most = min(1.0, room / weights)
    weights_share = np.unique(np.clip(np.linspace(0, 1, STEPS + 1), least, most))
    cache_share = np.clip((room - weights_share * weights) / cache, 0.0, 1.0)
    return weights_share, cache_share


def layer_s(
    compute_s: Seconds, loaded_bytes: Any, stored_bytes: Any, bytes_per_s: float
) -> Seconds:
    """One layer of a whole block: arithmetic, loads and stores at the same time."""
    transfers = np.maximum(loaded_bytes, stored_bytes) / bytes_per_s
    return np.maximum(compute_s, transfers)
