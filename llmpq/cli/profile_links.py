"""`llmpq-profile links`: latency and bandwidth between ranks, under torchrun or on this machine.

Rank 0 writes links.json, shows the matrix and the `link:` lines of a cluster file. Without torchrun
it starts `--ranks` local processes itself.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmpq.cli.common import ARGUMENTS, Command, FiniteRange, common_options, console, emit
from llmpq.cli.paths import check_files
from llmpq.errors import UserError, WorkerError

if TYPE_CHECKING:
    from rich.console import Console

    from llmpq.cluster import Cluster, Link, Node
    from llmpq.link_data import Links
    from llmpq.runtime.process import Role

PATH = click.Path(path_type=Path)
DEFAULT_RANKS = 2


@click.command(cls=Command, name="links")
@click.option("--ranks", type=click.IntRange(min=2), help="Local processes, without torchrun.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--budget-s", type=FiniteRange(min=0, min_open=True), default=60.0, show_default=True)
@click.option("--cluster", type=PATH, help="cluster.yaml, whose links to replace.")
@click.option("--write-cluster", type=PATH, help="Where to write CLUSTER with measured links.")
@click.option("-o", "--output", type=PATH, default=Path("links.json"), show_default=True)
@common_options
def links(**flags: Any) -> None:
    """Measure latency and bandwidth between every two ranks, both ways.

    On several machines: torchrun ... -m llmpq.cli.profile links
    """
    try:
        _check(flags)
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        sys.exit(UserError.exit_code)  # the first rank on this machine says the same
    from llmpq.runtime.process import role_from_environment

    role = role_from_environment()
    if role is None:
        _start_ranks(flags)
    else:
        _guarded(flags, role)


def _check(flags: dict[str, Any]) -> None:
    """Bad input, before anything is started."""
    from llmpq.cluster import load_cluster

    writes = [("-o", "output"), ("--write-cluster", "write_cluster"), ("--json", "json_path")]
    check_files([("--cluster", flags["cluster"])], [(name, flags[key]) for name, key in writes])
    if flags["write_cluster"] and not flags["cluster"]:
        raise UserError("--write-cluster needs --cluster: the file whose links to replace")
    if flags["cluster"]:
        load_cluster(flags["cluster"])


def _start_ranks(flags: dict[str, Any]) -> None:
    """Local processes, one a rank; how they ended."""
    from llmpq.reliability.ending import AGAIN
    from llmpq.runtime.process import start_workers

    count = flags["ranks"] or _num_cards(flags["device"]) or DEFAULT_RANKS
    why = "" if flags["ranks"] else " (say --ranks N, or start with torchrun)"
    console(flags["quiet"]).print(f"measuring links between {count} processes here{why}")
    arguments = ["links", *click.get_current_context().meta[ARGUMENTS]]
    names = [f"rank {rank}" for rank in range(count)]
    start_workers(arguments, names, "llmpq.cli.profile", AGAIN)


def _num_cards(device: str) -> int:
    """CUDA cards here, where there are several to measure between."""
    import torch

    count = 0 if device == "cpu" else torch.cuda.device_count()
    return count if count > 1 else 0


def _guarded(flags: dict[str, Any], role: "Role") -> None:
    """One rank among several; what went wrong is said once."""
    from llmpq.reliability.ending import AGAIN, SUPERVISED
    from llmpq.reliability.monitor import Monitor
    from llmpq.runtime.process import check_meeting_point, end_with_parent

    end_with_parent()
    check_meeting_point()
    if role.size < 2:
        raise UserError("one rank has no link: start two or more (torchrun --nproc-per-node 2 ...)")
    if flags["ranks"] not in (None, role.size):
        raise UserError(f"--ranks {flags['ranks']}: torchrun started {role.size} processes")
    try:
        with Monitor(role.rank, role.size, f"rank {role.rank}", AGAIN):
            _measure(flags, role)
    except WorkerError:
        if SUPERVISED not in os.environ:
            raise
        sys.exit(WorkerError.exit_code)  # the process that started us says which rank was lost


def _measure(flags: dict[str, Any], role: "Role") -> None:
    """This rank's part; rank 0 tells the result."""
    from llmpq.cli.progress import progress
    from llmpq.profiler.link_meter import CARD_SIZES, CPU_SIZES, ROUNDS, measure
    from llmpq.runtime.process import choose_device, connect, disconnect

    device = choose_device(flags["device"], role)
    transport, _ = connect(role, device)
    out = console(flags["quiet"] or role.rank > 0)
    sizes = CARD_SIZES if transport.message_device.type == "cuda" else CPU_SIZES
    visits = ROUNDS * role.size * (role.size - 1)
    try:
        with progress(out, "pairs of ranks, in rounds", visits) as bar:
            backend, pairs = measure(transport, sizes, flags["budget_s"], bar.update)
    finally:
        disconnect()
    if role.rank == 0:
        _tell(flags, backend, pairs, str(device), out)


