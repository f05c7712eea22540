"""What a dry run says of the cards of this machine: which stage takes which, or what is missing."""

import socket

from llmpq.cli.run_options import RunOptions
from llmpq.placement import FoundCard, PlannedDevice, Refusal, match_cards, visible_line
from llmpq.plan_data import Plan
from llmpq.seats import nodes_of, planned_devices


def card_lines(plan: Plan, options: RunOptions) -> list[str]:
    """A line for each stage that this machine runs; none where it has no card or is no node."""
    from llmpq.runtime.cards import all_cards

    here, devices = _here(plan, options)
    return lines_of(here, devices, all_cards()) if here and devices else []


def stage_cards(plan: Plan, options: RunOptions) -> dict[int, FoundCard]:
    """The card of each stage that this machine would run on one; none where a run is refused."""
    here, devices = _here(plan, options)
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
    """For people: the card of each device, or why a run would be refused."""
    found = match_cards(here, devices)
    if isinstance(found, Refusal):
        line = visible_line(everywhere, devices)
        fix = f"; the host has them: start with {line}" if line else ""
        return [f"on this machine a run would be refused: {found.reason}{fix}"]
    return [
        f"stage {device.stage} ({device.type}) takes {card or 'the CPU'} here"
        for device, card in zip(devices, found, strict=True)
    ]


def _here(plan: Plan, options: RunOptions) -> tuple[tuple[FoundCard, ...], list[PlannedDevice]]:
    """The cards of this machine, and what is planned for it; both empty where none are used."""
    from llmpq.runtime.cards import visible_cards

    if options.device == "cpu" or plan.cluster.rehearse:
        return (), []
    return visible_cards(), devices_of(plan, socket.gethostname())
