"""links.json: how fast ranks send to each other, every ordered pair, and what planning takes of it.

A pair's times are one-way. Latency and bandwidth are the straight line through them, with its mean
relative error. `shared_bandwidth_gbs`: what a pair of neighbours gets while all neighbours of a
pipeline send at once. `nodes` and `between_nodes` are the links as cluster.yaml has them;
`with_links` puts them into a cluster.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from llmpq.artifact import SCHEMA_VERSION, Provenance, Strict, read_json
from llmpq.cluster import Cluster, Link
from llmpq.errors import UserError


class LinkRow(Strict):
    """One-way times of one message size: the median, and the middle 80 %."""

    num_bytes: PositiveInt
    time_us: PositiveFloat
    time_us_p10: PositiveFloat
    time_us_p90: PositiveFloat
    num_samples: PositiveInt


class LinkPair(Strict):
    """From rank `source` to rank `destination`; nodes are host names."""

    source: NonNegativeInt
    destination: NonNegativeInt
    source_node: str
    destination_node: str
    latency_us: NonNegativeFloat
    bandwidth_gbs: PositiveFloat
    mean_error: NonNegativeFloat
    shared_bandwidth_gbs: PositiveFloat | None = None
    rows: list[LinkRow] = Field(min_length=1)


class NodeLink(Strict):
    """The link inside a node: the median over its pairs."""

    node: str
    link: Link


class Links(Strict):
    """links.json."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["links"] = "links"
    backend: Literal["gloo", "nccl"]
    pairs: list[LinkPair] = Field(min_length=1)
    nodes: list[NodeLink] = []
    between_nodes: Link | None = None
    provenance: Provenance = Provenance()


def load_links(path: Path) -> Links:
    """Reads links.json."""
    return read_json(path, Links)


def link_line(link: Link) -> str:
    """A link as a cluster file has it."""
    return f"{{bandwidth_gbs: {link.bandwidth_gbs:.4g}, latency_us: {link.latency_us:.4g}}}"


def with_links(cluster: Cluster, found: Links) -> tuple[Cluster, list[str]]:
    """The cluster with measured links, and a line on each link: measured or not.

    Hosts are nodes of the same name; where a host is no node's name, hosts are nodes in order.
    Raises `UserError` where there are more hosts than nodes.
    """
    hosts = list(dict.fromkeys(pair.source_node for pair in found.pairs))
    names = [node.name for node in cluster.nodes]
    if len(hosts) > len(names):
        raise UserError(
            f"links were measured between {len(hosts)} hosts ({', '.join(hosts)}), but cluster "
            f"'{cluster.name}' has {len(names)} nodes"
        )
    by_name = set(hosts) <= set(names)
    host_of = {h: h for h in hosts} if by_name else dict(zip(names, hosts, strict=False))
    inside = {node.node: node.link for node in found.nodes}
    nodes, lines = [], []
    for node in cluster.nodes:
        host = host_of.get(node.name)
        measured = inside.get(host or "")
        link = _rounded(measured) if measured else node.link
        where = f" (host {host})" if host not in (None, node.name) else ""
        lines.append(f"inside {node.name}{where}: {link_line(link)}, {_state(measured)}")
        nodes.append(node.model_copy(update={"link": link}))
    link = _rounded(found.between_nodes) if found.between_nodes else cluster.link
    lines.append(f"between nodes: {link_line(link)}, {_state(found.between_nodes)}")
    return cluster.model_copy(update={"nodes": nodes, "link": link}), lines


def _state(measured: Link | None) -> str:
    return "measured" if measured else "not measured, unchanged"


def _rounded(link: Link) -> Link:
    """Four digits: more are not known."""
    values = {name: float(f"{value:.4g}") for name, value in link.model_dump().items()}
    return link.model_copy(update=values)
