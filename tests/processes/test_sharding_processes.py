"""Those tests of `tests/unit/test_sharding.py` that start processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_sharding import (
    FP32,
    MIXED,
    assert_alike,
    folder_of,  # noqa: F401  a fixture
    forward,
    load,
    together,
)

UNIT_TESTS = Path(__file__).parents[1] / "unit"  # whose helpers the processes import
PROCESS = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[1])
import torch, torch.distributed as dist
torch.set_num_threads(1)
import test_sharding as t
from llmpq.models.sharding import Shard
from llmpq.runtime.shard_group import distributed_shard_group
rank = int(sys.argv[4])
dist.init_process_group("gloo", f"file://{sys.argv[3]}/meet", rank=rank, world_size=2)
group = distributed_shard_group([[0, 1]], "gloo", t.CPU)
seen = torch.tensor([float(group.rank + 1)])
group.broadcast(seen)
assert seen.item() == 1.0
for dtype in (torch.float32, torch.bfloat16):
    stage = t.load(t.Path(sys.argv[2]), Shard(group.rank, 2), group, t.MIXED, dtype=dtype)
    with torch.inference_mode():
        states, logits = t.forward(stage)
    torch.save((states, logits), f"{sys.argv[3]}/{group.rank}-{dtype}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_real_processes_share_a_stage(folder_of, tmp_path):
    folder = folder_of("qwen3")
    paths = json.dumps([str(UNIT_TESTS), os.getcwd()])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, paths, str(folder), str(tmp_path), str(rank)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=240)
        assert worker.returncode == 0, errors
    for dtype, tolerance in ((FP32, 1e-5), (torch.bfloat16, 0.05)):
        [alone] = together([load(folder, precisions=MIXED, dtype=dtype)], forward)
        first, second = (torch.load(tmp_path / f"{rank}-{dtype}.pt") for rank in range(2))
        assert all(map(torch.equal, first, second))
        assert_alike(first, alone, tolerance)
