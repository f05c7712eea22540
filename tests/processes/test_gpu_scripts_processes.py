"""Those tests of `tests/unit/test_gpu_scripts.py` that start processes of their own."""

import os
import subprocess
import sys

import gpu_report
import pytest
from test_gpu_scripts import ROOT


@pytest.mark.slow
def test_steps_run_on_a_cpu_from_the_shell(tmp_path):
    """What of the steps is quick, from kernels to predictions; the numbers are of this CPU."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    names = ["kernels", "serving", "predictions"]
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu.sh"), *names],
        env=os.environ | {"DEVICE": "cpu", "OUT": str(out), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stdout
    assert "NO CARD IS MEASURED" in done.stdout
    report = gpu_report.gather(out)
    kinds = {row["kind"] for name in names for row in report[name]}
    assert kinds == {"linear", "serving", "transformers", "prediction"}
    assert {step["code"] for step in report["steps"].values()} == {0}
    assert {row["precision"] for row in report["predictions"]} == {"16", "8", "4", "3"}
    assert all(row["tokens_per_s"] > 0 for row in report["serving"])
