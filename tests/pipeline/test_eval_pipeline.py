"""Evaluation end to end: three ways to one perplexity, what a run served, lm-eval's own model."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from families import CPU, MAX_NEW, TINY_TALES, hand_made_plan
from jobs import PATIENCE_S

from llmpq.artifact import write_json
from llmpq.checkpoint.calibration_file import sha256_of, write_calibration
from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.cli.eval import main as eval_command
from llmpq.cli.run import main as run_command
from llmpq.evaluation.calibration import CalibrationMeter
from llmpq.evaluation.harness import harness_model, run_tasks
from llmpq.evaluation.perplexity import evaluate, load_stages, text_windows
from llmpq.evaluation.scorer import Scorer
from llmpq.evaluation.tasks import load_tasks
from llmpq.model_lookup import load_model_spec
from llmpq.model_spec import ASSETS
from llmpq.models.stage_model import load_config
from llmpq.prompts.tokenizer import load_tokenizer
from llmpq.quantizer import Quantizer

MIXED = ["4", "16", "8", "3", "3", "8", "4", "16"]
PROMPTS = ASSETS / "prompts.jsonl"
TEXT = ASSETS / "evaluation.txt"


def write_plan(path, ends, precisions=MIXED, **more):
    plan = hand_made_plan(load_model_spec(str(TINY_TALES)), ends, precisions, prompt=48, new=8)
    write_json(path, plan.model_copy(update=more))
    return path


def evaluated(*arguments):
    """The rows that `llmpq-eval` gives in this process."""
    command = [*map(str, arguments), "--json", "-", "-q"]
    result = CliRunner().invoke(eval_command, command)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)["rows"]


def start(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    """Second moments of the shipped model on a little of the calibration text."""
    path = tmp_path_factory.mktemp("moments") / "m.safetensors"
    config, weights = load_config(TINY_TALES), Checkpoint(TINY_TALES)
    [stage] = load_stages(config, weights, [(0, 8)], ["16"] * 8, torch.float32, CPU)
    windows = text_windows(ASSETS / "calibration.txt", load_tokenizer(TINY_TALES), 256, 4)
    with CalibrationMeter(stage) as meter:
        evaluate([stage], windows)
    write_calibration(path, meter.statistics(), meter.keys, {"model": "tiny-tales"})
    return path


# ---- perplexity


def test_stage_by_stage_and_layer_by_layer_agree(tmp_path):
    plan = write_plan(tmp_path / "plan.json", [2, 4, 7, 8])
    more = [plan, "--window", 128, "--precisions", "16,3"]
    stages, streamed = evaluated(*more), evaluated(*more, "--stream")
    assert [row["name"] for row in stages] == [str(plan), "uniform-16", "uniform-3"]
    for one, other in zip(stages, streamed, strict=True):
        assert one["name"] == other["name"] and one["num_tokens"] == other["num_tokens"]
        assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-4)
    assert len(stages[0]["weights_sha256"]) == 4
    assert streamed[1]["divergence"] == 0 < streamed[0]["divergence"] < streamed[2]["divergence"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_stage_processes_give_the_same(tmp_path):
    plan, found = write_plan(tmp_path / "plan.json", [2, 7, 8]), tmp_path / "found.json"
    asked = [plan, "--window", "128", "--max-windows", "9"]
    start("llmpq.cli.eval", *asked, "--processes", "--json", found)
    [one], [other] = json.loads(found.read_text())["rows"], evaluated(*asked)
    assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-4)
    assert one["weights_sha256"] == other["weights_sha256"]
    assert (one["num_tokens"], one["weight_bytes"]) == (other["num_tokens"], other["weight_bytes"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_served_is_what_is_evaluated_by_gptq(tmp_path, moments):
    """Under torchrun: the plan's own moments file, hashes, and the quality of the served."""
    quantizer = Quantizer(method="gptq", moments=str(moments), sha256=sha256_of(moments))
    plan = write_plan(tmp_path / "plan.json", [3, 8], ["3"] * 8, quantizer=quantizer)
    report = tmp_path / "report.json"
    prompts = tmp_path / "in.jsonl"
    prompts.write_text("".join(PROMPTS.read_text().splitlines(keepends=True)[:4]))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    asked = ["--plan", plan, "--prompts", prompts, "--output", tmp_path / "out.jsonl"]
    checked = ["--report", report, "--check-quality", "--check-windows", "6"]
    done = start(*torchrun, "-m", "llmpq.run", *asked, *checked)
    written = json.loads(report.read_text())
    served = [stage["weights_sha256"] for stage in written["stages"]]
    sixteen, row = reversed(
        evaluated(plan, "--precisions", 16, "--window", 256, "--max-windows", 6)
    )
    assert served == row["weights_sha256"]
    nearest = write_plan(tmp_path / "nearest.json", [3, 8], ["3"] * 8)
    assert served != evaluated(nearest, "--max-windows", 1)[0]["weights_sha256"]
    quality = written["quality"]
    assert quality["perplexity"] == pytest.approx(row["perplexity"], rel=1e-4)
    assert quality["baseline_perplexity"] == pytest.approx(sixteen["perplexity"], rel=1e-4)
    rise = 100 * (quality["perplexity"] / quality["baseline_perplexity"] - 1)
    assert quality["measured_percent"] == pytest.approx(rise, abs=1e-6)
    assert (
        f"measured {rise:+.2f} %" in done.stdout and "evaluation.txt, 1,530 tokens" in done.stdout
    )


