"""What must hold of plans whatever prices them: more of anything never makes a plan slower.

Small random problems (1 to 3 nodes; fixed, ranged and skewed lengths; budgets and prices of
quality) are planned through the public functions, then changed for the better in one respect and
planned again. A plan is within its printed gap of the best one, so the lower bound of the better
problem must not be above the objective of the worse problem's plan. Closed-form prices have narrow
gaps; those of simulated runs are as wide as the closed form is off.

Not covered: prices against real runs, and clusters so large that not all subsets are searched.
"""

import itertools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from llmpq.cluster import Cluster
from llmpq.costs.latency import device_times
from llmpq.costs.quality import QualityModel
from llmpq.devices import device_library
from llmpq.errors import InfeasibleError
from llmpq.model_lookup import spec_from_config
from llmpq.plan_data import Plan, Predicted
from llmpq.planner.evaluate import evaluate, shortages
from llmpq.planner.planning import Options, replan
from llmpq.planner.problem import Assignment, Configuration, Problem, StageDevices
from llmpq.planner.search import search
from llmpq.planner.simulated import run_s
from llmpq.planner.sizes import all_sizes
from llmpq.planner.solver import Solver
from llmpq.planner.space import make_space
from llmpq.workload import Workload, planned_lengths

ROUNDING = 1 + 1e-6
GAP = 0.002  # of closed-form plans
CLOSED_FORM = Options(gap=GAP, compare=False, simulate=False)
SIMULATED = Options(compare=False)
TYPES = ("t4-16g", "v100-32g", "a100-40g", "l4-24g", "rtx3060-12g")
PRECISIONS = ("16", "8", "4", "3")
NATS = {"16": 0.0, "8": 0.001, "4": 0.05, "3": 0.25}  # rise of the loss with all layers at it
CONTEXT_GIB = 1.0  # taken from every card
MODEL = {
    "model_type": "llama",
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 16000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
Node = tuple[tuple[str, float], ...]  # the types of cards, and GiB that each has for a model


@dataclass(frozen=True)
class Case:
    """A problem in few numbers, so that it can be changed in one. Links: GB/s, microseconds."""

    layers: int
    hidden: int
    nodes: tuple[Node, ...]
    between: tuple[float, float]
    inside: tuple[float, float]
    prompt: Any
    new: Any
    count: int
    percent: float
    theta: float | None
    precisions: tuple[str, ...]
    uneven: bool  # layers differ in sensitivity
    figures: dict[str, dict[str, float]]  # of a type, instead of the library's


def case_of(seed: int) -> Case:
    """The same one for the same seed; the cards may hold the model at 16 bits, or just at 3."""
    draw = random.Random(seed)
    layers, hidden, types = draw.randint(4, 8), draw.choice((1024, 2048)), draw.sample(TYPES, 2)
    cards = draw.choice(((1,), (2,), (3,), (1, 1), (2, 1), (1, 1, 1)))
    share = draw.uniform(0.3, 1.3) / sum(cards) * 24 * hidden**2 * layers / 2**30
    kind = draw.choice(("fixed", "range", "skewed"))
    lengths = [_lengths(draw, kind, draw.choice(mean)) for mean in ((32, 128, 400), (4, 16, 40))]
    return Case(
        layers=layers,
        hidden=hidden,
        nodes=tuple(
            tuple((draw.choice(types), share * draw.choice((0.7, 1, 1.4)) + 0.2) for _ in range(n))
            for n in cards
        ),
        between=(draw.choice((0.125, 1.25, 12.5)), 50),
        inside=(draw.choice((6, 12, 50)), 20),
        prompt=lengths[0],
        new=lengths[1],
        count=draw.choice((6, 16, 40, 2500)),
        percent=draw.choice((0.5, 1, 3, 30)),
        theta=draw.choice((0.01, 0.3)) if draw.random() < 0.35 else None,
        precisions=draw.choice((PRECISIONS, ("16", "4"), ("16", "8", "3"))),
        uneven=draw.random() < 0.5,
        figures={},
    )


def _lengths(draw: random.Random, kind: str, mean: int) -> Any:
    if kind == "fixed":
        return mean
    if kind == "range":
        return {"min": mean // 4, "max": 2 * mean}
    return [max(1, min(6 * mean, round(draw.lognormvariate(0, 0.8) * mean))) for _ in range(23)]


def problem_of(case: Case) -> Problem:
    """As `llmpq-plan` makes it of files, with times of the spec sheets."""
    sizes = {"hidden_size": case.hidden, "intermediate_size": case.hidden * 5 // 2}
    spec = spec_from_config(MODEL | sizes | {"num_hidden_layers": case.layers}, name="test")
    cluster, job = _cluster(case), _workload(case)
    rising = [1 + 3 * i * case.uneven / case.layers for i in range(case.layers)]
    omega = {p: [nats * r / sum(rising) for r in rising] for p, nats in NATS.items()}
    quality = QualityModel(omega, 1.0, "test")
    return Problem(
        spec=spec,
        cluster=cluster,
        workload=job,
        lengths=tuple(planned_lengths(job)),
        num_requests=job.num_requests,
        times={d.type: device_times(cluster, d.type, spec, []) for d in cluster.devices()},
        quality=quality,
        precisions=case.precisions,
        budget=quality.budget(case.percent) if case.theta is None else math.inf,
        theta=case.theta or 0.0,
    )


def _cluster(case: Case) -> Cluster:
    nodes = [
        {
            "name": f"node{index}",
            "devices": [
                {"type": name, "memory_gib": CONTEXT_GIB + gib} | case.figures.get(name, {})
                for name, gib in node
            ],
            "link": {"bandwidth_gbs": case.inside[0], "latency_us": case.inside[1]},
        }
        for index, node in enumerate(case.nodes)
    ]
    link = {"bandwidth_gbs": case.between[0], "latency_us": case.between[1]}
    return Cluster.model_validate({"nodes": nodes, "link": link})


def _workload(case: Case) -> Workload:
    lengths = {"prompt_tokens": case.prompt, "new_tokens": case.new}
    return Workload.model_validate(lengths | {"num_requests": case.count})


def plan_of(problem: Problem, options: Options) -> Plan | None:
    """None: nothing fits."""
    try:
        return replan(problem, options)
    except InfeasibleError:
        return None


def predicted_of(plan: Plan) -> Predicted:
    assert plan.predicted is not None
    return plan.predicted


def assert_no_slower(worse: Problem, better: Problem, options: Options) -> None:
    """Beyond the gap that the plan of the better problem prints."""
    before, after = plan_of(worse, options), plan_of(better, options)
    if before is None:
        return
    assert after is not None, "nothing fits any more"
    limit = predicted_of(before).objective * ROUNDING
    assert predicted_of(after).objective * (1 - predicted_of(after).gap) <= limit


# ---- changes for the better


def more_memory(case: Case, draw: random.Random) -> Case:
    """On one card."""
    where = [(i, j) for i, node in enumerate(case.nodes) for j in range(len(node))]
    chosen, gib = draw.choice(where), draw.choice((0.01, 0.1, 0.4, 3.0))
    nodes = tuple(
        tuple((name, has + gib * ((i, j) == chosen)) for j, (name, has) in enumerate(node))
        for i, node in enumerate(case.nodes)
    )
    return replace(case, nodes=nodes)


def faster_card(case: Case, draw: random.Random) -> Case:
    """A type that computes faster, reads its memory faster, or both."""
    name = draw.choice([name for node in case.nodes for name, _ in node])
    sheet, factor = device_library()[name], draw.choice((1.05, 1.3, 3.0))
    bandwidth, tflops = draw.choice(((factor, factor), (1, factor), (factor, 1)))
    figures = {
        "bandwidth_gbs": sheet.bandwidth_gbs * bandwidth,
        "tflops": sheet.fp16_tflops * tflops,
    }
    return replace(case, figures={name: figures})


def faster_link(case: Case, draw: random.Random) -> Case:
    """Between the nodes or inside them: more bandwidth, or less latency."""
    which = draw.choice(("between", "inside"))
    bandwidth, latency = getattr(case, which)
    better = draw.choice(((10 * bandwidth, latency), (bandwidth, latency / 10)))
    return replace(case, **{which: better})


def larger_budget(case: Case, draw: random.Random) -> Case:
    """Or a lower price of quality."""
    factor = draw.choice((1.1, 2.0))
    if case.theta is None:
        return replace(case, percent=case.percent * factor)
    return replace(case, theta=case.theta / factor)


def one_more_device(case: Case, draw: random.Random) -> Case:
    """On a node that is there or on a new one; like another one, or of any type."""
    name, gib = draw.choice([card for node in case.nodes for card in node])
    card = draw.choice((name, draw.choice(TYPES))), gib * draw.choice((0.5, 1, 2))
    nodes: list[Node] = [*case.nodes, ()]
    index = draw.randrange(len(nodes))
    nodes[index] = (*nodes[index], card)
    return replace(case, nodes=tuple(node for node in nodes if node))


def more_precisions(case: Case, draw: random.Random) -> Case:
    """All of them."""
    return replace(case, precisions=PRECISIONS)


CHANGES: dict[str, Callable[[Case, random.Random], Case]] = {
    "more memory": more_memory,
    "a faster card": faster_card,
    "a faster link": faster_link,
    "a larger budget": larger_budget,
    "one more device": one_more_device,
    "more precisions": more_precisions,
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("change", CHANGES)
def test_a_better_problem_has_no_slower_plan_by_the_closed_form(change: str, seed: int) -> None:
    case = case_of(seed + 100)
    better = CHANGES[change](case, random.Random(f"{change} {seed}"))
    assert_no_slower(problem_of(case), problem_of(better), CLOSED_FORM)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("change", CHANGES)
def test_a_better_problem_has_no_slower_simulated_plan(change: str, seed: int) -> None:
    case = case_of(seed + 200)
    better = CHANGES[change](case, random.Random(f"{change} {seed}"))
    assert_no_slower(problem_of(case), problem_of(better), SIMULATED)


@pytest.mark.parametrize("seed", range(6))
def test_a_card_whose_times_are_all_shorter_makes_no_plan_slower(seed: int) -> None:
    problem, draw = problem_of(case_of(seed + 300)), random.Random(seed)
    name = draw.choice(sorted(problem.times))
    shorter = problem.times[name].scaled(1 / draw.choice((1.05, 1.5, 4.0)))
    better = replace(problem, times={**problem.times, name: shorter}, _known={})
    assert_no_slower(problem, better, CLOSED_FORM)


def test_more_memory_on_one_of_two_cards_leaves_them_joined() -> None:
    case = case_of(2)
    card = "t4-16g", 0.6
    alike = problem_of(replace(case, nodes=((card, card),), inside=(50, 1), percent=30))
    unlike = problem_of(replace(case, nodes=((card, ("t4-16g", 3.0)),), inside=(50, 1), percent=30))
    before, after = (
        plan_of(replace(problem, max_tensor_parallel=2), CLOSED_FORM) for problem in (alike, unlike)
    )
    assert before is not None and after is not None
    assert before.stages[0].tensor_parallel == 2
    limit = predicted_of(before).objective * ROUNDING
    assert predicted_of(after).lower_bound <= limit


# ---- what fits


def with_lengths(problem: Problem, lengths: list[tuple[int, int]]) -> Problem:
    """The same problem for exactly these requests."""
    prompts, new = (tuple(values) for values in zip(*lengths, strict=True))
    listed = {"prompt_tokens": prompts, "new_tokens": new, "num_requests": len(lengths)}
    job = problem.workload.model_copy(update=listed)
    return replace(
        problem, workload=job, lengths=tuple(lengths), num_requests=len(lengths), _known={}
    )


@pytest.mark.parametrize("seed", range(4))
def test_more_requests_make_no_plan_fit_that_did_not(seed: int) -> None:
    """Requests as long as others. Memory is brought to just below what the job needs.

    One is long: short ones beside it leave more of the cache's lanes short.
    """
    draw = random.Random(seed)
    case = replace(case_of(seed + 400), prompt=draw.choice((16, 64)), percent=30)
    usual = [max(1, min(3000, round(draw.lognormvariate(5, 1)))) for _ in range(draw.randint(3, 9))]
    lengths = [(case.prompt, new) for new in (3000, *usual)]

    def fits(share: float, lengths: list[tuple[int, int]]) -> bool:
        nodes = tuple(tuple((t, gib * share) for t, gib in node) for node in case.nodes)
        problem = with_lengths(problem_of(replace(case, nodes=nodes)), lengths)
        return plan_of(problem, replace(CLOSED_FORM, gap=0.5)) is not None

    too_little, enough = 0.0, 2.0
    for _ in range(7):
        middle = (too_little + enough) / 2
        too_little, enough = (too_little, middle) if fits(middle, lengths) else (middle, enough)
    assert enough < 2.0
    for extra in (12, 60):
        assert not fits(too_little, [*lengths, *draw.choices(lengths, k=extra)])
        assert not fits(too_little, [*lengths, *[min(lengths)] * extra])


# ---- the lower bound


def random_assignment(
    problem: Problem, draw: random.Random, like: Assignment | None
) -> Assignment | None:
    """Of the space that the search covers: any order, layers, precisions and sizes.

    Half of them differ from `like` in few respects. None: it does not fit, or loses too much.
    """
    devices = problem.cluster.devices()
    places = [StageDevices(device.node, device.type, device.memory_bytes) for device in devices]
    count = draw.randint(1, min(len(places), problem.spec.num_layers))
    order = tuple(draw.sample(places, count))
    sizes = draw.choice(all_sizes(problem))
    setting = Configuration(
        order, sizes.batch, draw.choice(sizes.prefill), draw.choice(sizes.decode)
    )
    offered = [p for p in problem.precisions if draw.random() < 0.6] or [problem.precisions[0]]
    precisions = draw.choices(offered, k=problem.spec.num_layers)
    if like is not None and draw.random() < 0.5:
        setting = replace(setting, stage_devices=like.configuration.stage_devices)
        count, precisions = len(like.stages), list(like.precisions)
        precisions[draw.randrange(len(precisions))] = draw.choice(offered)
    cuts = sorted(draw.sample(range(1, len(precisions)), count - 1))
    ranges = itertools.pairwise((0, *cuts, len(precisions)))
    found = Assignment(setting, tuple(tuple(precisions[a:b]) for a, b in ranges))
    over = problem.quality.sum_omega(precisions) > problem.budget
    return None if over or shortages(problem, found) else found


@pytest.mark.parametrize("options", [CLOSED_FORM, SIMULATED], ids=["closed form", "simulated"])
@pytest.mark.parametrize("seed", range(3))
def test_no_plan_made_by_hand_is_below_the_lower_bound(seed: int, options: Options) -> None:
    """By the closed form, of which the bound is.

    Where that is scaled to simulated runs, no simulated run is far below it.
    """
    problem, draw = problem_of(case_of(seed + 500)), random.Random(seed)
    plan = plan_of(problem, options)
    bound = predicted_of(plan).lower_bound if plan else math.inf
    best = best_of(problem)
    assert (best is None) == (plan is None)
    made = [one for _ in range(150) if (one := random_assignment(problem, draw, best))]
    made += [best] if best else []
    if options is CLOSED_FORM:
        assert all(evaluate(problem, one).objective * ROUNDING >= bound for one in made)
    else:
        assert all(run_s(problem, one) >= 0.94 * bound for one in made[-40:])


def best_of(problem: Problem) -> Assignment | None:
    """What the search finds of the space."""
    solver = Solver()
    space = make_space(problem)
    found = search(problem, space, solver, gap=GAP, deadline=time.monotonic() + 60)
    return found.assignment


# ---- the same question again


@pytest.mark.parametrize("seed", range(3))
def test_the_same_problem_has_the_same_plan(seed: int) -> None:
    first, second = (plan_of(problem_of(case_of(seed + 600)), SIMULATED) for _ in range(2))
    if first is None or second is None:
        assert first is second
        return
    assert first.stages == second.stages
    assert _sizes(first) == _sizes(second)
    assert predicted_of(first).total_s == predicted_of(second).total_s


def _sizes(plan: Plan) -> tuple[int, int, int]:
    return plan.batch, plan.prefill_micro_batch, plan.decode_micro_batch


@pytest.mark.parametrize("options", [CLOSED_FORM, SIMULATED], ids=["closed form", "simulated"])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_nodes_and_devices_makes_no_difference(seed: int, options: Options) -> None:
    case = case_of(seed + 700)
    turned = replace(case, nodes=tuple(node[::-1] for node in case.nodes[::-1]))
    problem, other = problem_of(case), problem_of(turned)
    assert_no_slower(problem, other, options)
    assert_no_slower(other, problem, options)
