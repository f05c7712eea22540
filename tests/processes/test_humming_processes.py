"""Those tests of `tests/unit/test_humming.py` that start processes of their own."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


def test_importing_the_layers_leaves_humming_alone():
    program = "import sys, llmpq.quant; sys.exit('humming' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
