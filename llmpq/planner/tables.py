"""Computed values that a problem keeps: each table has a name and keys and values of one type.

A search asks for the same costs again and again, and problems that are made from one another differ
little. `Problem.cached` looks a value up or computes it; a table says what its values depend on.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Scope(Enum):
    """What the values of a table depend on beside their keys.

    REQUESTS: the model and the list of requests. MACHINES: the cluster and its times too, but
    neither how many requests there are in all nor what quality costs. PROBLEM: all of a problem.
    """

    REQUESTS = "requests"
    MACHINES = "machines"
    PROBLEM = "problem"


@dataclass(frozen=True, eq=False)
class Table(Generic[K, V]):
    """Names computed values that a problem keeps, by keys of one type (`Problem.cached`)."""

    scope: Scope = Scope.PROBLEM


class ValuesByObjects:
    """What is known of some objects, such as a model and a list of requests.

    The objects are kept, so that none is confused with a later one.
    """

    def __init__(self) -> None:
        self.entries: dict[tuple[int, ...], tuple[object, dict[Hashable, Any]]] = {}

    def of(self, *objects: object) -> dict[Hashable, Any]:
        """The values of these very objects."""
        return self.entries.setdefault(tuple(map(id, objects)), (objects, {}))[1]
