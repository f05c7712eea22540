"""Sends behind the computation, in a thread of its own."""

import queue
import threading
from collections.abc import Callable


class Outbox:
    """Runs the given send functions in order, while the computation goes on.

    Errors are raised at the next `put` or `close`, and are passed to `on_error` at once, as the
    computation may be waiting elsewhere.
    """

    def __init__(self, on_error: Callable[[BaseException], None] = lambda _: None) -> None:
        self._on_error = on_error
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, send: Callable[[], None]) -> None:
        """Calls `send` after all functions that were given before."""
        self._check()
        self._todo.put(send)

    def close(self) -> None:
        """Waits until everything is sent."""
        self._todo.put(None)
        self._thread.join()
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while (send := self._todo.get()) is not None:
                send()
        except BaseException as error:
            self._error = error
            self._on_error(error)
