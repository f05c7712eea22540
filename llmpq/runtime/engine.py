"""One worker process from start to report: load the stage, do its jobs, gather the times.

The first stage leads: it reads the requests and decides every job (`Leader`, `llmpq.schedule`).
`StageEngine` is the same for one stage or many, for processes or threads.
"""

import math
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from llmpq.checkpoint.checkpoint import Weights
from llmpq.checkpoint.kernel_setup import OnCompiled, planned_rows, prepare_kernels, prepare_rows
from llmpq.checkpoint.loader import load_stage
from llmpq.checkpoint.packed_cache import NO_CACHE, WeightCache
from llmpq.checkpoint.roundings import NEAREST, Roundings
from llmpq.job import Item, LaneShape
from llmpq.models.lanes import LaneCache
from llmpq.models.sharding import ALONE, Shard, ShardGroup
from llmpq.models.stage_model import LayerRange, StageModel
from llmpq.plan_data import Plan, reserve_of
from llmpq.prompts.request import Finished, Request
from llmpq.run_report import MeasuredTime, StageReport
from llmpq.runtime.agreed import agree_on_draws
from llmpq.runtime.jobs import headers_for
from llmpq.runtime.leader import Ends, Leader, Status, never
from llmpq.runtime.rehearsal import MemoryAccount, MessageMeter, Throttle
from llmpq.runtime.sampler import Sampling
from llmpq.runtime.stopwatch import SPAN_COLUMNS, TIME_COLUMNS, Stopwatch, measured_times
from llmpq.runtime.transport import Transport
from llmpq.runtime.warm_up import warm_up
from llmpq.runtime.weights_hash import gather_hashes
from llmpq.runtime.worker import Worker
from llmpq.schedule import Schedule
from llmpq.workload import lanes_for


