"""The console of all commands, on which text stays text: no markup, no emoji, nothing escapes.

A report goes to standard output; notes, warnings and progress go to standard error. Text is printed
as it is, `[red]` and `:smile:` too, with control characters spelled out (`llmpq.plain`). A styled
text is made with `llmpq.render.plan_report.styled`.
"""

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from llmpq.plain import plain

WIDTH = 120  # where the stream is no terminal


class PlainConsole(Console):
    """A console on standard error, or (`stderr=False`) on standard output."""

    def __init__(self, stderr: bool = True, **settings: Any) -> None:
        stream = sys.stderr if stderr else sys.stdout
        width = None if stream.isatty() else WIDTH
        settings = {"width": width} | settings
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **options: Any) -> Text:
        """Makes a text of a string; strings in tables and titles pass here too."""
        return super().render_str(plain(text), **options)
