"""`llmpq-profile`: measures layers (default), quality per layer, and lists devices."""

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmpq import __version__
from llmpq.artifact import Provenance, write_json
from llmpq.cli.common import Command, common_options, console, emit
from llmpq.cli.progress import progress
from llmpq.cli.run import DTYPE_NAMES
from llmpq.errors import UserError
from llmpq.model_spec import ASSETS, DEFAULT_MODEL, load_model_spec
from llmpq.precision import PRECISIONS

if TYPE_CHECKING:
    import torch

DEFAULT_BUDGET_S = 120.0


class DefaultGroup(click.Group):
    """A group whose first command is meant where none is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        shows_group = args[:1] and args[0] in (*self.commands, "--help", "--version")
        return super().parse_args(ctx, args if shows_group else ["layers", *args])


class Integers(click.ParamType):
    """Positive integers with commas between: 1,2,4."""

    name = "n,n,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(sorted({int(part) for part in str(value).split(",")}))
        except ValueError:
            self.fail(f"{value!r} is not a list of integers like 1,2,4", param, ctx)
        if numbers[0] < 1:
            self.fail(f"{numbers[0]} is not positive", param, ctx)
        return numbers


class PrecisionNames(click.ParamType):
    """Precisions with commas between: 16,8,4."""

    name = "precisions"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(part.strip() for part in str(value).split(",")))
        unknown = [name for name in names if name not in PRECISIONS]
        if unknown:
            self.fail(
                f"unknown precision {unknown[0]!r}; known: {', '.join(PRECISIONS)}", param, ctx
            )
        return names


@click.group(cls=DefaultGroup)
@click.version_option(__version__, prog_name="llmpq")
def main() -> None:
    """Measure this machine: `layers` (the default), `sensitivity`, `devices`."""


@main.command(cls=Command)
@click.option("--model", default=DEFAULT_MODEL, help="Directory, config.json or hub id.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--dtype", type=click.Choice(DTYPE_NAMES), default="auto")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; 1 for rehearsals.")
@click.option("--type", "device_type", help="Name of this device type in cluster files.")
@click.option("--precisions", type=PrecisionNames(), help="Default: all this device can serve.")
@click.option("--prefill-micro-batches", type=Integers(), default="1,2,4,8")
@click.option("--decode-micro-batches", type=Integers(), default="1,2,4,8,16,32")
@click.option("--prompt-tokens", type=Integers(), help="Default: 32,128,512 as the model allows.")
@click.option("--past-tokens", type=Integers(), help="Default: 32,128,512 as the model allows.")
@click.option("--budget-s", type=click.FloatRange(min=1), default=DEFAULT_BUDGET_S)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("profile.json"))
@common_options
def layers(**flags: Any) -> None:
    """Time layers in both phases at every precision; embedding and head apart."""
    import torch

    from llmpq.model_spec import config_path
    from llmpq.models.stage_model import load_config
    from llmpq.profile_data import Profile
    from llmpq.profiler.layers import LayerProfiler

    if flags["threads"]:
        torch.set_num_threads(flags["threads"])
    device, dtype = _device(flags)
    spec = load_model_spec(flags["model"])
    config = load_config(config_path(flags["model"]))
    grid = _grid(flags, spec.max_positions, device, dtype)
    out = console(flags["quiet"])
    profiler = LayerProfiler(spec, config, grid, dtype, device, flags["budget_s"])
    with progress(out, "profiling", profiler.num_cells) as shown:
        rows = profiler.run(shown.update)
    described = _describe(device, dtype, flags["device_type"])
    profile = Profile(device=described, rows=rows, provenance=Provenance.here(described.name))
    _write(profile, flags)
    out.print(f"{len(rows)} measurements of {spec.model_key} -> {flags['output']}")
    if not flags["quiet"]:
        _show_layers(rows, grid, out)


@main.command(cls=Command)
@click.option("--model", default=DEFAULT_MODEL, help="Directory or hub id.")
@click.option("--text", type=click.Path(path_type=Path), help="Calibration text; default: shipped.")
@click.option("--precisions", type=PrecisionNames(), help="Default: all this device can serve.")
@click.option("--window", type=click.IntRange(min=2), help="Tokens a window; default 256 at most.")
@click.option("--max-windows", type=click.IntRange(min=1), default=32)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--dtype", type=click.Choice(DTYPE_NAMES), default="auto")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("sensitivity.json"))
@common_options
def sensitivity(**flags: Any) -> None:
    """Measure how much each layer loses at each precision, and what a sum of that means."""
    from llmpq.models.stage_model import load_config
    from llmpq.profile_data import CalibrationText, Sensitivity
    from llmpq.profiler.sensitivity import SensitivityMeter, num_evaluations
    from llmpq.quant import available_precisions
    from llmpq.runtime.checkpoint import Checkpoint
    from llmpq.runtime.loader import model_folder

    device, dtype = _device(flags)
    spec = load_model_spec(flags["model"])
    folder = model_folder(flags["model"])
    text = flags["text"] or ASSETS / "calibration.txt"
    windows = _windows(flags, text, folder, spec.max_positions)
    precisions = flags["precisions"] or available_precisions(device, dtype)
    out = console(flags["quiet"])
    with progress(out, "evaluations", num_evaluations(spec.num_layers, precisions)) as shown:
        config, weights = load_config(folder), Checkpoint(folder)
        meter = SensitivityMeter(config, weights, precisions, windows, dtype, device, shown.update)
        rows = meter.rows()
        fit = meter.fit(rows)
    result = Sensitivity(
        model=flags["model"],
        num_layers=spec.num_layers,
        indicator="measured",
        layers=rows,
        calibration=CalibrationText(
            source=text.name, num_tokens=windows.numel(), loss=meter.base_loss
        ),
        fit=fit,
        provenance=Provenance.here(),
    )
    _write(result, flags)
    if not flags["quiet"]:
        _show_sensitivity(result, out)


def _windows(flags: dict[str, Any], text: Path, folder: Path, max_positions: int) -> Any:
    """[windows, tokens] of the calibration text."""
    from llmpq.models.tokenizer import load_tokenizer
    from llmpq.runtime.evaluate import text_windows

    window = flags["window"] or min(256, max_positions)
    check_window(window, max_positions)
    return text_windows(text, load_tokenizer(folder), window, flags["max_windows"])


@main.command(cls=Command)
@common_options
def devices(json_path: Path | None, verbose: bool, quiet: bool) -> None:
    """List the devices here and the types that cluster files can name."""
    import json

    from rich.table import Table

    from llmpq.devices import device_library

    library = device_library()
    here = _devices_here()
    known = {name: device.model_dump() for name, device in library.items()}
    emit(json.dumps({"here": here, "library": known}, indent=1), json_path)
    out = console(quiet)
    for device in here:
        out.print(f"here: {device['name']}, {device['memory_gib']:.1f} GiB")
    table = Table("type", "name", "GiB", "GB/s", "fp16 TFLOP/s", "source")
    for name, spec in library.items():
        figures = (spec.memory_gib, spec.bandwidth_gbs, spec.fp16_tflops)
        table.add_row(name, spec.name, *(f"{figure:g}" for figure in figures), spec.source)
    out.print(table)


def check_window(window: int, max_positions: int) -> None:
    """A window cannot be longer than what the model can see."""
    if window > max_positions:
        raise UserError(f"--window {window}: the model has {max_positions} positions")


def _device(flags: dict[str, Any]) -> "tuple[torch.device, torch.dtype]":
    from llmpq.runtime.process import Role, choose_device, choose_dtype

    device = choose_device(flags["device"], Role(0, 1, 0, 1))
    return device, choose_dtype(flags["dtype"], device)


def _grid(flags: dict[str, Any], max_positions: int, device: Any, dtype: Any) -> Any:
    from llmpq.profiler.layers import Grid
    from llmpq.quant import available_precisions

    usual = tuple(n for n in (32, 128, 512) if n < max_positions) or (max(1, max_positions // 2),)
    chosen = {name: flags[name] or usual for name in ("prompt_tokens", "past_tokens")}
    for name, lengths in chosen.items():
        if max(lengths) >= max_positions:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {max(lengths)}: the model has {max_positions} positions")
    offered = available_precisions(device, dtype)
    precisions = flags["precisions"] or offered
    missing = [p for p in precisions if p not in offered]
    if missing:
        raise UserError(f"--precisions {missing[0]}: this device serves {', '.join(offered)}")
    return Grid(
        precisions=tuple(precisions),
        prefill_micro_batches=flags["prefill_micro_batches"],
        decode_micro_batches=flags["decode_micro_batches"],
        **chosen,
    )


def _describe(device: Any, dtype: Any, name: str | None) -> Any:
    import torch

    from llmpq.profile_data import ProfiledDevice

    here = _devices_here()
    is_cuda = device.type == "cuda"
    found = here[1 + device.index] if is_cuda else here[0]
    return ProfiledDevice(
        name=found["name"],
        type=name or ("cuda" if is_cuda else "cpu"),
        memory_bytes=int(found["memory_gib"] * 1024**3),
        num_threads=None if is_cuda else torch.get_num_threads(),
        compute_capability=found.get("compute_capability"),
        dtype=str(dtype).removeprefix("torch."),
    )


def _devices_here() -> list[dict[str, Any]]:
    """This machine's CPU, then its CUDA cards if torch is installed and sees any."""
    found: list[dict[str, Any]] = [{"name": _cpu_name(), "memory_gib": _cpu_memory_gib()}]
    try:
        import torch
    except ImportError:
        return found
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        capability = f"{card.major}.{card.minor}"
        memory = card.total_memory / 1024**3
        found.append({"name": card.name, "memory_gib": memory, "compute_capability": capability})
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_memory_gib() -> float:
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3