class StageEngine:
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
        rehearse: bool = True,
        roundings: Roundings = NEAREST,
        packed: WeightCache = NO_CACHE,
        group: ShardGroup | None = None,
        loading: AbstractContextManager[object] | None = None,
        graphs: bool = True,
        batch_invariant: bool = False,
        on_compiled: OnCompiled = lambda *_: None,
    ) -> None:
        """Loads the stage of this rank and warms it up.

        `group` connects the workers that share this stage. Weights are loaded inside the context
        manager `loading`. With `graphs`, decode steps are captured in CUDA graphs where possible.
        With `batch_invariant`, kernels compute each token independently of its micro-batch.
        """
        started = time.perf_counter()
        self.plan, self.transport, self.eos_ids = plan, transport, eos_ids
        self.sampling = sampling
        self.reserve = reserve_of(plan)
        self.account, factor = _rehearsal(plan, transport.rank, rehearse)
        with loading or nullcontext():
            stage = self._load(config, weights, dtype, device, roundings, packed, group)
        most_rows = max(plan.prefill_micro_batch * self.reserve.chunk_tokens, self.reserve.rows)
        self.kernel_notes = prepare_kernels(stage, most_rows, batch_invariant, on_compiled)
        prepare_rows(stage, *planned_rows(plan))
        micro_batches = plan.prefill_micro_batch, plan.decode_micro_batch
        self.worker = Worker(
            stage=stage,
            transport=transport,
            meter=MessageMeter(self.account),
            cache=LaneCache(stage.layers.count, self.reserve.lanes, stage.windows),
            throttle=Throttle(factor, device),
            sampling=sampling,
            headers=headers_for(*micro_batches, len(plan.stages)),
            graphs=graphs,
        )
        warm_up(self.worker, plan, self.account)
        self.load_s = time.perf_counter() - started

    def lead(
        self,
        lengths: Mapping[int, tuple[int, int]],
        fetch: Callable[[int], Request],
        on_finished: Callable[[Finished], None],
        on_status: Callable[[Status], None] = lambda _: None,
        refill: bool = True,
        chunk: int | None = None,
        samplings: Sequence[Sampling] = (),
        ends: Ends = never,
    ) -> None:
        """Runs all requests, each fetched by its number when its turn has come (first stage only).

        `lengths` holds the (prompt, new) tokens of each request by its number. `chunk` is the
        number of prompt tokens computed at once, where that is not as planned. Without `refill`,
        one batch ends before the next begins. `samplings` holds settings by number, where requests
        differ. `ends` tells whether a request has all that it asked for.
        """
        plan = self.plan
        sizes = plan.batch, plan.decode_micro_batch
        windows = set(plan.model.windows)
        shapes = lanes_for(list(lengths.values()), self.reserve.lanes, *sizes, windows)
        self._agree(shapes, samplings)
        most = min(chunk or self.reserve.chunk_tokens, self.reserve.chunk_tokens)
        items = (Item(number, *both) for number, both in lengths.items())
        rows, stages = plan.prefill_micro_batch, self.transport.size
        ahead = _steps_ahead(self.worker.stage.device, stages)
        schedule = Schedule(shapes, rows, most, stages, items, refill, ahead=ahead)
        Leader(self.worker, schedule, fetch, self.eos_ids, on_finished, on_status, ends).run()

    def follow(self) -> None:
        """Runs the jobs that the first stage decides, until it ends (all other stages)."""
        self._agree(())
        if self.worker.stage.shard.leads:
            self.worker.follow()
        else:
            self.worker.assist()

    def _agree(self, shapes: Sequence[LaneShape], samplings: Sequence[Sampling] = ()) -> None:
        """Takes over the cache lanes and sampling settings that the first stage broadcasts."""
        self.worker.use_sampling(agree_on_draws(samplings, self.transport) or self.sampling)
        count = torch.tensor([len(shapes)])
        self.transport.broadcast(count)
        table = torch.tensor(shapes or [(0, 0)] * int(count), dtype=torch.int64)
        self.transport.broadcast(table)
        agreed = tuple(LaneShape(*row) for row in table.tolist())
        if agreed != self.worker.cache.shapes:
            stage = self.worker.stage
            self.worker.use_cache(LaneCache(stage.layers.count, agreed, stage.windows))

    def graphs_note(self) -> str | None:
        """Says whether a card runs decode steps as CUDA graphs, and why not; None on a CPU."""
        graphs = self.worker.steps.graphs
        if self.worker.stage.device.type != "cuda":
            return None
        if graphs.wanted:
            return "decode steps run as CUDA graphs"
        return f"decode steps run without CUDA graphs: {graphs.why_not}"

    def measure(self, hashes: bool = False) -> list[StageReport]:
        """Reports of every stage's times, with SHA-256 digests of its weights if `hashes`.

        All stages must call this. Hashing reads all weights, which takes seconds for a large stage.
        """
        times = *self.worker.watch.values(), self._peak_bytes(), self.load_s
        halved = (self.worker.most_rows.get(prefill, 0) for prefill in (True, False))
        graphs = self.worker.steps.graphs
        captured = len(graphs.captured), graphs.num_bytes
        mine = (*times, *halved, *captured, *self.account.parts)
        rows = self.transport.gather(torch.tensor(mine, dtype=torch.float64))
        tables = self._gather_tables(self.worker.watch.table(), TIME_COLUMNS)
        reports = [
            _stage_report(rank, row.tolist(), measured_times(table))
            for rank, (row, table) in enumerate(zip(rows, tables, strict=True))
        ]
        if not hashes:
            return reports
        every = gather_hashes(self.worker.stage, self.transport)
        return [
            report.model_copy(update={"weights_sha256": one})
            for report, one in zip(reports, every, strict=True)
        ]

    def _gather_tables(self, table: list[list[float]], columns: int) -> list[list[list[float]]]:
        """Every stage's table, through tables of equal size."""
        table = table if self.worker.stage.shard.leads else []
        counts = [int(n) for n in self.transport.gather(torch.tensor(len(table)))]
        padded = torch.zeros(1 + max(counts), columns, dtype=torch.float64)
        padded[: len(table)] = torch.tensor(table, dtype=torch.float64).reshape(-1, columns)
        tables = self.transport.gather(padded)
        return [t[:n].tolist() for t, n in zip(tables, counts, strict=True)]

    def _peak_bytes(self) -> int:
        """The peak that a card's allocator counted; on a CPU the worker's memory account."""
        device = self.worker.stage.device
        if device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(device))
        return self.account.total

    def start_clock(self, trace: bool = False) -> None:
        """Opens connections, waits for all stages, and resets the times of loading and warm-up.

        With `trace`, the time of every job is kept for the method `trace`.
        """
        self._open_links()
        self.transport.gather(torch.zeros(1))
        self.worker.watch = Stopwatch(spans=array("d") if trace else None)

    def _open_links(self) -> None:
        """Sends small messages through all stages, as connections are made at first use."""
        if not self.worker.stage.shard.leads:
            return
        transport, worker = self.transport, self.worker
        message = torch.zeros(16, dtype=torch.uint8, device=transport.message_device)
        if not worker.is_first:
            transport.receive_header(worker.headers.empty()).wait()
            transport.receive_hidden(message).wait()
        if not worker.is_last:
            transport.send_header(worker.headers.empty()).wait()
            transport.send_hidden(message).wait()
        answer = torch.zeros(worker.messages.token_message_size(), dtype=torch.int32)
        if worker.is_last and not worker.is_first:
            transport.send_tokens(answer).wait()
        elif worker.is_first and not worker.is_last:
            transport.receive_tokens(answer).wait()

    def trace(self) -> list[list[list[float]]]:
        """Every stage's jobs, `SPAN_COLUMNS` numbers each; all stages must call this."""
        spans = self.worker.watch.spans or array("d")
        table = [list(spans[i : i + SPAN_COLUMNS]) for i in range(0, len(spans), SPAN_COLUMNS)]
        return self._gather_tables(table, SPAN_COLUMNS)

    def _load(
        self,
        config: Any,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        roundings: Roundings,
        packed: WeightCache,
        group: ShardGroup | None,
    ) -> StageModel:
        stage = self.plan.stages[self.transport.rank]
        layers = LayerRange(stage.first_layer, stage.end_layer, self.plan.model.num_layers)

        def on_tensor(model: StageModel) -> None:
            self.account.weights = model.weight_bytes()
            self.account.check()

        return load_stage(
            config,
            weights,
            layers,
            stage.precisions,
            dtype,
            device,
            on_tensor,
            roundings,
            packed,
            ALONE if group is None else Shard(group.rank, group.size),
            group,
        )


