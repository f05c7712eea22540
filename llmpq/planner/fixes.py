"""The three cheapest changes that would make a plan fit, where nothing does.

A change is offered only after its problem was planned. Changes are tried in this order of price:
  configurations   fewer requests in flight (speed alone), other precisions, a larger quality loss
  work       shorter prompts, fewer new tokens
  hardware   more memory, more devices of a type that is there
and where no change of one of these rows is enough alone, joined with a larger quality loss, with
all precisions, with both. Where that makes fewer than three, other joined changes and second
choices (memory of another device) follow. The size of a change is found by `explain.may_fit`,
which is quick. `replan` has the last word.

Not covered: other device types, other models, cheaper hardware by price.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from llmpq.cluster import GIB, MIB, Cluster
from llmpq.errors import InfeasibleError
from llmpq.planner.baselines import amount, in_bits
from llmpq.planner.explain import in_flight, least_loss, may_fit, roomiest_subsets, why
from llmpq.planner.frontier import round_up
from llmpq.planner.problem import Problem
from llmpq.planner.sizes import batch_options
from llmpq.planner.what_if import (
    Kind,
    Replan,
    device_kinds,
    with_batch,
    with_budget,
    with_device,
    with_devices,
    with_lengths,
    with_memory,
    with_precisions,
)

NUM_FIXES = 3
TIME_LIMIT_S = 5.0
TRIES = 4  # sizes of one change that are planned before it is given up
LEAST_LENGTH_SHARE = 1 / 8  # a job of shorter requests is another job
MOST_NEW_DEVICES = 8
MOST_NEW_MEMORY = 1024 * GIB  # of one device


@dataclass(frozen=True)
class Fix:
    """A change that makes a plan fit: in words, what to write or type, and the changed problem."""

    text: str
    command_hint: str
    problem: Problem

    def __str__(self) -> str:
        return f"{self.text} ({self.command_hint})"

    def then(self, other: "Fix") -> "Fix":
        """Both changes; `other` was made to this one's problem."""
        text = f"{self.text} and {other.text}"
        return Fix(text, f"{self.command_hint}; {other.command_hint}", other.problem)


def infeasible(
    problem: Problem, precisions: Sequence[str], replan: Replan, deadline: float | None = None
) -> InfeasibleError:
    """The error for a problem without a plan.

    `precisions`: all that the costs offer. `replan` plans a changed problem; it must not itself
    explain, with this function, why nothing fits. `deadline`: an instant of `time.monotonic` after
    which nothing more is planned; without, `TIME_LIMIT_S` from now.
    """
    until = time.monotonic() + TIME_LIMIT_S if deadline is None else deadline
    found = fixes(problem, precisions, replan, until)
    lines = [why(problem), *(f"would fit: {fix}" for fix in found)]
    if len(found) < NUM_FIXES:
        lines.append(_why_so_few(len(found), until))
    return InfeasibleError("\n".join(lines))


def _why_so_few(count: int, deadline: float) -> str:
    if time.monotonic() > deadline:
        return "the time limit ended this search; other changes may help too"
    which = "other change" if count else "change"
    return f"no {which} that was tried is sufficient"


# ---- changes, the smallest that may do first; none of them is verified here

Lever = Callable[[Problem, Sequence[str]], Iterator[Fix]]


def fewer_requests(problem: Problem, precisions: Sequence[str]) -> Iterator[Fix]:
    """Where `batch` is a number: the most requests in flight that may fit, then fewer."""
    most = largest(1, min(batch_options(problem)) - 1, lambda n: may_fit(with_batch(problem, n)))
    for batch in _fewer(most, 1):
        yield Fix(in_flight(batch), f"workload: batch: {batch}", with_batch(problem, batch))


def other_precision(problem: Problem, precisions: Sequence[str]) -> Iterator[Fix]:
    """One more precision; where none is enough, all."""
    left_out = [name for name in precisions if name not in problem.precisions]
    single = [fix for name in left_out if may_fit((fix := _allowing(problem, [name])).problem)]
    yield from single
    if not single and len(left_out) > 1:
        everything = _allowing(problem, left_out)
        if may_fit(everything.problem):
            yield everything


