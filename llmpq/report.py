"""report.json: what a run measured, beside what its plan predicted.

Besides sums, each stage tells how long its calls took, by phase, micro-batch and length, and the
report holds the plan that ran: what is needed to correct the times that plans are made with.
Reports of earlier versions have neither, and can still be read.
"""

from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt

from llmpq.artifact import SCHEMA_VERSION, Provenance, Strict
from llmpq.plan import Plan, Predicted

SECONDS_PER_HOUR = 3600


def duration(seconds: float) -> str:
    """ "24.62 s"; from an hour on also the hours, as "5400.00 s (1.50 hours)"."""
    hours = f" ({seconds / SECONDS_PER_HOUR:.2f} hours)" if seconds >= SECONDS_PER_HOUR else ""
    return f"{seconds:.2f} s{hours}"


class MeasuredTime(Strict):
    """Calls of one stage that are alike: everything it computes for one micro-batch.

    `micro_batch`: requests. `tokens`: the padded prompt length, in decode the tokens in the cache,
    as the mean over the calls. Seconds are those of the device that the stage stands for, so a
    rehearsal's slowdown is in them; embedding and head are, on the stages that hold them.
    """

    phase: Literal["prefill", "decode"]
    micro_batch: PositiveInt
    tokens: NonNegativeFloat
    count: PositiveInt
    total_s: NonNegativeFloat
    median_s: NonNegativeFloat


class StageReport(Strict):
    """One stage: seconds computing in each phase, waiting and handing over."""

    rank: int
    busy_prefill_s: float
    busy_decode_s: float
    idle_s: float
    comm_s: float
    peak_memory_bytes: int
    load_s: float
    measured: list[MeasuredTime] = []
    weights_bytes: int | None = None  # parts of the account
    cache_bytes: int | None = None
    activation_bytes: int | None = None
    buffer_bytes: int | None = None
    busy_share: float | None = None  # of the run's time, computing
    most_prefill_rows: int | None = None  # at once, since memory ran out; None: it never did
    most_decode_rows: int | None = None
    num_graphs: int | None = None  # CUDA graphs that decode steps were captured in
    graph_bytes: int | None = None  # that these keep
    weights_sha256: str | None = None  # of what was served; `llmpq-eval --json` says the same


class Quality(Strict):
    """What the served weights did to a text, in windows of `window` tokens, of which `num_tokens`
    were predicted; `baseline_perplexity` is the 16-bit model's on the same windows, the percent
    are rises of the perplexity over it.
    """

    text: str
    window: PositiveInt
    num_tokens: PositiveInt
    perplexity: float
    baseline_perplexity: float
    measured_percent: float
    predicted_percent: float | None = None


class Report(Strict):
    """report.json. `error_percent`: predicted total time against measured, positive if too long.

    `prefill_s`: until the first token of every request was back, `decode_s`: from then on; before,
    both phases overlap. `prefill_share`: what prefills were of the busiest stage's computing.
    `num_failed`: requests that failed alone; `requests_per_s` leaves them out.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["report"] = "report"
    tokens_per_s: float
    requests_per_s: float | None = None
    prefill_share: float | None = None
    prefill_s: float
    decode_s: float
    total_s: float
    load_s: float
    num_requests: int
    num_new_tokens: int
    num_failed: int = 0
    stages: list[StageReport]
    predicted: Predicted | None = None
    plan: Plan | None = None
    error_percent: float | None = None
    quality: Quality | None = None
    provenance: Provenance = Provenance()
