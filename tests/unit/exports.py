"""Plans made by hand, for tests of exports to vLLM."""

from collections.abc import Sequence
from pathlib import Path

from llmpq.model_lookup import load_model_spec
from llmpq.model_spec import ModelSpec
from llmpq.plan_data import Plan

A100, T4, V100, EPYC = "a100-80g", "t4-16g", "v100-32g", "epyc-9654-768g"


def plan_of(
    *stages: Sequence[str],
    model: str | Path | ModelSpec = "tiny-tales",
    device: str = A100,
    nodes: Sequence[str] = (),
    sharing: int = 1,
    memory_gib: float = 8.0,
    **more: object,
) -> Plan:
    """A plan with these precisions of each stage's layers; `nodes`: one a stage, default one."""
    spec = model if isinstance(model, ModelSpec) else load_model_spec(str(model))
    places = list(nodes) or ["node0"] * len(stages)
    ends = [sum(map(len, stages[: rank + 1])) for rank in range(len(stages))]
    group = {"type": device, "memory_gib": memory_gib}
    data = {
        "model": spec.model_dump(),
        "workload": {"prompt_tokens": 48, "new_tokens": 16, "num_requests": 8},
        "cluster": {
            "nodes": [
                {"name": node, "devices": [group | {"count": sharing * places.count(node)}]}
                for node in dict.fromkeys(places)
            ]
        },
        "method": "hand",
        "batch": 4,
        "prefill_micro_batch": 2,
        "decode_micro_batch": 4,
        "stages": [
            {
                "rank": rank,
                "node": places[rank],
                "devices": [device] * sharing,
                "tensor_parallel": sharing,
                "first_layer": ends[rank] - len(precisions),
                "end_layer": ends[rank],
                "precisions": list(precisions),
            }
            for rank, precisions in enumerate(stages)
        ],
    }
    return Plan.model_validate(data | more)
