"""`llmpq-profile`: measures layers (default), links, quality per layer; corrects; lists devices."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmpq import __version__
from llmpq.artifact import Provenance, write_json
from llmpq.cli.common import Command, common_options, console, emit
from llmpq.cli.profile_devices import devices
from llmpq.cli.profile_layers import layers
from llmpq.cli.profile_links import links
from llmpq.cli.profile_options import PrecisionNames
from llmpq.cli.profile_recalibrate import recalibrate
from llmpq.cli.progress import progress
from llmpq.cli.run import DTYPE_NAMES
from llmpq.errors import UserError
from llmpq.model_spec import ASSETS, DEFAULT_MODEL, load_model_spec

if TYPE_CHECKING:
    import torch


class DefaultGroup(click.Group):
    """A group whose first command is meant where none is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        shows_group = args[:1] and args[0] in (*self.commands, "--help", "--version")
        return super().parse_args(ctx, args if shows_group else ["layers", *args])


@click.group(cls=DefaultGroup)
@click.version_option(__version__, prog_name="llmpq")
def main() -> None:
    """Measure this machine: `layers` (the default), `links`, `sensitivity`, `devices`.

    `recalibrate` corrects profiles by what runs measured.
    """


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


def check_window(window: int, max_positions: int) -> None:
    """A window cannot be longer than what the model can see."""
    if window > max_positions:
        raise UserError(f"--window {window}: the model has {max_positions} positions")


def _device(flags: dict[str, Any]) -> "tuple[torch.device, torch.dtype]":
    from llmpq.runtime.process import Role, choose_device, choose_dtype

    device = choose_device(flags["device"], Role(0, 1, 0, 1))
    return device, choose_dtype(flags["dtype"], device)


def _write(value: Any, flags: dict[str, Any]) -> None:
    write_json(flags["output"], value)
    emit(value.model_dump_json(indent=1), flags["json_path"])


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


main.add_command(layers)
main.add_command(devices)
main.add_command(links)
main.add_command(recalibrate)

if __name__ == "__main__":
    main()
