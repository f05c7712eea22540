"""Text from elsewhere as a terminal may see it: what would steer the terminal is spelled out.

Names of files, models, devices and workers, texts of other libraries and of other hosts may hold
escape sequences, returns that hide what was said before, and marks that turn the order of letters
round. `plain` writes each such character as Python does (`\\x1b`, `\\u202e`). Line feeds and
tabs stay, as messages have several lines; `plain_line` spells out those as well.

Not covered: letters of different scripts that look alike, and data (`--json -`, `--output -`).
"""

import re

# Control characters (C0 without tab and line feed, DEL, C1), marks of direction, separators of
# lines, and lone surrogates, which stand for bytes of a file's name that are no UTF-8.
_STEERS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain(text: str) -> str:
    """The text with control characters spelled out; twice does no more than once."""
    return _STEERS.sub(lambda found: _spelled(found[0]), text)


def plain_line(text: str) -> str:
    """The same, with line feeds and tabs spelled out too."""
    return re.sub(r"[\n\t]", lambda found: _spelled(found[0]), plain(text))


def _spelled(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
