"""The one price of a plan: every method's plans, and hand-written ones, are compared by it.

In closed form (see `costs.timeline`), from the jobs of a run (`costs.job_counts`). What is
predicted of a plan that was found is simulated (`simulated.with_run`). Also turns assignments into
plans and plans into assignments.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from llmpq.artifact import Provenance
from llmpq.cluster import Cluster, Device
from llmpq.costs.latency import LayerTimes
from llmpq.costs.memory import StageMemory, stage_memory
from llmpq.costs.timeline import Costs, combined, run_s
from llmpq.plan_data import Plan, Predicted, PredictedStage, Stage, lanes_of, reserve_of
from llmpq.planner.accuracy import with_accuracy
from llmpq.planner.instance import (
    fixed_costs,
    layer_costs,
    link_costs,
    of_only_pair,
    stack,
)
from llmpq.planner.layer_options import LayerOption, options_held, options_of
from llmpq.planner.problem import Assignment, Configuration, Problem, StageDevices
from llmpq.planner.works import Work, hop_works, layer_work, remembered, stage_work
from llmpq.serving import matrices_of, serving


def evaluate(problem: Problem, assignment: Assignment) -> Predicted:
    """Times, memory and quality of an assignment; no lower bound is known here."""
    configuration = assignment.configuration
    stage, link = stage_costs(problem, assignment), hop_costs(problem, configuration)
    scale = problem.scale_of(configuration)
    total = float(run_s(stage, link)) * scale
    counts = problem.job_counts(configuration.sizes)
    loop = float((stage.step + link.step).sum())
    pace = float((stage.busy - stage.prefill).max()) / max(counts.num_rounds, 1.0)
    decode = min(counts.rounds_after * max(loop, pace), total)
    busiest = int(stage.busy.argmax())
    omega = problem.quality.sum_omega(assignment.precisions)
    num_prefills = counts.num_first + counts.num_refills
    return Predicted(
        total_s=total,
        prefill_s=total - decode,
        decode_s=decode,
        prefill_share=float(stage.prefill[busiest] / stage.busy[busiest]),
        **speeds(problem, total),
        quality_loss_percent=problem.quality.expected_percent(omega),
        sum_sensitivity=omega,
        objective=total + problem.theta * omega,
        lower_bound=0.0,
        gap=1.0,
        planning_s=0.0,
        closed_form_scale=None if scale == 1 else scale,
        stages=[
            PredictedStage(
                prefill_s=float(stage.prefill[rank]) / num_prefills,
                decode_step_s=float(stage.step[rank]),
                peak_memory_bytes=memory_of(problem, assignment, rank).total,
                memory_capacity_bytes=devices.memory_bytes,
                provenance=problem.times_at(devices).provenance,
            )
            for rank, devices in enumerate(configuration.stage_devices)
        ],
    )


def speeds(problem: Problem, total_s: float) -> dict[str, float]:
    """What the workload's tokens and requests are a second."""
    return {
        "tokens_per_s": problem.num_new_tokens / total_s,
        "requests_per_s": problem.repeats * len(problem.lengths) / total_s,
    }


def bounded(predicted: Predicted, lower_bound: float, planning_s: float) -> Predicted:
    """The same prediction with a lower bound of its objective, from one of the closed form.

    Where the closed form is above the simulated time, its bound is taken in proportion: else it
    would say of a plan that runs faster than priced that no other one can be better.
    """
    priced = predicted.objective + predicted.priced_s - predicted.total_s
    share = max(lower_bound, 0.0) / max(priced, predicted.objective)
    bound = min(share, 1.0) * predicted.objective
    gap = (predicted.objective - bound) / predicted.objective
    return predicted.model_copy(update={"lower_bound": bound, "gap": gap, "planning_s": planning_s})


def memory_of(problem: Problem, assignment: Assignment, rank: int) -> StageMemory:
    """Memory of one stage, on each of its devices."""
    configuration, own = assignment.configuration, assignment.stages[rank]
    first = sum(map(len, assignment.stages[:rank]))
    return stage_memory(
        problem.shard(configuration.stage_devices[rank]),
        own,
        kinds=problem.spec.kind_of_layers[first : first + len(own)],
        first=rank == 0,
        last=rank == len(assignment.stages) - 1,
        sizes=problem.run_sizes(configuration),
        machine=problem.times[configuration.stage_devices[rank].type].machine,
    )


def shortages(problem: Problem, assignment: Assignment) -> dict[int, int]:
    """Bytes that are short, by rank, where a stage does not fit."""
    short = {
        rank: memory_of(problem, assignment, rank).total - devices.memory_bytes
        for rank, devices in enumerate(assignment.configuration.stage_devices)
    }
    return {rank: num_bytes for rank, num_bytes in short.items() if num_bytes > 0}


def to_plan(problem: Problem, assignment: Assignment, method: str, predicted: Predicted) -> Plan:
    """The plan file's value."""
    configuration = assignment.configuration
    shapes = problem.lanes(configuration.sizes, configuration.decode_micro_batch)
    return Plan(
        model=problem.model or problem.spec,
        workload=problem.workload,
        cluster=problem.cluster,
        method=method,
        batch=configuration.batch,
        prefill_micro_batch=configuration.prefill_micro_batch,
        decode_micro_batch=configuration.decode_micro_batch,
        chunk_tokens=problem.chunk_tokens(configuration),
        lanes=lanes_of(shapes),
        quantizer=problem.quality.quantizer,
        stages=_stages(assignment),
        predicted=_with_kernels(problem, assignment, with_accuracy(problem, assignment, predicted)),
        provenance=Provenance.here(),
    )


