"""Keys and values of a whole batch, in one buffer a layer, seen by transformers as a `Cache`.

Shapes: B requests of the batch, H key/value heads, T tokens, D size of a head.
A layer's buffers are `[B, H, T, D]`, made once for the largest batch. A micro-batch is a slice of
requests and works on views, so prefill and decode may cut the batch differently at no cost.
All requests of a batch are padded on the left to one length and so share `past`.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class KVCache:
    """The cache of one stage: `num_layers` layers, `max_batch` requests, `max_tokens` each.

    Buffers are made at a layer's first use, when heads, size and dtype are known, at full size.
    """

    def __init__(self, num_layers: int, max_batch: int, max_tokens: int) -> None:
        self._num_layers = num_layers
        self._clear(max_batch, max_tokens)

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        held = [t for t in (*self._keys, *self._values) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)

    def view(self, start: int, end: int, past: int) -> Cache:
        """Requests `start` to `end` with `past` tokens already stored, as transformers' `Cache`."""
        assert end <= self.max_batch, (end, self.max_batch)
        return Cache(layers=[_LayerView(self, i, start, end, past) for i in range(len(self._keys))])

    def resize(self, max_batch: int, max_tokens: int) -> None:
        """A new capacity; what is stored is dropped if it differs from the old one."""
        if (max_batch, max_tokens) != (self.max_batch, self.max_tokens):
            self._clear(max_batch, max_tokens)

    def _clear(self, max_batch: int, max_tokens: int) -> None:
        self.max_batch, self.max_tokens = max_batch, max_tokens
        self._keys: list[torch.Tensor | None] = [None] * self._num_layers
        self._values: list[torch.Tensor | None] = [None] * self._num_layers

    def store(
        self, layer: int, start: int, end: int, past: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends `[b, H, t, D]` and returns views `[b, H, past + t, D]` of all that is stored."""
        stop = past + keys.shape[2]
        assert stop <= self.max_tokens, (stop, self.max_tokens)
        if self._keys[layer] is None:
            self._keys[layer] = self._buffer(keys)
            self._values[layer] = self._buffer(values)
        key_buffer, value_buffer = self._keys[layer], self._values[layer]
        assert key_buffer is not None and value_buffer is not None
        key_buffer[start:end, :, past:stop] = keys
        value_buffer[start:end, :, past:stop] = values
        return key_buffer[start:end, :, :stop], value_buffer[start:end, :, :stop]

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        _, heads, _, size = like.shape
        return like.new_zeros(self.max_batch, heads, self.max_tokens, size)


class _LayerView(CacheLayerMixin):
    """One layer of a micro-batch."""

    is_sliding = False  # windows are applied by the mask; every token stays stored

    def __init__(self, cache: KVCache, layer: int, start: int, end: int, past: int) -> None:
        super().__init__()
        self._cache, self._layer = cache, layer
        self._start, self._end, self._past = start, end, past

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._cache.store(
            self._layer, self._start, self._end, self._past, key_states, value_states
        )

    def get_seq_length(self) -> int:
        return self._past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._past + query_length, 0

    def get_max_length(self) -> int:
        return self._cache.max_tokens

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass
