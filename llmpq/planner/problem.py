"""The planning problem as a value: what is asked, and what each resource does for it.

A `Configuration` fixes everything but which stage holds which layers at which precisions; an
`Assignment` fixes that too. A `Problem` is model, machines, workload, times and the price of
quality; for pricing, a workload is the jobs of its run (`costs.job_counts`).

A resource is a stage or the link after it. Its `Work` says how long a micro-batch takes it in both
phases. All prices of plans rest on these works: the exact one (`evaluate`), the arrays that the
methods optimise over (`instance`), and the simulation (`simulated`).

Not covered: what a whole plan costs, and how works of several resources make a schedule.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from llmpq.cluster import Cluster
from llmpq.costs.job_counts import (
    JobCounts,
    LaneSteps,
    Tokens,
    count_prefills,
    count_steps,
    together,
    tokens_of,
)
from llmpq.costs.latency import LayerTimes
from llmpq.costs.memory import RunSizes
from llmpq.costs.quality import QualityModel
from llmpq.costs.rounds import Rounds, run_in_rounds, slots_of
from llmpq.costs.shards import tensor_parallel_times
from llmpq.job import LaneShape
from llmpq.model_spec import ModelSpec
from llmpq.planner.scaling import ScaledSizes, Scales, least_change, scale_at
from llmpq.planner.tables import K, Scope, Table, V, ValuesByObjects
from llmpq.profile_data import Profile
from llmpq.workload import Workload, chunk_tokens, evenly_spaced, lanes, lanes_for

VERY_MANY = 10_000  # requests, whose plan more of them get too
MOST_COUNTED = VERY_MANY  # requests whose jobs are counted one by one
LANES_COUNTED = 16  # lanes of a batch, of which the slots of each length are taken for all counts
LIKE_ROWS = 4  # prompts of a prefill job, while requests are followed, for all sizes above 1
OVER = 1 + 1e-9  # rounding of sums of sensitivities and bytes: so far a limit may be overstepped

Lengths = tuple[tuple[int, int], ...]  # (prompt tokens, new tokens) of every request


@dataclass(frozen=True)
class StageDevices:
    """The devices of a stage: `tensor_parallel` equal ones of a node, `memory_bytes` each."""

    node: str
    type: str
    memory_bytes: int
    tensor_parallel: int = 1


@dataclass(frozen=True)
class Sizes:
    """A batch, and the micro-batches of both phases that are looked at together."""

    batch: int
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    chunk_tokens: int | None = None  # None, of both: as the workload's lengths say
    lanes: tuple[LaneShape, ...] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """How many micro-batches there are of either phase."""
        return len(self.prefill), len(self.decode)


@dataclass(frozen=True)
class Configuration:
    """The devices of each stage in order, and the sizes of batch, micro-batches, chunks and lanes.

    A plan says how many tokens of a prompt are computed at once and how its cache is cut into
    lanes; where these are None, both follow from the workload's lengths.
    """

    stage_devices: tuple[StageDevices, ...]
    batch: int
    prefill_micro_batch: int
    decode_micro_batch: int
    chunk_tokens: int | None = None
    lanes: tuple[LaneShape, ...] | None = None

    @property
    def sizes(self) -> Sizes:
        """The one pair of micro-batches."""
        pair = (self.prefill_micro_batch,), (self.decode_micro_batch,)
        return Sizes(self.batch, *pair, self.chunk_tokens, self.lanes)

    def resized(self, **sizes: Any) -> "Configuration":
        """With other batch, micro-batches or chunk, and the lanes that follow from the workload."""
        return replace(self, lanes=None, **sizes)


@dataclass(frozen=True)
class Assignment:
    """A configuration, and the precision of every layer of every stage."""

    configuration: Configuration
    stages: tuple[tuple[str, ...], ...]

    @property
    def precisions(self) -> list[str]:
        """The precision of every layer of the model."""
        return [p for stage in self.stages for p in stage]


LONGEST_PROMPT: Table[None, int] = Table(Scope.REQUESTS)
LONGEST_REQUEST: Table[None, int] = Table(Scope.REQUESTS)
ALL_EQUAL: Table[None, bool] = Table(Scope.REQUESTS)
DEFAULT_CHUNK: Table[None, int] = Table(Scope.REQUESTS)
NEW_TOKENS: Table[None, int] = Table(Scope.REQUESTS)
LISTED_TOKENS: Table[None, Tokens] = Table(Scope.REQUESTS)
COUNTED: Table[float, Lengths] = Table(Scope.REQUESTS)
LANES: Table[tuple[int, int, tuple[LaneShape, ...] | None], tuple[LaneShape, ...]] = Table(
    Scope.REQUESTS
)
SHARDS: Table[int, ModelSpec] = Table(Scope.REQUESTS)
JOB_COUNTS: Table[tuple[Hashable, ...], JobCounts] = Table(Scope.REQUESTS)
ROUNDS: Table[tuple[Hashable, ...], Rounds] = Table(Scope.REQUESTS)
PREFILL_COUNTS: Table[tuple[Hashable, ...], Any] = Table(Scope.REQUESTS)
STEP_COUNTS: Table[tuple[Hashable, ...], LaneSteps] = Table(Scope.REQUESTS)
SHARED_STAGES: Table["StageDevices", LayerTimes] = Table()


@dataclass(frozen=True, eq=False)
class Problem:
    """Model, machines, work and costs. `budget`: largest summed sensitivity; `theta`: its price.

    `max_tensor_parallel`: the most devices of a stage; 1 leaves tensor parallelism out.
    `scales`: simulated seconds over those of the closed form, where that is known; the closed form
    is multiplied by it. `model`: the one that a plan names, where `spec` has fewer kinds of layers,
    as some do not differ on texts of these lengths.
    """

    spec: ModelSpec
    cluster: Cluster
    workload: Workload
    lengths: Lengths  # of all requests, or of a sample that stands for them
    times: Mapping[str, LayerTimes]  # by device type, of one device
    quality: QualityModel
    precisions: tuple[str, ...]
    budget: float = math.inf
    theta: float = 0.0
    max_tensor_parallel: int = 1
    profiles: Sequence[Profile] = ()  # where times of several devices a stage are looked up
    num_requests: int | None = None  # that the lengths stand for; None: for themselves
    model: ModelSpec | None = None
    scales: Scales = field(default_factory=dict)
    _known: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    _of_run: ValuesByObjects = field(default_factory=ValuesByObjects, repr=False)

    def scaled(self, found: Mapping[tuple[ScaledSizes, int], float]) -> "Problem":
        """With other scales for some sizes and numbers of stages; what is known stays known."""
        scales = {sizes: dict(some) for sizes, some in self.scales.items()}
        for (sizes, num_stages), scale in found.items():
            scales.setdefault(sizes, {})[num_stages] = scale
        changed = replace(self, scales=scales)
        if self.unit is not self:
            changed.__dict__["unit"] = self.unit.scaled(found)
        return changed

    def scales_of(self, num_stages: int, sizes: Sizes) -> np.ndarray:
        """[P, Q]: what the closed form is multiplied by; 1 where nothing was simulated."""
        if not self.scales:
            return np.ones(sizes.shape)
        batch, chunk = sizes.batch, self.chunk_tokens(sizes)
        each = [
            scale_at(self.scales, ScaledSizes(batch, p, q, chunk), num_stages)
            for p in sizes.prefill
            for q in sizes.decode
        ]
        return np.array(each).reshape(sizes.shape)

    def scale_of(self, configuration: Configuration) -> float:
        """Of one configuration."""
        sizes, num_stages = self.scaled_sizes(configuration), len(configuration.stage_devices)
        return scale_at(self.scales, sizes, num_stages)

    def least_change(self, before: Scales) -> float:
        """No scale is less than so many times what it was `before`; 1 at most."""
        return least_change(self.scales, before, len(self.cluster.devices()))

    def scaled_sizes(self, configuration: Configuration) -> ScaledSizes:
        """What a run's closed form is scaled by, beside its number of stages."""
        sizes = (
            configuration.batch,
            configuration.prefill_micro_batch,
            configuration.decode_micro_batch,
        )
        return ScaledSizes(*sizes, self.chunk_tokens(configuration))

    def cached(self, table: Table[K, V], key: K, compute: Callable[[], V]) -> V:
        """The value of a key in a table; `compute()` where it is asked for the first time.

        Problems that are made from one another by `dataclasses.replace` share what does not depend
        on what was replaced (`Scope`).
        """
        known = self._values(table.scope).setdefault(table, {})
        if key not in known:
            known[key] = compute()
        value: V = known[key]
        return value

    def _values(self, scope: Scope) -> dict[Hashable, Any]:
        """The tables of a scope."""
        if scope is Scope.PROBLEM:
            return self._known
        if scope is Scope.REQUESTS:
            return self._of_run.of(self.spec, self.lengths)
        return self._of_run.of(self.spec, self.lengths, self.cluster, self.times, self.profiles)

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt."""
        return self.cached(LONGEST_PROMPT, None, lambda: max(prompt for prompt, _ in self.lengths))

    @property
    def repeats(self) -> float:
        """How many requests each of the lengths stands for."""
        return 1.0 if self.num_requests is None else self.num_requests / len(self.lengths)

    @cached_property
    def unit(self) -> "Problem":
        """The problem, or of very many requests so many: what is best for them is best for more."""
        in_all = self.repeats * len(self.lengths)
        if in_all <= VERY_MANY:
            return self
        theta = self.theta * VERY_MANY / in_all
        return replace(self, num_requests=VERY_MANY, theta=theta, _known={})

    @property
    def num_new_tokens(self) -> float:
        """Tokens to generate."""
        return self.repeats * self.cached(
            NEW_TOKENS, None, lambda: sum(new for _, new in self.lengths)
        )

    @property
    def num_decoded_tokens(self) -> float:
        """Tokens that decode steps compute: all new ones but the first of each request."""
        return self._tokens.new

    def job_counts(self, sizes: Sizes, prefill: int = 0, decode: int = 0) -> JobCounts:
        """The jobs of a run with a pair of micro-batches, given by their positions in `sizes`.

        See `costs.job_counts`. Of many requests a sample is counted, of all lengths.
        """
        rows, decode_rows = sizes.prefill[prefill], sizes.decode[decode]
        key = sizes.batch, rows, decode_rows, sizes.chunk_tokens, sizes.lanes, self.repeats
        return self.cached(JOB_COUNTS, key, lambda: self._count_jobs(sizes, rows, decode_rows))

    def _count_jobs(self, sizes: Sizes, prefill_rows: int, decode_rows: int) -> JobCounts:
        lanes, chunk = self.lanes(sizes, decode_rows), self.chunk_tokens(sizes)
        slots = self._slots(sizes)
        like = 1 if prefill_rows == 1 or self.are_equal else LIKE_ROWS
        of_rounds = slots, like, self.repeats
        rounds = self.cached(ROUNDS, of_rounds, lambda: run_in_rounds(self._counted, slots, like))
        prefills = count_prefills(
            rounds,
            prefill_rows,
            chunk,
            decode_rows,
            lambda key, compute: self.cached(PREFILL_COUNTS, (*of_rounds, chunk, key), compute),
        )
        key = lanes, *of_rounds
        steps = self.cached(STEP_COUNTS, key, lambda: count_steps(rounds, lanes))
        return together(rounds, prefills, steps, self._tokens)

    def _slots(self, sizes: Sizes) -> tuple[tuple[int, int], ...]:
        """How many slots there are of each length.

        Where lanes follow from the workload, as of small lanes: so one run in rounds serves all
        decode micro-batches of a batch.
        """
        rows = max(1, sizes.batch // LANES_COUNTED)
        return slots_of(self.lanes(sizes, rows))

    @property
    def _counted(self) -> Lengths:
        """The requests whose jobs are counted: as many as there are, up to `MOST_COUNTED`."""

        def compute() -> Lengths:
            count = min(round(self.repeats * len(self.lengths)), MOST_COUNTED)
            order = sorted(range(len(self.lengths)), key=lambda i: self.lengths[i][::-1])
            return tuple(self.lengths[i] for i in evenly_spaced(order, count))

        return self.cached(COUNTED, self.repeats, compute)

    @property
    def _tokens(self) -> Tokens:
        """Of all requests."""
        listed = self.cached(LISTED_TOKENS, None, lambda: tokens_of(self.lengths))
        return Tokens(self.repeats * listed.prompt, self.repeats * listed.new)

    def waves(self, count: int, batch: int) -> Lengths:
        """`count` waves of `batch` requests, from equal distances in the order of their outputs.

        The requests of a wave follow one another in that order, as they do in the run.
        """
        found = self._counted
        starts = [int((i + 0.5) / count * len(found) - batch / 2) for i in range(count)]
        last = len(found) - batch
        return tuple(one for at in starts for one in found[max(0, min(at, last)) :][:batch])

    @property
    def are_equal(self) -> bool:
        """All requests have the same lengths."""
        return self.cached(ALL_EQUAL, None, lambda: len(set(self.lengths)) == 1)

    @property
    def max_tokens(self) -> int:
        """Of the longest request, prompt and new tokens."""
        return self.cached(
            LONGEST_REQUEST, None, lambda: max(prompt + new for prompt, new in self.lengths)
        )

    def chunk_tokens(self, sizes: Configuration | Sizes) -> int:
        """Tokens of a prompt that are computed at once, at most."""
        if sizes.chunk_tokens is not None:
            return min(sizes.chunk_tokens, self.max_prompt_tokens)
        return self.cached(DEFAULT_CHUNK, None, lambda: chunk_tokens(self.lengths))

    def lanes(self, sizes: Sizes, decode_micro_batch: int) -> tuple[LaneShape, ...]:
        """The KV cache of a run; the given lanes serve longer requests as `lanes_for` says.

        Raises `UserError` where one request needs more cache than these have.
        """
        given, pair = sizes.lanes, (sizes.batch, decode_micro_batch)

        def compute() -> tuple[LaneShape, ...]:
            if given is None:
                return lanes(self.lengths, *pair)
            return lanes_for(self.lengths, given, *pair, set(self.spec.windows))

        return self.cached(LANES, (*pair, given), compute)

    def resolved(self, configuration: Configuration) -> Configuration:
        """The same configuration with its chunk and lanes in numbers."""
        shapes = self.lanes(configuration.sizes, configuration.decode_micro_batch)
        return replace(configuration, chunk_tokens=self.chunk_tokens(configuration), lanes=shapes)

    def run_sizes(self, configuration: Configuration) -> RunSizes:
        """What the memory of a run depends on."""
        return RunSizes(
            lanes=self.lanes(configuration.sizes, configuration.decode_micro_batch),
            prefill_micro_batch=configuration.prefill_micro_batch,
            prompt_tokens=self.max_prompt_tokens,
            chunk_tokens=self.chunk_tokens(configuration),
            num_stages=len(configuration.stage_devices),
        )

    def shard(self, devices: StageDevices) -> ModelSpec:
        """What one device of a stage holds of the model."""
        return self.shard_of(devices.tensor_parallel)

    def shard_of(self, degree: int) -> ModelSpec:
        """What one of `degree` devices holds of the model."""
        return self.cached(SHARDS, degree, lambda: self.spec.shard(degree))

    def times_at(self, devices: StageDevices) -> LayerTimes:
        """Times of a stage's devices, the messages between them included."""
        if devices.tensor_parallel == 1:
            return self.times[devices.type]
        key = replace(devices, memory_bytes=0)  # which makes no difference
        return self.cached(SHARED_STAGES, key, lambda: self._tensor_parallel_times(devices))

    def _tensor_parallel_times(self, devices: StageDevices) -> LayerTimes:
        return tensor_parallel_times(
            self.cluster,
            devices.type,
            devices.node,
            self.spec,
            devices.tensor_parallel,
            self.profiles,
        )
