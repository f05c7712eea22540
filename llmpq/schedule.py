"""Which job a pipeline does next: continuous batching as pure decisions.

Requests live in lanes. A lane is `rows` places in the KV cache of `tokens` columns each, and takes
its decode steps as one micro-batch. All its rows write a step's token at the same column, so that
their prompts end side by side and are padded on the left, as a batch of transformers is. A place
whose request has ended is given to the next one at once: its prompt is computed (in a prefill
micro-batch that may serve several lanes, long prompts in chunks) to end where the lane will be when
it joins. When the columns run out, what is alive is shifted to the front.

    columns   0  1  2  3  4  5  6  7          A lane about to write column 6. Row 1 was free and
    row 0        a  a  a  b  b  .             has got the prompt c, which joins at column 7, while
    row 1                 c  c  c  .          row 0 takes its step at column 6 meanwhile.

Every stage does all jobs in one order, so a job may rely on all that were given out before it.
`Schedule` is told only of tokens that came back to the first stage. It knows no times, tensors or
processes: the engine asks it what to do, and the simulator asks the same.

Not covered: taking a request out before it ends; sharing the cache of equal prompts.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

WINDOW = 100_000  # requests that are looked at ahead of their turn
NEAR = 64  # of them, how many are looked at for a prompt of like length
PADDED = 1.25  # a prefill micro-batch is at most so much longer than its prompts
LEAST_CHUNK = 16


def padded_width(tokens: int) -> int:
    """Rounded up to one of eight widths an octave: kernels are prepared anew for each other one."""
    step = 2 ** max(0, (tokens - 1).bit_length() - 4)
    return -(-tokens // step) * step


class LaneShape(NamedTuple):
    """Places of a lane, and columns of each."""

    rows: int
    tokens: int


def cache_tokens(lanes: Iterable[LaneShape]) -> int:
    """Places for tokens that lanes have."""
    return sum(lane.rows * lane.tokens for lane in lanes)


class Item(NamedTuple):
    """A request as its lengths; `number` tells it from others."""

    number: int
    prompt_tokens: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        """Columns it needs."""
        return self.prompt_tokens + self.new_tokens


class Member(NamedTuple):
    """A row of a job. `start`: the column of its prompt's first token.

    `position`: which of its new tokens is chosen, 0 the first.
    """

    lane: int
    row: int
    start: int
    prompt_tokens: int
    number: int
    position: int


class Shift(NamedTuple):
    """Columns `first` to `end` of a whole lane go `by` columns to the right (or left)."""

    lane: int
    first: int
    end: int
    by: int


class Move(NamedTuple):
    """A row's columns up to `end` are copied to another row of its lane."""

    lane: int
    source: int
    target: int
    end: int


@dataclass(frozen=True)
class Job:
    """One micro-batch's way through all stages; `shifts`, then `moves`, come before it.

    A prefill computes tokens `begin` to `end` of its members' prompts, padded on the left; a chunk
    that does not end a prompt chooses no tokens (`chooses`). A decode step
    computes one token of each of its lane's first `rows` rows at column `end` - 1, seeing columns
    from `begin` on; only members store what they compute.
    """

    prefill: bool
    members: tuple[Member, ...]
    begin: int
    end: int
    rows: int
    chooses: bool = True
    shifts: tuple[Shift, ...] = ()
    moves: tuple[Move, ...] = ()

    @property
    def lane(self) -> int:
        """Of a decode step."""
        return self.members[0].lane


@dataclass(eq=False)
class _Row:
    """A request in its place."""

    item: Item
    lane: "_Lane"
    place: int
    start: int
    join: int  # the column at which it takes its first decode step
    num_new: int = 0
    computed: int = 0  # tokens of its prompt, given out

    @property
    def is_live(self) -> bool:
        """Its first token is back."""
        return self.num_new > 0


