"""Checkpoints that the pipeline tests share; each is made once, when first asked for."""

import json
from collections.abc import Callable
from functools import cache

import pytest
import torch
import transformers
from families import TINY_TALES, TinyModel, save, trained
from jobs import Job

from llmpq.model_spec import ASSETS


@pytest.fixture(autouse=True, scope="session")
def quiet_and_alone():
    """One thread: products are tiny, and bf16 sums must not depend on how work is split."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def family_model(tmp_path_factory) -> Callable[[str], TinyModel]:
    """family -> its tiny model."""
    return cache(lambda family: save(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="session")
def stories() -> list[str]:
    """The shipped prompts."""
    lines = (ASSETS / "prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


@pytest.fixture(scope="session")
def tiny_tales(stories) -> TinyModel:
    """The shipped model with the first of the shipped prompts."""
    return trained(TINY_TALES, stories[:16])


@pytest.fixture(scope="session")
def shared_model(shared, stories) -> Callable[[str], TinyModel]:
    """name -> a trained model of the data folder."""

    def make(name: str) -> TinyModel:
        folder = shared / "models" / name
        if not folder.is_dir():
            pytest.skip(f"the data folder holds no models/{name}")
        return trained(folder, stories[16:28])

    return cache(make)


@pytest.fixture
def job(tmp_path, tiny_tales) -> Job:
    """Prompts for the shipped model, for real processes."""
    return Job(tmp_path, tiny_tales)


@pytest.fixture
def expected(job) -> dict[str, list[int]]:
    """The tokens of its requests."""
    return job.expected()
