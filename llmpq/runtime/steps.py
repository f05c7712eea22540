"""The computation of a stage in a job: a prefill, or a decode step that a CUDA graph can hold.

A decode step is one function of static buffers (`_compute`): it reads a table of numbers and the
states that came in, and writes the states or tokens that go out. For the families that are tested,
it never waits for the device, looks at values or has a shape that depends on them, unless layers
run experts one by one. On a card it computes all rows of a lane and is captured in a CUDA graph
for each (lane, width) that occurs, widths rounded up to a few (`graph_width`); elsewhere, and where
capturing fails, the same function is called directly. A stage that runs experts one by one is
never captured, as their numbers of rows depend on values; it computes the rows of a step alone. A
stage with both embedding and head keeps the tokens that it has chosen on the device for its next
step.

Shapes: b rows of a step, H hidden size; `width`: columns that attention looks at.
Not covered: stages that several devices share are not captured, as they talk to each other.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmpq.job import Job, LaneShape, Member
from llmpq.kernel import graph_lengths
from llmpq.models.experts import PackedExperts
from llmpq.models.lanes import LaneCache, on_device
from llmpq.models.stage_model import StageModel
from llmpq.runtime.sampler import Draws, Sampling, choose

BROKEN = -1  # the token of logits that are not finite
# Rows of the table of numbers; from TOKENS on there is one for each layout of the cache.
COLUMNS, REQUESTS, POSITIONS, IDS, TOKENS = range(5)

Key = tuple[int, int]  # lane, width


def graph_width(width: int, shape: LaneShape) -> int:
    """The columns that a captured step attends to: the next of `graph_lengths`."""
    return next(length for length in graph_lengths(shape.tokens) if width <= length)


@dataclass
class Graphs:
    """Captured steps by lane and width. `why_not` is the reason where none are captured."""

    why_not: str | None
    captured: dict[Key, "torch.cuda.CUDAGraph"] = field(default_factory=dict)
    num_bytes: int = 0  # the memory that the captured steps keep

    @property
    def wanted(self) -> bool:
        """Whether steps are captured."""
        return self.why_not is None


def prefill(
    stage: StageModel, cache: LaneCache, job: Job, given: Tensor, first: int, end: int
) -> Tensor:
    """Computes members `first` to `end` of a prefill; returns `[b, S, H]`.

    `given` holds the whole job's states `[b, S, H]`, or token ids `[b, S]` at the first stage.
    """
    hidden = stage.embed(given[first:end]) if stage.layers.is_first else given[first:end]
    positions = torch.arange(job.begin, job.end, device=stage.device).expand(end - first, -1)
    lengths = None
    if stage.looks_at_lengths:
        counts = torch.tensor([member.prompt_tokens for member in job.members[first:end]])
        lengths = on_device(counts, stage.device)
    return stage.run(hidden, positions, cache.prefill(job, first, end, stage.device), lengths)


class DecodeStepRunner:
    """Runs the decode steps of a stage that fill a cache; captures none where `graphs` is False."""

    def __init__(
        self, stage: StageModel, cache: LaneCache, sampling: Sampling | Draws, graphs: bool = True
    ) -> None:
        self.stage, self.cache, self.sampling = stage, cache, sampling
        rows = max(shape.rows for shape in cache.shapes)
        waiting = _what_waits(stage, rows)
        self.graphs = Graphs(_why_no_graphs(stage, graphs, waiting))
        self._rounds_up = _rounds_up(stage.device) and waiting is None
        device = stage.device
        self.is_first, self.is_last = stage.layers.is_first, stage.layers.is_last
        table = TOKENS + len(cache.layouts), rows
        self._numbers = torch.zeros(table, dtype=torch.int64, device=device)
        self._ids = torch.zeros(cache.first_rows[-1], dtype=torch.int64, device=device)
        size = (rows, 1, stage.config.hidden_size)
        self._states, self._output = (
            torch.zeros(size if used else (), dtype=stage.dtype, device=device)
            for used in (not self.is_first, not self.is_last)
        )
        self._chosen = torch.zeros(rows, dtype=torch.int32, device=device)
        self._pool: Any = torch.cuda.graph_pool_handle() if self.graphs.wanted else None

    @property
    def keeps_ids(self) -> bool:
        """Whether this stage both chooses and embeds tokens, so that none need to be sent."""
        return self.is_first and self.is_last

    @property
    def num_bytes(self) -> int:
        """Bytes of the static buffers."""
        held = (self._numbers, self._ids, self._states, self._output, self._chosen)
        return sum(tensor.nbytes for tensor in held)

    def keep(self, members: Sequence[Member], ids: Tensor) -> None:
        """Stores the tokens `[members]` that a prefill has chosen, for the steps that follow."""
        rows = [self.cache.first_rows[member.lane] + member.row for member in members]
        self._ids[on_device(torch.tensor(rows), ids.device)] = ids

    def rearrange(self, job: Job) -> None:
        """Moves the stored tokens of rows that a job moves to other slots."""
        for lane, source, target, _ in job.moves:
            first = self.cache.first_rows[lane]
            self._ids[first + target] = self._ids[first + source]

    def run(self, job: Job, given: Tensor | None, first: int, end: int) -> Tensor:
        """Computes rows `first` to `end` of a step: `[b, 1, H]`, or int32 `[b]` chosen tokens.

        `given` holds the whole step's states `[b, 1, H]`, or `[b]` token ids at the first stage
        unless it `keeps_ids`. The next step overwrites the returned tensor.
        """
        shape = self.cache.shapes[job.lane]
        rows, width = job.rows, job.end
        if self._rounds_up:
            rows, width = shape.rows, graph_width(width, shape)
        self._fill(job, rows, given)
        if (first, end) != (0, job.rows):
            return self._compute(job.lane, range(first, end), width)
        self._run(job.lane, rows, width)
        return (self._chosen if self.is_last else self._output)[:end]

    # ---- one step

    def _fill(self, job: Job, rows: int, given: Tensor | None) -> None:
        """Copies a step's inputs into the static buffers, without waiting."""
        numbers = torch.zeros(len(self._numbers), rows, dtype=torch.int64)
        for member in job.members:
            numbers[COLUMNS, member.row] = member.column
            numbers[REQUESTS, member.row] = member.number
            numbers[POSITIONS, member.row] = member.position
        numbers[TOKENS:] = torch.tensor(self.cache.step_tokens(job, rows))
        self._numbers[:, :rows] = on_device(numbers, self.stage.device)
        if not self.is_first:
            assert given is not None
            self._states[: job.rows].copy_(given, non_blocking=True)
            self._states[job.rows : rows].zero_()  # what was there may be NaN
        elif given is not None:
            self._numbers[IDS, : job.rows].copy_(given, non_blocking=True)

    def _compute(self, lane: int, rows: range, width: int) -> Tensor:
        """Computes some rows of a lane, from static buffers into static buffers; see `run`."""
        span = slice(rows.start, rows.stop)
        numbers = self._numbers[:, span]
        first = self.cache.first_rows[lane]
        own_ids = self._ids[first + rows.start : first + rows.stop]
        if self.is_first:
            hidden = self.stage.embed((own_ids if self.keeps_ids else numbers[IDS])[:, None])
        else:
            hidden = self._states[span]
        view = self.cache.step(lane, rows, width, numbers[COLUMNS], numbers[TOKENS:])
        hidden = self.stage.run(hidden, numbers[COLUMNS][:, None], view)
        if not self.is_last:
            self._output[span].copy_(hidden)
            return self._output[span]
        ids, chosen = choose_tokens(
            self.stage, hidden[:, 0], self.sampling, numbers[REQUESTS], numbers[POSITIONS]
        )
        if self.keeps_ids:
            # Rows that take no part have position 0. Their next token may be waiting here.
            own_ids.copy_(torch.where(numbers[POSITIONS] > 0, ids, own_ids))
        self._chosen[span].copy_(chosen)
        return self._chosen[span]

    # ---- graphs

    def _run(self, lane: int, rows: int, width: int) -> None:
        graph = self.graphs.captured.get((lane, width))
        if graph is not None:
            graph.replay()
            return
        self._compute(lane, range(rows), width)
        if self.graphs.wanted:
            self._capture(lane, rows, width)

    def _capture(self, lane: int, rows: int, width: int) -> None:
        """Captures a step that has just run, for later steps of its shape.

        Capturing computes nothing. Other threads may use the device meanwhile, to receive messages.
        """
        device, graph = self.stage.device, torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(device)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # as capturing does first; what is gone then is the graph's
        free, _ = torch.cuda.mem_get_info(device)
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._compute(lane, range(rows), width)
        except RuntimeError as error:
            self._give_up(error, stream)
            return
        self.graphs.num_bytes += max(0, free - torch.cuda.mem_get_info(device)[0])
        self.graphs.captured[lane, width] = graph

    def _give_up(self, error: RuntimeError, stream: "torch.cuda.Stream") -> None:
        """Cleans up after a failed capture, as torch 2.11 does in part alone, and stops capturing.

        There, an invalidated capture stays on its stream and keeps sending memory to its pool
        (fixed by its pull request 180395). The last error raised is that of ending the capture; its
        context is the cause.
        """
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        cause = error.__context__ or error
        self.graphs.why_not = f"capture failed: {str(cause).splitlines()[0]}"
        self.graphs.captured.clear()


