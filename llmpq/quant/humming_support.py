"""Says whether humming-kernels serves a linear on a card, and what to install where it does not.

`why_not` checks what its kernels can do, `why_not_here` what this machine has; both return the
reason as a message for the user. Sources: humming 0.1.19's README, docs/config.md, tests and tile
heuristics. Not covered: which kernel is fast where (`llmpq.kernel_table`).
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch

VERSION = "0.1.19"
FIRST_TORCH = (2, 11)  # for older versions the launcher must be built with a C++ compiler
CUDA_MAJORS = ("12", "13")  # torch's versions of CUDA for which there is an extra with NVRTC
CAPABILITIES = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)  # for which it has tiles
DTYPES = {torch.float16: (7, 5), torch.bfloat16: (8, 0)}  # with the capability that each needs
BITS = (3, 4, 8)
GROUPS = (32, 64, 128, 256)  # inputs to a scale that fit its tiles
OUT_LEAST, IN_LEAST = 64, 32  # the smallest shape of its own tests
HEADERS = ("cuda_runtime.h", "nvrtc.h", "cuda/std/cstdint")


def why_not(
    capability: tuple[int, int],
    dtype: torch.dtype,
    bits: int,
    in_features: int,
    out_features: int,
    group: int,
) -> str | None:
    """Why a card of this compute capability cannot serve such a linear; None where it can.

    `group` inputs share a scale; a group of `in_features` means one scale a row.
    """
    name = str(dtype).removeprefix("torch.")
    if capability[0] * 10 + capability[1] not in CAPABILITIES:
        return f"humming {VERSION} has no kernels for compute capability {_dotted(capability)}"
    if dtype not in DTYPES:
        return f"humming multiplies float16 and bfloat16, not {name}"
    if capability < DTYPES[dtype]:
        return f"{name} needs compute capability {_dotted(DTYPES[dtype])}, not the card's " + (
            f"{_dotted(capability)}; float16 is served"
        )
    if bits not in BITS:
        return f"weights of {bits} bits are not served, {_listed(BITS)} are"
    if out_features < OUT_LEAST or in_features < IN_LEAST:
        return f"[{out_features}, {in_features}] is smaller than {[OUT_LEAST, IN_LEAST]}"
    if group not in (in_features, *GROUPS):
        return f"groups of {group} are not served, {_listed(GROUPS)} and whole rows are"
    return None


def why_not_here(device: torch.device) -> str | None:
    """Why no kernel can be compiled and run on this device; None where it can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "humming needs an NVIDIA card, and a torch that was built for CUDA"
    return why_not_installed() or why_no_compiler()


def installed() -> bool:
    """Whether the version that this is written for is installed, with all that it imports."""
    return why_not_installed() is None


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
        return f"humming-kernels has its launcher for torch {_dotted(FIRST_TORCH)} and newer"
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
    return None if os.access(caller, os.X_OK) else f"{caller} may not be executed (chmod +x)"


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


def _listed(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
