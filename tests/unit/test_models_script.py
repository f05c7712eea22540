"""`scripts/models.py` on a few classes; all of them are in docs/models.md."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")


def test_a_few_classes_are_exact_or_refused(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = importlib.util.spec_from_file_location("models_script", repo_root / "scripts/models.py")
    assert file and file.loader
    script = importlib.util.module_from_spec(file)
    monkeypatch.setitem(sys.modules, "models_script", script)
    file.loader.exec_module(script)
    results = script.all_tried(["llama", "nanochat", "opt", "lfm2_moe", "codegen", "falcon_h1"])
    verdicts = {result.model_type: result.verdict for result in results}
    assert verdicts == {
        "llama": "exact",
        "nanochat": "exact",
        "opt": "exact",
        "lfm2_moe": "refused",
        "codegen": "refused",
        "falcon_h1": "refused",
    }
    assert all(result.reason for result in results if result.verdict == "refused")
    page = script.table(results)
    assert "3 of 6 are exact" in page and "| `opt` | OPTForCausalLM | exact |  |" in page
