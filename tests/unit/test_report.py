"""What a person reads of a plan: stages, changes, clusters side by side, the frontier."""

import builtins
import io
import re
from pathlib import Path
from typing import Any

import pytest
from test_explain import real, replan, tiny

import llmpq
from llmpq.cluster import Cluster
from llmpq.errors import UserError
from llmpq.plan_data import Baseline, Plan
from llmpq.planner.baselines import Outcome
from llmpq.planner.flexgen import flexgen
from llmpq.planner.frontier import Point, frontier
from llmpq.planner.what_if import Change, WhatIf
from llmpq.render.console import PlainConsole
from llmpq.render.frontier_view import print_frontier, save_frontier
from llmpq.render.plan_report import (
    empty_table,
    expected_time,
    kernel_line,
    print_changes,
    print_comparison,
    print_offload,
    print_outcomes,
    print_report,
)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Two stages."""
    return replan(tiny(0.3, 0.3, percent=5))


@pytest.fixture
def console() -> PlainConsole:
    """No terminal: plain text."""
    return PlainConsole(file=io.StringIO(), width=160)


def shown(console: PlainConsole) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def report(console: PlainConsole, plan: Plan) -> str:
    print_report(console, plan, "a prior", ["[take] note"], "budget 5 %")
    return shown(console)


def with_stage(plan: Plan, **changes: Any) -> Plan:
    """The plan with another first stage."""
    first = plan.stages[0].model_copy(update=changes)
    return plan.model_copy(update={"stages": [first, *plan.stages[1:]]})


def test_every_section_is_shown_by_something() -> None:
    """A function `print_NAME` that nobody calls is a section that no command shows."""
    sources = [path.read_text() for path in Path(llmpq.__file__).parent.rglob("*.py")]
    made = {name for text in sources for name in re.findall(r"^def (print_\w+)\(", text, re.M)}
    called = {name for text in sources for name in re.findall(r"^ .*\b(print_\w+)\(", text, re.M)}
    assert {"print_report", "print_outcomes", "print_frontier"} <= made
    assert made - called == set()


def test_the_title_of_a_narrow_table_stays_on_one_line(console: PlainConsole) -> None:
    table = empty_table(["bits"], ["n"], "how many layers there are at each precision")
    table.add_row("16", "3")
    console.print(table)
    assert "how many layers there are at each precision" in shown(console)


def test_the_report_names_stages_memory_and_times_in_plain_text(
    console: PlainConsole, plan: Plan
) -> None:
    text = report(console, plan)
    for part in ("MiB", "#", "free", "prefill ms", "decode ms", "tokens/s", "a prior", "optimal"):
        assert part in text
    assert "[take] note" in text and "\x1b" not in text


def test_a_plans_time_says_when_first_tokens_are_there_and_how_many_requests_a_second(
    console: PlainConsole, plan: Plan
) -> None:
    assert plan.predicted is not None
    long = plan.predicted.model_copy(
        update={"total_s": 9000.0, "prefill_s": 8000.0, "prefill_share": 0.25}
    )
    text = " ".join(report(console, plan.model_copy(update={"predicted": long})).split())
    assert f"tokens/s, {long.requests_per_s:.3g} requests/s predicted" in text
    assert "9000.00 s (2.50 hours); every request has its first token after 8000.00 s" in text
    assert "prefills are 25 % of the busiest stage's work" in text
    earlier = long.model_copy(update={"requests_per_s": None, "prefill_share": None})
    assert earlier.share_of_prefills == pytest.approx(8 / 9)
    assert expected_time(earlier) == "9000.00 s (2.50 hours)"


def test_the_kernels_that_a_plan_counts_on_are_one_line(console: PlainConsole, plan: Plan) -> None:
    """Rehearsed stages count on the CPU's; a card's library is taken to be installed, and said."""
    assert "kernels: " in report(console, plan) and "assumed" not in shown(console)
    assert plan.predicted is not None
    assert all(stage.kernels for stage in plan.predicted.stages)

    def counted(cluster: dict[str, Any], *kernels: dict[str, list[str]]) -> str:
        pairs = zip(plan.predicted.stages, kernels, strict=True)
        stages = [stage.model_copy(update={"kernels": names}) for stage, names in pairs]
        predicted = plan.predicted.model_copy(update={"stages": stages})
        changes = {"cluster": Cluster.model_validate(cluster), "predicted": predicted}
        devices = [group["type"] for group in cluster["nodes"][0]["devices"]]
        own = [
            stage.model_copy(update={"devices": [device]})
            for stage, device in zip(plan.stages, devices, strict=True)
        ]
        return kernel_line(plan.model_copy(update={**changes, "stages": own}))

    groups = [{"type": "t4-16g"}, {"type": "v100-32g"}]
    cards = {"nodes": [{"name": "n", "devices": groups}]}
    fast, slow = {"16": ["cuBLAS"], "4": ["humming"]}, {"4": ["a", "b"]}
    assert counted(cards, fast, fast) == (
        "kernels: 16-bit cuBLAS; 4-bit humming; assumed installed: llmpq[gpu]"
    )
    assert "4-bit humming (t4-16g), a, then b (v100-32g)" in counted(cards, fast, slow)
    groups[0]["kernels"] = ["humming"]
    assert "assumed" not in counted(cards, fast, slow), "the file says so"


def test_the_slowest_stage_of_each_phase_has_a_full_bar_and_a_mark(
    console: PlainConsole, plan: Plan
) -> None:
    assert plan.predicted is not None and len(plan.stages) == 2
    for key in ("prefill_s", "decode_step_s"):
        slowest = max(getattr(stage, key) for stage in plan.predicted.stages)
        assert f"{slowest * 1e3:.2f} *" in report(console, plan)
    assert "#" * 10 in shown(console)


def test_free_memory_is_what_the_plan_leaves(console: PlainConsole, plan: Plan) -> None:
    assert plan.predicted is not None
    text = report(console, plan)
    for stage in plan.predicted.stages:
        free = (stage.memory_capacity_bytes - stage.peak_memory_bytes) / 2**20
        assert f"{free:.2f} MiB" in text


def test_a_stage_of_several_devices_says_how_many(console: PlainConsole, plan: Plan) -> None:
    several = with_stage(plan, tensor_parallel=4, devices=["a100-40g"] * 4)
    assert "4 x a100-40g" in report(console, several)


def test_a_gain_within_the_gap_is_not_a_number(console: PlainConsole, plan: Plan) -> None:
    assert plan.predicted is not None
    changes = [
        Change("1 GiB more", 120.0, 20.0, 20.0, False),
        Change("[fast] links", 100.1, 0.1, 0.1, True),
    ]
    print_changes(console, plan, WhatIf(tuple(changes), 3))
    text = shown(console)
    assert "+20.0 (+20.0 %)" in text and "[fast] links" in text
    assert "3 further, less promising changes were not tried" in text
    assert f"no more than the gap ({100 * plan.predicted.gap:.2f} %)" in text


def test_clusters_are_compared_by_speed_and_by_money(console: PlainConsole, plan: Plan) -> None:
    assert plan.predicted is not None
    print_comparison(
        console,
        [("small", "no plan fits the memory: [x]\nmore", 1.0), ("dear", plan, 2.0)],
    )
    lines = shown(console).splitlines()
    dear = next(i for i, line in enumerate(lines) if "dear" in line)
    small = next(i for i, line in enumerate(lines) if "small" in line)
    assert dear < small and "no plan fits the memory: [x]" in lines[small]
    assert "more" not in shown(console)
    assert f"{plan.predicted.tokens_per_s * 1800:,.0f}" in lines[dear]


def test_clusters_without_prices_have_no_column_for_them(console: PlainConsole, plan: Plan) -> None:
    print_comparison(console, [("a", plan, None)])
    assert "money" not in shown(console) and "gap" in shown(console)


def test_off_loading_is_told_and_stands_beside_the_plan(console: PlainConsole, plan: Plan) -> None:
    found = flexgen(tiny(0.36, 0.3, percent=5))
    assert found is not None and plan.predicted is not None
    print_offload(console, found, ["[a] note"])
    outcome = Outcome("flexgen", None, None, True, "", offload=found)
    print_outcomes(console, plan, [outcome])
    text = shown(console)
    assert "requests in flight" in text and "[a] note" in text and "on its host" in text
    assert text.count(f"{found.tokens_per_s:.1f}") == 2
    assert "cannot run" not in text


def test_a_method_without_a_plan_says_why(console: PlainConsole, plan: Plan) -> None:
    print_outcomes(console, plan, [Outcome("uniform", None, None, False, "16 bits: [1] short")])
    assert "cannot run: 16 bits: [1] short" in shown(console)


# ---- the frontier


@pytest.fixture(scope="module")
def points() -> list[Point]:
    """Infeasible budgets, then plans."""
    return frontier(real("opt-13b", "01-opt13b-1xv100"), replan)


def test_the_frontier_is_a_table(console: PlainConsole, points: list[Point]) -> None:
    print_frontier(console, points)
    text = shown(console)
    for point in points:
        assert f"{point.max_loss_percent:.3g} %" in text
        if point.plan:
            assert f"{point.tokens_per_s:.1f}" in text
    assert "x8-bit" in text and "no plan" in text


def test_the_frontier_is_drawn(tmp_path: Path, points: list[Point]) -> None:
    pytest.importorskip("matplotlib")
    rival = Baseline(method="uniform", feasible=True, tokens_per_s=9.0, quality_loss_percent=1.0)
    path = tmp_path / "new" / "frontier.png"
    save_frontier(path, points, "$\\frac{\x1b", [rival, Baseline(method="none", feasible=False)])
    assert path.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_frontier(tmp_path / "file" / "frontier.png", points, "tiny")


def test_a_picture_without_matplotlib_says_what_to_install(
    tmp_path: Path, points: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    really = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return really(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'llmpq\[plot\]'"):
        save_frontier(tmp_path / "frontier.png", points, "tiny")


def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no plan at any budget"):
        save_frontier(tmp_path / "frontier.png", [Point(0.0, None, "no")], "tiny")