@dataclass(eq=False)
class _Lane:
    """Rows that take their steps together. `column`: where the next one writes."""

    index: int
    shape: LaneShape
    rows: list[_Row | None]
    column: int = 0
    in_flight: bool = False
    used: set[int] = field(default_factory=set)  # places that stay free until the batch has ended

    def occupied(self) -> list[_Row]:
        return [row for row in self.rows if row is not None]

    def free_rows(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row is None and i not in self.used]

    def due(self) -> list[_Row]:
        """Rows that take part in the next step, back or not; skips columns nobody waits for."""
        rows = self.occupied()
        if rows:
            self.column = max(self.column, min(row.join for row in rows))
        return [row for row in rows if row.join <= self.column]

    def is_ready(self) -> bool:
        """A step can be given out."""
        due = [] if self.in_flight else self.due()
        return bool(due) and all(row.is_live for row in due)

    def shift(self, by: int) -> Shift | None:
        """Everything to the right; what no stage has seen yet need not be moved there."""
        seen = [row for row in self.occupied() if row.computed]
        first = min((row.start for row in seen), default=0)
        end = max([self.column, *(row.join for row in seen)])
        for row in self.occupied():
            row.start, row.join = row.start + by, row.join + by
        self.column += by
        return Shift(self.index, first, end, by) if seen and by else None


