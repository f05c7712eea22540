"""Which process of a launch runs which worker of a plan, and on which card: a pure decision.

A launch has hosts (torchrun's nodes) and processes on them; a plan has nodes and workers, one for
each device of a stage, in the order of the stages. Ranks of a node need not follow each other in
the plan: torchrun numbers processes host by host, so that ranks are given workers here and stages
find their neighbours by rank. A host takes the place of the node of its name, else of the node of
its number (in the order in which the stages name them), else of one that its cards fit.

Started on one host, a plan of several nodes runs there as a whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llmpq.cluster import Cluster, device_gib
from llmpq.placement import FoundCard, PlannedDevice, Refusal, match_cards, matching, visible_line
from llmpq.plan_data import Plan

Seat = tuple[int, int | None]  # a worker of the plan, and CUDA's number of its card


@dataclass(frozen=True)
class Process:
    """A process of the launch. `group`: its host's number; `cards`: those that it sees.

    `everywhere`: all cards of its host, by their place on the bus, where that is known.
    """

    rank: int
    group: int
    host: str
    cards: tuple[FoundCard, ...] = ()
    everywhere: tuple[FoundCard, ...] = ()


@dataclass(frozen=True)
class NodeWorkers:
    """What one host is to run: a node's workers, by their numbers in the plan."""

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
    """The seat of every rank. `with_cards`: False where workers compute on CPUs or share a card.

    `processes`: one a worker, by rank.
    """
    hosts: dict[int, list[Process]] = {}
    for process in processes:
        hosts.setdefault(process.group, []).append(process)
    groups = [hosts[group] for group in sorted(hosts)]
    parts, devices = _parts_for(plan, groups), planned_devices(plan)

    def seated(host: int, part: int) -> list[Seat] | Refusal:
        workers = parts[part].workers
        return _seat_host(groups[host], workers, [devices[n] for n in workers], with_cards)

    tried = {
        (host, part): seated(host, part)
        for host in range(len(groups))
        for part in range(len(parts))
    }
    found = matching(
        range(len(groups)),
        range(len(parts)),
        lambda host, part: _preference(tried[host, part], groups[host], host, parts, part),
    )
    if len(found) < len(groups):
        refusal, nodes = _refusal(groups, parts, found, tried), nodes_of(plan)
        if len(groups) == len(nodes):
            return refusal
        names = ", ".join(part.name for part in nodes)
        return Refusal(
            f"{refusal.reason}\nthe plan is for {len(nodes)} nodes ({names}), and was started on "
            f"{len(groups)}: llmpq-run --dry-run prints the command of each"
        )
    seats = {
        process.rank: seat
        for host, part in found.items()
        for process, seat in zip(groups[host], _seats(tried[host, part]), strict=True)
    }
    return [seats[rank] for rank in range(len(processes))]


def stage_ranks(plan: Plan, seats: Sequence[Seat]) -> list[list[int]]:
    """The ranks of each stage's workers."""
    rank_of = {worker: rank for rank, (worker, _) in enumerate(seats)}
    return [[rank_of[worker] for worker in workers] for workers in plan.ranks]


def _parts_for(plan: Plan, hosts: Sequence[Sequence[Process]]) -> list[NodeWorkers]:
    """A part for each host: the plan's nodes where there are as many, else pieces in order."""
    parts = nodes_of(plan)
    if len(parts) == len(hosts):
        return parts
    pieces, first = [], 0
    for host in hosts:
        pieces.append(NodeWorkers("", tuple(range(first, first + len(host)))))
        first += len(host)
    return pieces


def _preference(
    tried: list[Seat] | Refusal,
    host: Sequence[Process],
    number: int,
    parts: Sequence[NodeWorkers],
    part: int,
) -> int | None:
    """0: the node of the host's name; 1: of its number; 2: another whose cards fit."""
    if isinstance(tried, Refusal):
        return None
    if not parts[part].name and number != part:
        return None
    if parts[part].name in (host[0].host, host[0].host.partition(".")[0]):
        return 0
    return 1 if number == part else 2


def _seats(tried: list[Seat] | Refusal) -> list[Seat]:
    assert not isinstance(tried, Refusal)
    return tried


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
    if len({_identities(process) for process in host}) > 1:
        return _seat_by_view(host, workers, devices)
    found = match_cards(host[0].cards, devices)
    if isinstance(found, Refusal):
        return Refusal(found.reason + _fix(host[0], devices))
    numbers = [None if card is None else card.index for card in found]
    return list(zip(workers, numbers, strict=True))


def _identities(process: Process) -> tuple[str, ...]:
    return tuple(card.uuid or str(card) for card in process.cards)


def _seat_by_view(
    host: Sequence[Process], workers: Sequence[int], devices: Sequence[PlannedDevice]
) -> list[Seat] | Refusal:
    """The launcher shows each process other cards: a process gets a worker that its cards fit."""

    def seated(process: int, worker: int) -> list[FoundCard | None] | Refusal:
        return match_cards(host[process].cards, [devices[worker]])

    every = range(len(host))
    found = matching(every, every, lambda p, w: None if _is_refused(seated(p, w)) else 0)
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


def _is_refused(found: object) -> bool:
    return isinstance(found, Refusal)


def _fix(process: Process, devices: Sequence[PlannedDevice]) -> str:
    """What would help: cards of the host that are hidden, else another plan."""
    line = visible_line(process.everywhere, devices)
    if line is not None:
        return f"; the host has them, they are not visible here: start with {line}"
    return (
        "; no CUDA_VISIBLE_DEVICES would help: plan for the cards that are there (llmpq-profile "
        "devices --cluster-out cluster.yaml writes them down), or use --device cpu"
    )


def _refusal(
    hosts: Sequence[Sequence[Process]],
    parts: Sequence[NodeWorkers],
    found: dict[int, int],
    tried: dict[tuple[int, int], list[Seat] | Refusal],
) -> Refusal:
    """Why the hosts that are left cannot be the nodes that are left, one line each."""
    hosts_left = [host for host in range(len(hosts)) if host not in found]
    parts_left = [part for part in range(len(parts)) if part not in found.values()]
    lines = []
    for host, part in zip(hosts_left, parts_left, strict=True):
        why = tried[host, part]
        name = parts[part].name
        where = f"node {name} of the plan on host" if name else "host"
        said = why.reason if isinstance(why, Refusal) else "taken by another host"
        lines.append(f"{where} {hosts[host][0].host}: {said}")
    return Refusal("\n".join(["the plan does not fit the machines:", *lines]))
