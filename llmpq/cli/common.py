"""What every command shares: errors and their exit codes, consoles, and where JSON goes.

A user's error is printed as its message alone and ends with the exit code of its kind. A report
goes to standard output, everything else that people read to standard error; where `--json -` asks
for standard output, it holds nothing but JSON.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENAMETOOLONG, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from llmpq.artifact import show_value, write_text
from llmpq.errors import LlmpqError, UserError, WorkerError
from llmpq.kernel import KERNELS_KEPT
from llmpq.plain import plain

if TYPE_CHECKING:
    from rich.console import Console

    from llmpq.runtime.process import Role

ARGUMENTS = "llmpq.arguments"  # in a context's meta: the words of the command line
RUN_EXTRA = ("torch", "transformers", "safetensors", "tokenizers")
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def bound_kernel_caches() -> None:
    """Bounds the memory that torch's kernels take on a CPU, for profiling as for running.

    It must be called before torch first computes. Settings of the user are kept.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS_KEPT))


class PlainErrors(click.Command):
    """A command whose errors quote values of the command line without control characters."""

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        """Parses the command line as click does."""
        with _in_plain_text():
            return super().make_context(*args, **more)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command as click does; what libraries log meanwhile is plain text too."""
        before = logging.getLogRecordFactory()
        logging.setLogRecordFactory(PlainRecord)
        try:
            with _in_plain_text():
                return super().invoke(ctx)
        finally:
            logging.setLogRecordFactory(before)


class PlainRecord(logging.LogRecord):
    """A log record of a library, which may quote names of files and what is in them."""

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
            _fail(_file_error(error), UserError.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)


def _file_error(error: OSError) -> str:
    """The message for an error that was not caught where files are opened; else raises it again."""
    if error.errno == ENAMETOOLONG:
        return f"{show_value(error.filename)}: no such file: its name is too long"
    if error.errno == ENOSPC and error.filename is None:
        return f"standard output cannot be written ({error.strerror})"
    raise error


def _fail(message: str, exit_code: int) -> NoReturn:
    for line in plain(message).splitlines():
        fix = line.startswith("would fit:")
        click.echo(line if fix else f"error: {line}", err=True)
    sys.exit(exit_code)


@contextmanager
def one_of_several(role: "Role", advice: str) -> Iterator[None]:
    """Runs a worker's part of a command, so that one worker per machine tells what went wrong.

    `advice`: what to do where a worker is lost.
    """
    from llmpq.reliability.ending import SUPERVISED
    from llmpq.reliability.monitor import Monitor
    from llmpq.runtime.process import check_meeting_point, disconnect, end_with_parent

    end_with_parent()
    check_meeting_point()
    try:
        with Monitor(role.rank, role.size, f"rank {role.rank}", advice):
            yield
    except UserError:
        if role.local_rank == 0:
            raise
        sys.exit(UserError.exit_code)  # the first rank on this machine says the same
    except WorkerError:
        if SUPERVISED not in os.environ:
            raise
        sys.exit(WorkerError.exit_code)  # the process that started us says which rank was lost
    finally:
        disconnect()


def command_words() -> list[str]:
    """Returns the words of the command line that is running."""
    return list(click.get_current_context().meta[ARGUMENTS])


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


def console(quiet: bool = False) -> "Console":
    """Returns the console for notes, warnings and progress, on standard error."""
    from llmpq.render.console import PlainConsole

    return PlainConsole(quiet=quiet)


def report_console(quiet: bool, *outputs: Path | None) -> "Console":
    """Returns the console for reports: standard output, unless an output ('-') has that."""
    from llmpq.render.console import PlainConsole

    return PlainConsole(stderr="-" in map(str, outputs), quiet=quiet)
