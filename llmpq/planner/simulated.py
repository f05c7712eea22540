"""A plan's whole run, played batch by batch, with the same times that price it in closed form.

Batches run one after another, as the runtime runs them: requests sorted and cut alike, caches that
grow step by step, decode micro-batches that end with the last of their requests, prompts longer
than the plan foresaw in smaller micro-batches and batches, messages as long as the runtime sends
them. A batch begins when the tokens of the one before are back. The first stage begins at once;
another one when the message that ends the last batch has come down to it, and the announcement of
the next one has (two broadcasts along a binomial tree: the sizes, then the table of lengths).

`simulated_s` plays only what the closed form prices: the same batches without these last effects.
Not covered: stop tokens (a request generates as many tokens as the workload says), refilling the
places of ended requests (the runtime does not), the growth of a cache's memory.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from llmpq.costs.links import message_s
from llmpq.costs.simulate import Batch, Played, simulate
from llmpq.costs.timeline import Split, split, wait_counts
from llmpq.planner.evaluate import actor_works
from llmpq.planner.problem import Assignment, BatchGroup, Problem, Work
from llmpq.workload import Batch as Requests
from llmpq.workload import batches, fitting, prefill_size

NUMBER_BYTES = 8  # of a length in an announcement
HEADER_NUMBERS = TABLE_COLUMNS = 3
Lengths = Sequence[tuple[int, int]]  # (prompt tokens, new tokens) of every request


class Shape(NamedTuple):
    """All that the times of a batch depend on: requests of each micro-batch, tokens, steps."""

    prefill_sizes: tuple[int, ...]
    decode_sizes: tuple[int, ...]
    prompt_tokens: int
    steps: tuple[int, ...]  # of each decode micro-batch
    is_first: bool  # no batch ran before it

    @property
    def num_requests(self) -> int:
        """Of the whole batch."""
        return sum(self.prefill_sizes)

    @property
    def num_jobs(self) -> int:
        """Of each server."""
        return len(self.prefill_sizes) + sum(self.steps)


@dataclass(frozen=True, eq=False)
class BatchRun:
    """One batch of a run. `played` counts from `start_s`, and is shared by alike batches."""

    number: int
    shape: Shape
    start_s: float
    played: Played

    @property
    def end_s(self) -> float:
        """When its last token is back."""
        return self.start_s + self.played.total_s


@dataclass(frozen=True)
class Totals:
    """A run's seconds. `prefill_s`: until all first tokens were back, summed over batches."""

    num_batches: int
    total_s: float
    prefill_s: float
    busy_s: np.ndarray  # [servers]

    @property
    def decode_s(self) -> float:
        """The rest."""
        return self.total_s - self.prefill_s


def run(problem: Problem, assignment: Assignment, shapes: Sequence[Shape]) -> Iterator[BatchRun]:
    """Every batch in order; `shapes` as `run_shapes` gives them."""
    player = _Player(problem, assignment)
    start, last = 0.0, None
    for number, shape in enumerate(shapes):
        if last is None or shape != last.shape:
            last = BatchRun(number, shape, start, simulate(player.batch(shape)))
        last = replace(last, number=number, start_s=start)
        yield last
        start = last.end_s


def run_shapes(
    problem: Problem, assignment: Assignment, planned: Lengths | None = None
) -> list[Shape]:
    """The batches that the runtime makes of the workload; alike ones follow each other.

    `planned`: the lengths that the plan was made for, where these are others than the workload's.
    """
    batches = run_batches(problem, assignment, planned)
    longest = max(prompt for prompt, _ in planned) if planned else problem.max_prompt_tokens
    return [
        _shape(problem, assignment, requests, longest, is_first=number == 0)
        for number, requests in enumerate(batches)
    ]


def run_batches(
    problem: Problem, assignment: Assignment, planned: Lengths | None = None
) -> list[Requests]:
    """The batches that run: none holds more tokens than the plan reserved for its lengths."""
    batch = assignment.setting.batch
    longest = [b.prompt_tokens + b.new_tokens for b in batches(planned or problem.lengths, batch)]
    whole = batches(problem.lengths, batch)
    return [part for b in whole for part in fitting(b, problem.lengths, batch * max(longest))]


def totals(batches: Sequence[BatchRun]) -> Totals:
    """What all batches of a run take together."""
    return Totals(
        num_batches=len(batches),
        total_s=batches[-1].end_s,
        prefill_s=sum(b.played.first_tokens_s for b in batches),
        busy_s=np.sum([b.played.busy_s for b in batches], axis=0),
    )


def num_spans(shapes: Sequence[Shape], num_servers: int) -> int:
    """Jobs times servers that are to be played and kept; alike batches count once."""
    distinct = [shape for shape, _ in itertools.groupby(shapes)]
    return num_servers * sum(shape.num_jobs for shape in distinct)


