"""Corrected profiles: factors from synthetic reports whose truth is known, and the command."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llmpq.artifact import write_json
from llmpq.cli.profile import main
from llmpq.cluster import Cluster
from llmpq.costs.corrected_rows import base_of, corrected_rows
from llmpq.costs.latency import device_times
from llmpq.costs.recalibrate import (
    CALL,
    HEAD,
    correction,
    parts_s,
    predicted_s,
    stage_calls,
    total_error,
)
from llmpq.model_lookup import spec_from_config
from llmpq.plan_data import Plan, Predicted, PredictedStage, load_plan
from llmpq.profile_data import Profile, ProfiledDevice, ProfileRow, load_profiles
from llmpq.run_report import MeasuredTime, Report, StageReport
from llmpq.runtime.stopwatch import MAX_KINDS, TIME_COLUMNS, Stopwatch, measured_times

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
SPEC = spec_from_config(CONFIG, name="tiny")
LAYER_MS = {"16": 2.0, "8": 1.5, "4": 1.0}
ROLES = {"quick": 2.0, "slow": 5.0}


def row(phase: Any, precision: str, batch: int, length: int, ms: float) -> ProfileRow:
    decode = phase.endswith("decode")
    return ProfileRow(
        model_key=SPEC.model_key,
        precision=precision,
        phase=phase,
        micro_batch=batch,
        prompt_tokens=0 if decode else length,
        past_tokens=length if decode else 0,
        time_ms=ms,
        time_ms_p10=0.9 * ms,
        time_ms_p90=1.1 * ms,
        num_samples=5,
    )


def profile(kind: str = "cpu", factor: float = 1.0) -> Profile:
    rows = []
    for batch in (1, 2, 4, 8):
        for length in (16, 64):
            for precision, ms in LAYER_MS.items():
                prefill = factor * ms * batch * (length + 8) / 16
                decode = factor * ms * (1 + batch / 4 + length * batch / 500)
                rows.append(row("prefill", precision, batch, length, prefill))
                rows.append(row("decode", precision, batch, length, decode))
            rows.append(row("stage_prefill", "16", batch, length, factor * (0.5 + 0.1 * batch)))
            rows.append(row("stage_decode", "16", batch, length, factor * 0.4))
            rows.append(row("embedding", "16", batch, length, factor * 0.01 * batch * length))
        rows.append(row("embedding", "16", batch, 1, factor * 0.02 * batch))
        rows.append(row("head", "16", batch, 0, factor * (0.5 + 0.2 * batch)))
    device = ProfiledDevice(name="a CPU", type=kind, memory_bytes=10**9, num_threads=1)
    return Profile(device=device, rows=rows)


def cluster(**roles: float) -> Cluster:
    roles = roles or ROLES
    nodes = [{"name": "here", "devices": [{"type": name} for name in roles]}]
    rehearse = {name: {"slowdown": s, "memory_mib": 100} for name, s in roles.items()}
    return Cluster.model_validate({"nodes": nodes, "rehearse": rehearse})


def plan_of(stages: list[tuple[str, list[str]]], where: Cluster | None = None) -> Plan:
    """Stages as (device type, precisions)."""
    made, first = [], 0
    for rank, (name, precisions) in enumerate(stages):
        end = first + len(precisions)
        place = {"rank": rank, "node": "here", "devices": [name]}
        made.append(place | {"first_layer": first, "end_layer": end, "precisions": precisions})
        first = end
    workload = {"prompt_tokens": 32, "new_tokens": 9, "num_requests": 8, "batch": 8}
    return Plan.model_validate(
        {
            "model": SPEC.model_copy(update={"num_layers": first}).model_dump(),
            "workload": workload,
            "cluster": (where or cluster()).model_dump(),
            "method": "hand",
            "batch": 8,
            "prefill_micro_batch": 2,
            "decode_micro_batch": 4,
            "stages": made,
        }
    )


Truth = dict[tuple[str, str, str], float]  # (device type, part, phase) -> factor


def measured_report(plan: Plan, truth: Truth, noise: float = 0.0) -> Report:
    """What a run would measure if the CPU profile were off by these factors."""
    stages = []
    for rank, stage in enumerate(plan.stages):
        name = stage.devices[0]
        times = device_times(plan.cluster, name, plan.model, [profile()])
        calls = []
        for number, (phase, size, tokens, count) in enumerate(
            [("prefill", 2, 32, 4), ("decode", 4, 32, 8), ("decode", 4, 48, 8)]
        ):
            layer = times.prefill_s if phase == "prefill" else times.decode_s
            call = times.stage_prefill_s if phase == "prefill" else times.stage_decode_s
            seconds = truth.get((name, CALL, phase), 1.0) * float(call(size, tokens))
            for p, n in Counter(stage.precisions).items():
                seconds += n * truth.get((name, p, phase), 1.0) * float(layer(p, size, tokens))
            if rank == 0:
                seconds += float(times.embedding_s(size, tokens if phase == "prefill" else 1))
            if rank == len(plan.stages) - 1:
                seconds += truth.get((name, HEAD, ""), 1.0) * float(times.head_s(size))
            seconds *= 1 + noise * (-1) ** (number + rank)
            calls.append(
                MeasuredTime(
                    phase=phase,  # type: ignore[arg-type]
                    micro_batch=size,
                    tokens=tokens,
                    count=count,
                    total_s=count * seconds,
                    median_s=seconds,
                )
            )
        stages.append(
            StageReport(
                rank=rank,
                busy_prefill_s=1,
                busy_decode_s=1,
                idle_s=0,
                comm_s=0,
                peak_memory_bytes=1,
                load_s=0,
                measured=calls,
            )
        )
    return Report(
        tokens_per_s=1,
        prefill_s=1,
        decode_s=1,
        total_s=2,
        load_s=0,
        num_requests=8,
        num_new_tokens=72,
        stages=stages,
        predicted=plan.predicted,
        plan=plan,
        error_percent=0.0,
    )


def found_of(name: str, plans: list[Plan], truth: Truth, noise: float = 0.0):
    """(correction, times, calls) of a device type from runs of these plans."""
    reports = [(measured_report(plan, truth, noise), plan) for plan in plans]
    calls = [one for one in stage_calls(reports) if one.device_type == name]
    times = device_times(plans[0].cluster, name, SPEC, [profile()])
    return correction(name, times, calls), times, calls


def everywhere(name: str, factor: float) -> Truth:
    parts = [*LAYER_MS, CALL]
    return {(name, p, phase): factor for p in parts for phase in ("prefill", "decode")} | {
        (name, HEAD, ""): factor
    }


# ---- the factors


def test_no_calls_leave_everything_as_it_is():
    times = device_times(cluster(), "slow", SPEC, [profile()])
    found = correction("slow", times, [])
    assert found.factors == ()
    assert found.of(("16", "prefill")) == pytest.approx(1)
    assert found.of((HEAD, "")) == pytest.approx(1)


def test_one_wrong_factor_is_found_from_one_run():
    plan = plan_of([("quick", ["16"] * 3), ("slow", ["8"] * 3)])
    found, times, calls = found_of("slow", [plan], everywhere("slow", 1.4))
    assert all(factor.value == pytest.approx(1.4, rel=1e-3) for factor in found.factors)
    assert found.of(("4", "decode")) == pytest.approx(1.4, rel=1e-3)  # no stage held it
    assert found.of(("8", "prefill")) == pytest.approx(1.4, rel=1e-3)
    quick, *_ = found_of("quick", [plan], everywhere("slow", 1.4))
    assert all(factor.value == pytest.approx(1, rel=1e-3) for factor in quick.factors)
    for one in calls:
        parts = parts_s(times, one)
        assert found.seconds(parts, one.phase, one.micro_batch) == pytest.approx(one.seconds)


def test_precisions_are_told_apart_where_stages_mix_them_differently():
    truth: Truth = {("slow", "16", "prefill"): 0.6, ("slow", "4", "prefill"): 1.4}
    truth |= {("slow", "16", "decode"): 1.4, ("slow", "4", "decode"): 0.6}
    plans = [
        plan_of([("quick", ["8"] * 2), ("slow", ["16"] * 15 + ["4"] * 5), ("quick", ["8"])], TWO),
        plan_of([("quick", ["8"] * 2), ("slow", ["16"] * 2 + ["4"] * 18), ("quick", ["8"])], TWO),
        plan_of([("quick", ["8"] * 2), ("slow", ["4"] * 20), ("quick", ["8"])], TWO),
        plan_of([("quick", ["8"] * 2), ("slow", ["16"] * 20), ("quick", ["8"])], TWO),
    ]
    found, *_ = found_of("slow", plans, truth)
    for (_, precision, phase), factor in truth.items():
        assert found.of((precision, phase)) == pytest.approx(factor, rel=0.01)
    told = {f.part: f for f in found.factors}
    assert told["16", "prefill"].own and told["4", "decode"].own
    assert not told[CALL, "decode"].own  # a small part of a stage of 20 layers


TWO = Cluster.model_validate(
    {
        "nodes": [{"name": "here", "devices": [{"type": "quick", "count": 2}, {"type": "slow"}]}],
        "rehearse": {n: {"slowdown": s, "memory_mib": 100} for n, s in ROLES.items()},
    }
)


def test_several_reports_share_out_noise():
    plan = plan_of([("quick", ["16"] * 3), ("slow", ["8"] * 3)])
    found, _, calls = found_of("slow", [plan] * 3, everywhere("slow", 0.6), noise=0.02)
    assert len({one.report for one in calls}) == 3
    assert found.of(("8", "decode")) == pytest.approx(0.6, rel=0.03)
    assert 0 < max(factor.spread for factor in found.factors) < 0.03


def test_precisions_that_always_run_together_take_one_factor():
    plan = plan_of([("quick", ["16"] * 2), ("slow", ["8", "4", "8", "4"])])
    found, *_ = found_of("slow", [plan], everywhere("slow", 1.4))
    told = {f.part: f for f in found.factors}
    assert not told["8", "decode"].own and not told["4", "decode"].own
    assert told["8", "decode"].value == pytest.approx(1.4, rel=1e-2)
    assert told["4", "decode"].value == pytest.approx(1.4, rel=1e-2)


def test_a_wrong_slope_with_length_does_not_tell_layers_and_calls_apart():
    plan = plan_of([("quick", ["16"] * 3), ("slow", ["8"] * 3)])
    times = device_times(plan.cluster, "slow", SPEC, [profile()])
    report = measured_report(plan, {})
    flat = report.stages[1].measured[1].total_s
    calls = [
        m.model_copy(update={"total_s": flat}) if m.phase == "decode" else m
        for m in report.stages[1].measured
    ]
    stage = report.stages[1].model_copy(update={"measured": calls})
    report = report.model_copy(update={"stages": [report.stages[0], stage]})
    found = correction("slow", times, [c for c in stage_calls([(report, plan)]) if c.rank == 1])
    assert found.of(("8", "decode")) == pytest.approx(found.of((CALL, "decode")), rel=0.02)


# ---- profiles


def test_corrected_rows_predict_what_was_measured():
    plan = plan_of([("quick", ["16"] * 3), ("slow", ["8"] * 3)])
    found, times, calls = found_of("slow", [plan], everywhere("slow", 1.4))
    base = base_of(plan.cluster, "slow", SPEC, [profile()])
    assert base is not None and base.slowdown == 5
    rows = corrected_rows(base, times, found, calls, SPEC)
    own = profile("slow").model_copy(update={"rows": rows})
    after = device_times(plan.cluster, "slow", SPEC, [profile(), own])
    assert abs(total_error(times, calls)) > 0.25
    assert abs(total_error(after, calls)) < 0.01
    assert len(rows) >= len(base.rows)
    first, corrected = base.rows[0], rows[0]
    assert corrected.time_ms == pytest.approx(5 * 1.4 * first.time_ms, rel=1e-2)
    assert corrected.time_ms_p90 / corrected.time_ms == pytest.approx(1.1)


def test_a_device_without_any_profile_gets_the_spec_sheet_as_rows():
    nodes = [{"name": "here", "devices": [{"type": "t4-16g"}]}]
    here = Cluster.model_validate({"nodes": nodes})
    times = device_times(here, "t4-16g", SPEC, [])
    assert base_of(here, "t4-16g", SPEC, []) is None
    rows = corrected_rows(None, times, correction("t4-16g", times, []), [], SPEC)
    own = Profile(device=profile("t4-16g").device, rows=rows)
    after = device_times(here, "t4-16g", SPEC, [own])
    assert after.measured and set(after.precisions) == set(times.precisions)
    for size, tokens in ((1, 16), (8, 128), (4, 64)):
        expected = float(times.prefill_s("8", size, tokens))
        assert float(after.prefill_s("8", size, tokens)) == pytest.approx(expected, rel=0.05)
    assert float(after.head_s(4)) == pytest.approx(float(times.head_s(4)), rel=0.05)


# ---- what a run records


def test_a_stopwatch_tells_calls_by_kind():
    watch = Stopwatch()
    for past in (32, 33, 47, 48):
        watch.busy(False, 4, past, 0.5)
    watch.busy(True, 2, 32, 3.0)
    prefill, early, late = sorted(
        measured_times(watch.table()), key=lambda m: (m.phase != "prefill", m.tokens)
    )
    assert (prefill.phase, prefill.micro_batch, prefill.tokens, prefill.count) == (
        "prefill",
        2,
        32,
        1,
    )
    assert early.count == 3 and early.tokens == pytest.approx(112 / 3)
    assert late.count == 1 and late.total_s == late.median_s == 0.5
    assert watch.values() == (3.0, 2.0, 0.0, 0.0)


@pytest.mark.parametrize("sizes", [1, 400])
def test_a_table_of_calls_stays_short(sizes):
    watch = Stopwatch()
    for size in range(1, sizes + 1):
        for past in range(0, 5000, 7 if sizes == 1 else 1000):
            watch.busy(False, size, past, 0.1)
            watch.busy(True, size, past + 1, 0.1)
    table = watch.table()
    assert len(table) <= max(MAX_KINDS, 2 * sizes)
    assert all(len(line) == TIME_COLUMNS for line in table)
    assert sum(line[4] for line in table) == pytest.approx(
        watch.busy_prefill_s + watch.busy_decode_s
    )
    assert Stopwatch().table() == []


# ---- the command


def command(*words: object) -> Result:
    return CliRunner().invoke(main, ["recalibrate", *map(str, words)])


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """A report of a run on a slow device that is slower than its profile says."""
    plan = plan_of([("quick", ["16"] * 2), ("slow", ["16"] * 4)])
    times = [device_times(plan.cluster, n, SPEC, [profile()]) for n in ROLES]
    report = measured_report(plan, everywhere("slow", 2.0))
    calls = stage_calls([(report, plan)])
    steps = [predicted_s(times[c.rank], c) for c in calls if c.phase == "decode"]
    predicted = Predicted(
        total_s=1, prefill_s=0.5, decode_s=0.5, tokens_per_s=72, quality_loss_percent=0,
        sum_sensitivity=0, objective=1, lower_bound=0, gap=1, planning_s=0,
        stages=[
            PredictedStage(prefill_s=1, decode_step_s=steps[2 * rank], peak_memory_bytes=1,
                           memory_capacity_bytes=100 * 2**20, provenance="")
            for rank in range(2)
        ],
    )  # fmt: skip
    plan = plan.model_copy(update={"predicted": predicted})
    report = report.model_copy(update={"plan": plan, "predicted": predicted})
    paths = {"report": tmp_path / "report.json", "profiles": tmp_path / "profiles"}
    write_json(paths["report"], report)
    write_json(paths["profiles"] / "cpu.json", profile())
    write_json(tmp_path / "plan.json", plan)
    return paths | {"out": tmp_path / "fixed", "plan": tmp_path / "plan.json"}


def test_the_command_corrects_and_finds_a_better_plan(files, tmp_path):
    said = tmp_path / "said.json"
    known = ["--report", files["report"], "--profiles", files["profiles"]]
    done = command(*known, "-o", files["out"], "--json", said)
    assert done.exit_code == 0, done.output
    profiles = {p.device.type: p for p in load_profiles(files["out"])}
    assert set(profiles) == set(ROLES)
    assert "corrected by 1 run" in profiles["slow"].device.name
    value = json.loads(said.read_text())
    slow = [f for f in value["factors"] if f["device_type"] == "slow"]
    assert all(f["factor"] == pytest.approx(2, rel=0.02) for f in slow)
    for stage in value["stages"]:
        assert abs(stage["error_after_percent"]) < 1.5
        off = -50 if stage["device_type"] == "slow" else 0
        assert stage["error_before_percent"] == pytest.approx(off, abs=1.5)
    assert value["best_tokens_per_s"] > 1.2 * value["plan_tokens_per_s"]
    assert value["changes"]
    words = value["command"].split()
    assert words[0] == "llmpq-plan" and str(files["out"] / "cluster.yaml") in words


def test_the_command_it_prints_makes_the_plan_it_promises(files, tmp_path):
    from llmpq.cli.plan import main as plan_main

    said, model = tmp_path / "said.json", tmp_path / "config.json"
    model.write_text(json.dumps(CONFIG))
    known = ["--report", files["report"], "--profiles", files["profiles"]]
    assert command(*known, "-o", files["out"], "--json", said).exit_code == 0
    value = json.loads(said.read_text())
    words = value["command"].split()[1:]
    words[words.index("--model") + 1] = str(model)
    words[words.index("-o") + 1] = str(tmp_path / "new.json")
    done = CliRunner().invoke(plan_main, [*words, "--no-what-if", "--no-compare"])
    assert done.exit_code == 0, done.output
    predicted = load_plan(tmp_path / "new.json").predicted
    assert predicted is not None
    assert predicted.tokens_per_s == pytest.approx(value["best_tokens_per_s"], rel=0.02)


def test_nothing_to_correct_says_that_the_plan_stays(files):
    known = ["--profiles", files["profiles"], "-o", files["out"]]
    first = command("--report", files["report"], *known, "--time-limit", "2")
    assert "another plan is better" in first.output
    plan = plan_of([("quick", ["16"] * 4), ("slow", ["16"] * 2)])
    write_json(files["report"], measured_report(plan, {}))
    done = command("--report", files["report"], *known, "--max-quality-loss", "0")
    assert done.exit_code == 0, done.output
    assert "plan that ran, at corrected times" in done.output


def test_bad_input_is_one_message(files, tmp_path):
    old = json.loads(files["report"].read_text())
    old["plan"] = None
    stale = tmp_path / "old.json"
    stale.write_text(json.dumps(old))
    known = ["--profiles", files["profiles"], "-o", files["out"]]
    for words, part in (
        (["--report", stale, *known], "run again with this version"),
        (["--report", files["plan"], *known], "is of kind 'plan'; expected a report"),
        (
            ["--report", files["profiles"] / "cpu.json", *known],
            "of kind 'profile'; expected",
        ),
        (["--report", tmp_path / "none.json", *known], "no such file"),
        (["--report", files["report"], "-o", files["out"]], "has no profile of"),
        (["--report", files["report"], *known[:2], "-o", files["profiles"]], "need their own"),
    ):
        done = command(*words)
        assert done.exit_code == 2, (words, done.output)
        assert part in done.output.replace("\n", " ")
        assert "Traceback" not in done.output


def test_reports_of_other_models_and_other_slowdowns_do_not_mix(files, tmp_path):
    other = plan_of([("quick", ["16"] * 2), ("slow", ["16"] * 4)], cluster(quick=2.0, slow=6.0))
    path = tmp_path / "other.json"
    write_json(path, measured_report(other, {}))
    known = ["--profiles", files["profiles"], "-o", files["out"]]
    done = command("--report", path, files["report"], *known)
    assert done.exit_code == 2 and "rehearses slow 6 times slower" in done.output


def test_old_reports_can_still_be_read():
    plan = plan_of([("quick", ["16"] * 2), ("slow", ["16"] * 4)])
    value = measured_report(plan, {}).model_dump()
    del value["plan"]
    for stage in value["stages"]:
        del stage["measured"]
    assert Report.model_validate(value).stages[0].measured == []


@pytest.mark.parametrize("key", ["num_new_tokens", "num_requests", "total_s", "tokens_per_s"])
def test_numbers_below_zero_are_no_report(tmp_path, key):
    plan = plan_of([("quick", ["16"] * 2), ("slow", ["16"] * 4)])
    path = tmp_path / "report.json"
    value = measured_report(plan, {}).model_dump(mode="json") | {key: -1}
    path.write_text(json.dumps(value))
    done = command("--report", path, "-o", tmp_path / "out")
    assert done.exit_code == 2 and f"{key}: input should be greater" in done.output
