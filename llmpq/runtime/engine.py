"""One worker process from start to report: load the stage, run every batch, gather the times.

The first stage leads: it knows the requests and announces each batch to the others as a table of
fixed form. `Engine` is the same for one stage or many, for processes or threads.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from llmpq.models.kv_cache import KVCache
from llmpq.models.stage_model import LayerRange, StageModel
from llmpq.plan import Plan
from llmpq.report import MeasuredTime, StageReport
from llmpq.runtime.batching import (
    COLUMNS,
    BatchTable,
    Request,
    fitting_batches,
    padded_ids,
    table_of,
)
from llmpq.runtime.checkpoint import Weights
from llmpq.runtime.evaluate import TOKENS_AT_ONCE, Loss
from llmpq.runtime.loader import load_stage
from llmpq.runtime.pipeline_loss import PipelineLoss, gather_hashes
from llmpq.runtime.rehearsal import MemoryAccount, MeteredTransport, Throttle, peak_bytes
from llmpq.runtime.roundings import NEAREST, Roundings
from llmpq.runtime.sampler import Sampling
from llmpq.runtime.stopwatch import TIME_COLUMNS, Stopwatch, measured_times
from llmpq.runtime.transport import Transport
from llmpq.runtime.worker import Worker
from llmpq.workload import batches, request_lengths


@dataclass(frozen=True)
class Reserve:
    """The largest batch that the plan made room for, in requests and tokens."""

    batch: int
    prompt_tokens: int
    cache_tokens: int


def reserve_of(plan: Plan) -> Reserve:
    """Room for the longest batch of the plan's workload."""
    planned = batches(request_lengths(plan.workload), plan.batch)
    return Reserve(
        batch=plan.batch,
        prompt_tokens=max(b.prompt_tokens for b in planned),
        cache_tokens=max(b.prompt_tokens + b.new_tokens for b in planned),
    )


