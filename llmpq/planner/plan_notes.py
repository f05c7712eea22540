"""What a reader should know of a plan beside its figures: what it leaves out, and what is open.

Not covered: where times come from (`accuracy`).
"""

from collections import Counter

from llmpq.plan_data import Plan
from llmpq.planner.search import Search

TIMED_OUT = (
    "the search ended at its time limit, a tenth of --time-limit but {least:g} s at least; a "
    "--time-limit of {more:.0f} may find a better plan"
)
LOOSE = (
    "the gap is above the one asked for, because the bound is that of the closed form and the time "
    "that of the simulated run; another plan may be better by up to the gap"
)


def idle(plan: Plan) -> list[str]:
    """What the plan leaves out."""
    idle = Counter((device.type, device.node) for device in plan.cluster.devices())
    idle.subtract((name, stage.node) for stage in plan.stages for name in stage.devices)
    names = [f"{f'{n} x ' if n > 1 else ''}{d} on {node}" for (d, node), n in idle.items() if n > 0]
    why = "would slow down the rest, or does not fit"
    return [f"left out: {', '.join(names)} ({why})"] if names else []


def doubts(found: Search, plan: Plan, gap: float, time_limit_s: float, least_s: float) -> list[str]:
    """What keeps the gap from being the one asked for; a search has `least_s` in any case."""
    if found.timed_out:
        more = 4 * max(time_limit_s, 10 * least_s)
        return [TIMED_OUT.format(least=least_s, more=more)]
    reached = plan.predicted.gap if plan.predicted else 0.0
    return [LOOSE] if reached > gap + 1e-6 else []
