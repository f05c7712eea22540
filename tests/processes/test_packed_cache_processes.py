"""Those tests of `tests/unit/test_packed_cache.py` that start processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_loader import FFN, HIDDEN, LARGEST_BYTES, MEASURE, MIB, SLACK_BYTES, write_checkpoint
from test_packed_cache import (
    LINEARS,
    assert_equal,
    load,
    model,  # noqa: F401  a fixture
    packed_files,
    refuse,
)

UNIT_TESTS = Path(__file__).parents[1] / "unit"  # whose helpers the processes import


def test_many_processes_at_once_leave_whole_files(model, tmp_path):
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(1)\n"
        "from pathlib import Path; from test_packed_cache import load\n"
        "print(load(Path(sys.argv[2]), Path(sys.argv[3]))[2])"
    )
    command = [sys.executable, "-c", code, str(UNIT_TESTS), model, tmp_path / "cache"]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [(w.communicate(timeout=240)[0], w.returncode) for w in workers] == [("[]\n", 0)] * 3
    assert not list((tmp_path / "cache").glob("*.part"))
    shared, _, said = load(model, tmp_path / "cache", by=refuse)
    assert not said
    assert_equal(shared, load(model, tmp_path / "plain")[0])


def test_a_killed_process_leaves_whole_files_and_half_a_file_at_most(model, tmp_path):
    code = (
        "import itertools, sys, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(1)\n"
        "from pathlib import Path; from test_packed_cache import load\n"
        "for n in itertools.count(): load(Path(sys.argv[2]), Path(sys.argv[3]), key=str(n))"
    )
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", code, str(UNIT_TESTS), model, cache]
    worker = subprocess.Popen(command)
    while len(packed_files(cache)) < 60 and worker.poll() is None:
        time.sleep(0.01)
    worker.kill()
    assert worker.wait() == -signal.SIGKILL
    for path in packed_files(cache):
        assert load_file(path)
    assert len(list(cache.glob("*.part"))) <= 1
    stage, _, said = load(model, cache, by=refuse, key="0")
    assert not said
    assert_equal(stage, load(model, tmp_path / "plain")[0])


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.parametrize("precision", ["3"])
def test_memory_peaks_no_higher_than_without(tmp_path, precision):
    """Neither while weights are packed and kept, nor while they are found again."""
    for name in ("large", "small"):
        (tmp_path / name).mkdir()
    folders = [
        write_checkpoint(tmp_path / "large", HIDDEN, FFN),
        write_checkpoint(tmp_path / "small", 256, 512),
    ]
    old = "[sys.argv[3]] * 6, torch.bfloat16, CPU)"
    with_cache = old[:-1] + ", cache=PackedCache(Path(sys.argv[4]), weights.stamp, 'rtn', print))"
    assert old in MEASURE
    code = "from llmpq.checkpoint.packed_cache import PackedCache\n" + MEASURE.replace(
        old, with_cache
    )
    command = [sys.executable, "-c", code, *folders, precision, tmp_path / "cache"]
    for start in ("first", "second"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        held, peak = json.loads(done.stdout)
        print(f"{precision}, {start}: {(peak - held) / MIB:.1f} MiB more at the peak")
        assert peak >= 0.9 * held
        assert peak - held <= 2 * LARGEST_BYTES + SLACK_BYTES
    assert len(packed_files(tmp_path / "cache")) == 2 * LINEARS * 6
