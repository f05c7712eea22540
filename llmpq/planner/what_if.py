"""What would change the plan: the problem changed in one respect, planned again, compared.

`with_...` make changed problems: more memory, another device, faster links, a larger quality
budget, other precisions, requests in flight, shorter lengths. They change no times of a device
type, so they add only devices of types that are there. `what_if` plans each change with the
`replan` it is given and states what was gained. The unchanged plan stays possible under every
change that is asked about, so no gain is below zero. A gain that the plan's own gap would explain
is marked: the unchanged problem might have a plan as good as that.

Not covered: two changes at once, prices, and device types that the cluster does not have.
"""

import itertools
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmpq.cluster import GIB, MIB, Cluster, DeviceGroup, Link, Node, group_gib
from llmpq.errors import InfeasibleError
from llmpq.model_spec import shard_faults
from llmpq.plan_data import Plan, Predicted
from llmpq.planner.problem import Problem

Replan = Callable[[Problem], Plan]  # raises `InfeasibleError` where nothing fits
Kind = tuple[str, str]  # a node's name and a device type

LINK_FACTOR = 2.0
MAX_TENSOR_PARALLEL = 64
MORE_LOSS_PERCENT = 0.5
MOST_CHANGES = 8  # that are planned
THETA_FACTOR = 0.5
# What a problem remembers by keys that name all links that it depends on.
WITHOUT_LINKS = {"layers", "fixed", "bytes", "end", "kinds", "shorter chunks"}
REHEARSED_SHARE = 0.1  # of its cap: what a rehearsed device is given


@dataclass(frozen=True)
class Change:
    """One change and the speed of the plan it allows; `gain` in tokens/s.

    `within_gap`: the gain is no more than what the unchanged plan's gap leaves open.
    `at_most_percent`: no plan of the changed problem gains more; infinity where that is not known.
    """

    text: str
    tokens_per_s: float
    gain: float
    gain_percent: float
    within_gap: bool
    at_most_percent: float = math.inf


@dataclass(frozen=True)
class WhatIf:
    """Changes by what they gain, most first, and how many there was no time to look at."""

    changes: tuple[Change, ...] = ()
    num_left_out: int = 0


def what_if(problem: Problem, plan: Plan, replan: Replan, deadline: float) -> WhatIf:
    """What each of the first `MOST_CHANGES` would gain, as far as `deadline` (monotonic) allows.

    A change whose problem `replan` finds no plan for is left out. Raises `ValueError` where the
    plan has no prediction.
    """
    found: list[Change] = []
    unit = problem.unit
    try:
        before = replan(unit).predicted
    except InfeasibleError:  # not within the little time that a change is given
        before = plan.predicted
    texts = (text for text, _ in changes(problem, plan))
    num_late = 0
    todo = zip(texts, (changed for _, changed in changes(unit, plan)), strict=True)
    for text, changed in itertools.islice(todo, MOST_CHANGES):
        if time.monotonic() > deadline:
            num_late += 1
            continue
        try:
            found.append(_compare(text, plan, before, replan(changed)))
        except InfeasibleError:
            continue
    ranked = sorted(found, key=lambda change: -change.gain)
    return WhatIf(tuple(ranked), num_late + sum(1 for _ in todo))


def changes(problem: Problem, plan: Plan) -> Iterator[tuple[str, Problem]]:
    """Every change that is asked about, in words, with its problem.

    The most promising first: on 56 random rigs, a device more brought over 1 % in 76 % of cases, a
    larger quality loss in 43 %, tensor parallelism in 27 %, memory in 20 %, links between nodes in
    17 %, and those inside never.
    """
    for node, device_type in _first_of_each_type(problem.cluster):
        yield f"one more {device_type} on {node}", with_device(problem, device_type)
    yield from _more_quality_loss(problem)
    may_share = problem.max_tensor_parallel == 1 and not shard_faults(problem.spec, 2)
    if may_share and _has_equal_devices(problem.cluster):
        text = "stages of several devices (--tensor-parallel auto)"
        known = dict(problem._known)
        yield text, replace(problem, max_tensor_parallel=MAX_TENSOR_PARALLEL, _known=known)
    for kind in device_kinds(problem.cluster):
        num_bytes, text = _some_memory(problem.cluster, kind)
        yield text, with_memory(problem, *kind, num_bytes)
    yield from _faster_links(problem, plan)


