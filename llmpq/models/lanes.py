"""Keeps keys and values of one stage in slots, which transformers uses as a `Cache`.

Shapes: R rows of a lane, H key/value heads, T columns of its slots, D size of a head. A layer keeps
the slots of all lanes one after another in `[tokens, H, D]`, so that a job stores its states by one
indexed copy, whichever lanes its members are in. A decode step attends to a view `[R, H, width, D]`
of its lane. `llmpq.schedule` says which columns a job writes and sees. Keys and values may differ
in D: those of latent attention are a latent and a key that all heads share.

Rows that take no part in a step write to the last column of their slot, which no request uses, as
its last new token is chosen but never computed with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from llmpq.job import Job, LaneShape, cache_tokens

Pair = tuple[Tensor, Tensor]  # keys and values


@dataclass(frozen=True)
class StoreIndex:
    """The targets of a prefill's states `[b, S]`: those at (`rows`, `columns`) go to `target`.

    All are `[n]`; without `rows` and `columns` all states are stored, row after row.
    """

    target: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None

    def taken(self, states: Tensor) -> Tensor:
        """The states of `[b, H, S, D]` that are stored, as `[n, H, D]`."""
        tokens = states.transpose(1, 2)
        return tokens.flatten(0, 1) if self.rows is None else tokens[self.rows, self.columns]


class LaneCache:
    """The cache of `num_layers` layers in lanes of the given shapes.

    A layer's buffers are allocated at its first use, when heads, size and dtype are known.
    """

    def __init__(self, num_layers: int, shapes: Sequence[LaneShape]) -> None:
        self.shapes = tuple(shapes)
        self._num_layers = num_layers
        sizes = [shape.rows * shape.tokens for shape in self.shapes]
        self._first_tokens = [0, *accumulate(sizes)]
        self.first_rows = [0, *accumulate(shape.rows for shape in self.shapes)]
        self._buffers: list[Pair | None] = [None] * num_layers

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers that are allocated."""
        return sum(tensor.nbytes for pair in self._buffers if pair for tensor in pair)

    def rearrange(self, job: Job) -> None:
        """Copies the slots that a job moves, and clears those of its new requests.

        Values of earlier requests must be cleared, as NaN would pass through a mask.
        """
        for lane, source, target, end in job.moves:
            for buffer in self._filled:
                slots = self._slots(buffer, lane)
                slots[target, :end] = slots[source, :end]
                slots[target, end:] = 0
        if job.prefill and job.begin == 0:
            for lane in {member.lane for member in job.members}:
                rows = torch.tensor([m.row for m in job.members if m.lane == lane])
                for buffer in self._filled:
                    rows = on_device(rows, buffer.device)
                    self._slots(buffer, lane).index_fill_(0, rows, 0)

    def prefill(self, job: Job, first: int, end: int, device: torch.device) -> "StageCache":
        """The cache for the members `first` to `end` of a prefill."""
        members, width = job.members[first:end], job.end - job.begin
        counts = torch.tensor([min(job.end, m.prompt_tokens) - job.begin for m in members])
        starts = torch.tensor([self._token(m.lane, m.row) + job.begin for m in members])
        rows = torch.arange(len(members)).repeat_interleave(counts)
        columns = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        target = on_device(starts[rows] + columns, device)
        if len(rows) == len(members) * width:
            stored = StoreIndex(target)
        else:
            stored = StoreIndex(target, on_device(rows, device), on_device(columns, device))
        seen = (int(starts[0]) - job.begin, job.end) if job.begin else None
        return self.prompts(stored, job.begin, seen)

    def prompts(
        self, stored: StoreIndex, begin: int, seen: tuple[int, int] | None = None
    ) -> "StageCache":
        """The cache for tokens from `begin` on; those of a chunk see `seen` (first, count)."""
        layers = [_Prefill(self, i, stored, begin, seen) for i in range(self._num_layers)]
        return StageCache(layers, begin)

    def step(
        self, lane: int, rows: range, width: int, columns: Tensor, tokens: Tensor
    ) -> "StageCache":
        """The cache for some rows of a lane that attend to `width` columns.

        `columns` `[rows]` holds the column of each row's token in its text, `tokens` `[rows]` the
        position in the buffers where its states are stored (`step_tokens`).
        """
        layers = [_Step(self, i, lane, rows, width, tokens) for i in range(self._num_layers)]
        return StageCache(layers, columns)

    def step_tokens(self, job: Job, rows: int) -> list[int]:
        """The position in the buffers that each of the first `rows` of a job's lane writes."""
        tokens = [self._token(job.lane, row + 1) - 1 for row in range(rows)]
        for member in job.members:
            tokens[member.row] = self._token(job.lane, member.row) + member.column
        return tokens

    def pair(self, layer: int, keys: Tensor, values: Tensor) -> Pair:
        """Keys and values `[tokens, H, D]` of a layer, allocated like these `[..., H, t, D]`."""
        pair = self._buffers[layer]
        if pair is None:
            total = cache_tokens(self.shapes)
            sizes = [(total, states.shape[1], states.shape[3]) for states in (keys, values)]
            pair = self._buffers[layer] = keys.new_zeros(sizes[0]), values.new_zeros(sizes[1])
        return pair

    def view(self, buffer: Tensor, lane: int, rows: range, width: int) -> Tensor:
        """The view `[rows, H, width, D]` of some rows of a lane."""
        return self._slots(buffer, lane)[rows.start : rows.stop, :width].transpose(1, 2)

    @property
    def _filled(self) -> list[Tensor]:
        return [buffer for pair in self._buffers if pair for buffer in pair]

    def _slots(self, buffer: Tensor, lane: int) -> Tensor:
        """The view `[R, T, H, D]` of a lane."""
        shape, first = self.shapes[lane], self._first_tokens[lane]
        return buffer[first : first + shape.rows * shape.tokens].unflatten(0, shape)

    def _token(self, lane: int, row: int) -> int:
        """The position of a slot in the buffers."""
        return self._first_tokens[lane] + row * self.shapes[lane].tokens


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; a card copies it from pinned memory without waiting."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class StageCache(Cache):
    """The cache of one job for transformers. `offset` is the column of the query tokens."""

    def __init__(self, layers: list[Any], offset: int | Tensor) -> None:
        super().__init__(layers=layers)
        self._offset = offset

    def from_layer(self, first: int) -> "StageCache":
        """The cache of a stage that starts at layer `first`, by the whole model's indices.

        Layers before it store nothing; transformers asks the first one how much is stored.
        """
        return StageCache([self.layers[0]] * first + self.layers, self._offset)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """The column of the query tokens: one for all rows, or `[R]` of each."""
        return self._offset


