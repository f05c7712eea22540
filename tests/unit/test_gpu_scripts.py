"""The scripts that measure a card: shares of time, ending steps, targets, the report.

Every number here is made up. Nothing of it was measured on a card.
"""

import json
import sys
import textwrap
import time
from pathlib import Path

import gpu_environment
import gpu_parts
import gpu_report
import pytest
from _kernels_checks import (
    FEW_ROWS,
    LARGE,
    MANY_ROWS,
    NO_CARD,
    NOT_MEASURED,
    OTHER_CARD,
    linear_checks,
    prediction_checks,
    serving_checks,
    token_checks,
)

ROOT = Path(__file__).resolve().parents[2]
CARD = {"name": "Made-up H100", "driver": "1.2", "memory_mib": "81559"}


# ---- time


def test_later_steps_keep_what_they_need():
    first, second = gpu_parts.Slot("a", 20, 90), gpu_parts.Slot("b", 50, 100)
    slots = [first, second]
    assert gpu_parts.limit_s(slots, 0, 200) == 90  # no more than it may take
    assert gpu_parts.limit_s(slots, 0, 100) == 50  # what the second leaves
    assert gpu_parts.limit_s(slots, 0, 60) == 20  # its own least comes before
    assert gpu_parts.limit_s(slots, 1, 30) == 30  # all that is left


@pytest.mark.parametrize("part", gpu_parts.PARTS)
@pytest.mark.parametrize("total", [120.0, 290.0])
def test_no_part_takes_more_than_there_is(part, total):
    left = total
    for number in range(len(gpu_parts.PARTS[part])):
        seconds = gpu_parts.limit_s(gpu_parts.PARTS[part], number, left)
        assert 0 <= seconds <= left
        left -= seconds


def test_parts_and_steps_may_be_asked_for_by_name():
    assert [slot.name for slot in gpu_parts.slots_of(["1"])] == ["kernels", "serving", "tests"]
    (alone,) = gpu_parts.slots_of(["cluster"])
    assert gpu_parts.limit_s([alone], 0, 250) == 250
    with pytest.raises(ValueError, match="profile: expected 1, 2, trial or a step: kernels"):
        gpu_parts.slots_of(["profile"])


