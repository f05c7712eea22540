"""`llmpq-export`: writes a plan for other engines. Not there yet."""

import click

from llmpq.cli.common import Command
from llmpq.errors import UserError
from llmpq.version import __version__


@click.command(cls=Command, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.version_option(__version__, prog_name="llmpq")
def main(arguments: tuple[str, ...]) -> None:
    """Export a plan to another engine (vLLM). Not available in this version."""
    raise UserError("llmpq-export is not available in this version; run plans with llmpq-run")


if __name__ == "__main__":
    main()
