"""The limits of requests, from the model and from the cache that a plan reserves."""

from typing import Any

from llmpq.models.rope import switches_at
from llmpq.plan_data import Plan, reserve_of
from llmpq.prompts.prompt_rules import Limits, TooLong
from llmpq.workload import planned_lengths


def limits_of(plan: Plan, config: Any, too_long: TooLong = "fail") -> Limits:
    """The limits of a run. `config`: transformers' configuration of the model."""
    return Limits(
        new_tokens=max(new for _, new in planned_lengths(plan.workload)),
        max_positions=plan.model.max_positions,
        vocab_size=plan.model.vocab_size,
        cache_tokens=reserve_of(plan).tokens,
        too_long=too_long,
        switches_at=switches_at(config),
    )
