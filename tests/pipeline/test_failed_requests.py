"""Requests that fail alone: the exit code, the last line, their lines, and how they are retried."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from families import TINY_TALES, hand_made_plan
from jobs import PATIENCE_S, RUN, TORCHRUN, run
from safetensors.torch import load_file, save_file

from llmpq.artifact import write_json
from llmpq.cli.eval import main as eval_command
from llmpq.cli.profile import main as profile_command
from llmpq.cli.run import main
from llmpq.errors import WorkerError
from llmpq.model_lookup import load_model_spec
from llmpq.reliability import journal
from llmpq.runtime.collector import Collector

EMBEDDING = "model.embed_tokens.weight"
BAD_TOKEN = 5  # whose embedding is not a number, in a model that was spoilt
FEW = "--max-windows 2 --window 64 --precisions 16,3 --moment-tokens 512"
CHAT = "{% for m in messages %}{{ m.content }} {% endfor %}"


class Job:
    """A copy of the shipped model, a plan of `ends`, prompts, and runs of them."""

    def __init__(self, folder: Path, ends=(8,), batch=2) -> None:
        self.folder, self.model = folder, folder / "model"
        shutil.copytree(TINY_TALES, self.model)
        self._give_a_head()
        self.plan, self.prompts = folder / "plan.json", folder / "in.jsonl"
        self.output = folder / "out.jsonl"
        spec = load_model_spec(str(TINY_TALES))
        sizes = {"batch": batch, "p": 1, "q": 2, "prompt": 12, "new": 3}
        write_json(self.plan, hand_made_plan(spec, list(ends), "16", **sizes))

    def write(self, *lines: dict) -> None:
        self.prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def _give_a_head(self) -> None:
        """A matrix of its own: what is wrong with one embedding is then wrong with that alone."""
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
        tensors = load_file(self.model / "model.safetensors")
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
        save_file(tensors, self.model / "model.safetensors", {"format": "pt"})

    def spoil(self, value: float = math.nan) -> None:
        """Makes the embedding of a token what no sum survives; a number mends it."""
        tensors = load_file(self.model / "model.safetensors")
        tensors[EMBEDDING][BAD_TOKEN] = value
        save_file(tensors, self.model / "model.safetensors", {"format": "pt"})

    def words(self, *more: object, output: object = None) -> list[str]:
        files = ["--plan", self.plan, "--prompts", self.prompts, "--model", self.model]
        files += ["--output", output or self.output, "--dtype", "float32"]
        return [*map(str, files), *map(str, more)]

    def run(self, *more: object, **words: object) -> Result:
        result = CliRunner().invoke(main, self.words(*more, **words))
        assert isinstance(result.exception, SystemExit | None), result.exception
        return result

    def lines(self) -> dict:
        lines = [json.loads(line) for line in self.output.read_text().splitlines()]
        found = {line["id"]: line for line in lines}
        assert len(found) == len(lines)
        return found


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


def prompt(name, *tokens: int, **more) -> dict:
    return {"id": name, "prompt_token_ids": list(tokens)} | more


def last(result: Result) -> str:
    return result.stderr.strip().splitlines()[-1]


# ---- failures are not successes


def test_a_run_in_which_all_requests_fail_ends_with_5(job):
    job.write(prompt("a", 9, BAD_TOKEN), prompt("b", BAD_TOKEN))
    job.spoil()
    result = job.run("--seed", 3)
    assert result.exit_code == 5, result.stderr
    assert last(result).startswith(f"error: 2 of 2 requests failed; their lines in {job.output}")
    assert last(result).endswith("--seed 3 --resume")
    assert all("NaN" in line["error"] for line in job.lines().values())
    assert "float16" not in last(result)  # as it was computed in float32
    report = job.folder / "report.json"
    again = job.run("--resume", "--report", report, "-q")
    assert again.exit_code == 5 and again.stderr.count("\n") == 1  # errors are said though quiet
    assert json.loads(report.read_text())["num_failed"] == 2


def test_where_float16_overflows_the_last_line_says_so(job):
    job.write(prompt("a", 9, BAD_TOKEN))
    job.spoil()
    result = job.run("--dtype", "float16")
    assert result.exit_code == 5 and "--dtype bfloat16 or float32 has more room" in last(result)
    job.write(prompt("a", *[9] * 100))
    assert "has more room" not in last(job.run("--dtype", "float16"))


def test_resuming_tries_failed_requests_again_and_those_alone(job):
    job.write(prompt("a", 9, 8), prompt("b", 9, BAD_TOKEN), prompt("c", 7))
    job.spoil()
    assert job.run().exit_code == 5
    before = job.lines()
    assert [before[name]["finish_reason"] for name in "abc"] == ["length", "error", "length"]
    kept = job.run("--resume", "--keep-errors")
    assert kept.exit_code == 5 and last(kept).startswith("error: 1 of 3 requests failed")
    assert job.lines() == before
    job.write(prompt("a", 9, 8), prompt("b", 9, 6), prompt("c", 7))  # mended where it failed
    again = job.run("--resume")
    assert again.exit_code == 0, again.stderr
    assert "failed requests that are tried again: 1" in again.stderr
    assert "resuming: 2 requests are already done" in again.stderr
    assert again.stdout.endswith(f"all 3 requests are done, none failed: {job.output}\n")
    after = job.lines()
    assert after["b"]["finish_reason"] == "length"
    assert {name: after[name] for name in "ac"} == {name: before[name] for name in "ac"}


def test_where_nothing_is_left_nothing_is_loaded(job, monkeypatch):
    job.write(prompt("a", 9, 8), prompt("b", 9, BAD_TOKEN))
    job.spoil()
    assert job.run().exit_code == 5
    monkeypatch.setattr("llmpq.runtime.engine.StageEngine", lambda *_, **__: pytest.fail("loaded"))
    kept = job.run("--resume", "--keep-errors")
    assert kept.exit_code == 5 and "resuming: 2 requests are already done" in kept.stderr
    job.write(prompt("a", 9, 8))
    assert job.run("--resume", "--keep-errors").exit_code == 0


def test_keeping_errors_is_for_resumed_runs(job):
    job.write(prompt("a", 9))
    result = job.run("--keep-errors")
    assert result.exit_code == 2 and "--keep-errors: only with --resume" in result.stderr


@pytest.fixture
def two_stages(tmp_path) -> Job:
    """One request of two fails, in processes."""
    job = Job(tmp_path, [3, 8])
    job.write(prompt("a", 9, 8), prompt("b", BAD_TOKEN))
    job.spoil()
    return job


@pytest.mark.slow
def test_processes_end_with_5_too_and_say_it_once(two_stages):
    done = run([*RUN, *two_stages.words()])
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("1 of 2 requests failed") == 1
    assert done.stderr.strip().splitlines()[-1].endswith("--resume")
    assert "SIGTERM" not in done.stderr
    assert set(two_stages.lines()) == {"a", "b"}


@pytest.mark.slow
def test_under_torchrun_each_start_says_it_once_and_tries_no_failure_again(two_stages):
    words = ["--max-restarts", "1", "-m", "llmpq.run", *two_stages.words()]
    done = run([*TORCHRUN, "2", *words])
    assert done.returncode == 1 and "exitcode  : 5" in done.stderr  # torchrun itself ends with 1
    assert done.stderr.count("1 of 2 requests failed") == 2, done.stderr
    assert "tried again" not in done.stderr
    assert "SIGTERM" not in done.stderr.replace("Sending process", "")
    assert set(two_stages.lines()) == {"a", "b"}


# ---- requests that cannot be done


def test_a_request_that_is_too_long_fails_alone(job):
    job.write(prompt("a", 9, 8), prompt("long", *[9] * 100), prompt("longer", *[9] * 600))
    result = job.run()
    assert result.exit_code == 5 and last(result).startswith("error: 2 of 3 requests failed")
    assert "requests that cannot be served and fail alone: 2 (the first: line 2: " in result.stderr
    lines = job.lines()
    assert lines["a"]["num_new_tokens"] == 3
    assert lines["long"]["error"].startswith("100 prompt + 3 new tokens exceed the 30 tok")
    assert "512 positions of the model" in lines["longer"]["error"]
    assert lines["long"]["num_prompt_tokens"] == 100 and lines["long"]["token_ids"] == []
    cut = job.run("--resume", "--too-long", "truncate")
    assert cut.exit_code == 0, cut.stderr
    assert "line 2: 100 tokens to 27" in cut.stderr
    assert job.lines()["longer"]["num_prompt_tokens"] == 27


def test_a_run_without_a_single_request_that_can_be_done(job):
    job.write(prompt("long", *[9] * 100))
    result = job.run()
    assert result.exit_code == 5 and last(result).startswith("error: 1 of 1 requests failed")
    assert job.run("--dry-run").exit_code == 0


def test_openais_lines_get_openais_output(job):
    config = job.model / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": CHAT}))
    user = {"role": "user", "content": [{"type": "text", "text": "Once"}]}
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    bodies = [{"messages": [user], "max_tokens": 2}, {"messages": [image]}]
    line = {"method": "POST", "url": "/v1/chat/completions"}
    job.write(*[line | {"custom_id": f"r{i}", "body": body} for i, body in enumerate(bodies)])
    result = job.run()
    assert result.exit_code == 5 and "results are in OpenAI's batch format" in result.stderr
    first, second = sorted(
        map(json.loads, job.output.read_text().splitlines()), key=lambda line: line["custom_id"]
    )
    assert set(first) == {"id", "custom_id", "response", "error"}
    body = first["response"]["body"]
    assert first["response"]["status_code"] == 200 and first["error"] is None
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert body["usage"]["completion_tokens"] == 2
    assert second["response"]["status_code"] == 400 and "image_url" in second["error"]["message"]
    other = job.run("--resume", "--output-format", "llmpq")
    assert other.exit_code == 2 and "format openai, not of llmpq" in other.stderr
    assert job.run("--resume").exit_code == 5
    assert job.run("--output-format", "llmpq").exit_code == 5
    assert set(job.lines()) == {"r0", "r1"}


# ---- where results go


def test_results_on_standard_output(job):
    job.write(prompt("a", 9, 8), prompt("b", 7))
    result = job.run(output="-")
    assert result.exit_code == 0, result.stderr
    assert {json.loads(line)["id"] for line in result.stdout.splitlines()} == {"a", "b"}
    assert "the run cannot be resumed" in result.stderr
    for more, message in {
        "--resume": "--resume: needs an --output that is a file",
        "--json=-": "named twice",
    }.items():
        refused = job.run(more, output="-")
        assert refused.exit_code == 2 and message in refused.stderr
    assert not job.output.exists() and not (job.folder / "-").exists()


@pytest.mark.slow
def test_standard_output_that_nobody_reads_is_a_failure(job):
    job.write(*[prompt(i, 9, 8) for i in range(20)])
    process = subprocess.Popen(
        [*RUN, *job.words(output="-")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(PATIENCE_S) == 4 and "standard output cannot be written" in errors, errors
    assert "Traceback" not in errors and "Exception ignored" not in errors


@pytest.mark.parametrize("ending", ["", ".journal"])
def test_an_output_that_is_removed_meanwhile_ends_the_run_with_4(job, monkeypatch, ending):
    job.write(*[prompt(i, 9, 8) for i in range(4)])
    monkeypatch.setattr(journal, "CHECK_EVERY_S", 3600.0)  # seen at the end at the latest
    finish = Collector.finish

    def remove(self, finished):
        finish(self, finished)
        Path(f"{job.output}{ending}").unlink(missing_ok=True)

    with monkeypatch.context() as patched:
        patched.setattr(Collector, "finish", remove)
        result = CliRunner().invoke(main, job.words())
    assert result.exit_code == WorkerError.exit_code == 4
    assert f"{job.output}{ending}: is gone" in result.stderr
    assert job.run("--resume").exit_code == 0
    assert set(job.lines()) == {0, 1, 2, 3}


# ---- what may not be mixed


def test_other_weights_and_other_prompts_are_not_mixed(job):
    job.write(prompt("a", 9, 8), prompt("b", 7))
    assert job.run().exit_code == 0
    before = job.output.read_bytes()
    job.write(prompt("a", 9, 8), prompt("b", 6))
    other = job.run("--resume")
    assert other.exit_code == 2 and "had other prompts" in other.stderr, other.stderr
    assert ": b;" in other.stderr
    job.write(prompt("a", 9, 8), prompt("b", 7, max_new_tokens=2))
    assert "numbers of new tokens" in job.run("--resume").stderr
    job.write(prompt("b", 7), prompt("a", 9, 8))  # in another order, as it was
    assert job.run("--resume").exit_code == 0
    job.spoil(0.25)  # the same shapes, other numbers
    changed = job.run("--resume")
    assert changed.exit_code == 2 and "other weights: model.safetensors differ" in changed.stderr
    assert job.output.read_bytes() == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kills as Linux does")
def test_a_run_that_retries_is_killed_and_resumed(tmp_path):
    """Failed and finished requests, kill -9 at odd moments: every id once, nothing lost."""
    job = Job(tmp_path)
    count = 24
    job.write(*[prompt(i, 9 + i, *([BAD_TOKEN] if i % 3 else [])) for i in range(count)])
    job.spoil()
    command = [*RUN, *job.words("--resume")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for delay in (0.0, 0.02, 0.05):
        size = job.output.stat().st_size if job.output.exists() else 0
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
        while process.poll() is None:
            if job.output.exists() and job.output.stat().st_size not in (0, size):
                break
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        whole = job.output.read_bytes().split(b"\n")[:-1]
        names = [json.loads(line)["id"] for line in whole]
        assert len(set(names)) == len(names)
    done = run(command)
    assert done.returncode == 5, done.stderr
    lines = job.lines()
    assert sorted(lines) == list(range(count))
    assert [lines[i]["finish_reason"] == "error" for i in range(count)] == [
        bool(i % 3) for i in range(count)
    ]


# ---- other commands


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (eval_command, "--max-windows 2 --window 64"),
        (eval_command, "--max-windows 2 --window 64 --stream"),
        (profile_command, f"{FEW} --quantizer rtn"),
        (profile_command, f"{FEW} --quantizer rtn --indicator hessian"),
        (profile_command, f"{FEW} --quantizer gptq"),
    ],
)
def test_a_loss_that_is_no_number_is_a_failure(job, command, words):
    tensors = load_file(job.model / "model.safetensors")
    tensors["model.layers.3.input_layernorm.weight"][0] = math.nan
    save_file(tensors, job.model / "model.safetensors", {"format": "pt"})
    start = ["sensitivity", "-o", str(job.folder / "s.json")] if command is profile_command else []
    found = job.folder / "e.json"
    line = [*start, "--model", str(job.model), "--json", str(found), *words.split()]
    result = CliRunner().invoke(command, line)
    assert result.exit_code == (5 if command is eval_command else 2), result.exception
    assert "NaN or infinite" in last(result) and "Traceback" not in result.stderr
    if command is eval_command:
        (row,) = json.loads(found.read_text(), parse_constant=pytest.fail)["rows"]
        assert row["perplexity"] is None and "not a finite number" in row["error"]
    else:
        assert not found.exists() and not (job.folder / "s.json").exists()


def test_a_quality_that_cannot_be_measured_is_a_failure(job):
    job.write(prompt("a", 9))
    tensors = load_file(job.model / "model.safetensors")
    tensors["lm_head.weight"] *= 1e30  # so sure of itself that exp of its loss is no number
    save_file(tensors, job.model / "model.safetensors", {"format": "pt"})
    result = job.run("--check-quality", "--check-windows", 2)
    assert result.exit_code == 5, (result.stderr, result.exception)
    assert "the quality could not be measured" in last(result)
    assert job.lines()["a"]["finish_reason"] == "length"
