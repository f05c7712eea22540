"""Real processes that see other cards than planned: refused before anything is loaded.

The cards are invented, as far as the question of what is there goes.
"""

import os
import subprocess

import pytest
from jobs import PATIENCE_S, RUN, TORCHRUN

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FOUR_V100S = """
import torch

class Card:
    name, total_memory, major, minor, uuid = "Tesla V100-SXM2-32GB", 32 * 2**30, 7, 0, ""

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 4
torch.cuda.get_device_properties = lambda index: Card
"""


@pytest.mark.parametrize("start, code", [(RUN, 2), ([*TORCHRUN, "2", "-m", "llmpq.run"], 1)])
def test_a_plan_for_other_cards_is_refused_once(job, start, code, tmp_path):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "sitecustomize.py").write_text(FOUR_V100S)
    paths = [str(tmp_path / "fake"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = job.command(start, job.plan([3, 8]))
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=PATIENCE_S
    )
    assert done.returncode == code, done.stderr  # torchrun itself ends with 1
    assert done.stderr.count("planned: stage 0 t4-16g (16 GiB), stage 1 t4-16g (16 GiB)") == 1
    assert "found: cuda:0 Tesla V100-SXM2-32GB (32.0 GiB, v100-32g), cuda:1 Tesla" in done.stderr
    assert "no card is left for stage 0 (t4-16g), stage 1 (t4-16g)" in done.stderr
    assert "Traceback" not in done.stderr.split("error:")[0]
    assert "loading" not in done.stderr and not job.output.exists()
