"""Keeps keys and values of one stage in slots, which transformers uses as a `Cache`.

Shapes: R rows of a lane, H key/value heads, T columns of its slots, D size of a head. A layer keeps
the slots of all lanes one after another in `[tokens, H, D]`, so that a job stores its states by one
indexed copy, whichever lanes its members are in. A decode step attends to a view `[R, H, width, D]`
of its lane. `llmpq.schedule` says which columns a job writes and sees. Keys and values may differ
in D: those of latent attention are a latent and a key that all heads share.

The slots of a layer with a window of W tokens are rings (`SlotLayout`): the token at position p of
a text is in column p mod W, where it replaces the one that has left the window. Keys hold their
positions, so their order does not matter; masks are made of the positions that columns hold.

Rows that take no part in a step write to the last column of their slot, which no request uses, as
its last new token is chosen but never computed with. Rings have a column more for that.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from llmpq.job import Job, LaneShape, Member, bounding_window, cache_tokens, slot_columns

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


@dataclass(frozen=True)
class EarlierTokens:
    """What a chunk from `begin` on sees of its slot: the `count` tokens before it.

    They lie in the buffers from `first` on, as a ring of `count` columns where that is less than
    `begin`.
    """

    first: int
    begin: int
    count: int

    def before(self, buffer: Tensor) -> Tensor:
        """The stored states `[count, H, D]` of a buffer, in the order of the text."""
        stored = buffer[self.first : self.first + self.count]
        return stored.roll(-(self.begin % self.count), 0) if self.count < self.begin else stored


class SlotLayout:
    """Where the slots of all lanes lie in the buffers of a layer with such a window.

    `window` is None where slots keep all tokens.
    """

    def __init__(self, shapes: Sequence[LaneShape], window: int | None) -> None:
        self.window = window
        self.num_tokens = cache_tokens(shapes, window)
        self._lanes = [LaneShape(rows, slot_columns(tokens, window)) for rows, tokens in shapes]
        self._first_tokens = [0, *accumulate(lane.rows * lane.tokens for lane in self._lanes)]

    def kept(self, tokens: int) -> int:
        """How many of so many tokens a slot keeps."""
        return tokens if self.window is None else min(tokens, self.window)

    def column(self, position: Any) -> Any:
        """The column of the token at a position of a text, a number or a tensor."""
        return position if self.window is None else position % self.window

    def slots(self, buffer: Tensor, lane: int) -> Tensor:
        """The view `[R, T, H, D]` of a lane."""
        shape, first = self._lanes[lane], self._first_tokens[lane]
        return buffer[first : first + shape.rows * shape.tokens].unflatten(0, shape)

    def token(self, lane: int, row: int) -> int:
        """The position of a slot in the buffers."""
        return self._first_tokens[lane] + row * self._lanes[lane].tokens

    def stored(self, job: Job, members: Sequence[Member], device: torch.device) -> StoreIndex:
        """Where the states of some members of a prefill go: of each, the last that are kept."""
        counts = torch.tensor([min(job.end, m.prompt_tokens) - job.begin for m in members])
        kept = counts if self.window is None else counts.clamp(max=self.window)
        starts = torch.tensor([self.token(m.lane, m.row) for m in members])
        rows = torch.arange(len(members)).repeat_interleave(kept)
        columns = torch.arange(len(rows)) - (kept.cumsum(0) - counts)[rows]
        target = on_device(starts[rows] + self.column(columns + job.begin), device)
        if len(rows) == len(members) * (job.end - job.begin):
            return StoreIndex(target)
        return StoreIndex(target, on_device(rows, device), on_device(columns, device))

    def step_tokens(self, job: Job, rows: int) -> list[int]:
        """The position in the buffers that each of the first `rows` of a job's lane writes."""
        tokens = [self.token(job.lane, row + 1) - 1 for row in range(rows)]
        for member in job.members:
            tokens[member.row] = self.token(job.lane, member.row) + self.column(member.column)
        return tokens


