"""`llmpq-profile sensitivity`: quality by layer and precision, with the quantizer to serve with."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from llmpq.artifact import write_json
from llmpq.cli.common import console, emit, report_console
from llmpq.cli.options import DtypeName, PrecisionNames, TorchOptions, command, option
from llmpq.cli.paths import check_files, model_files
from llmpq.errors import UserError
from llmpq.model_lookup import DEFAULT_MODEL
from llmpq.model_spec import ASSETS
from llmpq.quantizer import Method as QuantizerName

if TYPE_CHECKING:
    from llmpq.profile_data import Sensitivity
    from llmpq.profiler.sensitivity_run import SensitivityJob


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions(TorchOptions):
    """What the command line asks for."""

    model: str = option("Directory or Hugging Face id.", default=DEFAULT_MODEL)
    text: Path | None = option("Calibration text; default: a shipped one.")
    precisions: tuple[str, ...] | None = option(
        "Precisions to measure; default: all that this device can serve.", type=PrecisionNames()
    )
    indicator: Literal["measured", "variance", "hessian", "random"] = option(
        "What stands for a layer's sensitivity.", default="measured"
    )
    method: Literal["fast", "exact"] = option(
        "One pass with one layer in memory at a time, or variant after variant, all in memory.",
        default="fast",
    )
    quantizer: QuantizerName = option("How weights are rounded.", default="gptq")
    moments: Path | None = option(
        "File of calibration statistics for gptq: read if it exists, else written. Default: "
        "beside the output."
    )
    remake_moments: bool = option("Write that file anew even if it exists.", default=False)
    moment_tokens: int = option(
        "Tokens for these statistics, at most.", default=32768, type=click.IntRange(min=1)
    )
    moment_block: int | None = option(
        "Columns of a block of these statistics; default: whole matrices.",
        type=click.IntRange(min=1),
    )
    apart: bool = option("Attention and feed-forward of each layer as well.", default=False)
    seed: int = option("Seed of --indicator random and of the plans drawn.", default=0)
    window: int | None = option(
        "Tokens per window; default: 256 at most.", type=click.IntRange(min=2)
    )
    max_windows: int | None = option(
        "Windows to measure on; default: 4096 tokens (8192 with --method exact).",
        type=click.IntRange(min=1),
    )
    dtype: DtypeName = option(
        "Data type of activations, and of weights at 16 bits.", default="float32"
    )
    output: Path = option("Where to write.", "-o", "--output", default=Path("sensitivity.json"))

    @property
    def needs_moments(self) -> bool:
        """Whether calibration statistics are gathered."""
        return self.quantizer == "gptq" or self.indicator == "hessian"

    def moments_path(self, folder: Path) -> Path:
        """What --moments says; beside the output where a plan needs it; else in `folder`."""
        if self.moments is not None:
            return self.moments
        if self.quantizer != "gptq":
            return folder / "moments.safetensors"
        return self.output.with_suffix(".moments.safetensors")


@command(SensitivityOptions)
def sensitivity(options: SensitivityOptions) -> None:
    """Measure how much each layer loses at each precision, and what a sum of that means.

    Calibration statistics come from the first half of the text, the second half is measured on.
    """
    from llmpq.render.profile_view import print_sensitivity

    moments = options.moments_path(Path(tempfile.gettempdir())) if options.needs_moments else None
    writes = [("-o", options.output), ("--json", options.json_path), ("--moments", moments)]
    check_files([("--text", options.text), *model_files(options.model)], writes)
    if options.moments is not None and not options.needs_moments:
        raise UserError(
            f"--moments {options.moments}: '{options.quantizer}' and indicator "
            f"'{options.indicator}' take no calibration statistics; leave it out, or use "
            "--quantizer gptq"
        )
    result = _measured(options)
    write_json(options.output, result)
    emit(result.model_dump_json(indent=1), options.json_path)
    print_sensitivity(report_console(options.quiet, options.json_path), result)
    for note in result.notes:
        console(options.quiet).print(f"note: {note}")


def _measured(options: SensitivityOptions) -> "Sensitivity":
    from llmpq.profiler.effort import Effort
    from llmpq.profiler.sensitivity_run import MomentsRequest, measure, prepare, result_of
    from llmpq.render.progress import progress

    job, out = _job(options), console(options.quiet)

    @contextmanager
    def show(what: str, total: int) -> Iterator[Callable[[int], None]]:
        with progress(out, what, total) as shown:
            yield shown.update

    for note in job.notes:
        out.print(note, soft_wrap=True)
    with Effort(job.subject.device) as effort, tempfile.TemporaryDirectory() as folder:
        request = MomentsRequest(
            options.moments_path(Path(folder)),
            options.moments is not None,
            options.remake_moments,
            options.moment_block,
        )
        prepared = prepare(job, options.quantizer, request, options.output, show, out.print)
        what = "sensitivity: layers" if options.method == "fast" else "sensitivity: evaluations"
        with progress(out, what, job.subject.num_layers) as shown:
            found = measure(job, prepared, lambda done, total: shown.update(done, total=total))
    return result_of(job, found, prepared.quantizer, effort)


def _job(options: SensitivityOptions) -> "SensitivityJob":
    from llmpq.checkpoint.loader import model_folder
    from llmpq.profiler.sensitivity import MeasurementOptions
    from llmpq.profiler.sensitivity_run import read_job
    from llmpq.prompts.tokenizer import load_tokenizer
    from llmpq.quant import available_precisions
    from llmpq.runtime.process import Role, choose_device, choose_dtype

    device = choose_device(options.device, Role(0, 1, 0, 1))
    dtype = choose_dtype(options.dtype, device)
    recipe = MeasurementOptions(
        options.precisions or available_precisions(device, dtype),
        options.indicator,
        options.method,
        options.apart,
        options.seed,
    )
    return read_job(
        options.model,
        options.text or ASSETS / "calibration.txt",
        recipe,
        (device, dtype),
        load_tokenizer(model_folder(options.model)),
        options.window,
        options.max_windows,
        options.moment_tokens,
    )
