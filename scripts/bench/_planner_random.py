"""Random rigs for the planner: 1 to 3 nodes of 1 to 4 cards, slow and fast links, seven models.

A rig is drawn again where the 3-bit model would not fit into seven eighths of the cards' memory, or
where the cards could hold it at 16 bits several times over: neither is a question for a planner.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from _common import Check

from llmpq.cli.plan import WHAT_IF_S
from llmpq.cluster import Cluster
from llmpq.costs.latency import device_times
from llmpq.costs.quality import prior_quality
from llmpq.errors import InfeasibleError
from llmpq.model_lookup import load_model_spec
from llmpq.plan_data import Plan
from llmpq.planner.planning import Options, make_plan, replan
from llmpq.planner.problem import Problem
from llmpq.planner.what_if import what_if
from llmpq.workload import Workload, planned_lengths

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GIB = 2**30
TYPES = (
    "t4-16g",
    "v100-16g",
    "v100-32g",
    "p100-16g",
    "a100-40g",
    "a100-80g",
    "a10-24g",
    "l4-24g",
    "rtx3090-24g",
    "rtx4090-24g",
    "rtx3060-12g",
    "rtx4060ti-16g",
    "a6000-48g",
    "h100-80g",
)
MODELS = (
    "llama-3.1-8b",
    "opt-13b",
    "qwen2.5-14b",
    "opt-30b",
    "qwen2.5-32b",
    "opt-66b",
    "llama-3.3-70b",
)
COUNTS = (64, 200, 1_000, 5_000, 20_000, 200_000)
PRECISIONS = ("16", "8", "4", "3")


@dataclass(frozen=True)
class Rig:
    """A problem with a name that says what is in it."""

    name: str
    problem: Problem


def rigs(count: int, seed: int = 0) -> Iterator[Rig]:
    """The same ones for the same seed."""
    draw = random.Random(seed)
    for number in range(count):
        while (rig := _rig(draw, number)) is None:
            pass
        yield rig


def _rig(draw: random.Random, number: int) -> Rig | None:
    cluster, model = _cluster(draw), draw.choice(MODELS)
    spec = load_model_spec(str(CONFIGS / "models" / f"{model}.json"))
    workload, budget = _workload(draw), draw.choice((0.5, 1.0, 2.0, 3.0))
    devices = cluster.devices()
    room = sum(device.memory_bytes for device in devices)
    weights = sum(op.out_features * op.in_features for op in spec.linears) * spec.num_layers
    if not weights * 3 / 8 * 8 / 7 < room < weights * 2 * 4:
        return None
    quality = prior_quality(spec.num_layers)
    problem = Problem(
        spec=spec,
        cluster=cluster,
        workload=workload,
        lengths=tuple(planned_lengths(workload)),
        num_requests=workload.num_requests,
        times={d.type: device_times(cluster, d.type, spec, []) for d in devices},
        quality=quality,
        precisions=PRECISIONS,
        budget=quality.budget(budget),
    )
    cards = "+".join(d.type.split("-")[0] for d in devices)
    return Rig(f"{number}: {cards} {model} {workload.name} {budget} %", problem)


def _cluster(draw: random.Random) -> Cluster:
    types = draw.sample(TYPES, draw.randint(1, 3))
    nodes = []
    for index in range(draw.randint(1, 3)):
        groups: dict[str, int] = {}
        for _ in range(draw.randint(1, 4)):
            name = draw.choice(types)
            groups[name] = groups.get(name, 0) + 1
        devices = [{"type": name, "count": n} for name, n in groups.items()]
        nodes.append({"name": f"node{index}", "devices": devices})
    gigabits = draw.choice((1, 10, 25, 100, 200))
    link = {"bandwidth_gbs": gigabits / 8, "latency_us": 50}
    return Cluster.model_validate({"nodes": nodes, "link": link})


def _workload(draw: random.Random) -> Workload:
    count = draw.choice(COUNTS)
    kind = draw.choice(("fixed", "range", "trace"))
    prompt, new = draw.choice((64, 256, 512, 1024)), draw.choice((16, 64, 128, 400))
    if kind == "fixed":
        lengths: tuple[object, object] = prompt, new
    elif kind == "range":
        lengths = {"min": prompt // 4, "max": 2 * prompt}, {"min": max(1, new // 4), "max": 2 * new}
    else:
        lengths = _skewed(draw, prompt), _skewed(draw, new)
    return Workload.model_validate(
        {
            "name": f"{kind} {prompt}+{new} x {count}",
            "prompt_tokens": lengths[0],
            "new_tokens": lengths[1],
            "num_requests": count,
        }
    )


def _skewed(draw: random.Random, mean: int) -> list[int]:
    """As in traces of chats: most are short and a few are long."""
    return [max(1, min(6 * mean, round(draw.lognormvariate(0, 0.8) * mean))) for _ in range(997)]


# ---- what is asked of them


def rows(count: int) -> Iterator[dict[str, Any]]:
    """A row for each rig: its plan beside the other methods' plans, and the time that it took."""
    for rig in rigs(count):
        row: dict[str, Any] = {"random": rig.name}
        start = time.monotonic()
        try:
            planned = make_plan(rig.problem, Options(), PRECISIONS)
        except InfeasibleError:
            yield row | {"feasible": False, "seconds": time.monotonic() - start}
            continue
        replanned = Options(gap=0.02, time_limit_s=2.0, compare=False, simulate=False, near=True)
        again = partial(replan, options=replanned, like=planned.plan)
        what_if(rig.problem, planned.plan, again, time.monotonic() + WHAT_IF_S)
        seconds = time.monotonic() - start
        forgotten = replace(rig.problem, _known={}, _of_run=type(rig.problem._of_run)())
        start = time.monotonic()
        replan(forgotten, Options(compare=False))
        alone = {"seconds": seconds, "seconds_alone": time.monotonic() - start}
        yield row | {"feasible": True} | alone | _figures(rig.problem, planned.plan)