def first_tokens(
    stage: StageModel,
    hidden: Tensor,
    job: Job,
    members: Sequence[Member],
    sampling: Sampling | Draws,
) -> tuple[Tensor, Tensor]:
    """The result of `choose_tokens` for the last states of a prefill's `[b, S, H]`."""
    rows = torch.arange(len(members), device=hidden.device)
    ends = torch.tensor([member.prompt_tokens - job.begin for member in members])
    numbers = on_device(torch.tensor([member.number for member in members]), hidden.device)
    states = hidden[rows, on_device(ends - 1, hidden.device)]
    return choose_tokens(stage, states, sampling, numbers, torch.zeros_like(numbers))


def choose_tokens(
    stage: StageModel,
    states: Tensor,
    sampling: Sampling | Draws,
    requests: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """The tokens of states `[b, H]`: int64 `[b]`, and int32 `[b]` with `BROKEN` for bad logits.

    Logits are bad where they are not finite.
    """
    logits = stage.head(states)
    ids = choose(logits, sampling, requests, positions)
    finite = torch.isfinite(logits).all(dim=-1)
    return ids, ids.masked_fill(~finite, BROKEN).to(torch.int32)


def _rounds_up(device: torch.device) -> bool:
    """Whether steps are rounded up to few sizes; captured or not, so that both compute alike."""
    return device.type == "cuda"


def _why_no_graphs(stage: StageModel, wanted: bool, waiting: str | None) -> str | None:
    if not wanted:
        return "they are switched off"
    if stage.device.type != "cuda":
        return "they need a GPU"
    if stage.group is not None:
        return "several devices share the stage"
    return f"{waiting} waits for the device" if waiting else None


def _what_waits(stage: StageModel, rows: int) -> str | None:
    """The class of a module that looks at values, which no graph can hold; None where none does.

    Some modules do so for more than a number of rows.
    """
    for module in stage.model.modules():
        is_experts = isinstance(module, PackedExperts)
        if module.waits_for(rows) if is_experts else getattr(module, "waits_for_device", False):
            return type(module).__name__
    return None
