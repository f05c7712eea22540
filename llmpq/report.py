"""report.json: what a run measured, beside what its plan predicted."""

from typing import Literal

from llmpq.artifact import SCHEMA_VERSION, Provenance, Strict
from llmpq.plan import Predicted


class StageReport(Strict):
    """One stage: seconds computing in each phase, waiting and handing over."""

    rank: int
    busy_prefill_s: float
    busy_decode_s: float
    idle_s: float
    comm_s: float
    peak_memory_bytes: int
    load_s: float


class Report(Strict):
    """report.json. `error_percent`: predicted total time against measured, positive if too long.

    `prefill_s` is the time until the first stage has all first tokens, summed over batches.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["report"] = "report"
    tokens_per_s: float
    prefill_s: float
    decode_s: float
    total_s: float
    load_s: float
    num_requests: int
    num_new_tokens: int
    stages: list[StageReport]
    predicted: Predicted | None = None
    error_percent: float | None = None
    provenance: Provenance = Provenance()
