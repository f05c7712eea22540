"""A request that breaks fails alone; where memory runs out, smaller micro-batches go on."""

import math
import threading
from contextlib import contextmanager

import pytest
import torch
from families import hand_made_plan

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.models.stage_model import StageModel, load_config
from llmpq.prompts.request import Finished
from llmpq.runtime.engine import StageEngine
from llmpq.runtime.transport import LocalHub, LocalTransport

CPU = torch.device("cpu")
BROKEN_TOKEN = 5  # whose embedding is not a number


@contextmanager
def engines(model, ends, **sizes):
    """One for each stage, and their threads' way to run."""
    plan = hand_made_plan(model.spec, ends, **sizes)
    hub = LocalHub(len(ends))
    config, weights = load_config(model.folder), Checkpoint(model.folder)
    yield [
        StageEngine(
            plan,
            config,
            weights,
            LocalTransport(rank, hub),
            torch.float32,
            CPU,
            eos_ids=model.eos_ids,
            rehearse=False,
        )
        for rank in range(len(ends))
    ]


def run(engines, requests) -> tuple[dict[int, Finished], list]:
    """Finished requests by id, and the stages' reports."""
    finished: dict[int, Finished] = {}
    reports = []
    lengths = {r.number: (len(r.prompt), r.new_tokens) for r in requests}
    fetch = {r.number: r for r in requests}.__getitem__

    def work(engine):
        if engine.transport.rank == 0:
            engine.lead(lengths, fetch, lambda f: finished.update({f.request.id: f}))
        else:
            engine.follow()
        reports.append(engine.measure())

    threads = [threading.Thread(target=work, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
    assert len(reports) == len(engines)
    return finished, reports[0]


@pytest.mark.parametrize("ends", [[4], [1, 4]])
def test_a_request_with_nan_fails_alone(family_model, ends):
    model = family_model("llama")
    requests = [r for r in model.requests if BROKEN_TOKEN not in r.prompt]
    requests = [r for r in requests if BROKEN_TOKEN not in model.expected[r.id]]
    broken = requests[3]
    prompt = (*broken.prompt[:-1], BROKEN_TOKEN)
    requests[3] = type(broken)(broken.id, broken.number, prompt, broken.new_tokens)
    with engines(model, ends, batch=4, p=2, q=2) as stages:
        stages[0].worker.stage.model.get_input_embeddings().weight[BROKEN_TOKEN] = math.nan
        finished, _ = run(stages, requests)
    one = finished.pop(broken.id)
    assert (one.reason, one.token_ids) == ("error", ())
    assert "NaN or infinite at new token 0" in str(one.error)
    assert {i: list(f.token_ids) for i, f in finished.items()} == {
        r.id: model.expected[r.id] for r in requests if r.id != broken.id
    }


class SmallMemory:
    """A stage that runs out of memory above so many rows."""

    def __init__(self, stage: StageModel, most: int, error: Exception) -> None:
        self._run, self._most, self._error = stage.run, most, error
        self.sizes: list[int] = []

    def __call__(self, hidden, *args):
        self.sizes.append(len(hidden))
        if len(hidden) > self._most:
            raise self._error
        return self._run(hidden, *args)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_micro_batches_are_halved_where_memory_runs_out(family_model, error):
    model = family_model("llama")
    with engines(model, [2, 4], batch=8, p=6, q=8) as stages:
        small = SmallMemory(stages[1].worker.stage, 2, error)
        stages[1].worker.stage.run = small
        finished, reports = run(stages, model.requests)
    assert {i: list(f.token_ids) for i, f in finished.items()} == model.expected
    assert (reports[0].most_prefill_rows, reports[0].most_decode_rows) == (None, None)
    assert (reports[1].most_prefill_rows, reports[1].most_decode_rows) == (2, 2)
    assert sum(size > 2 for size in small.sizes) <= 4  # found out once a phase and size


def test_other_errors_are_not_taken_for_a_lack_of_memory(family_model):
    model = family_model("llama")
    with engines(model, [4], batch=4, p=2, q=2) as (engine,):
        engine.worker.stage.run = SmallMemory(engine.worker.stage, 0, RuntimeError("shape"))
        with pytest.raises(RuntimeError, match="shape"):
            engine.lead({0: (24, 12)}, model.requests.__getitem__, lambda _: None)
