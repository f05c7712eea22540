"""What an export to another engine wrote: export.json beside its checkpoint, and `--json`."""

from typing import Literal

from llmpq.artifact import SCHEMA_VERSION, Provenance, Strict


class Exported(Strict):
    """What was exported; export.json and --json. `precisions`: of each layer's linears by name.

    `planned_layer_bytes` is what the plan counts for the layers' weights at these precisions.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["export"] = "export"
    engine: Literal["vllm"] = "vllm"
    model: str
    precisions: list[dict[str, str]]
    checkpoint_bytes: int
    layer_bytes: int
    planned_layer_bytes: int
    num_shards: int
    notes: list[str]
    next_steps: list[str]
    provenance: Provenance
