"""The simulated run of a plan: the runtime's own order, its batches, and idle time by cause."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from llmpq.cluster import Cluster
from llmpq.costs.latency import device_times
from llmpq.costs.quality import prior_quality
from llmpq.costs.simulate import Batch, Played, simulate
from llmpq.errors import UserError
from llmpq.model_spec import ASSETS, DEFAULT_MODEL, load_model_spec
from llmpq.planner.bubbles import by_cause, describe, find_bubbles, remedy, server_names
from llmpq.planner.evaluate import evaluate, to_plan
from llmpq.planner.problem import Assignment, Place, Problem, Setting
from llmpq.planner.simulated import (
    BatchRun,
    Shape,
    num_spans,
    run,
    run_batches,
    run_shapes,
    simulated_s,
    totals,
)
from llmpq.workload import Workload, prefill_size, request_lengths

Lengths = Sequence[tuple[int, int]]


def make_problem(lengths: Lengths, types: Sequence[str]) -> Problem:
    """The shipped model on one node of these devices."""
    spec = load_model_spec(DEFAULT_MODEL)
    devices = [{"type": name} for name in types]
    link = {"bandwidth_gbs": 0.05, "latency_us": 30}
    nodes = [{"name": "n", "devices": devices, "link": link}]
    cluster = Cluster.model_validate({"nodes": nodes})
    prompts, new = zip(*lengths, strict=True)
    workload = Workload(prompt_tokens=prompts, new_tokens=new, num_requests=len(lengths))
    return Problem(
        spec=spec,
        cluster=cluster,
        workload=workload,
        lengths=tuple(request_lengths(workload)),
        times={name: device_times(cluster, name, spec, []) for name in types},
        quality=prior_quality(spec.num_layers),
        precisions=("16",),
    )


def assign(problem: Problem, batch: int, prefill: int, decode: int) -> Assignment:
    """Layers spread evenly over all devices."""
    places = tuple(Place(d.node, d.type, d.memory_bytes) for d in problem.cluster.devices())
    ends = [problem.spec.num_layers * i // len(places) for i in range(len(places) + 1)]
    stages = tuple(("16",) * (b - a) for a, b in pairwise(ends))
    return Assignment(Setting(places, batch, prefill, decode), stages)


def play(
    problem: Problem, assignment: Assignment, planned: Lengths | None = None
) -> list[BatchRun]:
    return list(run(problem, assignment, run_shapes(problem, assignment, planned)))


def random_lengths(seed: int, count: int, prompt: int, new: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    return [(int(rng.integers(1, prompt + 1)), int(rng.integers(1, new + 1))) for _ in range(count)]


# ---- the runtime's order

SIZES = [(8, 4, 2), (5, 2, 3)]


@pytest.mark.parametrize(("batch", "prefill", "decode"), SIZES)
def test_every_stage_does_the_jobs_that_it_does_in_the_runtime(
    monkeypatch: pytest.MonkeyPatch, batch: int, prefill: int, decode: int
) -> None:
    planned = [(9, 7)] * 14
    lengths = [*random_lengths(batch, 13, 9, 9), (17, 8)]  # some are longer than planned
    problem = make_problem(lengths, ["t4-16g", "v100-32g", "t4-16g"])
    assignment = assign(problem, batch, prefill, decode)
    batches = play(problem, assignment, planned)
    simulated = [
        [one.played.order(2 * rank) for one in batches] for rank in range(len(assignment.stages))
    ]
    assert simulated == runtime_order(monkeypatch, assignment, planned, lengths)
    assert len(batches) > len(lengths) / batch  # a batch that was too long was cut
    assert len({steps for one in batches for steps in one.shape.steps}) > 2


def runtime_order(
    monkeypatch: pytest.MonkeyPatch, assignment: Assignment, planned: Lengths, lengths: Lengths
) -> list[list[list[tuple[int, int]]]]:
    """[stages][batches] of (step, micro-batch), as the stages computed them."""
    torch = pytest.importorskip("torch")
    from llmpq.runtime import worker
    from llmpq.runtime.batching import Request
    from llmpq.runtime.local import generate_locally

    problem = make_problem(planned, [p.type for p in assignment.setting.places])
    plan = to_plan(problem, assignment, "hand-made", evaluate(problem, assignment))
    seen: dict[int, list[tuple[Any, list[tuple[int, int]]]]] = {
        rank: [] for rank in range(len(plan.stages))
    }
    compute = worker._BatchRun._compute

    def note(self: Any, source: Any, start: int, end: int, past: int, *rest: Any) -> None:
        runs = seen[self.worker.transport.rank]
        if not runs or runs[-1][0] is not self:
            runs.append((self, []))
        parts = self.decodes if past else self.prefills
        step = past - self.table.prompt_tokens + 1 if past else 0
        runs[-1][1].append((step, parts.index((start, end))))
        compute(self, source, start, end, past, *rest)

    monkeypatch.setattr(worker._BatchRun, "_compute", note)
    requests = [Request(i, i, (3,) * prompt, new) for i, (prompt, new) in enumerate(lengths)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the stages are threads themselves
    tokens = generate_locally(plan, ASSETS / DEFAULT_MODEL, requests)
    torch.set_num_threads(before)
    assert [len(tokens[i]) for i in range(len(lengths))] == [new for _, new in lengths]
    return [[jobs for _, jobs in seen[rank]] for rank in seen]


def test_batches_and_micro_batches_are_cut_as_the_runtime_cuts_them() -> None:
    batching = pytest.importorskip("llmpq.runtime.batching")
    for seed in range(40):
        rng = np.random.default_rng(seed)
        planned = random_lengths(seed, 6, 12, 6)
        lengths = random_lengths(seed + 1, int(rng.integers(1, 30)), 40, 12)
        problem, batch = make_problem(lengths, ["t4-16g"]), int(rng.integers(1, 9))
        assignment = assign(problem, batch, batch, batch)
        requests = [batching.Request(i, i, (1,) * s, n) for i, (s, n) in enumerate(lengths)]
        cache = max(b.prompt_tokens + b.new_tokens for b in batching.batches(planned, batch))
        try:
            expected = batching.fitting_batches(requests, batch, cache)
        except UserError:
            continue
        found = run_batches(problem, assignment, planned)
        assert [b.requests for b in found] == [b.requests for b in expected]


def test_longer_prompts_run_in_smaller_micro_batches() -> None:
    sizes = [(8, 10, 10), (8, 11, 10), (8, 31, 10), (3, 5, 10), (64, 30, 10)]
    assert [prefill_size(*size) for size in sizes] == [8, 2, 1, 3, 7]


# ---- the whole run


def test_batches_follow_each_other_and_alike_ones_are_played_once() -> None:
    problem = make_problem([(16, 5)] * 30 + [(8, 3)] * 4, ["t4-16g", "v100-32g"])
    assignment = assign(problem, 8, 4, 2)
    batches = play(problem, assignment)
    assert [b.number for b in batches] == list(range(5))
    assert all(b.start_s == a.end_s for a, b in pairwise(batches))
    assert batches[1].played is batches[2].played  # the first one has no end to wait for
    whole = totals(batches)
    assert whole.total_s == batches[-1].end_s == whole.prefill_s + whole.decode_s
    shapes = run_shapes(problem, assignment)
    assert num_spans(shapes, 4) == sum(b.played.start_s.size for b in (*batches[:2], *batches[3:]))


def test_a_run_of_equal_requests_takes_what_the_closed_form_says() -> None:
    problem = make_problem([(16, 9)] * 8, ["t4-16g", "v100-32g"])
    assignment = assign(problem, 8, 2, 2)
    closed = evaluate(problem, assignment).total_s
    assert simulated_s(problem, assignment) == pytest.approx(closed, rel=2e-3)
    assert totals(play(problem, assignment)).total_s == pytest.approx(closed, rel=2e-3)


def test_requests_that_end_early_save_time_that_the_closed_form_does_not_see() -> None:
    problem = make_problem([(16, 40)] + [(16, 2)] * 7, ["t4-16g", "v100-32g"])
    assignment = assign(problem, 8, 4, 1)
    assert totals(play(problem, assignment)).total_s < 0.8 * simulated_s(problem, assignment)


def test_later_batches_wait_for_the_end_of_the_last_and_their_announcement() -> None:
    problem = make_problem([(16, 4)] * 8, ["t4-16g", "v100-32g", "t4-16g"])
    first, later = play(problem, assign(problem, 4, 2, 2))[:2]
    ready = first.played.ready_s, later.played.ready_s
    assert ready[0][0] == ready[1][0] == 0 and (ready[1] >= ready[0]).all()
    # Two broadcasts of 24 and 96 bytes; the second stage is one hop away, the third two.
    one = 2 * 30e-6 + 120 / 0.05e9
    assert ready[0][[2, 4]] == pytest.approx([one, 2 * one])


# ---- bubbles


@pytest.mark.parametrize("seed", range(12))
def test_causes_add_up_to_the_idle_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    types = [str(t) for t in rng.choice(["t4-16g", "v100-32g", "a100-40g"], rng.integers(1, 6))]
    problem = make_problem(random_lengths(seed, int(rng.integers(1, 40)), 60, 12), types)
    sizes = [int(n) for n in rng.integers(1, 9, 2)]
    batches = play(problem, assign(problem, int(rng.integers(max(sizes), 17)), *sizes))
    whole, bubbles = totals(batches), find_bubbles(batches)
    for stage, busy in enumerate(whole.busy_s[::2]):
        mine = [b for b in bubbles if b.stage == stage]
        assert all(b.idle_s > 0 for b in mine)
        assert len({(b.cause, b.server) for b in mine}) == len(mine)
        assert sum(b.idle_s for b in mine) == pytest.approx(whole.total_s - busy, abs=1e-9)
        percent = 100 * (1 - busy / whole.total_s)
        assert sum(b.percent for b in mine) == pytest.approx(percent, abs=1e-6)
    shares = [percent for _, _, percent in by_cause(bubbles, len(types))]
    idle = 100 * (1 - whole.busy_s[::2].sum() / whole.total_s / len(types))
    assert sum(shares) == pytest.approx(idle, abs=1e-6) and shares == sorted(shares)[::-1]


def causes(played: Played) -> dict[tuple[int, str], float]:
    """(stage, words) to idle seconds, of one batch."""
    names = server_names(played.start_s.shape[1] // 2)
    shape = Shape((1,), (1,), 1, (1,), True)
    return {
        (b.stage, describe(b.cause, b.server, names, b.micro_batch)): b.idle_s
        for b in find_bubbles([BatchRun(0, shape, 0.0, played)])
    }


def batch_of(prefill: Sequence[float], decode: Sequence[float], count: int, steps: int) -> Played:
    """`count` equal micro-batches in both phases."""
    seconds = np.multiply.outer(np.array(decode, dtype=float), np.ones((count, steps)))
    waits = tuple(range(1, count + 1))
    return simulate(Batch(np.outer(prefill, np.ones(count)), seconds, waits))


def test_one_micro_batch_waits_for_the_loop() -> None:
    found = causes(batch_of((1, 0, 1, 0), (1, 0, 1, 0), count=1, steps=4))
    assert found == {
        (0, "loop: tokens of micro-batch 0 not back yet"): 4,
        (0, "draining"): 1,
        (1, "filling"): 1,
        (1, "waiting for prefill of stage 0"): 1,
        (1, "loop: tokens of micro-batch 0 not back yet"): 3,
    }


def test_a_slow_stage_is_named_by_those_behind_it() -> None:
    found = causes(batch_of((1, 0, 3, 0, 1, 0), (1, 0, 3, 0, 1, 0), count=4, steps=6))
    assert {words for stage, words in found if stage == 1} == {"filling", "draining"}
    behind = found[2, "behind stage 1"]
    assert behind == max(found.values())
    assert found[0, "behind stage 1"] > 0 and found[0, "waiting for prefill of stage 1"] > 0


def test_a_slow_link_is_named() -> None:
    found = causes(batch_of((1, 4, 1, 0), (1, 4, 1, 0), count=4, steps=6))
    assert found[1, "link 0 -> 1"] == max(s for (stage, _), s in found.items() if stage == 1)


def test_a_stage_that_cannot_begin_yet_is_between_batches() -> None:
    prefill, decode = np.array([[1.0], [0.0], [1.0], [0.0]]), np.ones((4, 1, 1))
    ready = np.array([0.0, 0.0, 4.0, 0.0])
    found = causes(simulate(Batch(prefill, decode, (1,), (0,), ready)))
    assert found == {(0, "draining"): 4, (1, "between batches"): 4}


def test_remedies_name_what_to_change() -> None:
    names = server_names(3)
    assert names == [
        "stage 0", "link 0 -> 1", "stage 1", "link 1 -> 2", "stage 2", "way back 2 -> 0"
    ]  # fmt: skip
    assert "stage 1 is the slowest" in remedy("behind", 2, names)
    assert "in prefill" in remedy("prefill", 2, names)
    assert remedy("behind", 1, names) == "a faster link 0 -> 1"
    assert "micro-batches in flight" in remedy("loop", None, names)