class _Layer(CacheLayerMixin):
    """The cache of one layer in a job; `past` is the number of stored columns it reports."""

    is_sliding = False  # windows are applied by the mask; every token stays stored

    def __init__(self, cache: LaneCache, layer: int, past: int) -> None:
        super().__init__()
        self.cache, self.layer, self.past = cache, layer, past

    def get_seq_length(self) -> int:
        return self.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.past + query_length, 0

    def get_max_length(self) -> int:
        return max(shape.tokens for shape in self.cache.shapes)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass


class _Prefill(_Layer):
    """Stores whole prompts, padded on the right, or a chunk, which sees `seen` tokens."""

    def __init__(
        self,
        cache: LaneCache,
        layer: int,
        stored: StoreIndex,
        past: int,
        seen: tuple[int, int] | None,
    ) -> None:
        super().__init__(cache, layer, past)
        self.stored, self.seen = stored, seen

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        pair = self.cache.pair(self.layer, key_states, value_states)
        for buffer, states in zip(pair, (key_states, value_states), strict=True):
            buffer.index_copy_(0, self.stored.target, self.stored.taken(states))
        if self.seen is None:
            return key_states, value_states
        first, count = self.seen
        return tuple(buffer[first : first + count].transpose(0, 1)[None] for buffer in pair)


class _Step(_Layer):
    """Stores one token of each of some rows of a lane."""

    def __init__(
        self, cache: LaneCache, layer: int, lane: int, rows: range, width: int, tokens: Tensor
    ) -> None:
        super().__init__(cache, layer, width - 1)
        self.lane, self.rows, self.width, self.tokens = lane, rows, width, tokens

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        pair = self.cache.pair(self.layer, key_states, value_states)
        for buffer, states in zip(pair, (key_states, value_states), strict=True):
            buffer.index_copy_(0, self.tokens, states[:, :, 0])
        return tuple(self.cache.view(buffer, self.lane, self.rows, self.width) for buffer in pair)
