"""llmpq-plan --trace: the file for trace viewers, the timeline in the terminal, the figures."""

import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_planner import files, run
from test_simulate_run import assign, make_problem, random_lengths

from llmpq.cli import plan_output
from llmpq.costs.simulate import SimulatedRun
from llmpq.plan_data import Plan, load_plan
from llmpq.planner.bubbles import find_bubbles
from llmpq.planner.evaluate import evaluate, to_plan
from llmpq.planner.simulated import simulate
from llmpq.render import simulated_run
from llmpq.render.console import PlainConsole
from llmpq.render.timeline_view import print_timeline

__all__ = ["files"]  # a fixture


def example(num_requests: int = 21) -> tuple[Plan, SimulatedRun]:
    """A plan of three stages and its run, of requests of unequal lengths."""
    lengths = [*random_lengths(3, num_requests, 40, 12), (90, 3)]
    problem = make_problem(lengths, ["t4-16g", "v100-32g", "a100-40g"])
    assignment = assign(problem, 8, 3, 2)
    plan = to_plan(problem, assignment, "hand-made", evaluate(problem, assignment))
    return plan, simulate(problem, assignment)


def events_of(path: Path) -> list[dict[str, Any]]:
    data = json.loads(path.read_text())
    assert data["displayTimeUnit"] == "ms"
    return data["traceEvents"]