def test_second_moments_that_no_plan_takes_are_refused(tmp_path, moments):
    plan = write_plan(tmp_path / "plan.json", [8])
    result = CliRunner().invoke(eval_command, [str(plan), "--moments", str(moments)])
    assert result.exit_code == 2 and "rounded by gptq, but by rtn" in result.stderr


def test_plans_with_other_numbers_of_stages_cannot_share_processes(tmp_path):
    plans = [write_plan(tmp_path / f"{len(e)}.json", e) for e in ([8], [3, 8])]
    result = CliRunner().invoke(eval_command, [*map(str, plans), "--processes"])
    assert result.exit_code == 2 and "has 2 stages" in result.stderr and "has 1" in result.stderr


# ---- llmpq-run --check-quality


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """Runs a plan of one stage in this process with a cache of its own, and checks quality."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prompts = tmp_path / "in.jsonl"
    prompts.write_text(PROMPTS.read_text().splitlines(keepends=True)[0])
    plan = write_plan(tmp_path / "plan.json", [8])

    def run(*more):
        files = ["--plan", plan, "--prompts", prompts, "--output", tmp_path / "out.jsonl"]
        return CliRunner().invoke(run_command, [str(a) for a in (*files, *more)])

    return SimpleNamespace(run=run, folder=tmp_path)


def test_the_comparison_is_kept_until_something_changes(checked, monkeypatch):
    report = checked.folder / "report.json"
    asked = ["--check-quality", "--check-windows", 2, "--report", report]
    first = checked.run(*asked)
    assert first.exit_code == 0, (first.stderr, first.exception)
    quality = json.loads(report.read_text())["quality"]
    assert quality["num_tokens"] == 510 and quality["text"] == "evaluation.txt"
    assert "quality: nothing was predicted, measured" in first.stdout

    calls = []

    def refused(*arguments, **more):
        calls.append(arguments)
        raise RuntimeError("streamed again")

    monkeypatch.setattr("llmpq.evaluation.quality_check.stream", refused)
    again = checked.run(*asked)
    assert again.exit_code == 0, (again.stderr, again.exception)
    assert json.loads(report.read_text())["quality"] == quality and not calls
    other = checked.run("--check-quality", "--check-windows", 1)
    assert calls and str(other.exception) == "streamed again"


def test_bad_input_to_the_check_is_found_before_the_run(checked):
    for more, part in [
        (["--check-windows", 2], "only with --check-quality"),
        (["--check-quality", "--check-text", "/nowhere.txt"], "/nowhere.txt: no such file"),
    ]:
        result = checked.run(*more)
        assert result.exit_code == 2 and part in result.stderr
    assert not (checked.folder / "out.jsonl").exists()


# ---- scores and continuations of token ids


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "gemma2"])
def test_continuations_are_those_of_transformers(family_model, family):
    """Prompts of unequal length, padded on the left to be continued and on the right for scores."""
    model = family_model(family)
    config, weights = load_config(model.folder), Checkpoint(model.folder)
    stages = load_stages(config, weights, [(0, 1), (1, 4)], ["16"] * 4, torch.float32, CPU)
    scorer = Scorer(stages, 128)
    prompts = [request.prompt for request in model.requests]
    found = scorer.generate(prompts, MAX_NEW, ends=lambda tokens: tokens[-1] in model.eos_ids)
    for request, tokens in zip(model.requests, found, strict=True):
        assert tokens[: request.new_tokens] == model.expected[request.id]
    scores = scorer.score(list(zip(prompts, found, strict=True)))
    assert all(greedy for _, greedy in scores)
    alone = [scorer.score([pair])[0][0] for pair in zip(prompts, found, strict=True)]
    assert [value for value, _ in scores] == pytest.approx(alone, rel=1e-4)


# ---- lm-eval

lm_eval_with_accelerate = pytest.mark.library("lm_eval", "accelerate")


@pytest.fixture(scope="module")
def subject(shared):
    """A shared model: lm-eval's own face of it, ours over two stages, its tokenizer."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    folder = shared / "models" / "stories-260k"
    if not folder.is_dir():
        pytest.skip("the data folder holds no models/stories-260k")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    theirs = HFLM(pretrained=whole, tokenizer=tokenizer, batch_size=8)
    stages = load_stages(
        load_config(folder), Checkpoint(folder), [(0, 2), (2, 5)], ["16"] * 5, torch.float32, CPU
    )
    ours = harness_model(Scorer(stages, 512), tokenizer)
    return SimpleNamespace(ours=ours, theirs=theirs, text=shared / "text")


