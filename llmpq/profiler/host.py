"""This machine's CPU and CUDA cards; without torch, the CPU alone, and no speeds."""

import os
import platform
from pathlib import Path

from llmpq.cluster import GIB
from llmpq.cluster_draft import FoundDevice
from llmpq.device_names import type_of_card, type_of_cpu


def devices_here() -> list[FoundDevice]:
    """This machine's CPU, then its CUDA cards if torch is installed and sees any."""
    cpu = FoundDevice(
        kind="cpu",
        name=cpu_name(),
        memory_gib=cpu_memory_gib(),
        free_gib=cpu_free_gib(),
        type=type_of_cpu(cpu_name()),
    )
    try:
        import torch
    except ImportError:
        return [cpu]
    from llmpq.profiler.device_probe import cards, copy_gbs

    host = torch.device("cpu")
    one_thread_gbs = copy_gbs(host, 1)
    speeds = {
        "num_threads": torch.get_num_threads(),
        "one_thread_gbs": one_thread_gbs,
        "bandwidth_gbs": max(one_thread_gbs, copy_gbs(host)),
    }
    found = [
        FoundDevice(
            kind="cuda",
            name=card.name,
            memory_gib=card.memory_bytes / GIB,
            free_gib=card.free_bytes / GIB,
            type=type_of_card(card.name, card.memory_bytes / GIB),
            compute_capability=card.compute_capability,
            bandwidth_gbs=copy_gbs(torch.device("cuda", card.index)),
        )
        for card in cards()
    ]
    return [cpu.model_copy(update=speeds), *found]


def cpu_name() -> str:
    """The CPU's name, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_memory_gib() -> float:
    """The size of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def cpu_free_gib() -> float:
    """What Linux calls available; elsewhere all of it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return cpu_memory_gib()
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable")]
    return int(found[0]) * 1024 / GIB if found else cpu_memory_gib()