def _allowing(problem: Problem, names: Sequence[str]) -> Fix:
    wider = with_precisions(problem, [*problem.precisions, *names])
    text = f"allowing {', '.join(in_bits(name) for name in names)}"
    return Fix(text, f"--precisions {','.join(wider.precisions)}", wider)


def more_loss(problem: Problem, precisions: Sequence[str]) -> Iterator[Fix]:
    """The least quality loss that memory allows, then a little more."""
    if math.isinf(problem.budget):
        return
    asked, needed = problem.quality.percent(problem.budget), least_loss(problem)
    if not asked < needed < math.inf:
        return
    for percent in dict.fromkeys(round_up(needed * factor, 3) for factor in (1, 1.01, 1.1, 1.5)):
        figure = f"{percent:.10g}"
        text = f"perplexity up to {figure} % higher"
        yield Fix(text, f"--max-quality-loss {figure}", with_budget(problem, percent))


def shorter_prompts(problem: Problem, precisions: Sequence[str]) -> Iterator[Fix]:
    """Longer prompts cut to the most tokens that may fit."""
    longest = problem.max_prompt_tokens
    least = math.ceil(longest * LEAST_LENGTH_SHARE)
    most = largest(least, longest - 1, lambda n: may_fit(with_lengths(problem, n)))
    for tokens in _fewer(most, least):
        text = f"prompts of at most {tokens} tokens instead of {longest}"
        yield Fix(text, f"workload: prompt_tokens: {tokens}", with_lengths(problem, tokens))


def fewer_new_tokens(problem: Problem, precisions: Sequence[str]) -> Iterator[Fix]:
    """Longer answers cut to the most tokens that may fit."""
    longest = max(new for _, new in problem.lengths)
    least = math.ceil(longest * LEAST_LENGTH_SHARE)

    def cut(tokens: int) -> Problem:
        return with_lengths(problem, max_new_tokens=tokens)

    for tokens in _fewer(largest(least, longest - 1, lambda n: may_fit(cut(n))), least):
        text = f"at most {tokens} new tokens instead of {longest}"
        yield Fix(text, f"workload: new_tokens: {tokens}", cut(tokens))


def more_memory(problem: Problem, precisions: Sequence[str]) -> Iterator[Fix]:
    """The least memory to add to the devices of one kind, the least in all first; or to all."""
    kinds = device_kinds(problem.cluster)
    single = [pair for kind in kinds if (pair := _grown(problem, [kind]))]
    ordered = [fix for _, fix in sorted(single, key=lambda pair: pair[0])]
    yield from ordered[:1]
    everywhere = _grown(problem, kinds) if len(kinds) > 1 else None
    if everywhere is not None:
        yield everywhere[1]
    yield from ordered[1:]


def _grown(problem: Problem, kinds: Sequence[Kind]) -> tuple[float, Fix] | None:
    """(bytes in all, the fix) of the least memory, the same for each device of `kinds`."""
    unit = MIB / 100 if kinds[0][1] in problem.cluster.rehearse else GIB / 10
    high = 1
    while not may_fit(_with_more(problem, kinds, high * unit)):
        high *= 2
        if high * unit > MOST_NEW_MEMORY:
            return None
    low = high // 2  # not enough
    while high - low > 1 + high // 100:
        middle = (low + high) // 2
        enough = may_fit(_with_more(problem, kinds, middle * unit))
        low, high = (low, middle) if enough else (middle, high)
    return _growth(problem, kinds, high * unit)


def _with_more(problem: Problem, kinds: Sequence[Kind], num_bytes: float) -> Problem:
    for kind in kinds:
        problem = with_memory(problem, *kind, num_bytes)
    return problem


def _growth(problem: Problem, kinds: Sequence[Kind], num_bytes: float) -> tuple[float, Fix]:
    counts = [_count(problem.cluster, kind) for kind in kinds]
    in_all = num_bytes * sum(counts)
    changed = _with_more(problem, kinds, num_bytes)
    names = ", ".join(f"{type_} of {node}" for node, type_ in kinds)
    total = f", {amount(in_all)} in all" if sum(counts) > 1 else ""
    hints = [_memory_hint(changed.cluster, kind) for kind in kinds]
    text = f"{amount(num_bytes)} more memory on each {names}{total}"
    return in_all, Fix(text, f"cluster: {', '.join(hints)}", changed)


