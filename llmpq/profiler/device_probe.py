"""Finds the CUDA cards of this machine, the framework's memory on a device, and its copy bandwidth.

Identical cards (equal name and memory) are one kind. Bandwidth counts the bytes read and written
by a copy of a large buffer. A card's clocks and temperature come from nvidia-smi if available.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from llmpq.cluster import MIB

COPY_S = 0.5
COPY_BYTES = 256 * 2**20
CARD_COPY_BYTES = 2**30


@dataclass(frozen=True)
class Card:
    """One CUDA card. `used_before_bytes`: memory used before this process made its context."""

    index: int
    name: str
    memory_bytes: int
    free_bytes: int
    compute_capability: str
    used_before_bytes: int = 0


def cards() -> list[Card]:
    """Every card that torch sees. Makes a context on each to read its free memory."""
    indices = range(torch.cuda.device_count())
    is_late = torch.cuda.is_initialized()
    used = {index: 0 if is_late else _used_bytes(index) for index in indices}
    return [_card(index, used[index]) for index in indices]


def distinct(found: list[Card]) -> list[Card]:
    """The first card of each kind."""
    kinds: dict[tuple[str, int], Card] = {}
    for card in found:
        kinds.setdefault((card.name, card.memory_bytes), card)
    return list(kinds.values())


def _card(index: int, used_before_bytes: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = f"{properties.major}.{properties.minor}"
    return Card(index, properties.name, total, free, capability, used_before_bytes)


def copy_gbs(device: torch.device, num_threads: int | None = None) -> float:
    """The best GB/s, read and written, of copies for about half a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads or threads)
    try:
        return _best_copy_gbs(device)
    finally:
        torch.set_num_threads(threads)


def _best_copy_gbs(device: torch.device) -> float:
    is_card = device.type == "cuda"
    size = CARD_COPY_BYTES if is_card else COPY_BYTES
    if is_card:
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # A CPU's copy is over when it returns.
    wait: Callable[[], None] = partial(torch.cuda.synchronize, device) if is_card else lambda: None
    end_s, best_s = time.perf_counter() + COPY_S, float("inf")
    while time.perf_counter() < end_s:
        wait()
        start_s = time.perf_counter()
        target.copy_(source)
        wait()
        best_s = min(best_s, time.perf_counter() - start_s)
    if is_card:
        del source, target
        torch.cuda.empty_cache()
    return 2 * size / best_s / 1e9


def context_bytes(device: torch.device, used_before_bytes: int = 0) -> int:
    """Bytes that the framework holds beside tensors, after its first product of matrices.

    On a card these are the used bytes, less those of the allocator and those used before. On a CPU
    they are this process's resident memory.
    """
    a = torch.ones(64, 64, device=device)
    torch.mm(a, a)
    if device.type != "cuda":
        return resident_bytes()
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device) - used_before_bytes)


def resident_bytes() -> int:
    """This process's resident bytes now, or their peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return most_resident_bytes()
    return pages * resource.getpagesize()


def most_resident_bytes() -> int:
    """The peak of this process's resident bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _used_bytes(index: int) -> int:
    used = _ask(index, "memory.used")
    return int(float(used[0])) * MIB if used else 0


def card_state(device: torch.device) -> str:
    """Clock and temperature as a text; empty where they are not known."""
    if device.type != "cuda":
        return ""
    found = _ask(device.index or 0, "clocks.sm,temperature.gpu")
    return f"{found[0]} MHz, {found[1]} C" if len(found) == 2 else ""


def _ask(index: int, fields: str) -> list[str]:
    """The values of nvidia-smi's fields for a card of torch; none where it fails."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    name = visible[index] if index < len(visible) and visible[index] else str(index)
    command = ["nvidia-smi", f"--id={name}", f"--query-gpu={fields}"]
    command += ["--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    values = [part.strip() for part in done.stdout.strip().split(",")]
    return values if all(value.replace(".", "").isdigit() for value in values) else []