def _write(value: Any, flags: dict[str, Any]) -> None:
    write_json(flags["output"], value)
    emit(value.model_dump_json(indent=1), flags["json_path"])


def _show_layers(rows: Any, grid: Any, out: Any) -> None:
    """Milliseconds a layer, precision by shape."""
    from rich.table import Table

    times = {
        (r.precision, r.phase, r.micro_batch, r.prompt_tokens + r.past_tokens): r for r in rows
    }
    table = Table("ms a layer", *(f"{p} bits" for p in grid.precisions))
    for shape in grid.shapes():
        count, length = shape.micro_batch, shape.past or shape.tokens
        cells = [f"{times[p, shape.phase, count, length].time_ms:.3f}" for p in grid.precisions]
        what = "past" if shape.past else "each"
        table.add_row(f"{shape.phase} {count} x {length} tokens {what}", *cells)
    out.print(table)


def _show_sensitivity(result: Any, out: Any) -> None:
    from rich.table import Table

    table = Table("layer", *(f"{p} bits" for p in result.table() if p != "16"))
    columns = [values for p, values in result.table().items() if p != "16"]
    for layer in range(result.num_layers):
        table.add_row(str(layer), *(f"{values[layer]:.5f}" for values in columns))
    out.print("rise of the loss (nats a token) with one layer at this precision")
    out.print(table)
    out.print(
        f"rise of perplexity = exp({result.fit.scale:.2f} x sum) - 1, mean error "
        f"{result.fit.mean_abs_error_percent:.2f} points over {result.fit.num_plans} plans"
    )


if __name__ == "__main__":
    main()
