"""Those tests of `tests/unit/test_cli.py` that start processes of their own."""

import json
import subprocess
import sys

import pytest
from test_cli import small_files

from llmpq.cli.main import COMMANDS

# What is slow to import, and help can do without.
SLOW_LIBRARIES = {"torch", "transformers", "numpy", "pandas", "highspy", "rich", "lm_eval"}


@pytest.mark.parametrize("name", ["main", *COMMANDS])
def test_help_imports_nothing_slow(name):
    code = (
        "import sys, atexit, json\n"
        "atexit.register(lambda: print(json.dumps(list(sys.modules)), file=sys.stderr))\n"
        f"sys.argv = ['llmpq', '--help']\nfrom llmpq.cli.{name} import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: ")
    imported = set(json.loads(done.stderr))
    assert "click" in imported and not imported & SLOW_LIBRARIES


def test_a_report_that_cannot_be_written_is_one_error(tmp_path):
    cluster, workload = small_files(tmp_path)
    words = ["--cluster", str(cluster), "--workload", str(workload), "--no-what-if"]
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "llmpq.cli.plan", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output cannot be written (No space")
