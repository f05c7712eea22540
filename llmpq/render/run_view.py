"""The main figures of a run's report, and what was predicted."""

from rich.console import Console

from llmpq.run_report import Report, duration


def print_run(out: Console, report: Report, verbose: bool) -> None:
    """Prints what was done and how fast, and the prediction; verbose: each stage too."""
    out.print(
        f"{report.num_requests} requests, {report.num_new_tokens} new tokens in "
        f"{duration(report.total_s)}: {report.tokens_per_s:.1f} tokens/s, "
        f"{report.requests_per_s:.3g} requests/s"
    )
    for stage in report.stages if verbose else ():
        out.print(stage.model_dump_json())
    if report.predicted is not None:
        out.print(
            f"predicted {duration(report.predicted.total_s)}, "
            f"{report.predicted.tokens_per_s:.1f} tokens/s for the planned workload"
        )


def memory_warnings(report: Report) -> list[str]:
    """Returns a line for each stage and phase that continued with fewer requests at once."""
    return [
        f"warning: stage {stage.rank} ran out of memory: {phase} continued with {rows} requests "
        "at once"
        for stage in report.stages
        for phase, rows in (
            ("prefill", stage.most_prefill_rows),
            ("decode", stage.most_decode_rows),
        )
        if rows is not None
    ]
