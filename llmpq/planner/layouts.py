"""Which devices make stages, and in which order: what there is to search besides sizes.

A `DeviceSubset` says how many stages a plan has on which devices; it leaves devices out, and joins
devices of a type on a node into stages of several (tensor parallelism), which count with the least
memory of theirs. An order of a subset is a layout. Nodes that hold the same devices are alike:
which of them is used for what makes no difference.

All subsets are searched where they are at most `MAX_SUBSETS`. Where there are more, first devices
of unequal memory are not joined, then alike nodes are used alike, then the equal devices of a node
are cut into stages of one size only, then they are used together or not at all, then at most one
kind is left out; `subsets` says which. Orders of a subset with the same first and last stage differ
in little (links crossed twice, where layers of low precision may lie): `canonical` is one that
crosses the fewest links, `orders` are the others, up to `MAX_ORDERS`.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llmpq.cluster import Cluster, Device, Link
from llmpq.planner.problem import StageDevices

MAX_SUBSETS = 2000
MAX_ORDERS = 24

DeviceSubset = tuple[
    tuple[StageDevices, int], ...
]  # a stage's devices, and how many stages have the like
Cut = tuple[tuple[int, int], ...]  # of one node's equal devices: (tensor parallel, stages)
Group = tuple[str, int, int]  # equal devices of a node: type, memory, how many
Use = tuple[Cut, ...]  # of a node: a cut for each of its groups of equal devices, () for none

UNEQUAL = "devices of unequal memory were not joined into one stage"
ALIKE = "nodes with the same devices were used in the same way, or not at all"
ONE_SIZE = "equal devices of a node were cut into stages of one size only"
TOGETHER = "equal devices were used together or not at all"
ALL_BUT_ONE = "at most one kind of device was left out"


@dataclass(frozen=True)
class Alike:
    """Nodes that hold the same groups of equal devices."""

    nodes: tuple[str, ...]
    groups: tuple[Group, ...]

    def stage_devices(self, uses: Sequence[Use]) -> Iterator[tuple[StageDevices, int]]:
        """What uses of the first nodes make."""
        for node, use in zip(self.nodes, uses, strict=False):
            for (name, memory_bytes, _), cut in zip(self.groups, use, strict=True):
                for degree, stages in cut:
                    yield StageDevices(node, name, memory_bytes, degree), stages


def subsets(
    cluster: Cluster, degrees: Sequence[int], max_stages: int
) -> tuple[list[DeviceSubset], list[str]]:
    """Every subset of at most `max_stages` stages, the most devices first, and what was left out.

    `degrees`: how many devices a stage may have.
    """
    kinds = alike(cluster)
    found, notes = _all_but_one(kinds, degrees), [ALIKE, ONE_SIZE, TOGETHER, ALL_BUT_ONE]
    for options, left_out in _by_richness(kinds, degrees, max_stages):
        if math.prod(len(choices) for choices in options) <= MAX_SUBSETS:
            found = [_subset(kinds, picks) for picks in itertools.product(*options)]
            notes = left_out
            break
    fitting = [subset for subset in dict.fromkeys(found) if 0 < num_stages(subset) <= max_stages]
    return sorted(fitting, key=num_devices, reverse=True), notes


def num_stages(subset: DeviceSubset) -> int:
    """Stages of a subset."""
    return sum(count for _, count in subset)


def num_devices(subset: DeviceSubset) -> int:
    """Devices that a subset uses."""
    return sum(count * devices.tensor_parallel for devices, count in subset)


def alike(cluster: Cluster) -> list[Alike]:
    """The nodes, those that hold the same behind the same link taken together."""
    held: dict[str, Counter[Device]] = {}
    for device in cluster.devices():
        unnamed = Device("", device.type, device.memory_bytes)
        held.setdefault(device.node, Counter())[unnamed] += 1
    nodes: dict[tuple[Link, frozenset[tuple[Device, int]]], list[str]] = {}
    for name, devices in held.items():
        link = cluster.link_between(name, name)
        nodes.setdefault((link, frozenset(devices.items())), []).append(name)
    return [
        Alike(tuple(names), tuple((d.type, d.memory_bytes, n) for d, n in held[names[0]].items()))
        for names in nodes.values()
    ]


Options = list[tuple[Use, ...]]  # of alike nodes: for each option, what the first nodes do


def _by_richness(
    kinds: Sequence[Alike], degrees: Sequence[int], max_stages: int
) -> Iterator[tuple[list[Options], list[str]]]:
    """What alike nodes may choose from: less and less, and what that leaves out."""
    most = max_stages * max(degrees)
    joined = [_joining_uses(kind, lambda n: _every_cut(min(n, most), degrees)) for kind in kinds]
    yield [_freely(kind, uses) for kind, uses in zip(kinds, joined, strict=True)], []
    every = [_uses(kind, lambda n: _every_cut(min(n, most), degrees)) for kind in kinds]
    several = [UNEQUAL] if any(map(_is_unequal, kinds)) and most > max_stages else []
    yield [_freely(kind, uses) for kind, uses in zip(kinds, every, strict=True)], several
    several = [*several, ALIKE] if any(len(kind.nodes) > 1 for kind in kinds) else several
    yield [_alike(kind, uses) for kind, uses in zip(kinds, every, strict=True)], several
    single = [_uses(kind, lambda n: _single_cuts(min(n, most), degrees)) for kind in kinds]
    fewer = any(len(a) < len(b) for a, b in zip(single, every, strict=True))
    notes = [*several, ONE_SIZE] if fewer else several
    yield [_alike(kind, uses) for kind, uses in zip(kinds, single, strict=True)], notes
    whole = [_uses(kind, lambda n: _whole_cuts(n, degrees, max_stages)) for kind in kinds]
    together: list[Options] = [
        [(use,) * len(kind.nodes) for use in uses] for kind, uses in zip(kinds, whole, strict=True)
    ]
    yield together, [*notes, TOGETHER]


def _uses(kind: Alike, cuts: Callable[[int], Iterator[Cut]]) -> list[Use]:
    """Every way to use one node, not at all included; no more than are of use."""
    each = [[(), *itertools.islice(cuts(count), MAX_SUBSETS)] for _, _, count in kind.groups]
    return list(itertools.islice(itertools.product(*each), MAX_SUBSETS + 1))


def _joining_uses(kind: Alike, cuts: Callable[[int], Iterator[Cut]]) -> list[Use]:
    """`_uses`, and those in which devices of more memory join stages of others of their type."""
    if not _is_unequal(kind):
        return _uses(kind, cuts)
    found: list[Use] = [((),) * len(kind.groups)]
    for index, group in enumerate(kind.groups):
        each = [(), *itertools.islice(cuts(_at_least(kind, group)), MAX_SUBSETS)]
        more = ((*use[:index], cut, *use[index + 1 :]) for use in found for cut in each)
        found = list(
            itertools.islice((use for use in more if _is_there(kind, use)), MAX_SUBSETS + 1)
        )
    return found


def _is_unequal(kind: Alike) -> bool:
    """Whether a type is there with several memories."""
    return len({name for name, *_ in kind.groups}) < len(kind.groups)


def _at_least(kind: Alike, group: Group) -> int:
    """How many devices of a group's type have as much memory or more."""
    return sum(n for name, memory, n in kind.groups if name == group[0] and memory >= group[1])


