"""The simulated run of a plan: the runtime's own jobs, its closed form, and idle time by cause."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmpq.cluster import Cluster
from llmpq.costs.latency import LayerTimes, device_machine, spec_sheet_times
from llmpq.costs.quality import prior_quality
from llmpq.costs.simulate import SimulatedRun, simulate_schedule
from llmpq.devices import device_library
from llmpq.errors import UserError
from llmpq.job import Item, Job, LaneShape, Member
from llmpq.model_lookup import DEFAULT_MODEL, load_model_spec
from llmpq.model_spec import ASSETS, ModelSpec
from llmpq.plan_data import Plan
from llmpq.planner.bubbles import by_cause, describe, find_bubbles, remedy, server_names
from llmpq.planner.evaluate import evaluate, resource_works, to_plan
from llmpq.planner.problem import Assignment, Configuration, Problem, StageDevices
from llmpq.planner.simulated import Seconds, least_jobs, make_schedule, run_s, simulate, with_run
from llmpq.planner.works import Work
from llmpq.schedule import Schedule
from llmpq.workload import Workload, load_workload, request_lengths

Lengths = Sequence[tuple[int, int]]


def make_problem(lengths: Lengths, types: Sequence[str]) -> Problem:
    """The shipped model on one node of these devices, whose steps are all eager.

    As graphs, decode steps of so small a model take a tenth of any prefill, and refilling is dear.
    """
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
        times={name: eager_times(name, spec) for name in types},
        quality=prior_quality(spec.num_layers),
        precisions=("16",),
    )


def eager_times(device_type: str, spec: ModelSpec) -> LayerTimes:
    """Those of the spec sheet, without CUDA graphs."""
    device = device_library()[device_type]
    return spec_sheet_times(device, spec, replace(device_machine(device), graphs=False))


def assign(problem: Problem, batch: int, prefill: int, decode: int) -> Assignment:
    """Layers spread evenly over all devices."""
    places = tuple(StageDevices(d.node, d.type, d.memory_bytes) for d in problem.cluster.devices())
    ends = [problem.spec.num_layers * i // len(places) for i in range(len(places) + 1)]
    stages = tuple(("16",) * (b - a) for a, b in pairwise(ends))
    return Assignment(Configuration(places, batch, prefill, decode), stages)


def random_lengths(seed: int, count: int, prompt: int, new: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    return [(int(rng.integers(1, prompt + 1)), int(rng.integers(1, new + 1))) for _ in range(count)]


# ---- the runtime's jobs

FEW = [(9, 7)] * 8
LENGTHS = [(9, 7)] * 3 + [(5, 2), (8, 1), (1, 9), (90, 3), (3, 6), (7, 7), (2, 2), (6, 9)]


@pytest.mark.parametrize("sizes", [(8, 4, 2), (5, 2, 3), (1, 1, 1)])
@pytest.mark.parametrize("refill", [True, False])
def test_one_stage_does_the_jobs_that_it_does_in_the_runtime(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int], refill: bool
) -> None:
    """Its jobs do not depend on times."""
    problem = make_problem(LENGTHS, ["t4-16g"])
    assignment = assign(problem, *sizes)
    jobs = simulate(problem, assignment, refill=refill).jobs
    simulated = zip(jobs.step == 0, jobs.requests, jobs.tokens, jobs.past, strict=True)
    assert list(simulated) == runtime_jobs(monkeypatch, problem, assignment, refill)
    assert (jobs.past[jobs.step == 0] > 0).any(), "the long prompt comes in chunks"


# Lanes beside those that the lengths ask for, of one to four rows, and a chunk.
EDITED = [(4, (90, 60, 90)), (24, (93, 93, 93, 93)), (90, (93, 20, 50)), (10**6, (200, 12, 93))]


@pytest.mark.parametrize(("chunk", "tokens"), EDITED)
def test_an_edited_plan_does_the_same_jobs_when_simulated_and_in_the_runtime(
    monkeypatch: pytest.MonkeyPatch, chunk: int, tokens: tuple[int, ...]
) -> None:
    problem = make_problem(LENGTHS, ["t4-16g"])
    shapes = tuple(LaneShape(1 + i, size) for i, size in enumerate(tokens))
    rows = [shape.rows for shape in shapes]
    assignment = assign(problem, sum(rows), 2, max(rows))
    setting = replace(assignment.configuration, chunk_tokens=chunk, lanes=shapes)
    edited = replace(assignment, configuration=setting)
    jobs, before = (simulate(problem, one).jobs for one in (edited, assignment))
    simulated = list(zip(jobs.step == 0, jobs.requests, jobs.tokens, jobs.past, strict=True))
    assert simulated == runtime_jobs(monkeypatch, problem, edited, refill=True)
    assert (len(jobs) != len(before)) or (jobs.tokens != before.tokens).any()
    prefills = jobs.step == 0
    assert int(jobs.tokens[prefills].max()) <= min(chunk, 90)
    assert (jobs.past[prefills] > 0).any() == (chunk < 90)


def runtime_jobs(
    monkeypatch: pytest.MonkeyPatch, problem: Problem, assignment: Assignment, refill: bool
) -> list[tuple[bool, int, int, int]]:
    """Of each job: whether it is a prefill, its requests, tokens of each, tokens before them."""
    torch = pytest.importorskip("torch")
    from llmpq.prompts.request import Request
    from llmpq.runtime.local import LocalStages
    from llmpq.runtime.worker import Worker

    plan = to_plan(problem, assignment, "hand-made", evaluate(problem, assignment))
    plan = Plan.model_validate_json(plan.model_dump_json())
    seen = []
    do = Worker.do

    def note(worker: Any, job: Any, *rest: Any) -> Any:
        seen.append(job)
        return do(worker, job, *rest)

    monkeypatch.setattr(Worker, "do", note)
    lengths = problem.lengths
    requests = [Request(i, i, (3,) * prompt, new) for i, (prompt, new) in enumerate(lengths)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    finished = LocalStages(plan, ASSETS / DEFAULT_MODEL).generate(requests, refill=refill)
    torch.set_num_threads(before)
    made = {one.request.id: len(one.token_ids) for one in finished}
    assert [made[i] for i in range(len(lengths))] == [new for _, new in lengths]
    return [
        (True, len(job.members), job.end - job.begin, job.begin)
        if job.prefill
        else (False, len(job.members), 1, job.end - job.begin - 1)
        for job in seen
    ]


def test_requests_longer_than_planned_get_longer_lanes_of_no_more_tokens() -> None:
    problem, planned = (make_problem(x, ["t4-16g"]) for x in (FEW + [(20, 12)], FEW))
    setting = planned.resolved(assign(problem, 4, 2, 2).configuration)
    shapes = make_schedule(problem, setting).shapes
    assert max(shape.tokens for shape in shapes) == 32
    assert sum(shape.rows * shape.tokens for shape in shapes) <= 4 * 16
    longest = make_problem([(60, 12)], ["t4-16g"])
    with pytest.raises(UserError, match="72 tokens of KV cache, but the plan reserves 64"):
        make_schedule(longest, setting)


def test_a_trace_keeps_the_prompt_and_the_output_of_a_request_together(tmp_path: Path) -> None:
    rows = [(60, 1), (1, 50), (30, 30), (2, 2)]
    text = "ContextTokens,GeneratedTokens\n" + "".join(f"{a},{b}\n" for a, b in rows)
    (tmp_path / "trace.csv").write_text(text)
    columns = {"prompt_tokens": "ContextTokens", "new_tokens": "GeneratedTokens"}
    asked = {k: f"{{trace: trace.csv, column: {v}}}" for k, v in columns.items()}
    lines = [f"{key}: {value}" for key, value in {**asked, "num_requests": "8"}.items()]
    (tmp_path / "w.yaml").write_text("\n".join(lines))
    lengths = request_lengths(load_workload(tmp_path / "w.yaml"))
    assert lengths == rows * 2
    problem = make_problem(lengths, ["t4-16g", "v100-32g"])
    items = list(make_schedule(problem, assign(problem, 4, 2, 2).configuration).source)
    assert [(item.prompt_tokens, item.new_tokens) for item in items] == lengths
    simulated = simulate(problem, assign(problem, 4, 2, 2))
    decode = simulated.jobs.step > 0
    assert int(simulated.jobs.requests[decode].sum()) == sum(new - 1 for _, new in lengths)
    assert int(simulated.jobs.past.max()) <= 62 - 1


# ---- seconds


def test_a_chunk_takes_what_the_longer_prompt_takes_more_and_a_call() -> None:
    problem = make_problem([(10, 2)] * 9 + [(400, 2)], ["t4-16g", "t4-16g"])
    assignment = assign(problem, 1, 1, 1)
    simulated = simulate(problem, assignment)
    chunks = np.flatnonzero((simulated.jobs.step == 0) & (simulated.jobs.requests == 1))
    chunks = chunks[np.cumsum(simulated.jobs.past[chunks] > 0) > 0]
    chunks = np.concatenate([[chunks[0] - 1], chunks[simulated.jobs.past[chunks] > 0]])
    assert int(simulated.jobs.tokens[chunks].sum()) == 400
    whole = make_problem([(400, 2)], ["t4-16g", "t4-16g"])
    alone = simulate(whole, assign(whole, 1, 1, 1))
    seconds = (simulated.end_s - simulated.start_s)[chunks]
    once = (alone.end_s - alone.start_s)[0]
    call = simulate(make_problem([(1, 2)], ["t4-16g"] * 2), assign(whole, 1, 1, 1))
    call_s = (call.end_s - call.start_s)[0]
    expected = once[0] + (len(chunks) - 1) * call_s[0]
    assert seconds[:, 0].sum() == pytest.approx(expected, rel=0.02)


def test_seconds_of_chunks_are_those_of_their_ends() -> None:
    problem = make_problem([(10, 2)], ["t4-16g", "v100-32g"])
    works = resource_works(problem, assign(problem, 1, 1, 1))
    seconds, member = Seconds(works), Member(0, 0, 900, 0, 0)
    for begin, end in [(256, 512), (1, 2), (512, 513), (511, 900), (60, 64)]:
        found = seconds(Job(True, (member,), begin, end, 1))
        stage, link, *_, back = works

        def whole(tokens: float, work: Work = stage) -> float:
            return float(work.prefill(1, float(tokens)))

        more = whole(end) - whole(begin) + whole(1)
        assert found[0] == pytest.approx(max(more, whole(end - begin)))
        assert found[1] == pytest.approx(whole(end - begin, link))
        assert found[3] == float(back.decode(1, 0.0)) and len(found) == 4


def test_a_run_of_equal_requests_takes_what_the_closed_form_says() -> None:
    """One stage: any number of waves. Two: a step begins while other prompts are still computed."""
    problem = make_problem([(16, 9)] * 8, ["t4-16g", "v100-32g"])
    assignment = assign(problem, 8, 2, 2)
    closed = evaluate(problem, assignment).total_s
    assert simulate(problem, assignment).total_s == pytest.approx(closed, rel=0.03)
    alone = make_problem([(16, 9)] * 24, ["t4-16g"])
    assignment = assign(alone, 8, 4, 4)
    closed = evaluate(alone, assignment).total_s
    assert simulate(alone, assignment, refill=False).total_s == pytest.approx(closed, rel=1e-3)


def random_plan(seed: int, equal: bool) -> tuple[Problem, Assignment]:
    """1 to 4 stages, several waves of requests."""
    rng = np.random.default_rng(seed)
    types = [str(t) for t in rng.choice(["t4-16g", "v100-32g", "a100-40g"], rng.integers(1, 5))]
    batch = int(rng.choice([8, 16, 32]))
    decode, prefill = (min(batch, int(n)) for n in (rng.choice([2, 4, 8]), rng.choice([1, 2, 4])))
    count = batch * int(rng.integers(3, 8))
    lengths = random_lengths(seed, count, 100, 60)
    problem = make_problem([(50, 30)] * count if equal else lengths, types)
    return problem, assign(problem, batch, prefill, decode)


@pytest.mark.parametrize(("equal", "median", "worst"), [(True, 0.03, 0.15), (False, 0.1, 0.4)])
def test_the_closed_form_is_near_the_simulated_run(
    equal: bool, median: float, worst: float
) -> None:
    plans = [random_plan(seed, equal) for seed in range(60)]
    ratios = [evaluate(*plan).total_s / simulate(*plan).total_s for plan in plans]
    errors = np.abs(np.array(ratios) - 1)
    assert np.median(errors) < median and errors.max() < worst


def test_requests_that_end_early_make_room_for_others() -> None:
    problem = make_problem(random_lengths(1, 96, 30, 60), ["t4-16g", "v100-32g"])
    assignment = assign(problem, 8, 2, 2)
    simulated = simulate(problem, assignment)
    assert simulated.total_s < 0.9 * simulate(problem, assignment, refill=False).total_s


def test_predictions_are_of_the_simulated_run() -> None:
    problem, assignment = random_plan(1, equal=False)
    closed = evaluate(problem, assignment)
    found, simulated = with_run(problem, assignment, closed), simulate(problem, assignment)
    assert (found.total_s, found.prefill_s) == (
        simulated.total_s,
        pytest.approx(simulated.prefill_s),
    )
    assert found.prefill_s + found.decode_s == pytest.approx(found.total_s)
    assert found.tokens_per_s == pytest.approx(problem.num_new_tokens / simulated.total_s)
    assert found.requests_per_s == pytest.approx(len(problem.lengths) / simulated.total_s)
    assert found.prefill_share == simulated.prefill_share
    assert found.closed_form_s == found.priced_s == closed.total_s == closed.priced_s
    assert found.objective == found.total_s and closed.closed_form_s is None


def test_of_a_long_run_a_sample_is_played(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(random_lengths(5, 1600, 100, 60), ["t4-16g", "v100-32g"])
    assignment = assign(problem, 16, 2, 4)
    whole, closed = simulate(problem, assignment), evaluate(problem, assignment)
    assert least_jobs(problem, assignment.configuration) <= len(whole.jobs)
    assert with_run(problem, assignment, closed).total_s != whole.total_s
    assert with_run(problem, assignment, closed).total_s == pytest.approx(whole.total_s, rel=0.02)
    few = run_s(problem, assignment, 500)
    assert few == pytest.approx(whole.total_s, rel=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_requests_that_stand_for_many_take_what_the_many_do(seed: int) -> None:
    lengths = random_lengths(seed, 200, 100, 60)
    problem = make_problem(lengths * 5, ["t4-16g", "v100-32g"])
    assignment = assign(problem, 16, 2, 4)
    listed = replace(problem, lengths=tuple(lengths), num_requests=1000, _known={})
    whole = simulate(problem, assignment).total_s
    assert run_s(listed, assignment, 2000) == pytest.approx(whole, rel=0.03)
    priced = [evaluate(one, assignment).total_s for one in (listed, problem)]
    assert priced[0] == pytest.approx(priced[1])


# ---- bubbles


@pytest.mark.parametrize("seed", range(12))
def test_causes_add_up_to_the_idle_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    types = [str(t) for t in rng.choice(["t4-16g", "v100-32g", "a100-40g"], rng.integers(1, 6))]
    problem = make_problem(random_lengths(seed, int(rng.integers(9, 40)), 60, 12), types)
    sizes = [int(n) for n in rng.integers(1, 9, 2)]
    simulated = simulate(problem, assign(problem, int(rng.integers(max(sizes), 17)), *sizes))
    bubbles = find_bubbles(simulated)
    for stage, busy in enumerate(simulated.busy_s[::2]):
        mine = [b for b in bubbles if b.stage == stage]
        assert all(b.idle_s > 0 for b in mine)
        assert len({(b.cause, b.server) for b in mine}) == len(mine)
        assert sum(b.idle_s for b in mine) == pytest.approx(simulated.total_s - busy, abs=1e-8)
        percent = 100 * (1 - busy / simulated.total_s)
        assert sum(b.percent for b in mine) == pytest.approx(percent, abs=1e-5)
    shares = [percent for _, _, percent in by_cause(bubbles, len(types))]
    idle = 100 * (1 - simulated.busy_s[::2].sum() / simulated.total_s / len(types))
    assert sum(shares) == pytest.approx(idle, abs=1e-5) and shares == sorted(shares)[::-1]


def causes(simulated: SimulatedRun) -> dict[tuple[int, str], float]:
    """(stage, words) to idle seconds."""
    names = server_names(simulated.start_s.shape[1] // 2)
    return {
        (b.stage, describe(b.cause, b.server, names, b.micro_batch)): b.idle_s
        for b in find_bubbles(simulated)
    }


def run_of(
    prefill: Sequence[float], decode: Sequence[float], count: int, steps: int
) -> SimulatedRun:
    """`count` equal requests at once, each its own micro-batch in both phases."""
    items = iter([Item(i, 4, 1 + steps) for i in range(count)])
    schedule = Schedule((LaneShape(1, 5 + steps),) * count, 1, 4, len(prefill) // 2, items)
    return simulate_schedule(schedule, lambda job: prefill if job.prefill else decode, len(prefill))


def test_one_micro_batch_waits_for_the_loop() -> None:
    found = causes(run_of((1, 0, 1, 0), (1, 0, 1, 0), count=1, steps=4))
    assert found == {
        (0, "loop: tokens of micro-batch 0 have not returned yet"): 4,
        (0, "draining"): 1,
        (1, "filling"): 1,
        (1, "waiting for prefill of stage 0"): 1,
        (1, "loop: tokens of micro-batch 0 have not returned yet"): 3,
    }


def test_a_slow_stage_is_named_by_those_behind_it() -> None:
    found = causes(run_of((1, 0, 3, 0, 1, 0), (1, 0, 3, 0, 1, 0), count=4, steps=6))
    assert {words for stage, words in found if stage == 1} == {"filling", "draining"}
    behind = found[2, "behind stage 1"]
    assert behind == max(found.values())
    assert found[0, "behind stage 1"] > 0 and found[0, "waiting for prefill of stage 1"] > 0


def test_a_slow_link_is_named() -> None:
    found = causes(run_of((1, 4, 1, 0), (1, 4, 1, 0), count=4, steps=6))
    assert found[1, "link 0 -> 1"] == max(s for (stage, _), s in found.items() if stage == 1)


def test_remedies_name_what_to_change() -> None:
    names = server_names(3)
    assert names == [
        "stage 0", "link 0 -> 1", "stage 1", "link 1 -> 2", "stage 2", "token return 2 -> 0"
    ]  # fmt: skip
    assert "stage 1 is the slowest" in remedy("behind", 2, names)
    assert "in prefill" in remedy("prefill", 2, names)
    assert remedy("behind", 1, names) == "a faster link 0 -> 1"
    assert "micro-batches in flight" in remedy("loop", None, names)
