"""Those tests of `tests/unit/test_layering.py` that start processes of their own."""

import subprocess
import sys

from test_layering import ROOT, modules

# Commands that must start without torch.
LIGHT_COMMANDS = ["main", "plan", "profile", "run", "eval", "export", "common"]


def test_commands_start_without_torch() -> None:
    present = [f"llmpq.cli.{name}" for name in LIGHT_COMMANDS if f"llmpq.cli.{name}" in modules()]
    heavy = ["torch", "transformers", "pandas", "scipy", "sklearn"]
    code = f"import sys, {', '.join(present)}\nprint(*[m for m in {heavy} if m in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == [], "importing the commands imports these"
