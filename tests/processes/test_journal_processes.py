"""Those tests of `tests/unit/test_journal.py` that start processes of their own."""

import json
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from test_journal import (
    ids,
    logged,
    path,  # noqa: F401  a fixture
    write,
)

UNIT_TESTS = Path(__file__).parents[1] / "unit"  # whose helpers the processes import


def test_retries_that_are_killed_lose_nothing(path):
    child = f"""
        import random, sys
        sys.path.insert(0, {str(UNIT_TESTS)!r})
        from test_journal import RUN, Path, Results, finished
        results = Results(Path(sys.argv[1]), True, "interval", RUN)
        chance = random.Random(sys.argv[2])
        for number in range(60):
            if number not in results.finished:
                failed = chance.random() < 0.5
                results.write(finished(number, error="odd" if failed else None), "a text " * 20)
                print(number, int(failed), flush=True)
    """
    chance, done = random.Random(1), set()
    for attempt in range(12):
        command = [sys.executable, "-c", textwrap.dedent(child), str(path), str(attempt)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(chance.randint(1, 25)):
                said = process.stdout.readline().split()
                done |= {int(said[0])} if said and said[1] == "0" else set()
            process.send_signal(signal.SIGKILL)
            rest = [line.split() for line in process.stdout.read().split("\n")[:-1]]
            done |= {int(number) for number, failed in rest if failed == "0"}
        here = [json.loads(line)["id"] for line in path.read_bytes().split(b"\n")[:-1]]
        assert len(set(here)) == len(here)  # though it was killed
    results = write(path, True)
    assert done <= results.finished and len(done) > 20
    assert sorted(ids(path)) == sorted(results.finished)


def test_a_full_disk_tears_nothing(path):
    """A limit on the file size: a write is cut short, then the next one fails."""
    child = f"""
        import resource, sys
        sys.path.insert(0, {str(UNIT_TESTS)!r})
        from test_journal import RUN, Path, Results, closing, finished
        results = Results(Path(sys.argv[1]), True, "never", RUN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
        with closing(results):
            for i in range(50):
                if str(i) not in results.finished:
                    results.write(finished(str(i)), "text " * 9)
                    print(i, flush=True)
    """
    acknowledged: list[str] = []
    for limit in (800, 801, 1500, 2222, 3000):
        done = run_child(child, path, limit)
        assert done.returncode == 1 and "WorkerError" in done.stderr, done.stderr
        assert "MiB free there" in done.stderr and "--resume continues" in done.stderr
        acknowledged += done.stdout.split()
        assert logged(path)[: len(acknowledged)] == acknowledged  # and no line is torn
        assert ids(path) == acknowledged
        assert path.read_bytes().endswith(b"\n")
    assert len(acknowledged) > 10
    before = write(path, True)
    assert before.finished >= set(acknowledged) and ids(path) == logged(path)


def run_child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_nothing_acknowledged_is_lost_by_kills(path):
    child = f"""
        import sys
        sys.path.insert(0, {str(UNIT_TESTS)!r})
        from test_journal import RUN, Path, Results, finished
        results = Results(Path(sys.argv[1]), True, "interval", RUN)
        number = len(results.finished)
        while True:
            results.write(finished(number), "a text of some length " * (number % 50))
            print(number, flush=True)
            number += 1
    """
    chance, acknowledged = random.Random(0), set()
    for _ in range(10):
        command = [sys.executable, "-c", textwrap.dedent(child), str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(chance.randint(1, 300)):
                acknowledged.add(int(process.stdout.readline()))
            process.send_signal(signal.SIGKILL)
            acknowledged |= set(map(int, process.stdout.read().split("\n")[:-1]))
    assert len(acknowledged) > 100
    results = write(path, True)
    assert acknowledged <= results.finished
    assert sorted(ids(path)) == sorted(logged(path)) == list(range(len(results.finished)))
