"""What a pipeline does at once, and the slots of the KV cache that it works on, as values.

A lane is `rows` slots with room for `tokens` tokens each (`LaneShape`). A `Job` is the way of one
micro-batch through all stages: a prefill of some requests' prompts, or a decode step of one lane.
Its `Member`s say which request is in which slot.

Not covered: which job is next (`llmpq.schedule`), what a job costs, and how it is computed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

LEAST_CHUNK = 16


def padded_width(tokens: int) -> int:
    """Rounded up to one of eight widths an octave: kernels are prepared anew for each other one."""
    step = 2 ** max(0, (tokens - 1).bit_length() - 4)
    return -(-tokens // step) * step


def widths_near(width: int) -> list[int]:
    """All values of `padded_width` in the octave of a width, and the width."""
    octave = max(16, 2 ** (width - 1).bit_length())
    step = octave // 16
    return sorted({width, *range(octave // 2 + step, octave + 1, step)})


def chunk_length(prompt_tokens: int, prefill_rows: int, chunk_tokens: int) -> int:
    """Tokens of a long prompt that are computed at once, alone.

    As many as attention was given room for: it takes a micro-batch of `prefill_rows` prompts of
    `chunk_tokens` each.
    """
    most = prefill_rows * chunk_tokens**2 // prompt_tokens
    return min(chunk_tokens, max(LEAST_CHUNK, most))


class LaneShape(NamedTuple):
    """Slots of a lane, and how many tokens each has room for."""

    rows: int
    tokens: int


def slot_columns(tokens: int, window: int | None) -> int:
    """Columns that a slot for so many tokens has in a layer that attends to `window` tokens.

    A layer with a window keeps that many tokens, and one column more, where rows that take no part
    in a step write; without a window the column of a request's last new token serves for that.
    """
    return tokens if window is None else min(tokens, window + 1)


def bounding_window(lanes: Iterable[LaneShape], window: int | None) -> int | None:
    """The window of a layer where it shortens some slot; None where all tokens are kept anyway."""
    is_bound = any(slot_columns(lane.tokens, window) < lane.tokens for lane in lanes)
    return window if is_bound else None


def cache_tokens(lanes: Iterable[LaneShape], window: int | None = None) -> int:
    """Tokens that the slots of all lanes have room for, in a layer with such a window."""
    return sum(lane.rows * slot_columns(lane.tokens, window) for lane in lanes)


class Item(NamedTuple):
    """A request as its lengths; `number` tells it from others."""

    number: int
    prompt_tokens: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        """Columns that its slot must have. The last new token is chosen, but never stored."""
        return self.prompt_tokens + self.new_tokens


class Member(NamedTuple):
    """A row of a job. `position`: which of its new tokens the job chooses, 0 the first."""

    lane: int
    row: int
    prompt_tokens: int
    number: int
    position: int

    @property
    def column(self) -> int:
        """Where a decode step stores its token, which is the token's place in the text."""
        return self.prompt_tokens + self.position - 1


class Move(NamedTuple):
    """A slot's first `end` columns are copied to another slot of its lane."""

    lane: int
    source: int
    target: int
    end: int


@dataclass(frozen=True)
class Job:
    """One micro-batch's way through all stages; `moves` come before it.

    A prefill computes tokens `begin` to `end` of its members' prompts, shorter ones padded on the
    right; a chunk that does not end a prompt chooses no tokens (`chooses`). A decode step computes
    one token of each of its lane's first `rows` rows, which attend to at most `end` columns
    (`begin` is 0); only what members compute is kept.
    """

    prefill: bool
    members: tuple[Member, ...]
    begin: int
    end: int
    rows: int
    chooses: bool = True
    moves: tuple[Move, ...] = ()

    @property
    def lane(self) -> int:
        """Of a decode step."""
        return self.members[0].lane