def _figures(problem: Problem, plan: Plan) -> dict[str, Any]:
    predicted = plan.predicted
    assert predicted is not None
    allowed = problem.quality.expected_percent(problem.budget) * (1 + 1e-6)
    rivals = {
        one.method: one.tokens_per_s
        for one in plan.baselines
        if one.tokens_per_s is not None
        and one.quality_loss_percent is not None
        and one.quality_loss_percent <= allowed
    }
    run = [speed for method, speed in rivals.items() if method != "flexgen"]
    return {
        "tokens_per_s": predicted.tokens_per_s,
        "gap": predicted.gap,
        "model_error": predicted.priced_s / predicted.total_s - 1,
        "scale": predicted.closed_form_scale or 1.0,
        "sizes": [plan.batch, plan.prefill_micro_batch, plan.decode_micro_batch],
        "stages": len(plan.stages),
        "rivals": rivals,
        "best_rival": max(run, default=0.0) / predicted.tokens_per_s,
    }


def same_plan_rows() -> Iterator[dict[str, Any]]:
    """Ten thousand and ten million requests of the same lengths: plans, and seconds for each."""
    for rig in rigs(3, seed=1):
        plans, seconds = [], []
        for count in (10_000, 10_000_000):
            job = rig.problem.workload.model_copy(update={"num_requests": count})
            problem = replace(
                rig.problem,
                workload=job,
                lengths=tuple(planned_lengths(job)),
                num_requests=count,
                _known={},
            )
            start = time.monotonic()
            try:
                plans.append(replan(problem, Options(compare=False)))
            except InfeasibleError:
                break
            seconds.append(time.monotonic() - start)
        if len(plans) == 2:
            same = plans[0].stages == plans[1].stages and _sizes(plans[0]) == _sizes(plans[1])
            apart = abs(seconds[1] - seconds[0])
            yield {"same plan": rig.name, "same": same, "seconds_apart": apart}


def _sizes(plan: Plan) -> tuple[int, int, int]:
    return plan.batch, plan.prefill_micro_batch, plan.decode_micro_batch


def checks(found: list[dict[str, Any]], same: list[dict[str, Any]]) -> list[Check]:
    """The targets for random rigs."""
    plans = [row for row in found if row["feasible"]]
    count = len(plans)
    if not count:
        return []

    def check(name: str, value: float, unit: str, limit: float) -> Check:
        return Check(name, value, unit, f"<= {limit:g}", value <= limit, count)

    errors = [100 * abs(row["model_error"]) for row in plans]
    gaps = [100 * row["gap"] for row in plans]
    seconds, alone = ([row[key] for row in plans] for key in ("seconds", "seconds_alone"))
    beaten = sum(row["best_rival"] > 1.001 for row in plans)
    result = [
        check("r1 plans slower than another method's", beaten, f"of {count}", 0),
        check("r2a closed form against simulation, median", median(errors), "%", 3),
        check("r2b closed form against simulation, worst", max(errors), "%", 10),
        check("r2c gap of the predicted time, median", median(gaps), "%", 2),
        check("r2d gap of the predicted time, worst", max(gaps), "%", 6),
        check("r3a with other methods and what-ifs, median", median(seconds), "s", 3),
        check("r3b with other methods and what-ifs, worst", max(seconds), "s", 15),
        check("r3c search and simulations alone, median", median(alone), "s", 1),
        check("r3d search and simulations alone, worst", max(alone), "s", 8),
    ]
    if same:
        good = sum(row["same"] and row["seconds_apart"] <= 5 for row in same)
        name = "r4 same plan for 10 thousand and 10 million requests"
        holds = good == len(same)
        result.append(Check(name, good, f"of {len(same)}", "all", holds, len(same)))
    return result
