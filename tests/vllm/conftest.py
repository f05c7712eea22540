"""vLLM's Python, and the models that are exported to it."""

import os
from pathlib import Path

import pytest
from tiny_models import trained, widened

from llmpq.model_spec import ASSETS


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter of an environment with vLLM for CPUs (`make vllm-env`)."""
    found = os.environ.get("LLMPQ_VLLM_PYTHON")
    if not found:
        pytest.skip("$LLMPQ_VLLM_PYTHON names no Python with vLLM; run 'make vllm-test'")
    return found


@pytest.fixture(scope="session")
def model_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The folder of a model by its name; made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = make(name)
        return made[name]

    def make(name: str) -> Path:
        if name == "tiny-tales":
            return ASSETS / "tiny-tales"
        if name in ("qwen2", "qwen3", "opt"):
            return trained(name, tmp_path_factory.mktemp(name))
        models = request.getfixturevalue("shared") / "models"
        if name == "stories-260k":
            return widened(models / name, tmp_path_factory.mktemp(name))
        return models / name

    return folder
