"""`llmpq-run --replan-on-loss`: when a worker is lost, a new plan for those that are left.

The parent of the workers plans with the same costs as `llmpq-plan` and starts again, with --resume,
what the new plan asks for. Quality is kept where it can be: first the new plan may not lose more
than the first one did; where nothing fits so, it loses as little as memory allows, and says so.
All files are read before the first worker starts. Heavy modules are imported inside functions.

Not covered: torchrun, where no process of ours outlives a loss.
"""

import os
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpq.artifact import validate, write_json
from llmpq.cli.common import console
from llmpq.cli.plan_inputs import Arguments, read_inputs
from llmpq.cli.run_options import RunOptions
from llmpq.cluster import Cluster
from llmpq.errors import InfeasibleError, UserError
from llmpq.plan_data import Plan, diff
from llmpq.workload import Workload, planned_lengths

if TYPE_CHECKING:
    from llmpq.costs.latency import LayerTimes
    from llmpq.costs.quality import QualityModel
    from llmpq.placement import FoundCard
    from llmpq.planner.inputs import Inputs
    from llmpq.planner.problem import Problem

PLANNING_S = 30.0  # at most, for one new plan
GAP = 0.01
FAR_ABOVE = 1e3  # so many times the run's length is what all sensitivity is worth, for best quality


@dataclass(frozen=True)
class ReplanOptions:
    """What the command line said of planning again."""

    replan_on_loss: bool
    cluster: Path | None
    profiles: Path | None
    sensitivity: Path | None
    max_quality_loss: float | None

    @classmethod
    def taken_from(cls, flags: dict[str, Any]) -> "ReplanOptions":
        """Takes its own flags out of all of them; `UserError` where they would have no effect."""
        options = cls(**{name: flags.pop(name) for name in cls.__dataclass_fields__})
        given = [name for name, value in vars(options).items() if value not in (None, False)]
        if given and not options.replan_on_loss:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{names}: only with --replan-on-loss")
        return options

    @classmethod
    def none(cls) -> "ReplanOptions":
        """Where nothing is planned again."""
        return cls(False, None, None, None, None)


@dataclass(frozen=True)
class Ground:
    """What new plans are made from. `plan` is the first one, on the cluster as it was then."""

    plan: Plan
    quality: "QualityModel"
    times: "Mapping[str, LayerTimes]"
    precisions: tuple[str, ...]
    workload: Workload
    max_loss_percent: float | None

    def problem(self, cluster: Cluster, budget: float, theta: float = 0.0) -> "Problem":
        """Planning on what is left of the cluster."""
        from llmpq.planner.problem import Problem

        return Problem(
            spec=self.plan.model,
            cluster=cluster,
            workload=self.workload,
            lengths=tuple(planned_lengths(self.workload)),
            num_requests=self.workload.num_requests,
            times=self.times,
            quality=self.quality,
            precisions=self.precisions,
            budget=budget,
            theta=theta,
            max_tensor_parallel=max(stage.tensor_parallel for stage in self.plan.stages),
        )


def survey(plan: Plan, options: RunOptions, more: ReplanOptions, longest: int) -> Ground:
    """Reads and checks all that new plans need. `longest`: tokens of the longest request."""
    from llmpq.precision import PRECISIONS, STANDARD

    inputs = read_inputs(_arguments(options, more), plan)
    _check_cluster(plan, inputs, more.cluster)
    quality = inputs.quality
    if more.sensitivity is None:  # then the weights are rounded as they were
        quality = replace(quality, quantizer=_whole_paths(plan, options).quantizer)
    times = {device.type: _times(inputs, device.type) for device in inputs.cluster.devices()}
    wanted = {*STANDARD, *plan.precisions} & set(quality.omega)
    timed = {name for one in times.values() for name in one.precisions}
    return Ground(
        plan=plan.model_copy(update={"cluster": inputs.cluster}),
        quality=quality,
        times=times,
        precisions=tuple(name for name in PRECISIONS if name in wanted & timed),
        workload=with_longest(plan.workload, longest),
        max_loss_percent=more.max_quality_loss,
    )


def _arguments(options: RunOptions, more: ReplanOptions) -> Arguments:
    """As `llmpq-plan` would be called, its defaults included."""
    from llmpq.cli.plan import main

    files = {"cluster": more.cluster, "profiles": more.profiles, "sensitivity": more.sensitivity}
    words = [f"--{name}={path}" for name, path in files.items() if path is not None]
    params = main.make_context("llmpq-plan", [*words, f"--output={plan_path(options, 1)}"]).params
    return Arguments(**{name: params[name] for name in Arguments.__dataclass_fields__})


