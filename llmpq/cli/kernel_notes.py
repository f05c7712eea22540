"""What `llmpq-run` says of kernels: which serve a precision, and where a plan counts on others.

A plan is made for devices as its cluster file has them; a run knows what is really installed.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmpq.cli.common import console
from llmpq.plan_data import Plan
from llmpq.precision import PRECISIONS
from llmpq.serving import Service, serving

if TYPE_CHECKING:
    from llmpq.machine import Machine


COUNTED = "; the plan counts on "


def served(plan: Plan, rank: int, machine: "Machine") -> dict[str, Service]:
    """The kernels of a stage on a machine, by precision."""
    stage = plan.stages[rank]
    linears = plan.model.shard(stage.tensor_parallel).linears
    return serving(machine, stage.precisions, [(op.out_features, op.in_features) for op in linears])


def kernel_lines(plan: Plan, rank: int, machine: "Machine") -> Iterator[str]:
    """A line a precision: its kernels, why no better ones serve it, and what was counted on."""
    stage = plan.stages[rank]
    planned = plan.predicted.stages[rank].kernels if plan.predicted else {}
    for precision, service in served(plan, rank, machine).items():
        expected = tuple(planned.get(precision, service.kernels))
        counted = f"{COUNTED}{', then '.join(expected)}" if expected != service.kernels else ""
        yield f"kernels of {stage.devices[0]} at {precision}: {service.text}{counted}"


def say_kernels(plan: Plan, stage: int, device: Any, dtype: Any, leads: bool, quiet: bool) -> None:
    """Once, when a stage is loaded: all lines where this worker leads, else those that differ."""
    from llmpq.quant import machine_here

    optional = any(PRECISIONS[p].library is not None for p in plan.stages[stage].precisions)
    for line in kernel_lines(plan, stage, machine_here(device, dtype, optional)):
        if leads or COUNTED in line:
            console(quiet).print(line, soft_wrap=True)


def say_engine(engine: Any, quiet: bool, before: str | None = None) -> str | None:
    """How a loaded stage computes, where that is worth a word; returns what was said of graphs.

    After a run, with what was said `before`: only what has changed, as capturing may fail late.
    """
    if not engine.worker.stage.shard.leads:
        return None
    note: str | None = engine.graphs_note()
    notes = engine.kernel_notes if before is None else []
    for line in [*notes, *([note] if note is not None and note != before else [])]:
        console(quiet).print(f"stage {engine.transport.rank}: {line}", soft_wrap=True)
    return note
