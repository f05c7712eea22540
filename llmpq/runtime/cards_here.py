"""Which cards of this machine the workers of a plan take, before a run and when some are lost."""

import os
import socket
from collections import deque
from collections.abc import Sequence

import torch

from llmpq.placement import FoundCard, PlannedDevice, Refusal, match_cards, visible_line
from llmpq.plan_data import Plan
from llmpq.runtime import cards
from llmpq.runtime.process import Role, card_device, choose_device
from llmpq.runtime.rehearsal import own_core
from llmpq.seats import Seat, nodes_of, planned_devices, worker_places


def card_lines(plan: Plan, device: str) -> list[str]:
    """A line for each stage that this machine runs; none where it has no card or is no node.

    `device`: what `--device` says.
    """
    here, devices = _here(plan, device)
    return lines_of(here, devices, cards.all_cards()) if here and devices else []


def stage_cards(plan: Plan, device: str) -> dict[int, FoundCard]:
    """The card of each stage that this machine would run on one; none where a run is refused."""
    here, devices = _here(plan, device)
    found = match_cards(here, devices) if here else Refusal("no cards")
    if isinstance(found, Refusal):
        return {}
    taken = zip(devices, found, strict=True)
    return {device.stage: card for device, card in taken if card is not None}


def devices_of(plan: Plan, host: str) -> list[PlannedDevice]:
    """What is planned for a host: all of a plan for one node, else the node of its name."""
    parts, devices = nodes_of(plan), planned_devices(plan)
    own = [part for part in parts if len(parts) == 1 or part.name in (host, host.partition(".")[0])]
    return [devices[number] for part in own for number in part.workers]


def lines_of(
    here: tuple[FoundCard, ...], devices: list[PlannedDevice], everywhere: tuple[FoundCard, ...]
) -> list[str]:
    """The card of each device for people, or why a run would be refused."""
    found = match_cards(here, devices)
    if isinstance(found, Refusal):
        line = visible_line(everywhere, devices)
        fix = f"; the host has them: start with {line}" if line else ""
        return [f"on this machine a run would be refused: {found.reason}{fix}"]
    return [
        f"stage {device.stage} ({device.type}) takes {card or 'the CPU'} here"
        for device, card in zip(devices, found, strict=True)
    ]


def _here(plan: Plan, device: str) -> tuple[tuple[FoundCard, ...], list[PlannedDevice]]:
    """The cards of this machine, and what is planned for it; both empty where none are used."""
    if device == "cpu" or plan.cluster.rehearse:
        return (), []
    return cards.visible_cards(), devices_of(plan, socket.gethostname())


def claim_device(plan: Plan, device: str, role: Role, seats: Sequence[Seat]) -> torch.device:
    """The device of this process; a rehearsed one on the CPU gets a core of its own.

    `device`: what `--device` says. Raises `UserError` where it is not there.
    """
    rehearsed = bool(plan.cluster.rehearse)
    _, card = seats[role.rank]
    if card is not None:
        return card_device(card)
    others_have_cards = any(taken is not None for _, taken in seats)
    if not rehearsed and (device == "auto" or others_have_cards):
        return torch.device("cpu")
    chosen = choose_device("cpu" if rehearsed and device == "auto" else device, role)
    if rehearsed and chosen.type == "cpu":
        torch.set_num_threads(1)
        own_core(role.rank, role.size)
    return chosen


# ---- cards that stay when workers are lost


def workers_cards(plan: Plan, device: str) -> list[str]:
    """CUDA's names of the cards here, the workers' own first; empty where they share or have none.

    `device`: what `--device` says.
    """
    if device == "cpu" or (plan.cluster.rehearse and device == "auto"):
        return []
    visible = cards.visible_cards()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(card.index) for card in visible]
    places = worker_places(plan)
    on_cpus = any(plan.cluster.kind_of(name) == "cpu" for _, name in places)
    if on_cpus or len(names) < max(len(visible), len(places)):
        return []
    return in_workers_order(names, plan, visible)


def in_workers_order(names: Sequence[str], plan: Plan, visible: Sequence[FoundCard]) -> list[str]:
    """The names of the visible cards: first those that the workers take, by rank.

    They stay in their order where the run will be refused or the cards are shared.
    """
    found = (
        Refusal("shared") if plan.cluster.rehearse else match_cards(visible, planned_devices(plan))
    )
    if isinstance(found, Refusal):
        return list(names)
    taken = [card.index for card in found if card is not None]
    return [names[i] for i in [*taken, *(i for i in range(len(names)) if i not in taken)]]


def cards_left(names: Sequence[str], old: Plan, lost: Sequence[int], new: Plan) -> list[str]:
    """Cards in the order of the new plan's workers, without those of the lost ranks."""
    left: dict[tuple[str, str], deque[str]] = {}
    for rank, (place, card) in enumerate(zip(worker_places(old), names, strict=False)):
        if rank not in lost:
            left.setdefault(place, deque()).append(card)
    spare = deque(names[len(worker_places(old)) :])
    chosen = []
    for place in worker_places(new):
        free = left.get(place) or spare  # what the old plan left out runs where nothing ran
        if free:
            chosen.append(free.popleft())
    rest = [card for kept in left.values() for card in kept]
    return [*chosen, *rest, *spare]
