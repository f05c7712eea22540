"""Links: the line through one-way times, and a cluster file with measured links."""

import math
import random

import pytest
from click.testing import CliRunner

from llmpq.cli.profile import main
from llmpq.cluster import Cluster, Link
from llmpq.errors import UserError
from llmpq.link_data import LinkPair, LinkRow, Links, link_line, with_links
from llmpq.profiler.link_meter import (
    ACK_BYTES,
    CPU_SIZES,
    fit_link,
    one_way,
    planning_links,
    uncertainty,
)


def times(link: Link, noise: float = 0.0) -> list[float]:
    draw = random.Random(1)
    return [link.seconds(size) * (1 + draw.uniform(-noise, noise)) for size in CPU_SIZES]


@pytest.mark.parametrize("latency", [0.0, 5.0, 200.0])
@pytest.mark.parametrize("bandwidth", [0.1, 1.25, 300.0])
def test_a_line_is_recovered(latency, bandwidth):
    true = Link(latency_us=latency, bandwidth_gbs=bandwidth)
    found, error = fit_link(CPU_SIZES, times(true))
    assert found.latency_us == pytest.approx(latency, rel=1e-6, abs=1e-6)
    assert found.bandwidth_gbs == pytest.approx(bandwidth, rel=1e-6)
    assert error < 1e-6


def test_noise_moves_both_a_little_and_is_told():
    true = Link(latency_us=100, bandwidth_gbs=2)
    found, error = fit_link(CPU_SIZES, times(true, noise=0.05))
    assert found.latency_us == pytest.approx(100, rel=0.05)
    assert found.bandwidth_gbs == pytest.approx(2, rel=0.05)
    assert 0.005 < error < 0.05


def test_neither_latency_nor_bandwidth_is_ever_negative():
    steeper = [1e-9 * size**1.2 for size in CPU_SIZES]  # a line would start below zero
    link, _ = fit_link(CPU_SIZES, steeper)
    assert link.latency_us == 0 and link.bandwidth_gbs > 0
    falling = [1e-3 / (1 + size / 1e6) for size in CPU_SIZES]
    link, _ = fit_link(CPU_SIZES, falling)
    assert link.latency_us > 0 and link.bandwidth_gbs > 1e4


def test_uncertainty_needs_six_samples_and_shrinks_with_more():
    assert uncertainty([1.0] * 5) == math.inf
    assert uncertainty([1.0] * 8) == 0
    draw = random.Random(2)
    few = uncertainty([draw.uniform(0.9, 1.1) for _ in range(12)])
    many = uncertainty([draw.uniform(0.9, 1.1) for _ in range(1200)])
    assert 0 < many < few < 0.2


def test_half_of_a_small_round_trip_is_taken_off():
    trips = {ACK_BYTES: [40e-6, 44e-6, 42e-6], 1024: [50e-6, 52e-6], 4096: []}
    assert one_way(trips) == {1024: [pytest.approx(29e-6), pytest.approx(31e-6)]}
    assert all(t > 0 for t in one_way({ACK_BYTES: [1.0], 1024: [0.1]})[1024])


# ---- what planning takes


def pair(source: int, destination: int, nodes: tuple[str, str], gbs: float) -> LinkPair:
    row = LinkRow(num_bytes=1024, time_us=5, time_us_p10=4, time_us_p90=6, num_samples=9)
    return LinkPair(
        source=source,
        destination=destination,
        source_node=nodes[0],
        destination_node=nodes[1],
        latency_us=10 / gbs,
        bandwidth_gbs=gbs,
        mean_error=0.01,
        rows=[row],
    )


def two_hosts() -> Links:
    pairs = [
        pair(0, 1, ("a", "a"), 8.0),
        pair(1, 0, ("a", "a"), 10.0),
        pair(0, 2, ("a", "b"), 1.0),
        pair(2, 0, ("b", "a"), 2.0),
        pair(1, 2, ("a", "b"), 1.5),
    ]
    nodes, between = planning_links(pairs)
    return Links(backend="gloo", pairs=pairs, nodes=nodes, between_nodes=between)


def cluster(*names: str) -> Cluster:
    nodes = [{"name": name, "devices": [{"type": "t4-16g"}]} for name in names]
    return Cluster.model_validate({"nodes": nodes})


def test_links_of_nodes_are_medians_of_their_pairs():
    found = two_hosts()
    assert [(node.node, node.link.bandwidth_gbs) for node in found.nodes] == [("a", 9.0)]
    assert found.between_nodes == Link(latency_us=10 / 1.5, bandwidth_gbs=1.5)
    assert planning_links(found.pairs[:2])[1] is None


@pytest.mark.parametrize("names", [("b", "a"), ("node0", "node1"), ("node0", "node1", "node2")])
def test_hosts_are_matched_by_name_else_in_order(names):
    before = cluster(*names)
    after, notes = with_links(before, two_hosts())
    measured = "a" if "a" in names else "node0"
    for old, new in zip(before.nodes, after.nodes, strict=True):
        expected = 9.0 if new.name == measured else old.link.bandwidth_gbs
        assert new.link.bandwidth_gbs == expected
    assert after.link.bandwidth_gbs == 1.5
    assert len(notes) == len(names) + 1
    assert any("not measured, unchanged" in note for note in notes)


def test_links_between_nodes_stay_where_one_host_was_measured():
    found = two_hosts()
    inside = Links(backend="gloo", pairs=found.pairs[:2], nodes=found.nodes)
    after, notes = with_links(cluster("x", "y"), inside)
    assert after.link == cluster("x").link
    assert "inside x (host a)" in notes[0] and "measured" in notes[0]


def test_more_hosts_than_nodes_is_an_error():
    with pytest.raises(
        UserError, match="between 2 hosts .a, b., but cluster 'cluster' has 1 nodes"
    ):
        with_links(cluster("one"), two_hosts())


def test_a_link_line_can_be_pasted():
    import yaml

    value = yaml.safe_load(f"link: {link_line(Link(latency_us=123.456, bandwidth_gbs=0.98765))}")
    assert Link.model_validate(value["link"]) == Link(latency_us=123.5, bandwidth_gbs=0.9877)


# ---- bad input


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--write-cluster", "out.yaml"], "--write-cluster needs --cluster"),
        (["--cluster", "none.yaml"], "no such file"),
        (["--ranks", "1"], "--ranks"),
        (["--budget-s", "0"], "--budget-s"),
    ],
)
def test_bad_input_is_one_message(words, part):
    done = CliRunner().invoke(main, ["links", *words])
    assert done.exit_code == 2
    assert part in done.output and "Traceback" not in done.output


def test_one_rank_of_torchrun_has_no_link(monkeypatch):
    launched = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(main, ["links"])
    assert done.exit_code == 2 and "a single rank has no link" in done.output
