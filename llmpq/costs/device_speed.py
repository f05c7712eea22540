"""What kernels reach of a device's spec sheet: a few shares, the same for all devices.

They were fitted to tables of times of ten NVIDIA GPUs (`assets/efficiency.yaml`, made by
`scripts/fit_efficiency.py`). `Speed` holds the rates of one device. Not covered: which kernels a
layer calls (`costs.layer_kernels`), and how far off the times are (`costs.spec_sheet`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from llmpq.artifact import Strict, read_yaml
from llmpq.devices import DeviceType

EFFICIENCY_PATH = Path(__file__).parents[1] / "assets" / "efficiency.yaml"
USUAL_WATTS = 300.0  # of a board whose sheet does not say


class Efficiency(Strict):
    """What 16-bit kernels reach of spec sheets: `assets/efficiency.yaml`."""

    sources: list[str]
    num_gpus: int
    coefficients: dict[str, float]
    errors: dict[str, float]  # by phase: mean over left-out GPUs of the mean relative error


@cache
def efficiency() -> Efficiency:
    """The fit that ships with llmpq."""
    return read_yaml(EFFICIENCY_PATH, Efficiency)


def kernel_s(operations: Any, num_bytes: Any, flops: Any, bandwidth: Any, sharpness: float) -> Any:
    """Seconds of one kernel, or of an array of them: a maximum with a round corner.

    (compute**sharpness + memory**sharpness) ** (1 / sharpness): where arithmetic and memory take
    about as long, a kernel does not hide one behind the other fully.
    """
    return rounded_maximum(operations / flops, num_bytes / bandwidth, sharpness)


def rounded_maximum(one: Any, other: Any, sharpness: float) -> Any:
    """At least the larger, at most 2 ** (1 / sharpness) times that."""
    larger = np.maximum(one, other)
    ratio = np.minimum(one, other) / np.maximum(larger, 1e-30)
    return larger * (1.0 + ratio**sharpness) ** (1.0 / sharpness)


def reached_peak(device: DeviceType, c: Mapping[str, float], share: str = "linear_peak") -> float:
    """What share of its peak a large matrix product (or attention) reaches on a device.

    A board shares its power with memory and the rest (`board_watts`), so small boards slow their
    clocks down. GeForce tensor cores work at half rate with fp32 sums: easier to keep busy, and
    the clock rises above the sheet's.
    """
    watts = device.board_watts or USUAL_WATTS
    gain = c["half_rate_peak"] if device.fp16_accumulate_tflops is not None else 1.0
    return min(1.0, c[share] * gain * watts / (watts + c["board_watts"]))


@dataclass(frozen=True)
class Speed:
    """What kernels reach on one device: operations and bytes a second.

    `vector_flops` is the peak of arithmetic without tensor cores; others are what 16-bit kernels
    reach. `integer_flops` is at 8 bits; without such a rate, that of 16.
    """

    linear_flops: float
    integer_flops: float
    vector_flops: float
    attention_flops: float
    linear_bandwidth: float
    attention_bandwidth: float
    copy_bandwidth: float
    eager_bandwidth: float
    sharpness: float


def speed_of(device: DeviceType) -> Speed:
    c = efficiency().coefficients
    peak, bandwidth = device.fp16_tflops * 1e12, device.bandwidth_gbs * 1e9
    reached = reached_peak(device, c)
    return Speed(
        linear_flops=peak * reached,
        integer_flops=(device.int8_tops or device.fp16_tflops) * 1e12 * reached,
        vector_flops=(device.fp32_tflops or device.fp16_tflops) * 1e12,
        attention_flops=peak * reached_peak(device, c, "attention_peak"),
        linear_bandwidth=bandwidth * c["linear_bandwidth"],
        attention_bandwidth=bandwidth * c["attention_bandwidth"],
        copy_bandwidth=bandwidth * c["elementwise_bandwidth"],
        eager_bandwidth=bandwidth * c["eager_bandwidth"],
        sharpness=c["sharpness"],
    )
