"""One worker process from start to report: load the stage, do its jobs, gather the times.

The first stage leads: it reads the requests and decides every job (`Leader`, `llmpq.schedule`).
`StageEngine` is the same for one stage or many, for processes or threads.
"""

import math
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from llmpq.checkpoint.checkpoint import Weights
from llmpq.checkpoint.kernel_setup import OnCompiled, planned_rows, prepare_kernels, prepare_rows
from llmpq.checkpoint.loader import load_stage
from llmpq.checkpoint.packed_cache import NO_CACHE, WeightCache
from llmpq.checkpoint.roundings import NEAREST, Roundings
from llmpq.job import Item, Job, LaneShape, Member
from llmpq.kernel import graph_lengths
from llmpq.models.lanes import LaneCache
from llmpq.models.sharding import ALONE, Shard, ShardGroup
from llmpq.models.stage_model import LayerRange, StageModel
from llmpq.plan_data import Plan, reserve_of
from llmpq.prompts.request import Finished, Request
from llmpq.report import MeasuredTime, StageReport
from llmpq.runtime.agreed import agree_on_draws
from llmpq.runtime.jobs import headers_for
from llmpq.runtime.leader import Ends, Leader, Status, never
from llmpq.runtime.rehearsal import MemoryAccount, MeteredTransport, Throttle, peak_bytes
from llmpq.runtime.sampler import Sampling
from llmpq.runtime.stopwatch import SPAN_COLUMNS, TIME_COLUMNS, Stopwatch, measured_times
from llmpq.runtime.transport import Transport
from llmpq.runtime.weights_hash import gather_hashes
from llmpq.runtime.worker import Worker
from llmpq.schedule import Schedule
from llmpq.workload import lanes_for, planned_lengths


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
        """`group` connects the workers that share this stage. Weights are loaded in `loading`.

        `graphs`: decode steps are captured in CUDA graphs where that is possible.
        `batch_invariant`: kernels that could make a token depend on its micro-batch do not.
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
            transport=MeteredTransport(transport, self.account),
            cache=LaneCache(stage.layers.end - stage.layers.first, self.reserve.lanes),
            throttle=Throttle(factor, device),
            sampling=sampling,
            headers=headers_for(*micro_batches, len(plan.stages)),
            graphs=graphs,
        )
        self._warm_up()
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
        """First stage: runs all requests, each fetched by its number when its turn has come.

        `lengths` are their (prompt, new) tokens by number; `chunk`: tokens of a prompt that are
        computed at once, where not as planned; without `refill`, batch after batch. `samplings`:
        by number, where requests differ; `ends`: whether a request has all that it asked for.
        """
        plan = self.plan
        sizes = plan.batch, plan.decode_micro_batch
        shapes = lanes_for(list(lengths.values()), self.reserve.lanes, *sizes)
        self._agree(shapes, samplings)
        most = min(chunk or self.reserve.chunk_tokens, self.reserve.chunk_tokens)
        items = (Item(number, *both) for number, both in lengths.items())
        rows, stages = plan.prefill_micro_batch, self.transport.size
        ahead = _steps_ahead(self.worker.stage.device, stages)
        schedule = Schedule(shapes, rows, most, stages, items, refill, ahead=ahead)
        Leader(self.worker, schedule, fetch, self.eos_ids, on_finished, on_status, ends).run()

    def follow(self) -> None:
        """Other stages: does what the first decides, until it ends."""
        self._agree(())
        if self.worker.stage.shard.leads:
            self.worker.follow()
        else:
            self.worker.assist()

    def _agree(self, shapes: Sequence[LaneShape], samplings: Sequence[Sampling] = ()) -> None:
        """All stages cut their cache, and choose tokens, as the first one says."""
        self.worker.use_sampling(agree_on_draws(samplings, self.transport) or self.sampling)
        count = torch.tensor([len(shapes)])
        self.transport.broadcast(count)
        table = torch.tensor(shapes or [(0, 0)] * int(count), dtype=torch.int64)
        self.transport.broadcast(table)
        agreed = tuple(LaneShape(*row) for row in table.tolist())
        if agreed != self.worker.cache.shapes:
            num_layers = self.worker.stage.layers.end - self.worker.stage.layers.first
            self.worker.use_cache(LaneCache(num_layers, agreed))

    def graphs_note(self) -> str | None:
        """How this stage runs decode steps on a card, and why if not in CUDA graphs."""
        graphs = self.worker.steps.graphs
        if self.worker.stage.device.type != "cuda":
            return None
        if graphs.wanted:
            return "decode steps run as CUDA graphs"
        return f"decode steps run without CUDA graphs: {graphs.why_not}"

    def measure(self, hashes: bool = False) -> list[StageReport]:
        """Every stage's times, and with `hashes` those of its weights; all stages must call this.

        Hashing reads all weights: seconds for a large stage.
        """
        times = *self.worker.watch.values(), self._peak_bytes(), self.load_s
        halved = (self.worker.most_rows.get(prefill, 0) for prefill in (True, False))
        graphs = self.worker.steps.graphs
        captured = len(graphs.captured), graphs.num_bytes
        mine = (*times, *halved, *captured, *self.account.parts)
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

    def _gather_measured(self) -> list[list[MeasuredTime]]:
        """Every stage's times by kind of call."""
        tables = self._gather_tables(self.worker.watch.table(), TIME_COLUMNS)
        return [measured_times(table) for table in tables]

    def _gather_tables(self, table: list[list[float]], columns: int) -> list[list[list[float]]]:
        """Every stage's table, through tables of equal size."""
        table = table if self.worker.stage.shard.leads else []
        counts = [int(n) for n in self.transport.gather(torch.tensor(len(table)))]
        padded = torch.zeros(1 + max(counts), columns, dtype=torch.float64)
        padded[: len(table)] = torch.tensor(table, dtype=torch.float64).reshape(-1, columns)
        tables = self.transport.gather(padded)
        return [t[:n].tolist() for t, n in zip(tables, counts, strict=True)]

    def _peak_bytes(self) -> int:
        """What a card's allocator counted; on a CPU what the worker accounts for."""
        device = self.worker.stage.device
        if device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(device))
        return self.account.total

    def start_clock(self, trace: bool = False) -> None:
        """Opens the links, waits for all stages, then forgets what loading and warming up took.

        With `trace` every job's time is kept for `trace`.
        """
        self._open_links()
        self.transport.gather(torch.zeros(1))
        self.worker.watch = Stopwatch(spans=array("d") if trace else None)

    def _open_links(self) -> None:
        """Small messages round the stages: connections are made at first use."""
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
        answer = torch.zeros(worker.answer_size(), dtype=torch.int32)
        if worker.is_last and not worker.is_first:
            transport.send_tokens(answer).wait()
        elif worker.is_first and not worker.is_last:
            transport.receive_tokens(answer).wait()

    def trace(self) -> list[list[list[float]]]:
        """Every stage's jobs as `SPAN_COLUMNS`; all stages must call this."""
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

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Does a job of each kind at its largest planned size, measuring what they take.

        Then steps of the other sizes that the plan's requests will ask for, to be captured.
        """
        device = self.worker.stage.device
        # The first round makes the cache's buffers, and is the only one that runs a step which is
        # then captured: its memory stays the graph's.
        rounds = [
            [peak_bytes(partial(self._try, job), device) for job in self._largest_jobs()]
            for _ in range(2)
        ]
        steps = self.worker.steps
        (*_, step), prefills = rounds[0], max(rounds[1])
        activations = prefills + step if steps.graphs.wanted else prefills
        self.account.cache = self.worker.cache.num_bytes
        self.account.activations = steps.num_bytes + activations
        self.account.check()
        if steps.graphs.wanted:
            for job in self._planned_steps():
                self._try(job)

    def _planned_steps(self) -> Iterator[Job]:
        """Steps of whole lanes at every width from the shortest prompt on, widest first."""
        shortest = min(prompt for prompt, _ in planned_lengths(self.plan.workload))
        for lane, shape in enumerate(self.reserve.lanes):
            least = min(shortest + 1, shape.tokens)
            for width in reversed([n for n in graph_lengths(shape.tokens) if n >= least]):
                rows = range(shape.rows)
                members = tuple(Member(lane, row, width - 1, row, 1) for row in rows)
                yield Job(False, members, 0, width, shape.rows)

    def _largest_jobs(self) -> list[Job]:
        """A prefill of unequal prompts, a chunk at the end of a long one, a decode step."""
        longest, chunk = self.reserve.longest, self.reserve.chunk_tokens
        prompt = self.reserve.prompt_tokens
        lane = max(range(len(self.reserve.lanes)), key=lambda i: self.reserve.lanes[i].tokens)
        rows = self.reserve.lanes[lane].rows
        prompts = [max(1, chunk - 1), *[chunk] * (self.plan.prefill_micro_batch - 1)]
        newcomers = tuple(Member(lane, i % rows, n, i, 0) for i, n in enumerate(prompts))
        ends = newcomers[0]._replace(prompt_tokens=prompt)
        steps = tuple(Member(lane, row, longest - 1, row, 1) for row in range(rows))
        return [
            Job(True, newcomers, 0, max(prompts), len(prompts)),
            Job(True, (ends,), prompt - min(chunk, prompt), prompt, 1),
            Job(False, steps, 0, longest, rows),
        ]

    def _try(self, job: Job) -> None:
        """One job of this stage on invented input."""
        stage, worker = self.worker.stage, self.worker
        worker.cache.rearrange(job)
        worker.steps.rearrange(job)
        shape, kind = worker.given_shape(job), worker.given_kind()
        worker.compute(job, torch.zeros(shape, dtype=kind, device=stage.device))


def _steps_ahead(device: torch.device, num_stages: int) -> int:
    """Steps of a lane that may be under way: a card that works alone need not wait for tokens."""
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
    """The memory account of a stage, and how many times slower than this machine it plays."""
    stage = plan.stages[rank]
    name = f"stage {rank} ({stage.devices[0]} on {stage.node})"
    role = plan.cluster.rehearse.get(stage.devices[0]) if rehearse else None
    if role is None:
        return MemoryAccount(name, cap_bytes=None), 1.0
    cap = math.floor(role.memory_mib * 1024 * 1024)
    return MemoryAccount(name, cap_bytes=cap), role.slowdown
