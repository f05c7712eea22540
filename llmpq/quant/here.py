"""Describes this process's devices as the `Machine` that the kernel table takes.

Optional libraries are only searched here, and are imported by the layers that use them. Only
bitsandbytes is imported, as its builds for other systems can be found but fail.
"""

import logging
from functools import lru_cache

import torch

from llmpq.machine import BITSANDBYTES, HUMMING, INT4_TILES, TRITON, VNNI, Machine
from llmpq.quant import humming_support, kernels, triton_kernels


def machine_here(device: torch.device, dtype: torch.dtype, optional: bool = False) -> Machine:
    """A device of this process with activations of `dtype`.

    With `optional`, bitsandbytes is searched too, which takes a second.
    """
    device, name = torch.device(device), str(dtype).removeprefix("torch.")
    libraries = {BITSANDBYTES} if optional and has_bitsandbytes() else set()
    if device.type != "cpu":  # a card, or "meta", where only sizes are counted
        capability = (0, 0)
        if device.type == "cuda" and torch.version.cuda is not None and torch.cuda.is_available():
            capability = torch.cuda.get_device_capability(device)
            libraries |= _on(device)
        return Machine("cuda", name, capability, libraries=frozenset(libraries))
    abilities = {INT4_TILES: kernels.int4_tiles_work(), VNNI: kernels.vnni_works()}
    features = frozenset(name for name, is_there in abilities.items() if is_there)
    return Machine("cpu", name, features=features, libraries=frozenset(libraries))


@lru_cache(maxsize=1)
def has_bitsandbytes() -> bool:
    """Whether bitsandbytes is installed and can be imported; tried once."""
    # On CPUs it warns that a package is missing which we do not use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional  # noqa: F401
    except Exception:  # builds for another system fail in ways of their own
        return False
    return True


def _on(device: torch.device) -> set[str]:
    """The kernel libraries that are installed and run on this card."""
    found = set()
    if humming_support.why_not_here(device) is None:
        found.add(HUMMING)
    if triton_kernels.available(device):
        found.add(TRITON)
    return found
