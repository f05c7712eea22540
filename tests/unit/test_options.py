"""Options of the commands: a dataclass's fields become click's parameters."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass, fields
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Literal

import click
import pytest
from click.testing import CliRunner

import llmpq.cli
from llmpq.cli.options import (
    CommonOptions,
    Integers,
    Listed,
    arguments,
    command,
    option,
    parameters,
    required,
)

MODULES = [import_module(f"llmpq.cli.{one.name}") for one in iter_modules(llmpq.cli.__path__)]
SOURCE = "\n".join(map(inspect.getsource, MODULES))


def below(options: type[CommonOptions]) -> Iterator[type[CommonOptions]]:
    """The classes of options that extend this one and that no other extends: one a command."""
    for one in options.__subclasses__():
        yield from below(one) if one.__subclasses__() else (one,)


ALL = sorted(below(CommonOptions), key=lambda one: one.__name__)


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


def test_the_options_of_all_commands_are_looked_at():
    assert {"EvalOptions", "LayersOptions", "PlanOptions", "RunOptions"} <= {
        one.__name__ for one in ALL
    }


@pytest.mark.parametrize("options", ALL)
def test_every_option_is_read_by_a_command(options):
    names = [one.name for one in fields(options)]
    unread = [name for name in names if not re.search(rf"\.{name}\b|\"{name}\"", SOURCE)]
    assert unread == [], "options that nothing reads"


@pytest.mark.parametrize("options", ALL)
def test_an_option_of_several_values_says_how_they_are_written(options):
    for one in parameters(options):
        kind = next(field.type for field in fields(options) if field.name == one.name)
        if isinstance(one, click.Option) and "tuple" in str(kind):
            assert one.multiple or isinstance(one.type, Listed), f"{one.name}: type=Listed()"


@pytest.mark.parametrize("options", ALL)
def test_every_file_is_checked_before_work_starts(options):
    """A file that `check_files` is not told of may be overwritten, or found unwritable late."""
    source = inspect.getsource(import_module(options.__module__))
    for one in parameters(options):
        is_file = isinstance(one, click.Option) and isinstance(one.type, click.Path)
        if is_file and "folder" not in (one.help or "").lower():
            named = rf'\("[^"]*({"|".join(one.opts)})", '
            assert re.search(named, source), f"no {one.opts} among the files of check_files"
