"""Decides which cell to measure next: first visits, more cells, or revisits, phase by phase.

Three queues (embedding and head, prefill, decode) have shares of the budget. The queue that is
furthest behind its share is next, and the rest of a finished queue's share goes to the others.
Within a queue the given cells come first, small ones before large ones; while less than `EXPLORE`
of the share is spent, more cells that the injected chooser names; then revisits in rounds, the
least certain cells first, until all are settled. Costs of unmeasured cells are estimated from
measured ones by their work, and shapes that would take too large a part of a queue are not offered.
All decisions are pure: the caller supplies the time.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from llmpq.model_spec import ModelSpec
from llmpq.profile_data import Candidate
from llmpq.profiler.cells import SLOW_MS, Cell

SHARES = {"ends": 0.1, "prefill": 0.45, "decode": 0.45}
EXPLORE = 0.6
LARGEST_SHARE = 0.15  # the largest share of a queue that a shape at all precisions may take
SLOW_CALLS = 7  # the least calls of a cell whose calls are slow
WAVE = 8  # cells chosen at a time
OTHER_PRECISION = 1.5  # the factor between costs at a measured and at another precision


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
        """The cells without a visit."""
        return [cell for cell in self.cells if not cell.num_visits and not cell.skipped]

    @property
    def may_explore(self) -> bool:
        """Whether there is budget for new cells."""
        return self.spent_s < EXPLORE * self.budget_s

    def least_certain(self) -> Cell | None:
        """The cell to visit again: one of the fewest visits, among them the least certain."""
        open_cells = [c for c in self.cells if c.num_visits and not c.is_settled and not c.skipped]
        return min(open_cells, key=lambda c: (c.num_visits, -c.half_width), default=None)


def next_queue(queues: Iterable[PhaseQueue], all_first: bool) -> PhaseQueue | None:
    """The open queue furthest behind; with `all_first`, queues with unvisited cells first."""
    candidates = [queue for queue in queues if queue.is_open]
    return min(
        candidates,
        key=lambda queue: (all_first and not queue.waiting, queue.spent_s / queue.budget_s),
        default=None,
    )


@dataclass(frozen=True)
class _Seen:
    """A measured cell: its work, and the seconds of a layer, of a call, and around a call."""

    work: float
    layer_s: float
    call_s: float
    rest_s: float

    def bound_s(self, work: float) -> float:
        """An upper bound of the seconds of a call with other work."""
        return self.rest_s + max(self.call_s, work / self.work * self.layer_s)


class CostModel:
    """Estimates the seconds of cells from measured ones; `work_of` gives the work of a cell."""

    def __init__(self, work_of: Callable[[Candidate], float]) -> None:
        self._work_of = work_of
        self._seen: dict[str, dict[Candidate, _Seen]] = defaultdict(dict)

    def learn(self, cell: Cell) -> None:
        """Adds a cell's latest visit."""
        call_s = min(cell.times_ms) / 1000
        layer_s = call_s / max(1, cell.depth)
        seen = _Seen(self._work_of(cell.key), layer_s, call_s, max(0.0, cell.call_s - call_s))
        self._seen[cell.key.phase][cell.key] = seen

    def call_s(self, key: Candidate) -> float:
        """The estimated seconds of one sample: the least bound by measured cells."""
        seen = self._seen[key.phase]
        same = [one for cell, one in seen.items() if cell.precision == key.precision]
        factor = 1.0 if same else OTHER_PRECISION
        work = factor * self._work_of(key)
        return min((one.bound_s(work) for one in same or seen.values()), default=0.0)

    def is_too_large(self, key: Candidate, num_precisions: int, queue: PhaseQueue) -> bool:
        """Whether the shape's calls are slow, and would take too large a share of the queue."""
        call_s = self.call_s(key)
        total_s = SLOW_CALLS * call_s * num_precisions
        return 1000 * call_s > SLOW_MS and total_s > LARGEST_SHARE * queue.budget_s


def work_of(spec: ModelSpec) -> Callable[[Candidate], float]:
    """The work of a cell: its tokens, weighted by the tokens that they attend to."""
    params = sum(op.out_features * op.in_features for op in spec.linears)
    if spec.experts is not None:
        params += spec.experts.params * spec.experts.per_token // spec.experts.count
    even_tokens = params / (2 * spec.hidden_size)  # attention then costs as much as the linears

    def work(key: Candidate) -> float:
        if key.phase in ("prefill", "stage_prefill"):
            return key.micro_batch * key.tokens * (1 + key.tokens / even_tokens)
        if key.phase in ("decode", "stage_decode"):
            return key.micro_batch * (1 + key.tokens / even_tokens)
        return key.micro_batch * max(1, key.tokens)

    return work
