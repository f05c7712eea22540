"""Keys and values of one stage in lanes, seen by transformers as a `Cache`.

Shapes: R rows of a lane, H key/value heads, T columns, D size of a head. A layer's buffers of a
lane are `[R, H, T, D]`; a decode step works on views of them. Which columns a job writes and sees
is said by `llmpq.schedule`; a row's columns before its prompt hold zeros or what was finite.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from llmpq.schedule import Job, LaneShape, Member

Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values


class LaneCache:
    """The cache of `num_layers` layers in lanes of the given shapes.

    A layer's buffers are made at its first use, when heads, size and dtype are known.
    """

    def __init__(self, num_layers: int, shapes: Sequence[LaneShape]) -> None:
        self.shapes = tuple(shapes)
        self._num_layers = num_layers
        self._lanes: list[list[Pair]] = [[] for _ in range(num_layers)]

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        pairs = [pair for lanes in self._lanes for pair in lanes]
        return sum(tensor.nbytes for pair in pairs for tensor in pair)

    def rearrange(self, job: Job) -> None:
        """What comes before a job: columns shift, rows move."""
        for lane, first, end, by in job.shifts:
            for buffer in self._buffers(lane):
                buffer[:, :, first + by : end + by] = buffer[:, :, first:end].clone()
        for lane, source, target, end in job.moves:
            for buffer in self._buffers(lane):
                buffer[target, :, :end] = buffer[source, :, :end]

    def view(self, job: Job, first: int, end: int) -> Cache:
        """For the job's members `first` to `end`, or in a decode step its lane's rows."""
        layers = range(self._num_layers)
        if not job.prefill:
            rows = [member.row for member in job.members if first <= member.row < end]
            return Cache(layers=[_Step(self, i, job, (first, end), rows) for i in layers])
        members = job.members[first:end]
        return Cache(layers=[_Prompts(self, i, job, members) for i in layers])

    def pair(self, layer: int, lane: int, like: torch.Tensor) -> Pair:
        """Keys and values `[R, H, T, D]` of a lane; `like` is `[..., H, t, D]`."""
        if not self._lanes[layer]:
            heads, size = like.shape[1], like.shape[3]
            self._lanes[layer] = [
                (
                    like.new_zeros(shape.rows, heads, shape.tokens, size),
                    like.new_zeros(shape.rows, heads, shape.tokens, size),
                )
                for shape in self.shapes
            ]
        return self._lanes[layer][lane]

    def _buffers(self, lane: int) -> list[torch.Tensor]:
        return [buffer for lanes in self._lanes if lanes for buffer in lanes[lane]]


class _Layer(CacheLayerMixin):
    """One layer of a job; `past` tokens are stored already."""

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

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass


class _Prompts(_Layer):
    """Whole prompts, padded on the left, or a chunk of one."""

    def __init__(self, cache: LaneCache, layer: int, job: Job, members: Sequence[Member]) -> None:
        super().__init__(cache, layer, job.begin)
        self.job, self.members = job, members

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> Any:
        for index, member in enumerate(self.members):
            pair = self.cache.pair(self.layer, member.lane, key_states)
            for buffer, states in zip(pair, (key_states, value_states), strict=True):
                self._store(buffer[member.row], member, states[index])
        if not self.past:
            return key_states, value_states
        (member,) = self.members
        seen = slice(member.start, member.start + self.job.end)
        pair = self.cache.pair(self.layer, member.lane, key_states)
        return tuple(buffer[member.row : member.row + 1, :, seen] for buffer in pair)

    def _store(self, row: torch.Tensor, member: Member, states: torch.Tensor) -> None:
        """`states` `[H, t, D]`: the last of them are the member's own."""
        count = min(states.shape[1], member.prompt_tokens)
        first = member.start + self.job.begin
        if not self.past:
            row.zero_()  # whatever an earlier request left: NaN would reach through a mask
        row[:, first : first + count] = states[:, states.shape[1] - count :]


class _Step(_Layer):
    """One token of each of a lane's rows; members store theirs."""

    def __init__(
        self, cache: LaneCache, layer: int, job: Job, rows: tuple[int, int], members: list[int]
    ) -> None:
        super().__init__(cache, layer, job.end - job.begin - 1)
        self.job, self.rows, self.members = job, rows, members

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> Any:
        pair = self.cache.pair(self.layer, self.job.lane, key_states)
        for buffer, states in zip(pair, (key_states, value_states), strict=True):
            self._store(buffer, states)
        first, end = self.rows
        return tuple(buffer[first:end, :, self.job.begin : self.job.end] for buffer in pair)

    def _store(self, buffer: torch.Tensor, states: torch.Tensor) -> None:
        """`states` `[rows, H, 1, D]`."""
        (first, end), column = self.rows, self.job.end - 1
        if len(self.members) == end - first:
            buffer[first:end, :, column] = states[:, :, 0]
        else:
            own = [row - first for row in self.members]
            buffer[self.members, :, column] = states[own, :, 0]