def request(*arguments):
    return SimpleNamespace(args=arguments, task_name=None)


@lm_eval_with_accelerate
def test_our_model_answers_piqa_as_lm_evals_own(subject, tmp_path, monkeypatch):
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / "piqa"  # to read all tasks takes seconds
    few = partial(lm_eval.tasks.TaskManager, include_path=folder, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", few)
    tasks = load_tasks(["piqa"], subject.text, 0, tmp_path)
    task = tasks["tasks"]["piqa"]
    task.build_all_requests(limit=20, rank=0, world_size=1)
    requests = task.instances
    assert len(requests) == 40
    ours, theirs = subject.ours.loglikelihood(requests), subject.theirs.loglikelihood(requests)
    for (value, greedy), (expected, also) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(expected, rel=1e-3)
        assert greedy == also
    scores = {s.metric: s for s in run_tasks(tasks, subject.ours, limit=20)}
    assert {"acc", "acc_norm"} == set(scores)
    assert scores["acc"].num_samples == 20 and 0 <= scores["acc"].value <= 1
    expected = {s.metric: s.value for s in run_tasks(tasks, subject.theirs, limit=20)}
    assert {name: score.value for name, score in scores.items()} == expected


@lm_eval_with_accelerate
def test_our_model_rolls_and_generates_as_lm_evals_own(subject):
    text = (subject.text / "tinystories.eval.txt").read_text()
    texts = [request(text[:4000]), request(text[4000:4300]), request("Once")]
    ours = subject.ours.loglikelihood_rolling(texts)
    assert ours == pytest.approx(subject.theirs.loglikelihood_rolling(texts), rel=1e-3)
    asked = {"until": ["."], "max_gen_toks": 24, "do_sample": False}
    prompts = [request("Once upon a time, there was a", asked), request("Lily and", asked)]
    assert subject.ours.generate_until(prompts) == subject.theirs.generate_until(prompts)
