"""What `llmpq-run` keeps and shows while weights load.

Every stage says how far it is, as the slowest may be any of them: a line every few seconds, or a
bar where there is only one.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmpq.cli.common import console
from llmpq.cli.progress import Progress, progress
from llmpq.cli.run_options import RunOptions
from llmpq.plan_data import Plan

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from llmpq.checkpoint.checkpoint import Checkpoint
    from llmpq.checkpoint.packed_cache import PackedCache, WeightCache
    from llmpq.models.sharding import ShardGroup
    from llmpq.models.stage_model import RawTensor

COMPILING_EVERY_S = 2.0


def open_cache(plan: Plan, options: RunOptions, weights: "Checkpoint") -> "PackedCache | None":
    """The packed weights of --cache-dir; None without it. Raises `UserError` where it is no use."""
    from llmpq.checkpoint.packed_cache import PackedCache
    from llmpq.checkpoint.roundings import rounding_key

    if options.cache_dir is None:
        return None
    rounding = rounding_key(plan.quantizer, options.moments, options.plan)
    say = console(options.quiet).print
    return PackedCache(
        options.cache_dir,
        weights.stamp,
        rounding,
        lambda line: say(f"warning: {line}", soft_wrap=True),
    )


@contextmanager
def shown_loading(
    plan: Plan,
    rank: int,
    options: RunOptions,
    cache: "PackedCache | None",
    shares: "ShardGroup | None" = None,
) -> "Iterator[WeightCache]":
    """`cache`, or none, that shows how far it has filled the stage of `rank`.

    Of workers that share the stage only the first one does.
    """
    from llmpq.checkpoint.packed_cache import NO_CACHE

    stage, alone = plan.stages[rank], len(plan.stages) == 1
    quiet = options.quiet or (shares is not None and shares.rank > 0)
    what = "loading, layers" if alone else f"stage {rank}: loading, layers"
    out = console(quiet) if alone else _lines(quiet)
    with progress(out, what, stage.num_layers) as shown:
        yield _Shown(cache or NO_CACHE, stage.first_layer, shown)


def shown_compiling(rank: int, options: RunOptions) -> Callable[[int, int], None]:
    """Says every few seconds how many kernels of a stage are compiled."""
    out, last_s = _lines(options.quiet), [time.monotonic()]

    def tell(done: int, total: int) -> None:
        now = time.monotonic()
        if now - last_s[0] >= COMPILING_EVERY_S:
            last_s[0] = now
            out.print(f"stage {rank}: compiled {done} of {total} kernels")

    return tell


def _lines(quiet: bool) -> "Console":
    """Standard error without bars, which several processes cannot share."""
    from llmpq.cli.plain_console import PlainConsole

    return PlainConsole(quiet=quiet, force_terminal=False, width=120)


class _Shown:
    """Says which tensor is next before it is filled in."""

    def __init__(self, inner: "WeightCache", first_layer: int, shown: Progress) -> None:
        self._inner, self._first, self._shown, self._done = inner, first_layer, shown, 0

    def fill(
        self,
        raw: "RawTensor",
        name: str,
        read: "Callable[[], Tensor]",
        take: "Callable[[Tensor], None]",
    ) -> None:
        """As the cache does."""
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        self._done = numbers[0] - self._first if numbers else self._done
        self._shown.update(self._done, name)
        self._inner.fill(raw, name, read, take)
