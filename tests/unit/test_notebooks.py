"""Every notebook runs from the root of the repository, top to bottom, and keeps no outputs."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUOTED = {
    "plan_a_cluster": ("48 layers", "16: does not fit", "8: fits", "v100   v100-32g"),
}


def run(path: Path) -> dict[str, Any]:
    """Executes the code cells of a notebook in one namespace, as a kernel would."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    return names


def test_there_are_notebooks() -> None:
    listed = (ROOT / "notebooks" / "README.md").read_text()
    assert NOTEBOOKS and all(path.name in listed for path in NOTEBOOKS)
    assert QUOTED.keys() <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Where a notebook's text quotes what its cells print, they print it."""
    monkeypatch.chdir(ROOT)
    run(path)
    printed = capsys.readouterr().out
    assert all(part in printed for part in QUOTED.get(path.stem, ()))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_kept(path: Path) -> None:
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