def _is_there(kind: Alike, use: Use) -> bool:
    """Whether a node has the devices. A stage has one at least of the group that it counts as."""
    for group, cut in zip(kind.groups, use, strict=True):
        taken = sum(
            degree * stages
            for (name, memory, _), other in zip(kind.groups, use, strict=True)
            if name == group[0] and memory >= group[1]
            for degree, stages in other
        )
        if taken > _at_least(kind, group) or sum(stages for _, stages in cut) > group[2]:
            return False
    return True


def _freely(kind: Alike, uses: Sequence[Use]) -> Options:
    """Each node its own way; which node has which makes no difference."""
    picks = itertools.combinations_with_replacement(uses, len(kind.nodes))
    return list(itertools.islice(picks, MAX_SUBSETS + 1))


def _alike(kind: Alike, uses: Sequence[Use]) -> Options:
    """Some of the nodes, all the same way."""
    used = [use for use in uses if any(use)]
    return [(), *((use,) * n for use in used for n in range(1, len(kind.nodes) + 1))]


def _every_cut(count: int, degrees: Sequence[int]) -> Iterator[Cut]:
    """Every way to make at least one stage of at most `count` devices."""
    usable = sorted((d for d in degrees if d <= count), reverse=True)
    return (cut for cut in _cuts(count, usable) if cut)


