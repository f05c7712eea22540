"""Specs that ship: what judging finds, and found by their settings alone."""

import json
from pathlib import Path

import pytest

from llmpq import model_lookup
from llmpq.judged_models import settings_key, shipped_spec
from llmpq.model_lookup import load_model_spec, needs_judging, read_config

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
JUDGED = [p for p in sorted(MODELS.glob("*.json")) if needs_judging(read_config(p), p)]


@pytest.mark.parametrize("name", ["glm-4.5-air", "qwen3-235b-a22b"])
def test_shipped_specs_are_what_judging_finds(name: str) -> None:
    """Of those that are counted soonest. Where this fails, run `python scripts/judge_models.py`."""
    pytest.importorskip("transformers")
    from llmpq.evaluation.judge import judge

    path = MODELS / f"{name}.json"
    shipped = shipped_spec(read_config(path))
    assert shipped is not None
    assert judge(path).model_copy(update={"name": shipped.name}) == shipped


def test_models_of_the_repository_are_planned_without_transformers(monkeypatch) -> None:
    monkeypatch.setattr(model_lookup, "find_spec", lambda name: None)
    assert len(JUDGED) >= 5
    for path in sorted(MODELS.glob("*.json")):
        config = read_config(path)
        layers = config.get("num_hidden_layers", config.get("n_layer"))
        assert load_model_spec(str(path)).num_layers == layers


def test_settings_of_layers_count_and_others_do_not(tmp_path, monkeypatch) -> None:
    config = json.loads(JUDGED[0].read_text())
    same = config | {"torch_dtype": "float16", "transformers_version": "1", "use_cache": False}
    other = config | {"num_hidden_layers": config["num_hidden_layers"] - 1}
    assert settings_key(same) == settings_key(config) != settings_key(other)
    assert shipped_spec(same) is not None and shipped_spec(other) is None
    (tmp_path / "config.json").write_text(json.dumps(same))
    monkeypatch.setattr(model_lookup, "find_spec", lambda name: None)
    assert load_model_spec(str(tmp_path)).name == str(tmp_path)