# ---- steps


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Starts steps that do what a text of Python says; all are ended."""
    (tmp_path / "scripts").mkdir()
    monkeypatch.setattr(gpu_parts, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_parts, "LEAST_S", 0.1)
    steps = []

    def start(code: str, name: str = "made-up") -> gpu_parts.StepProcess:
        head = "import os, pathlib, subprocess, sys, time\nturn = sys.stdin.readline()\n"
        (tmp_path / "scripts" / "gpu_steps.py").write_text(head + textwrap.dedent(code))
        steps.append(gpu_parts.StepProcess(name, tmp_path, tmp_path, "cpu"))
        return steps[-1]

    yield start
    for step in steps:
        step.end()


def test_a_step_is_told_to_end_before_it_is_ended(started, tmp_path):
    step = started(f"pathlib.Path({str(tmp_path)!r}, 'told').write_text(turn)")
    outcome = step.run(100.0)
    assert (outcome.code, outcome.note) == (0, "")
    assert 80 < float((tmp_path / "told").read_text()) < 100


def test_a_step_out_of_time_is_ended_with_what_it_started(started, tmp_path):
    child = tmp_path / "child"
    step = started(
        f"""
        process = subprocess.Popen(["sleep", "600"])
        pathlib.Path({str(child)!r}).write_text(str(process.pid))
        time.sleep(600)
        """
    )
    started_at = time.monotonic()
    outcome = step.run(10.0)  # enough to start the child on a busy machine
    assert (outcome.code, outcome.note) == (-9, "its time was over")
    assert time.monotonic() - started_at < 300  # the step itself takes 600
    deadline = time.monotonic() + 240
    while _runs(int(child.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(int(child.read_text()))


def _runs(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_failing_step_stops_no_other_and_each_is_recorded(started, tmp_path):
    code = "sys.exit(3 * (sys.argv[1] == 'first'))"
    first, second = (started(code, name) for name in ("first", "second"))
    found = {"device": "cpu", "card": None, "cpu": "made up"}
    path = tmp_path / "run.json"
    slots = [gpu_parts.Slot("first", 1, 60), gpu_parts.Slot("second", 1, 60)]
    until = time.monotonic() + 100
    gpu_parts.run_steps(
        slots, [first, second], until, lambda o: gpu_parts.write_run(path, found, o)
    )
    told = json.loads(path.read_text())["steps"]
    assert {name: step["code"] for name, step in told.items()} == {"first": 3, "second": 0}


def test_a_trial_runs_steps_at_the_same_time_but_after_those_they_need(started, tmp_path):
    """The first two wait for each other; the last needs a file of the second."""
    folder = repr(str(tmp_path))
    code = f"""
        name, folder = sys.argv[1], pathlib.Path({folder})
        wanted = {{"tests": "predictions", "predictions": "tests", "cluster": "result"}}[name]
        (folder / name).touch()
        until = time.monotonic() + (0 if name == "cluster" else 60)
        while not (folder / wanted).exists():
            if time.monotonic() > until:
                sys.exit(1)
            time.sleep(0.01)
        if name == "predictions":
            time.sleep(0.2)
            (folder / "result").touch()
        """
    steps = [started(code, name) for name in ("tests", "predictions", "cluster")]
    recorded = []
    outcomes = gpu_parts.run_at_once(
        steps, time.monotonic() + 90, lambda o: recorded.append(len(o))
    )
    assert {outcome.name: outcome.code for outcome in outcomes} == {
        "tests": 0,
        "predictions": 0,
        "cluster": 0,
    }
    assert recorded == [1, 2, 3] and outcomes[-1].name == "cluster"


def test_steps_of_another_machine_are_forgotten(tmp_path):
    path = tmp_path / "run.json"
    here = {"device": "cuda", "card": CARD, "cpu": "one"}
    done = gpu_parts.Outcome("kernels", 0, 1.0, 2.0)
    gpu_parts.write_run(path, here, [done])
    gpu_parts.write_run(path, here, [gpu_parts.Outcome("tests", 1, 1.0, 2.0)])
    assert set(json.loads(path.read_text())["steps"]) == {"kernels", "tests"}
    gpu_parts.write_run(path, here | {"card": {"name": "another"}}, [done])
    assert set(json.loads(path.read_text())["steps"]) == {"kernels"}


def test_what_lacks_is_said_before_anything_starts():
    libraries = dict.fromkeys(gpu_environment.LIBRARIES, "1.0") | {"transformers": None}
    found = {"device": "cuda", "sees_cuda": False, "libraries": libraries}
    assert [fault.split(" (")[0] for fault in gpu_environment.missing(found)] == [
        "missing: transformers",
        "missing: a card that torch sees",
    ]
    assert gpu_environment.missing(found | {"device": "cpu"}) == ["missing: transformers"]


# ---- targets


def linear(precision: str, rows: int, share: float, ratio: float, shape=LARGE) -> dict:
    return {
        "kind": "linear",
        "precision": precision,
        "layer": "MadeUpLinear",
        "out_features": shape[0],
        "in_features": shape[1],
        "rows": rows,
        "share_of_copy": share,
        "against_plain": ratio,
        "error": 0.002,
    }


def by_name(checks, words: str):
    (check,) = [check for check in checks if words in check.name]
    return check


def test_shares_are_judged_by_the_least_of_few_rows():
    rows = [
        linear("4", n, share, 1.0) for n, share in zip(FEW_ROWS, (0.7, 0.63, 0.66), strict=True)
    ]
    check = by_name(linear_checks(rows), "4 bits, bytes")
    assert (check.value, check.holds) == (0.63, True)
    rows[1]["share_of_copy"] = 0.61
    assert by_name(linear_checks(rows), "4 bits, bytes").holds is False
    assert by_name(linear_checks(rows[:2]), "4 bits, bytes").holds is None  # 16 rows are missing


def test_ratios_are_judged_at_many_rows_of_the_largest_matrix():
    rows = [linear("3", MANY_ROWS, 0.1, 0.96), linear("3", MANY_ROWS, 0.1, 0.2, (64, 64))]
    check = by_name(linear_checks(rows), "3 bits, speed")
    assert (check.value, check.holds) == (0.96, True)
    other = by_name(linear_checks(rows), "8 bits, speed")
    assert (other.holds, other.why) == (None, NOT_MEASURED)


def served(precision: str, tokens_per_s: float, error: float = 10.0) -> dict:
    return {
        "kind": "serving",
        "precision": precision,
        "tokens_per_s": tokens_per_s,
        "first_tokens_per_s": tokens_per_s / 2,
        "prefill_tokens_per_s": 1000.0,
        "prefill_share_of_matmul": 0.6,
        "decode_step_ms": 5.0,
        "decode_rows": 32,
        "load_s": 3.0,
        "peak_memory_bytes": 2**34,
        "predicted_tokens_per_s": tokens_per_s * 1.1,
        "error_percent": error,
        "plan": {"long": "text"},
    }


THEIRS = {"kind": "transformers", "tokens_per_s": 400.0, "total_s": 10.0}


def test_tokens_a_second_are_a_target_of_cards_like_an_h100_alone():
    rows = [served("16", 3400.0), THEIRS]
    checks = serving_checks(rows, "NVIDIA H100 80GB HBM3")
    assert [check.holds for check in checks] == [False, None, True, True]
    assert checks[1].why == NOT_MEASURED
    on_another = serving_checks(rows, "NVIDIA T4")
    assert (on_another[0].holds, on_another[0].why) == (None, OTHER_CARD)
    assert on_another[2].value == pytest.approx(8.5)


def test_the_worst_prediction_counts_whatever_its_sign():
    rows = [served("16", 1.0, error=20.0), served("4", 1.0, error=-31.0)]
    sheet, profile = prediction_checks(rows, [])
    assert (sheet.value, sheet.holds) == (-31.0, False)
    assert (profile.holds, profile.why) == (None, NOT_MEASURED)


def test_tokens_that_were_not_compared_are_not_judged():
    checks = token_checks({"a": True, "b": False, "c": None})
    assert [check.holds for check in checks] == [True, False, None]


# ---- the report


@pytest.fixture
def out(tmp_path) -> Path:
    """What scripts/gpu.sh might leave, made up."""
    environment = {
        "device": "cuda",
        "card": CARD,
        "cpu": "made up",
        "python": "3.12.0",
        "libraries": dict.fromkeys(gpu_environment.LIBRARIES, "9.9") | {"triton": None},
        "commit": "abc1234",
        "date": "2001-02-03",
    }
    steps = {
        name: {"code": 0, "seconds": 10.0, "note": ""} for name in ("kernels", "serving", "tests")
    } | {"cluster": {"code": None, "seconds": 0.0, "note": "no time was left"}}
    kernels = [linear("4", rows, 0.7, 2.5) for rows in FEW_ROWS] + [linear("4", 2048, 0.1, 0.9)]
    tests = [
        {"kind": "test", "name": "t.py::test_stages_that_share_the_card", "outcome": "passed"},
        {"kind": "test", "name": "t.py::test_graphs[a]", "outcome": "passed"},
        {"kind": "test", "name": "t.py::test_graphs[b]", "outcome": "failed", "why": "made up"},
    ]
    results = {
        "run": {"environment": environment, "steps": steps},
        "kernels": {
            "rows": kernels,
            "failures": [],
            "ceilings": {"copy_gb_per_s": 3000.0, "matmul_tflops": 700.0},
        },
        "serving": {
            "rows": [served("16", 3600.0), THEIRS],
            "failures": ["3 bits: RuntimeError: made up"],
            "device_type": "h100-80g",
        },
        "tests": {"rows": tests, "failures": ["pytest: TESTS_FAILED"]},
        "predictions": {"rows": [{"kind": "prediction", "of": "another call"}], "failures": []},
    }
    for name, data in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    return tmp_path


def test_the_report_gathers_what_steps_left(out):
    report = gpu_report.gather(out)
    assert gpu_report.file_name(report) == "h100-80g-2001-02-03"
    assert "plan" not in report["serving"][0]
    assert report["predictions"] == []  # a step that this run has not done
    held = {check["name"]: check["holds"] for check in report["checks"]}
    assert held["5: 28672 x 8192, 4 bits, bytes a second at 1 to 16 rows (least)"] is True
    assert held["5: 28672 x 8192, 4 bits, speed at 2048 rows"] is False
    assert held["6: Llama-3.1-8B served at 16 bits"] is True
    assert held["8: captured graphs and single launches give equal tokens"] is False
    assert held["8: one process and several on the card give equal tokens"] is True
    assert held["8: llmpq-run and transformers give equal tokens"] is None


def test_the_table_says_where_its_numbers_come_from(out):
    text = gpu_report.markdown(gpu_report.gather(out))
    for words in (
        "# Made-up H100, 2001-02-03",
        "commit abc1234; driver 1.2; torch 9.9, triton absent",
        "a copy reached 3,000 GB/s",
        "| 28672 x 8192 | 4 | MadeUpLinear | 70 % / 2.50x |",
        "| transformers, 16 bits | 400 |",
        "2 passed, 1 failed, 0 skipped.",
        "- failed: `t.py::test_graphs[b]`",
        "| cluster | did not run no time was left | 0 |",
        "- serving: 3 bits: RuntimeError: made up",
    ):
        assert words in text
    assert "mixed cluster" not in text  # no rows, no section


def test_a_cpu_stands_for_no_card(out, monkeypatch, capsys):
    run = json.loads((out / "run.json").read_text())
    run["environment"] |= {"device": "cpu", "card": None}
    (out / "run.json").write_text(json.dumps(run))
    report = gpu_report.gather(out)
    assert {(check["holds"], check["why"]) for check in report["checks"]} == {(None, NO_CARD)}
    assert "no number here says anything about one" in gpu_report.markdown(report)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(out)])
    assert gpu_report.main() == 2
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(out), "-o", str(out / "there")])
    assert gpu_report.main() == 0
    written = {path.name for path in (out / "there").iterdir()}
    assert written == {"cpu-2001-02-03.json", "cpu-2001-02-03.md"}


def test_a_folder_without_a_run_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(tmp_path)])
    assert gpu_report.main() == 2
    assert "run.json: cannot be read" in capsys.readouterr().err


# ---- all of it
