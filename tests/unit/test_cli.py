"""The commands as a user meets them: help, version, the umbrella, profiles that plans accept."""

import json
import shutil
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from llmpq import __version__
from llmpq.artifact import read_json
from llmpq.checkpoint.calibration_file import CalibrationFile, sha256_of, write_calibration
from llmpq.checkpoint.roundings import load_roundings
from llmpq.cli import eval as eval_module
from llmpq.cli import export, plan, profile, run
from llmpq.cli.main import COMMANDS
from llmpq.cli.main import main as umbrella
from llmpq.plan_data import load_plan
from llmpq.profile_data import Profile, Sensitivity, load_sensitivity
from llmpq.quantizer import Quantizer

MAINS = {
    "profile": profile.main,
    "plan": plan.main,
    "run": run.main,
    "eval": eval_module.main,
    "export": export.main,
}


def call(command: click.Command, *arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_umbrella_holds_the_same_commands(name):
    through = call(umbrella, name, "--help")
    direct = call(MAINS[name], "--help")
    assert through.exit_code == direct.exit_code == 0
    assert through.stdout.splitlines()[1:] == direct.stdout.splitlines()[1:]
    assert f"Usage: main {name}" in through.stdout


def test_the_umbrella_refuses_what_it_does_not_know():
    result = call(umbrella, "plam")
    assert result.exit_code == 2 and "plam" in result.stderr


@pytest.mark.parametrize("command", [umbrella, *MAINS.values()])
def test_version(command):
    result = call(command, "--version")
    assert result.exit_code == 0
    assert __version__ in result.stdout


def test_export_names_a_plan_that_is_not_there():
    result = call(export.main, "vllm", "--plan", "p.json", "--output", "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: p.json: no such file")


def test_devices_lists_the_library_as_json():
    result = call(profile.main, "devices", "--json", "-")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["here"][0]["memory_gib"] > 0
    assert "t4-16g" in data["library"]


def small_files(folder: Path) -> tuple[Path, Path]:
    """A cluster of one T4, and a workload."""
    cluster, workload = folder / "cluster.yaml", folder / "workload.yaml"
    cluster.write_text("nodes: [{name: a, devices: [{type: t4-16g}]}]\n")
    workload.write_text("{prompt_tokens: 16, new_tokens: 8, num_requests: 8}\n")
    return cluster, workload


def test_a_report_goes_to_standard_output_and_notes_do_not(tmp_path):
    cluster, workload = small_files(tmp_path)
    files = ("--cluster", cluster, "--workload", workload)
    result = call(plan.main, *files)
    assert result.exit_code == 0, result.stderr
    assert "tokens/s" in result.stdout and "start: llmpq-run" in result.stdout
    assert "note:" not in result.stdout
    lines = result.stderr.splitlines()
    assert lines[0].startswith("note: times of t4-16g come from spec sheets")
    assert "tokens/s" not in result.stderr
    both = call(plan.main, *files, "--json", "-")
    assert json.loads(both.stdout)["kind"] == "plan" and "start: llmpq-run" in both.stderr
    quiet = call(plan.main, *files, "-q")
    assert quiet.exit_code == 0 and not quiet.stdout and not quiet.stderr
    devices = call(profile.main, "devices")
    assert "t4-16g" in devices.stdout and not devices.stderr


@pytest.fixture(scope="module")
def profiles(tmp_path_factory) -> Path:
    """A folder with a profile on a tiny grid, and the same figures as another device type."""
    folder = tmp_path_factory.mktemp("profiles")
    path = folder / "fast.json"
    result = call(
        profile.main,
        *("layers", "--model", "tiny-tales", "--type", "fast", "--device", "cpu"),
        *("--threads", 1, "--precisions", "16,4", "--budget-s", 25),
        *("--prefill-micro-batches", "1,2", "--decode-micro-batches", "1,4"),
        *("--prompt-tokens", "8,16", "--past-tokens", "8,24", "-o", path, "-q"),
    )
    assert result.exit_code == 0, (result.stderr, result.exception)
    text = path.read_text()
    (folder / "slow.json").write_text(text.replace('"type": "fast"', '"type": "slow"'))
    return folder


def test_a_profile_holds_every_cell_of_its_grid(profiles):
    measured = read_json(profiles / "fast.json", Profile)
    assert measured.device.type == "fast" and measured.device.num_threads == 1
    assert {row.model_key for row in measured.rows} == {"llama-h192-f384-a6-kv3-d32-v1536"}
    layers = [r for r in measured.rows if r.phase in ("prefill", "decode")]
    cells = {(r.precision, r.phase, r.micro_batch, r.prompt_tokens, r.past_tokens) for r in layers}
    prefills = {(p, "prefill", b, n, 0) for p in ("16", "4") for b in (1, 2) for n in (8, 16)}
    decodes = {(p, "decode", b, 0, n) for p in ("16", "4") for b in (1, 4) for n in (8, 24)}
    assert cells == prefills | decodes and len(layers) == len(cells)
    assert {"embedding", "head"} < {row.phase for row in measured.rows}
    assert all(r.time_ms_p10 <= r.time_ms <= r.time_ms_p90 for r in measured.rows)


def test_a_plan_is_made_from_profiles_for_a_rehearsed_cluster(profiles, tmp_path):
    cluster, workload = tmp_path / "cluster.yaml", tmp_path / "workload.yaml"
    nodes = [{"name": "laptop", "devices": [{"type": "fast"}, {"type": "slow"}]}]
    # 5.6 MiB at 16 bits: two devices are needed, or fewer bits.
    rehearse = {
        "fast": {"slowdown": 2, "memory_mib": 4.5},
        "slow": {"slowdown": 4, "memory_mib": 4.5},
    }
    cluster.write_text(yaml.safe_dump({"nodes": nodes, "rehearse": rehearse}))
    sizes = {"prompt_tokens": 16, "new_tokens": 8, "num_requests": 8, "batch": 4}
    workload.write_text(yaml.safe_dump(sizes))
    result = call(
        plan.main,
        *("--cluster", cluster, "--workload", workload, "--profiles", profiles),
        *("--max-quality-loss", 100, "-o", tmp_path / "plan.json"),
    )
    assert result.exit_code == 0, result.stderr
    made = load_plan(tmp_path / "plan.json")
    assert set(made.precisions) <= {"16", "4"}
    assert made.predicted is not None and made.predicted.tokens_per_s > 0
    for stage in made.predicted.stages:
        assert stage.peak_memory_bytes <= stage.memory_capacity_bytes
        assert "profile" in stage.provenance or "measured" in stage.provenance
    assert "spec sheets" not in result.stderr


def sensitivity(path: Path, *more) -> Sensitivity:
    """What one window of the shipped text says of the shipped model."""
    result = call(
        profile.main,
        *("sensitivity", "--max-windows", 1, "--precisions", "16,4,3", *more),
        *("-o", path, "-q"),
    )
    assert result.exit_code == 0, (result.stderr, result.exception)
    return load_sensitivity(path)


GPTQ = ("--quantizer", "gptq")


@pytest.fixture(scope="module")
def measured_folder(tmp_path_factory):
    """A folder with a sensitivity by gptq and the second moments it was measured with."""
    folder = tmp_path_factory.mktemp("measured")
    sensitivity(folder / "sensitivity.json", *GPTQ, "--moment-tokens", 2048)
    return folder


def test_sensitivity_of_the_shipped_model(measured_folder):
    measured = load_sensitivity(measured_folder / "sensitivity.json")
    assert measured.num_layers == 8 and measured.calibration.num_tokens == 256
    assert {(r.layer, r.precision) for r in measured.layers} == {
        (layer, p) for layer in range(8) for p in ("4", "3")
    }
    table = measured.table()
    assert sum(table["3"]) > sum(table["4"]) > 0
    assert measured.fit.upper_scale >= measured.fit.scale > 0
    assert measured.indicator == "measured" and measured.method == "fast"
    assert measured.seconds > 0 and measured.peak_memory_bytes > 0


def test_second_moments_are_kept_and_used_again(measured_folder, tmp_path):
    shutil.copytree(measured_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "sensitivity.moments.safetensors"
    first = load_sensitivity(tmp_path / "sensitivity.json")
    assert first.quantizer.moments == path.name
    assert first.quantizer.sha256 == sha256_of(path)
    made = path.stat().st_mtime_ns
    more = (*GPTQ, "--moments", path)
    again = sensitivity(tmp_path / "deeper" / "again.json", *more)
    assert path.stat().st_mtime_ns == made
    assert again.quantizer.moments == f"../{path.name}"
    assert again.layers == first.layers
    sensitivity(tmp_path / "again.json", *more, "--remake-moments", "--moment-tokens", 256)
    assert path.stat().st_mtime_ns != made
    assert CalibrationFile(path).about["tokens"] == "256"


def test_second_moments_of_another_model_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    write_calibration(path, {}, {}, {"model": "another"})
    result = call(profile.main, "sensitivity", "--moments", path, "-o", tmp_path / "s.json")
    assert result.exit_code == 2
    assert "another" in result.stderr and "--remake-moments" in result.stderr
    result = call(profile.main, "sensitivity", "--moments", path, "--quantizer", "rtn")
    assert result.exit_code == 2 and "take no calibration statistics" in result.stderr


@pytest.mark.parametrize("indicator", ["variance", "hessian", "random"])
def test_other_indicators(tmp_path, indicator):
    more = ("--indicator", indicator, "--quantizer", "rtn", "--apart")
    found = sensitivity(tmp_path / "sensitivity.json", *more)
    assert found.indicator == indicator and found.quantizer == Quantizer()
    assert {r.part for r in found.layers} == {"layer", "attention", "ffn"}
    assert len(found.layers) == 3 * 2 * 8 and found.fit.scale > 0
    assert not list(tmp_path.glob("*.safetensors"))


def test_one_window_cannot_be_split(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little dog. The dog was happy. " * 3)
    words = ("sensitivity", "--text", text, "--window", 32, "-o", tmp_path / "s.json", "-q")
    result = call(profile.main, *words, "--quantizer", "gptq")
    assert result.exit_code == 2 and "--quantizer rtn" in result.stderr
    result = call(profile.main, *words, "--quantizer", "rtn", "--precisions", "16,4")
    assert result.exit_code == 0, (result.stderr, result.exception)


def test_a_plan_finds_the_moments_of_its_sensitivity(measured_folder, tmp_path):
    shutil.copytree(measured_folder, tmp_path, dirs_exist_ok=True)
    measured = load_sensitivity(tmp_path / "sensitivity.json")
    workload = tmp_path / "workload.yaml"
    sizes = {"prompt_tokens": 16, "new_tokens": 8, "num_requests": 8, "batch": 4}
    workload.write_text(yaml.safe_dump(sizes))
    cluster = tmp_path / "cluster.yaml"
    nodes = [{"name": "a", "devices": [{"type": "t4-16g"}]}]
    cluster.write_text(yaml.safe_dump({"nodes": nodes}))
    result = call(
        plan.main,
        *("--cluster", cluster, "--workload", workload),
        *("--sensitivity", tmp_path / "sensitivity.json", "-o", tmp_path / "plans" / "plan.json"),
    )
    assert result.exit_code == 0, result.stderr
    made = load_plan(tmp_path / "plans" / "plan.json")
    assert made.quantizer.sha256 == measured.quantizer.sha256
    load_roundings(made.quantizer, base=tmp_path / "plans" / "plan.json")  # raises if not found
    assert "gptq weights" in result.stdout


def test_perplexities_as_json(tmp_path):
    text = tmp_path / "story.txt"
    text.write_text("Once upon a time there was a little dog. The dog was happy. " * 20)
    result = call(
        eval_module.main,
        *("--precisions", "16,3", "--text", text, "--window", 32, "--max-windows", 2),
        *("--json", "-", "-q"),
    )
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [row["name"] for row in rows] == ["uniform-16", "uniform-3"]
    assert all(row["num_tokens"] == 2 * 31 and row["perplexity"] > 1 for row in rows)
    assert rows[1]["weight_bytes"] < 0.5 * rows[0]["weight_bytes"]
