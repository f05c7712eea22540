"""The console of all commands, on which a text is a text: no markup, no emoji, nothing escapes.

Texts are printed as they are, `[red]` and `:smile:` too; control characters are spelled out
(`llmpq.plain`). What should have a style is made with `llmpq.planner.report.styled`.
"""

from typing import Any

from rich.console import Console
from rich.text import Text

from llmpq.plain import plain


class PlainConsole(Console):
    """Standard error, for people."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(stderr=True, markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string passes here, in tables and titles too."""
        return super().render_str(plain(text), **options)
