"""Those tests of `tests/unit/test_monitor.py` that start processes of their own."""

import os
import signal
import subprocess
import sys

import pytest
from test_monitor import (
    Crew,
    fast,  # noqa: F401  a fixture
    wait_until,
)

from llmpq.reliability.monitor import (
    WorkerIdentity,
    process_state,
)


def test_the_state_of_processes(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("RANK", "1")  # the child's, as a worker's of this run
    state, started = process_state(os.getpid())
    assert state == "R" and started > 0
    ready = "print(flush=True); input()"  # its environment is there to be read once it runs
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = subprocess.Popen([sys.executable, "-c", ready], **pipes)
    assert child.stdout and child.stdout.readline()
    who = WorkerIdentity(
        1, "a", "here", child.pid, WorkerIdentity.here(0, "me").machine, process_state(child.pid)[1]
    )
    assert not who.is_gone
    elsewhere = WorkerIdentity(1, "a", "there", child.pid, "another machine", who.started)
    successor = WorkerIdentity(1, "a", "here", child.pid, who.machine, who.started - 1)
    elsewhere.kill()
    successor.kill()  # of the same id, but another process
    assert child.poll() is None
    who.kill()
    assert child.wait(10) == -signal.SIGKILL
    assert who.is_gone and successor.is_gone and not elsewhere.is_gone


def test_a_process_that_ends_is_missed_before_it_is_silent_for_long(fast):
    crew = Crew(2)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    machine, started = WorkerIdentity.here(0, "").machine, process_state(child.pid)[1]
    if not machine:
        pytest.skip("processes cannot be seen here")
    crew.board.join(WorkerIdentity(1, "b", "box", child.pid, machine, started))
    with crew.monitor(0) as monitor:
        wait_until(lambda: crew.board.beat(1) or monitor._others)
        monitor.look_now()
        assert crew.ended == {}
        child.kill()
        child.wait()
        crew.board.beat(1)  # so that silence is not the reason
        monitor.look_now()
        assert "was lost: its process has ended; go on" in crew.ended[0]


ENDED = """
import ctypes
from llmpq.reliability.ending import end_process, ended_by_signals
with ended_by_signals("go on", look={look}):
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(60)
    ctypes.CDLL(None).sleep(60)  # a wait in C that goes on after a signal, as torch's do
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_process_whose_main_thread_is_blocked(number):
    process = start(ENDED.format(look="list"))
    process.send_signal(number)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 128 + number
    assert errors == f"error: interrupted by {number.name}; go on\n"


def test_a_lost_worker_is_the_reason_where_one_is_known():
    process = start(ENDED.format(look="lambda: end_process('worker 1 was lost')"))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 4 and errors == "error: worker 1 was lost\n"


def start(code: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process
