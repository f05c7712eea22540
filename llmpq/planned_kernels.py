"""Which kernels serve a stage of a plan on a machine, beside those that the plan counts on.

A plan is made for devices as its cluster file has them; a run knows what is really installed.
"""

from collections.abc import Iterator

from llmpq.machine import Machine
from llmpq.plan_data import Plan
from llmpq.serving import in_words, matrices_of, serving

COUNTED = "; the plan counts on "


def kernel_lines(plan: Plan, rank: int, machine: Machine) -> Iterator[str]:
    """A line per precision of a stage's matrices: their kernels, and why no better ones serve them.

    What was planned (`COUNTED`) is told where it differs.
    """
    stage = plan.stages[rank]
    planned = plan.predicted.stages[rank].kernels if plan.predicted else {}
    matrices = matrices_of(plan.model.shard(stage.tensor_parallel), stage.precisions)
    for precision, service in serving(machine, matrices).items():
        expected = tuple(planned.get(precision, service.kernels))
        counted = f"{COUNTED}{in_words(expected)}" if expected != service.kernels else ""
        yield f"kernels of {stage.devices[0]} at {precision}: {service.text}{counted}"