def _compare(text: str, plan: Plan, before: Predicted | None, changed: Plan) -> Change:
    """In closed form, as plans of changed problems are not simulated: best plan to best plan."""
    after = changed.predicted
    if plan.predicted is None or before is None or after is None:
        raise ValueError("a plan without a prediction cannot be compared")
    tokens_per_s = plan.predicted.tokens_per_s
    gain = tokens_per_s * max(0.0, before.priced_s / after.priced_s - 1)
    return Change(
        text=text,
        tokens_per_s=tokens_per_s + gain,
        gain=gain,
        gain_percent=100 * gain / tokens_per_s,
        within_gap=gain <= _open_gain(tokens_per_s, before.gap),
        at_most_percent=_most_percent(before, after),
    )


def _most_percent(before: Predicted, after: Predicted) -> float:
    """By the bound of the changed problem, where that is of seconds alone."""
    if after.lower_bound <= 0 or after.objective != after.priced_s:
        return math.inf
    return max(0.0, 100 * (before.priced_s / after.lower_bound - 1))


def _open_gain(tokens_per_s: float, gap: float) -> float:
    """Tokens/s that the best plan may be above this one: its seconds are at least 1 - gap of it."""
    return tokens_per_s * gap / (1 - gap) if gap < 1 else math.inf


def _more_quality_loss(problem: Problem) -> Iterator[tuple[str, Problem]]:
    if math.isfinite(problem.budget):
        percent = problem.quality.percent(problem.budget) + MORE_LOSS_PERCENT
        text = f"a quality loss of {percent:.3g} % instead of {percent - MORE_LOSS_PERCENT:.3g} %"
        yield text, with_budget(problem, percent)
    elif problem.theta > 0:
        theta = problem.theta * THETA_FACTOR
        yield (
            f"theta {theta:g} instead of {problem.theta:g}",
            replace(problem, theta=theta, _known={}),
        )


def _faster_links(problem: Problem, plan: Plan) -> Iterator[tuple[str, Problem]]:
    if len(problem.cluster.nodes) > 1:
        text = f"{LINK_FACTOR:g} times the bandwidth between nodes"
        yield text, with_links(problem, LINK_FACTOR, "between")
    if _sends_inside(plan):
        text = f"{LINK_FACTOR:g} times the bandwidth inside nodes"
        yield text, with_links(problem, LINK_FACTOR, "inside")


def _sends_inside(plan: Plan) -> bool:
    """Two stages that follow each other share a node, or devices of one stage do."""
    nodes = [stage.node for stage in plan.stages]
    pairs = zip(nodes, [*nodes[1:], nodes[0]], strict=True)
    shared = len(nodes) > 1 and any(a == b for a, b in pairs)
    return shared or any(stage.tensor_parallel > 1 for stage in plan.stages)


def _some_memory(cluster: Cluster, kind: Kind) -> tuple[int, str]:
    """1 GiB, or a share of what a rehearsed device has; and its words."""
    node, device_type = kind
    rehearsal = cluster.rehearse.get(device_type)
    if rehearsal is None:
        return GIB, f"1 GiB more on each {device_type} of {node}"
    mib = rehearsal.memory_mib * REHEARSED_SHARE
    return int(mib * MIB), f"{mib:.3g} MiB more on each {device_type}"


def device_kinds(cluster: Cluster) -> list[Kind]:
    """Groups whose memory can be changed apart: a rehearsed type has one cap on all nodes."""
    kinds = dict.fromkeys((node.name, g.type) for node in cluster.nodes for g in node.devices)
    seen: dict[Kind, Kind] = {}
    for node, device_type in kinds:
        shared = "" if device_type in cluster.rehearse else node
        seen.setdefault((shared, device_type), (node, device_type))
    return list(seen.values())


def _has_equal_devices(cluster: Cluster) -> bool:
    """Some node has two devices of a type; rehearsed ones cannot share a stage."""
    devices = cluster.devices()
    if any(device.type in cluster.rehearse for device in devices):
        return False
    return len(set(devices)) < len(devices)


def _first_of_each_type(cluster: Cluster) -> list[Kind]:
    first: dict[str, Kind] = {}
    for node, device_type in device_kinds(cluster):
        first.setdefault(device_type, (node, device_type))
    return list(first.values())


# ---- changed problems


def with_memory(problem: Problem, node: str, device_type: str, num_bytes: float) -> Problem:
    """`num_bytes` more on each device of a type of a node; of a rehearsed type on all nodes."""
    cluster = problem.cluster
    rehearsal = cluster.rehearse.get(device_type)
    if rehearsal is not None:
        mib = rehearsal.memory_mib + num_bytes / MIB
        larger = rehearsal.model_copy(update={"memory_mib": mib})
        return _with_cluster(problem, rehearse={**cluster.rehearse, device_type: larger})

    def grow(group: DeviceGroup) -> DeviceGroup:
        if group.type != device_type:
            return group
        gib = group_gib(group) + num_bytes / GIB
        return group.model_copy(update={"memory_gib": gib})

    return _with_groups(problem, node, lambda groups: [grow(group) for group in groups])