def plan_path(options: RunOptions, number: int) -> Path:
    """Where the new plan after so many losses is written."""
    return options.output.with_name(f"{options.output.name}.replan-{number}.json")


def _check_cluster(plan: Plan, inputs: "Inputs", path: Path | None) -> None:
    """The plan's stages must lie on the cluster that is said to be there."""
    if path is not None:
        validate(plan.model_dump() | {"cluster": inputs.cluster.model_dump()}, Plan, path)


def _whole_paths(plan: Plan, options: RunOptions) -> Plan:
    """The plan with the path of its moments as seen from anywhere."""
    moments = options.moments or plan.quantizer.moments
    if moments is None:
        return plan
    found = (options.plan.parent / moments).resolve() if options.moments is None else moments
    quantizer = plan.quantizer.model_copy(update={"moments": str(Path(found).resolve())})
    return plan.model_copy(update={"quantizer": quantizer})


def _times(inputs: "Inputs", name: str) -> "LayerTimes":
    """The best that are there; of a rehearsed device without a profile, the spec sheet's.

    A CPU takes memory for it all the same.
    """
    from llmpq.costs.latency import device_times, machine_of
    from llmpq.devices import device_library

    cluster = inputs.cluster
    try:
        return device_times(cluster, name, inputs.spec, inputs.profiles)
    except UserError:
        if name not in device_library():
            raise
        real = cluster.model_copy(update={"rehearse": {}})
        times = device_times(real, name, inputs.spec, inputs.profiles)
        return replace(times, machine=machine_of(cluster, name))


def with_longest(workload: Workload, longest: int) -> Workload:
    """The workload, with a request of `longest` tokens more where it has none as long.

    The longest output stays, as prompts that ask for no number of new tokens get that many.
    """
    lengths = planned_lengths(workload)
    new = max(new for _, new in lengths)
    if longest <= max(map(sum, lengths)):
        return workload
    prompts, outputs = zip(*lengths, (longest - new, new), strict=True)
    count = max(workload.num_requests, len(prompts))
    more = {"prompt_tokens": prompts, "new_tokens": outputs, "num_requests": count}
    return workload.model_copy(update=more)


def places(plan: Plan) -> list[tuple[str, str]]:
    """Node and device type of every worker, by rank."""
    return [(stage.node, device) for stage in plan.stages for device in stage.devices]


def worker_names(plan: Plan) -> list[str]:
    """For people, by rank."""
    return [f"{device} on {node}" for node, device in places(plan)]


def without(cluster: Cluster, lost: Sequence[tuple[str, str]]) -> Cluster | None:
    """The cluster less devices, each a node and a type; None where nothing is left."""
    missing = Counter(lost)
    nodes = []
    for node in cluster.nodes:
        groups = []
        for group in node.devices:
            gone = min(group.count, missing[node.name, group.type])
            missing[node.name, group.type] -= gone
            if gone < group.count:
                groups.append(group.model_copy(update={"count": group.count - gone}))
        if groups:
            nodes.append(node.model_copy(update={"devices": groups}))
    return cluster.model_copy(update={"nodes": nodes}) if nodes else None


def plan_without(ground: Ground, plan: Plan, ranks: Sequence[int]) -> tuple[Plan, list[str]]:
    """A plan for the cluster of `plan` less the devices of these ranks, and notes.

    Raises `InfeasibleError` where no plan fits.
    """
    from llmpq.planner.planning import Options, replan

    cluster = without(plan.cluster, [places(plan)[rank] for rank in ranks])
    if cluster is None:
        raise InfeasibleError("no device is left")
    options = Options(gap=GAP, time_limit_s=PLANNING_S, compare=False)
    notes = [
        f"times of {name}: {ground.times[name].provenance}"
        for name in dict.fromkeys(device.type for device in cluster.devices())
    ]
    budget, limit = _budget(ground)
    try:
        return replan(ground.problem(cluster, budget), options), notes
    except InfeasibleError:
        if ground.max_loss_percent is not None:
            raise _why(ground.problem(cluster, budget)) from None
    found = _best_quality(ground, cluster, options)
    assert found.predicted is not None
    loss = found.predicted.quality_loss_percent
    return found, [*notes, f"nothing that is left keeps {limit}: this plan loses {loss:.3g} %"]


def _budget(ground: Ground) -> tuple[float, str]:
    """Largest summed sensitivity, and in words."""
    quality, asked, omega = ground.quality, ground.max_loss_percent, ground.quality.omega
    if asked is not None:
        return quality.budget(asked), f"the quality loss of {asked:g} %"
    if not set(ground.plan.precisions) <= set(omega):
        return quality.budget(0.0), "the quality of 16 bits"
    used = quality.sum_omega(ground.plan.precisions)
    return used, f"the quality loss of {quality.expected_percent(used):.3g} %"


