"""The computations that are timed: equal layers, a stage's call without layers, embedding and head.

A `Probe` is one cell that is ready on the device: its inputs, its cache, and a call of `depth`
layers (0: only the costs of a call beside its layers: masks, positions, copies of messages). The
calls are those of `llmpq-run`, with its cache, attention, kernels and CUDA graphs, on prompts of
unequal lengths. Weights are random, as times do not depend on their values.

But which routed experts a call uses does: with random routers and inputs, each token chooses by
itself and about evenly, so that a call uses as many experts as it can expect to. A text may use
fewer. How many were used is counted (`Probe.experts_used`), and times are fitted to that number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from llmpq.checkpoint.checkpoint import RandomWeights
from llmpq.checkpoint.kernel_setup import prepare_kernels
from llmpq.checkpoint.loader import load_stage
from llmpq.job import Job, LaneShape, Member
from llmpq.models.count import with_layers
from llmpq.models.experts import PackedExperts
from llmpq.models.family import find, replace
from llmpq.models.lanes import LaneCache
from llmpq.models.raw_tensors import held_bytes
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
DEPTHS = ((8 * 2**20, 6), (64 * 2**20, 3), (4 * 2**30, 2))
LEAST_DEPTH = 1


def stack_depth(layer_bytes: int) -> int:
    """The number of layers to stack, for layers of `layer_bytes` at 16 bits."""
    return next((depth for limit, depth in DEPTHS if layer_bytes <= limit), LEAST_DEPTH)


@dataclass(frozen=True)
class InnerLayers(LayerRange):
    """Layers that are given states, as in a middle stage, even if they begin with the first one."""

    @property
    def is_first(self) -> bool:
        """False, so that nothing is embedded."""
        return False


def stacked_layers(kinds: Sequence[int], kind: int, depth: int) -> LayerRange:
    """The layers to stack in a model whose layers are of these kinds: equal ones in a row.

    They are as many as there are, up to `depth`, and the model is cut behind the layer that follows
    them.
    """
    if len(set(kinds)) == 1:
        return LayerRange(1, 1 + depth, depth + 2)  # layers of one kind may be repeated
    runs = [
        (first, next((i for i in range(first, len(kinds)) if kinds[i] != kind), len(kinds)))
        for first in range(len(kinds))
        if kinds[first] == kind
    ]
    first, end = max(runs, key=lambda run: (min(run[1] - run[0], depth), -run[0]))
    end = min(end, first + depth)
    return InnerLayers(first, end, end + 1)


class Probe:
    """One cell that is ready to be called.

    `max_depth` is the number of layers of its stack, or 0. `uncaptured` makes the same call without
    CUDA graphs, which hooks on its `experts` do not see.
    """

    def __init__(
        self,
        compute: Callable[[int], object],
        timer: Timer,
        device: torch.device,
        pause_s: float,
        max_depth: int = 0,
        experts: Sequence[PackedExperts] = (),
        uncaptured: Callable[[], Callable[[int], object]] | None = None,
    ) -> None:
        self._compute, self._timer, self._device = compute, timer, device
        self._experts, self._uncaptured = experts, uncaptured
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

    def experts_used(self) -> float | None:
        """How many different experts a layer uses in one call, on average; None without experts."""
        if not self._experts:
            return None
        used: list[int] = []
        hooks = [
            experts.register_forward_pre_hook(lambda _, given: used.append(len(given[1].unique())))
            for experts in self._experts
        ]
        compute = self._compute if self._uncaptured is None else self._uncaptured()
        try:
            compute(self.max_depth)
        finally:
            for hook in hooks:
                hook.remove()
        return sum(used) / len(used)


class Bench:
    """Layers of one kind at every precision on one device, and the embedding and the head.

    `layers` are those to stack (`stacked_layers`). Kernels are compiled for products of up to
    `most_rows` rows.
    """

    def __init__(
        self,
        config: Any,
        precisions: tuple[str, ...],
        layers: LayerRange,
        dtype: torch.dtype,
        device: torch.device,
        most_rows: int,
    ) -> None:
        self._config, self.depth = config, layers.count
        self._dtype, self._device, self._most_rows = dtype, device, most_rows
        self.notes: list[str] = []  # warnings of linears that use slower kernels
        self._timer = Timer(device)
        self._square = torch.ones(REFERENCE_SIZE, REFERENCE_SIZE, device=device)
        self._refer()  # warms up
        self._stacks = {p: _Stack(self._load(layers, [p] * layers.count)) for p in precisions}
        self._first = self._load(LayerRange(0, 0, 1), [])
        self._last = self._load(LayerRange(1, 1, 1), [])

    def open(self, cell: Candidate) -> "Probe":
        """Prepares the inputs and the call of a cell."""
        if cell.phase in ("embedding", "head"):
            return Probe(self._end(cell), self._timer, self._device, END_REST_S)
        phase = cell.phase.removeprefix("stage_")
        layered = cell.phase == phase
        past = cell.tokens if phase == "decode" else 0
        tokens = 1 if phase == "decode" else cell.tokens
        states = self._states(cell.micro_batch, tokens)
        stack = self._stacks[cell.precision]
        compute = stack.computation(states, past)
        if not layered:
            return Probe(compute, self._timer, self._device, REST_S)
        uncaptured = partial(stack.computation, states, past, graphs=False)
        layers = self.depth, stack.experts, uncaptured
        return Probe(compute, self._timer, self._device, REST_S, *layers)

    def layer_bytes(self, precision: str) -> int:
        """Bytes of the weights of one layer."""
        layers, seen = self._stacks[precision].own_layers, set[int]()
        total = sum(held_bytes(m, seen) for layer in layers for m in layer.modules())
        return total // self.depth

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
            head = find(self._last.model, self._last.family.head)
            width = getattr(head, "in_features", self._config.hidden_size)  # OPT may project
            hidden = self._states(cell.micro_batch, 1, width)
            numbers = torch.arange(len(hidden), device=self._device)
            inputs = hidden[:, 0], Sampling(), numbers, numbers
            return lambda _: choose_tokens(self._last, *inputs)
        shape = (cell.micro_batch, cell.tokens)
        ids = torch.zeros(shape, dtype=torch.int64, device=self._device)
        return lambda _: self._first.embed(ids)

    def _states(self, count: int, tokens: int, width: int | None = None) -> torch.Tensor:
        shape = (count, tokens, width or self._config.hidden_size)
        return torch.randn(shape, dtype=torch.float32, device=self._device).to(self._dtype)

    def _load(self, layers: LayerRange, precisions: list[str]) -> StageModel:
        config = with_layers(self._config, layers.total)
        where = self._dtype, self._device
        stage = load_stage(config, RandomWeights(), layers, precisions, *where)
        self.notes += prepare_kernels(stage, self._most_rows)
        return stage


class _Stack:
    """A stage of equal layers, of which the first few can be run alone."""

    def __init__(self, stage: StageModel) -> None:
        self.stage = stage
        self.experts = [m for m in stage.modules() if isinstance(m, PackedExperts)]
        self._path = f"{stage.family.decoder}.{stage.family.layers}"
        self._layers, self.own_layers = list(stage.all_layers), stage.own_layers
        self._depth, self._windows = stage.layers.count, stage.windows

    def computation(
        self, hidden: torch.Tensor, past: int, graphs: bool = True
    ) -> Callable[[int], object]:
        """A function that calls some layers on `hidden` `[B, S, H]`: a prefill, or a decode step.

        With `graphs`, decode steps are captured where they can be. A decode step has `past` stored
        tokens; each depth has its own static buffers and graph. Prompts have unequal lengths.
        """
        rows, tokens = hidden.shape[:2]
        lengths = [max(1, (past or tokens) - (row == 0)) for row in range(rows)]
        shapes = [LaneShape(rows, past + tokens + 1)]
        cache = LaneCache(self._depth, shapes, self._windows)
        if not past:
            members = tuple(Member(0, row, n, row, 0) for row, n in enumerate(lengths))
            job = Job(True, members, 0, tokens, rows)
            return lambda depth: self._prefill(depth, cache, job, hidden)
        members = tuple(Member(0, row, n, row, 1) for row, n in enumerate(lengths))
        job, steps = Job(False, members, 0, past + 1, rows), {}

        def step(depth: int) -> object:
            self._use(depth)
            if depth not in steps:
                steps[depth] = DecodeStepRunner(self.stage, cache, Sampling(), graphs)
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
