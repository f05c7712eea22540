"""Receives ahead of the computation, in a thread of its own."""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """A queue of the items that `receive` returns, in order, until it returns None.

    The sender's messages in flight bound how far it runs ahead. Errors of `receive` are raised
    where the computation asks for the next item.
    """

    def __init__(self, receive: Callable[[], T | None]) -> None:
        self._receive = receive
        self._arrived: queue.SimpleQueue[T | BaseException | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def get(self) -> T | None:
        """Waits for the next item; None at the end."""
        return self._checked(self._arrived.get())

    def get_if_here(self) -> T | None:
        """The next item if it has arrived, else None."""
        return None if self._arrived.empty() else self._checked(self._arrived.get())

    def fail(self, error: BaseException) -> None:
        """Raises an error at the next `get`, or at the one that waits already."""
        self._arrived.put(error)

    def _checked(self, item: T | BaseException | None) -> T | None:
        if isinstance(item, BaseException):
            raise item
        return item

    def _run(self) -> None:
        try:
            while (item := self._receive()) is not None:
                self._arrived.put(item)
            self._arrived.put(None)
        except BaseException as error:
            self._arrived.put(error)
