"""A measurement of sensitivity from files to result: calibration text, statistics, rows, the fit.

`read_job` reads a model and a text; `prepare` gathers the calibration statistics that the quantizer
or the indicator needs: the second moments of each linear's inputs, from the first half of the text,
kept in a file where a plan will need them. `measure` measures on the second half.

Not covered: reading the command line and tables.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from llmpq.artifact import Provenance
from llmpq.checkpoint.calibration_file import CalibrationFile, sha256_of
from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.inventory import check_checkpoint
from llmpq.checkpoint.loader import model_folder
from llmpq.checkpoint.roundings import load_roundings
from llmpq.cluster import MIB
from llmpq.errors import UserError
from llmpq.evaluation.perplexity import text_windows
from llmpq.model_lookup import load_model_spec
from llmpq.models.stage_model import load_config
from llmpq.profile_data import CalibrationText, Sensitivity
from llmpq.profiler.calibration_pass import gather_calibration, most_bytes
from llmpq.profiler.effort import Effort
from llmpq.profiler.indicators import LoadableModel
from llmpq.profiler.quality_fit import notes_on_fit
from llmpq.profiler.sensitivity import (
    InputStatistics,
    MeasurementOptions,
    SensitivityResult,
    gather_input_variance,
    measure_sensitivity,
)
from llmpq.quantizer import Method as QuantizerName
from llmpq.quantizer import Quantizer

FAST_TOKENS, EXACT_TOKENS = 4096, 8192
DEFAULT_WINDOW = 256
# Shows the progress of so many steps of something; called with how many are done.
ShowSteps = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class MomentsRequest:
    """The file of calibration statistics.

    `given`: the user names the file; else what is there is used only if it is of the same text.
    `block`: the most columns of a block; None: whole matrices.
    """

    path: Path
    given: bool = False
    remake: bool = False
    block: int | None = None


@dataclass(frozen=True)
class SensitivityJob:
    """What is measured. `[n, W]` windows: `fitted` for statistics, `measured` to measure on."""

    model: str
    text: Path
    subject: LoadableModel
    recipe: MeasurementOptions
    fitted: torch.Tensor
    measured: torch.Tensor
    notes: list[str]


@dataclass(frozen=True)
class Prepared:
    """A job's model, rounded as it will be served, and what is known of its linears' inputs."""

    subject: LoadableModel
    inputs: InputStatistics
    quantizer: Quantizer


def needs_moments(quantizer: QuantizerName, recipe: MeasurementOptions) -> bool:
    """Whether second moments are gathered."""
    return quantizer == "gptq" or recipe.indicator == "hessian"


def read_job(
    model: str,
    text: Path,
    recipe: MeasurementOptions,
    place: tuple[torch.device, torch.dtype],
    tokenizer: Any,
    window: int | None,
    max_windows: int | None,
    fit_tokens: int,
) -> SensitivityJob:
    """Reads the model's files and the text.

    `window`: tokens; `max_windows`: to measure on; `fit_tokens`: for statistics, at most.
    Raises `UserError` where they do not fit the model.
    """
    max_positions = load_model_spec(model).max_positions
    window = window or min(DEFAULT_WINDOW, max_positions)
    if window > max_positions:
        raise UserError(f"--window {window}: the model has {max_positions} positions")
    tokens = FAST_TOKENS if recipe.method == "fast" else EXACT_TOKENS
    windows = text_windows(text, tokenizer, window)
    half = len(windows) // 2
    device, dtype = place
    folder = model_folder(model)
    config, weights = load_config(folder), Checkpoint(folder)
    notes = check_checkpoint(config, weights)
    return SensitivityJob(
        model,
        text,
        LoadableModel(config, weights, dtype, device),
        recipe,
        _spread(windows[:half], max(1, fit_tokens // window)),
        _spread(windows[half:], max_windows or max(1, tokens // window)),
        notes,
    )


def _spread(windows: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` windows, at equal distances: neighbours share a subject, a text has many."""
    count = min(count, len(windows))
    return windows[[index * len(windows) // count for index in range(count)]]


def prepare(
    job: SensitivityJob,
    method: QuantizerName,
    request: MomentsRequest,
    output: Path,
    show: ShowSteps,
    say: Callable[[str], object],
) -> Prepared:
    """Gathers what is needed of the linears' inputs at 16 bits, and rounds the model with it.

    `output`: the sensitivity file, from whose folder the statistics' path is seen.
    """
    wants_moments = needs_moments(method, job.recipe)
    wants_variance = job.recipe.indicator == "variance"
    if (wants_moments or wants_variance) and not len(job.fitted):
        raise UserError(
            f"{job.text}: holds one window of {job.measured.shape[1]} tokens; calibration "
            "statistics need another one: use a longer text, a smaller --window, or --quantizer rtn"
        )
    moments = _moments(job, request, show, say) if wants_moments else None
    variance = None
    if wants_variance:
        with show("inputs: layers", job.subject.num_layers) as on_layer:
            variance = gather_input_variance(job.subject, job.fitted, on_layer)
    path = moments.path if moments and method == "gptq" else None
    quantizer = (
        Quantizer(method=method)
        if path is None
        else Quantizer(
            method="gptq",
            moments=os.path.relpath(path, output.parent),
            sha256=sha256_of(path),
        )
    )
    roundings = load_roundings(quantizer, override=path)
    subject = replace(job.subject, roundings=roundings)
    return Prepared(subject, InputStatistics(moments, variance), quantizer)


def _moments(
    job: SensitivityJob, request: MomentsRequest, show: ShowSteps, say: Callable[[str], object]
) -> CalibrationFile:
    """The file of second moments: what is there already if it suits, else a new one."""
    path = request.path
    about = {
        "model": Path(job.model).name,
        "text": job.text.name,
        "tokens": str(job.fitted.numel()),
        "window": str(job.fitted.shape[1]),
        "block": str(request.block or "whole"),
    }
    wanted = {"model": about["model"]} if request.given else about
    if path.exists() and not request.remake:
        file = CalibrationFile(path)
        if all(file.about.get(key) == value for key, value in wanted.items()):
            say(f"calibration statistics: using the existing file {path}")
            return file
        if request.given:
            raise UserError(
                f"{path}: holds statistics of model {file.about.get('model')}, not of "
                f"{about['model']}; name another file, or give --remake-moments"
            )
    size = most_bytes(load_model_spec(job.model), request.block)
    say(f"calibration statistics: {path}, at most {size / MIB:.1f} MiB")
    with show("calibration statistics: layers", job.subject.num_layers) as on_layer:
        file = gather_calibration(
            job.subject, job.fitted, path, about, request.block, on_layer=on_layer
        )
    say(
        f"calibration statistics: {path.stat().st_size / MIB:.1f} MiB from {about['tokens']} tokens"
    )
    if file.note:
        say(file.note)
    return file


def measure(
    job: SensitivityJob, prepared: Prepared, on_step: Callable[[int, int], None]
) -> SensitivityResult:
    """Measures every layer; raises `UserError` where the loss is not a finite number."""
    try:
        found = measure_sensitivity(
            prepared.subject, job.recipe, job.measured, prepared.inputs, on_step
        )
    except ValidationError:  # a sensitivity that is no number is no price of a precision
        raise _not_finite(job) from None
    if not found.base.is_finite:
        raise _not_finite(job)
    return found


def _not_finite(job: SensitivityJob) -> UserError:
    return UserError(
        f"{job.model}: the loss on {job.text.name} is not a finite number: activations became NaN "
        f"or infinite in {job.subject.dtype}; --dtype float32 has the most room"
    )


def result_of(
    job: SensitivityJob, measured: SensitivityResult, quantizer: Quantizer, effort: Effort
) -> Sensitivity:
    """What sensitivity.json holds."""
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