class LaneCache:
    """The cache of `num_layers` layers in lanes of the given shapes.

    `windows`: of every layer, the most tokens that it attends to; None, as for all layers where
    nothing is given: all. Layers whose slots are alike share a layout (`layouts`). A layer's
    buffers are allocated at its first use, when heads, size and dtype are known.
    """

    def __init__(
        self,
        num_layers: int,
        shapes: Sequence[LaneShape],
        windows: Sequence[int | None] | None = None,
    ) -> None:
        self.shapes = tuple(shapes)
        own = windows or (None,) * num_layers
        assert len(own) == num_layers
        bounding = [bounding_window(self.shapes, window) for window in own]
        known = list(dict.fromkeys(bounding))
        self.layouts = [SlotLayout(self.shapes, window) for window in known]
        self._layout_of = [known.index(window) for window in bounding]
        self.first_rows = [0, *accumulate(shape.rows for shape in self.shapes)]
        self._buffers: list[Pair | None] = [None] * num_layers

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers that are allocated."""
        return sum(tensor.nbytes for pair in self._buffers if pair for tensor in pair)

    def layout(self, layer: int) -> SlotLayout:
        """Where the slots of a layer lie."""
        return self.layouts[self._layout_of[layer]]

    def rearrange(self, job: Job) -> None:
        """Copies the slots that a job moves, and clears those of its new requests.

        Values of earlier requests must be cleared, as NaN would pass through a mask.
        """
        for lane, source, target, end in job.moves:
            for layout, buffer in self._filled:
                slots, kept = layout.slots(buffer, lane), layout.kept(end)
                slots[target, :kept] = slots[source, :kept]
                slots[target, kept:] = 0
        if job.prefill and job.begin == 0:
            for lane in {member.lane for member in job.members}:
                rows = torch.tensor([m.row for m in job.members if m.lane == lane])
                for layout, buffer in self._filled:
                    rows = on_device(rows, buffer.device)
                    layout.slots(buffer, lane).index_fill_(0, rows, 0)

    def prefill(self, job: Job, first: int, end: int, device: torch.device) -> "StageCache":
        """The cache for the members `first` to `end` of a prefill; those of a chunk are one."""
        members = job.members[first:end]
        stored = [layout.stored(job, members, device) for layout in self.layouts]
        if job.begin == 0:
            return self.prompts(stored)
        starts = [layout.token(members[0].lane, members[0].row) for layout in self.layouts]
        seen = [
            EarlierTokens(start, job.begin, layout.kept(job.begin))
            for start, layout in zip(starts, self.layouts, strict=True)
        ]
        return self.prompts(stored, job.begin, seen)

    def prompts(
        self,
        stored: Sequence[StoreIndex],
        begin: int = 0,
        seen: Sequence[EarlierTokens] | None = None,
    ) -> "StageCache":
        """The cache for tokens from `begin` on, of a chunk that sees earlier ones if `seen`.

        `stored` and `seen` are by layout.
        """
        layers = [
            _Prefill(self, layer, stored[place], begin, seen[place] if seen else None)
            for layer, place in enumerate(self._layout_of)
        ]
        return StageCache(layers, begin)

    def step(
        self, lane: int, rows: range, width: int, columns: Tensor, tokens: Tensor
    ) -> "StageCache":
        """The cache for some rows of a lane that attend to `width` columns, or to their window.

        `columns` `[rows]` holds the place of each row's token in its text, `tokens`
        `[layouts, rows]` the positions in the buffers where its states are stored (`step_tokens`).
        """
        layers = [
            _Step(self, layer, lane, rows, width, columns, tokens[place])
            for layer, place in enumerate(self._layout_of)
        ]
        return StageCache(layers, columns)

    def step_tokens(self, job: Job, rows: int) -> list[list[int]]:
        """For every layout, the positions in the buffers that a job's first `rows` rows write."""
        return [layout.step_tokens(job, rows) for layout in self.layouts]

    def pair(self, layer: int, keys: Tensor, values: Tensor) -> Pair:
        """Keys and values `[tokens, H, D]` of a layer, allocated like these `[..., H, t, D]`."""
        pair = self._buffers[layer]
        if pair is None:
            total = self.layout(layer).num_tokens
            sizes = [(total, states.shape[1], states.shape[3]) for states in (keys, values)]
            pair = self._buffers[layer] = keys.new_zeros(sizes[0]), values.new_zeros(sizes[1])
        return pair

    @property
    def _filled(self) -> Iterable[tuple[SlotLayout, Tensor]]:
        """The buffers that are allocated, with their layouts."""
        pairs = enumerate(self._buffers)
        return [(self.layout(layer), buffer) for layer, pair in pairs if pair for buffer in pair]


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
    """The cache of one layer in a job; `past` is the number of stored columns it reports.

    transformers makes the masks of layers with windows by the first layer that `is_sliding`.
    """

    def __init__(self, cache: LaneCache, layer: int, past: int) -> None:
        super().__init__()
        self.cache, self.layer, self.past = cache, layer, past
        self.layout = cache.layout(layer)
        self.is_sliding = self.layout.window is not None

    def get_seq_length(self) -> int:
        return self.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        return self.past + query_length, 0

    def get_max_length(self) -> int:
        return max(shape.tokens for shape in self.cache.shapes)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass


