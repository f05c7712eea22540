"""Those tests of `tests/unit/test_attacks.py` that start processes of their own."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")
from llmpq.reliability.monitor import (
    WorkerIdentity,
    process_state,
)


@pytest.mark.parametrize(("rank", "port"), [("0", "29500"), ("1", "29501")])
def test_a_process_that_is_no_worker_of_this_run_is_not_ended(monkeypatch, rank, port):
    """Whatever the store says of it: anyone could name any process there."""
    monkeypatch.setenv("MASTER_PORT", "29500")
    variables = os.environ | {"RANK": rank, "MASTER_PORT": port}
    command = [sys.executable, "-c", "input()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, env=variables)
    machine = WorkerIdentity.here(0, "me").machine
    WorkerIdentity(1, "a", "here", child.pid, machine, process_state(child.pid)[1]).kill()
    assert child.poll() is None
    child.communicate(b"\n", timeout=30)
    assert child.returncode == 0


def test_a_second_signal_shows_no_traceback() -> None:
    """People press Ctrl-C again while the first one is still being dealt with."""
    text = (
        "import os, signal, time\n"
        "from llmpq.reliability.ending import ended_by_signals\n"
        "with ended_by_signals('again', look=lambda: os.kill(os.getpid(), signal.SIGINT)):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    while True: time.sleep(0.05)\n"
    )
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 130
    assert done.stderr.splitlines()[0].startswith("error: interrupted by SIGINT")
