"""Those tests of `tests/unit/test_library.py` that start processes of their own."""

import subprocess
import sys

from test_library import CLUSTER


def test_only_the_engine_imports_torch() -> None:
    code = (
        "import sys, llmpq\n"
        "print([m for m in ('pydantic', 'torch', 'numpy') if m in sys.modules])\n"
        f"cluster, work = llmpq.load_cluster('{CLUSTER}'), "
        "llmpq.load_workload('configs/workloads/quickstart.yaml')\n"
        "llmpq.simulate(llmpq.plan(llmpq.load_model(), cluster, work, time_limit_s=1))\n"
        "print('torch' in sys.modules, callable(llmpq.plan))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False True"]