def _with_kernels(problem: Problem, assignment: Assignment, predicted: Predicted) -> Predicted:
    """The same prediction with the kernels that every stage counts on."""
    stages = []
    for devices, precisions, stage in zip(
        assignment.configuration.stage_devices, assignment.stages, predicted.stages, strict=True
    ):
        matrices = matrices_of(problem.shard(devices), precisions)
        found = serving(problem.times[devices.type].machine, matrices)
        kernels = {precision: list(service.kernels) for precision, service in found.items()}
        stages.append(stage.model_copy(update={"kernels": kernels}))
    return predicted.model_copy(update={"stages": stages})


def to_assignment(plan: Plan, cluster: Cluster) -> Assignment:
    """A plan's assignment on a cluster that has its devices, with the plan's chunk and lanes."""
    free = cluster.devices()
    known = plan.predicted.stages if plan.predicted else []
    memory = [stage.memory_capacity_bytes for stage in known] or [-1] * len(plan.stages)
    stage_devices = [
        _take(free, stage, own) for stage, own in zip(plan.stages, memory, strict=True)
    ]
    sizes, reserve = (plan.prefill_micro_batch, plan.decode_micro_batch), reserve_of(plan)
    room = reserve.chunk_tokens, reserve.lanes
    configuration = Configuration(tuple(stage_devices), plan.batch, *sizes, *room)
    return Assignment(configuration, tuple(tuple(stage.precisions) for stage in plan.stages))


def _take(free: list[Device], stage: Stage, memory_bytes: int) -> StageDevices:
    """A stage's devices, which are taken out of `free`; those of `memory_bytes` first.

    Then those of the least memory above that. The least memory of all that are taken counts.
    Raises `ValueError` where there is none (left).
    """

    def distance(device: Device) -> tuple[bool, int]:
        more = device.memory_bytes - memory_bytes
        return more < 0, more if memory_bytes >= 0 else 0

    taken = []
    for name in stage.devices:
        there = [d for d in free if (d.node, d.type) == (stage.node, name)]
        if not there:
            raise ValueError(f"stage {stage.rank}: the cluster has no (more) {name}")
        found = min(there, key=distance)
        free.remove(found)
        taken.append(found)
    least = min(device.memory_bytes for device in taken)
    return StageDevices(stage.node, stage.devices[0], least, len(taken))


def _stages(assignment: Assignment) -> list[Stage]:
    stages, start = [], 0
    for rank, precisions in enumerate(assignment.stages):
        devices = assignment.configuration.stage_devices[rank]
        end = start + len(precisions)
        stages.append(
            Stage(
                rank=rank,
                node=devices.node,
                devices=[devices.type] * devices.tensor_parallel,
                tensor_parallel=devices.tensor_parallel,
                first_layer=start,
                end_layer=end,
                precisions=list(precisions),
            )
        )
        start = end
    return stages


def closed_form_s(problem: Problem, assignment: Assignment) -> float:
    """Seconds of the whole run in closed form, to the scale of simulated runs where it is known."""
    stage, link = stage_costs(problem, assignment), hop_costs(problem, assignment.configuration)
    return float(run_s(stage, link)) * problem.scale_of(assignment.configuration)


def stage_costs(problem: Problem, assignment: Assignment) -> Costs:
    """[N]: what the run takes each stage."""
    configuration, last = assignment.configuration, len(assignment.stages) - 1
    place = {option: b for b, option in enumerate(options_of(problem))}
    each = []
    for rank, devices in enumerate(configuration.stage_devices):
        fixed = fixed_costs(problem, configuration.sizes, devices, rank == 0, rank == last)
        layer = layer_costs(problem, configuration.sizes, devices)
        layers = [
            layer.map(partial(_layers_at, place[option], number))
            for option, number in options_held(problem, assignment, rank).items()
        ]
        each.append(combined([fixed, *layers], np.sum).map(of_only_pair))
    return stack(each)


def _layers_at(option: int, number: int, layer: np.ndarray) -> np.ndarray:
    """So many layers at an option, of arrays whose last axis are the options."""
    return np.asarray(number * layer[..., option])


def hop_costs(problem: Problem, configuration: Configuration) -> Costs:
    """[N]: and the link after each stage; the last is the tokens' return."""
    hops = link_costs(
        problem, configuration.sizes, [devices.node for devices in configuration.stage_devices]
    )
    return stack([hop.map(of_only_pair) for hop in hops])


def resource_works(problem: Problem, assignment: Assignment) -> list[Work]:
    """In the pipeline's order: stage, link, ..., stage, token return."""
    stage_devices = assignment.configuration.stage_devices
    known: dict[tuple[int, LayerOption], Work] = {}

    def layer_of(times: LayerTimes, option: LayerOption) -> Work:
        return known.setdefault((id(times), option), remembered(layer_work(times, option)))

    ranks = range(len(stage_devices))
    stages = [stage_work_at(problem, assignment, rank, layer_of) for rank in ranks]
    hops = hop_works(problem, [devices.node for devices in stage_devices])
    return [work for pair in zip(stages, hops, strict=True) for work in pair]


def stage_work_at(
    problem: Problem,
    assignment: Assignment,
    rank: int,
    layer_of: Callable[[LayerTimes, LayerOption], Work] = layer_work,
) -> Work:
    """All that one stage does with a micro-batch."""
    times = problem.times_at(assignment.configuration.stage_devices[rank])
    last = rank == len(assignment.stages) - 1
    return stage_work(times, rank == 0, last, options_held(problem, assignment, rank), layer_of)