def _cuts(count: int, degrees: Sequence[int]) -> Iterator[Cut]:
    if not degrees:
        yield ()
        return
    largest, *smaller = degrees
    for number in range(count // largest + 1):
        first: Cut = ((largest, number),) if number else ()
        for rest in _cuts(count - largest * number, smaller):
            yield (*first, *rest)


def _single_cuts(count: int, degrees: Sequence[int]) -> Iterator[Cut]:
    """Stages of one size, any number of them."""
    return (((d, n),) for d in degrees for n in range(1, count // d + 1))


def _whole_cuts(count: int, degrees: Sequence[int], max_stages: int) -> Iterator[Cut]:
    """All devices in stages of one size, as many as may be."""
    return (((d, min(count // d, max_stages)),) for d in degrees if count % d == 0)


def _all_but_one(kinds: Sequence[Alike], degrees: Sequence[int]) -> list[DeviceSubset]:
    found = []
    groups = [(i, j) for i, kind in enumerate(kinds) for j in range(len(kind.groups))]
    for degree, left_out in itertools.product(degrees, [None, *groups]):
        picks = []
        for i, kind in enumerate(kinds):
            cuts = [_largest_cut(count, degree) for _, _, count in kind.groups]
            use = tuple(() if (i, j) == left_out else cut for j, cut in enumerate(cuts))
            picks.append((use,) * len(kind.nodes))
        found.append(_subset(kinds, picks))
    return found


def _largest_cut(count: int, degree: int) -> Cut:
    """All devices in stages of the largest size up to `degree` that divides them."""
    while count % degree:
        degree //= 2
    return ((degree, count // degree),)


def _subset(kinds: Sequence[Alike], picks: Sequence[tuple[Use, ...]]) -> DeviceSubset:
    pairs = zip(kinds, picks, strict=True)
    return tuple(devices for kind, uses in pairs for devices in kind.stage_devices(uses))


# ---- orders


def ends(cluster: Cluster, subset: DeviceSubset) -> list[tuple[StageDevices, StageDevices]]:
    """First and last stages of a subset that differ in what they cost.

    Of pairs that differ in their nodes' names alone one is enough: on two nodes where possible,
    as that crosses fewer links; where links inside nodes are the dearer ones, of either kind.
    """
    if num_stages(subset) == 1:
        return [(subset[0][0], subset[0][0])]
    apart = _inner_links_are_dearer(cluster)
    found: dict[object, tuple[StageDevices, StageDevices]] = {}
    for (first, count), (last, _) in itertools.product(subset, repeat=2):
        if first == last and count == 1:
            continue
        same = first.node == last.node
        key = _unnamed(cluster, subset, first), _unnamed(cluster, subset, last), same and apart
        known = found.get(key)
        if known is None or (known[0].node == known[1].node and not same):
            found[key] = first, last
    return list(found.values())


def _inner_links_are_dearer(cluster: Cluster) -> bool:
    between = cluster.link
    return any(
        node.link.bandwidth_gbs < between.bandwidth_gbs or node.link.latency_us > between.latency_us
        for node in cluster.nodes
    )


def _unnamed(cluster: Cluster, subset: DeviceSubset, devices: StageDevices) -> tuple[object, ...]:
    """Devices without their node's name: what else the subset has on that node counts."""
    there = frozenset(
        (p.type, p.memory_bytes, p.tensor_parallel, n) for p, n in subset if p.node == devices.node
    )
    link = cluster.link_between(devices.node, devices.node)
    return link, there, devices.type, devices.memory_bytes, devices.tensor_parallel


def canonical(
    subset: DeviceSubset, first: StageDevices, last: StageDevices
) -> tuple[StageDevices, ...]:
    """The order with these ends that crosses the fewest links; equal stages side by side."""
    if num_stages(subset) == 1:
        return (first,)
    left = Counter(dict(subset))
    left.subtract([first, last])
    others = sorted(left.elements(), key=lambda devices: devices.node)  # side by side
    starts = [p for p in others if p.node == first.node]
    ends_ = [p for p in others if p.node == last.node and p.node != first.node]
    between = [p for p in others if p.node not in (first.node, last.node)]
    return (first, *starts, *between, *ends_, last)


def orders(order: tuple[StageDevices, ...]) -> tuple[list[tuple[StageDevices, ...]], bool]:
    """Distinct orders with the same ends, `order` first, and whether these are all of them."""
    if len(order) <= 3:
        return [order], True
    found = [order]
    for middle in _distinct(Counter(order[1:-1]), len(order) - 2):
        candidate = (order[0], *middle, order[-1])
        if candidate != order:
            found.append(candidate)
        if len(found) > MAX_ORDERS:
            return found[:MAX_ORDERS], False
    return found, True


def _distinct(left: Counter[StageDevices], length: int) -> Iterator[tuple[StageDevices, ...]]:
    """Permutations of a multiset."""
    if length == 0:
        yield ()
    for devices in [p for p, count in left.items() if count]:
        left[devices] -= 1
        for rest in _distinct(left, length - 1):
            yield (devices, *rest)
        left[devices] += 1
