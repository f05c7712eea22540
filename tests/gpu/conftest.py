"""Fixtures of the tests for cards. With LLMPQ_GPU_TESTS=cpu they run on a CPU as far as it goes."""

import os

import pytest


@pytest.fixture(scope="session")
def device():
    """The first card; the CPU where the tests themselves are tried out."""
    torch = pytest.importorskip("torch")
    tried_out = os.environ.get("LLMPQ_GPU_TESTS") == "cpu"
    return torch.device("cpu") if tried_out else torch.device("cuda", 0)


@pytest.fixture
def card(device):
    """The same for tests in which no CPU can stand in for a card."""
    if device.type != "cuda":
        pytest.skip("no CPU can stand in for a card here")
    return device
