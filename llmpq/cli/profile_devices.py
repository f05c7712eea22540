"""`llmpq-profile devices`: what is here, the library of types, and a first cluster file.

A card's type is found by its name and memory. Links are guessed from the library's figure for the
card; `llmpq-profile links` measures them. Without a card the cluster file rehearses two devices as
slowed-down processes of this CPU. Works without torch, which then tells neither cards nor speeds.
"""

import json
import math
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from llmpq.artifact import validate, write_text
from llmpq.cli.common import Command, common_options, console, emit
from llmpq.cli.paths import check_files
from llmpq.cluster import Cluster
from llmpq.device_names import type_of_card, type_of_cpu
from llmpq.devices import DeviceType, device_library
from llmpq.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

GIB = 1024**3
REHEARSED_SHARE = 0.4  # of the free memory, for each of two processes
LINK_LATENCY_US = 20
PROCESS_LINK_GBS, PROCESS_LINK_US = 1.0, 800  # gloo between processes


@click.command(cls=Command)
@click.option(
    "--cluster-out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write a first cluster.yaml of what is here.",
)
@click.option("--force", is_flag=True, help="Overwrite the cluster file.")
@common_options
def devices(
    cluster_out: Path | None, force: bool, json_path: Path | None, verbose: bool, quiet: bool
) -> None:
    """List the devices here and the types that cluster files can name."""
    check_files([], [("--cluster-out", cluster_out), ("--json", json_path)])
    if cluster_out is not None and cluster_out.exists() and not force:
        raise UserError(f"--cluster-out {cluster_out}: is there already; --force overwrites it")
    library = device_library()
    here = devices_here()
    known = {name: device.model_dump() for name, device in library.items()}
    emit(json.dumps({"here": here, "library": known}, indent=1), json_path)
    out = console(quiet)
    for device in here:
        _show_device(device, out)
    _show_library(library, out)
    if cluster_out is not None:
        text = cluster_text(here)
        validate(yaml.safe_load(text), Cluster, cluster_out)
        write_text(cluster_out, text)
        out.print(f"{cluster_out}: a start; look at its links, and plan with it")


def devices_here() -> list[dict[str, Any]]:
    """This machine's CPU, then its CUDA cards if torch is installed and sees any."""
    cpu: dict[str, Any] = {
        "kind": "cpu",
        "name": cpu_name(),
        "memory_gib": cpu_memory_gib(),
        "free_gib": cpu_free_gib(),
        "type": type_of_cpu(cpu_name()),
    }
    try:
        import torch
    except ImportError:
        return [cpu]
    from llmpq.profiler.device_probe import cards, copy_gbs

    host = torch.device("cpu")
    cpu["num_threads"] = torch.get_num_threads()
    cpu["one_thread_gbs"] = copy_gbs(host, 1)
    cpu["bandwidth_gbs"] = max(cpu["one_thread_gbs"], copy_gbs(host))
    return [cpu, *(_card(card, copy_gbs(torch.device("cuda", card.index))) for card in cards())]


def _card(card: Any, bandwidth_gbs: float) -> dict[str, Any]:
    memory_gib = card.memory_bytes / GIB
    return {
        "kind": "cuda",
        "name": card.name,
        "memory_gib": memory_gib,
        "free_gib": card.free_bytes / GIB,
        "compute_capability": card.compute_capability,
        "bandwidth_gbs": bandwidth_gbs,
        "type": type_of_card(card.name, memory_gib),
    }


# ---- names


def nearest_type(memory_gib: float, bandwidth_gbs: float) -> str:
    """The type with the most similar memory and bandwidth, for want of the right one."""

    def distance(device: DeviceType) -> float:
        memory = math.log(device.memory_gib / memory_gib)
        return math.hypot(memory, math.log(device.bandwidth_gbs / bandwidth_gbs))

    cards = {key: device for key, device in device_library().items() if device.kind == "gpu"}
    return min(cards, key=lambda key: distance(cards[key]))


def cpu_name() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_memory_gib() -> float:
    """Main memory."""
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def cpu_free_gib() -> float:
    """What Linux calls available; elsewhere all of it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return cpu_memory_gib()
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable")]
    return int(found[0]) * 1024 / GIB if found else cpu_memory_gib()


# ---- the cluster file


def cluster_text(here: list[dict[str, Any]], node: str = "") -> str:
    """A cluster.yaml of these devices: of the cards, or two rehearsed ones where there is none."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", node or platform.node()) or "node0"
    cards = [device for device in here if device["kind"] == "cuda"]
    return _cards_text(name, cards) if cards else _rehearsal_text(name, here[0])


