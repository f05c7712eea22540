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
from llmpq.cluster import MIB
from llmpq.errors import UserError
from llmpq.model_lookup import DEFAULT_MODEL
from llmpq.model_spec import ASSETS
from llmpq.quantizer import Method as QuantizerName

if TYPE_CHECKING:
    from rich.table import Table

    from llmpq.profile_data import LayerSensitivity, Sensitivity
    from llmpq.profiler.sensitivity_run import SensitivityJob

UNITS = {
    "measured": "divergence from the 16-bit model, nats per token",
    "variance": "added variance of outputs",
    "hessian": "squared error of outputs x top eigenvalue",
    "random": "drawn at random",
}


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions(TorchOptions):
    """What the command line asks for."""

    model: str = option("Directory or hub id.", default=DEFAULT_MODEL)
    text: Path | None = option("Calibration text; default: a shipped one.")
    precisions: tuple[str, ...] | None = option(
        "Default: all that this device can serve.", type=PrecisionNames()
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
        "File of calibration statistics for gptq: read where it is there, else written. Default: "
        "beside the output."
    )
    remake_moments: bool = option("Write that file anew though it is there.", default=False)
    moment_tokens: int = option(
        "Tokens for these statistics, at most.", default=32768, type=click.IntRange(min=1)
    )
    moment_block: int | None = option(
        "Columns of a block of these statistics; default: whole matrices.",
        type=click.IntRange(min=1),
    )
    apart: bool = option("Attention and feed-forward of each layer as well.", default=False)
    seed: int = option("Of --indicator random and of the plans drawn.", default=0)
    window: int | None = option(
        "Tokens per window; default: 256 at most.", type=click.IntRange(min=2)
    )
    max_windows: int | None = option(
        "To measure on; default: 4096 tokens (8192 with --method exact).",
        type=click.IntRange(min=1),
    )
    dtype: DtypeName = option("Of activations, and of weights at 16 bits.", default="float32")
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
    _show(result, options)


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
    from llmpq.profiler.sensitivity import Recipe
    from llmpq.profiler.sensitivity_run import read_job
    from llmpq.prompts.tokenizer import load_tokenizer
    from llmpq.quant import available_precisions
    from llmpq.runtime.process import Role, choose_device, choose_dtype

    device = choose_device(options.device, Role(0, 1, 0, 1))
    dtype = choose_dtype(options.dtype, device)
    recipe = Recipe(
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


def _show(result: "Sensitivity", options: SensitivityOptions) -> None:
    out = report_console(options.quiet, options.json_path)
    lower = {p: values for p, values in result.table().items() if p != "16"}
    text = f"{result.calibration.num_tokens:,} tokens of {result.calibration.source}"
    out.print(f"{result.indicator}, {result.method}, on {text}: {UNITS[result.indicator]}")
    out.print(_table(lower, result.num_layers))
    parts = [row for row in result.layers if row.part != "layer"]
    for part in dict.fromkeys(row.part for row in parts):
        out.print(f"of its {part} alone")
        out.print(_table(_by_precision(parts, part), result.num_layers))
    fit = result.fit
    out.print(
        f"rise of perplexity = exp({fit.scale:.4g} x sum) - 1 on average, and budgets are kept "
        f"with {fit.upper_scale:.4g}; mean error {fit.mean_abs_error_percent:.2f} points over "
        f"{fit.num_plans} plans"
    )
    memory = f"{(result.peak_memory_bytes or 0) / MIB:.0f} MiB"
    out.print(f"quantizer {result.quantizer.method}; {result.seconds:.1f} s, {memory} at the peak")
    for note in result.notes:
        console(options.quiet).print(f"note: {note}")


def _by_precision(rows: "list[LayerSensitivity]", part: str) -> dict[str, list[float]]:
    chosen = [row for row in rows if row.part == part]
    names = dict.fromkeys(row.precision for row in chosen)
    return {name: [r.sensitivity for r in chosen if r.precision == name] for name in names}


def _table(values: dict[str, list[float]], num_layers: int) -> "Table":
    from rich.table import Table

    table = Table("layer", *(f"{precision} bits" for precision in values))
    for layer in range(num_layers):
        table.add_row(str(layer), *(f"{column[layer]:.3g}" for column in values.values()))
    return table
