"""Those tests of `tests/unit/test_planner.py` that start processes of their own."""

import subprocess
import sys
from pathlib import Path

from test_planner import (
    command_line,
    files,  # noqa: F401  a fixture
)

from llmpq.artifact import read_json, write_json
from llmpq.costs.fits import chosen_models
from llmpq.plan_data import Plan
from llmpq.profile_data import Profile


def test_json_on_standard_output_is_alone_there(files: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "llmpq.cli.plan", *command_line(files, "--json", "-")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert Plan.model_validate_json(answer.stdout).predicted
    assert "tokens/s" in answer.stderr


def test_a_plan_imports_no_torch(files: Path) -> None:
    """Nor what fits a profile's models, which the profile holds."""
    path = files / "profiles" / "cpu.json"
    profile = read_json(path, Profile)
    write_json(path, profile.model_copy(update={"models": chosen_models(profile.rows)}))
    heavy = ["torch", "transformers", "pandas", "sklearn"]
    code = (
        "import sys\nfrom llmpq.cli.plan import main\n"
        f"main({command_line(files, '-q')!r}, standalone_mode=False)\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert answer.stdout.strip() == "[]"
