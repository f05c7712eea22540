"""Which devices make stages, and in which order: what there is to search besides sizes.

A `Mix` says how many stages of which place a plan has; it leaves devices out, and joins equal
devices of a node into stages of several (tensor parallelism). An order of a mix is a layout.
Nodes that hold the same devices are alike: which of them is used makes no difference.

All mixes are searched where they are at most `MAX_MIXES`. Where there are more, first the equal
devices of a node are cut into stages of one size only, then they are used together or not at
all, then at most one kind is left out; `mixes` says which. Orders of a mix that have the same first
and last place differ in little (links crossed twice, where layers of low precision may lie):
`canonical` is one that crosses the fewest links, `orders` are the others, up to `MAX_ORDERS`.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmpq.cluster import Cluster, Device, Link
from llmpq.planner.problem import Place

MAX_MIXES = 2000
MAX_ORDERS = 24

Mix = tuple[tuple[Place, int], ...]  # places and how many stages have each, both above 0
Cut = tuple[tuple[int, int], ...]  # of one node's equal devices: (tensor parallel, stages)

ONE_SIZE = "equal devices of a node were cut into stages of one size only"
TOGETHER = "equal devices were used together or not at all"
ALL_BUT_ONE = "at most one kind of device was left out"


@dataclass(frozen=True)
class Alike:
    """Equal devices: `count` on each of `nodes`, which are alike in all they hold."""

    nodes: tuple[str, ...]
    type: str
    memory_bytes: int
    count: int

    def places(self, cut: Cut, num_nodes: int) -> list[tuple[Place, int]]:
        """What a cut of the devices of the first nodes makes."""
        return [
            (Place(node, self.type, self.memory_bytes, degree), stages)
            for node in self.nodes[:num_nodes]
            for degree, stages in cut
        ]


def mixes(cluster: Cluster, degrees: Sequence[int], max_stages: int) -> tuple[list[Mix], list[str]]:
    """Every mix of at most `max_stages` stages, the most devices first, and what was left out.

    `degrees`: how many devices a stage may have.
    """
    groups = alike(cluster)
    found, notes = _all_but_one(groups, degrees), [ONE_SIZE, TOGETHER, ALL_BUT_ONE]
    for options, left_out in _by_richness(groups, degrees, max_stages):
        if math.prod(len(choices) for choices in options) <= MAX_MIXES:
            found = [_mix(groups, picks) for picks in itertools.product(*options)]
            notes = left_out
            break
    fitting = [mix for mix in found if 0 < num_stages(mix) <= max_stages]
    return sorted(fitting, key=num_devices, reverse=True), notes


def num_stages(mix: Mix) -> int:
    """Stages of a mix."""
    return sum(count for _, count in mix)


def num_devices(mix: Mix) -> int:
    """Devices that a mix uses."""
    return sum(count * place.tensor_parallel for place, count in mix)


def alike(cluster: Cluster) -> list[Alike]:
    """Groups of equal devices, nodes that hold the same taken together."""
    held: dict[str, Counter[Device]] = {}
    for device in cluster.devices():
        unnamed = Device("", device.type, device.memory_bytes)
        held.setdefault(device.node, Counter())[unnamed] += 1
    nodes: dict[tuple[Link, frozenset[tuple[Device, int]]], list[str]] = {}
    for name, devices in held.items():
        nodes.setdefault((_link(cluster, name), frozenset(devices.items())), []).append(name)
    return [
        Alike(tuple(names), device.type, device.memory_bytes, count)
        for (_, _), names in nodes.items()
        for device, count in held[names[0]].items()
    ]


def _link(cluster: Cluster, node: str) -> Link:
    return cluster.link_between(node, node)


Options = list[tuple[Cut, int]]  # of one group: a cut, and on how many of its nodes


def _by_richness(
    groups: Sequence[Alike], degrees: Sequence[int], max_stages: int
) -> Iterator[tuple[list[Options], list[str]]]:
    """What each group may choose from: less and less, and what that leaves out."""
    counts = [min(group.count, max_stages * max(degrees)) for group in groups]
    every = [list(itertools.islice(_every_cut(n, degrees), MAX_MIXES + 1)) for n in counts]
    yield [_on_nodes(g, cuts) for g, cuts in zip(groups, every, strict=True)], []
    single: list[list[Cut]] = [
        [((d, k),) for d in degrees for k in range(1, n // d + 1)] for n in counts
    ]
    mixed = [ONE_SIZE] if any(len(a) < len(b) for a, b in zip(single, every, strict=True)) else []
    yield [_on_nodes(g, cuts) for g, cuts in zip(groups, single, strict=True)], mixed
    whole = [_whole(group, degrees, max_stages) for group in groups]
    yield whole, [*mixed, TOGETHER]


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


def _on_nodes(group: Alike, cuts: Sequence[Cut]) -> Options:
    """A cut on some of the nodes that are alike; () on none."""
    used: Options = [(cut, n) for n in range(1, len(group.nodes) + 1) for cut in cuts]
    return [((), 0), *used]


def _whole(group: Alike, degrees: Sequence[int], max_stages: int) -> Options:
    """All devices in stages of one size, as many as may be; or none."""
    cuts: list[Cut] = [
        ((d, min(group.count // d, max_stages)),) for d in degrees if group.count % d == 0
    ]
    return [((), 0), *((cut, len(group.nodes)) for cut in cuts)]


def _all_but_one(groups: Sequence[Alike], degrees: Sequence[int]) -> list[Mix]:
    found = []
    for degree in degrees:
        cuts = [_largest_cut(group.count, degree) for group in groups]
        picks = [(cut, len(g.nodes)) for cut, g in zip(cuts, groups, strict=True)]
        found.append(_mix(groups, picks))
        for left_out in range(len(groups)):
            found.append(
                _mix(groups, [((), 0) if i == left_out else p for i, p in enumerate(picks)])
            )
    return list(dict.fromkeys(found))


def _largest_cut(count: int, degree: int) -> Cut:
    """All devices in stages of the largest size up to `degree` that divides them."""
    while count % degree:
        degree //= 2
    return ((degree, count // degree),)


def _mix(groups: Sequence[Alike], picks: Sequence[tuple[Cut, int]]) -> Mix:
    pairs = zip(groups, picks, strict=True)
    return tuple(place for group, (cut, nodes) in pairs for place in group.places(cut, nodes))


# ---- orders


def ends(cluster: Cluster, mix: Mix) -> list[tuple[Place, Place]]:
    """First and last places of a mix that differ in what they cost, on two nodes where possible."""
    if num_stages(mix) == 1:
        return [(mix[0][0], mix[0][0])]
    names = {name: group.nodes for group in alike(cluster) for name in group.nodes}
    found: dict[object, tuple[Place, Place]] = {}
    for (first, count), (last, _) in itertools.product(mix, repeat=2):
        if first == last and count == 1:
            continue
        key = _unnamed(first, names), _unnamed(last, names)
        known = found.get(key)
        if known is None or (known[0].node == known[1].node and first.node != last.node):
            found[key] = first, last
    return list(found.values())


def _unnamed(place: Place, alike_nodes: dict[str, tuple[str, ...]]) -> tuple[object, ...]:
    return alike_nodes[place.node], place.type, place.memory_bytes, place.tensor_parallel


def canonical(mix: Mix, first: Place, last: Place) -> tuple[Place, ...]:
    """The order with these ends that crosses the fewest links; equal places side by side."""
    if num_stages(mix) == 1:
        return (first,)
    left = Counter(dict(mix))
    left.subtract([first, last])
    others = [place for place in left.elements()]
    starts = [p for p in others if p.node == first.node]
    ends_ = [p for p in others if p.node == last.node and p.node != first.node]
    between = [p for p in others if p.node not in (first.node, last.node)]
    return (first, *starts, *between, *ends_, last)


def orders(order: tuple[Place, ...]) -> tuple[list[tuple[Place, ...]], bool]:
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


def _distinct(left: Counter[Place], length: int) -> Iterator[tuple[Place, ...]]:
    """Permutations of a multiset."""
    if length == 0:
        yield ()
    for place in [p for p, count in left.items() if count]:
        left[place] -= 1
        for rest in _distinct(left, length - 1):
            yield (place, *rest)
        left[place] += 1
