"""The machines: nodes, their devices in order, and the links between them.

A `rehearse` entry makes a device type stand for a slowed-down CPU process with a memory cap, so
that a plan for unequal devices runs on a laptop.
"""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from llmpq.artifact import Strict, read_yaml, show_value
from llmpq.devices import DeviceType, device_library
from llmpq.errors import listed
from llmpq.machine import LIBRARIES, parse_capability, served_libraries

MAX_LATENCY_US = 1e9  # a thousand seconds
MAX_TFLOPS = 1e6
MAX_GBS = 1e6  # a petabyte a second: more is a slip of the unit
GIB = 1024**3
MIB = 1024**2
MAX_MEMORY_GIB = 1 << 20  # a pebibyte: more is a slip of the unit
# What a CUDA context, its libraries and the allocator's slack take from a card.
GPU_CONTEXT_BYTES = 1 * GIB
DEFAULT_LINK_GBS = 12.0  # from the host to a card that no library knows: PCIe 3.0 x16, reached
FIGURES = ("bandwidth_gbs", "tflops", "compute_capability", "kind")


class Link(Strict):
    """Latency + bytes / bandwidth."""

    bandwidth_gbs: float = Field(gt=0, le=MAX_GBS)
    latency_us: float = Field(ge=0, le=MAX_LATENCY_US)

    def seconds(self, num_bytes: float) -> float:
        """Time to send one message."""
        return self.latency_us * 1e-6 + num_bytes / (self.bandwidth_gbs * 1e9)


class DeviceGroup(Strict):
    """`count` equal devices of a node. `price_per_hour`: of each, in any one currency.

    `kernels`: libraries of kernels that are installed there, of "humming" and "triton"; without
    the key, what `llmpq[gpu]` installs is there, as far as it serves the device.

    `bandwidth_gbs` (of the memory), `tflops` (dense, 16 bits), `compute_capability` and `kind`
    describe a type that the library does not have, or correct one that it has.
    """

    type: str
    count: PositiveInt = Field(default=1, le=4096)
    memory_gib: float | None = Field(default=None, gt=0, le=MAX_MEMORY_GIB)
    price_per_hour: float | None = Field(default=None, gt=0)
    kernels: list[str] | None = None
    bandwidth_gbs: float | None = Field(default=None, gt=0, le=MAX_GBS)
    tflops: float | None = Field(default=None, gt=0, le=MAX_TFLOPS)
    compute_capability: str | None = None
    kind: Literal["gpu", "cpu"] | None = None


class Node(Strict):
    """A machine.

    `price_per_hour`: of the machine with those of its devices that have no price of their own; the
    prices of the others come on top. One currency for the whole cluster.
    """

    name: str
    devices: list[DeviceGroup] = Field(min_length=1)
    link: Link = Link(bandwidth_gbs=12.0, latency_us=20)
    price_per_hour: float | None = Field(default=None, gt=0)

    def total_price_per_hour(self) -> float | None:
        """The node's price and its devices'; None where nothing says what some device costs."""
        prices = [group.price_per_hour for group in self.devices]
        if self.price_per_hour is None and None in prices:
            return None
        return (self.price_per_hour or 0.0) + sum(
            group.count * (group.price_per_hour or 0.0) for group in self.devices
        )


class Rehearsal(Strict):
    """How a CPU process plays this device type."""

    slowdown: float = Field(ge=1)
    memory_mib: float = Field(gt=0, le=MAX_MEMORY_GIB * 1024)


