"""links.json: how fast ranks send to each other, every ordered pair, and what planning takes of it.

A pair's times are one-way. Latency and bandwidth are the straight line through them, with its mean
relative error. `shared_bandwidth_gbs`: what a pair of neighbours gets while all neighbours of a
pipeline send at once. `nodes` and `between_nodes` are the links as cluster.yaml has them.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from llmpq.artifact import SCHEMA_VERSION, Provenance, Strict, read_json
from llmpq.cluster import Link


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
