"""Decides which card of a node is used for which planned device.

A card is used for a device of its own type (by name and memory); else for one of the same family
(the SXM and the PCIe model of a number, or one with more memory); else, where the device library
does not know the card or the type, for one whose memory and compute capability fit. A card that is
known to be of another type of the library is never used, however large it is, as the times and
kernels of the plan would be those of another card. Where several choices are possible, devices in
the order of the plan get cards in CUDA's order. All functions are pure.

Not covered: cards that are hidden from this process (`runtime.cards` finds those).
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from llmpq.cluster import GIB
from llmpq.device_names import MEMORY_TOLERANCE, fits, is_slice, same_family, type_of_card

Left = TypeVar("Left", bound=Hashable)
Right = TypeVar("Right", bound=Hashable)


@dataclass(frozen=True)
class FoundCard:
    """A card as CUDA shows it. `index` is CUDA's number; `uuid` is equal in every process."""

    index: int
    name: str
    memory_bytes: int
    compute_capability: str = ""
    uuid: str = ""

    def __str__(self) -> str:
        known = type_of_card(self.name, self.memory_bytes / GIB) or "of no type in the library"
        return f"cuda:{self.index} {self.name} ({self.memory_bytes / GIB:.1f} GiB, {known})"


@dataclass(frozen=True)
class PlannedDevice:
    """A device of a plan. `stage` is its stage's number, `memory_gib` that of the whole card.

    `is_known` tells whether the device library has the type. `compute_capability` is "" where it is
    not known.
    """

    stage: int
    type: str
    memory_gib: float
    compute_capability: str = ""
    is_card: bool = True
    is_known: bool = True

    def __str__(self) -> str:
        return f"stage {self.stage} {self.type} ({self.memory_gib:g} GiB)"


@dataclass(frozen=True)
class Refusal:
    """The reason why planned devices and cards do not match, as a message for the user."""

    reason: str


def match_cards(
    cards: Sequence[FoundCard], devices: Sequence[PlannedDevice]
) -> list[FoundCard | None] | Refusal:
    """The card of each planned device, None for a CPU; or why there is none."""
    wanted = [number for number, device in enumerate(devices) if device.is_card]
    found = matching(
        wanted, range(len(cards)), lambda number, card: _rank(devices[number], cards[card])
    )
    if len(found) < len(wanted):
        missing = [devices[number] for number in wanted if number not in found]
        return Refusal(_reason(cards, devices, missing))
    return [cards[found[n]] if n in found else None for n in range(len(devices))]


def matching(
    left: Sequence[Left], right: Sequence[Right], rank: Callable[[Left, Right], int | None]
) -> dict[Left, Right]:
    """Matches as many pairs as possible, those of a low rank first; rank None allows no pair.

    The method is Kuhn's augmenting paths, on the pairs of the lowest rank, then with the next ones.
    """
    ranks = {(one, other): rank(one, other) for one in left for other in right}
    taken: dict[Right, Left] = {}

    def match(one: Left, limit: int, seen: set[Right]) -> bool:
        levels = [(ranks[one, other], other) for other in right if other not in seen]
        near = [other for level, other in levels if level is not None and level <= limit]
        for other in sorted(near, key=lambda other: other in taken):  # free ones first
            if other in seen:
                continue
            seen.add(other)
            if other not in taken or match(taken[other], limit, seen):
                taken[other] = one
                return True
        return False

    for limit in sorted({level for level in ranks.values() if level is not None}):
        for one in left:
            if one not in taken.values():
                match(one, limit, set())
    return {one: other for other, one in taken.items()}


def _rank(device: PlannedDevice, card: FoundCard) -> int | None:
    """How well a card fits a device: 0 is best, None does not fit."""
    if card.memory_bytes < device.memory_gib * (1 - MEMORY_TOLERANCE) * GIB:
        return None
    known = type_of_card(card.name, card.memory_bytes / GIB)
    if known == device.type or (not device.is_known and fits(device.type, card.name)):
        return 0
    given = device.compute_capability, card.compute_capability
    if all(given) and given[0] != given[1]:
        return None
    if device.is_known and same_family(device.type, card.name):
        return 1
    if device.is_known and (known is not None or is_slice(card.name)):
        return None
    if known is None:
        return 2
    return 3 if all(given) else None  # the type's name is the user's own


def _reason(
    cards: Sequence[FoundCard],
    devices: Sequence[PlannedDevice],
    missing: Sequence[PlannedDevice],
) -> str:
    """The planned and the found devices, and those without a card."""
    planned = ", ".join(str(device) for device in devices if device.is_card)
    found = ", ".join(map(str, cards)) or "no card"
    without = ", ".join(f"stage {device.stage} ({device.type})" for device in missing)
    text = f"planned: {planned}; found: {found}; no card is left for {without}"
    if any(is_slice(card.name) for card in cards):
        text += (
            "; a MIG slice is not a whole card: give it a type name of its own in the cluster "
            "file, with memory_gib and a profile"
        )
    return text


def visible_line(everywhere: Sequence[FoundCard], devices: Sequence[PlannedDevice]) -> str | None:
    """The variables that show a process the cards that it needs; None where the host lacks them.

    `everywhere` holds all cards of the host in the order of PCI bus ids, as in nvidia-smi.
    """
    found = match_cards(everywhere, devices)
    if isinstance(found, Refusal):
        return None
    numbers = ",".join(str(card.index) for card in found if card is not None)
    return f"CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES={numbers}"
