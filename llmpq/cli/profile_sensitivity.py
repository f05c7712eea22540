"""`llmpq-profile sensitivity`: quality by layer and precision, with the quantizer to serve with."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from llmpq.artifact import Provenance, write_json
from llmpq.cli.common import Command, common_options, console, emit
from llmpq.cli.paths import check_files, model_files
from llmpq.cli.profile_options import PrecisionNames
from llmpq.cli.progress import progress
from llmpq.cli.run import DTYPE_NAMES
from llmpq.cluster import MIB
from llmpq.errors import UserError
from llmpq.model_lookup import DEFAULT_MODEL, load_model_spec
from llmpq.model_spec import ASSETS
from llmpq.quantizer import Quantizer

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

    from llmpq.checkpoint.calibration_file import CalibrationFile
    from llmpq.profile_data import LayerSensitivity, Sensitivity
    from llmpq.profiler.effort import Effort
    from llmpq.profiler.indicators import LoadableModel
    from llmpq.profiler.sensitivity import InputStatistics, SensitivityOptions, SensitivityResult

FAST_TOKENS, EXACT_TOKENS = 4096, 8192
MOMENT_TOKENS = 32768
UNITS = {
    "measured": "divergence from the 16-bit model, nats a token",
    "variance": "added variance of outputs",
    "hessian": "squared error of outputs x top eigenvalue",
    "random": "drawn",
}


@click.command(cls=Command)
@click.option("--model", default=DEFAULT_MODEL, help="Directory or hub id.")
@click.option("--text", type=click.Path(path_type=Path), help="Calibration text; default: shipped.")
@click.option("--precisions", type=PrecisionNames(), help="Default: all this device can serve.")
@click.option("--indicator", type=click.Choice(list(UNITS)), default="measured")
@click.option(
    "--method",
    type=click.Choice(["fast", "exact"]),
    default="fast",
    help="One pass with one layer in memory at a time, or variant after variant, all in memory.",
)
@click.option("--quantizer", type=click.Choice(["rtn", "mse", "gptq"]), default="gptq")
@click.option(
    "--moments",
    type=click.Path(path_type=Path),
    help="File of second moments for gptq: read where it is there, else written. Default: beside "
    "the output.",
)
@click.option("--remake-moments", is_flag=True, help="Write the file anew though it is there.")
@click.option(
    "--moment-tokens", type=click.IntRange(min=1), default=MOMENT_TOKENS, show_default=True
)
@click.option("--moment-block", type=click.IntRange(min=1), help="Columns of a block of moments.")
@click.option("--apart", is_flag=True, help="Attention and feed-forward of each layer as well.")
@click.option("--seed", type=int, default=0, help="Of --indicator random and of the plans drawn.")
@click.option("--window", type=click.IntRange(min=2), help="Tokens a window; default 256 at most.")
@click.option(
    "--max-windows",
    type=click.IntRange(min=1),
    help=f"To measure on; default: {FAST_TOKENS} tokens ({EXACT_TOKENS} with --method exact).",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--dtype", type=click.Choice(DTYPE_NAMES), default="float32", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("sensitivity.json"))
@common_options
def sensitivity(**flags: Any) -> None:
    """Measure how much each layer loses at each precision, and what a sum of that means.

    The first half of the text gives second moments, the second half is measured on.
    """
    from llmpq.profiler.effort import Effort

    _check_files(flags)
    job = _job(flags)
    with Effort(job.subject.device) as effort, tempfile.TemporaryDirectory() as folder:
        subject, inputs, quantizer = _prepare(job, flags, Path(folder))
        measured = _measure(job, subject, inputs, flags)
    result = _result(job, measured, quantizer, effort)
    write_json(flags["output"], result)
    emit(result.model_dump_json(indent=1), flags["json_path"])
    if not flags["quiet"]:
        _show(result, console())


def _check_files(flags: dict[str, Any]) -> None:
    """No file is written that is read, or written as another one."""
    moments = _moments_path(flags, Path(tempfile.gettempdir())) if _needs_moments(flags) else None
    writes = [("-o", flags["output"]), ("--json", flags["json_path"]), ("--moments", moments)]
    check_files([("--text", flags["text"]), *model_files(flags["model"])], writes)


@dataclass(frozen=True)
class _Job:
    """What the command line and the files say."""

    model: str
    text: Path
    subject: "LoadableModel"
    recipe: "SensitivityOptions"
    fitted: "torch.Tensor"  # windows that second moments are taken from
    measured: "torch.Tensor"  # windows to measure on


def _job(flags: dict[str, Any]) -> _Job:
    from llmpq.checkpoint.checkpoint import Checkpoint
    from llmpq.checkpoint.inventory import check_checkpoint
    from llmpq.checkpoint.loader import model_folder
    from llmpq.models.stage_model import load_config
    from llmpq.profiler.indicators import LoadableModel
    from llmpq.profiler.sensitivity import SensitivityOptions
    from llmpq.prompts.tokenizer import load_tokenizer
    from llmpq.quant import available_precisions
    from llmpq.runtime.process import Role, choose_device, choose_dtype

    if flags["moments"] is not None and not _needs_moments(flags):
        raise UserError(
            f"--moments {flags['moments']}: '{flags['quantizer']}' and indicator "
            f"'{flags['indicator']}' take no second moments; leave it out, or use --quantizer gptq"
        )
    device = choose_device(flags["device"], Role(0, 1, 0, 1))
    dtype = choose_dtype(flags["dtype"], device)
    spec, folder = load_model_spec(flags["model"]), model_folder(flags["model"])
    text = flags["text"] or ASSETS / "calibration.txt"
    fitted, measured = _windows(flags, text, load_tokenizer(folder), spec.max_positions)
    config, weights = load_config(folder), Checkpoint(folder)
    for note in check_checkpoint(config, weights):
        console(flags["quiet"]).print(note, soft_wrap=True)
    subject = LoadableModel(config, weights, dtype, device)
    recipe = SensitivityOptions(
        flags["precisions"] or available_precisions(device, dtype),
        flags["indicator"],
        flags["method"],
        flags["apart"],
        flags["seed"],
    )
    return _Job(flags["model"], text, subject, recipe, fitted, measured)


def _windows(
    flags: dict[str, Any], text: Path, tokenizer: Any, max_positions: int
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Windows of the text's first half, for second moments, and of its second half.

    They are spread over their half: neighbours tell of one subject, and a text of many.
    """
    from llmpq.evaluation.perplexity import text_windows

    window = flags["window"] or min(256, max_positions)
    if window > max_positions:
        raise UserError(f"--window {window}: the model has {max_positions} positions")
    tokens = FAST_TOKENS if flags["method"] == "fast" else EXACT_TOKENS
    to_measure = flags["max_windows"] or max(1, tokens // window)
    to_fit = max(1, flags["moment_tokens"] // window)
    windows = text_windows(text, tokenizer, window)
    half = len(windows) // 2
    if half == 0 and _needs_inputs(flags):
        raise UserError(
            f"{text}: holds one window of {window} tokens; second moments need another: use a "
            "longer text, a smaller --window, or --quantizer rtn"
        )
    return _spread(windows[:half], to_fit), _spread(windows[half:], to_measure)


def _spread(windows: "torch.Tensor", count: int) -> "torch.Tensor":
    """At most `count` of them, at equal distances."""
    count = min(count, len(windows))
    return windows[[index * len(windows) // count for index in range(count)]]


def _needs_moments(flags: dict[str, Any]) -> bool:
    return flags["quantizer"] == "gptq" or flags["indicator"] == "hessian"


def _needs_inputs(flags: dict[str, Any]) -> bool:
    return _needs_moments(flags) or flags["indicator"] == "variance"


def _prepare(
    job: _Job, flags: dict[str, Any], folder: Path
) -> "tuple[LoadableModel, InputStatistics, Quantizer]":
    """What is known of the linears' inputs at 16 bits, and the subject rounded with it."""
    from llmpq.checkpoint.roundings import load_roundings
    from llmpq.profiler.sensitivity import InputStatistics, gather_input_variance

    moments = variance = None
    if _needs_moments(flags):
        moments = _moments(job, flags, folder)
    if flags["indicator"] == "variance":
        with _layer_progress(job, flags, "inputs") as on_layer:
            variance = gather_input_variance(job.subject, job.fitted, on_layer)
    path = moments.path if moments and flags["quantizer"] == "gptq" else None
    quantizer = _quantizer(flags, path)
    roundings = load_roundings(quantizer, override=path)
    return replace(job.subject, roundings=roundings), InputStatistics(moments, variance), quantizer


def _quantizer(flags: dict[str, Any], moments: Path | None) -> Quantizer:
    """With the moments' path as seen from the output's folder."""
    from llmpq.checkpoint.calibration_file import sha256_of

    if moments is None:
        return Quantizer(method=flags["quantizer"])
    relative = os.path.relpath(moments, flags["output"].parent)
    return Quantizer(method="gptq", moments=relative, sha256=sha256_of(moments))


def _moments(job: _Job, flags: dict[str, Any], folder: Path) -> "CalibrationFile":
    """The file of second moments: what is there already if it suits, else a new one."""
    from llmpq.checkpoint.calibration_file import CalibrationFile
    from llmpq.profiler.calibration_pass import gather_calibration, most_bytes

    path, out = _moments_path(flags, folder), console(flags["quiet"])
    about = {
        "model": Path(job.model).name,
        "text": job.text.name,
        "tokens": str(job.fitted.numel()),
        "window": str(job.fitted.shape[1]),
        "block": str(flags["moment_block"] or "whole"),
    }
    wanted = about if flags["moments"] is None else {"model": about["model"]}
    if path.exists() and not flags["remake_moments"]:
        file = CalibrationFile(path)
        if all(file.about.get(key) == value for key, value in wanted.items()):
            out.print(f"second moments: {path} is there and used")
            return file
        if flags["moments"] is not None:
            raise UserError(
                f"{path}: second moments of model {file.about.get('model')}, not of "
                f"{about['model']}; name another file, or give --remake-moments"
            )
    size = most_bytes(load_model_spec(job.model), flags["moment_block"])
    out.print(f"second moments: {path}, at most {size / MIB:.1f} MiB")
    with _layer_progress(job, flags, "second moments") as on_layer:
        file = gather_calibration(
            job.subject, job.fitted, path, about, flags["moment_block"], on_layer=on_layer
        )
    out.print(f"second moments: {path.stat().st_size / MIB:.1f} MiB of {about['tokens']} tokens")
    return file


def _moments_path(flags: dict[str, Any], folder: Path) -> Path:
    """What --moments says; beside the output where a plan will need it; else a temporary file."""
    if flags["moments"] is not None:
        return Path(flags["moments"])
    if flags["quantizer"] != "gptq":
        return folder / "moments.safetensors"
    return Path(flags["output"]).with_suffix(".moments.safetensors")


@contextmanager
def _layer_progress(job: _Job, flags: dict[str, Any], what: str) -> Iterator[Callable[[int], None]]:
    out = console(flags["quiet"])
    with progress(out, f"{what}: layers", job.subject.num_layers) as shown:
        yield shown.update


def _measure(
    job: _Job, subject: "LoadableModel", inputs: "InputStatistics", flags: dict[str, Any]
) -> "SensitivityResult":
    from llmpq.profiler.sensitivity import measure_sensitivity

    what = "sensitivity: layers" if job.recipe.method == "fast" else "sensitivity: evaluations"
    with progress(console(flags["quiet"]), what, subject.num_layers) as shown:
        try:
            measured = measure_sensitivity(
                subject,
                job.recipe,
                job.measured,
                inputs,
                lambda done, total: shown.update(done, total=total),
            )
        except ValidationError:  # a sensitivity that is no number is no price of a precision
            raise _no_number(job) from None
    if not measured.base.is_finite:
        raise _no_number(job)
    return measured


def _no_number(job: _Job) -> UserError:
    return UserError(
        f"{job.model}: the loss on {job.text.name} is no finite number: activations became NaN or "
        f"infinite in {job.subject.dtype}; --dtype float32 has the most room"
    )


def _result(
    job: _Job, measured: "SensitivityResult", quantizer: Quantizer, effort: "Effort"
) -> "Sensitivity":
    from llmpq.profile_data import CalibrationText, Sensitivity
    from llmpq.profiler.quality_fit import notes_on_fit

    return Sensitivity(
        model=job.model,
        num_layers=job.subject.num_layers,
        indicator=job.recipe.indicator,
        layers=measured.rows,
        calibration=CalibrationText(
            source=job.text.name,
            num_tokens=job.measured.numel(),
            loss=measured.base.mean,
            window=job.measured.shape[1],
        ),
        fit=measured.fit,
        quantizer=quantizer,
        method=job.recipe.method,
        seconds=round(effort.seconds, 3),
        peak_memory_bytes=effort.peak_memory_bytes,
        notes=notes_on_fit(measured.fit),
        provenance=Provenance.here(job.subject.device.type),
    )


def _show(result: "Sensitivity", out: "Console") -> None:
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
        f"rise of perplexity = exp({fit.scale:.4g} x sum) - 1, held with {fit.upper_scale:.4g}; "
        f"mean error {fit.mean_abs_error_percent:.2f} points over {fit.num_plans} plans"
    )
    for note in result.notes:
        out.print(f"note: {note}")
    memory = f"{(result.peak_memory_bytes or 0) / MIB:.0f} MiB"
    out.print(f"quantizer {result.quantizer.method}; {result.seconds:.1f} s, {memory} at the peak")


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