def simulated_s(problem: Problem, assignment: Assignment) -> float:
    """Seconds of the whole workload as the closed form prices it.

    No request ends early, batches begin at once, links never wait for receivers.
    """
    setting, player = assignment.setting, _Player(problem, assignment)
    total = 0.0
    for group in problem.groups(setting.batch):
        for index, count in enumerate(group.num_batches):
            batch = player.as_priced(group, index)
            total += float(count) * simulate(batch).total_s
    return total


class _Player:
    """A plan's batches as the simulation wants them."""

    def __init__(self, problem: Problem, assignment: Assignment) -> None:
        self.problem, self.setting = problem, assignment.setting
        self.works = actor_works(problem, assignment)

    def batch(self, shape: Shape) -> Batch:
        """One batch of the run."""
        steps = max(shape.steps)
        messages = [max(shape.decode_sizes)] * len(shape.decode_sizes)
        return Batch(
            prefill=self._prefill(shape.prefill_sizes, shape.prompt_tokens),
            decode=np.stack(
                [
                    _decode(work, messages if link else shape.decode_sizes, shape, steps)
                    for work, link in zip(self.works, self._are_links(), strict=True)
                ]
            ),
            waits=wait_counts(shape.num_requests, shape.prefill_sizes[0], shape.decode_sizes[0]),
            steps=shape.steps,
            ready=self._ready(shape),
            one_ahead=True,
        )

    def as_priced(self, group: BatchGroup, index: int) -> Batch:
        """One of a group's batches without what the closed form leaves out."""
        sizes = self.setting.prefill_micro_batch, self.setting.decode_micro_batch
        prefills, decodes = (_sizes(split(group.num_requests, size)) for size in sizes)
        prompt, steps = int(group.prompt_tokens[index]), int(group.num_steps[index])
        shape = Shape(prefills, decodes, prompt, (steps,) * len(decodes), is_first=True)
        return Batch(
            prefill=self._prefill(prefills, prompt),
            decode=np.stack([_decode(work, decodes, shape, steps) for work in self.works]),
            waits=wait_counts(group.num_requests, *sizes),
        )

    def _prefill(self, sizes: Sequence[int], prompt_tokens: int) -> np.ndarray:
        """[servers, micro-batches]."""
        prompt = float(prompt_tokens)
        known = [{n: float(work.prefill(n, prompt)) for n in set(sizes)} for work in self.works]
        return np.array([[seconds[n] for n in sizes] for seconds in known])

    def _are_links(self) -> list[bool]:
        """Links between stages; the tokens' way back is another thing."""
        last = len(self.works) - 1
        return [place % 2 == 1 and place < last for place in range(len(self.works))]

    def _ready(self, shape: Shape) -> np.ndarray:
        """Seconds from the batch's start until each server can begin with it.

        A stage: when the end of the last batch and the announcement of this one are there; a
        link: when it has carried the end of the last batch.
        """
        hops = [float(work.decode(max(shape.decode_sizes), 0.0)) for work in self.works]
        links = np.array(self._are_links())
        ended = np.where(links, hops, 0.0).cumsum() * (not shape.is_first)
        announced = np.zeros(len(links))
        announced[::2] = [self._announced(rank, shape) for rank in range(len(self.setting.places))]
        ready = np.maximum(ended, announced)
        ready[-1] = 0.0  # the way back has nothing to wait for
        return ready

    def _announced(self, rank: int, shape: Shape) -> float:
        """When a stage knows the batch: a rank is reached after as many hops as it has bits."""
        first, mine = (self.setting.places[r].node for r in (0, rank))
        numbers = HEADER_NUMBERS, TABLE_COLUMNS * shape.num_requests
        cluster = self.problem.cluster
        one = sum(message_s(cluster, first, mine, n * NUMBER_BYTES) for n in numbers)
        return rank.bit_length() * one


def _decode(work: Work, sizes: Sequence[int], shape: Shape, steps: int) -> np.ndarray:
    """[micro-batches, steps] of one server."""
    past = shape.prompt_tokens + np.arange(steps, dtype=float)
    known = {n: np.broadcast_to(work.decode(n, past), past.shape) for n in set(sizes)}
    return np.array([known[n] for n in sizes]).reshape(len(sizes), steps)


def _shape(
    problem: Problem,
    assignment: Assignment,
    requests: Requests,
    planned_prompt: int,
    is_first: bool,
) -> Shape:
    setting, count = assignment.setting, len(requests.requests)
    size = prefill_size(setting.prefill_micro_batch, requests.prompt_tokens, planned_prompt)
    decodes = _sizes(split(count, setting.decode_micro_batch))
    ends = list(itertools.accumulate(decodes))
    new = [problem.lengths[i][1] for i in requests.requests]
    steps = [max(new[end - n : end]) - 1 for n, end in zip(decodes, ends, strict=True)]
    prefills = _sizes(split(count, size))
    return Shape(prefills, decodes, requests.prompt_tokens, tuple(steps), is_first)


def _sizes(parts: Split) -> tuple[int, ...]:
    """Requests of each micro-batch."""
    return (parts.size,) * parts.count + ((parts.rest,) if parts.rest else ())