def test_a_trace_holds_every_job_once_and_no_two_at_a_time(tmp_path: Path) -> None:
    plan, simulated = example()
    said = simulated_run.write_trace(tmp_path / "t.json", plan, simulated)
    assert said.endswith(f"all {len(simulated.jobs)} jobs")
    events = [e for e in events_of(tmp_path / "t.json") if e["ph"] == "X"]
    by_thread: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        by_thread[event["tid"]].append(event)
    for server, seconds in enumerate(simulated.busy_s):
        mine = sorted(by_thread[server], key=lambda e: e["ts"])
        assert sum(e["dur"] for e in mine) == pytest.approx(1e6 * seconds)
        ends = np.array([e["ts"] + e["dur"] for e in mine])
        assert (np.array([e["ts"] for e in mine])[1:] >= ends[:-1] - 1e-6 * ends[:-1]).all()
        assert {e["pid"] for e in mine} == {server // 2}
        assert len({e["name"] for e in mine}) == len(mine) == len(simulated.jobs)
    assert max(e["ts"] + e["dur"] for e in events) == pytest.approx(1e6 * simulated.total_s)


def test_events_say_what_they_are_of(tmp_path: Path) -> None:
    plan, simulated = example()
    simulated_run.write_trace(tmp_path / "t.json", plan, simulated)
    events = events_of(tmp_path / "t.json")
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert threads[0] == "stage 0: t4-16g on n (layers 0-1)"
    assert threads[1] == "link 0 -> 1" and threads[5] == "token return 2 -> 0"
    first = next(e for e in events if e["ph"] == "X")
    jobs = simulated.jobs
    expected = {"micro_batch": 0, "step": 0, "requests": int(jobs.requests[0]), "past": 0}
    assert first["name"] == "prefill 0"
    assert first["args"] == expected | {"tokens": int(jobs.tokens[0])}
    decode = [e for e in events if e.get("cat") == "decode" and e["tid"] == 0]
    assert [e["args"]["past"] for e in decode] == jobs.past[jobs.step > 0].tolist()
    assert {e["args"]["tokens"] for e in decode} == {1} and "decode 0 step 1" in {
        e["name"] for e in decode
    }
    chunks = [e["args"] for e in events if e.get("cat") == "prefill" and e["args"]["past"]]
    assert chunks, "the end of the long prompt"


def test_long_runs_are_cut_to_what_a_viewer_bears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, simulated = example()
    monkeypatch.setattr(simulated_run, "MAX_EVENTS", 60)
    said = simulated_run.write_trace(tmp_path / "t.json", plan, simulated)
    assert f"the first 10 of {len(simulated.jobs)} jobs" in said
    assert sum(e["ph"] == "X" for e in events_of(tmp_path / "t.json")) <= 60


@pytest.mark.parametrize("width", [60, 120])
def test_the_timeline_has_a_row_a_stage_as_wide_as_the_console(width: int) -> None:
    _, simulated = example()
    text = io.StringIO()
    print_timeline(PlainConsole(file=text, width=width), simulated, find_bubbles(simulated))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    rows = [line for line in lines if line.startswith("stage 0") and " %  " in line]
    assert len(rows) == 2  # the whole run and the zoom
    assert rows[0].split("%  ")[1][0] == "#" and rows[0].rstrip()[-1] in ".-"
    assert set(rows[1].split("%  ")[1]) <= set("0123456789.#")
    assert lines[-1] == lines[-1].strip() and "largest: " in text.getvalue()


def test_a_cell_shows_what_most_of_it_is() -> None:
    from llmpq.render.timeline_view import _character, _shares

    shares = _shares(np.array([0.0, 2.0]), np.array([1.0, 2.5]), np.arange(5.0))
    assert shares.tolist() == [1, 0, 0.5, 0]
    cells = [(1, 0), (0.3, 0), (0.4, 0.5), (0.1, 0.3), (0.05, 0)]
    assert "".join(_character(*cell) for cell in cells) == "#+=-."


# ---- the command


def is_timeline(output: str) -> bool:
    """Idle time is told, or that there is none."""
    return "largest: " in output or "no stage is ever idle" in output


def test_evaluate_writes_a_trace_and_shows_a_timeline(files: Path) -> None:
    output, trace, values = (files / name for name in ("plan.json", "trace.json", "values.json"))
    run(files, "-o", str(output), "-q")
    asked = ["--evaluate", str(output), "--trace", str(trace), "--json", str(values)]
    result = run(files, *asked)
    assert result.exit_code == 0, result.output
    assert is_timeline(result.output) and f"trace: {trace}, all" in result.output
    assert events_of(trace)
    found = json.loads(values.read_text())
    simulated, predicted = found["simulated"], found["predicted"]
    stages = len(found["stages"])
    assert len(simulated["busy_percent"]) == stages
    idle = sum(b["percent"] for b in simulated["bubbles"])
    assert idle + sum(simulated["busy_percent"]) == pytest.approx(100 * stages)
    assert simulated["total_s"] == pytest.approx(simulated["prefill_s"] + simulated["decode_s"])
    assert predicted["total_s"] == pytest.approx(simulated["total_s"])
    off = 100 * (predicted["closed_form_s"] / simulated["total_s"] - 1)
    assert simulated["closed_form_difference_percent"] == pytest.approx(off)


def test_verbose_evaluation_shows_the_timeline_without_a_file(files: Path) -> None:
    output = files / "plan.json"
    run(files, "-o", str(output), "-q")
    assert not is_timeline(run(files, "--evaluate", str(output)).output)
    result = run(files, "--evaluate", str(output), "-v")
    assert result.exit_code == 0 and is_timeline(result.output)
    assert "trace: " not in result.output


def test_a_plan_just_made_can_be_traced(files: Path) -> None:
    output, trace = files / "plan.json", files / "trace.json"
    result = run(files, "-o", str(output), "--trace", str(trace), "--no-what-if")
    assert result.exit_code == 0, result.output
    assert load_plan(output).predicted is not None and events_of(trace)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--frontier"], "leave out --frontier"),
        (["--method", "flexgen"], "leave out --method flexgen"),
        (["-o", "t.json"], "named twice"),
    ],
)
def test_what_cannot_be_traced_is_said(files: Path, options: list[str], words: str) -> None:
    result = run(files, "--trace", "t.json", *options)
    assert result.exit_code == 2 and words in result.output


def test_a_run_too_long_to_simulate_is_said(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, trace = files / "plan.json", files / "trace.json"
    run(files, "-o", str(output), "-q")
    monkeypatch.setattr(plan_output, "MAX_SPANS", 10)
    result = run(files, "--evaluate", str(output), "--trace", str(trace))
    assert result.exit_code == 2 and "--workload" in result.output and not trace.exists()