def _tell(flags: dict[str, Any], backend: Any, pairs: Any, device: str, out: "Console") -> None:
    from llmpq.artifact import Provenance, write_json
    from llmpq.link_data import Links
    from llmpq.profiler.link_meter import planning_links

    nodes, between = planning_links(pairs)
    found = Links(
        backend=backend,
        pairs=pairs,
        nodes=nodes,
        between_nodes=between,
        provenance=Provenance.here(device),
    )
    write_json(flags["output"], found)
    emit(found.model_dump_json(indent=1), flags["json_path"])
    _show(found, out)
    if flags["cluster"]:
        _use(flags, found, out)
    out.print(f"{len(pairs)} pairs by {backend} -> {flags['output']}")


def _show(found: "Links", out: "Console") -> None:
    """The matrix, and lines for a cluster file."""
    from rich.table import Table

    size = 1 + max(pair.source for pair in found.pairs)
    cells = {(pair.source, pair.destination): pair for pair in found.pairs}
    table = Table("us, GB/s: from", *(f"to {rank}" for rank in range(size)))
    for source in range(size):
        line = [cells.get((source, destination)) for destination in range(size)]
        texts = [f"{p.latency_us:.0f}, {p.bandwidth_gbs:.2f}" if p else "-" for p in line]
        table.add_row(f"{source} ({cells[source, (source + 1) % size].source_node})", *texts)
    out.print(table)
    shared = [p.shared_bandwidth_gbs for p in found.pairs if p.shared_bandwidth_gbs]
    out.print(f"all neighbours at once: {min(shared):.2f} GB/s on the slowest hop")
    worst = max(pair.mean_error for pair in found.pairs)
    out.print(f"latency + bytes / bandwidth fits with {100 * worst:.0f} % mean error at most")
    for node in found.nodes:
        out.print(f"link: {link_line(node.link)}  # inside {node.node}")
    if found.between_nodes:
        out.print(f"link: {link_line(found.between_nodes)}  # between nodes")


def link_line(link: "Link") -> str:
    """As a cluster file has it."""
    return f"{{bandwidth_gbs: {link.bandwidth_gbs:.4g}, latency_us: {link.latency_us:.4g}}}"


# ---- a cluster file with measured links


def _use(flags: dict[str, Any], found: "Links", out: "Console") -> None:
    """The given cluster with measured links: told, and written where that is asked for."""
    import yaml

    from llmpq.artifact import write_text
    from llmpq.cluster import load_cluster

    cluster, notes = with_links(load_cluster(flags["cluster"]), found)
    for note in notes:
        out.print(note)
    if flags["write_cluster"]:
        data = cluster.model_dump(mode="json", exclude_none=True)
        write_text(flags["write_cluster"], yaml.safe_dump(data, sort_keys=False))
        out.print(f"cluster -> {flags['write_cluster']}")


def with_links(cluster: "Cluster", found: "Links") -> "tuple[Cluster, list[str]]":
    """The cluster with measured links, and what was taken for what.

    Hosts are nodes of the same name; where a host is no node's name, hosts are nodes in order.
    Raises `UserError` where there are more hosts than nodes.
    """
    hosts = list(dict.fromkeys(pair.source_node for pair in found.pairs))
    names = [node.name for node in cluster.nodes]
    if len(hosts) > len(names):
        raise UserError(
            f"links were measured between {len(hosts)} hosts ({', '.join(hosts)}), "
            f"cluster '{cluster.name}' has {len(names)} nodes"
        )
    by_name = set(hosts) <= set(names)
    host_of = {h: h for h in hosts} if by_name else dict(zip(names, hosts, strict=False))
    inside = {node.node: node.link for node in found.nodes}
    nodes, notes = [], []
    for node in cluster.nodes:
        host = host_of.get(node.name)
        changed = _node_with(node, inside.get(host or ""))
        notes.append(_note(node, changed, host))
        nodes.append(changed)
    link = _rounded(found.between_nodes) if found.between_nodes else cluster.link
    state = "measured" if found.between_nodes else "not measured, as it was"
    notes.append(f"between nodes: {link_line(link)}, {state}")
    return cluster.model_copy(update={"nodes": nodes, "link": link}), notes


def _node_with(node: "Node", link: "Link | None") -> "Node":
    return node if link is None else node.model_copy(update={"link": _rounded(link)})


def _note(node: "Node", changed: "Node", host: str | None) -> str:
    where = f" (host {host})" if host not in (None, node.name) else ""
    state = "not measured, as it was" if changed is node else "measured"
    return f"inside {node.name}{where}: {link_line(changed.link)}, {state}"


def _rounded(link: "Link") -> "Link":
    """Four digits: more are not known."""
    values = {name: float(f"{value:.4g}") for name, value in link.model_dump().items()}
    return link.model_copy(update=values)
