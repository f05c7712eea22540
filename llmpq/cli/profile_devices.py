"""`llmpq-profile devices`: what is here, the library of types, and a first cluster file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import yaml

from llmpq.artifact import validate, write_text
from llmpq.cli.common import console, emit, report_console
from llmpq.cli.options import CommonOptions, command, option
from llmpq.cli.paths import check_files
from llmpq.cluster import Cluster
from llmpq.cluster_draft import FoundDevice, cluster_text
from llmpq.devices import DeviceType, device_library
from llmpq.errors import UserError
from llmpq.profiler import host

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class DevicesOptions(CommonOptions):
    """What the command line asks for."""

    cluster_out: Path | None = option(
        "Also write a first cluster.yaml of what is here.",
        type=click.Path(path_type=Path, dir_okay=False),
    )
    force: bool = option("Overwrite the cluster file.", default=False)


@command(DevicesOptions)
def devices(options: DevicesOptions) -> None:
    """List the devices here and the types that cluster files can name."""
    path = options.cluster_out
    check_files([], [("--cluster-out", path), ("--json", options.json_path)])
    if path is not None and path.exists() and not options.force:
        raise UserError(f"--cluster-out {path}: is there already; --force overwrites it")
    library, here = device_library(), host.devices_here()
    value = {
        "here": [device.model_dump() for device in here],
        "library": {name: device.model_dump() for name, device in library.items()},
    }
    emit(json.dumps(value, indent=1), options.json_path)
    out = report_console(options.quiet, options.json_path)
    for device in here:
        _show_device(device, out)
    _show_library(library, out)
    if path is not None:
        text = cluster_text(here)
        validate(yaml.safe_load(text), Cluster, path)
        write_text(path, text)
        console(options.quiet).print(f"{path}: written; check its links, then plan with it")


def _show_device(device: FoundDevice, out: "Console") -> None:
    facts = [f"{device.memory_gib:.1f} GiB, {device.free_gib:.1f} free"]
    if device.compute_capability:
        facts.append(f"compute capability {device.compute_capability}")
    if device.bandwidth_gbs:
        facts.append(f"{device.bandwidth_gbs:.0f} GB/s copied")
    if device.one_thread_gbs:
        facts[-1] += f" ({device.one_thread_gbs:.0f} with one of {device.num_threads} threads)"
    if device.type:
        facts.append(f"type {device.type}")
    elif device.kind == "cuda":
        facts.append("not in the library")
    out.print(f"here: {device.name}: {', '.join(facts)}", soft_wrap=True)
    if device.kind == "cuda" and not device.type:
        out.print(
            f"  a library entry would begin: {{name: {device.name}, memory_gib: "
            f"{device.memory_gib:.0f}, bandwidth_gbs: {device.bandwidth_gbs or 0:.0f}, "
            f'compute_capability: "{device.compute_capability}", source: measured by a copy}}',
            soft_wrap=True,
        )


def _show_library(library: Mapping[str, DeviceType], out: "Console") -> None:
    from rich.table import Table

    table = Table("type", "name", "GiB", "GB/s", "fp16 TFLOP/s")
    for name, spec in library.items():
        figures = (spec.memory_gib, spec.bandwidth_gbs, spec.fp16_tflops)
        table.add_row(name, spec.name, *(f"{figure:g}" for figure in figures))
    out.print(table)
    out.print("sources and further figures: --json")
