"""`llmpq`: the umbrella; `llmpq plan ...` is `llmpq-plan ...`, and so on."""

import importlib

import click

from llmpq.cli.common import PlainErrors
from llmpq.cli.options import HELP
from llmpq.version import __version__

COMMANDS = {
    "profile": "Measure layers and what precisions cost in quality.",
    "plan": "Find the best plan for a model on a cluster.",
    "run": "Execute a plan on prompts.",
    "eval": "Perplexity of plans and precisions.",
    "export": "Write a plan for another engine.",
}


class Umbrella(PlainErrors, click.Group):
    """Imports a command only when it is called, so that --help is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"llmpq.cli.{name}").main
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=Umbrella, context_settings=HELP)
@click.version_option(__version__, prog_name="llmpq")
def main() -> None:
    """Plan and run large language models over unequal GPUs, with a precision for every layer."""


if __name__ == "__main__":
    main()
