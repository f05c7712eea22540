"""How a process of a run ends early: by Ctrl-C or SIGTERM, or because another worker is gone.

Its main thread may be blocked in a wait outside of Python, where no signal handler runs.
`ended_by_signals` is for processes that compute: a thread ends them. `interruptible` is for a
parent that only waits for others: it raises an error in the main thread, so that the parent ends
its workers too. No result is lost either way: what was written has reached the operating system.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from llmpq.errors import LlmpqError, WorkerError
from llmpq.plain import plain

SUPERVISED = "LLMPQ_SUPERVISED"  # the process id of the parent that started this worker
AGAIN = "nothing was written, start again"  # for commands that write at their end
RESUME = "finished requests are in the output, run again with --resume to do the others"
HANDLED = (signal.SIGINT, signal.SIGTERM)
TOGETHER_S = 0.3  # all workers get a signal before the first one ends and is missed
SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


class Ended(LlmpqError):
    """The command ends for a reason outside of it; no cleanup is needed."""


class Interrupted(Ended):
    """A signal ended the command; the exit code is 128 + its number."""

    def __init__(self, number: int, advice: str) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}; {advice}")
        self.exit_code = 128 + number


@contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """Raises `Interrupted` at the first signal; later signals are ignored.

    Has no effect outside of the main thread, nor in a supervised worker, which its parent ends.
    """
    if threading.current_thread() is not threading.main_thread() or SUPERVISED in os.environ:
        yield
        return

    def handle(number: int, frame: object) -> None:
        for other in HANDLED:
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number, advice)

    with _handled_by(handle):
        yield


@contextmanager
def ended_by_signals(
    advice: str, speaks: bool = True, look: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Ends this process when a signal arrives, whatever its main thread does.

    `look` is called first and may end the process with a better reason. Has no effect where
    `interruptible` has none.
    """
    if threading.current_thread() is not threading.main_thread() or SUPERVISED in os.environ:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def wait() -> None:
        received = os.read(reader, 1)
        if received:  # a second signal must find the pipe open; without one it is closed below
            look()
            time.sleep(TOGETHER_S)
            interrupted = Interrupted(received[0], advice)
            end_process(str(interrupted) if speaks else "", interrupted.exit_code)
        os.close(reader)

    threading.Thread(target=wait, daemon=True).start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        with _handled_by(lambda *_: None):  # the byte in the pipe is what counts
            yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


@contextmanager
def _handled_by(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handle) for number in HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_process(message: str, code: int = WorkerError.exit_code) -> NoReturn:
    """Ends this process at once, whatever its main thread does, and prints `message`."""
    flush = threading.Thread(target=_flush, daemon=True)  # the main thread may hold a stream
    flush.start()
    flush.join(0.5)
    start = f"{SHOW_CURSOR}\n" if sys.stderr.isatty() else ""
    text = f"error: {plain(message)}\n" if message else ""
    with suppress(OSError):
        os.write(2, (start + text).encode())
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
