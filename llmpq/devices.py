"""The built-in library of device types: memory, bandwidth and arithmetic from spec sheets.

Figures are those of one device: dense arithmetic (no sparsity), fp32 accumulation, transfers one
way. What a sheet does not say is None. A price in the library is a public list price, for people
to look at: a cluster's cost counts only the prices that its own file gives.
"""

from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from llmpq.artifact import Strict, read_yaml

LIBRARY_PATH = Path(__file__).parent / "assets" / "devices.yaml"


class DeviceType(Strict):
    """Spec-sheet figures of one device type (dense arithmetic, no sparsity).

    `link_gbs` is what reaches the device from its host, `peer_gbs` from its neighbours where they
    have a faster way (NVLink, Infinity Fabric); both one way. `fp16_accumulate_tflops` is the rate
    with fp16 sums where that differs: on GeForce cards it is twice `fp16_tflops`.
    """

    name: str
    kind: Literal["gpu", "cpu"] = "gpu"
    memory_gib: float = Field(gt=0)
    bandwidth_gbs: float = Field(gt=0)
    fp16_tflops: float = Field(gt=0)
    link_gbs: float = Field(gt=0)
    compute_capability: str = ""
    source: str
    fp16_accumulate_tflops: float | None = Field(default=None, gt=0)
    fp32_tflops: float | None = Field(default=None, gt=0)
    int8_tops: float | None = Field(default=None, gt=0)
    fp8_tflops: float | None = Field(default=None, gt=0)
    fp4_tflops: float | None = Field(default=None, gt=0)
    link: str = ""
    peer_gbs: float | None = Field(default=None, gt=0)
    l2_mib: float | None = Field(default=None, gt=0)
    board_watts: float | None = Field(default=None, gt=0)
    price_per_hour: float | None = Field(default=None, gt=0)
    price_source: str = ""


class DeviceLibrary(Strict):
    """All known device types by the name that cluster files use; `sources` spells sources out."""

    sources: dict[str, str] = {}
    devices: dict[str, DeviceType]


@cache
def device_library() -> dict[str, DeviceType]:
    """The device types that ship with llmpq."""
    return read_yaml(LIBRARY_PATH, DeviceLibrary).devices
