"""Those tests of `tests/unit/test_loader.py` that start processes of their own."""

import json
import os
import subprocess
import sys

import pytest
from test_loader import FFN, HIDDEN, LARGEST_BYTES, MEASURE, MIB, SLACK_BYTES, write_checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint whose largest tensor has 24 MiB, and a small one."""
    large, small = tmp_path_factory.mktemp("large"), tmp_path_factory.mktemp("small")
    return write_checkpoint(large, HIDDEN, FFN), write_checkpoint(small, 256, 512)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.parametrize("precision", ["16", "8", "4", "3"])
def test_loading_takes_two_raw_tensors_beside_the_packed_weights(checkpoints, precision):
    command = [sys.executable, "-c", MEASURE, *map(str, checkpoints), precision]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    held, peak = json.loads(done.stdout)
    print(f"{precision}: held {held / MIB:.1f} MiB, {(peak - held) / MIB:.1f} MiB more at the peak")
    assert peak >= 0.9 * held  # it was measured while it loaded
    assert peak - held <= 2 * LARGEST_BYTES + SLACK_BYTES
