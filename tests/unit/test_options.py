"""Options of the commands: a dataclass's fields become click's parameters."""

from dataclasses import FrozenInstanceError, dataclass, fields
from pathlib import Path
from typing import Literal

import click
import pytest
from click.testing import CliRunner

from llmpq.cli.eval import EvalOptions
from llmpq.cli.options import (
    CommonOptions,
    Integers,
    arguments,
    command,
    option,
    parameters,
    required,
)
from llmpq.cli.plan_options import PlanOptions
from llmpq.cli.profile_devices import DevicesOptions
from llmpq.cli.profile_layers import LayersOptions
from llmpq.cli.profile_links import LinksOptions
from llmpq.cli.profile_recalibrate import RecalibrateOptions
from llmpq.cli.profile_sensitivity import SensitivityOptions
from llmpq.cli.run_options import RunOptions

ALL = [
    *(DevicesOptions, EvalOptions, LayersOptions, LinksOptions, PlanOptions, RecalibrateOptions),
    *(RunOptions, SensitivityOptions),
]


@dataclass(frozen=True, kw_only=True)
class MadeUp(CommonOptions):
    """One of each kind."""

    model: str = required("Which model.")
    folder: Path | None = option("Where.")
    mode: Literal["slow", "fast"] | None = option("How.")
    sizes: tuple[int, ...] | None = option("Sizes.", type=Integers())
    refill: bool = option("Refill.", default=True)
    dry_run: bool = option("Do nothing.", default=False)
    files: tuple[Path, ...] = option("Files.", multiple=True, default=())
    more: tuple[Path, ...] = arguments()


def called(*words: str) -> MadeUp | str:
    """What a command is given for these words; what it says where it refuses them."""
    found: list[MadeUp] = []

    @command(MadeUp)
    def made_up(options: MadeUp) -> None:
        """Do nothing."""
        found.append(options)

    result = CliRunner().invoke(made_up, words)
    return found[0] if result.exit_code == 0 and found else result.output


def test_a_command_is_given_its_options_as_one_value():
    words = "--model m --folder f --mode fast --sizes 4,1 --no-refill --files a --files b c d -q"
    assert called(*words.split()) == MadeUp(
        model="m",
        folder=Path("f"),
        mode="fast",
        sizes=(1, 4),
        refill=False,
        files=(Path("a"), Path("b")),
        more=(Path("c"), Path("d")),
        quiet=True,
    )


def test_defaults_are_those_of_the_dataclass():
    options = called("--model", "m")
    assert options == MadeUp(model="m") and options.refill and not options.dry_run
    with pytest.raises(FrozenInstanceError):
        options.model = "n"


def test_what_is_missing_or_wrong_is_refused():
    assert "Missing option '--model'" in called()
    assert "'slow', 'fast'" in called("--model", "m", "--mode", "quick")
    assert "0 is not positive" in called("--model", "m", "--sizes", "0,1")


def test_help_is_short_too_and_shows_options_of_every_command_last():
    text = called("-h")
    assert "Do nothing." in text
    assert text.index("--model") < text.index("--files") < text.index("--json")


@pytest.mark.parametrize("options", ALL)
def test_every_option_of_every_command_has_a_help_text(options):
    for one in parameters(options):
        if isinstance(one, click.Option):
            assert one.help and one.help.endswith((".", "]", ")")), one.name
    assert all("settings" in f.metadata or "argument" in f.metadata for f in fields(options))
