"""Decides which process of a launch runs which worker of a plan, and on which card.

A launch has hosts (torchrun's nodes) and processes on them; a plan has nodes and workers, one for
each device of a stage, in the order of the stages. The workers of a node need not be consecutive in
the plan: torchrun numbers processes host by host, so that workers are assigned to ranks here, and
stages find their neighbours by rank. A host runs the node of its name, else the node of its number
(in the order in which the stages name nodes), else a node that its cards fit.

A plan of several nodes that is started on one host runs there as a whole. All functions are pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llmpq.cluster import Cluster, device_gib
from llmpq.placement import FoundCard, PlannedDevice, Refusal, match_cards, matching, visible_line
from llmpq.plan_data import Plan

Seat = tuple[int, int | None]  # a worker of the plan, and CUDA's number of its card


@dataclass(frozen=True)
class Process:
    """A process of the launch, with the number of its host (`group`) and the `cards` it sees.

    `everywhere` holds all cards of its host in the order of PCI bus ids, where they are known.
    """

    rank: int
    group: int
    host: str
    cards: tuple[FoundCard, ...] = ()
    everywhere: tuple[FoundCard, ...] = ()


@dataclass(frozen=True)
class NodeWorkers:
    """The workers that one host runs: those of a node, by their numbers in the plan."""

    name: str
    workers: tuple[int, ...]


def planned_devices(plan: Plan) -> list[PlannedDevice]:
    """The device of every worker, stage by stage."""
    return [
        _planned(plan.cluster, stage.rank, stage.node, name)
        for stage in plan.stages
        for name in stage.devices
    ]


def _planned(cluster: Cluster, stage: int, node: str, name: str) -> PlannedDevice:
    return PlannedDevice(
        stage,
        name,
        device_gib(cluster, node, name),
        cluster.capability_of(name),
        cluster.kind_of(name) == "gpu",
        cluster.is_in_library(name),
    )


def nodes_of(plan: Plan) -> list[NodeWorkers]:
    """The nodes that the plan uses, the leader's first."""
    nodes = [stage.node for stage in plan.stages for _ in stage.devices]
    return [
        NodeWorkers(name, tuple(number for number, node in enumerate(nodes) if node == name))
        for name in dict.fromkeys(nodes)
    ]


def take_seats(processes: Sequence[Process], plan: Plan, with_cards: bool) -> list[Seat] | Refusal:
    """The seat of every rank, for one process a worker, in the order of ranks.

    `with_cards` is False where workers compute on CPUs or share a card.
    """
    hosts: dict[int, list[Process]] = {}
    for process in processes:
        hosts.setdefault(process.group, []).append(process)
    groups = [hosts[group] for group in sorted(hosts)]
    nodes, devices = _nodes_for(plan, groups), planned_devices(plan)

    def seated(host: int, node: int) -> list[Seat] | Refusal:
        workers = nodes[node].workers
        return _seat_host(groups[host], workers, [devices[n] for n in workers], with_cards)

    tried = {
        (host, node): seated(host, node)
        for host in range(len(groups))
        for node in range(len(nodes))
    }
    found = matching(
        range(len(groups)),
        range(len(nodes)),
        lambda host, node: _preference(tried[host, node], groups[host], host, nodes, node),
    )
    if len(found) < len(groups):
        refusal, planned = _refusal(groups, nodes, found, tried), nodes_of(plan)
        if len(groups) == len(planned):
            return refusal
        names = ", ".join(node.name for node in planned)
        return Refusal(
            f"{refusal.reason}\nthe plan is for {len(planned)} nodes ({names}), and was started on "
            f"{len(groups)}: llmpq-run --dry-run prints the command of each"
        )
    seats: dict[int, Seat] = {}
    for host, node in found.items():
        own = tried[host, node]
        assert not isinstance(own, Refusal)
        ranks = (process.rank for process in groups[host])
        seats |= zip(ranks, own, strict=True)
    return [seats[rank] for rank in range(len(processes))]


def stage_ranks(plan: Plan, seats: Sequence[Seat]) -> list[list[int]]:
    """The ranks of each stage's workers."""
    rank_of = {worker: rank for rank, (worker, _) in enumerate(seats)}
    return [[rank_of[worker] for worker in workers] for workers in plan.ranks]


def _nodes_for(plan: Plan, hosts: Sequence[Sequence[Process]]) -> list[NodeWorkers]:
    """Workers for each host: the plan's nodes where there are as many, else pieces in order."""
    nodes = nodes_of(plan)
    if len(nodes) == len(hosts):
        return nodes
    pieces, first = [], 0
    for host in hosts:
        pieces.append(NodeWorkers("", tuple(range(first, first + len(host)))))
        first += len(host)
    return pieces


