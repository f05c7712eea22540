"""`llmpq-profile devices`: what is here, the library of types, and a first cluster file."""

import json
from dataclasses import dataclass
from pathlib import Path

import click
import yaml

from llmpq.artifact import validate, write_text
from llmpq.cli.common import console, emit, report_console
from llmpq.cli.options import CommonOptions, command, option
from llmpq.cli.paths import check_files
from llmpq.cluster import Cluster
from llmpq.cluster_draft import cluster_text
from llmpq.devices import device_library
from llmpq.errors import UserError
from llmpq.profiler import host


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
    from llmpq.render.profile_view import print_devices

    path = options.cluster_out
    check_files([], [("--cluster-out", path), ("--json", options.json_path)])
    if path is not None and path.exists() and not options.force:
        raise UserError(f"--cluster-out {path}: exists already; --force overwrites it")
    library, here = device_library(), host.devices_here()
    value = {
        "here": [device.model_dump() for device in here],
        "library": {name: device.model_dump() for name, device in library.items()},
    }
    emit(json.dumps(value, indent=1), options.json_path)
    print_devices(report_console(options.quiet, options.json_path), here, library)
    if path is not None:
        text = cluster_text(here)
        validate(yaml.safe_load(text), Cluster, path)
        write_text(path, text)
        console(options.quiet).print(f"{path}: written; check its links, then plan with it")
