"""A simulated run for programs and for trace viewers.

`figures` gives its numbers, `write_trace` a file in the Chrome trace event format (chrome://tracing,
Perfetto): one process per stage, in it a thread for the stage and one for the link after it, and a
complete event for every job.

Not covered: jobs beyond the first ones, where a run has more than a viewer can show.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmpq.render.trace_file import Event, call, stage_names, write_events

if TYPE_CHECKING:
    from llmpq.costs.simulate import SimulatedRun
    from llmpq.plan_data import Plan
    from llmpq.planner.bubbles import Bubble

MAX_EVENTS = 200_000  # more is slow to load in a viewer
MICROSECONDS = 1e6


def figures(run: "SimulatedRun", bubbles: "Sequence[Bubble]", plan: "Plan") -> dict[str, object]:
    """Returns the numbers of a simulated run, and how far off the plan's closed form is."""
    from llmpq.planner.bubbles import describe, server_names

    assert plan.predicted is not None
    names = server_names(len(plan.stages))
    return {
        "num_jobs": len(run.jobs),
        "total_s": run.total_s,
        "prefill_s": run.prefill_s,
        "decode_s": run.decode_s,
        "prefill_share": run.prefill_share,
        "busy_percent": [100 * float(busy) / run.total_s for busy in run.busy_s[::2]],
        "bubbles": [
            {
                "stage": bubble.stage,
                "cause": bubble.cause,
                "waits_for": None if bubble.server is None else names[bubble.server],
                "text": describe(bubble.cause, bubble.server, names, bubble.micro_batch),
                "idle_s": bubble.idle_s,
                "percent": bubble.percent,
            }
            for bubble in bubbles
        ],
        "closed_form_difference_percent": 100 * (plan.predicted.priced_s / run.total_s - 1),
    }


def write_trace(path: Path, plan: "Plan", run: "SimulatedRun") -> str:
    """Writes the first jobs, as many as a viewer can show; returns what the file holds."""
    count = len(run.jobs)
    most = min(count, max(1, MAX_EVENTS // (2 * len(plan.stages))))
    write_events(path, [*stage_names(plan), *_events(run, most)])
    return f"{path}, {f'all {count}' if most == count else f'the first {most} of {count}'} jobs"


def _events(run: "SimulatedRun", most: int) -> Iterator[Event]:
    """Yields a complete event per job and per stage or link that it occupies."""
    jobs = run.jobs
    starts = (run.start_s[:most] * MICROSECONDS).tolist()
    lengths = ((run.end_s - run.start_s)[:most] * MICROSECONDS).tolist()
    columns = (jobs.micro_batch, jobs.step, jobs.requests, jobs.tokens, jobs.past)
    rows = zip(*(column[:most].tolist() for column in columns), strict=True)
    for values, begins, takes in zip(rows, starts, lengths, strict=True):
        micro_batch, step = values[:2]
        name = f"decode {micro_batch} step {step}" if step else f"prefill {micro_batch}"
        category = "decode" if step else "prefill"
        names = ("micro_batch", "step", "requests", "tokens", "past")
        args = dict(zip(names, values, strict=True))
        for server, (ts, dur) in enumerate(zip(begins, takes, strict=True)):
            if dur > 0:
                yield call(server // 2, category, name, ts, dur, args, on_link=server % 2)
