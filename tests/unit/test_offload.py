"""Off-loading to the host: tiny cases by hand, and what must hold of any device and link."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from llmpq.cluster import Cluster, Device
from llmpq.costs import memory
from llmpq.costs.latency import LayerTimes
from llmpq.costs.offload import OffloadMemory, layer_s, offload_memory, shares
from llmpq.costs.quality import prior_quality
from llmpq.machine import cpu
from llmpq.model_lookup import spec_from_config
from llmpq.planner.evaluate import evaluate
from llmpq.planner.flexgen import OffloadPlan, flexgen, host_link_bytes_per_s, offload_plan
from llmpq.planner.problem import Assignment, Configuration, Problem, StageDevices
from llmpq.workload import Workload

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
PRECISIONS = ("16", "8", "4", "3")


@dataclass(frozen=True)
class Linear:
    """`each` seconds a request and a start."""

    start: float
    each: float

    def seconds(self, micro_batch: int, tokens: Any) -> Any:
        return self.start + self.each * micro_batch + 0.0 * np.asarray(tokens, dtype=float)


def layer_times(slowdown: float) -> LayerTimes:
    models = {("", "embedding"): Linear(1e-5, 0.0), ("", "head"): Linear(2e-5, 1e-6)}
    for precision in PRECISIONS:
        models[precision, "prefill"] = Linear(1e-4, 2e-4)
        models[precision, "decode"] = Linear(1e-4, 1e-5)
    return LayerTimes(models, PRECISIONS, "test", machine=cpu(())).scaled(slowdown)


def make_problem(*memory_mib: float, link_gbs: float = 1.0, **changes: Any) -> Problem:
    """Devices of rising slowness; each streams over the link of its node."""
    names = [f"d{i}" for i in range(len(memory_mib))]
    rehearse = {
        name: {"slowdown": 1 + i, "memory_mib": mib}
        for i, (name, mib) in enumerate(zip(names, memory_mib, strict=True))
    }
    node = {
        "name": "box",
        "devices": [{"type": name} for name in names],
        "link": {"bandwidth_gbs": link_gbs, "latency_us": 0},
    }
    spec = spec_from_config(CONFIG, name="test")
    job = {"prompt_tokens": 32, "new_tokens": 9, "num_requests": 12, "batch": 8}
    problem = Problem(
        spec=spec,
        cluster=Cluster.model_validate({"nodes": [node], "rehearse": rehearse}),
        workload=Workload.model_validate(job),
        lengths=((32, 9),) * 12,
        times={name: layer_times(1.0 + i) for i, name in enumerate(names)},
        quality=prior_quality(spec.num_layers),
        precisions=PRECISIONS,
    )
    return replace(problem, **changes)


def device_of(problem: Problem, rank: int = 0) -> Device:
    return problem.cluster.devices()[rank]


def best(problem: Problem) -> OffloadPlan:
    plan = flexgen(problem)
    assert plan is not None
    return plan


# ---- by hand


def test_a_layer_takes_as_long_as_the_slowest_of_three() -> None:
    assert layer_s(2.0, 10.0, 5.0, 10.0) == 2.0
    assert layer_s(0.5, 10.0, 5.0, 10.0) == 1.0
    assert layer_s(0.5, 10.0, 30.0, 10.0) == 3.0


def test_the_shares_fill_the_device() -> None:
    """Beside 10 bytes and the buffers (20 + 5), 55 of 100 are left for 80 and 40 of either."""
    held = OffloadMemory(always=10, weights=100, cache=45, weights_buffer=20, cache_buffer=5)
    weights, cache = shares(held, 90.0)
    assert held.device_bytes(weights, cache) == pytest.approx(90.0)
    assert (cache.max(), weights.min()) == (1.0, pytest.approx(15 / 80))
    assert (weights.max(), cache.min()) == (pytest.approx(55 / 80), 0.0)
    assert held.host_bytes(0.0, 1.0) == 100 and held.host_bytes(1.0, 0.0) == 45


def test_shares_where_all_or_nothing_fits() -> None:
    held = OffloadMemory(always=10, weights=100, cache=45, weights_buffer=20, cache_buffer=5)
    assert len(shares(held, 34.9)[0]) == 0
    assert [float(share[0]) for share in shares(held, 35.0)] == [0.0, 0.0]
    weights, cache = shares(held, 155.0)
    assert 1.0 in weights and cache[weights == 1.0] == 1.0


def test_all_streamed_by_hand() -> None:
    """A slow link: every layer waits for its bytes, in both phases."""
    problem = make_problem(1.0, link_gbs=1e-3)
    block = {"batch": 8, "micro_batch": 4, "cache_tokens": 41, "prompt_tokens": 32}
    held = offload_memory(problem.spec, "16", **block)
    device = replace(device_of(problem), memory_bytes=int(held.device_bytes(0.0, 0.0)))
    plan = offload_plan(problem, device, "16", 8, 4)
    assert (plan.weights_share, plan.cache_share) == (0.0, 0.0)
    weights = memory.layer_weight_bytes(problem.spec, "16")
    token = 2 * 64 * 2  # keys and values, 16 bits
    beside = 0.0
    prefill = step = 0.0
    for requests in (8, 4):
        prefill += 4 * max(weights, requests * 32 * token) / 1e6
        last = 4 * (weights + requests * (32 + 3.5) * token) / 1e6
        last += requests / 4 * (1e-5 + 2e-5 + 4e-6)
        step += last
        beside += requests / 4 * (1e-5 + 2e-5 + 4e-6)
    assert plan.decode_s == pytest.approx(8 * last), "after the last block's first tokens"
    assert plan.prefill_s == pytest.approx(prefill + beside + 8 * (step - last))
    assert plan.total_s == plan.prefill_s + plan.decode_s == plan.objective
    assert plan.tokens_per_s == pytest.approx(12 * 9 / plan.total_s)
    assert plan.host_bytes == 4 * weights + 4 * 8 * 41 * token


# ---- against the ordinary one device


@pytest.mark.parametrize("precision", ["16", "4"])
def test_what_fits_takes_as_long_and_as_much_as_one_stage(precision: str) -> None:
    problem = make_problem(64.0, link_gbs=1e-6, lengths=((32, 9),) * 16)  # whole blocks
    device = device_of(problem)
    plan = offload_plan(problem, device, precision, 8, 2)
    assert (plan.weights_share, plan.cache_share, plan.host_bytes) == (1.0, 1.0, 0)
    place = StageDevices(device.node, device.type, device.memory_bytes)
    one_stage = Assignment(Configuration((place,), 8, 2, 2), ((precision,) * 4,))
    predicted = evaluate(problem, one_stage)
    assert plan.total_s == pytest.approx(predicted.total_s, rel=0.01)
    assert plan.prefill_s == pytest.approx(predicted.prefill_s, rel=0.01)
    setting, machine = one_stage.configuration, problem.times[device.type].machine
    where = {"first": True, "last": True, "precisions": (precision,)}
    sizes = problem.run_sizes(setting)
    alike = memory.activation_bytes(problem.spec, sizes, **where, machine=machine)
    alone = replace(machine, graphs=False)
    graphs = alike - memory.activation_bytes(problem.spec, sizes, **where, machine=alone)
    assert plan.device_bytes == predicted.stages[0].peak_memory_bytes - graphs
    assert plan.quality_loss_percent == pytest.approx(predicted.quality_loss_percent)


# ---- what must hold


@pytest.mark.parametrize("memory_mib", [0.3, 0.45, 0.6])
def test_a_faster_link_is_never_slower(memory_mib: float) -> None:
    totals = [best(make_problem(memory_mib, link_gbs=g)).total_s for g in (0.01, 0.1, 1.0, 10.0)]
    assert np.isfinite(totals).all()
    assert all(a >= b * (1 - 1e-12) for a, b in zip(totals, totals[1:], strict=False))
    assert totals[0] > totals[-1]


def test_more_memory_is_never_slower_and_never_overrun() -> None:
    plans = [best(make_problem(mib, link_gbs=0.05)) for mib in (0.3, 0.4, 0.6, 0.8, 2.0)]
    for plan, mib in zip(plans, (0.3, 0.4, 0.6, 0.8, 2.0), strict=True):
        assert plan.feasible and plan.device_bytes <= mib * 2**20
    totals = [plan.total_s for plan in plans]
    assert all(a >= b * (1 - 1e-9) for a, b in zip(totals, totals[1:], strict=False))


def test_the_best_of_all_blocks_is_taken() -> None:
    problem = make_problem(0.25, 8.0, link_gbs=0.05)
    plan = best(problem)
    tried = [
        offload_plan(problem, device, precision, 8, micro_batch)
        for device in problem.cluster.devices()
        for precision in PRECISIONS
        for micro_batch in (1, 2, 4, 8)
    ]
    assert plan.total_s == min(one.total_s for one in tried)
    assert plan.device_type == "d1"  # slower, and need not stream


def test_the_quality_budget_is_kept() -> None:
    problem = make_problem(0.4, link_gbs=0.01)
    assert best(problem).precision != "16"
    strict = replace(problem, budget=problem.quality.budget(0.01), _known={})
    assert best(strict).precision == "16"
    assert best(strict).quality_loss_percent <= 0.01


def test_no_precision_within_the_budget_gives_nothing() -> None:
    assert flexgen(make_problem(8.0, precisions=("4", "3"), budget=0.01)) is None


def test_theta_prices_the_quality() -> None:
    problem = make_problem(0.4, link_gbs=0.01)
    dear = best(replace(problem, theta=1e6, _known={}))
    assert dear.precision == "16"
    some = best(replace(problem, theta=1e-3, _known={}))
    omega = problem.quality.sum_omega([some.precision] * 4)
    assert some.objective == pytest.approx(some.total_s + 1e-3 * omega)


def test_where_nothing_fits_it_says_what_is_short() -> None:
    plan = best(make_problem(0.01))
    assert not plan.feasible and plan.tokens_per_s == 0.0
    assert "MiB short on d0" in plan.why_not
    assert plan.device_bytes > 0.01 * 2**20


def test_a_device_of_the_library_has_its_own_link() -> None:
    cluster = Cluster.model_validate({"nodes": [{"name": "n", "devices": [{"type": "t4-16g"}]}]})
    problem = make_problem(1.0, cluster=cluster)
    assert host_link_bytes_per_s(problem, device_of(problem)) == 12e9
