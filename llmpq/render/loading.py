"""Progress of a run's start: how far a stage has loaded, and how many kernels are compiled.

Every stage shows how far it is, as the slowest may be any of them: a line every few seconds, or a
bar where there is only one stage.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from llmpq.plan_data import Plan
from llmpq.render.console import WIDTH, PlainConsole
from llmpq.render.progress import ProgressBar, progress

if TYPE_CHECKING:
    from torch import Tensor

    from llmpq.checkpoint.packed_cache import WeightCache
    from llmpq.models.raw_tensors import RawTensor

COMPILING_EVERY_S = 2.0


@contextmanager
def shown_loading(
    plan: Plan, rank: int, quiet: bool, cache: "WeightCache"
) -> "Iterator[WeightCache]":
    """Yields `cache`, wrapped so that it shows how far it has filled the stage of `rank`."""
    stage, alone = plan.stages[rank], len(plan.stages) == 1
    what = "loading, layers" if alone else f"stage {rank}: loading, layers"
    out = PlainConsole(quiet=quiet) if alone else _lines(quiet)
    with progress(out, what, stage.num_layers) as shown:
        yield ShownCache(cache, stage.first_layer, shown)


def shown_compiling(rank: int, quiet: bool) -> Callable[[int, int], None]:
    """Returns a function that prints every few seconds how many kernels are compiled."""
    out, last_s = _lines(quiet), [time.monotonic()]

    def tell(done: int, total: int) -> None:
        now = time.monotonic()
        if now - last_s[0] >= COMPILING_EVERY_S:
            last_s[0] = now
            out.print(f"stage {rank}: compiled {done} of {total} kernels")

    return tell


def _lines(quiet: bool) -> Console:
    """Standard error without bars, which several processes cannot share."""
    return PlainConsole(quiet=quiet, force_terminal=False, width=WIDTH)


class ShownCache:
    """A cache that shows which tensor it fills next."""

    def __init__(self, inner: "WeightCache", first_layer: int, shown: ProgressBar) -> None:
        self._inner, self._first, self._shown, self._done = inner, first_layer, shown, 0

    def fill(
        self,
        raw: "RawTensor",
        name: str,
        read: "Callable[[], Tensor]",
        take: "Callable[[Tensor], None]",
    ) -> None:
        """Shows the tensor, then fills it as the wrapped cache does."""
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        self._done = numbers[0] - self._first if numbers else self._done
        self._shown.update(self._done, name)
        self._inner.fill(raw, name, read, take)
