"""Which batches, micro-batches and chunks of prompts are tried.

Batches are a few powers of two where the workload leaves them open, micro-batches are powers of two
up to the batch. A prompt is computed whole, or in the default chunks where a few prompts are far
longer than most (`workload.chunk_tokens`). Shorter chunks need less memory and take longer, as each
of them reads all weights: they are tried beside the default one where they leave layers much more
room (`shorter_chunks`). Where nothing fits so, `spare_sizes` follow: fewer requests in flight, down
to one, and every chunk from the longest prompt down to the shortest one. What they come to at last
(one request, any chunk) depends on the longest request alone, so that more requests never make a
job fit, and never keep it from fitting where the batch is open.

Not covered: the time that chunks take; the closed form prices prompts as if they were computed
whole, and simulated runs of the plans that come out best decide.
"""

from collections.abc import Iterator

from llmpq.planner.instance import capacity
from llmpq.planner.layouts import Mix, num_stages
from llmpq.planner.problem import Place, Problem, Sizes
from llmpq.workload import LEAST_CHUNK_TOKENS

AUTO_BATCHES = (8, 16, 32, 64, 128, 256, 512)
SPARE_BATCHES = (4, 2, 1)  # where the batch is open and nothing fits with more
MOST_SHORTER = 3  # chunks below the default one, for a mix and batch
MUCH_ROOM = 0.03  # of a device's memory: what a shorter chunk must save


def all_sizes(problem: Problem) -> list[Sizes]:
    """Every batch with its micro-batches and the default chunk."""
    return [_sizes(batch) for batch in batch_options(problem)]


def _sizes(batch: int, chunk_tokens: int | None = None) -> Sizes:
    options = micro_batch_options(batch)
    return Sizes(batch, options, options, chunk_tokens)


def batch_options(problem: Problem) -> list[int]:
    """Requests in flight that are tried."""
    count = len(problem.lengths)
    if problem.workload.batch != "auto":
        return [min(problem.workload.batch, count)]
    return sorted({min(batch, count) for batch in AUTO_BATCHES})


def micro_batch_options(batch: int) -> tuple[int, ...]:
    """Powers of two up to the batch, and the batch itself."""
    return tuple(sorted({2**k for k in range(batch.bit_length())} | {batch}))


def chunk_options(problem: Problem) -> list[int]:
    """The longest prompt, a half of it, a quarter and so on; the longest first."""
    chunks = [problem.max_prompt_tokens]
    while chunks[-1] > LEAST_CHUNK_TOKENS:
        chunks.append(max(LEAST_CHUNK_TOKENS, -(-chunks[-1] // 2)))
    return chunks


# ---- chunks beside the default one


def with_shorter_chunks(problem: Problem, mix: Mix) -> list[Sizes]:
    """Every batch with the chunks that are worth a try for these places, the longest first."""
    return [
        _sizes(batch, chunk)
        for batch in batch_options(problem)
        for chunk in shorter_chunks(problem, mix, batch)
    ]


def shorter_chunks(problem: Problem, mix: Mix, batch: int) -> tuple[int, ...]:
    """Chunks below the default one that leave the smallest device much more room.

    Each at least `MUCH_ROOM` more than the next longer one; `MOST_SHORTER` at most.
    """
    smallest = min((place for place, _ in mix), key=lambda place: place.memory_bytes)
    key = ("shorter chunks", smallest, num_stages(mix), batch)
    return problem.once(key, lambda: _shorter(problem, smallest, num_stages(mix), batch))


def _shorter(problem: Problem, place: Place, stages: int, batch: int) -> tuple[int, ...]:
    default = problem.chunk_tokens(Sizes(batch, (1,), (1,)))
    found: list[int] = []
    before = _room(problem, place, stages, batch, default)
    for chunk in chunk_options(problem):
        room = _room(problem, place, stages, batch, chunk) if chunk < default else before
        if room - before >= MUCH_ROOM * place.memory_bytes and len(found) < MOST_SHORTER:
            found.append(chunk)
            before = room
    return tuple(found)


def _room(problem: Problem, place: Place, stages: int, batch: int, chunk: int) -> float:
    """Bytes for layers of a stage in the middle, with micro-batches of 1."""
    sizes = Sizes(batch, (1,), (1,), chunk)
    return float(capacity(problem, sizes, place, False, False, stages)[0, 0])


# ---- where nothing fits


def least_batch(problem: Problem) -> int:
    """The fewest requests in flight that a plan may have."""
    least = min(batch_options(problem))
    return least if problem.workload.batch != "auto" else min(least, *SPARE_BATCHES)


def spare_sizes(problem: Problem) -> Iterator[list[Sizes]]:
    """Sizes that need less memory, step by step: a step is for where those before have no plan."""
    least, fewest = min(batch_options(problem)), least_batch(problem)
    batches = [batch for batch in SPARE_BATCHES if fewest <= batch < least]
    for batch in (least, *batches):
        yield [_sizes(batch, chunk) for chunk in chunk_options(problem)]
