"""Where a model's activations are known to overflow in float16.

A pipeline computes in one dtype: bfloat16 if every card has it, else float16 (`--dtype auto` of
`llmpq-run`). Activations of some families exceed float16's 65,504: such requests fail, each with a
reason. Not covered: models of other families whose weights happen to overflow; a run reports those.
"""

from llmpq.costs.latency import machine_of
from llmpq.families import family_for
from llmpq.machine import BFLOAT16_CAPABILITY
from llmpq.plan_data import Plan

INSTEAD = "--dtype bfloat16 (slow there) or float32 (twice the memory) of llmpq-run has more room"


def planned_overflow(plan: Plan) -> str | None:
    """What to know of a plan whose cards make this model compute in float16; None: nothing."""
    types = dict.fromkeys(device for stage in plan.stages for device in stage.devices)
    old = [name for name in types if _lacks_bfloat16(plan, name)]
    if not old or not family_for(plan.model.model_type).overflows_float16:
        return None
    return (
        f"{', '.join(old)} lack{'s' if len(old) == 1 else ''} bfloat16, so all stages compute in "
        f"float16, in which activations of {plan.model.model_type} are known to overflow and "
        f"requests may fail; {INSTEAD}, or plan without {'it' if len(old) == 1 else 'them'}"
    )


def run_overflow(model_type: str, dtype: str) -> str | None:
    """What to know of a run that computes in `dtype`; None: nothing."""
    if dtype != "float16" or not family_for(model_type).overflows_float16:
        return None
    return (
        f"warning: activations of {model_type} are known to overflow in float16, in which this run "
        "computes; requests that fail say so in their lines. --dtype bfloat16 or float32 has more "
        "room"
    )


def _lacks_bfloat16(plan: Plan, device_type: str) -> bool:
    """False for rehearsed types, and for cards that are not NVIDIA's: torch has it there."""
    machine = machine_of(plan.cluster, device_type)
    return machine.is_card and (0, 0) < machine.capability < BFLOAT16_CAPABILITY
