"""All stages of a plan as threads of this process: the twin of the runtime for tests and trials.

Slower than processes (one interpreter), but the same engine, schedule and tokens.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from llmpq.models.stage_model import load_config
from llmpq.plan import Plan
from llmpq.runtime.batching import Request
from llmpq.runtime.checkpoint import Checkpoint
from llmpq.runtime.engine import Engine
from llmpq.runtime.sampler import Sampling
from llmpq.runtime.transport import LocalHub, LocalTransport


def generate_locally(
    plan: Plan,
    folder: Path,
    requests: Sequence[Request],
    dtype: torch.dtype = torch.float32,
    sampling: Sampling = Sampling(),
    eos_ids: frozenset[int] = frozenset(),
    pad_id: int = 0,
) -> dict[str | int, list[int]]:
    """The new tokens of every request, by its id. The plan's rehearsal is not played."""
    hub = LocalHub(len(plan.stages))
    engines = _engines(plan, folder, hub, dtype, sampling, eos_ids)
    tokens: dict[str | int, list[int]] = {request.id: [] for request in requests}
    failures: list[BaseException] = []

    def work(engine: Engine) -> None:
        try:
            if engine.transport.rank == 0:
                engine.lead(requests, pad_id, lambda r, token, last: tokens[r.id].append(token))
            else:
                engine.follow()
        except BaseException as error:
            failures.append(error)
            hub.abort()

    threads = [threading.Thread(target=work, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return tokens


def _engines(
    plan: Plan,
    folder: Path,
    hub: LocalHub,
    dtype: torch.dtype,
    sampling: Sampling,
    eos_ids: frozenset[int],
) -> list[Engine]:
    """One for each stage."""
    config, weights = load_config(folder), Checkpoint(folder)
    # One after the other: transformers sets torch's default data type while it builds a model.
    return [
        Engine(
            plan,
            config,
            weights,
            LocalTransport(rank, hub),
            dtype,
            torch.device("cpu"),
            sampling,
            eos_ids,
            rehearse=False,
        )
        for rank in range(hub.size)
    ]