def _count(cluster: Cluster, kind: Kind) -> int:
    node, device_type = kind
    everywhere = device_type in cluster.rehearse
    devices = cluster.devices()
    return sum(d.type == device_type and (everywhere or d.node == node) for d in devices)


def _memory_hint(cluster: Cluster, kind: Kind) -> str:
    node, device_type = kind
    if device_type in cluster.rehearse:
        mib = cluster.rehearse[device_type].memory_mib
        return f"rehearse.{device_type}.memory_mib: {mib:.10g}"
    groups = next(n.devices for n in cluster.nodes if n.name == node)
    gib = next(g.memory_gib for g in groups if g.type == device_type)
    return f"memory_gib: {gib:.10g} for {device_type} of {node}"


def more_devices(problem: Problem, precisions: Sequence[str]) -> Iterator[Fix]:
    """The fewest devices to add of one type that is there, the least memory first."""
    found = []
    for device_type in dict.fromkeys(device.type for device in problem.cluster.devices()):
        for count in range(1, MOST_NEW_DEVICES + 1):
            changed = with_device(problem, device_type, count)
            if may_fit(changed):
                found.append((_memory_of(changed.cluster), device_type, count, changed))
                break
    for _, device_type, count, changed in sorted(found, key=lambda entry: entry[0]):
        yield _added(device_type, count, changed)


def _memory_of(cluster: Cluster) -> int:
    return sum(device.memory_bytes for device in cluster.devices())


def _added(device_type: str, count: int, changed: Problem) -> Fix:
    node = next(d.node for d in changed.cluster.devices() if d.type == device_type)
    number = _count(changed.cluster, (node, device_type))
    hint = f"cluster: count: {number} for {device_type} of {node}"
    return Fix(f"{count} more {device_type} on {node}", hint, changed)


def fewer_devices(problem: Problem) -> Iterator[Fix]:
    """As many devices as there are layers: those of most memory, or those of a type first."""
    devices = problem.cluster.devices()
    preferred = [sorted(devices, key=lambda d: -d.memory_bytes)]
    for device_type in dict.fromkeys(d.type for d in preferred[0]):
        preferred.append(sorted(preferred[0], key=lambda d: d.type != device_type))
    kept = [Counter((d.node, d.type) for d in p[: problem.spec.num_layers]) for p in preferred]
    for counts in dict.fromkeys(tuple(sorted(counter.items())) for counter in kept):
        names = ", ".join(f"{n} x {type_} of {node}" for (node, type_), n in counts)
        changed = with_devices(problem, dict(counts))
        yield Fix(f"only {names}", "cluster: no other devices", changed)