class _Prefill(_Layer):
    """Stores whole prompts, padded on the right, or a chunk, which sees what is before it."""

    def __init__(
        self,
        cache: LaneCache,
        layer: int,
        stored: StoreIndex,
        begin: int,
        seen: EarlierTokens | None,
    ) -> None:
        super().__init__(cache, layer, begin)
        self.stored, self.seen = stored, seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """How many keys there are, and the position of the first one."""
        count = self.seen.count if self.seen else 0
        return count + query_length, self.past - count

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        pair, given = self.cache.pair(self.layer, key_states, value_states), []
        for buffer, states in zip(pair, (key_states, value_states), strict=True):
            if self.seen is not None and self.is_sliding:  # storing replaces what a chunk sees
                before = self.seen.before(buffer).transpose(0, 1)[None]
                given.append(torch.cat((before, states), dim=2))
            buffer.index_copy_(0, self.stored.target, self.stored.taken(states))
        if self.seen is None:
            return key_states, value_states
        if self.is_sliding:
            return tuple(given)
        first, end = self.seen.first, self.seen.first + self.past + key_states.shape[2]
        return tuple(buffer[first:end].transpose(0, 1)[None] for buffer in pair)


class _Step(_Layer):
    """Stores one token of each of some rows of a lane."""

    def __init__(
        self,
        cache: LaneCache,
        layer: int,
        lane: int,
        rows: range,
        width: int,
        columns: Tensor,
        tokens: Tensor,
    ) -> None:
        super().__init__(cache, layer, width - 1)
        self.lane, self.rows, self.width = lane, rows, self.layout.kept(width)
        self.columns, self.tokens = columns, tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """How many columns are attended to, and the first one's position, or `[R, T]` of each."""
        window = self.layout.window
        return self.width, 0 if window is None else held(self.columns, self.width, window)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        pair = self.cache.pair(self.layer, key_states, value_states)
        for buffer, states in zip(pair, (key_states, value_states), strict=True):
            buffer.index_copy_(0, self.tokens, states[:, :, 0])
        span = slice(self.rows.start, self.rows.stop)
        return tuple(
            self.layout.slots(buffer, self.lane)[span, : self.width].transpose(1, 2)
            for buffer in pair
        )


def held(newest: Tensor, width: int, window: int) -> Tensor:
    """The positions `[R, width]` of the tokens in the first columns of rings of `window` columns.

    `newest` `[R]` is the position of the last token of each. Columns that hold none are below 0.
    """
    columns = torch.arange(width, device=newest.device)
    ages = (newest[:, None] - columns).remainder_(window)
    return ages.neg_().add_(newest[:, None])
