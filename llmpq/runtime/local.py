"""Runs all stages of a plan as threads of this process, for `llmpq.library` and tests.

Threads share one interpreter and are slower than processes, but use the same engine and schedule
and give the same tokens. All stages are on the CPU, without the plan's rehearsal.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.roundings import NEAREST, Roundings
from llmpq.models.stage_model import load_config
from llmpq.plan_data import Plan
from llmpq.prompts.request import Finished, Request
from llmpq.runtime.engine import StageEngine
from llmpq.runtime.sampler import Sampling
from llmpq.runtime.shard_group import LocalShardHub
from llmpq.runtime.transport import LocalHub, LocalTransport


class _WorkerId(NamedTuple):
    """The stage of a worker, and its shard of that stage."""

    stage: int
    shard: int


class LocalStages:
    """All workers of a plan, loaded once. Not for use by several threads at a time."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        eos_ids: frozenset[int] = frozenset(),
        roundings: Roundings = NEAREST,
    ) -> None:
        """Loads the weights of the model in `folder`; the tokens `eos_ids` end a request."""
        self._threads = threads = _WorkerThreads(plan)
        self._engines: dict[_WorkerId, StageEngine] = {}

        def load(worker: _WorkerId) -> None:
            self._engines[worker] = threads.engine(worker, folder, dtype, eos_ids, roundings)

        threads.run(load)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling = Sampling(),
        refill: bool = True,
        chunk: int | None = None,
        samplings: Sequence[Sampling] = (),
    ) -> list[Finished]:
        """The finished requests, in the order in which they end.

        The arguments are those of `StageEngine.lead`. After an error the stages are unusable.
        """
        lengths = {one.number: (len(one.prompt), one.new_tokens) for one in requests}
        fetch = {request.number: request for request in requests}.__getitem__
        finished: list[Finished] = []

        def work(worker: _WorkerId) -> None:
            engine = self._engines[worker]
            engine.sampling = sampling
            if worker == (0, 0):
                engine.lead(
                    lengths, fetch, finished.append, refill=refill, chunk=chunk, samplings=samplings
                )
            else:
                engine.follow()

        self._threads.run(work)
        assert len({one.request.id for one in finished}) == len(finished)
        return finished


class _WorkerThreads:
    """The threads of a plan's workers, and the hubs that connect them."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        sizes = [stage.tensor_parallel for stage in plan.stages]
        self._ids = [_WorkerId(i, shard) for i, size in enumerate(sizes) for shard in range(size)]
        self._hub = LocalHub(len(sizes), sizes)
        self._shard_hubs = [LocalShardHub(size) for size in sizes]
        # One after the other: transformers sets torch's default data type while it builds a model.
        self._loading = threading.Lock()
        self._failures: list[BaseException] = []

    def engine(
        self,
        worker: _WorkerId,
        folder: Path,
        dtype: torch.dtype,
        eos_ids: frozenset[int],
        roundings: Roundings,
    ) -> StageEngine:
        """The engine of one worker, loaded in its own thread."""
        stage, shard = worker
        hub = self._shard_hubs[stage]
        return StageEngine(
            self._plan,
            load_config(folder),
            Checkpoint(folder),
            LocalTransport(stage, self._hub, shard),
            dtype,
            torch.device("cpu"),
            eos_ids=eos_ids,
            rehearse=False,
            roundings=roundings,
            group=hub.groups()[shard] if hub.size > 1 else None,
            loading=self._loading,
        )

    def run(self, work: Callable[[_WorkerId], None]) -> None:
        """Calls `work` in a thread for each worker; raises the first error."""
        threads = [threading.Thread(target=self._try, args=(work, p)) for p in self._ids]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def _try(self, work: Callable[[_WorkerId], None], worker: _WorkerId) -> None:
        try:
            work(worker)
        except BaseException as error:
            self._failures.append(error)
            self._hub.abort()
            for hub in self._shard_hubs:
                hub.abort()
