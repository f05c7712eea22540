"""All stages of a plan as threads of this process: the twin of the runtime for tests and trials.

Slower than processes (one interpreter), but the same engine, schedule and tokens.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.models.stage_model import load_config
from llmpq.plan_data import Plan
from llmpq.prompts.request import Finished, Request
from llmpq.runtime.engine import Engine
from llmpq.runtime.sampler import Sampling
from llmpq.runtime.shard_group import LocalShardHub
from llmpq.runtime.transport import LocalHub, LocalTransport


def generate_locally(
    plan: Plan,
    folder: Path,
    requests: Sequence[Request],
    dtype: torch.dtype = torch.float32,
    sampling: Sampling = Sampling(),
    eos_ids: frozenset[int] = frozenset(),
    refill: bool = True,
    chunk: int | None = None,
    samplings: Sequence[Sampling] = (),
) -> dict[str | int, list[int]]:
    """The new tokens of every request, by its id. The plan's rehearsal is not played."""
    crew = _Crew(plan)
    lengths = {request.number: (len(request.prompt), request.new_tokens) for request in requests}
    fetch = {request.number: request for request in requests}.__getitem__
    tokens: dict[str | int, list[int]] = {}

    def keep(finished: Finished) -> None:
        assert finished.request.id not in tokens
        tokens[finished.request.id] = list(finished.token_ids)

    def work(place: _Place) -> None:
        engine = crew.engine(place, folder, dtype, sampling, eos_ids)
        if place == (0, 0):
            engine.lead(lengths, fetch, keep, refill=refill, chunk=chunk, samplings=samplings)
        else:
            engine.follow()

    crew.run(work)
    return tokens


class _Place(NamedTuple):
    """A worker: its stage, and which of those that share it."""

    stage: int
    shard: int


class _Crew:
    """The workers of a plan as threads, and what connects them."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        sizes = [stage.tensor_parallel for stage in plan.stages]
        self._places = [_Place(i, shard) for i, size in enumerate(sizes) for shard in range(size)]
        self._hub = LocalHub(len(sizes), sizes)
        self._shard_hubs = [LocalShardHub(size) for size in sizes]
        # One after the other: transformers sets torch's default data type while it builds a model.
        self._loading = threading.Lock()
        self._failures: list[BaseException] = []

    def engine(
        self,
        place: _Place,
        folder: Path,
        dtype: torch.dtype,
        sampling: Sampling,
        eos_ids: frozenset[int],
    ) -> Engine:
        """The engine of one worker, in its own thread."""
        stage, shard = place
        hub = self._shard_hubs[stage]
        return Engine(
            self._plan,
            load_config(folder),
            Checkpoint(folder),
            LocalTransport(stage, self._hub, shard),
            dtype,
            torch.device("cpu"),
            sampling,
            eos_ids,
            rehearse=False,
            group=hub.groups()[shard] if hub.size > 1 else None,
            loading=self._loading,
        )

    def run(self, work: Callable[[_Place], None]) -> None:
        """Does `work` in a thread for each worker; raises what failed first."""
        threads = [threading.Thread(target=self._try, args=(work, p)) for p in self._places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def _try(self, work: Callable[[_Place], None], place: _Place) -> None:
        try:
            work(place)
        except BaseException as error:
            self._failures.append(error)
            self._hub.abort()
            for hub in self._shard_hubs:
                hub.abort()
