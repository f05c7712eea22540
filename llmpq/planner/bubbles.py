"""Where the stages of a simulated run are idle, and why: bubbles by name.

Every idle moment of a stage has one cause, so causes add up to the idle time:
  - filling: no micro-batch has come yet;
  - draining: its last job is done, others still work;
  - else it waits for a job that is late. Going back up the row from where the job is missing, the
    first server at which it had to queue is what it is behind: a stage or a link. A job that
    queued nowhere since it set out is late because its tokens came back late, so the way goes on
    through its step before: behind a server where it queued there ("prefill" where these are the
    first tokens), else the loop itself is too long for the micro-batches that are in flight.

Not covered: what a bubble costs. Without it, the next slowest server would take its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmpq.costs.simulate import SimulatedRun

Cause = Literal["filling", "draining", "loop", "prefill", "behind"]
FIXED: tuple[Cause, ...] = ("filling", "draining", "loop")
FILLING, DRAINING, LOOP = range(len(FIXED))
QUEUED_NOWHERE = -1
SHORTEST = 1e-9  # of the run; less is rounding


@dataclass(frozen=True)
class Bubble:
    """A stage's idle time of one cause. `server`: which one it waits for, where that is known.

    `micro_batch`: of the loop, the lane whose tokens were waited for the longest.
    """

    stage: int
    cause: Cause
    server: int | None
    micro_batch: int | None
    idle_s: float
    percent: float  # of the run


def find_bubbles(run: SimulatedRun) -> list[Bubble]:
    """Of every stage and cause, those of a stage together, the longest first."""
    codes, gaps = _codes(run), _gaps(run)
    idle, loops = _idle(run, codes, gaps), _loops(run, codes, gaps)
    found = [
        _bubble(int(stage), int(code), float(idle[stage, code]), run.total_s, loops[stage])
        for stage, code in zip(*(idle > SHORTEST * run.total_s).nonzero(), strict=True)
    ]
    return sorted(found, key=lambda bubble: (bubble.stage, -bubble.idle_s))


def by_cause(bubbles: Sequence[Bubble], num_stages: int) -> list[tuple[Cause, int | None, float]]:
    """(cause, server, percent of all stages' time), the largest first."""
    sums: dict[tuple[Cause, int | None], float] = {}
    for bubble in bubbles:
        key = bubble.cause, bubble.server
        sums[key] = sums.get(key, 0.0) + bubble.percent
    rows = [(cause, server, percent / num_stages) for (cause, server), percent in sums.items()]
    return sorted(rows, key=lambda row: -row[2])


def describe(cause: Cause, server: int | None, names: Sequence[str], micro: int | None) -> str:
    """A cause in words; `names` as `server_names` gives them."""
    name = "" if server is None else names[server]
    if cause == "loop":
        which = "a micro-batch" if micro is None else f"micro-batch {micro}"
        return f"loop: tokens of {which} have not returned yet"
    if cause == "prefill":
        return f"waiting for prefill of {name}"
    if cause == "behind":
        return name if server is not None and server % 2 else f"behind {name}"
    return cause


def remedy(cause: Cause, server: int | None, names: Sequence[str]) -> str:
    """What would shrink it."""
    name = "" if server is None else names[server]
    if server is not None and server % 2:
        return f"a faster {name}"
    if server is not None:
        phase = " in prefill" if cause == "prefill" else ""
        return f"{name} is the slowest{phase}: fewer layers or fewer bits there"
    return {
        "loop": "more micro-batches in flight: a larger batch or smaller decode micro-batches",
        "filling": "smaller prefill micro-batches, or more requests",
        "draining": "more requests",
    }[cause]


def server_names(num_stages: int) -> list[str]:
    """ "stage 0", "link 0 -> 1", "stage 1", ... and at last the token return path."""
    names = []
    for rank in range(num_stages):
        names += [f"stage {rank}", f"link {rank} -> {rank + 1}"]
    return [*names[:-1], f"token return {num_stages - 1} -> 0"]


def _bubble(stage: int, code: int, seconds: float, total: float, loops: np.ndarray) -> Bubble:
    percent = 100 * seconds / total
    if code >= len(FIXED):
        server, prefill = divmod(code - len(FIXED), 2)
        return Bubble(stage, "prefill" if prefill else "behind", server, None, seconds, percent)
    longest = int(loops.argmax()) if code == LOOP and loops.any() else None
    return Bubble(stage, FIXED[code], None, longest, seconds, percent)


# ---- gaps before jobs, and a code of what each gap waits for


def _idle(run: SimulatedRun, codes: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """[stages, codes] idle seconds: FIXED, then 2 server (+ 1 for the prefill)."""
    servers = run.start_s.shape[1]
    idle = np.zeros((servers // 2, len(FIXED) + 2 * servers))
    for stage, at in enumerate(range(0, servers, 2)):
        idle[stage] = np.bincount(codes[:, stage], gaps[:, stage], minlength=idle.shape[1])
        idle[stage, DRAINING] += run.total_s - run.end_s[-1, at]
    return idle


def _loops(run: SimulatedRun, codes: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """[stages, lanes]: seconds that their decode steps were waited for."""
    decode = run.jobs.step > 0
    waits, lane = np.where(codes == LOOP, gaps, 0.0)[decode], run.jobs.micro_batch[decode]
    return np.array([np.bincount(lane, column, minlength=1) for column in waits.T])


def _gaps(run: SimulatedRun) -> np.ndarray:
    """[jobs, stages] idle seconds of each stage just before each job."""
    start, end = run.start_s[:, ::2], run.end_s[:, ::2]
    before = np.concatenate([np.zeros((1, end.shape[1])), end[:-1]])
    return start - before


def _codes(run: SimulatedRun) -> np.ndarray:
    """[jobs, stages]: what the gap before each job waits for."""
    queued = _queued(run)
    before, is_prefill = _step_before(run, queued)
    codes = np.empty((len(run.jobs), queued.shape[1] // 2), dtype=np.int64)
    for stage, at in enumerate(range(0, queued.shape[1], 2)):
        # A stage behind which the tokens themselves queued last time waits for the loop's rest.
        looped = (before == QUEUED_NOWHERE) | (before == at)
        code = np.where(looped, LOOP, len(FIXED) + 2 * before + is_prefill)
        here = queued[:, at - 1] if at else QUEUED_NOWHERE  # since it set out on this step
        codes[:, stage] = np.where(here == QUEUED_NOWHERE, code, len(FIXED) + 2 * here)
    codes[0] = FILLING
    return codes


def _step_before(run: SimulatedRun, queued: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each job: the last server at which its parent queued, and whether that was prefill.

    First tokens that queued nowhere were the first of all: what they waited for is the server that
    takes longest for a prefill.
    """
    jobs = run.jobs
    parent = np.maximum(jobs.parent, 0)
    is_prefill = jobs.step[parent] == 0
    seconds = (run.end_s - run.start_s)[jobs.step == 0]
    slowest = int(seconds.sum(axis=0).argmax())
    server = queued[parent, -1]
    server = np.where(is_prefill & (server == QUEUED_NOWHERE), slowest, server)
    return np.where(jobs.parent < 0, QUEUED_NOWHERE, server), is_prefill


def _queued(run: SimulatedRun) -> np.ndarray:
    """[jobs, servers]: the last server, up to each one, at which a job had to queue.

    QUEUED_NOWHERE where it began everywhere as soon as it came. Prefills queue at the first stage.
    """
    start, end, jobs = run.start_s, run.end_s, run.jobs
    back = np.where(jobs.parent < 0, 0.0, end[np.maximum(jobs.parent, 0), -1])
    arrived = np.concatenate([back[:, None], end[:, :-1]], axis=1)
    late = start > arrived
    servers = np.where(late, np.arange(start.shape[1]), QUEUED_NOWHERE)
    return np.maximum.accumulate(servers, axis=1)