@dataclass
class Schedule:
    """Gives out jobs until every request of `source` has ended.

    `prefill_rows`: prompts of a prefill micro-batch; `chunk_tokens`: its tokens a prompt at most.
    `num_stages` bounds how many prefills are under way. Without `refill`, places are filled only
    when all requests have ended. Requests are taken longest output first, as far as is looked
    ahead, so that the last ones to end are short. Raises `ValueError` for one that fits no lane.
    """

    shapes: Sequence[LaneShape]
    prefill_rows: int
    chunk_tokens: int
    num_stages: int
    source: Iterator[Item]
    refill: bool = True
    window: int = WINDOW
    _lanes: list[_Lane] = field(init=False)
    _waiting: dict[int, list[tuple[tuple[int, ...], Item]]] = field(init=False)
    _flight: deque[tuple[Job, tuple[_Row, ...]]] = field(init=False, default_factory=deque)
    _chunked: deque[_Row] = field(init=False, default_factory=deque)
    _num_waiting: int = field(init=False, default=0)
    _num_prefills: int = field(init=False, default=0)
    _steps: int = field(init=False, default=0)  # decode steps since the last prefill
    _turn: int = field(init=False, default=0)  # the lane that is asked first
    _filling: bool = field(init=False, default=False)  # a batch, when there is no refill
    _exhausted: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._lanes = [_Lane(i, shape, [None] * shape.rows) for i, shape in enumerate(self.shapes)]
        self._waiting = {tokens: [] for tokens in sorted({s.tokens for s in self.shapes})}

    # ---- what a caller sees

    def next(self) -> Job | None:
        """The next job, or None until tokens are back; nothing is left if `is_done`."""
        self._look_ahead()
        self._open_batch()
        ready = [] if self._filling else self._ready_lanes()
        if self._num_prefills <= self.num_stages:
            if self._chunked and not (ready and self._steps == 0):
                return self._give_out(self._next_chunk())
            if not self._chunked and (job := self._prefill(has_ready=bool(ready))):
                return self._give_out(job)
            if self._filling and not self._chunked:
                self._filling, ready = False, self._ready_lanes()
        if not ready:
            return None
        self._turn = (ready[0].index + 1) % len(self._lanes)
        return self._give_out(self._step(ready[0]))

    def returned(self, stops: Sequence[bool]) -> tuple[bool, ...]:
        """The oldest job is back; `stops`: of each member, whether it must end with this token.

        Tells which of them have ended.
        """
        job, rows = self._flight.popleft()
        if job.prefill:
            self._num_prefills -= 1
        else:
            self._lanes[job.lane].in_flight = False
        if not job.chooses:
            return (False,) * len(rows)
        return tuple(self._note(row, stop) for row, stop in zip(rows, stops, strict=True))

    @property
    def oldest(self) -> Job:
        """The job whose tokens come back next."""
        return self._flight[0][0]

    @property
    def num_in_flight(self) -> int:
        """Jobs whose tokens are not back."""
        return len(self._flight)

    @property
    def is_done(self) -> bool:
        """Every request has ended."""
        idle = not self._flight and not any(lane.occupied() for lane in self._lanes)
        if idle:
            self._look_ahead()
        return idle and not self._num_waiting

    @property
    def tokens_held(self) -> int:
        """Tokens that requests hold in the cache, of those that the lanes have."""
        rows = [row for lane in self._lanes for row in lane.occupied()]
        return sum(min(row.computed, row.item.prompt_tokens) + row.num_new for row in rows)

    @property
    def tokens_reserved(self) -> int:
        """Tokens that the lanes have."""
        return cache_tokens(self.shapes)

    # ---- requests that wait

    def _look_ahead(self) -> None:
        while not self._exhausted and self._num_waiting < self.window:
            item = next(self.source, None)
            if item is None:
                self._exhausted = True
                return
            fitting = [tokens for tokens in self._waiting if tokens >= item.tokens]
            if not fitting:
                raise ValueError(f"request {item.number} needs {item.tokens} tokens: no lane has")
            insort(self._waiting[fitting[0]], (self._rank(item), item))
            self._num_waiting += 1

    def _rank(self, item: Item) -> tuple[int, ...]:
        """Longest outputs first; where batches end together, longest prompts."""
        lengths = item.new_tokens, item.prompt_tokens
        first, second = lengths if self.refill else lengths[::-1]
        return -first, -second, item.number

    def _take(self, tokens: int, like: int | None) -> Item | None:
        """The first that a lane of so many columns can hold, of about `like` prompt tokens."""
        for size in sorted((t for t in self._waiting if t <= tokens), reverse=True):
            waiting = self._waiting[size]
            for place, (_, item) in enumerate(waiting[: NEAR if like else 1]):
                if like is None or like / PADDED <= item.prompt_tokens <= like:
                    del waiting[place]
                    self._num_waiting -= 1
                    return item
        return None

    # ---- prefill

    def _prefill(self, has_ready: bool) -> Job | None:
        """Newcomers for free places: as many as a micro-batch takes, or what there is."""
        if not self._num_waiting or not (self.refill or self._filling):
            return None
        free = sum(len(lane.free_rows()) for lane in self._lanes)
        patient = has_ready and self._steps < len(self._lanes)
        if not free or (patient and free < min(self.prefill_rows, self._num_waiting)):
            return None
        rows, shifts = self._newcomers()
        if not rows:
            return None
        if rows[0].item.prompt_tokens > self.chunk_tokens:
            self._chunked += rows
            return self._next_chunk(shifts)
        longest = max(row.item.prompt_tokens for row in rows)
        width = min(self.chunk_tokens, padded_width(longest))
        for row in rows:
            row.computed = row.item.prompt_tokens
        self._steps = 0
        members = tuple(self._member(row) for row in rows)
        return Job(True, members, 0, width, len(rows), shifts=tuple(shifts))

    def _open_batch(self) -> None:
        """Without refill, a new batch begins when all requests of the last one have ended."""
        if not self.refill and not any(lane.occupied() for lane in self._lanes):
            self._filling = True
            for lane in self._lanes:
                lane.used.clear()

    def _newcomers(self) -> tuple[list[_Row], list[Shift]]:
        """Requests in their new places: one that goes in chunks, or some of like length."""
        rows: list[_Row] = []
        shifts: list[Shift] = []
        like: int | None = None
        for lane in sorted(self._lanes, key=lambda lane: (lane.shape.tokens, lane.index)):
            for place in lane.free_rows():
                if len(rows) == self.prefill_rows:
                    return rows, shifts
                item = self._take(lane.shape.tokens, like)
                if item is None:
                    break
                like = like or item.prompt_tokens
                shifts += self._settle(item, lane, place, rows)
                if item.prompt_tokens > self.chunk_tokens:
                    return rows, shifts
        return rows, shifts

    def _settle(self, item: Item, lane: _Lane, place: int, rows: list[_Row]) -> list[Shift]:
        """Puts a request into a place of a lane, whose columns may have to shift for it."""
        # The others step meanwhile; without refill they wait until all have come.
        late = int(self.refill and any(row.is_live for row in lane.occupied()))
        if not lane.occupied() and not lane.used:
            lane.column = item.prompt_tokens
        by = 0
        if not item.prompt_tokens <= lane.column + late <= lane.shape.tokens:
            starts = [row.start for row in lane.occupied()]
            span = lane.column - min(starts, default=lane.column)
            by = max(span, item.prompt_tokens - late) - lane.column
        shift = lane.shift(by) if by else None
        join = lane.column + late
        row = _Row(item, lane, place, start=join - item.prompt_tokens, join=join)
        lane.rows[place] = row
        rows.append(row)
        return [shift] if shift else []

    def _next_chunk(self, shifts: Sequence[Shift] = ()) -> Job:
        row = self._chunked[0]
        total, begin = row.item.prompt_tokens, row.computed
        most = (
            self.prefill_rows * self.chunk_tokens**2 // total
        )  # what attention was given room for
        end = min(total, begin + max(LEAST_CHUNK, min(self.chunk_tokens, most)))
        row.computed = end
        if end == total:
            self._chunked.popleft()
        self._steps = 0
        member = self._member(row)
        return Job(True, (member,), begin, end, 1, chooses=end == total, shifts=tuple(shifts))

    # ---- decode

    def _ready_lanes(self) -> list[_Lane]:
        """In the order of their turns."""
        turns = self._lanes[self._turn :] + self._lanes[: self._turn]
        return [lane for lane in turns if lane.is_ready()]

    def _step(self, lane: _Lane) -> Job:
        """The next token of a lane's requests."""
        moves = [] if self._num_waiting and self.refill else self._close_ranks(lane)
        due = lane.due()
        shifts = []
        if lane.column == lane.shape.tokens:
            shifts = [lane.shift(-min(row.start for row in lane.occupied()))]
        column = lane.column
        members = tuple(self._member(row) for row in due)
        lane.column, lane.in_flight = column + 1, True
        self._steps += 1
        return Job(
            prefill=False,
            members=members,
            begin=min(row.start for row in due),
            end=column + 1,
            rows=1 + max(member.row for member in members),
            shifts=tuple(shift for shift in shifts if shift),
            moves=tuple(moves),
        )

    def _close_ranks(self, lane: _Lane) -> list[Move]:
        """Moves the last requests into places that stay free, so that steps get shorter."""
        moves = []
        count = len(lane.occupied())
        behind = [i for i, row in enumerate(lane.rows) if row is not None and i >= count]
        free = [i for i, row in enumerate(lane.rows) if row is None and i < count]
        for source, target in zip(behind, free, strict=True):
            row = lane.rows[source]
            assert row is not None
            moves.append(Move(lane.index, source, target, max(lane.column, row.join)))
            lane.rows[target], lane.rows[source], row.place = row, None, target
        return moves

    # ---- both

    def _member(self, row: _Row) -> Member:
        item, lane = row.item, row.lane.index
        return Member(lane, row.place, row.start, item.prompt_tokens, item.number, row.num_new)

    def _give_out(self, job: Job) -> Job:
        rows = tuple(self._lanes[member.lane].rows[member.row] for member in job.members)
        self._num_prefills += job.prefill
        self._flight.append((job, tuple(row for row in rows if row is not None)))
        return job

    def _note(self, row: _Row, stop: bool) -> bool:
        """One more token of a request; its place is free if that was the last."""
        row.num_new += 1
        ended = stop or row.num_new >= row.item.new_tokens
        if ended:
            row.lane.rows[row.place] = None
            if not self.refill:
                row.lane.used.add(row.place)
        return ended
