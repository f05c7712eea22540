"""Which batches, micro-batches and chunks of prompts are tried.

Batches are a few powers of two where the workload leaves them open, micro-batches are powers of two
up to the batch. A prompt is computed whole, or in the default chunks where a few prompts are far
longer than most (`workload.chunk_tokens`). Shorter chunks need less memory and take longer, as each
of them reads all weights: they are tried beside the default one where they leave layers much more
room (`shorter_chunks`). Where nothing fits so, `spare_sizes` follow: the fewest requests in flight
with every chunk from the longest prompt down to the shortest one. What they come to at last (one
request, any chunk) depends on the longest request alone, so that more requests never make a job
fit, and never keep it from fitting where the batch is open.

Slots of unequal requests become free one by one, so that large prefill micro-batches never fill;
more lanes than `MOST_LANES` keep no pipeline busier.
"""

from llmpq.planner.instance import capacity
from llmpq.planner.layouts import DeviceSubset, num_stages
from llmpq.planner.problem import Configuration, Problem, Sizes, StageDevices
from llmpq.planner.tables import Table
from llmpq.workload import LEAST_CHUNK_TOKENS

SHORTER_CHUNKS: Table[tuple[StageDevices, int, int], tuple[int, ...]] = Table()

AUTO_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # 1: what fits at all fits with it
MOST_PROMPTS = 16  # of unequal requests in a prefill micro-batch
MOST_LANES = 64
MOST_SHORTER = 3  # chunks below the default one, for a subset and batch
MUCH_ROOM = 0.03  # of a device's memory: what a shorter chunk must save


def all_sizes(problem: Problem) -> list[Sizes]:
    """Every batch with its micro-batches and the default chunk."""
    return [_sizes(problem, batch) for batch in batch_options(problem)]


def sizes_near(problem: Problem, like: Configuration | Sizes) -> list[Sizes]:
    """Half as many requests in flight, as many and twice as many, with the same chunk."""
    near = {like.batch // 2, like.batch, 2 * like.batch}
    default = problem.chunk_tokens(Sizes(like.batch, (1,), (1,)))
    chunk = None if like.chunk_tokens == default else like.chunk_tokens  # as `all_sizes` has it
    return [_sizes(problem, batch, chunk) for batch in batch_options(problem) if batch in near]


def _sizes(problem: Problem, batch: int, chunk_tokens: int | None = None) -> Sizes:
    options = micro_batch_options(batch)
    most = batch if problem.are_equal else MOST_PROMPTS
    prefill = tuple(rows for rows in options if rows <= most)
    decode = tuple(rows for rows in options if rows * MOST_LANES >= batch)
    return Sizes(batch, prefill, decode, chunk_tokens)


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


def with_shorter_chunks(problem: Problem, subset: DeviceSubset) -> list[Sizes]:
    """Every batch with the chunks that are worth a try for these devices, the longest first."""
    return [
        _sizes(problem, batch, chunk)
        for batch in batch_options(problem)
        for chunk in shorter_chunks(problem, subset, batch)
    ]


def shorter_chunks(problem: Problem, subset: DeviceSubset, batch: int) -> tuple[int, ...]:
    """Chunks below the default one that leave the smallest device much more room.

    Each at least `MUCH_ROOM` more than the next longer one; `MOST_SHORTER` at most.
    """
    smallest = min((devices for devices, _ in subset), key=lambda devices: devices.memory_bytes)
    key = smallest, num_stages(subset), batch
    return problem.cached(
        SHORTER_CHUNKS, key, lambda: _shorter(problem, smallest, num_stages(subset), batch)
    )


def _shorter(problem: Problem, devices: StageDevices, stages: int, batch: int) -> tuple[int, ...]:
    default = problem.chunk_tokens(Sizes(batch, (1,), (1,)))
    found: list[int] = []
    before = _room(problem, devices, stages, batch, default)
    for chunk in chunk_options(problem):
        room = _room(problem, devices, stages, batch, chunk) if chunk < default else before
        if room - before >= MUCH_ROOM * devices.memory_bytes and len(found) < MOST_SHORTER:
            found.append(chunk)
            before = room
    return tuple(found)


def _room(problem: Problem, devices: StageDevices, stages: int, batch: int, chunk: int) -> float:
    """Bytes for layers of a stage in the middle, with micro-batches of 1."""
    sizes = Sizes(batch, (1,), (1,), chunk)
    return float(capacity(problem, sizes, devices, False, False, stages)[0, 0])


# ---- where nothing fits


def spare_sizes(problem: Problem) -> list[Sizes]:
    """Sizes that need less memory: the fewest requests in flight, with every chunk."""
    least = min(batch_options(problem))
    return [_sizes(problem, least, chunk) for chunk in chunk_options(problem)]