def _preference(
    tried: list[Seat] | Refusal,
    host: Sequence[Process],
    number: int,
    nodes: Sequence[NodeWorkers],
    node: int,
) -> int | None:
    """0 for the node of the host's name, 1 for that of its number, 2 for one that fits, or None."""
    if isinstance(tried, Refusal):
        return None
    if not nodes[node].name and number != node:
        return None
    if nodes[node].name in (host[0].host, host[0].host.partition(".")[0]):
        return 0
    return 1 if number == node else 2


def _seat_host(
    host: Sequence[Process],
    workers: Sequence[int],
    devices: Sequence[PlannedDevice],
    with_cards: bool,
) -> list[Seat] | Refusal:
    """The seats of one host's processes, in their order."""
    if len(host) != len(workers):
        return Refusal(
            f"{len(workers)} workers are planned and {len(host)} processes were started: use "
            f"--nproc-per-node {len(workers)}"
        )
    if not with_cards:
        return [(worker, None) for worker in workers]
    views = {tuple(card.uuid or str(card) for card in process.cards) for process in host}
    if len(views) > 1:
        return _seat_by_view(host, workers, devices)
    found = match_cards(host[0].cards, devices)
    if isinstance(found, Refusal):
        return Refusal(found.reason + _fix(host[0], devices))
    numbers = [None if card is None else card.index for card in found]
    return list(zip(workers, numbers, strict=True))


def _seat_by_view(
    host: Sequence[Process], workers: Sequence[int], devices: Sequence[PlannedDevice]
) -> list[Seat] | Refusal:
    """Seats processes that see different cards: each gets a worker that its cards fit."""

    def seated(process: int, worker: int) -> list[FoundCard | None] | Refusal:
        return match_cards(host[process].cards, [devices[worker]])

    every = range(len(host))
    found = matching(every, every, lambda p, w: None if isinstance(seated(p, w), Refusal) else 0)
    if len(found) < len(host):
        lines = [f"rank {p.rank} sees {', '.join(map(str, p.cards)) or 'no card'}" for p in host]
        planned = ", ".join(map(str, devices))
        return Refusal(
            f"planned: {planned}; found: {'; '.join(lines)}; these views do not fit: give all "
            "processes the same CUDA_VISIBLE_DEVICES, and each takes the card of its stage"
        )
    seats = []
    for number in every:
        card = match_cards(host[number].cards, [devices[found[number]]])
        first = None if isinstance(card, Refusal) else card[0]
        seats.append((workers[found[number]], None if first is None else first.index))
    return seats


def _fix(process: Process, devices: Sequence[PlannedDevice]) -> str:
    """The advice for a refusal: show hidden cards of the host, else make another plan."""
    line = visible_line(process.everywhere, devices)
    if line is not None:
        return f"; the host has them, they are not visible here: start with {line}"
    return (
        "; no CUDA_VISIBLE_DEVICES would help: plan for the cards that are there (llmpq-profile "
        "devices --cluster-out cluster.yaml writes them down), or use --device cpu"
    )


def _refusal(
    hosts: Sequence[Sequence[Process]],
    nodes: Sequence[NodeWorkers],
    found: dict[int, int],
    tried: dict[tuple[int, int], list[Seat] | Refusal],
) -> Refusal:
    """Why the hosts that are left cannot be the nodes that are left, one line each."""
    hosts_left = [host for host in range(len(hosts)) if host not in found]
    nodes_left = [node for node in range(len(nodes)) if node not in found.values()]
    lines = []
    for host, node in zip(hosts_left, nodes_left, strict=True):
        why = tried[host, node]
        name = nodes[node].name
        where = f"node {name} of the plan on host" if name else "host"
        said = why.reason if isinstance(why, Refusal) else "taken by another host"
        lines.append(f"{where} {hosts[host][0].host}: {said}")
    return Refusal("\n".join(["the plan does not fit the machines:", *lines]))


def worker_places(plan: Plan) -> list[tuple[str, str]]:
    """The node and device type of every worker, by its number in the plan."""
    return [(stage.node, device) for stage in plan.stages for device in stage.devices]


def worker_names(plan: Plan) -> list[str]:
    """What people call every worker, by its number in the plan."""
    return [f"{device} on {node}" for node, device in worker_places(plan)]