class Engine:
    """This process's stage of a plan, loaded and ready."""

    def __init__(
        self,
        plan: Plan,
        config: Any,
        weights: Weights,
        transport: Transport,
        dtype: torch.dtype,
        device: torch.device,
        sampling: Sampling = Sampling(),
        eos_ids: frozenset[int] = frozenset(),
        reserve: Reserve | None = None,
        rehearse: bool = True,
        roundings: Roundings = NEAREST,
    ) -> None:
        started = time.perf_counter()
        self.plan, self.transport = plan, transport
        self.reserve = reserve or reserve_of(plan)
        self.account, factor = _rehearsal(plan, transport.rank, rehearse)
        stage = self._load(config, weights, dtype, device, roundings)
        cache = KVCache(
            stage.layers.end - stage.layers.first, self.reserve.batch, self.reserve.cache_tokens
        )
        self.worker = Worker(
            stage=stage,
            transport=MeteredTransport(transport, self.account),
            cache=cache,
            throttle=Throttle(factor, device),
            prefill_micro_batch=plan.prefill_micro_batch,
            decode_micro_batch=plan.decode_micro_batch,
            planned_prompt_tokens=self.reserve.prompt_tokens,
            sampling=sampling,
            eos_ids=eos_ids,
        )
        self._warm_up()
        self.load_s = time.perf_counter() - started

    def lead(
        self,
        requests: Sequence[Request],
        pad_id: int,
        on_token: Callable[[Request, int, bool], None],
    ) -> None:
        """First stage: runs all requests, then ends the other stages."""
        for batch in fitting_batches(requests, self.reserve.batch, self.reserve.cache_tokens):
            table = table_of(batch, requests)
            self._announce(table)
            members = [requests[i] for i in batch.requests]

            def report(index: int, token: int, last: bool, members: Any = members) -> None:
                on_token(members[index], token, last)

            self.worker.run(table, padded_ids(batch, requests, pad_id), report)
        self._announce(BatchTable(torch.empty(0, COLUMNS, dtype=torch.int64), 0, 0))

    def follow(self) -> None:
        """Other stages: runs what the first announces until it ends."""
        while (table := self._listen()).num_requests > 0:
            self.worker.run(table)

    def measure(self, hashes: bool = False) -> list[StageReport]:
        """Every stage's times, and with `hashes` those of its weights; all stages must call this.

        Hashing reads all weights: seconds for a large stage.
        """
        mine = (*self.worker.watch.values(), self._peak_bytes(), self.load_s, *self.account.parts)
        rows = self.transport.gather(torch.tensor(mine, dtype=torch.float64))
        measured = self._gather_measured()
        reports = [
            _stage_report(rank, row.tolist(), measured[rank]) for rank, row in enumerate(rows)
        ]
        if not hashes:
            return reports
        every = gather_hashes(self.worker.stage, self.transport)
        return [
            report.model_copy(update={"weights_sha256": one})
            for report, one in zip(reports, every, strict=True)
        ]

    def lead_text(self, windows: torch.Tensor, on_windows: Callable[[int], None]) -> Loss:
        """First stage: the loss of `[n, W]` windows through the stages as they are loaded.

        No more tokens at once than the plan's largest prefill, so that memory holds as it did.
        """
        planned = self.plan.prefill_micro_batch * self.reserve.prompt_tokens
        pipeline = PipelineLoss(self.worker.stage, self.transport)
        return pipeline.lead(windows, min(TOKENS_AT_ONCE, planned), on_windows)

    def follow_text(self) -> Loss:
        """Other stages: their part in that."""
        return PipelineLoss(self.worker.stage, self.transport).follow()

    def _gather_measured(self) -> list[list[MeasuredTime]]:
        """Every stage's times by kind of call, through tables of equal size."""
        table = self.worker.watch.table()
        counts = [int(n) for n in self.transport.gather(torch.tensor(len(table)))]
        padded = torch.zeros(1 + max(counts), TIME_COLUMNS, dtype=torch.float64)
        padded[: len(table)] = torch.tensor(table, dtype=torch.float64).reshape(-1, TIME_COLUMNS)
        tables = self.transport.gather(padded)
        return [measured_times(t[:n].tolist()) for t, n in zip(tables, counts, strict=True)]

    def _peak_bytes(self) -> int:
        """What a card's allocator counted; on a CPU what the worker accounts for."""
        device = self.worker.stage.device
        if device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(device))
        return self.account.total

    def start_clock(self) -> None:
        """Opens the links, waits for all stages, then forgets what loading and warming up took."""
        self._open_links()
        self.transport.gather(torch.zeros(1))
        self.worker.watch = Stopwatch()

    def _open_links(self) -> None:
        """One small message down the stages: connections are made at first use."""
        transport = self.transport
        message = torch.zeros(16, dtype=torch.uint8, device=transport.message_device)
        if not self.worker.is_first:
            transport.receive_hidden(message).wait()
        if not self.worker.is_last:
            transport.send_hidden(message).wait()

    def _load(
        self,
        config: Any,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        roundings: Roundings,
    ) -> StageModel:
        stage = self.plan.stages[self.transport.rank]
        layers = LayerRange(stage.first_layer, stage.end_layer, self.plan.model.num_layers)

        def on_tensor(model: StageModel) -> None:
            self.account.weights = model.weight_bytes()
            self.account.check()

        precisions = stage.precisions
        return load_stage(config, weights, layers, precisions, dtype, device, on_tensor, roundings)

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Runs both phases at their largest planned sizes, measuring what they take."""
        plan, reserve = self.plan, self.reserve
        prefill = (plan.prefill_micro_batch, reserve.prompt_tokens, 0)
        decode = (plan.decode_micro_batch, 1, reserve.cache_tokens - 1)
        lengths = torch.full((reserve.batch, COLUMNS), reserve.prompt_tokens)
        lengths[0, 0] = max(1, reserve.prompt_tokens - 1)
        table = BatchTable(lengths, reserve.prompt_tokens, 1)
        for attempt in ("first", "measured"):  # the first one makes the cache's buffers
            device = self.worker.stage.device
            peaks = [
                peak_bytes(partial(self._try, table, *size), device) for size in (prefill, decode)
            ]
            self.account.cache = self.worker.cache.num_bytes
            self.account.activations = max(peaks) if attempt == "measured" else 0
            self.account.check()

    def _try(self, table: BatchTable, rows: int, tokens: int, past: int) -> None:
        """One micro-batch of this stage on invented input, unequal lengths included."""
        stage, worker = self.worker.stage, self.worker
        if worker.is_first:
            hidden = stage.embed(torch.zeros(rows, tokens, dtype=torch.int64, device=stage.device))
        else:
            shape = (rows, tokens, stage.config.hidden_size)
            hidden = torch.zeros(shape, dtype=stage.dtype, device=stage.device)
        hidden = worker.forward(hidden, table, 0, rows, past)
        if worker.is_last:
            worker.choose(hidden, list(range(rows)), 0)

    def _announce(self, table: BatchTable) -> None:
        header = torch.tensor([table.num_requests, table.prompt_tokens, table.new_tokens])
        self.transport.broadcast(header)
        if table.num_requests:
            self.transport.broadcast(table.lengths)

    def _listen(self) -> BatchTable:
        header = torch.zeros(3, dtype=torch.int64)
        with self.worker.watch.idle():
            self.transport.broadcast(header)
        count, prompt_tokens, new_tokens = header.tolist()
        lengths = torch.zeros(count, COLUMNS, dtype=torch.int64)
        if count:
            self.transport.broadcast(lengths)
        return BatchTable(lengths, prompt_tokens, new_tokens)


def _stage_report(rank: int, values: list[float], measured: list[MeasuredTime]) -> StageReport:
    prefill, decode, idle, comm, peak, load, *parts = values
    weights, cache, activations, buffers = (int(part) for part in parts)
    return StageReport(
        rank=rank,
        busy_prefill_s=prefill,
        busy_decode_s=decode,
        idle_s=idle,
        comm_s=comm,
        peak_memory_bytes=int(peak),
        load_s=load,
        measured=measured,
        weights_bytes=weights,
        cache_bytes=cache,
        activation_bytes=activations,
        buffer_bytes=buffers,
    )


def _rehearsal(plan: Plan, rank: int, rehearse: bool) -> tuple[MemoryAccount, float]:
    """The memory account of a stage, and how many times slower than this machine it plays."""
    stage = plan.stages[rank]
    name = f"stage {rank} ({stage.devices[0]} on {stage.node})"
    role = plan.cluster.rehearse.get(stage.devices[0]) if rehearse else None
    if role is None:
        return MemoryAccount(name, cap_bytes=None), 1.0
    cap = math.floor(role.memory_mib * 1024 * 1024)
    return MemoryAccount(name, cap_bytes=cap), role.slowdown