def _best_quality(ground: Ground, cluster: Cluster, options: Any) -> Plan:
    """The fastest plan of those that lose least."""
    from llmpq.planner.planning import replan

    worst = max(map(sum, ground.quality.omega.values())) or 1.0
    known = ground.plan.predicted
    theta = FAR_ABOVE * max(1.0, known.total_s if known else 1e4) / worst
    try:
        best = replan(ground.problem(cluster, float("inf"), theta), options)
    except InfeasibleError:
        raise _why(ground.problem(cluster, float("inf"))) from None
    least = ground.quality.sum_omega(best.precisions)
    return replan(ground.problem(cluster, least), options, like=best)


def _why(problem: "Problem") -> InfeasibleError:
    """What is short."""
    from llmpq.planner.explain import why

    return InfeasibleError(why(problem))


def run_and_replan(plan: Plan, options: RunOptions, ground: Ground, words: Sequence[str]) -> None:
    """Runs a plan with workers of this process's own; plans and starts again after each loss."""
    from llmpq.reliability.ending import RESUME
    from llmpq.runtime.process import LostWorkers, start_workers

    before, number = _state(options.output), 0
    plan, cards, more = ground.plan, _cards(plan, options), list(words)
    while True:
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(cards)} if cards and number else {}
        try:
            start_workers(more, worker_names(plan), "llmpq.run", RESUME, visible)
            return
        except LostWorkers as loss:
            number += 1
            new = _after(loss, ground, plan, options, number)
            cards, plan = cards_left(cards, plan, loss.ranks, new), new
        begun = options.resume or _state(options.output) != before
        more = [*words, f"--plan={plan_path(options, number)}", *(["--resume"] if begun else [])]


def _after(loss: Any, ground: Ground, plan: Plan, options: RunOptions, number: int) -> Plan:
    """The next plan: made, written and told."""
    from llmpq.reliability.ending import RESUME

    out = console(options.quiet)
    out.print(f"{loss.what}; planning for those that are left", soft_wrap=True)
    try:
        new, notes = plan_without(ground, plan, loss.ranks)
    except InfeasibleError as error:
        raise InfeasibleError(
            f"{loss.what}; no plan fits what is left\n{error}\n{RESUME}"
        ) from None
    write_json(plan_path(options, number), new)
    for line in [*str(diff(plan, new)).splitlines(), *notes]:
        out.print(f"  {line}", soft_wrap=True)
    out.print(f"going on with {plan_path(options, number)}", soft_wrap=True)
    return new


def _state(output: Path) -> tuple[int, int, int] | None:
    """Changes once a run has begun to write: what was there before is no result of this run."""
    try:
        found = output.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _cards(plan: Plan, options: RunOptions) -> list[str]:
    """The CUDA cards here, the workers' own first; empty where workers have none of their own."""
    if options.device == "cpu" or (plan.cluster.rehearse and options.device == "auto"):
        return []
    from llmpq.runtime.cards import visible_cards

    visible = visible_cards()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(card.index) for card in visible]
    on_cpus = any(plan.cluster.kind_of(name) == "cpu" for _, name in places(plan))
    if on_cpus or len(names) < max(len(visible), len(places(plan))):
        return []
    return in_workers_order(names, plan, visible)


def in_workers_order(names: Sequence[str], plan: Plan, visible: "Sequence[FoundCard]") -> list[str]:
    """The names of the visible cards: first those that the workers take, by rank.

    As they are where the run will be refused or the cards are shared.
    """
    from llmpq.placement import Refusal, match_cards
    from llmpq.seats import planned_devices

    found = (
        Refusal("shared") if plan.cluster.rehearse else match_cards(visible, planned_devices(plan))
    )
    if isinstance(found, Refusal):
        return list(names)
    taken = [card.index for card in found if card is not None]
    return [names[i] for i in [*taken, *(i for i in range(len(names)) if i not in taken)]]


def cards_left(cards: Sequence[str], old: Plan, lost: Sequence[int], new: Plan) -> list[str]:
    """Cards in the order of the new plan's workers, without those of the lost ranks."""
    left: dict[tuple[str, str], deque[str]] = {}
    for rank, (place, card) in enumerate(zip(places(old), cards, strict=False)):
        if rank not in lost:
            left.setdefault(place, deque()).append(card)
    spare = deque(cards[len(places(old)) :])
    chosen = []
    for place in places(new):
        free = left.get(place) or spare  # what the old plan left out runs where nothing ran
        if free:
            chosen.append(free.popleft())
    rest = [card for kept in left.values() for card in kept]
    return [*chosen, *rest, *spare]
