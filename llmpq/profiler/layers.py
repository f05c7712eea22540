"""Measures a model's layers on one device, at each precision, in both phases.

A stack of a few layers is timed against a single one, in alternation: the difference is what a
layer costs, the rest what a call of a stage costs once (masks, positions, the cache's slices).
Inputs are padded as real batches are. Weights may be random: times do not depend on their values.
Not covered: adaptive grids; times beyond the grid are the cost model's business.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from llmpq.model_spec import ModelSpec
from llmpq.models.family import find, replace
from llmpq.models.kv_cache import KVCache
from llmpq.models.stage_model import LayerRange, StageModel
from llmpq.profile_data import ProfileRow
from llmpq.profiler.timer import Timer
from llmpq.runtime.batching import COLUMNS, BatchTable
from llmpq.runtime.checkpoint import RandomWeights
from llmpq.runtime.loader import load_stage
from llmpq.runtime.sampler import Sampling, choose

DEPTH = 3  # layers in the stack
ROUNDS = 3
WARM_UP_RUNS = 2
MIN_SAMPLES = 3  # a round
MAX_SAMPLES = 20
FLOOR_MS = 1e-6
# How long a stage of a pipeline rests between calls: prefills follow each other closely, a decode
# micro-batch comes back only after it has been round all stages.
PAUSE_S = {"prefill": 0.003, "decode": 0.015}


@dataclass(frozen=True)
class Grid:
    """What to measure."""

    precisions: tuple[str, ...]
    prefill_micro_batches: tuple[int, ...]
    decode_micro_batches: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    past_tokens: tuple[int, ...]

    def prefills(self) -> list["Shape"]:
        """Whole prompts."""
        return [Shape(p, s, 0) for s in self.prompt_tokens for p in self.prefill_micro_batches]

    def decodes(self) -> list["Shape"]:
        """One token a request."""
        return [Shape(q, 1, past) for past in self.past_tokens for q in self.decode_micro_batches]

    def shapes(self) -> list["Shape"]:
        """All of them."""
        return self.prefills() + self.decodes()


@dataclass(frozen=True)
class Shape:
    """`micro_batch` requests with `tokens` new tokens each and `past` in the cache."""

    micro_batch: int
    tokens: int
    past: int

    @property
    def phase(self) -> str:
        """Prefill starts with an empty cache."""
        return "decode" if self.past else "prefill"

    def columns(self) -> dict[str, int]:
        """As a profile names them."""
        prompt = 0 if self.past else self.tokens
        return {
            "micro_batch": self.micro_batch,
            "prompt_tokens": prompt,
            "past_tokens": self.past,
        }


@dataclass(frozen=True)
class Sample:
    """Times of several runs of one computation."""

    times_ms: np.ndarray

    def row(self, model_key: str, precision: str, phase: Any, **shape: int) -> ProfileRow:
        """As a row of the profile."""
        quantiles = np.percentile(self.times_ms, (10, 50, 90))
        p10, median, p90 = (max(FLOOR_MS, float(q)) for q in quantiles)
        return ProfileRow(
            model_key=model_key,
            precision=precision,
            phase=phase,
            time_ms=median,
            time_ms_p10=p10,
            time_ms_p90=p90,
            num_samples=len(self.times_ms),
            **shape,
        )


class LayerProfiler:
    """Measures one model's layers on one device within a budget of seconds."""

    def __init__(
        self,
        spec: ModelSpec,
        config: Any,
        grid: Grid,
        dtype: torch.dtype,
        device: torch.device,
        budget_s: float,
    ) -> None:
        self.spec, self.config, self.grid = spec, config, grid
        self.dtype, self.device = dtype, device
        self.timer = Timer(device)
        self.deadline = time.monotonic() + budget_s
        self.num_cells = len(grid.shapes()) * len(grid.precisions)

    @torch.inference_mode()
    def run(self, on_cell: Callable[[int, str], None]) -> list[ProfileRow]:
        """All rows. `on_cell(cells done, what)` is called after each cell.

        The grid is gone through several times, so that a slow moment of the machine touches
        few samples of many cells and not all samples of a few.
        """
        rows = self._ends()
        stacks = {p: _Stack(self._stage(p), DEPTH) for p in self.grid.precisions}
        cells = [
            _Cell(stack, p, shape) for shape in self.grid.shapes() for p, stack in stacks.items()
        ]
        for round_number in range(ROUNDS):
            for index, cell in enumerate(cells):
                visits_left = (ROUNDS - round_number) * len(cells) - index
                self._visit(cell, visits_left)
                done = round_number * len(cells) + index + 1
                on_cell(done // ROUNDS, f"{cell.precision} bits, batch {cell.shape.micro_batch}")
        return rows + [row for cell in cells for row in self._rows(cell)]

    def _stage(self, precision: str) -> StageModel:
        """A middle stage of DEPTH equal layers."""
        layers = LayerRange(1, 1 + DEPTH, DEPTH + 2)
        return self._load(layers, [precision] * DEPTH)

    def _load(self, layers: LayerRange, precisions: list[str]) -> StageModel:
        config = _with_layers(self.config, layers.total)
        return load_stage(config, RandomWeights(), layers, precisions, self.dtype, self.device)

    def _visit(self, cell: "_Cell", visits_left: int) -> None:
        """More samples of one cell: the whole stack and a single layer, in alternation."""
        deep = cell.stack.computation(DEPTH, cell.shape, self)
        single = cell.stack.computation(1, cell.shape, self)
        for _ in range(WARM_UP_RUNS):
            deep()
            single()
        end = time.monotonic() + (self.deadline - time.monotonic()) / visits_left
        most = len(cell.times_ms) + MAX_SAMPLES
        least = len(cell.times_ms) + MIN_SAMPLES
        while len(cell.times_ms) < least or (len(cell.times_ms) < most and time.monotonic() < end):
            pause_s = PAUSE_S[cell.shape.phase]
            times = (self.timer.time_ms(run, pause_s) for run in (deep, single))
            cell.times_ms.append((next(times), next(times)))

    def _rows(self, cell: "_Cell") -> list[ProfileRow]:
        """The layer and, once a shape, what a stage's call costs beside its layers."""
        deep, single = np.array(cell.times_ms).T
        layer = (deep - single) / (DEPTH - 1)
        key, shape = self.spec.model_key, cell.shape
        rows = [Sample(layer).row(key, cell.precision, shape.phase, **shape.columns())]
        if cell.precision == self.grid.precisions[0]:
            fixed = Sample(single - np.median(layer))
            phase = f"stage_{shape.phase}"
            rows.append(fixed.row(key, cell.precision, phase, **shape.columns()))
        return rows

    def _ends(self) -> list[ProfileRow]:
        """The embedding and the head."""
        stage = self._load(LayerRange(0, 1, 1), ["16"])
        key, rows = self.spec.model_key, []
        decodes = self.grid.decode_micro_batches
        lookups = [(shape.micro_batch, shape.tokens) for shape in self.grid.prefills()]
        for count, tokens in lookups + [(q, 1) for q in decodes]:
            ids = torch.zeros(count, tokens, dtype=torch.int64, device=self.device)
            sample = self._sample(partial(stage.embed, ids))
            rows.append(sample.row(key, "16", "embedding", micro_batch=count, prompt_tokens=tokens))
        for count in sorted({*self.grid.prefill_micro_batches, *decodes}):
            hidden = self.random_states(count, 1, stage)
            sample = self._sample(partial(_choose, stage, hidden))
            rows.append(sample.row(key, "16", "head", micro_batch=count))
        return rows

    def random_states(self, count: int, tokens: int, stage: StageModel) -> torch.Tensor:
        shape = (count, tokens, stage.config.hidden_size)
        return torch.randn(shape, dtype=torch.float32, device=self.device).to(self.dtype)

    def _sample(self, compute: Callable[[], object]) -> Sample:
        for _ in range(WARM_UP_RUNS):
            compute()
        pause_s = PAUSE_S["prefill"]
        return Sample(np.array([self.timer.time_ms(compute, pause_s) for _ in range(15)]))


def _choose(stage: StageModel, hidden: torch.Tensor) -> torch.Tensor:
    return choose(stage.head(hidden[:, -1]), Sampling(), list(range(len(hidden))), 0)


class _Stack:
    """Equal layers, of which the first few can be run alone."""

    def __init__(self, stage: StageModel, depth: int) -> None:
        self.stage = stage
        self._path = f"{stage.family.decoder}.{stage.family.layers}"
        layers = find(stage.model, self._path)
        assert isinstance(layers, nn.ModuleList)
        self._layers = list(layers)
        self._depth = depth

    def computation(
        self, depth: int, shape: Shape, profiler: LayerProfiler
    ) -> Callable[[], object]:
        """A call of the first `depth` layers on a micro-batch with unequal prompts."""
        rows, tokens, past = shape.micro_batch, shape.tokens, shape.past
        stage, length = self.stage, past or tokens
        hidden = profiler.random_states(rows, tokens, stage)
        lengths = torch.full((rows, COLUMNS), length)
        lengths[0, 0] = max(1, length - 1)
        table = BatchTable(lengths, length, 1)
        cache = KVCache(self._depth, rows, past + tokens)

        def compute() -> torch.Tensor:
            self._use(depth)
            mask = table.mask(0, rows, past + tokens)
            assert mask is not None or length == 1
            return stage.run(
                hidden,
                None if mask is None else mask.to(stage.device),
                table.positions(0, rows, past, tokens).to(stage.device),
                cache.view(0, rows, past),
            )

        return compute

    def _use(self, depth: int) -> None:
        replace(self.stage.model, self._path, nn.ModuleList(self._layers[:depth]))
        self.stage.config.num_hidden_layers = depth


@dataclass
class _Cell:
    """One shape at one precision, and its samples: (whole stack, single layer) in ms."""

    stack: _Stack
    precision: str
    shape: Shape
    times_ms: list[tuple[float, float]] = field(default_factory=list)


def _with_layers(config: Any, num_layers: int) -> Any:
    """The configuration with another number of layers; per-layer lists repeat their first."""
    changed = copy.deepcopy(config)
    for name, value in vars(config).items():
        is_per_layer = isinstance(value, list) and len(value) == config.num_hidden_layers
        if is_per_layer and name.startswith("layer"):
            setattr(changed, name, [value[i % len(value)] for i in range(num_layers)])
    changed.num_hidden_layers = num_layers
    return changed
