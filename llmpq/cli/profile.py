"""`llmpq-profile`: measures layers (default), links, quality per layer; corrects; lists devices."""

import click

from llmpq.cli.common import PlainErrors
from llmpq.cli.options import HELP
from llmpq.cli.profile_devices import devices
from llmpq.cli.profile_layers import layers
from llmpq.cli.profile_links import links
from llmpq.cli.profile_recalibrate import recalibrate
from llmpq.cli.profile_sensitivity import sensitivity
from llmpq.version import __version__


class DefaultGroup(PlainErrors, click.Group):
    """A group whose command `layers` runs where none is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        shows_group = args[:1] and args[0] in (*self.commands, "-h", "--help", "--version")
        return super().parse_args(ctx, args if shows_group else ["layers", *args])


@click.group(cls=DefaultGroup, context_settings=HELP)
@click.version_option(__version__, prog_name="llmpq")
def main() -> None:
    """Measure this machine: `layers` (the default), `links`, `sensitivity`, `devices`.

    `recalibrate` corrects profiles by what runs measured.
    """


main.add_command(layers)
main.add_command(devices)
main.add_command(links)
main.add_command(recalibrate)
main.add_command(sensitivity)

if __name__ == "__main__":
    main()
