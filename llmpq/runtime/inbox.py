"""Receives ahead of the computation, in a thread of its own."""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """What `receive` brings, in order, until it brings None.

    How far it runs ahead is bounded by what the sender has under way. Errors of `receive` are
    raised where the computation asks.
    """

    def __init__(self, receive: Callable[[], T | None]) -> None:
        self._receive = receive
        self._come: queue.SimpleQueue[T | BaseException | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def get(self) -> T | None:
        """The next one; None at the end. Waits."""
        return self._checked(self._come.get())

    def get_if_here(self) -> T | None:
        """The next one if it has come."""
        return None if self._come.empty() else self._checked(self._come.get())

    def fail(self, error: BaseException) -> None:
        """Raises an error where the computation asks next, or waits already."""
        self._come.put(error)

    def _checked(self, item: T | BaseException | None) -> T | None:
        if isinstance(item, BaseException):
            raise item
        return item

    def _run(self) -> None:
        try:
            while (item := self._receive()) is not None:
                self._come.put(item)
            self._come.put(None)
        except BaseException as error:
            self._come.put(error)
