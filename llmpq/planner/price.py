"""The price of a plan that is there already, for a problem that may not be the one it was made for.

Not covered: whether it fits the devices' memory (`evaluate.shortages`).
"""

from dataclasses import replace

from llmpq.plan_data import Plan, lanes_of, reserve_of
from llmpq.planner.accuracy import with_accuracy
from llmpq.planner.evaluate import evaluate, shortages, to_assignment
from llmpq.planner.layer_options import lacking, option_of, options_of
from llmpq.planner.problem import OVER, Assignment, Problem
from llmpq.planner.simulated import with_run


def price(problem: Problem, plan: Plan) -> Plan:
    """The plan with the problem's cluster and workload, and what its simulated run is like.

    Its other predictions, baselines included, are gone. There must be no `misfits`.
    """
    plan = _in_flight(plan, problem.workload.num_requests)
    assignment = to_assignment(plan, problem.cluster)
    predicted = with_run(problem, assignment, evaluate(problem, assignment))
    return plan.model_copy(
        update={
            "predicted": with_accuracy(problem, assignment, predicted),
            "baselines": [],
            "cluster": problem.cluster,
            "workload": problem.workload,
        }
    )


def with_planning_s(plan: Plan, seconds: float) -> Plan:
    """The plan, and how long it took to price it."""
    assert plan.predicted is not None
    predicted = plan.predicted.model_copy(update={"planning_s": seconds})
    return plan.model_copy(update={"predicted": predicted})


def misfits(problem: Problem, plan: Plan) -> list[str]:
    """Why a plan cannot be priced in a problem: other layers, devices or precisions."""
    faults = []
    if problem.spec.num_layers != plan.model.num_layers:
        layers = f"{plan.model.num_layers} layers, {problem.spec.name} {problem.spec.num_layers}"
        faults.append(f"the plan has {layers}")
    free = [(device.node, device.type) for device in problem.cluster.devices()]
    for stage in plan.stages:
        device, taken = stage.devices[0], [(stage.node, name) for name in stage.devices]
        if any(free.count(devices) < taken.count(devices) for devices in taken):
            there = ", ".join(dict.fromkeys(node for node, _ in free)) or "none left"
            faults.append(
                f"stage {stage.rank} needs {len(taken)} {device} on node '{stage.node}', "
                f"which the cluster does not have (any more); nodes with free devices: {there}"
            )
            continue
        for devices in taken:
            free.remove(devices)
        own = problem.times[device], problem.spec, stage.first_layer, stage.precisions
        if problem.spec.num_layers == plan.model.num_layers and (missing := lacking(*own)):
            faults.append(f"no times of {device} at {', '.join(missing)} bits")
    return faults


def still_fits(problem: Problem, plan: Plan) -> Assignment | None:
    """A plan's assignment in a changed problem."""
    try:
        assignment = to_assignment(plan, problem.cluster)
    except ValueError:  # its devices are gone
        return None
    assignment = replace(
        assignment, configuration=assignment.configuration.resized()
    )  # for these lengths
    omega = problem.quality.sum_omega(assignment.precisions)
    own = {option_of(problem.spec, i, name) for i, name in enumerate(assignment.precisions)}
    offered = own <= set(options_of(problem))
    fits = offered and omega <= problem.budget * OVER and not shortages(problem, assignment)
    return assignment if fits else None


def _in_flight(plan: Plan, num_requests: int) -> Plan:
    """No more requests are in flight than there are; chunk and lanes are those of a run.

    They are written out, as the plan may go on with another workload than that which says them.
    """
    names = ("batch", "prefill_micro_batch", "decode_micro_batch")
    sizes = {name: min(getattr(plan, name), num_requests) for name in names}
    kept = plan.lanes if sizes["batch"] == plan.batch else None
    fewer = plan.model_copy(update={**sizes, "lanes": kept})
    reserve = reserve_of(fewer)
    decided = {"chunk_tokens": reserve.chunk_tokens, "lanes": kept or lanes_of(reserve.lanes)}
    return fewer.model_copy(update=decided)
