"""What a run of a plan would look like: `--trace` writes it for a viewer, `-v` draws it.

`show_run` simulates the whole run, draws its timeline, writes the trace, and returns its figures.
The file is in the Chrome trace event format (chrome://tracing, Perfetto): a process a stage, in it
a thread for the stage and one for the link after it, a complete event for every job.

Heavy modules are imported inside functions, so that `--help` is quick. Not covered: jobs beyond
the first ones where a run has more than a viewer bears; a line says how many there are.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpq.cli.common import console
from llmpq.cli.plan_inputs import Arguments
from llmpq.cli.progress import progress
from llmpq.cli.trace_file import Event, call, stage_names, write_events
from llmpq.errors import UserError

if TYPE_CHECKING:
    from llmpq.costs.simulate import SimulatedRun
    from llmpq.plan_data import Plan
    from llmpq.planner.bubbles import Bubble
    from llmpq.planner.problem import Assignment, Problem

MAX_EVENTS = 200_000  # more is slow to load in a viewer
MAX_SPANS = 50_000_000  # 16 bytes each
MAX_JOBS = 1_000_000  # some 40 seconds
MICROSECONDS = 1e6


def show_run(
    arguments: Arguments,
    problem: "Problem",
    plan: "Plan",
    path: Path | None,
    filed: "Plan",
) -> dict[str, Any]:
    """Simulates the run of a priced plan, for people and (with a `path`) for a viewer; its figures.

    `filed`: the same plan with the workload it was made for, which says what the runtime reserves.
    """
    from llmpq.planner.bubbles import find_bubbles
    from llmpq.planner.evaluate import to_assignment
    from llmpq.planner.timeline_view import print_timeline

    played = _play(arguments, problem, to_assignment(filed, problem.cluster))
    bubbles = find_bubbles(played)
    out = console(arguments.quiet)
    print_timeline(out, played, bubbles)
    if path is not None:
        out.print(f"trace: {write_trace(path, plan, played)}")
    values = figures(played, bubbles, plan)
    difference = values["closed_form_difference_percent"]
    out.print(f"simulated: {played.total_s:.2f} s; the closed form is {difference:+.2f} % off")
    return values


def _play(arguments: Arguments, problem: "Problem", assignment: "Assignment") -> "SimulatedRun":
    from llmpq.planner.simulated import least_jobs, simulate
    from llmpq.workload import request_lengths

    every = tuple(request_lengths(problem.workload))
    problem = replace(problem, lengths=every, num_requests=None, _known={})
    count = least_jobs(problem, assignment.configuration)
    most = min(MAX_JOBS, MAX_SPANS // (2 * len(assignment.stages)))
    if count > most:
        raise UserError(
            f"a run of {len(problem.lengths)} requests has {count} jobs to simulate, {most} at "
            f"most; give --workload with about {most / count:.0%} of the requests"
        )
    with progress(console(arguments.quiet), "simulating", len(problem.lengths)) as bar:

        def told(num_ended: int) -> None:
            if bar.is_due():
                bar.update(num_ended, "requests")

        return simulate(problem, assignment, told=told)


def figures(played: "SimulatedRun", bubbles: "list[Bubble]", plan: "Plan") -> dict[str, Any]:
    """A simulated run for programs."""
    from llmpq.planner.bubbles import describe, server_names

    assert plan.predicted is not None
    names = server_names(len(plan.stages))
    return {
        "num_jobs": len(played.jobs),
        "total_s": played.total_s,
        "prefill_s": played.prefill_s,
        "decode_s": played.decode_s,
        "prefill_share": played.prefill_share,
        "busy_percent": [100 * float(busy) / played.total_s for busy in played.busy_s[::2]],
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
        "closed_form_difference_percent": 100 * (plan.predicted.priced_s / played.total_s - 1),
    }


# ---- the trace file


def write_trace(path: Path, plan: "Plan", played: "SimulatedRun") -> str:
    """Writes the first jobs, as many as a viewer bears; returns what the file holds."""
    count = len(played.jobs)
    most = min(count, max(1, MAX_EVENTS // (2 * len(plan.stages))))
    write_events(path, [*stage_names(plan), *_events(played, most)])
    return f"{path}, {f'all {count}' if most == count else f'the first {most} of {count}'} jobs"


def _events(played: "SimulatedRun", most: int) -> Iterator[Event]:
    """A complete event for each of the first jobs on every server that it takes any time."""
    jobs = played.jobs
    starts = (played.start_s[:most] * MICROSECONDS).tolist()
    lengths = ((played.end_s - played.start_s)[:most] * MICROSECONDS).tolist()
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
