"""A simulated run as text: who works when, and why stages are idle.

A row a stage, and a link where it is busy for more than a fifth of the shown time. Below the whole
run a few decode steps of each lane from its middle. Only renders; decides nothing.
"""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from llmpq.costs.simulate import SimulatedRun
from llmpq.planner.bubbles import Bubble, by_cause, describe, remedy, server_names
from llmpq.render.plan_report import styled

PREFILL, SOME_PREFILL, DECODE, SOME_DECODE, WAITING = "#+=-."
LEGEND = "# prefill, = decode, + and - for part of the time, . waiting"
MOSTLY, HARDLY = 0.6, 0.1  # shares of a cell's time
BUSY_LINK = 0.2  # share of the shown time
ZOOM_STEPS = 3  # of each lane
BUSY_WIDTH = 7  # " 100 % "
MIN_CELLS, MAX_CELLS = 20, 240
SHOWN_PERCENT = 0.05  # of a stage's time; smaller bubbles are not listed


def print_timeline(console: Console, run: SimulatedRun, bubbles: Sequence[Bubble]) -> None:
    """The whole run, some of its decode steps, and its bubbles."""
    names = server_names(len(run.busy_s) // 2)
    whole, cells = (0.0, run.total_s), _cells(console, names)
    title = f"the whole run, {run.total_s:.3g} s ({LEGEND})"
    _print_rows(console, title, _rows(run, names, whole, cells))
    window = _middle_steps(run)
    if window is not None:
        title = f"from its middle, {1e3 * (window[1] - window[0]):.3g} ms"
        title += " (last digit of a decode step's lane, # prefill, . waiting)"
        _print_rows(console, title, _digit_rows(run, names, window, cells))
    _print_bubbles(console, run, bubbles, names)


def _cells(console: Console, names: Sequence[str]) -> int:
    """Characters for the time."""
    room = console.width - max(map(len, names)) - BUSY_WIDTH - 1
    return min(MAX_CELLS, max(MIN_CELLS, room))


def _print_rows(console: Console, title: str, rows: Sequence[tuple[str, float, str]]) -> None:
    console.print(styled((title, "bold")))
    width = max(len(name) for name, _, _ in rows)
    for name, busy, cells in rows:
        line = f"{name:<{width}}{100 * busy:>4.0f} %  {cells}"
        console.print(styled(line), no_wrap=True, overflow="crop")


def _rows(
    run: SimulatedRun, names: Sequence[str], window: tuple[float, float], cells: int
) -> list[tuple[str, float, str]]:
    """(server, busy share, a character for each cell of the window)."""
    edges = np.linspace(*window, cells + 1)
    is_prefill = run.jobs.step == 0
    rows = []
    for server, name in enumerate(names):
        prefill, decode = (
            _shares(run.start_s[mine, server], run.end_s[mine, server], edges)
            for mine in (is_prefill, ~is_prefill)
        )
        busy = float((prefill + decode).mean())
        if server % 2 == 0 or busy > BUSY_LINK:
            pairs = zip(prefill, decode, strict=True)
            rows.append((name, busy, "".join(_character(*pair) for pair in pairs)))
    return rows


def _character(prefill: float, decode: float) -> str:
    share = prefill + decode
    if share < HARDLY:
        return WAITING
    full, some = (PREFILL, SOME_PREFILL) if prefill >= decode else (DECODE, SOME_DECODE)
    return full if share >= MOSTLY else some


def _shares(start: np.ndarray, end: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Busy share of each cell, from jobs one after another."""
    if not len(start):
        return np.zeros(len(edges) - 1)
    times = np.stack([start, end], axis=1).ravel()
    done = (end - start).cumsum()
    worked = np.stack([done - (end - start), done], axis=1).ravel()
    return np.diff(np.interp(edges, times, worked)) / np.diff(edges)


def _middle_steps(run: SimulatedRun) -> tuple[float, float] | None:
    """Seconds in which the first stage does some decode steps in the middle of the run."""
    steps = np.flatnonzero(run.jobs.step > 0)
    count = ZOOM_STEPS * len(np.unique(run.jobs.micro_batch[steps]))
    if len(steps) <= count:
        return None
    first = (len(steps) - count) // 2
    start, end = (float(run.start_s[steps[i], 0]) for i in (first, first + count))
    return (start, end) if end > start else None


def _digit_rows(
    run: SimulatedRun, names: Sequence[str], window: tuple[float, float], cells: int
) -> list[tuple[str, float, str]]:
    edges = np.linspace(*window, cells + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    rows = []
    for server, name in enumerate(names):
        start, end = run.start_s[:, server], run.end_s[:, server]
        busy = float(_shares(start, end, edges).mean())
        if server % 2 == 0 or busy > BUSY_LINK:
            at = np.searchsorted(start, middles, side="right") - 1
            digits = (
                _digit(run, i) if i >= 0 and end[i] > middle else WAITING
                for i, middle in zip(at, middles, strict=True)
            )
            rows.append((name, busy, "".join(digits)))
    return rows


def _digit(run: SimulatedRun, job: int) -> str:
    return str(run.jobs.micro_batch[job] % 10) if run.jobs.step[job] else PREFILL


def _print_bubbles(
    console: Console, run: SimulatedRun, bubbles: Sequence[Bubble], names: Sequence[str]
) -> None:
    count = f"{int((run.jobs.step == 0).sum())} prefills"
    count += f" and {int((run.jobs.step > 0).sum())} decode steps"
    table = Table(title=f"the whole run: {count}", title_justify="left")
    table.add_column("stage", overflow="fold")
    table.add_column("busy", justify="right")
    table.add_column("idle time by cause, in % of the run", overflow="fold")
    for stage, busy in enumerate(run.busy_s[::2]):
        mine = [b for b in bubbles if b.stage == stage and b.percent >= SHOWN_PERCENT]
        texts = [
            f"{b.percent:.1f} {describe(b.cause, b.server, names, b.micro_batch)}" for b in mine
        ]
        share = f"{100 * busy / run.total_s:.1f} %"
        table.add_row(names[2 * stage], share, "; ".join(texts) or "-")
    console.print(table)
    console.print(largest(bubbles, names))


def largest(bubbles: Sequence[Bubble], names: Sequence[str]) -> str:
    """The largest bubble over all stages, and what would shrink it."""
    causes = by_cause(bubbles, len(names) // 2)
    if not causes:
        return "no stage is ever idle"
    cause, server, percent = causes[0]
    text = describe(cause, server, names, None)
    return f"largest: {text}, {percent:.1f} % of all stages' time; {remedy(cause, server, names)}"
