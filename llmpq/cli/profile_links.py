"""`llmpq-profile links`: latency and bandwidth between ranks, under torchrun or on this machine.

Rank 0 writes links.json, shows the matrix and the `link:` lines of a cluster file. Without torchrun
this process starts `--ranks` local processes itself.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmpq.artifact import Provenance, write_json, write_text
from llmpq.cli.common import command_words, console, emit, one_of_several, report_console
from llmpq.cli.options import CommonOptions, DeviceName, FiniteRange, command, option
from llmpq.cli.paths import check_files
from llmpq.cluster import Cluster, load_cluster
from llmpq.errors import UserError
from llmpq.link_data import Links, with_links

if TYPE_CHECKING:
    from llmpq.runtime.process import Role

DEFAULT_RANKS = 2


@dataclass(frozen=True, kw_only=True)
class LinksOptions(CommonOptions):
    """What the command line asks for."""

    ranks: int | None = option("Local processes, without torchrun.", type=click.IntRange(min=2))
    device: DeviceName = option("Device whose messages are measured.", default="auto")
    budget_s: float = option(
        "Seconds of measuring.", default=60.0, type=FiniteRange(min=0, min_open=True)
    )
    cluster: Path | None = option("cluster.yaml, whose links to replace.")
    write_cluster: Path | None = option("Where to write CLUSTER with measured links.")
    output: Path = option("Where to write.", "-o", "--output", default=Path("links.json"))


@command(LinksOptions)
def links(options: LinksOptions) -> None:
    """Measure latency and bandwidth between every two ranks, both ways.

    On several machines: torchrun ... -m llmpq.cli.profile links
    """
    try:
        cluster = _read_cluster(options)
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        sys.exit(UserError.exit_code)  # the first rank on this machine says the same
    from llmpq.reliability.ending import AGAIN
    from llmpq.runtime.process import role_from_environment

    role = role_from_environment()
    if role is None:
        _start_ranks(options)
        return
    with one_of_several(role, AGAIN):
        if role.size < 2:
            raise UserError(
                "a single rank has no link: start two or more (torchrun --nproc-per-node 2 ...)"
            )
        if options.ranks not in (None, role.size):
            raise UserError(f"--ranks {options.ranks}: torchrun started {role.size} processes")
        _measure(options, role, cluster)


def _read_cluster(options: LinksOptions) -> Cluster | None:
    """Finds bad input before anything is started."""
    writes = [
        ("-o", options.output),
        ("--write-cluster", options.write_cluster),
        ("--json", options.json_path),
    ]
    check_files([("--cluster", options.cluster)], writes)
    if options.write_cluster and not options.cluster:
        raise UserError("--write-cluster needs --cluster: the file whose links to replace")
    return load_cluster(options.cluster) if options.cluster else None


def _start_ranks(options: LinksOptions) -> None:
    """Starts local processes, one per rank, and waits for them."""
    import torch

    from llmpq.reliability.ending import AGAIN
    from llmpq.runtime.process import start_workers

    cards = 0 if options.device == "cpu" else torch.cuda.device_count()
    count = options.ranks or (cards if cards > 1 else DEFAULT_RANKS)
    why = "" if options.ranks else " (--ranks N for another number, or torchrun)"
    console(options.quiet).print(f"measuring links between {count} processes here{why}")
    names = [f"rank {rank}" for rank in range(count)]
    start_workers(["links", *command_words()], names, "llmpq.cli.profile", AGAIN)


def _measure(options: LinksOptions, role: "Role", cluster: Cluster | None) -> None:
    """Measures this rank's links; rank 0 reports the result."""
    from llmpq.profiler.link_meter import CARD_SIZES, CPU_SIZES, ROUNDS, measure
    from llmpq.render.progress import progress
    from llmpq.runtime.process import choose_device, connect

    device = choose_device(options.device, role)
    transport, _ = connect(role, device)
    sizes = CARD_SIZES if transport.message_device.type == "cuda" else CPU_SIZES
    visits = ROUNDS * role.size * (role.size - 1)
    quiet = options.quiet or role.rank > 0
    with progress(console(quiet), "pairs of ranks, in rounds", visits) as bar:
        backend, pairs = measure(transport, sizes, options.budget_s, bar.update)
    if role.rank == 0:
        _tell(options, backend, pairs, str(device), cluster)


def _tell(
    options: LinksOptions, backend: Any, pairs: Any, device: str, cluster: Cluster | None
) -> None:
    """Writes the result and reports it."""
    from llmpq.profiler.link_meter import planning_links
    from llmpq.render.profile_view import print_links

    nodes, between = planning_links(pairs)
    found = Links(
        backend=backend,
        pairs=pairs,
        nodes=nodes,
        between_nodes=between,
        provenance=Provenance.here(device),
    )
    write_json(options.output, found)
    emit(found.model_dump_json(indent=1), options.json_path)
    print_links(report_console(options.quiet, options.json_path), found)
    if cluster is not None:
        _use(options, cluster, found)
    console(options.quiet).print(f"{len(pairs)} pairs by {backend} -> {options.output}")


def _use(options: LinksOptions, cluster: Cluster, found: Links) -> None:
    """Reports the cluster with measured links, and writes it where that is asked for."""
    import yaml

    out = console(options.quiet)
    changed, lines = with_links(cluster, found)
    for line in lines:
        out.print(line)
    if options.write_cluster:
        data = changed.model_dump(mode="json", exclude_none=True)
        write_text(options.write_cluster, yaml.safe_dump(data, sort_keys=False))
        out.print(f"cluster -> {options.write_cluster}")
