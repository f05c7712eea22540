"""What to measure next: the share of each phase, first visits, choosing more cells, revisits.

Three lanes (the ends, prefill, decode) have shares of the budget; the lane that is furthest behind
its share goes next, and what a finished lane leaves goes to the others. Within a lane: first the
cells at hand, small ones first; while less than `EXPLORE` of its share is spent, more cells that
the injected chooser names; then revisits in rounds, the least certain first, until all are settled.
Costs of unseen cells are estimated from seen ones by their work, and shapes that would take too
large a part of a lane are not offered. Pure decisions: time is what the caller says it is.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from llmpq.model_spec import ModelSpec
from llmpq.profile_data import Candidate
from llmpq.profiler.cells import SLOW_MS, Cell

SHARES = {"ends": 0.1, "prefill": 0.45, "decode": 0.45}
EXPLORE = 0.6
LARGEST_SHARE = 0.15  # of a lane, that one shape at all precisions may take
SLOW_CALLS = 7  # that a cell takes in all, at least, where calls are slow
WAVE = 8  # cells chosen at a time
OTHER_PRECISION = 1.5  # a cell may cost so much more than at a precision that was seen


@dataclass
class PhaseQueue:
    """The cells of one phase in the order of their first visits, and the seconds spent on them."""

    name: str
    budget_s: float
    cells: list[Cell] = field(default_factory=list)
    spent_s: float = 0.0
    is_open: bool = True

    @property
    def waiting(self) -> list[Cell]:
        """Cells without a visit."""
        return [cell for cell in self.cells if not cell.num_visits and not cell.skipped]

    @property
    def may_explore(self) -> bool:
        """There is budget for new cells."""
        return self.spent_s < EXPLORE * self.budget_s

    def least_certain(self) -> Cell | None:
        """The cell to visit again: rounds go through all that are not settled."""
        open_cells = [c for c in self.cells if c.num_visits and not c.is_settled and not c.skipped]
        return min(open_cells, key=lambda c: (c.num_visits, -c.half_width), default=None)


def next_queue(lanes: Iterable[PhaseQueue], all_first: bool) -> PhaseQueue | None:
    """The open lane furthest behind; `all_first`: lanes with unvisited cells before others."""
    candidates = [lane for lane in lanes if lane.is_open]
    return min(
        candidates,
        key=lambda lane: (all_first and not lane.waiting, lane.spent_s / lane.budget_s),
        default=None,
    )


@dataclass(frozen=True)
class _Seen:
    """What a measured cell tells of others: its work, and seconds of a layer, a call, its rest."""

    work: float
    layer_s: float
    call_s: float
    rest_s: float

    def bound_s(self, work: float) -> float:
        """A call of other work, at most; stacks of slower layers are less deep."""
        return self.rest_s + max(self.call_s, work / self.work * self.layer_s)


class CostModel:
    """Seconds that cells would take, from those that were measured; `work_of` orders cells."""

    def __init__(self, work_of: Callable[[Candidate], float]) -> None:
        self._work_of = work_of
        self._seen: dict[str, dict[Candidate, _Seen]] = defaultdict(dict)

    def learn(self, cell: Cell) -> None:
        """From a cell's latest visit."""
        call_s = min(cell.times_ms) / 1000
        layer_s = call_s / max(1, cell.depth)
        seen = _Seen(self._work_of(cell.key), layer_s, call_s, max(0.0, cell.call_s - call_s))
        self._seen[cell.key.phase][cell.key] = seen

    def call_s(self, key: Candidate) -> float:
        """Of one sample: no more than measured smaller cells in proportion, or larger ones."""
        seen = self._seen[key.phase]
        same = [one for cell, one in seen.items() if cell.precision == key.precision]
        factor = 1.0 if same else OTHER_PRECISION
        work = factor * self._work_of(key)
        return min((one.bound_s(work) for one in same or seen.values()), default=0.0)

    def is_too_large(self, key: Candidate, num_precisions: int, lane: PhaseQueue) -> bool:
        """Whether the shape's calls are slow, and would take more than their part of the lane."""
        call_s = self.call_s(key)
        total_s = SLOW_CALLS * call_s * num_precisions
        return 1000 * call_s > SLOW_MS and total_s > LARGEST_SHARE * lane.budget_s


def work_of(spec: ModelSpec) -> Callable[[Candidate], float]:
    """Tokens, weighed by what they attend to: how the cost of a cell grows, at most."""
    params = sum(op.out_features * op.in_features for op in spec.linears)
    even_tokens = params / (2 * spec.hidden_size)  # where attention costs as much as the linears

    def work(key: Candidate) -> float:
        if key.phase in ("prefill", "stage_prefill"):
            return key.micro_batch * key.tokens * (1 + key.tokens / even_tokens)
        if key.phase in ("decode", "stage_decode"):
            return key.micro_batch * (1 + key.tokens / even_tokens)
        return key.micro_batch * max(1, key.tokens)

    return work
