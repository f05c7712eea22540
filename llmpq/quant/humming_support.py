"""Says whether humming-kernels can be used on this machine, and what to install where it cannot.

The reasons are messages for the user. Not covered: which linears its kernels serve, and which
kernel is fast where (`llmpq.kernel_table`).
"""

import os
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch

VERSION = "0.1.19"
FIRST_TORCH = (2, 11)  # for older versions the launcher must be built with a C++ compiler
CUDA_MAJORS = ("12", "13")  # torch's versions of CUDA for which there is an extra with NVRTC
HEADERS = ("cuda_runtime.h", "nvrtc.h", "cuda/std/cstdint")


def why_not_here(device: torch.device) -> str | None:
    """Why no kernel can be compiled and run on this device; None where it can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "humming needs an NVIDIA card and a torch that was built for CUDA"
    return why_not_installed() or why_no_compiler()


def why_not_installed() -> str | None:
    """The missing package and the command that installs it; None where nothing is missing."""
    try:
        found = metadata.version("humming-kernels")
    except metadata.PackageNotFoundError:
        return f"humming-kernels is not installed: {install_command()}"
    if found != VERSION:
        return f"humming-kernels {VERSION} is needed, not {found}: {install_command()}"
    missing = [name for name in ("triton", "cuda", "filelock") if find_spec(name) is None]
    if missing:
        return f"humming-kernels needs {', '.join(missing)}: {install_command()}"
    if tuple(map(int, torch.__version__.split(".")[:2])) < FIRST_TORCH:
        return f"humming-kernels needs torch {_dotted(FIRST_TORCH)} or newer"
    return None


def install_command(cuda: str | None = torch.version.cuda) -> str:
    """The pip command for a torch built for CUDA `cuda`; NVRTC must be of the same version.

    Python's package markers cannot test torch's CUDA, so that there is an extra for each version.
    """
    major = (cuda or CUDA_MAJORS[-1]).partition(".")[0]
    extra = f"gpu-cu{major}" if major in CUDA_MAJORS else "gpu"
    return f"pip install 'llmpq[{extra}]'"


@lru_cache(maxsize=1)
def why_no_compiler() -> str | None:
    """The missing part of NVRTC for torch's CUDA (library, headers, caller); tried once."""
    utils = library().utils
    try:
        caller = utils.nvrtc.may_build_nvrtc_compile_binary()
        utils.cuda.filter_cuda_paths(required_headers=list(HEADERS))
    except RuntimeError as error:
        return f"no NVRTC for CUDA {torch.version.cuda} ({error}): {install_command()}"
    return None if os.access(caller, os.X_OK) else f"{caller} is not executable (chmod +x)"


def library() -> Any:
    """The package humming, with the modules that are called here.

    A variable keeps its import from starting two processes that build files of its wheel again.
    """
    os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")
    import humming
    import humming.config
    import humming.dtypes
    import humming.kernel.humming
    import humming.ops
    import humming.transform
    import humming.tune
    import humming.utils.cpu
    import humming.utils.cuda
    import humming.utils.nvrtc

    return humming


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
