"""llmpq-plan beside the plain plan: other methods, frontier, comparing clusters, solvers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_exact import random_instance
from test_planner import cluster_data, files, make_problem, run

from llmpq.cli.plan import main
from llmpq.errors import UserError
from llmpq.plan_data import diff, load_plan
from llmpq.planner import solver
from llmpq.planner.exact import solve
from llmpq.planner.planning import Options, make_plan, replan

__all__ = ["files"]  # a fixture
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("method", ["auto", "ilp", "heuristic"])
def test_methods_of_our_own_agree_within_their_gaps(files: Path, method: str) -> None:
    output = files / "plan.json"
    result = run(files, "--method", method, "--no-what-if", "-o", str(output))
    assert result.exit_code == 0, result.output
    plan = load_plan(output)
    assert plan.method == method and plan.predicted is not None
    best = replan(make_problem_like(plan), Options(gap=0.0)).predicted
    assert best is not None
    assert plan.predicted.lower_bound <= best.objective * (1 + 1e-9)
    if method != "heuristic":
        assert plan.predicted.objective <= best.objective * 1.05


def make_problem_like(plan: Any) -> Any:
    """The problem of the `files` fixture."""
    from llmpq.workload import request_lengths

    job = json.loads(plan.workload.model_dump_json())
    lengths = tuple(request_lengths(plan.workload))
    return make_problem(0.5, 0.4, workload=job | {"lengths": lengths})


def test_flexgen_is_priced_and_has_no_plan_file(files: Path) -> None:
    priced = files / "flexgen.json"
    result = run(files, "--method", "flexgen", "--json", str(priced))
    assert result.exit_code == 0, result.output
    figures = json.loads(priced.read_text())
    assert figures["tokens_per_s"] > 0 and 0 <= figures["weights_share"] <= 1
    assert "flexgen" in result.output


def test_what_would_change_a_plan_is_shown_unless_told_not_to(files: Path) -> None:
    assert "one more d0 on box" in run(files).output
    assert "one more d0 on box" not in run(files, "--no-what-if").output


def test_a_clusters_name_leads_no_picture_elsewhere(files: Path, monkeypatch: Any) -> None:
    """Without -o the picture lies in the working folder, whatever the name holds."""
    (files / "in").mkdir()
    monkeypatch.chdir(files / "in")
    data = json.loads((files / "cluster.yaml").read_text()) | {"name": "../a/b.c"}
    (files / "cluster.yaml").write_text(json.dumps(data))
    result = run(files, "--frontier")
    assert result.exit_code == 0, result.output
    assert [path.name for path in (files / "in").iterdir()] == ["-a-b-c.frontier.png"]
    assert not (files / "a").exists()


def test_the_frontier_is_a_table_a_picture_and_values(files: Path) -> None:
    (files / "cluster.yaml").write_text(json.dumps(cluster_data(0.42, 0.34)))
    output, values = files / "out.json", files / "frontier.json"
    result = run(files, "--frontier", "-o", str(output), "--json", str(values))
    assert result.exit_code == 0, result.output
    rows = [row for row in json.loads(values.read_text())["points"] if row["tokens_per_s"]]
    losses = [row["quality_loss_percent"] for row in rows]
    speeds = [row["tokens_per_s"] for row in rows]
    assert len(rows) >= 2 and losses == sorted(losses) and speeds == sorted(speeds)
    assert all(
        row["quality_loss_percent"] <= row["max_quality_loss_percent"] + 1e-9 for row in rows
    )
    picture = files / "out.frontier.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_clusters_are_compared_by_speed_and_price(files: Path) -> None:
    small, large = (
        cluster_data(0.5, 0.4) | {"name": "small"},
        cluster_data(2, 2) | {"name": "large"},
    )
    for data, price in ((small, 1.0), (large, 4.0)):
        data["nodes"][0]["price_per_hour"] = price
        (files / f"{data['name']}.yaml").write_text(json.dumps(data))
    (files / "tiny.yaml").write_text(json.dumps(cluster_data(0.1) | {"name": "tiny"}))
    names = [str(files / f"{name}.yaml") for name in ("small", "large", "tiny")]
    values = files / "rigs.json"
    line = ["--model", str(files / "config.json"), "--workload", str(files / "workload.yaml")]
    line += ["--profiles", str(files / "profiles"), "--json", str(values)]
    result = CliRunner().invoke(main, [*line, "--compare-clusters", *names])
    assert result.exit_code == 0, result.output
    rows = {row["cluster"]: row for row in json.loads(values.read_text())["clusters"]}
    assert rows["large"]["tokens_per_s"] >= rows["small"]["tokens_per_s"] > 0
    expected = 3600 * rows["small"]["tokens_per_s"] / 1.0
    assert rows["small"]["tokens_per_price"] == pytest.approx(expected)
    assert not rows["tiny"]["feasible"] and rows["tiny"]["why_not"]
    none = CliRunner().invoke(main, [*line, "--compare-clusters", names[2], names[2]])
    assert none.exit_code == 3


def test_stages_of_several_devices_are_planned_where_asked_for(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        "nodes: [{name: n, devices: [{type: a100-40g, count: 4}], "
        "link: {bandwidth_gbs: 100, latency_us: 10}}]"
    )
    output = tmp_path / "plan.json"
    line = ["--model", str(ROOT / "configs/models/opt-30b.json"), "--cluster", str(cluster)]
    line += ["--workload", str(ROOT / "configs/workloads/paper-512-100.yaml"), "--no-what-if"]
    result = CliRunner().invoke(main, [*line, "-o", str(output), "--tensor-parallel", "auto"])
    assert result.exit_code == 0, result.output
    joined = load_plan(output)
    assert max(stage.tensor_parallel for stage in joined.stages) > 1
    assert "have not been measured on GPUs" in " ".join(result.output.split())
    again = CliRunner().invoke(
        main, ["--evaluate", str(output), "--json", str(tmp_path / "e.json")]
    )
    assert again.exit_code == 0, again.output
    priced = load_plan(tmp_path / "e.json").predicted
    assert joined.predicted is not None and priced is not None
    assert priced.total_s == pytest.approx(joined.predicted.total_s)
    alone = tmp_path / "alone.json"
    assert CliRunner().invoke(main, [*line, "-o", str(alone)]).exit_code == 0
    single = load_plan(alone)
    assert {stage.tensor_parallel for stage in single.stages} == {1} and diff(single, joined)


# ---- solvers


def test_a_programme_too_large_for_the_licence_goes_to_highs(monkeypatch: Any) -> None:
    def refuse(*_: Any) -> None:
        raise solver._TooLarge

    monkeypatch.setattr(solver, "_gurobi_integers", refuse)
    instance = random_instance(2, 4, 2, 2)
    asked = solver.Solver("gurobi")
    ours = solve(instance, solver.Solver())
    for _ in range(2):
        assert solve(instance, asked).bound == pytest.approx(ours.bound)
    assert len(asked.notes) == 1 and "HiGHS" in asked.notes[0]


def test_gurobi_that_is_not_installed_is_a_clear_message(monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gurobipy", None)
    with pytest.raises(UserError, match="pip install gurobipy"):
        solver.make_solver("gurobi")


@pytest.mark.library("gurobipy")
def test_gurobi_agrees_with_highs() -> None:
    problem = make_problem(0.5, 0.4, 0.4, layers=8)
    ours = make_plan(problem, Options(gap=0.001), ("16",)).plan.predicted
    theirs = make_plan(problem, Options(gap=0.001, solver="gurobi"), ("16",)).plan.predicted
    assert ours is not None and theirs is not None
    assert math.isclose(ours.objective, theirs.objective, rel_tol=0.002)