def _steps_ahead(device: torch.device, num_stages: int) -> int:
    """How many steps of a lane may be in flight: a single card need not wait for its tokens."""
    return 2 if device.type == "cuda" and num_stages == 1 else 1


def _stage_report(rank: int, values: list[float], measured: list[MeasuredTime]) -> StageReport:
    prefill, decode, idle, comm, peak, load, prefill_rows, decode_rows, *rest = values
    num_graphs, graph_bytes, *parts = rest
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
        most_prefill_rows=int(prefill_rows) or None,
        most_decode_rows=int(decode_rows) or None,
        num_graphs=int(num_graphs) or None,
        graph_bytes=int(graph_bytes) or None,
        weights_bytes=weights,
        cache_bytes=cache,
        activation_bytes=activations,
        buffer_bytes=buffers,
    )


def _rehearsal(plan: Plan, rank: int, rehearse: bool) -> tuple[MemoryAccount, float]:
    """The memory account of a stage, and the slowdown with which it is rehearsed."""
    stage = plan.stages[rank]
    name = f"stage {rank} ({stage.devices[0]} on {stage.node})"
    role = plan.cluster.rehearse.get(stage.devices[0]) if rehearse else None
    if role is None:
        return MemoryAccount(name, cap_bytes=None), 1.0
    cap = math.floor(role.memory_mib * 1024 * 1024)
    return MemoryAccount(name, cap_bytes=cap), role.slowdown
