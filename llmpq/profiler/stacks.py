"""The computations that are timed: equal layers, a stage's call without layers, embedding and head.

A `Probe` is one cell that is ready on the device: its inputs, its cache, and a call of `depth`
layers (0: only the costs of a call beside its layers: masks, positions, copies of messages). The
calls are those of `llmpq-run`, with its cache, attention, kernels and CUDA graphs, on prompts of
unequal lengths. Weights are random, as times do not depend on their values.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from llmpq.checkpoint.checkpoint import RandomWeights
from llmpq.checkpoint.kernel_setup import prepare_kernels
from llmpq.checkpoint.loader import load_stage
from llmpq.job import Job, LaneShape, Member
from llmpq.models.count import with_layers
from llmpq.models.family import replace
from llmpq.models.lanes import LaneCache
from llmpq.models.stage_model import LayerRange, StageModel
from llmpq.profile_data import Candidate
from llmpq.profiler.timer import Timer
from llmpq.runtime.rehearsal import peak_bytes
from llmpq.runtime.sampler import Sampling
from llmpq.runtime.steps import DecodeStepRunner, choose_tokens, prefill

# The pause of a rehearsed stage between calls, on which the state of CPU caches depends: it waits
# as long as the rehearsed device would still compute, and then for other stages. In three random
# plans on 3 and 4 stages, slowed down 3 to 10 times, the median was 22 to 45 ms; in one with a
# single micro-batch in flight 100 ms.
REST_S = 0.03
# The pause between calls of embedding or head, which follow layers in the call of a stage.
END_REST_S = 0.003
# The fixed computation that shows the machine's speed: a product of square matrices, and small
# products that take as long to call as to compute, as those of small layers.
REFERENCE_SIZE = 256
REFERENCE_CALLS, REFERENCE_ROWS = 24, 4
# Layers in a stack, by the bytes of one at 16 bits: more layers average out more noise and reduce
# the share of a call's own cost; large ones take memory and time.
DEPTHS = ((8 * 2**20, 6), (64 * 2**20, 3))
LEAST_DEPTH = 2


def stack_depth(layer_bytes: int) -> int:
    """The number of layers to stack, for layers of `layer_bytes` at 16 bits."""
    return next((depth for limit, depth in DEPTHS if layer_bytes <= limit), LEAST_DEPTH)


class Probe:
    """One cell that is ready to be called. `max_depth`: the layers of its stack, or 0."""

    def __init__(
        self,
        compute: Callable[[int], object],
        timer: Timer,
        device: torch.device,
        pause_s: float,
        max_depth: int = 0,
    ) -> None:
        self._compute, self._timer, self._device = compute, timer, device
        self._pause_s, self.max_depth = pause_s, max_depth

    def warm_up(self, depth: int) -> None:
        """Makes a call that is not timed."""
        self._compute(depth)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def time_ms(self, depth: int) -> float:
        """Milliseconds of a call of `depth` layers."""
        return self._timer.time_ms(partial(self._compute, depth), self._pause_s)

    def peak_bytes(self) -> int:
        """The peak bytes of a call of one layer, without weights and cache."""
        return peak_bytes(partial(self._compute, 1), self._device)


class Bench:
    """Layers at every precision on one device, and the embedding and the head.

    Kernels are compiled for products of up to `most_rows` rows.
    """

    def __init__(
        self,
        config: Any,
        precisions: tuple[str, ...],
        depth: int,
        dtype: torch.dtype,
        device: torch.device,
        most_rows: int,
    ) -> None:
        self._config, self.depth = config, depth
        self._dtype, self._device, self._most_rows = dtype, device, most_rows
        self.notes: list[str] = []  # warnings of linears that use slower kernels
        self._timer = Timer(device)
        self._square = torch.ones(REFERENCE_SIZE, REFERENCE_SIZE, device=device)
        self._refer()  # warms up
        layers = LayerRange(1, 1 + depth, depth + 2)  # a middle stage
        self._stacks = {p: _Stack(self._load(layers, [p] * depth), depth) for p in precisions}
        self._ends = self._load(LayerRange(0, 1, 1), ["16"])

    def open(self, cell: Candidate) -> "Probe":
        """Prepares the inputs and the call of a cell."""
        if cell.phase in ("embedding", "head"):
            return Probe(self._end(cell), self._timer, self._device, END_REST_S)
        phase = cell.phase.removeprefix("stage_")
        layered = cell.phase == phase
        past = cell.tokens if phase == "decode" else 0
        tokens = 1 if phase == "decode" else cell.tokens
        states = self._states(cell.micro_batch, tokens)
        compute = self._stacks[cell.precision].computation(states, past)
        max_depth = self.depth if layered else 0
        return Probe(compute, self._timer, self._device, REST_S, max_depth)

    def layer_bytes(self, precision: str) -> int:
        """Bytes of the weights of one layer."""
        return self._stacks[precision].stage.weight_bytes() // self.depth

    def reference_ms(self) -> float:
        """Milliseconds of the fixed computation."""
        return self._timer.time_ms(self._refer)

    def _refer(self) -> None:
        square = self._square
        torch.mm(square, square)
        for _ in range(REFERENCE_CALLS):
            torch.mm(square[:REFERENCE_ROWS], square)

    def _end(self, cell: Candidate) -> Callable[[int], object]:
        if cell.phase == "head":
            hidden = self._states(cell.micro_batch, 1)
            numbers = torch.arange(len(hidden), device=self._device)
            inputs = hidden[:, 0], Sampling(), numbers, numbers
            return lambda _: choose_tokens(self._ends, *inputs)
        shape = (cell.micro_batch, cell.tokens)
        ids = torch.zeros(shape, dtype=torch.int64, device=self._device)
        return lambda _: self._ends.embed(ids)

    def _states(self, count: int, tokens: int) -> torch.Tensor:
        shape = (count, tokens, self._config.hidden_size)
        return torch.randn(shape, dtype=torch.float32, device=self._device).to(self._dtype)

    def _load(self, layers: LayerRange, precisions: list[str]) -> StageModel:
        config = with_layers(self._config, layers.total)
        where = self._dtype, self._device
        stage = load_stage(config, RandomWeights(), layers, precisions, *where)
        self.notes += prepare_kernels(stage, self._most_rows)
        return stage


class _Stack:
    """A stage of equal layers, of which the first few can be run alone."""

    def __init__(self, stage: StageModel, depth: int) -> None:
        self.stage = stage
        self._path = f"{stage.family.decoder}.{stage.family.layers}"
        self._layers = list(stage.all_layers)
        self._depth = depth

    def computation(self, hidden: torch.Tensor, past: int) -> Callable[[int], object]:
        """A function that calls some layers on `hidden` `[B, S, H]`: a prefill, or a decode step.

        A decode step has `past` stored tokens; each depth has its own static buffers and graph.
        Prompts have unequal lengths.
        """
        rows, tokens = hidden.shape[:2]
        lengths = [max(1, (past or tokens) - (row == 0)) for row in range(rows)]
        cache = LaneCache(self._depth, [LaneShape(rows, past + tokens + 1)])
        if not past:
            members = tuple(Member(0, row, n, row, 0) for row, n in enumerate(lengths))
            job = Job(True, members, 0, tokens, rows)
            return lambda depth: self._prefill(depth, cache, job, hidden)
        members = tuple(Member(0, row, n, row, 1) for row, n in enumerate(lengths))
        job, steps = Job(False, members, 0, past + 1, rows), {}

        def step(depth: int) -> object:
            self._use(depth)
            if depth not in steps:
                steps[depth] = DecodeStepRunner(self.stage, cache, Sampling())
            return steps[depth].run(job, hidden, 0, rows)

        return step

    def _prefill(self, depth: int, cache: LaneCache, job: Job, hidden: torch.Tensor) -> object:
        self._use(depth)
        cache.rearrange(job)
        return prefill(self.stage, cache, job, hidden, 0, job.rows)

    def _use(self, depth: int) -> None:
        end = self.stage.layers.first + depth
        replace(self.stage.model, self._path, nn.ModuleList(self._layers[:end]))
        self.stage.config.num_hidden_layers = end
