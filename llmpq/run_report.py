"""report.json: what a run measured, beside what its plan predicted.

Besides sums, each stage tells how long its calls took, by phase, micro-batch and length, and the
report holds the plan that ran: what is needed to correct the times that plans are made with.
Reports of earlier versions have neither, and can still be read. `make_report` makes a report of
what a run counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from llmpq.artifact import SCHEMA_VERSION, Provenance, Strict
from llmpq.plan_data import Plan, Predicted
from llmpq.workload import request_lengths

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

    rank: NonNegativeInt
    busy_prefill_s: NonNegativeFloat
    busy_decode_s: NonNegativeFloat
    idle_s: float
    comm_s: float
    peak_memory_bytes: NonNegativeInt
    load_s: NonNegativeFloat
    measured: list[MeasuredTime] = []
    weights_bytes: NonNegativeInt | None = None  # parts of the account
    cache_bytes: NonNegativeInt | None = None
    activation_bytes: NonNegativeInt | None = None
    buffer_bytes: NonNegativeInt | None = None
    busy_share: float | None = None  # of the run's time, computing
    most_prefill_rows: NonNegativeInt | None = None  # at once, since memory ran out
    most_decode_rows: NonNegativeInt | None = None  # None, of both: memory never ran out
    num_graphs: NonNegativeInt | None = None  # CUDA graphs that decode steps were captured in
    graph_bytes: NonNegativeInt | None = None  # that these keep
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
    tokens_per_s: NonNegativeFloat
    requests_per_s: NonNegativeFloat | None = None
    prefill_share: NonNegativeFloat | None = None
    prefill_s: NonNegativeFloat
    decode_s: float
    total_s: NonNegativeFloat
    load_s: NonNegativeFloat
    num_requests: NonNegativeInt
    num_new_tokens: NonNegativeInt
    num_failed: NonNegativeInt = 0
    stages: list[StageReport]
    predicted: Predicted | None = None
    plan: Plan | None = None
    error_percent: float | None = None
    quality: Quality | None = None
    provenance: Provenance = Provenance()


@dataclass(frozen=True)
class RunCounts:
    """What a run did: requests, those of them that failed, and new tokens.

    `begun_s`: seconds until the first token of every request was back; `total_s`: of the run.
    """

    num_done: int
    num_failed: int
    num_tokens: int
    begun_s: float
    total_s: float


def make_report(plan: Plan, counts: RunCounts, stages: Sequence[StageReport]) -> Report:
    """The report of a run of `plan`."""

    def busy_s(stage: StageReport) -> float:
        return stage.busy_prefill_s + stage.busy_decode_s

    total_s, busiest = counts.total_s, max(stages, key=busy_s)
    shares = [stage.model_copy(update={"busy_share": busy_s(stage) / total_s}) for stage in stages]
    return Report(
        tokens_per_s=counts.num_tokens / total_s,
        requests_per_s=(counts.num_done - counts.num_failed) / total_s,
        prefill_share=busiest.busy_prefill_s / (busy_s(busiest) or 1.0),
        prefill_s=counts.begun_s,
        decode_s=total_s - counts.begun_s,
        total_s=total_s,
        load_s=max(stage.load_s for stage in stages),
        num_requests=counts.num_done,
        num_new_tokens=counts.num_tokens,
        num_failed=counts.num_failed,
        stages=shares,
        predicted=plan.predicted,
        plan=plan,
        error_percent=_error_percent(plan, counts),
        provenance=Provenance.here(),
    )


def _error_percent(plan: Plan, counts: RunCounts) -> float | None:
    """Of the predicted time; None where something else than the planned work was done."""
    planned = request_lengths(plan.workload)
    done = (counts.num_done, counts.num_tokens)
    if plan.predicted is None or done != (len(planned), sum(new for _, new in planned)):
        return None
    return 100 * (plan.predicted.total_s / counts.total_s - 1)