def largest(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The largest number from `low` to `high` for which `holds`, true of smaller ones if at all."""
    if high < low or not holds(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _fewer(most: int | None, least: int) -> Iterator[int]:
    """`most`, a little less, much less, the least."""
    if most is not None:
        sizes = (most, most * 9 // 10, most // 2, least)
        yield from dict.fromkeys(size for size in sizes if size >= least)


# ---- joined changes


def alone(problem: Problem, lever: Lever, precisions: Sequence[str]) -> Iterator[Fix]:
    """The lever's own changes."""
    return lever(problem, precisions)


def with_loss(problem: Problem, lever: Lever, precisions: Sequence[str]) -> Iterator[Fix]:
    """The lever as far as memory asks for it, and the quality loss that is needed then.

    Nothing where the loss alone may be enough.
    """
    free = replace(problem, budget=math.inf, _known={})
    if math.isinf(problem.budget) or may_fit(free):
        return
    for fix in islice(lever(free, precisions), 1):
        limited = replace(fix.problem, budget=problem.budget, _known={})
        for loss in more_loss(limited, precisions):
            yield fix.then(loss)


def with_all_precisions(problem: Problem, lever: Lever, precisions: Sequence[str]) -> Iterator[Fix]:
    """All precisions, and the lever; nothing where the precisions alone may be enough."""
    wider = _all_precisions(problem, precisions)
    if wider is not None and not may_fit(wider.problem):
        yield from (wider.then(fix) for fix in lever(wider.problem, precisions))


def with_both(problem: Problem, lever: Lever, precisions: Sequence[str]) -> Iterator[Fix]:
    """All precisions, the lever and a larger quality loss."""
    wider = _all_precisions(problem, precisions)
    if wider is not None:
        yield from (wider.then(fix) for fix in with_loss(wider.problem, lever, precisions))


def _all_precisions(problem: Problem, precisions: Sequence[str]) -> Fix | None:
    left_out = [name for name in precisions if name not in problem.precisions]
    return _allowing(problem, left_out) if left_out else None


# ---- which changes are offered

SETTINGS: tuple[Lever, ...] = (fewer_requests, other_precision, more_loss)
WORK: tuple[Lever, ...] = (shorter_prompts, fewer_new_tokens)
HARDWARE: tuple[Lever, ...] = (more_memory, more_devices)
TIERS = (SETTINGS, WORK, HARDWARE)
WITH_SECOND_CHOICES: tuple[Lever, ...] = (other_precision, more_memory, more_devices)
WAYS = (alone, with_loss, with_all_precisions, with_both)
Verify = Callable[[Iterator[Fix]], Fix | None]  # the first that has a plan


def fixes(
    problem: Problem, precisions: Sequence[str], replan: Replan, deadline: float
) -> list[Fix]:
    """Up to `NUM_FIXES` changes, the cheapest first, each of which `replan` found a plan for.

    Beyond `deadline`, an instant of `time.monotonic`, nothing more is looked for.
    """

    def verify(candidates: Iterator[Fix]) -> Fix | None:
        for fix in _until(deadline, islice(candidates, TRIES)):
            if _has_plan(fix.problem, replan):
                return fix
        return None

    if roomiest_subsets(problem):
        return list(islice(_offers(problem, precisions, verify), NUM_FIXES))
    return _with_fewer_devices(problem, precisions, verify)


def _until(deadline: float, candidates: Iterator[Fix]) -> Iterator[Fix]:
    """Does not even ask for a candidate, which takes time to make, beyond the deadline."""
    while time.monotonic() < deadline:
        fix = next(candidates, None)
        if fix is None:
            return
        yield fix


def _has_plan(problem: Problem, replan: Replan) -> bool:
    try:
        replan(problem)
    except InfeasibleError:
        return False
    return True


def _offers(problem: Problem, precisions: Sequence[str], verify: Verify) -> Iterator[Fix]:
    """Of each tier the changes of the first way that has any; the other ways'; second choices."""
    later = []
    offered = set()
    for tier in TIERS:
        enough = False
        for way in WAYS:
            if enough:
                later.append((tier, way))
                continue
            for fix in _each(verify, (way(problem, lever, precisions) for lever in tier)):
                enough = True
                offered.add(str(fix))
                yield fix
    for tier, way in later:
        yield from _each(verify, (way(problem, lever, precisions) for lever in tier))
    for lever in WITH_SECOND_CHOICES:
        new = (fix for fix in lever(problem, precisions) if str(fix) not in offered)
        yield from _each(verify, (iter([fix]) for fix in new))


def _each(verify: Verify, several: Iterable[Iterator[Fix]]) -> Iterator[Fix]:
    """Those of `several` that have a plan."""
    return filter(None, (verify(candidates) for candidates in several))


def _with_fewer_devices(problem: Problem, precisions: Sequence[str], verify: Verify) -> list[Fix]:
    """Devices left out; where that is not enough, other changes of what is left."""
    single = _each(verify, (iter([fewer]) for fewer in fewer_devices(problem)))
    found = list(islice(single, NUM_FIXES))
    if found:
        return found
    first = next(fewer_devices(problem))
    offers = _offers(first.problem, precisions, verify)
    return [first.then(fix) for fix in islice(offers, NUM_FIXES)]
