"""Jobs that a stage runs before the first request, to measure memory and capture decode steps.

`warm_up` runs one job of each kind at the largest size that the plan reserves, and notes what they
take in the memory account. Then it runs decode steps of the other sizes that the plan's requests
will ask for, where steps are captured in CUDA graphs. Inputs are zeros.
"""

from collections.abc import Iterator
from functools import partial

import torch

from llmpq.job import Job, Member
from llmpq.kernel import graph_lengths
from llmpq.plan_data import Plan, reserve_of
from llmpq.runtime.rehearsal import MemoryAccount, peak_bytes
from llmpq.runtime.worker import Worker
from llmpq.workload import planned_lengths


@torch.inference_mode()
def warm_up(worker: Worker, plan: Plan, account: MemoryAccount) -> None:
    """Runs the stage's largest jobs and notes their memory.

    Raises `InfeasibleError` where the memory account is above its cap.
    """
    device = worker.stage.device
    # The first round makes the cache's buffers, and is the only one that runs a step which is
    # then captured: its memory stays the graph's.
    rounds = [
        [peak_bytes(partial(_run_on_zeros, worker, job), device) for job in largest_jobs(plan)]
        for _ in range(2)
    ]
    steps = worker.steps
    (*_, step), prefills = rounds[0], max(rounds[1])
    activations = prefills + step if steps.graphs.wanted else prefills
    account.cache = worker.cache.num_bytes
    account.activations = steps.num_bytes + activations
    account.check()
    if steps.graphs.wanted:
        for job in planned_steps(plan):
            _run_on_zeros(worker, job)


def planned_steps(plan: Plan) -> Iterator[Job]:
    """Steps of whole lanes at every width from the shortest prompt on, widest first."""
    shortest = min(prompt for prompt, _ in planned_lengths(plan.workload))
    for lane, shape in enumerate(reserve_of(plan).lanes):
        least = min(shortest + 1, shape.tokens)
        for width in reversed([n for n in graph_lengths(shape.tokens) if n >= least]):
            rows = range(shape.rows)
            members = tuple(Member(lane, row, width - 1, row, 1) for row in rows)
            yield Job(False, members, 0, width, shape.rows)


def largest_jobs(plan: Plan) -> list[Job]:
    """A prefill of unequal prompts, the last chunk of a long prompt, and a decode step."""
    reserve = reserve_of(plan)
    longest, chunk, prompt = reserve.longest, reserve.chunk_tokens, reserve.prompt_tokens
    lane = max(range(len(reserve.lanes)), key=lambda i: reserve.lanes[i].tokens)
    rows = reserve.lanes[lane].rows
    prompts = [max(1, chunk - 1), *[chunk] * (plan.prefill_micro_batch - 1)]
    newcomers = tuple(Member(lane, i % rows, n, i, 0) for i, n in enumerate(prompts))
    ends = newcomers[0]._replace(prompt_tokens=prompt)
    steps = tuple(Member(lane, row, longest - 1, row, 1) for row in range(rows))
    return [
        Job(True, newcomers, 0, max(prompts), len(prompts)),
        Job(True, (ends,), prompt - min(chunk, prompt), prompt, 1),
        Job(False, steps, 0, longest, rows),
    ]


def _run_on_zeros(worker: Worker, job: Job) -> None:
    worker.cache.rearrange(job)
    worker.steps.rearrange(job)
    shape, kind = worker.given_shape(job), worker.given_kind()
    worker.compute(job, torch.zeros(shape, dtype=kind, device=worker.stage.device))
