"""Where the results of a run go, and in which format; opened before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmpq.plan_data import Plan
from llmpq.prompts.prompts import PromptFile
from llmpq.prompts.result_lines import ResultWriter
from llmpq.prompts.result_stream import ResultStream
from llmpq.reliability.journal import Fsync, Results
from llmpq.runtime.run_inputs import RunInputs

OutputFormat = Literal["auto", "llmpq", "openai"]


@dataclass(frozen=True)
class ResultFile:
    """The output: None is standard output, which keeps nothing.

    `settings`: of the run, which results must have in common to lie in one file. `resume`: keep
    finished requests; `keep_errors`: failed ones too.
    """

    path: Path | None
    settings: dict[str, object]
    format: OutputFormat = "auto"
    resume: bool = False
    keep_errors: bool = False
    fsync: Fsync = "interval"


def open_results(plan: Plan, inputs: RunInputs, output: ResultFile) -> Results | ResultStream:
    """Opens the output; a run that was restarted must not take an older one for its own."""
    prompts = inputs.led_prompts
    form = prompts.form if output.format == "auto" else output.format
    name = Path(plan.model.name).name
    writer = ResultWriter(form, name)
    if output.path is None:
        return ResultStream(writer)
    identity = {
        "model": f"{name} {plan.model.model_key}",
        "precisions": ",".join(plan.precisions),
        "quantizer": plan.quantizer.method,
        **output.settings,
        "weights": inputs.weights.fingerprint,
    }
    return Results(
        output.path,
        output.resume,
        output.fsync,
        identity,
        prompts.checksums() if output.resume else None,
        output.keep_errors,
        writer,
    )


def format_notes(prompts: PromptFile, chosen: OutputFormat) -> list[str]:
    """Which format was chosen for the output, where that is not a matter of course."""
    if chosen != "auto":
        return []
    if prompts.is_mixed:
        return [
            "some prompts are OpenAI batch lines and others are not: all results are in llmpq's "
            "own format (use --output-format openai for the other)"
        ]
    if prompts.form == "openai":
        return [
            "results are in OpenAI's batch format, as the prompts are (--output-format llmpq "
            "writes llmpq's own)"
        ]
    return []
