"""`llmpq-profile links` with real processes. What it says of speed is not checked here."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
from jobs import PATIENCE_S, wait_until

from llmpq.cluster import load_cluster
from llmpq.link_data import load_links

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LINKS = ["-m", "llmpq.cli.profile", "links", "--device", "cpu"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CLUSTER = """
nodes: [{name: n, devices: [{type: fast, count: 3}], link: {bandwidth_gbs: 99, latency_us: 99}}]
rehearse: {fast: {slowdown: 2, memory_mib: 100}}
"""


def command(start: list[str], *more: object) -> list[str]:
    return [sys.executable, *start, *map(str, more)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(line: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        line, capture_output=True, text=True, env=environment(), timeout=PATIENCE_S
    )


def test_three_local_ranks_and_a_cluster_file(tmp_path):
    (tmp_path / "in.yaml").write_text(CLUSTER)
    files = ["-o", tmp_path / "links.json", "--cluster", tmp_path / "in.yaml"]
    files += ["--write-cluster", tmp_path / "out.yaml"]
    done = run(command(LINKS, "--ranks", 3, "--budget-s", 1, *files))
    assert done.returncode == 0, done.stderr
    found = load_links(tmp_path / "links.json")
    assert found.backend == "gloo" and found.between_nodes is None
    pairs = {(pair.source, pair.destination): pair for pair in found.pairs}
    assert set(pairs) == {(a, b) for a in range(3) for b in range(3) if a != b}
    for (source, destination), pair in pairs.items():
        sizes = [row.num_bytes for row in pair.rows]
        assert sizes == sorted(sizes) and len(sizes) >= 3
        assert all(0 < r.time_us_p10 <= r.time_us <= r.time_us_p90 for r in pair.rows)
        assert all(r.num_samples >= 3 for r in pair.rows)
        assert (pair.shared_bandwidth_gbs is not None) == (destination == source + 1)
    link = load_cluster(tmp_path / "out.yaml").nodes[0].link
    assert link.bandwidth_gbs == pytest.approx(found.nodes[0].link.bandwidth_gbs, rel=1e-3)
    assert "link: {bandwidth_gbs:" in done.stdout and "cluster ->" in done.stderr


def test_torchrun_with_the_module(tmp_path):
    output = tmp_path / "links.json"
    done = run(command([*TORCHRUN, *LINKS], "--budget-s", 0.5, "-o", output, "-q"))
    assert done.returncode == 0, done.stderr
    assert len(load_links(output).pairs) == 2


def test_a_lost_rank_ends_with_one_message(tmp_path):
    line = command(LINKS, "--ranks", 2, "--budget-s", 60, "-o", tmp_path / "links.json")
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment())
    wait_until(lambda: len(workers(process)) == 2, process)
    workers(process)[1].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 4, errors
    assert "worker 1 (rank 1, " in errors
    assert "was ended by SIGKILL; nothing was written" in errors
    assert errors.count("error:") == 1 and "Traceback" not in errors
    assert not (tmp_path / "links.json").exists()


def workers(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """Ranks that compute already, by number: their sockets are open."""
    found = {}
    for child in psutil.Process(process.pid).children():
        if len(child.net_connections()) >= 2:
            found[int(child.environ()["RANK"])] = child
    return found
