"""What every command shares: `--version`, `-v/-q`, `--json`, exit codes, consoles.

A user's error is printed as its message alone and ends with the exit code of its kind.
Human output goes to standard error, so that `--json -` can own standard output.
"""

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENAMETOOLONG
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from llmpq.artifact import show_value, write_text
from llmpq.errors import LlmpqError, UserError
from llmpq.kernel import KERNELS_KEPT
from llmpq.plain import plain
from llmpq.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

ARGUMENTS = "llmpq.arguments"  # in a context's meta: the words of the command line
RUN_EXTRA = ("torch", "transformers", "safetensors", "tokenizers")
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
F = TypeVar("F", bound=Callable[..., Any])


def bound_kernel_caches() -> None:
    """Bounds the memory of torch's kernels on a CPU, in what measures layers as in what runs them.

    Must be called before torch first computes. The user's own settings stay.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS_KEPT))


class FiniteRange(click.FloatRange):
    """A range of numbers without infinity and NaN."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return float(number)


class PlainErrors(click.Command):
    """Has click quote values of the command line in its errors without control characters."""

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        """As click does."""
        with _in_plain_text():
            return super().make_context(*args, **more)

    def invoke(self, ctx: click.Context) -> Any:
        """As click does; what libraries log meanwhile is plain too."""
        before = logging.getLogRecordFactory()
        logging.setLogRecordFactory(PlainRecord)
        try:
            with _in_plain_text():
                return super().invoke(ctx)
        finally:
            logging.setLogRecordFactory(before)


class PlainRecord(logging.LogRecord):
    """What a library says, which may quote names of files and what is in them."""

    def getMessage(self) -> str:  # noqa: N802 (the name is logging's)
        """The text with control characters spelled out."""
        return plain(super().getMessage())


@contextmanager
def _in_plain_text() -> Iterator[None]:
    try:
        yield
    except click.ClickException as error:
        vars(error)["message"] = plain(error.message)  # which click declares as final
        raise


class Command(PlainErrors):
    """A click command that turns `LlmpqError` into its message and exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LlmpqError as error:
            _fail(str(error), error.exit_code)
        except ModuleNotFoundError as error:
            if error.name not in RUN_EXTRA:
                raise
            _fail(f"this command needs {error.name}: pip install 'llmpq[run]'", UserError.exit_code)
        except OSError as error:
            if error.errno != ENAMETOOLONG:  # others are told where files are opened
                raise
            _fail(
                f"{show_value(error.filename)}: no such file: its name is too long",
                UserError.exit_code,
            )
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)


def _fail(message: str, exit_code: int) -> NoReturn:
    for line in plain(message).splitlines():
        fix = line.startswith("would fit:")
        click.echo(line if fix else f"error: {line}", err=True)
    sys.exit(exit_code)


def emit(text: str, path: Path | None) -> None:
    """Writes what `--json` asked for: to a file, to standard output ('-'), or nothing."""
    if path is None:
        return
    if str(path) == "-":
        try:
            click.echo(text)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UserError(f"standard output cannot be written ({error.strerror})") from None
    else:
        write_text(path, text + "\n")


def common_options(function: F) -> F:
    """Adds `--json`, `-v`, `-q` and `--version`."""
    decorators = [
        click.option(
            "--json",
            "json_path",
            type=click.Path(path_type=Path, allow_dash=True),
            help="Also write the result as JSON to this file ('-': standard output).",
        ),
        click.option("-v", "--verbose", is_flag=True, help="Say more."),
        click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors."),
        click.version_option(__version__, prog_name="llmpq"),
    ]
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def console(quiet: bool = False) -> "Console":
    """Where people read: standard error, without styles where it is no terminal."""
    from llmpq.cli.plain_console import PlainConsole

    return PlainConsole(quiet=quiet, width=None if sys.stderr.isatty() else 120)
