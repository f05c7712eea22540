"""Fixtures and markers of all tests."""

import functools
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: others use the cores too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import _common  # noqa: F401  of scripts/bench: hides its `kernels` from transformers
import pytest

REPO_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The data folder (texts, traces, small checkpoints, published measurements)."""
    folder = shared_folder()
    if folder is None:
        pytest.skip("no data folder: neither $LLMPQ_SHARED nor shared/ in or beside the checkout")
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small products: threads only wait for each other on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shared_folder() -> Path | None:
    """Where the data folder lies, if there is one."""
    named = os.environ.get("LLMPQ_SHARED")
    roots = [Path(named)] if named else [REPO_ROOT / "shared", REPO_ROOT.parent / "shared"]
    places = [place for root in roots for place in (root / "data", root)]
    return next((place for place in places if (place / "models").is_dir()), None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the users of `shared`, and skips what this machine lacks a GPU or a library for.

    LLMPQ_GPU_TESTS=cpu runs those that take a `device` on a CPU, which tries out the tests.
    LLMPQ_ALL_LIBRARIES=1 skips no test for want of a library: it fails where one is missing.
    """
    all_libraries = os.environ.get("LLMPQ_ALL_LIBRARIES") == "1"
    on_cpu = os.environ.get("LLMPQ_GPU_TESTS") == "cpu"
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "shared" in fixtures:
            item.add_marker(pytest.mark.shared)
        is_tried = on_cpu and "device" in fixtures
        if item.get_closest_marker("gpu") and not is_tried and not has_gpu():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
        wanted = [name for mark in item.iter_markers("library") for name in mark.args]
        missing = [name for name in wanted if find_spec(name) is None]
        if missing and not all_libraries:
            reason = f"{' and '.join(missing)} not installed (make optional installs it)"
            item.add_marker(pytest.mark.skip(reason=reason))


@functools.cache
def has_gpu() -> bool:
    """Whether torch is here and sees an NVIDIA GPU."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
