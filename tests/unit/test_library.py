"""llmpq from Python: the examples run, what is lazy stays so, and every fault is one message."""

import runpy
from pathlib import Path
from typing import get_args

import pytest

import llmpq
from llmpq.errors import InfeasibleError, UserError
from llmpq.plan_data import Plan
from llmpq.planner.planning import METHODS
from llmpq.planning_methods import PlanningMethod
from llmpq.workload import Workload

CLUSTER = "configs/clusters/03-opt30b-3xt4-1xv100.yaml"
WORKLOAD = Workload(prompt_tokens=16, new_tokens=8, num_requests=6, batch=3)
PROMPTS = ["Once upon a time", "The cat was sad. It", "Tom had a red ball and"]


@pytest.fixture(autouse=True)
def in_the_repository(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo_root)


def plan_of(*ends: int) -> Plan:
    """A plan of the shipped model by hand, with a stage up to each of these layers."""
    made = llmpq.plan(llmpq.load_model(), llmpq.load_cluster(CLUSTER), WORKLOAD, time_limit_s=1)
    num_layers = made.model.num_layers
    (node,) = {n.name for n in made.cluster.nodes if any(g.type == "t4-16g" for g in n.devices)}
    cuts = [0, *ends, num_layers]
    stages = [
        {
            "rank": rank,
            "node": node,
            "devices": ["t4-16g"],
            "first_layer": first,
            "end_layer": end,
            "precisions": ["8"] * (end - first),
        }
        for rank, (first, end) in enumerate(zip(cuts, cuts[1:], strict=False))
    ]
    return Plan.model_validate(made.model_dump() | {"stages": stages, "predicted": None})


@pytest.mark.parametrize("name", ["plan", "generate"])
def test_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "generate":
        pytest.importorskip("transformers")
    path = Path("examples", f"{name}.py")
    assert len(path.read_text().splitlines()) <= 10
    runpy.run_path(str(path))
    said = capsys.readouterr().out
    assert ("tokens/s" if name == "plan" else "there was a little girl") in said


def test_what_is_offered() -> None:
    assert all(getattr(llmpq, name) for name in llmpq.__all__)
    assert set(get_args(PlanningMethod)) == set(METHODS)
    with pytest.raises(AttributeError, match="module 'llmpq' has no attribute 'plam'"):
        _ = llmpq.plam  # type: ignore[attr-defined]


def test_a_plan_is_the_commands_and_its_run_can_be_simulated() -> None:
    plan = llmpq.plan(llmpq.load_model(), llmpq.load_cluster(CLUSTER), WORKLOAD, precisions=["8"])
    assert set(plan.precisions) == {"8"} and plan.predicted is not None
    assert llmpq.simulate(plan).total_s == pytest.approx(plan.predicted.total_s)
    longer = WORKLOAD.model_copy(update={"num_requests": 12})
    assert llmpq.simulate(plan, workload=longer).total_s > 1.5 * plan.predicted.total_s
    slower = llmpq.simulate(plan_of(2, 5))
    assert len(slower.stages) == 3 and slower.total_s > plan.predicted.total_s


def test_what_cannot_be_planned() -> None:
    model, cluster = llmpq.load_model(), llmpq.load_cluster(CLUSTER)
    with pytest.raises(UserError, match="unknown precision '5'; known"):
        llmpq.plan(model, cluster, WORKLOAD, precisions=["5"])
    with pytest.raises(UserError, match="unknown method 'best'; known: auto"):
        llmpq.plan(model, cluster, WORKLOAD, method="best")  # type: ignore[arg-type]
    with pytest.raises(InfeasibleError, match="quality"):
        llmpq.plan(model, cluster, WORKLOAD, precisions=["3"], max_quality_loss=0.0, time_limit_s=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_quality_loss": -5.0},
        {"max_quality_loss": float("nan")},
        {"gap": -1.0},
        {"gap": 1.0},
        {"time_limit_s": 0.0},
        {"time_limit_s": float("nan")},
        {"precisions": "16"},
    ],
)
def test_numbers_and_lists_that_are_wrong_are_refused(wrong) -> None:
    model, cluster = llmpq.load_model(), llmpq.load_cluster(CLUSTER)
    with pytest.raises(UserError, match=f"^{next(iter(wrong))} must be .*, found"):
        llmpq.plan(model, cluster, WORKLOAD, **wrong)


def test_stages_give_the_texts_of_the_whole_model_every_time() -> None:
    pytest.importorskip("transformers")
    whole, cut = llmpq.Engine(plan_of()), llmpq.Engine(plan_of(2, 5))
    texts = whole.generate(PROMPTS, new_tokens=8)
    assert len(set(texts)) == len(PROMPTS) and all(texts)
    assert cut.generate(PROMPTS, new_tokens=8) == texts
    assert cut.generate(PROMPTS[::-1]) == texts[::-1]  # 8 tokens is what the workload says
    drawn = cut.generate(PROMPTS, temperature=0.8, seed=3)
    assert drawn != texts and drawn == whole.generate(PROMPTS, temperature=0.8, seed=3)
    assert cut.generate([]) == [] and cut.generate(PROMPTS[:1]) == texts[:1]


def test_what_the_engine_refuses(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    engine = llmpq.Engine(plan_of(3))
    with pytest.raises(UserError, match=r"prompt 1: .* \+ 8 new tokens exceed"):
        engine.generate(["Once", "word " * 600])
    with pytest.raises(UserError, match="prompt 0: 'max_new_tokens' must be a positive integer"):
        engine.generate(["Once"], new_tokens=0)
    for name, value in (("temperature", -1.0), ("top_p", 7.0), ("top_p", float("nan"))):
        with pytest.raises(UserError, match=f"'{name}' must be .*, found"):
            engine.generate(["Once"], new_tokens=2, **{name: value})
    with pytest.raises(UserError, match="prompts must be a list of strings, found a single string"):
        engine.generate("Once")
    with pytest.raises(UserError, match="unknown dtype 'int8'; known: float32, "):
        llmpq.Engine(plan_of(3), dtype="int8")  # type: ignore[arg-type]
    other = plan_of().model_dump()
    other["model"]["ffn_size"] += 8
    with pytest.raises(UserError, match="8 layers of .*, planned were 8 of .*-f"):
        llmpq.Engine(Plan.model_validate(other))
