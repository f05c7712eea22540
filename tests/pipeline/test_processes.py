"""Real processes: under torchrun, started by the command itself, killed, resumed, too small."""

import json
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from jobs import PATIENCE_S, RUN, TORCHRUN, run, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CONTRACT = {
    "tokens_per_s",
    "prefill_s",
    "decode_s",
    "total_s",
    "load_s",
    "num_requests",
    "num_new_tokens",
    "stages",
}
STAGE_KEYS = {"rank", "busy_prefill_s", "busy_decode_s", "idle_s", "comm_s", "peak_memory_bytes"}


def check_report(path: Path, num_stages: int, tokens: dict[str, list[int]]) -> None:
    report = json.loads(path.read_text())
    assert set(report) >= CONTRACT
    assert report["num_requests"] == len(tokens)
    assert report["num_new_tokens"] == sum(map(len, tokens.values()))
    assert [stage["rank"] for stage in report["stages"]] == list(range(num_stages))
    assert all(set(stage) >= STAGE_KEYS for stage in report["stages"])
    assert report["total_s"] == pytest.approx(report["prefill_s"] + report["decode_s"])
    assert 0 < report["prefill_s"] < report["total_s"] and 0 < report["prefill_share"] < 1
    assert report["requests_per_s"] == pytest.approx(len(tokens) / report["total_s"])


def test_torchrun_with_the_console_script(job, expected):
    """The module where no script is installed; others start the module under torchrun too."""
    script = shutil.which("llmpq-run")
    words = ["-m", "llmpq.run"] if script is None else [script]
    done = run(job.command([*TORCHRUN, "2", *words], job.plan([5, 8])))
    assert done.returncode == 0, done.stderr
    assert job.results() == expected
    check_report(job.report, 2, expected)


def test_the_command_starts_its_own_processes_and_resumes_a_torn_output(job, expected):
    command = job.command(RUN, job.plan([2, 5, 8]))
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert job.results() == expected
    check_report(job.report, 3, expected)

    data = job.output.read_bytes()
    torn = data.index(b"token_ids", len(data) // 2)  # inside a line
    job.output.write_bytes(data[:torn])
    num_whole = data[:torn].count(b"\n")
    job.output.with_name("out.jsonl.journal").unlink()  # else all comes from there
    again = run([*command, "--resume"])
    assert again.returncode == 0, again.stderr
    assert job.results() == expected
    assert json.loads(job.report.read_text())["num_requests"] == len(expected) - num_whole


@pytest.mark.skipif(sys.platform != "linux", reason="workers follow their parent on Linux only")
def test_workers_end_with_the_process_that_started_them(job):
    slow = {"rehearse": {"t4-16g": {"slowdown": 8, "memory_mib": 1000}}}
    plan = job.plan([4, 8], batch=4, p=2, q=2, cluster=slow)
    process = subprocess.Popen(job.command(RUN, plan), stderr=subprocess.DEVNULL)
    wait_until(lambda: job.output.exists() and job.output.read_text().count("\n") >= 1, process)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(workers, timeout=PATIENCE_S)
    assert not alive


def test_a_memory_cap_below_need_says_what_is_short(job):
    small = {"rehearse": {"t4-16g": {"slowdown": 2, "memory_mib": 1}}}
    done = run(job.command(RUN, job.plan([4, 8], cluster=small)))
    assert done.returncode == 3, done.stderr
    assert "MiB short" in done.stderr and "t4-16g on node0" in done.stderr
    assert "Traceback" not in done.stderr
    assert not job.output.read_text()


def test_torchrun_with_another_number_of_processes(job):
    done = run(job.command([*TORCHRUN, "1", "-m", "llmpq.run"], job.plan([4, 8])))
    assert done.returncode != 0
    assert "has 2 workers but torchrun started 1 processes" in done.stderr
    # torchrun itself ends with 1; the worker's own code is in its summary.
    assert "exitcode" in done.stderr and ": 2" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    "start", [RUN, [*TORCHRUN, "2", "-m", "llmpq.run"]], ids=["own", "torchrun"]
)
def test_workers_of_one_machine_listen_on_loopback_alone(job, expected, start):
    """torchrun's own store is its business: it listens on all interfaces, whatever it is told."""
    command = job.command(start, job.plan([3, 8]))
    found: set[tuple[str, str]] = set()  # who listens, and where
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        main = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(0.1)
            for one in [main, *main.children(recursive=True)] if main.is_running() else []:
                with suppress(psutil.Error):
                    who = "worker" if "RANK" in one.environ() else "parent"
                    listening = [c for c in one.net_connections("tcp") if c.status == "LISTEN"]
                    found |= {(who, socket.laddr.ip) for socket in listening}
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert job.results() == expected
    assert ("worker", "127.0.0.1") in found
    ours = found if start is RUN else {pair for pair in found if pair[0] == "worker"}
    assert {address for _, address in ours} == {"127.0.0.1"}
