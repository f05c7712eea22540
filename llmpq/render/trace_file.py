"""Chrome traces (chrome://tracing, Perfetto): one process per stage, with its link as a thread."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmpq.plan_data import Plan

Event = dict[str, object]


def stage_names(plan: "Plan") -> Iterator[Event]:
    """Yields the names of processes and threads for viewers, and their order."""
    from llmpq.planner.bubbles import server_names

    names = server_names(len(plan.stages))
    for stage in plan.stages:
        count = f"{stage.tensor_parallel} x " if stage.tensor_parallel > 1 else ""
        layers = f"layers {stage.first_layer}-{stage.end_layer - 1}"
        title = f"stage {stage.rank}: {count}{stage.devices[0]} on {stage.node} ({layers})"
        yield _metadata("process_name", stage.rank, {"name": title})
        yield _metadata("process_sort_index", stage.rank, {"sort_index": stage.rank})
        for thread, name in ((0, title), (1, names[2 * stage.rank + 1])):
            number = 2 * stage.rank + thread
            yield _metadata("thread_name", stage.rank, {"name": name}, number)
            yield _metadata("thread_sort_index", stage.rank, {"sort_index": number}, number)


def call(
    stage: int,
    kind: str,
    name: str,
    start_us: float,
    length_us: float,
    args: Event,
    on_link: int = 0,
) -> Event:
    """Makes an event of what a stage, or the link after it, does; `kind` is its phase."""
    where: Event = {"pid": stage, "tid": 2 * stage + on_link}
    event: Event = {"name": name, "cat": kind, "ph": "X", "ts": start_us, "dur": length_us}
    return event | where | {"args": args}


def write_events(path: Path, events: Sequence[Event]) -> None:
    """Writes a trace file."""
    from llmpq.artifact import write_text

    write_text(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")


def write_measured(path: Path, plan: "Plan", spans: Sequence[Sequence[Sequence[float]]]) -> None:
    """Writes what every stage of a run computed, as the simulator's trace shows what it expects.

    `spans`: for each stage, calls as (is prefill, micro-batch, tokens, start and end in seconds).
    """
    events = list(stage_names(plan))
    for rank, calls in enumerate(spans):
        for prefill, micro_batch, tokens, start_s, end_s in calls:
            kind = "prefill" if prefill else "decode"
            name = f"{kind} {micro_batch:.0f} x {tokens:.0f}"
            sizes: Event = {"requests": int(micro_batch), "tokens": int(tokens)}
            events.append(call(rank, kind, name, 1e6 * start_s, 1e6 * (end_s - start_s), sizes))
    write_events(path, events)


def _metadata(name: str, pid: int, values: Event, tid: int | None = None) -> Event:
    thread: Event = {} if tid is None else {"tid": tid}
    return {"name": name, "ph": "M", "pid": pid, "args": values} | thread
