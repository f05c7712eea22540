"""Workers that are killed, hang or are told to end: who is named, how it ends, and what goes on."""

import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
from types import ModuleType

import psutil
import pytest
from click.testing import CliRunner
from families import TINY_TALES
from jobs import PATIENCE_S, RUN, SLOW, TORCHRUN, Job, rank_of, wait_until

from llmpq.cli.run import main
from llmpq.model_spec import ASSETS
from llmpq.plan_data import load_plan
from llmpq.prompts.tokenizer import load_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="processes are followed on Linux only"),
]


class Started:
    """A run on slow devices that has begun to write (or only to load)."""

    def __init__(self, job: Job, start: list[str], *more: str, ends=(4, 8), loading=False) -> None:
        plan = job.plan(list(ends), batch=4, p=2, q=2, cluster=SLOW)
        self.process = subprocess.Popen(
            job.command(start, plan, *more),
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self.output, self.count = job.output, len(ends)
        wait_until(lambda: len(self.workers()) == len(ends), self.process)
        if not loading:
            self.wait_for_lines(1)

    def workers(self) -> dict[int, psutil.Process]:
        """By rank."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                found[rank_of(child)] = child
            except (psutil.Error, KeyError):  # has ended, or is about to become a worker
                continue
        return found

    def wait_for_lines(self, count: int) -> None:
        def has_lines() -> bool:
            return self.output.exists() and self.output.read_text().count("\n") >= count

        wait_until(has_lines, self.process)

    def end(self, send) -> tuple[int, str]:
        """Sends signals; the exit code and what was said, when nothing is left of the run."""
        everyone = [psutil.Process(self.process.pid), *self.workers().values()]
        send()
        _, errors = self.process.communicate(timeout=PATIENCE_S)
        _, alive = psutil.wait_procs(everyone, timeout=PATIENCE_S)
        assert not alive
        return self.process.returncode, errors

    def lose(self, number: signal.Signals, *ranks: int) -> tuple[int, str]:
        workers = self.workers()
        return self.end(lambda: [workers[rank].send_signal(number) for rank in ranks])


def name(run: Started, rank: int, pid: int) -> str:
    return f"worker {rank} (t4-16g on node0, host {platform.node()}, pid {pid})"


def check_advice(errors: str, count: int = 1) -> None:
    assert errors.count("error:") == count and "--resume" in errors, errors


# ---- without torchrun


def test_killed_workers_are_named(job):
    ranks = (0, 1)
    run = Started(job, RUN)
    pids = {rank: worker.pid for rank, worker in run.workers().items()}
    code, errors = run.lose(signal.SIGKILL, *ranks)
    assert code == 4
    for rank in ranks:
        assert f"{name(run, rank, pids[rank])} was ended by SIGKILL" in errors
    check_advice(errors)
    assert "Traceback" not in errors


def test_a_worker_that_hangs_is_named(job):
    run = Started(job, RUN)
    code, errors = run.lose(signal.SIGSTOP, 1)
    assert code == 4
    assert "worker 1 (t4-16g on node0" in errors and "no sign of life for 6 s" in errors
    check_advice(errors)


@pytest.mark.parametrize(("number", "to_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_signals_end_a_run_with_its_workers(job, number, to_group):
    run = Started(job, RUN)
    send = os.killpg if to_group else os.kill
    code, errors = run.end(lambda: send(run.process.pid, number))
    assert code == 128 + number
    check_advice(errors)
    assert "Traceback" not in errors
    assert job.results()


def test_a_single_stage_ends_on_signals_too(job):
    plan = job.plan([8], batch=4, p=2, q=2, cluster=SLOW)
    process = subprocess.Popen(job.command(RUN, plan), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: job.output.exists() and job.output.read_text(), process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143
    assert "error: interrupted by SIGTERM; finished" in errors and "Traceback" not in errors


# ---- under torchrun


@pytest.mark.parametrize(
    ("number", "how"),
    [(signal.SIGKILL, "its process has ended"), (signal.SIGSTOP, "no sign of life for 6 s")],
)
def test_workers_of_torchrun_name_who_was_lost(job, number, how):
    run = Started(job, [*TORCHRUN, "2", "-m", "llmpq.run"])
    pid = run.workers()[1].pid
    code, errors = run.lose(number, 1)
    assert code == 1  # torchrun's own; a worker's is in its summary
    assert f"error: {name(run, 1, pid)} was lost: {how}" in errors
    assert errors.count("error: ") == 1, errors
    assert "exitcode  : 4" in errors


def test_torchrun_is_told_to_end(job):
    run = Started(job, [*TORCHRUN, "2", "-m", "llmpq.run"])
    _, errors = run.end(lambda: os.kill(run.process.pid, signal.SIGTERM))
    assert errors.count("error: ") == 1, errors
    assert "error: interrupted by SIGTERM; finished requests are in the output" in errors


def test_torchrun_starts_again_what_was_killed(job, expected):
    start = [*TORCHRUN, "2", "--max-restarts", "3", "-m", "llmpq.run"]
    run = Started(job, start)
    run.wait_for_lines(3)
    run.workers()[1].kill()
    _, errors = run.process.communicate(timeout=PATIENCE_S)
    assert run.process.returncode == 0, errors
    assert "resuming: " in errors
    assert job.results() == expected


# ---- new plans


def test_a_run_goes_on_without_the_workers_it_loses(job, expected):
    run = Started(job, RUN, "--replan-on-loss", ends=(2, 5, 8))
    run.workers()[1].kill()
    _, errors = run.process.communicate(timeout=PATIENCE_S)
    assert run.process.returncode == 0, errors
    assert "was ended by SIGKILL; planning for the devices that are left" in errors
    assert "times of t4-16g: spec sheet" in errors
    assert job.results() == expected
    plan = load_plan(job.output.with_name("out.jsonl.replan-1.json"))
    assert len(plan.cluster.devices()) == 3  # of four


def test_nothing_is_left_to_plan_for(job):
    small = {"nodes": [{"name": "node0", "devices": [{"type": "t4-16g", "count": 2}]}]}
    small["rehearse"] = {"t4-16g": SLOW["rehearse"]["t4-16g"] | {"memory_mib": 4.5}}
    plan = job.plan([4, 8], batch=2, p=1, q=1, cluster=small)
    more = ("--dtype", "bfloat16", "--replan-on-loss", "--max-quality-loss", "0")
    process = subprocess.Popen(
        job.command(RUN, plan, *more),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: job.output.exists() and job.output.read_text(), process)
    workers = psutil.Process(process.pid).children()
    next(worker for worker in workers if rank_of(worker) == 1).kill()
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3, errors
    assert (
        "no plan fits the devices that are left" in errors
        and "at most 0 %" in errors
        and "--resume" in errors
    )
    assert "Traceback" not in errors


def test_what_planning_again_needs_is_checked_at_the_start(job):
    plan = job.plan([4, 8])
    cluster = job.folder / "cluster.yaml"
    cluster.write_text("nodes: [{name: node0, devices: [{type: v100-32g}]}]\n")
    for words, said in (
        (["--cluster", str(cluster)], "only with --replan-on-loss"),
        (["--replan-on-loss", "--cluster", str(cluster)], "asks for a t4-16g on node0"),
        (["--replan-on-loss", "--profiles", str(job.folder / "none")], "none"),
    ):
        done = CliRunner().invoke(main, job.command([], plan, *words))
        assert done.exit_code == 2 and said in done.stderr, (done.stderr, done.exception)
    assert not job.output.exists()


def test_torchrun_leaves_no_room_to_plan_again(job, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():  # what torchrun sets
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(main, job.command([], job.plan([4, 8]), "--replan-on-loss"))
    assert done.exit_code == 2, done.exception
    assert "--replan-on-loss: needs a run that starts its own workers" in done.stderr


# ---- many kills


@pytest.mark.timeout(900)
def test_no_kill_loses_repeats_or_changes_a_request(job, benchmarks):
    lines = (ASSETS / "prompts.jsonl").read_text().splitlines()[:10]
    tokenizer = load_tokenizer(TINY_TALES)
    prompts = [tokenizer.encode(json.loads(line)["prompt"])[:24] for line in lines]
    requests = [{"id": i, "prompt_token_ids": ids} for i, ids in enumerate(prompts)]
    job.prompts.write_text("".join(json.dumps(line) + "\n" for line in requests))
    plan = job.plan([4, 8], batch=4, p=2, q=2)
    result = benchmarks.kill_test(job.folder, str(TINY_TALES), job.prompts, plan, kills=2, seed=1)
    assert (result.num_kills, result.num_requests) == (2, 10)
    assert (result.duplicated, result.missing, result.different) == (0, 0, 0)


@pytest.fixture
def benchmarks(repo_root) -> ModuleType:
    path = repo_root / "scripts" / "bench" / "_engine_kill.py"
    spec = importlib.util.spec_from_file_location("_engine_kill", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["_engine_kill"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["_engine_kill"]
