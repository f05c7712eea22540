"""Why nothing fits: every change that is offered is planned again here, by the real planner."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmpq.cluster import Cluster, load_cluster
from llmpq.costs.latency import device_times
from llmpq.costs.quality import prior_quality
from llmpq.errors import InfeasibleError
from llmpq.model_lookup import load_model_spec, spec_from_config
from llmpq.model_spec import ModelSpec
from llmpq.plan_data import Plan
from llmpq.planner import planning
from llmpq.planner.explain import may_fit, why
from llmpq.planner.fixes import Fix, fixes, infeasible, largest
from llmpq.planner.planning import Options, make_plan
from llmpq.planner.problem import Problem
from llmpq.profile_data import Profile
from llmpq.workload import Workload, load_workload, request_lengths

CONFIGS = Path(__file__).parents[2] / "configs"
PRECISIONS = ("16", "8", "4", "3")
TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
SHORT = {"prompt_tokens": 32, "new_tokens": 8, "num_requests": 8, "batch": 8}
LONG = {"prompt_tokens": 96, "new_tokens": 32, "num_requests": 64}


QUICK = Options(gap=0.1, time_limit_s=120.0, compare=False)  # a slow machine must finish too


def replan(problem: Problem) -> Plan:
    """A quick plan; a plain error where nothing fits."""
    return planning.replan(problem, QUICK)


def tiny(
    *memory_mib: float,
    layers: int = 4,
    percent: float = 1.0,
    precisions: Sequence[str] = PRECISIONS,
    job: dict[str, Any] = SHORT,
    counts: Sequence[int] = (),
    **changes: Any,
) -> Problem:
    """A small model on rehearsed devices d0, d1, ... of one node, `counts` of each."""
    spec = spec_from_config(TINY | {"num_hidden_layers": layers}, name="tiny")
    profile = Profile.model_validate(_profile(spec))
    cluster = Cluster.model_validate(_cluster(memory_mib, counts or [1] * len(memory_mib)))
    return _problem(spec, cluster, job, [profile], percent, precisions, **changes)


def real(
    model: str, cluster: str, percent: float = 1.0, workload: str = "paper-512-100", **changes: Any
) -> Problem:
    """A model and a cluster that ship with llmpq, at the times of the spec sheets."""
    spec = load_model_spec(str(CONFIGS / "models" / f"{model}.json"))
    machines = load_cluster(CONFIGS / "clusters" / f"{cluster}.yaml")
    job = load_workload(CONFIGS / "workloads" / f"{workload}.yaml").model_dump()
    precisions = changes.pop("precisions", PRECISIONS)
    return _problem(
        spec, machines, job | changes.pop("job", {}), [], percent, precisions, **changes
    )


def _problem(
    spec: ModelSpec,
    cluster: Cluster,
    job: dict[str, Any],
    profiles: list[Profile],
    percent: float,
    precisions: Sequence[str],
    **changes: Any,
) -> Problem:
    quality = prior_quality(spec.num_layers)
    workload = Workload.model_validate(job)
    types = {device.type for device in cluster.devices()}
    problem = Problem(
        spec=spec,
        cluster=cluster,
        workload=workload,
        lengths=tuple(request_lengths(workload)),
        times={name: device_times(cluster, name, spec, profiles) for name in types},
        quality=quality,
        precisions=tuple(precisions),
        budget=quality.budget(percent),
    )
    return replace(problem, **changes)


def _cluster(memory_mib: Sequence[float], counts: Sequence[int]) -> dict[str, Any]:
    groups = [{"type": f"d{i}", "count": count} for i, count in enumerate(counts)]
    rehearse = {f"d{i}": {"slowdown": 1 + i, "memory_mib": mib} for i, mib in enumerate(memory_mib)}
    return {"nodes": [{"name": "box", "devices": groups}], "rehearse": rehearse}


def _profile(spec: ModelSpec) -> dict[str, Any]:
    """A one-thread CPU whose packed layers are slower."""
    rows = [
        _row(spec, phase, precision, size, length, factor * (0.2 + 0.001 * size * length))
        for size, length in itertools.product((1, 4, 16), (8, 64))
        for phase in ("prefill", "decode")
        for precision, factor in zip(PRECISIONS, (1.0, 1.2, 1.5, 1.7), strict=True)
    ]
    device = {"name": "CPU", "type": "cpu", "memory_bytes": 2**33, "num_threads": 1}
    return {"schema_version": 1, "kind": "profile", "device": device, "rows": rows}


def _row(
    spec: ModelSpec, phase: str, precision: str, size: int, length: int, ms: float
) -> dict[str, Any]:
    return {
        "model_key": spec.model_key,
        "precision": precision,
        "phase": phase,
        "micro_batch": size,
        "prompt_tokens": length if phase == "prefill" else 0,
        "past_tokens": length if phase == "decode" else 0,
        "time_ms": ms,
        "time_ms_p10": ms,
        "time_ms_p90": ms,
        "num_samples": 5,
    }


# So many different devices that not every choice of two of them is searched.
MANY = [1.0 + i / 100 for i in range(12)]
NO_BUDGET = {"budget": math.inf, "theta": 1.0}
CASES: dict[str, Problem] = {
    "too little memory": tiny(0.2, 0.1, layers=8),
    "one device": tiny(0.2),
    "one device, a loose budget": tiny(0.2, percent=100),
    "no room for a layer anywhere": tiny(0.05, 0.05),
    "three devices": tiny(0.2, 0.15, 0.1, layers=8, percent=50),
    "six devices": tiny(*[0.1] * 6, layers=12, percent=50),
    "eight equal devices": tiny(0.1, counts=[8], layers=16, percent=50),
    "equal and unequal devices": tiny(0.13, 0.2, counts=[3, 1], layers=10, percent=50),
    "many requests in flight": tiny(0.6, 0.5, percent=1e3, job=LONG | {"batch": 64}),
    "many requests and a tight budget": tiny(0.6, 0.5, percent=0.01, job=LONG | {"batch": 64}),
    "requests in flight left to us": tiny(0.2, 0.2, percent=1e3, job=LONG),
    "only 16 bits": tiny(0.36, 0.3, percent=1e3, precisions=["16"]),
    "only 16 bits and a tight budget": tiny(0.36, 0.3, percent=0.01, precisions=["16"]),
    "only 16 and 8 bits": tiny(0.3, 0.25, percent=0.5, precisions=["16", "8"]),
    "a tight budget": tiny(0.36, 0.3, percent=1e-4),
    "no loss at all": tiny(0.36, 0.3, percent=0),
    "only precisions that lose too much": tiny(4, 4, precisions=["4", "3"]),
    "theta": tiny(0.2, 0.1, layers=8, **NO_BUDGET),
    "more devices than layers": tiny(*MANY, layers=2),
    "too many devices, too little memory": tiny(*(mib / 10 for mib in MANY), layers=2),
    "OPT-30B on four T4 at 16 bits": real("opt-30b", "09-opt30b-4xt4", precisions=("16",)),
    "OPT-66B on four T4": real("opt-66b", "09-opt30b-4xt4"),
    "OPT-66B on four T4, shared layers": real("opt-66b", "09-opt30b-4xt4", max_tensor_parallel=4),
    "OPT-66B at 16 bits on unequal nodes": real(
        "opt-66b", "03-opt30b-3xt4-1xv100", precisions=("16",)
    ),
    "BLOOM-176B on four V100": real("bloom-176b", "10-opt66b-4xv100"),
    "OPT-66B, hardly a loss": real("opt-66b", "10-opt66b-4xv100", percent=0.01),
    "OPT-13B without a loss": real("opt-13b", "01-opt13b-1xv100", percent=0),
    "BLOOM-176B at 16 bits": real("bloom-176b", "07-bloom176b-4xv100-4xa100", precisions=("16",)),
    "OPT-66B on unequal nodes": real("opt-66b", "03-opt30b-3xt4-1xv100"),
    "LLaMA 70B on one A100": real("llama-3.3-70b", "02-opt13b-1xa100"),
    "Mistral 7B, 256 in flight": real(
        "mistral-7b", "01-opt13b-1xv100", job={"num_requests": 512, "batch": 512}
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_fix_that_is_offered_has_a_plan(case: str) -> None:
    problem = CASES[case]
    with pytest.raises(InfeasibleError):
        replan(problem)
    found = fixes(problem, PRECISIONS, replan, math.inf)
    assert 1 <= len(found) <= 3
    for fix in found:
        plan = make_plan(fix.problem, QUICK, PRECISIONS).plan
        assert plan.predicted is not None, str(fix)
        used = [(s.peak_memory_bytes, s.memory_capacity_bytes) for s in plan.predicted.stages]
        assert all(peak <= capacity for peak, capacity in used), str(fix)
    assert len({str(fix) for fix in found}) == len(found)


# ---- what the error says


def explained(problem: Problem, plan: Any = replan) -> str:
    return str(infeasible(problem, PRECISIONS, plan, math.inf))


def test_what_is_short_is_enough_when_it_is_added() -> None:
    problem = tiny(0.2, 0.1, layers=8, percent=1e3)
    text = why(problem)
    assert "no plan fits the memory" in text and "at 3 bits" in text
    assert re.search(r"the cluster is (\d+\.\d+) MiB short in all", text)
    short = {m[1]: float(m[2]) for m in re.finditer(r"(d\d)#\d on box is (\d+\.\d+) MiB", text)}
    assert short
    enough = [mib + short.get(f"d{i}", 0.0) + 0.011 for i, mib in enumerate((0.2, 0.1))]
    assert replan(tiny(*enough, layers=8, percent=1e3))


def test_the_cheapest_changes_come_first_and_say_what_to_type() -> None:
    lines = explained(tiny(0.36, 0.3, percent=1e3, precisions=["16"])).splitlines()
    assert [line.partition(":")[0] for line in lines[1:]] == ["would fit"] * 3
    assert re.search(r"requests in flight \(workload: batch: \d\)", lines[1])
    assert "allowing 8 bits (--precisions 16,8)" in lines[2]


def test_the_quality_loss_that_is_named_works_and_little_less_does_not() -> None:
    text = explained(tiny(0.36, 0.3, percent=1e-4))
    assert "no plan keeps the quality" in text
    named = re.search(r"--max-quality-loss ([\d.]+)\)", text)
    assert named is not None
    assert replan(tiny(0.36, 0.3, percent=float(named[1])))
    with pytest.raises(InfeasibleError):
        replan(tiny(0.36, 0.3, percent=float(named[1]) * 0.98))


def test_the_requests_in_flight_that_are_named_work_and_many_more_do_not() -> None:
    """Not "one more": so narrow a model saves headers of messages by larger micro-batches."""
    job = LONG | {"batch": 64}
    named = re.search(r"batch: (\d+)\)", explained(tiny(0.6, 0.5, percent=1e3, job=job)))
    assert named is not None
    batch = int(named[1])
    assert replan(tiny(0.6, 0.5, percent=1e3, job=job | {"batch": batch})).batch == batch
    with pytest.raises(InfeasibleError):
        replan(tiny(0.6, 0.5, percent=1e3, job=job | {"batch": batch * 3 // 2}))


def test_memory_that_is_named_works_when_it_is_written_into_the_cluster_file() -> None:
    text = explained(tiny(0.2, 0.1, layers=8, percent=1e3))
    named = re.search(r"rehearse\.d(\d)\.memory_mib: ([\d.]+)", text)
    assert named is not None
    memory = [0.2, 0.1]
    memory[int(named[1])] = float(named[2])
    assert replan(tiny(*memory, layers=8, percent=1e3))


def test_joined_changes_where_no_single_one_is_enough() -> None:
    problem = tiny(0.2, 0.2, percent=0.01, precisions=["16"])
    first = fixes(problem, PRECISIONS, replan, math.inf)[0]
    assert "--precisions" in first.command_hint and "--max-quality-loss" in first.command_hint
    assert replan(first.problem)


def test_nothing_is_offered_without_a_plan() -> None:
    def never(problem: Problem) -> Plan:
        raise InfeasibleError("no")

    text = explained(tiny(0.36, 0.3, percent=1e-4), never)
    assert "would fit" not in text and text.endswith("no change that was tried is sufficient")


def test_fewer_than_three_changes_are_said_to_be_all() -> None:
    text = explained(tiny(0.1, counts=[8], layers=16, percent=50))
    assert text.count("would fit") == 1 and text.endswith(
        "no other change that was tried is sufficient"
    )


def test_more_devices_than_layers_names_devices_to_keep() -> None:
    text = explained(tiny(*MANY, layers=2))
    assert "name at most 2 devices" in text and text.count("would fit") == 3
    assert "only 1 x d10 of box, 1 x d11 of box" in text


def test_the_planner_s_own_error_explains() -> None:
    with pytest.raises(InfeasibleError) as caught:
        make_plan(tiny(0.36, 0.3, percent=1e-4), QUICK, PRECISIONS)
    assert str(caught.value).count("would fit") == 3


def test_beyond_the_deadline_nothing_is_planned() -> None:
    planned: list[Problem] = []

    def note(problem: Problem) -> Plan:
        planned.append(problem)
        return replan(problem)

    text = str(infeasible(tiny(0.2, 0.1), PRECISIONS, note, deadline=-1.0))
    assert not planned and "the time limit ended this search" in text


def test_a_problem_that_may_fit_is_not_called_short() -> None:
    assert may_fit(tiny(2, 2))
    assert why(tiny(2, 2)).startswith("no plan was found, though there is room")


@pytest.mark.parametrize("most", [0, 1, 6, 7, 12])
def test_the_largest_number_that_holds(most: int) -> None:
    found = largest(1, 12, lambda n: n <= most)
    assert found == (most or None)


def test_requests_in_flight_that_are_left_to_us_are_fewer_where_no_more_fit() -> None:
    plan = replan(tiny(0.3, 0.3, percent=1e3, job=LONG))
    assert plan.batch < 8 and plan.predicted is not None
    with pytest.raises(InfeasibleError):
        replan(tiny(0.3, 0.3, percent=1e3, job=LONG | {"batch": 8}))
    assert re.search(r"with 1 request in flight", why(tiny(0.2, 0.2, percent=1e3, job=LONG)))


def test_joined_changes_read_as_one() -> None:
    problem = tiny(1.0)
    both = Fix("a", "x", problem).then(Fix("b", "y", problem))
    assert str(both) == "a and b (x; y)"
