"""The built-in library of device types: memory, bandwidth and arithmetic from spec sheets."""

from functools import cache
from pathlib import Path

from pydantic import Field

from llmpq.artifact import Strict, read_yaml

LIBRARY_PATH = Path(__file__).parent / "assets" / "devices.yaml"


class DeviceType(Strict):
    """Spec-sheet figures of one device type (dense arithmetic, no sparsity)."""

    name: str
    memory_gib: float = Field(gt=0)
    bandwidth_gbs: float = Field(gt=0)
    fp16_tflops: float = Field(gt=0)
    link_gbs: float = Field(gt=0)
    compute_capability: str = ""
    source: str


class DeviceLibrary(Strict):
    """All known device types by the name that cluster files use."""

    devices: dict[str, DeviceType]


@cache
def device_library() -> dict[str, DeviceType]:
    """The device types that ship with llmpq."""
    return read_yaml(LIBRARY_PATH, DeviceLibrary).devices
