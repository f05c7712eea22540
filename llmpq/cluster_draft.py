"""A first cluster file of the devices that were found on a machine.

Links are guessed from the library's figure for the card; `llmpq-profile links` measures them. A
card that is not in the library is given the nearest type. Without a card the file rehearses two
devices as slowed-down processes of this CPU.
"""

import json
import math
import os
import platform
import re
from collections.abc import Sequence
from typing import Literal

from llmpq.artifact import Strict
from llmpq.devices import DeviceType, device_library

REHEARSED_SHARE = 0.4  # of the free memory, for each of two processes
LINK_LATENCY_US = 20
PROCESS_LINK_GBS, PROCESS_LINK_US = 1.0, 800  # gloo between processes


class FoundDevice(Strict):
    """A device of this machine. `type`: of the library; None where it is not there.

    `bandwidth_gbs` is that of a copy, `one_thread_gbs` with one of `num_threads`; None without
    torch.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    memory_gib: float
    free_gib: float
    type: str | None = None
    compute_capability: str | None = None
    bandwidth_gbs: float | None = None
    num_threads: int | None = None
    one_thread_gbs: float | None = None

    @property
    def nearest_type(self) -> str:
        """The card's type, or the one with the most similar memory and bandwidth."""

        def distance(device: DeviceType) -> float:
            memory = math.log(device.memory_gib / self.memory_gib)
            return math.hypot(memory, math.log(device.bandwidth_gbs / (self.bandwidth_gbs or 1.0)))

        cards = {key: device for key, device in device_library().items() if device.kind == "gpu"}
        return self.type or min(cards, key=lambda key: distance(cards[key]))


def cluster_text(here: Sequence[FoundDevice], node: str = "") -> str:
    """A cluster.yaml of the cards among these devices, or of two rehearsed ones on the CPU."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", node or platform.node()) or "node0"
    cards = [device for device in here if device.kind == "cuda"]
    return _cards_text(name, cards) if cards else _rehearsal_text(name, here[0])


def _cards_text(node: str, cards: Sequence[FoundDevice]) -> str:
    groups: dict[tuple[str, float], list[FoundDevice]] = {}
    for card in cards:
        free_gib = math.floor(10 * card.free_gib) / 10
        groups.setdefault((card.nearest_type, free_gib), []).append(card)
    link_gbs = min(device_library()[device_type].link_gbs for device_type, _ in groups)
    lines = [f"name: {json.dumps(node)}", "nodes:", f"  - name: {json.dumps(node)}", "    devices:"]
    for (device_type, free_gib), found in groups.items():
        figures = f"count: {len(found)}, memory_gib: {free_gib}{_own_capability(found[0], cards)}"
        doubt = (
            ""
            if found[0].type
            else "; not in the library, replaced by the nearest type: profile it under this name"
        )
        lines.append(f"      - {{type: {device_type}, {figures}}}  # {found[0].name}{doubt}")
    lines += [
        "    # Guessed from the card's type; measure it: llmpq-profile links",
        f"    link: {{bandwidth_gbs: {link_gbs:g}, latency_us: {LINK_LATENCY_US}}}",
    ]
    return "\n".join(lines) + "\n"


def _own_capability(card: FoundDevice, cards: Sequence[FoundDevice]) -> str:
    """Of a card that another type stands for: its kernels are its own, and a run checks it."""
    has_figures = any(other.type == card.nearest_type for other in cards)
    if card.type or has_figures or not card.compute_capability:
        return ""
    return f', compute_capability: "{card.compute_capability}"'


def _rehearsal_text(node: str, cpu: FoundDevice) -> str:
    cores = os.cpu_count() or 1
    # Two processes need 1 / fast + 1 / slow cores: 0.75 of one, or 1.5 of two.
    fast, slow = (1, 2) if cores > 1 else (2, 4)
    memory_mib = int(REHEARSED_SHARE * 1024 * cpu.free_gib)
    return f"""\
# No GPU was found: two devices are rehearsed as slowed-down processes of this CPU
# ({cpu.name}). Profile it first:
#   llmpq-profile layers --device cpu --threads 1 -o profiles/cpu.json
name: {json.dumps(node)}
nodes:
  - name: {json.dumps(node)}
    devices: [{{type: fast}}, {{type: slow}}]
    # Processes of one machine, guessed; measure it: llmpq-profile links --ranks 2
    link: {{bandwidth_gbs: {PROCESS_LINK_GBS}, latency_us: {PROCESS_LINK_US}}}
rehearse:
  fast: {{slowdown: {fast}, memory_mib: {memory_mib}}}
  slow: {{slowdown: {slow}, memory_mib: {memory_mib}}}
"""