def with_device(problem: Problem, device_type: str, count: int = 1) -> Problem:
    """`count` more devices of a type, in the first node that has it."""
    node = next(n for n in problem.cluster.nodes if any(g.type == device_type for g in n.devices))

    def add(groups: list[DeviceGroup]) -> list[DeviceGroup]:
        at = next(i for i, group in enumerate(groups) if group.type == device_type)
        more = groups[at].model_copy(update={"count": groups[at].count + count})
        return [*groups[:at], more, *groups[at + 1 :]]

    return _with_groups(problem, node.name, add)


def with_devices(problem: Problem, counts: Mapping[Kind, int]) -> Problem:
    """At most `counts` devices of each (node, type); those not named, and empty nodes, go."""
    left = dict(counts)
    nodes = []
    for node in problem.cluster.nodes:
        groups = []
        for group in node.devices:
            kept = min(group.count, left.get((node.name, group.type), 0))
            left[node.name, group.type] = left.get((node.name, group.type), 0) - kept
            groups += [group.model_copy(update={"count": kept})] if kept else []
        nodes += [node.model_copy(update={"devices": groups})] if groups else []
    return _with_cluster(problem, nodes=nodes)


def with_links(problem: Problem, factor: float, which: Literal["between", "inside"]) -> Problem:
    """`factor` times the bandwidth of the links between nodes, or inside them."""

    def faster(link: Link) -> Link:
        return link.model_copy(update={"bandwidth_gbs": link.bandwidth_gbs * factor})

    cluster = problem.cluster
    items = problem._known.items()
    known = {key: value for key, value in items if _first(key) in WITHOUT_LINKS}
    if which == "between":
        return replace(_with_cluster(problem, link=faster(cluster.link)), _known=known)
    nodes = [node.model_copy(update={"link": faster(node.link)}) for node in cluster.nodes]
    return replace(_with_cluster(problem, nodes=nodes), _known=known)


def with_budget(problem: Problem, percent: float) -> Problem:
    """Perplexity may rise by `percent`; a price of quality (theta) is dropped."""
    known = _kept(problem, "layer groups")
    return replace(problem, budget=problem.quality.budget(percent), theta=0.0, _known=known)


def with_precisions(problem: Problem, precisions: Sequence[str]) -> Problem:
    """These precisions are allowed, no others."""
    return replace(problem, precisions=tuple(precisions), _known={})


def with_batch(problem: Problem, batch: int) -> Problem:
    """So many requests in flight."""
    workload = problem.workload.model_copy(update={"batch": batch})
    return replace(problem, workload=workload, _known={})


def with_lengths(
    problem: Problem, max_prompt_tokens: int | None = None, max_new_tokens: int | None = None
) -> Problem:
    """Longer prompts, and requests for more new tokens, are cut to these."""
    prompts, new = zip(*problem.lengths, strict=True)
    prompts = _cut(prompts, max_prompt_tokens)
    new = _cut(new, max_new_tokens)
    lengths = {"prompt_tokens": _shortest_form(prompts), "new_tokens": _shortest_form(new)}
    workload = problem.workload.model_copy(update=lengths)
    pairs = tuple(zip(prompts, new, strict=True))
    return replace(problem, workload=workload, lengths=pairs, _known={})


def _cut(lengths: Sequence[int], most: int | None) -> tuple[int, ...]:
    return tuple(lengths) if most is None else tuple(min(length, most) for length in lengths)


def _shortest_form(lengths: tuple[int, ...]) -> int | tuple[int, ...]:
    return lengths[0] if len(set(lengths)) == 1 else lengths


def _with_groups(
    problem: Problem, name: str, change: Callable[[list[DeviceGroup]], list[DeviceGroup]]
) -> Problem:
    def changed(node: Node) -> Node:
        return node.model_copy(update={"devices": change(node.devices)})

    nodes = [changed(node) if node.name == name else node for node in problem.cluster.nodes]
    return _with_cluster(problem, nodes=nodes)


def _with_cluster(problem: Problem, **changes: Any) -> Problem:
    """Other devices; times and bytes of those that were there stay known."""
    cluster = problem.cluster.model_copy(update=changes)
    return replace(problem, cluster=cluster, _known=_kept(problem, "orders"))


def _kept(problem: Problem, other: str) -> dict[Hashable, Any]:
    """What is known of a problem and stays so, but for `other`."""
    items = problem._known.items()
    return {key: value for key, value in items if other not in (key, _first(key))}


def _first(key: Hashable) -> Hashable:
    return key[0] if isinstance(key, tuple) else None
