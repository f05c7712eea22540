"""Progress of long work: a bar on a terminal, a plain line every few seconds elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmpq.plain import plain

if TYPE_CHECKING:
    from rich.console import Console

SILENT_S = 2.0  # shorter work shows nothing
LINE_EVERY_S = 5.0
BAR_EVERY_S = 0.1


class ProgressBar:
    """Shows what `update(done, detail)` is told, after the first two seconds."""

    def __init__(self, out: "Console", what: str, total: int) -> None:
        self._out, self._what, self._total = out, what, total
        self._started = self._said = time.monotonic()
        self._bar: object | None = None

    def is_due(self) -> bool:
        """Whether an update would be seen; asking first saves making its detail."""
        now = time.monotonic()
        every = BAR_EVERY_S if self._out.is_terminal else LINE_EVERY_S
        return now - self._started >= SILENT_S and now - self._said > every

    def update(self, done: int, detail: str = "", total: int | None = None) -> None:
        """Shows that `done` of the total are finished; `total`: a new one, of a new phase."""
        self._total = self._total if total is None else total
        now = time.monotonic()
        if now - self._started < SILENT_S:
            return
        if self._out.is_terminal:
            self._said = now
            self._draw(done, detail)
        elif now - self._said > LINE_EVERY_S:
            self._said = now
            left = (
                f"about {(now - self._started) * (self._total / done - 1):.0f} s left"
                if done
                else ""
            )
            self._out.print(f"{self._what}: {done}/{self._total} {detail} {left}".rstrip())

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.stop()  # type: ignore[attr-defined]

    def _draw(self, done: int, detail: str) -> None:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        if self._bar is None:
            said = TextColumn("{task.description}", markup=False)
            columns = (said, BarColumn(), TimeRemainingColumn())
            bar = RichProgress(*columns, console=self._out, transient=True)
            bar.add_task(plain(self._what), total=self._total)
            bar.start()
            self._bar = bar
        description = plain(f"{self._what} {done}/{self._total} {detail}".rstrip())
        self._bar.update(0, completed=done, total=self._total, description=description)  # type: ignore[attr-defined]


@contextmanager
def progress(out: "Console", what: str, total: int) -> Iterator[ProgressBar]:
    """Yields a `ProgressBar`, which is closed at the end."""
    shown = ProgressBar(out, what, total)
    try:
        yield shown
    finally:
        shown.close()
