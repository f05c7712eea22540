"""Those tests of `tests/unit/test_judge.py` that start processes of their own."""

import json
import sys
from pathlib import Path

import pytest


def test_planning_refuses_what_a_run_would(tmp_path: Path, repo_root: Path) -> None:
    """By the command, in a process of its own, as its judge is."""
    pytest.importorskip("transformers")
    import subprocess

    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "codegen", "vocab_size": 97}))
    configs = repo_root / "configs"
    cluster = next(iter(sorted((configs / "clusters").glob("*.yaml"))))
    workload = next(iter(sorted((configs / "workloads").glob("*.yaml"))))
    command = [sys.executable, "-m", "llmpq.cli.main", "plan", "--model", str(path)]
    files = ["--cluster", str(cluster), "--workload", str(workload)]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "models of type 'codegen' have a layout" in line and len(line) <= 300
