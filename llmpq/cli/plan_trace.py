"""What a run of a plan would look like: `--trace` writes it for a viewer, `-v` draws it.

`show_run` simulates the whole run, draws its timeline, writes the trace, and returns its figures.
The file is in the Chrome trace event format (chrome://tracing, Perfetto): a process a stage, in it
a thread for the stage and one for the link after it, a complete event for every job.

Heavy modules are imported inside functions, so that `--help` is quick. Not covered: batches beyond
the first ones where a run has more jobs than a viewer bears; a line says how many there are.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpq.cli.common import console
from llmpq.cli.plan_inputs import Arguments
from llmpq.cli.progress import progress
from llmpq.errors import UserError

if TYPE_CHECKING:
    from llmpq.plan import Plan
    from llmpq.planner.bubbles import Bubble
    from llmpq.planner.problem import Assignment, Problem
    from llmpq.planner.simulated import BatchRun, Shape, Totals

MAX_EVENTS = 200_000  # more is slow to load in a viewer
MAX_SPANS = 50_000_000  # 16 bytes each
MICROSECONDS = 1e6
Event = dict[str, Any]


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
    from llmpq.planner.simulated import run_shapes, totals
    from llmpq.planner.timeline_view import print_timeline
    from llmpq.workload import request_lengths

    assignment = to_assignment(filed, problem.cluster)
    shapes = run_shapes(problem, assignment, request_lengths(filed.workload))
    _check_size(shapes, 2 * len(plan.stages))
    batches = _play(arguments, problem, assignment, shapes)
    whole, bubbles = totals(batches), find_bubbles(batches)
    out = console(arguments.quiet)
    print_timeline(out, batches[0], whole, bubbles)
    if path is not None:
        out.print(f"trace: {write_trace(path, plan, batches)}", markup=False)
    values = figures(whole, bubbles, plan)
    difference = values["closed_form_difference_percent"]
    out.print(f"simulated: {whole.total_s:.2f} s; the closed form is {difference:+.2f} % off")
    return values


def _check_size(shapes: "Sequence[Shape]", num_servers: int) -> None:
    from llmpq.planner.simulated import num_spans

    count = num_spans(shapes, num_servers)
    if count > MAX_SPANS:
        raise UserError(
            f"a run of {len(shapes)} batches has {count} jobs to simulate, {MAX_SPANS} at most; "
            f"give --workload with about {MAX_SPANS / count:.0%} of the requests"
        )


def _play(
    arguments: Arguments,
    problem: "Problem",
    assignment: "Assignment",
    shapes: "Sequence[Shape]",
) -> "list[BatchRun]":
    from llmpq.planner.simulated import run

    batches = []
    with progress(console(arguments.quiet), "simulating", len(shapes)) as bar:
        for batch in run(problem, assignment, shapes):
            batches.append(batch)
            bar.update(len(batches), "batches")
    return batches


def figures(whole: "Totals", bubbles: "Sequence[Bubble]", plan: "Plan") -> dict[str, Any]:
    """A simulated run for programs."""
    from llmpq.planner.bubbles import describe, server_names

    assert plan.predicted is not None
    names = server_names(len(plan.stages))
    return {
        "num_batches": whole.num_batches,
        "total_s": whole.total_s,
        "prefill_s": whole.prefill_s,
        "decode_s": whole.decode_s,
        "busy_percent": [100 * float(busy) / whole.total_s for busy in whole.busy_s[::2]],
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
        "closed_form_difference_percent": 100 * (plan.predicted.total_s / whole.total_s - 1),
    }


# ---- the trace file


def write_trace(path: Path, plan: "Plan", batches: "Sequence[BatchRun]") -> str:
    """Writes the first batches, as many as a viewer bears; returns what the file holds."""
    from llmpq.artifact import write_text

    count, jobs = _part(batches, 2 * len(plan.stages))
    events = list(_names(plan))
    for batch in batches[:count]:
        events += _events(batch, jobs)
    write_text(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")
    return _content(path, batches, count, jobs)


def _part(batches: "Sequence[BatchRun]", num_servers: int) -> tuple[int, int]:
    """(batches, jobs of each server in a batch) that are written."""
    count = events = 0
    for batch in batches:
        events += len(batch.played.jobs) * num_servers
        if events > MAX_EVENTS:
            break
        count += 1
    if count == 0:
        return 1, max(1, MAX_EVENTS // num_servers)
    return count, max(len(batch.played.jobs) for batch in batches[:count])


def _content(path: Path, batches: "Sequence[BatchRun]", count: int, jobs: int) -> str:
    last = f"-{count - 1}" if count > 1 else ""
    text = f"{path}, batch{'es' if last else ''} 0{last} of {len(batches)}"
    cut = len(batches[0].played.jobs) > jobs
    return f"{text}, the first {jobs} of its micro-batches and steps" if cut else text


def _names(plan: "Plan") -> Iterator[Event]:
    """What viewers call processes and threads, and their order."""
    from llmpq.planner.bubbles import server_names

    names = server_names(len(plan.stages))
    for stage in plan.stages:
        count = f"{stage.tensor_parallel} x " if stage.tensor_parallel > 1 else ""
        layers = f"layers {stage.first_layer}-{stage.end_layer - 1}"
        title = f"stage {stage.rank}: {count}{stage.devices[0]} on {stage.node} ({layers})"
        yield _metadata("process_name", stage.rank, {"name": title})
        yield _metadata("process_sort_index", stage.rank, {"sort_index": stage.rank})
        for thread, name in ((0, title), (1, names[2 * stage.rank + 1])):
            place = 2 * stage.rank + thread
            yield _metadata("thread_name", stage.rank, {"name": name}, place)
            yield _metadata("thread_sort_index", stage.rank, {"sort_index": place}, place)


def _metadata(name: str, pid: int, values: Event, tid: int | None = None) -> Event:
    thread = {} if tid is None else {"tid": tid}
    return {"name": name, "ph": "M", "pid": pid, "args": values} | thread


def _events(batch: "BatchRun", most: int) -> Iterator[Event]:
    """A complete event for every job of the batch, `most` at most, that takes a server any time."""
    jobs, shape, played = batch.played.jobs, batch.shape, batch.played
    starts = ((batch.start_s + played.start_s[:most]) * MICROSECONDS).tolist()
    lengths = ((played.end_s - played.start_s)[:most] * MICROSECONDS).tolist()
    pairs = zip(jobs.micro_batch[:most].tolist(), jobs.step[:most].tolist(), strict=True)
    for (micro_batch, step), begins, takes in zip(pairs, starts, lengths, strict=True):
        sizes = shape.decode_sizes if step else shape.prefill_sizes
        name = f"decode {micro_batch} step {step}" if step else f"prefill {micro_batch}"
        values = {
            "batch": batch.number,
            "micro_batch": micro_batch,
            "step": step,
            "requests": sizes[micro_batch],
            "tokens": sizes[micro_batch] * (1 if step else shape.prompt_tokens),
            "past": shape.prompt_tokens + step - 1 if step else 0,
        }
        category = "decode" if step else "prefill"
        for server, (ts, dur) in enumerate(zip(begins, takes, strict=True)):
            if dur > 0:
                place = {"pid": server // 2, "tid": server}
                event = {"name": name, "cat": category, "ph": "X", "ts": ts, "dur": dur}
                yield event | place | {"args": values}
