"""Which job a pipeline does next: continuous batching as pure decisions.

Requests live in lanes. A lane is `rows` slots of the KV cache with room for `tokens` tokens each,
and takes its decode steps as one micro-batch. A request's tokens lie in its slot from column 0 on,
so that every row has its own length and rows do not depend on each other. A slot whose request has
ended is given to the next one at once: its prompt is computed in a prefill micro-batch, which may
serve several lanes (long prompts go in chunks), and it joins the lane's next decode step.

    columns   0  1  2  3  4  5  6  7          Row 0 is about to store its token at column 5, row 2
    row 0     a  a  a  a  a  .                at column 7; a step attends to 8 columns and hides
    row 1     .                               from each row what lies beyond its own length. Row 1
    row 2     b  b  b  b  b  b  b  .          is free: it computes what nobody reads.

Every stage does all jobs in one order, so a job may rely on all that were given out before it.
`Schedule` is told only of tokens that came back to the first stage. It knows no times, tensors or
processes: the engine asks it what to do, and the simulator asks the same.

Not covered: taking a request out before it ends; sharing the cache of equal prompts.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llmpq.job import Item, Job, LaneShape, Member, cache_tokens, chunk_length, padded_width
from llmpq.schedule_state import WINDOW, LaneState, Row, WaitingRequests


@dataclass
class Schedule:
    """Gives out jobs until every request of `source` has ended.

    `prefill_rows`: prompts of a prefill micro-batch; `chunk_tokens`: its tokens a prompt at most.
    `num_stages` bounds how many prefills are under way. Without `refill`, slots are filled only
    when all requests have ended. Requests are taken as `WaitingRequests` says. With `ahead` of 2, a
    lane's next step may be given out before the tokens of its last one are back; a request that
    then turns out to have stopped has computed one token in vain. Without `names_members` a decode
    step's members are all alike: whoever simulates asks only how many there are. Raises
    `ValueError` for a request that fits no lane.
    """

    shapes: Sequence[LaneShape]
    prefill_rows: int
    chunk_tokens: int
    num_stages: int
    source: Iterator[Item]
    refill: bool = True
    window: int = WINDOW
    ahead: int = 1
    names_members: bool = True
    _lanes: list[LaneState] = field(init=False)
    _waiting: WaitingRequests = field(init=False)
    _flight: deque[tuple[Job, Sequence[Row]]] = field(init=False, default_factory=deque)
    _chunked: deque[Row] = field(init=False, default_factory=deque)
    _num_free: int = field(init=False, default=0)  # slots of all lanes that a newcomer may take
    _num_prefills: int = field(init=False, default=0)
    _steps: int = field(init=False, default=0)  # decode steps since the last prefill
    _turn: int = field(init=False, default=0)  # the lane that is asked first
    _filling: bool = field(init=False, default=False)  # a batch, when there is no refill

    def __post_init__(self) -> None:
        self._lanes = [
            LaneState(i, shape, [None] * shape.rows) for i, shape in enumerate(self.shapes)
        ]
        self._num_free = sum(shape.rows for shape in self.shapes)
        by_lane: dict[int, list[tuple[tuple[int, ...], Item]]] = {
            tokens: [] for tokens in sorted({shape.tokens for shape in self.shapes})
        }
        self._waiting = WaitingRequests(self.source, self.refill, self.window, by_lane)

    # ---- what a caller sees

    def next(self) -> Job | None:
        """The next job, or None until tokens are back; nothing is left if `is_done`."""
        self._waiting.look_ahead()
        self._open_batch()
        ready = None if self._filling else self._ready_lane()
        if self._num_prefills <= self.num_stages:
            if self._chunked and not (ready and self._steps == 0):
                return self._next_chunk()
            if not self._chunked and (job := self._prefill(has_ready=ready is not None)):
                return job
            if self._filling and not self._chunked:
                self._filling, ready = False, self._ready_lane()
        return self._step(ready) if ready else None

    def returned(self, stops: Sequence[bool] = ()) -> tuple[bool, ...]:
        """The oldest job is back; `stops`: of each member, whether it must end with this token.

        Where it is empty, none must. Tells which of them have ended with it.
        """
        job, rows = self._flight.popleft()
        if job.prefill:
            self._num_prefills -= 1
        else:
            self._lanes[job.lane].num_steps -= 1
        if not job.chooses:
            return (False,) * len(rows)
        if not stops:  # as in every step of a simulated run
            for row in rows:
                row.num_new += not row.has_ended
            return tuple([row.num_new == row.new_tokens and self._end(row) for row in rows])
        pairs = zip(rows, stops, strict=True)
        return tuple([_note(row, stop) and self._end(row) for row, stop in pairs])

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
            self._waiting.look_ahead()
        return idle and not self._waiting.count

    @property
    def tokens_held(self) -> int:
        """Tokens that requests hold in the cache, of those that the lanes have."""
        return sum(row.stored for lane in self._lanes for row in lane.occupied())

    @property
    def tokens_reserved(self) -> int:
        """Tokens that the lanes have."""
        return cache_tokens(self.shapes)

    # ---- prefill

    def _prefill(self, has_ready: bool) -> Job | None:
        """Newcomers for free slots: as many as a micro-batch takes, or what there is."""
        if not self._waiting.count or not (self.refill or self._filling):
            return None
        free = self._num_free
        patient = has_ready and self._steps < len(self._lanes)
        if not free or (patient and free < min(self.prefill_rows, self._waiting.count)):
            return None
        rows = self._newcomers()
        if not rows:
            return None
        if rows[0].item.prompt_tokens > self.chunk_tokens:
            self._chunked += rows
            return self._next_chunk()
        longest = max(row.item.prompt_tokens for row in rows)
        width = min(self.chunk_tokens, padded_width(longest))
        for row in rows:
            row.computed = row.item.prompt_tokens
        self._steps = 0
        return self._give_out(Job(True, tuple(map(self._member, rows)), 0, width, len(rows)), rows)

    def _open_batch(self) -> None:
        """Without refill, a new batch begins when all requests of the last one have ended."""
        if not self.refill and not any(lane.occupied() for lane in self._lanes):
            self._filling = True
            for lane in self._lanes:
                lane.used.clear()
                lane.num_free = lane.shape.rows
            self._num_free = sum(lane.num_free for lane in self._lanes)

    def _newcomers(self) -> list[Row]:
        """Requests in their new slots: one that goes in chunks, or some of like length."""
        rows: list[Row] = []
        like: int | None = None
        for lane in sorted(self._lanes, key=lambda lane: (lane.shape.tokens, lane.index)):
            for slot in lane.free_slots() if lane.num_free else ():
                if len(rows) == self.prefill_rows:
                    return rows
                item = self._waiting.take(lane.shape.tokens, like)
                if item is None:
                    break
                like = like or item.prompt_tokens
                rows.append(self._settle(item, lane, slot))
                if item.prompt_tokens > self.chunk_tokens:
                    return rows
        return rows

    def _settle(self, item: Item, lane: LaneState, slot: int) -> Row:
        """Puts a request into a slot. Rows that are live take one more step without it meanwhile.

        Without refill they wait until all have come.
        """
        late = self.refill and any(row.num_new > 0 for row in lane.occupied())
        row = Row(item, item.new_tokens, lane, slot, join=lane.step + late)
        lane.rows[slot] = row
        lane.num_free -= 1
        self._num_free -= 1
        lane.changed()
        return row

    def _next_chunk(self) -> Job:
        row = self._chunked[0]
        total, begin = row.item.prompt_tokens, row.computed
        end = min(total, begin + chunk_length(total, self.prefill_rows, self.chunk_tokens))
        row.computed = end
        if end == total:
            self._chunked.popleft()
        self._steps = 0
        job = Job(True, (self._member(row),), begin, end, 1, chooses=end == total)
        return self._give_out(job, [row])

    # ---- decode

    def _ready_lane(self) -> LaneState | None:
        """The first lane that is ready in the order of their turns."""
        lanes, ahead = self._lanes, self.ahead
        for index in range(self._turn - len(lanes), self._turn):
            lane = lanes[index]
            if lane.num_steps < ahead and lane.ready(ahead):
                return lane
        return None

    def _step(self, lane: LaneState) -> Job:
        """The next token of a lane's requests."""
        self._turn = (lane.index + 1) % len(self._lanes)
        moves = [] if self._waiting.count and self.refill else lane.close_ranks()
        due, index = lane.due, lane.index
        assert due.longest is not None
        seen = due.longest.item.prompt_tokens + due.longest.num_given  # the new one included
        if self.names_members:
            members = tuple(
                [
                    Member(index, r.slot, r.item.prompt_tokens, r.item.number, r.num_given)
                    for r in due.members
                ]
            )
        else:
            members = (Member(index, 0, 0, 0, 0),) * len(due.members)
        lane.step, lane.num_steps = lane.step + 1, lane.num_steps + 1
        self._steps += 1
        job = Job(
            prefill=False,
            members=members,
            begin=0,
            end=min(padded_width(seen), lane.shape.tokens),
            rows=due.rows,
            moves=tuple(moves),
        )
        return self._give_out(job, due.members)

    # ---- both

    def _member(self, row: Row) -> Member:
        item, lane = row.item, row.lane.index
        return Member(lane, row.slot, item.prompt_tokens, item.number, row.num_given)

    def _give_out(self, job: Job, rows: Sequence[Row]) -> Job:
        """`rows`: the job's members."""
        if job.chooses:
            for row in rows:
                row.num_given += 1
        self._num_prefills += job.prefill
        self._flight.append((job, rows))
        return job

    def _end(self, row: Row) -> bool:
        """The request has ended: its slot is free. False where it had ended before."""
        lane = row.lane
        if row.has_ended:
            return False
        row.has_ended = lane.has_gaps = True
        lane.rows[row.slot] = None
        lane.changed()
        if self.refill:
            lane.num_free += 1
            self._num_free += 1
        else:
            lane.used.add(row.slot)
        return True


def _note(row: Row, stop: bool) -> bool:
    """One more token of a request; whether it ends with it."""
    if row.has_ended:
        return False
    row.num_new += 1
    return stop or row.num_new >= row.new_tokens