def _cards_text(node: str, cards: list[dict[str, Any]]) -> str:
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for card in cards:
        device_type = card["type"] or nearest_type(card["memory_gib"], card["bandwidth_gbs"])
        free_gib = math.floor(10 * card["free_gib"]) / 10
        groups.setdefault((device_type, free_gib), []).append(card)
    link_gbs = min(device_library()[device_type].link_gbs for device_type, _ in groups)
    lines = [f"name: {json.dumps(node)}", "nodes:", f"  - name: {json.dumps(node)}", "    devices:"]
    for (device_type, free_gib), found in groups.items():
        figures = f"count: {len(found)}, memory_gib: {free_gib}{_own_capability(found[0], cards)}"
        entry = f"{{type: {device_type}, {figures}}}"
        lines.append(f"      - {entry}  # {found[0]['name']}{_doubt(found[0])}")
    lines += [
        "    # Guessed from the card's type; measure it: llmpq-profile links",
        f"    link: {{bandwidth_gbs: {link_gbs:g}, latency_us: {LINK_LATENCY_US}}}",
    ]
    return "\n".join(lines) + "\n"


def _own_capability(card: dict[str, Any], cards: list[dict[str, Any]]) -> str:
    """Of a card that another type stands for: its kernels are its own, and a run checks it."""
    nearest = nearest_type(card["memory_gib"], card["bandwidth_gbs"])
    has_figures = any(other["type"] == nearest for other in cards)
    if card["type"] or has_figures or not card.get("compute_capability"):
        return ""
    return f', compute_capability: "{card["compute_capability"]}"'


def _doubt(card: dict[str, Any]) -> str:
    if card["type"]:
        return ""
    return "; not in the library, the nearest type stands for it: profile it under this name"


def _rehearsal_text(node: str, cpu: dict[str, Any]) -> str:
    import os

    cores = os.cpu_count() or 1
    # Two processes need 1 / fast + 1 / slow cores: 0.75 of one, or 1.5 of two.
    fast, slow = (1, 2) if cores > 1 else (2, 4)
    memory_mib = int(REHEARSED_SHARE * 1024 * cpu["free_gib"])
    return f"""\
# No GPU was found: two devices are rehearsed as slowed-down processes of this CPU
# ({cpu["name"]}). Profile it first:
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


# ---- tables


def _show_device(device: dict[str, Any], out: "Console") -> None:
    facts = [f"{device['memory_gib']:.1f} GiB, {device['free_gib']:.1f} free"]
    if "compute_capability" in device:
        facts.append(f"capability {device['compute_capability']}")
    if "bandwidth_gbs" in device:
        facts.append(f"{device['bandwidth_gbs']:.0f} GB/s copied")
    if "one_thread_gbs" in device:
        facts[-1] += (
            f" ({device['one_thread_gbs']:.0f} with one of {device['num_threads']} threads)"
        )
    if device["type"]:
        facts.append(f"type {device['type']}")
    elif device["kind"] == "cuda":
        facts.append("not in the library")
    out.print(f"here: {device['name']}: {', '.join(facts)}", soft_wrap=True)
    if device["kind"] == "cuda" and not device["type"]:
        out.print(_snippet(device), soft_wrap=True)


def _snippet(device: dict[str, Any]) -> str:
    """The start of a library entry for a card that has none."""
    figures = (
        f"memory_gib: {device['memory_gib']:.0f}, bandwidth_gbs: {device['bandwidth_gbs']:.0f}"
    )
    return (
        "  a library entry would begin: "
        f"{{name: {device['name']}, {figures}, compute_capability: "
        f'"{device["compute_capability"]}", source: measured by a copy}}'
    )


def _show_library(library: dict[str, DeviceType], out: "Console") -> None:
    from rich.table import Table

    table = Table("type", "name", "GiB", "GB/s", "fp16 TFLOP/s")
    for name, spec in library.items():
        figures = (spec.memory_gib, spec.bandwidth_gbs, spec.fp16_tflops)
        table.add_row(name, spec.name, *(f"{figure:g}" for figure in figures))
    out.print(table)
    out.print("sources and further figures: --json")
