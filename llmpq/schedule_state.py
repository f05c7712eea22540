"""What a schedule knows of requests: those in slots, by lane, and those that wait for a slot.

A lane keeps its due rows, those that take part in its next step, until a request comes, moves or
ends: nearly every step has the rows of the one before.

Not covered: which job is next (`llmpq.schedule`).
"""

import math
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from llmpq.job import Item, LaneShape, Move

WINDOW = 100_000  # requests that are looked at ahead of their turn
BLOCKS = 16  # more requests are looked at when one in so many of the window is left
NEAR = 64  # of them, how many are looked at for a prompt of like length
PADDED = 1.25  # a prefill micro-batch is at most so much longer than its prompts


@dataclass(eq=False)
class Row:
    """A request in its slot."""

    item: Item
    new_tokens: int  # the item's
    lane: "LaneState"
    slot: int
    join: int  # the step of its lane that is its first
    computed: int = 0  # tokens of its prompt that were given out
    num_given: int = 0  # new tokens whose jobs were given out
    num_new: int = 0  # new tokens that are back
    has_ended: bool = False

    @property
    def num_chosen(self) -> int:
        """New tokens whose jobs will have been given out when it takes a step."""
        return self.num_given or 1

    @property
    def stored(self) -> int:
        """Columns of its slot that are filled once every job given out so far is done."""
        return self.computed + max(0, self.num_given - 1)


@dataclass(eq=False)
class DueRows:
    """The rows that take part in a lane's next steps, up to the one `until` which they stay so.

    `fresh`: those of them that may have no token yet. The request of `longest` has most tokens;
    `rows` of the lane are computed.
    """

    members: list[Row]
    fresh: list[Row]
    longest: Row | None
    rows: int
    until: float


@dataclass(eq=False)
class LaneState:
    """Rows that take their steps together."""

    index: int
    shape: LaneShape
    rows: list[Row | None]
    step: int = 0  # the next one
    num_steps: int = 0  # that are under way
    used: set[int] = field(default_factory=set)  # slots that stay free until the batch has ended
    num_free: int = 0  # slots that a newcomer may take
    has_gaps: bool = False  # a request has ended since the others closed ranks
    _due: DueRows | None = None  # None: to be found anew, as requests came, moved or ended

    def __post_init__(self) -> None:
        self.num_free = self.shape.rows

    def occupied(self) -> list[Row]:
        return [row for row in self.rows if row is not None]

    def free_slots(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row is None and i not in self.used]

    def changed(self) -> None:
        """Requests came, moved or ended."""
        self._due = None

    @property
    def due(self) -> DueRows:
        """Rows that take part in the next step, ready or not; skips steps that nobody takes."""
        if self._due is None or self.step >= self._due.until:
            self._due = self._find_due()
        return self._due

    def _find_due(self) -> DueRows:
        rows = [row for row in self.rows if row is not None and row.num_given < row.new_tokens]
        if not rows:
            return DueRows([], [], None, 0, math.inf)
        self.step = step = max(self.step, min([row.join for row in rows]))
        due = [row for row in rows if row.join <= step]
        late = [row.join for row in rows if row.join > step]
        left = min([row.new_tokens - row.num_chosen for row in due])
        sizes = [row.item.prompt_tokens + row.num_chosen for row in due]
        return DueRows(
            members=due,
            fresh=[row for row in due if not row.num_new],
            longest=due[sizes.index(max(sizes))],
            rows=1 + max([row.slot for row in due]),
            until=min([step + left, *late]),
        )

    def ready(self, ahead: int) -> DueRows | None:
        """What is due if a step of it can be given out.

        All rows have their first token, and fewer than `ahead` more under way: no more than steps
        of the lane are, but for those whose first token is not back.
        """
        if self.num_steps >= ahead:
            return None
        due = self.due
        if due.fresh:
            due.fresh = [row for row in due.fresh if not row.num_new]
            if not all([0 < row.num_given < ahead for row in due.fresh]):
                return None
        return due if due.members else None

    def close_ranks(self) -> list[Move]:
        """Moves the last requests into slots that stay free, so that steps have fewer rows."""
        if not self.has_gaps:
            return []
        self.has_gaps = False
        self.changed()
        moves = []
        count = len(self.occupied())
        behind = [i for i, row in enumerate(self.rows) if row is not None and i >= count]
        free = [i for i, row in enumerate(self.rows) if row is None and i < count]
        for source, target in zip(behind, free, strict=True):
            row = self.rows[source]
            assert row is not None
            moves.append(Move(self.index, source, target, row.stored))
            self.rows[target], self.rows[source], row.slot = row, None, target
        return moves


@dataclass
class WaitingRequests:
    """Requests that have no slot yet, as far as is looked ahead, by the lanes that hold them.

    Longest outputs come first, so that the last ones to end are short; without `refill`, where
    batches end together, longest prompts. Raises `ValueError` for a request that fits no lane.
    """

    source: Iterator[Item]
    refill: bool
    window: int
    by_lane: dict[int, list[tuple[tuple[int, ...], Item]]]  # by the lanes' tokens, ascending
    count: int = 0
    exhausted: bool = False

    def look_ahead(self) -> None:
        """In blocks of requests, so that longest outputs come first in each of them.

        If each one that begins made room for the next, those that wait would soon be the shortest
        of all, and the others would begin in the order in which they come.
        """
        if self.count > self.window // BLOCKS:
            return
        while not self.exhausted and self.count < self.window:
            item = next(self.source, None)
            if item is None:
                self.exhausted = True
                return
            fitting = [tokens for tokens in self.by_lane if tokens >= item.tokens]
            if not fitting:
                raise ValueError(
                    f"request {item.number} needs {item.tokens} tokens, which no lane has"
                )
            insort(self.by_lane[fitting[0]], (self._rank(item), item))
            self.count += 1

    def _rank(self, item: Item) -> tuple[int, ...]:
        lengths = item.new_tokens, item.prompt_tokens
        first, second = lengths if self.refill else lengths[::-1]
        return -first, -second, item.number

    def take(self, tokens: int, like: int | None) -> Item | None:
        """The first that a slot of so many columns can hold, of about `like` prompt tokens."""
        for size in sorted((t for t in self.by_lane if t <= tokens), reverse=True):
            waiting = self.by_lane[size]
            for index, (_, item) in enumerate(waiting[: NEAR if like else 1]):
                if like is None or like / PADDED <= item.prompt_tokens <= like:
                    del waiting[index]
                    self.count -= 1
                    return item
        return None