class Cluster(Strict):
    """cluster.yaml. Prices, where given, are all in one currency, which the file does not name."""

    name: str = "cluster"
    nodes: list[Node] = Field(min_length=1)
    link: Link = Link(bandwidth_gbs=1.25, latency_us=50)
    rehearse: dict[str, Rehearsal] = {}

    @model_validator(mode="after")
    def _check_types(self) -> "Cluster":
        known = {*device_library(), *self.rehearse}
        unknown = {g.type for g in self._groups if g.type not in known and g.memory_gib is None}
        faults = _unknown_types(sorted(unknown), known)
        faults += [
            f"{name} is rehearsed: memory_gib does not apply to it; give rehearse.{name}.memory_mib"
            for name in sorted(self._rehearsed_with_memory())
        ]
        faults += [*self._figure_faults(), *self._kernel_faults()] if not unknown else []
        names = [node.name for node in self.nodes]
        if len(set(names)) < len(names):
            faults.append(f"node names must differ, found {', '.join(names)}")
        if faults:
            raise ValueError("; ".join([*faults, *self._doubts(known | unknown)]))
        return self

    def _doubts(self, known: set[str]) -> list[str]:
        """Beside other faults: types that nothing but a profile could make known."""
        names = {g.type for g in self._groups if g.bandwidth_gbs is None}
        return _unknown_types(sorted(names - known), known & set(device_library()))

    @property
    def _groups(self) -> list[DeviceGroup]:
        return [group for node in self.nodes for group in node.devices]

    def _rehearsed_with_memory(self) -> set[str]:
        return {
            g.type for g in self._groups if g.type in self.rehearse and g.memory_gib is not None
        }

    def _kernel_faults(self) -> list[str]:
        """Kernels that there are not, that do not serve a type, or that differ within one."""
        faults = []
        for name in dict.fromkeys(group.type for group in self._groups):
            given = [group.kernels for group in self._groups if group.type == name]
            if any(kernels != given[0] for kernels in given[1:]):
                faults.append(
                    f"{name}: its groups name different kernels; a type has the same everywhere: "
                    "give each of its groups the same list"
                )
            elif given[0] is not None:
                faults += self._faults_of(name, given[0])
        return faults

    def _figure_faults(self) -> list[str]:
        """Figures that make no device, or that differ within one type."""
        faults = []
        for name in dict.fromkeys(group.type for group in self._groups):
            given = {_figures(group) for group in self._groups if group.type == name}
            if len(given) > 1:
                faults.append(
                    f"{name}: its groups have different {', '.join(FIGURES)}; a type has the same "
                    "everywhere: give each kind of device a name of its own"
                )
                continue
            bandwidth, tflops, *_ = next(iter(given))
            if name in self.rehearse and any(next(iter(given))):
                faults.append(
                    f"{name} is rehearsed on a CPU: {', '.join(FIGURES)} do not apply to it; "
                    "leave them out"
                )
            elif (bandwidth is None) != (tflops is None) and not self.is_in_library(name):
                missing = "tflops" if tflops is None else "bandwidth_gbs"
                faults.append(
                    f"{name}: is not in the library and has no {missing}; give bandwidth_gbs (of "
                    "its memory, GB/s) and tflops (dense, 16 bits), or neither and a profile of it"
                )
        return faults

    def _faults_of(self, name: str, kernels: list[str]) -> list[str]:
        if name in self.rehearse:
            return [f"{name} is rehearsed on a CPU: kernels does not apply to it; leave it out"]
        capability = self.capability_of(name)
        served = served_libraries(parse_capability(capability))
        return [
            f"{name}: kernels names {kernel!r}, which {_why_no_library(kernel, capability)}; use "
            f"[{', '.join(lib for lib in LIBRARIES if lib in served)}] or a part of it"
            for kernel in kernels
            if kernel not in served
        ]

    def kernels_of(self, device_type: str) -> list[str] | None:
        """The libraries of kernels that the file names for a type; None: it says nothing."""
        own = (group.kernels for group in self._groups if group.type == device_type)
        return next(own, None)

    def is_in_library(self, device_type: str) -> bool:
        """Whether llmpq ships figures of a type."""
        return device_type in device_library()

    def figures_of(self, device_type: str) -> DeviceType | None:
        """What the file or else the library says of a type; None: not enough to price it."""
        group = self._group_of(device_type)
        sheet = device_library().get(device_type)
        given = {
            "bandwidth_gbs": group.bandwidth_gbs,
            "fp16_tflops": group.tflops,
            "compute_capability": group.compute_capability,
            "kind": group.kind,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if sheet is not None:
            return sheet.model_copy(update=given)
        if not {"bandwidth_gbs", "fp16_tflops"} <= given.keys():
            return None
        own = {"name": device_type, "memory_gib": group.memory_gib, "link_gbs": DEFAULT_LINK_GBS}
        return DeviceType.model_validate({**own, **given, "source": "the cluster file"})

    def capability_of(self, device_type: str) -> str:
        """A type's compute capability; "" where neither the file nor the library has it."""
        sheet = device_library().get(device_type)
        own = self._group_of(device_type).compute_capability
        return own or (sheet.compute_capability if sheet else "")

    def kind_of(self, device_type: str) -> Literal["gpu", "cpu"]:
        """Whether a type is a card or a CPU; a card where nothing says so."""
        sheet = device_library().get(device_type)
        return self._group_of(device_type).kind or (sheet.kind if sheet else "gpu")

    def _group_of(self, device_type: str) -> DeviceGroup:
        none = DeviceGroup(type=device_type)
        return next((group for group in self._groups if group.type == device_type), none)

    def devices(self) -> list["Device"]:
        """Every device, node by node."""
        return [
            Device(node.name, group.type, self._memory_bytes(group))
            for node in self.nodes
            for group in node.devices
            for _ in range(group.count)
        ]

    def link_between(self, node: str, other: str) -> Link:
        """The link between two nodes, or inside one."""
        if node != other:
            return self.link
        return next(n.link for n in self.nodes if n.name == node)

    def price_per_hour(self) -> float | None:
        """What all nodes cost together; None where some device has no price, nor has its node."""
        prices = [node.total_price_per_hour() for node in self.nodes]
        known = [price for price in prices if price is not None]
        return sum(known) if len(known) == len(prices) else None

    def _memory_bytes(self, group: DeviceGroup) -> int:
        if group.type in self.rehearse:
            return int(self.rehearse[group.type].memory_mib * MIB)
        return max(0, int(group_gib(group) * GIB) - GPU_CONTEXT_BYTES)


@dataclass(frozen=True)
class Device:
    """One device. `memory_bytes` is what weights, cache and activations may take."""

    node: str
    type: str
    memory_bytes: int


def load_cluster(path: Path) -> Cluster:
    """Reads cluster.yaml."""
    return read_yaml(path, Cluster)


def _why_no_library(name: str, capability: str) -> str:
    if name not in LIBRARIES:
        return "is not a kernel library"
    least = ".".join(map(str, LIBRARIES[name]))
    return f"needs compute capability {least} (this device: {capability or 'none'})"


OTHER_CARDS = (
    "('llmpq-profile devices' lists all; any other card: give memory_gib with bandwidth_gbs "
    "and tflops, or memory_gib and a profile of that type; a `rehearse` entry makes any name "
    "known)"
)


def group_gib(group: DeviceGroup) -> float:
    """Memory of each device of a group that is not rehearsed."""
    return group.memory_gib or device_library()[group.type].memory_gib


def device_gib(cluster: Cluster, node: str, device_type: str) -> float:
    """Memory of a device of this type on a node, the least where groups differ."""
    if device_type in cluster.rehearse:
        return cluster.rehearse[device_type].memory_mib / 1024
    groups = [g for n in cluster.nodes if n.name == node for g in n.devices]
    return min(group_gib(group) for group in groups if group.type == device_type)


def _figures(group: DeviceGroup) -> tuple[object, ...]:
    return tuple(getattr(group, name) for name in FIGURES)


def unknown_type(name: str, known: Collection[str]) -> str:
    """What to say of a type that nothing is known of, and what would make it usable."""
    return f"{_nearest(name, known)} {OTHER_CARDS}"


def _unknown_types(names: Sequence[str], known: Collection[str]) -> list[str]:
    """The same of several types; what would make them usable is said once."""
    return [f"{listed([_nearest(name, known) for name in names])} {OTHER_CARDS}"] if names else []


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name.lower(), sorted(known), n=3, cutoff=0.3)
    hint = f"did you mean {' or '.join(near)}?" if near else "no known type is similar"
    return f"unknown device type {show_value(name)}; {hint}"
