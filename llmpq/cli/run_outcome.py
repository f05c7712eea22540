"""The last line of `llmpq-run`: whether all is done, or how many requests failed and what next."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmpq.cli.common import ARGUMENTS
from llmpq.cli.run_options import RunOptions
from llmpq.errors import FailedRequests

if TYPE_CHECKING:
    from llmpq.prompts.prompts import PromptFile
    from llmpq.prompts.result_stream import ResultStream
    from llmpq.reliability.journal import Results

RETRIES = ("--resume", "--keep-errors")


def outcome(
    results: "Results | ResultStream",
    prompts: "PromptFile",
    options: RunOptions,
    under_torchrun: bool,
    dtype: str,
    out: Any,
) -> FailedRequests | None:
    """What is told last: an error where requests failed, which is the command's exit code too.

    `dtype`: what the run computed in.
    """
    num_requests = len(prompts)
    place = "standard output" if str(options.output) == "-" else str(options.output)
    failed = len(results.failed)
    if not failed:
        what = f"all {num_requests} requests are done, none failed: {place}"
        out.print(what, soft_wrap=True)
        return None
    what = f"{failed} of {num_requests} requests failed; their lines in {place} say why"
    refused = {prompts.ids[number] for number in prompts.refused}
    if dtype.endswith("float16") and not dtype.endswith("bfloat16") and results.failed - refused:
        what += "; where activations overflow in float16, --dtype bfloat16 or float32 has more room"
    return FailedRequests(f"{what}; {_next(options.output, under_torchrun)}")


def _next(output: Path, under_torchrun: bool) -> str:
    """How failed requests are tried again."""
    context = click.get_current_context(silent=True)
    words = context.meta.get(ARGUMENTS) if context else None
    if str(output) == "-":
        return "to try them again, run with an --output that is a file, then with --resume"
    if words is None or under_torchrun:
        return "to try them again, run the same command with --resume"
    again = [word for word in words if word not in RETRIES]
    return f"to try them again: {shlex.join(['llmpq-run', *again, '--resume'])}"
