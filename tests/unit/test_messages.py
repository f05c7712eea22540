"""`scripts/messages.py`: which texts it finds, on a source made up here, and in the package."""

from pathlib import Path

import messages

SOURCE = '''
"""A module."""
TIMED_OUT = "the time limit ended the search"

@command(Options)
def main(options):
    """Make a plan."""

def notes(name):
    """Not for users."""
    found = []
    found.append(f"{name}: was left " + "out of it")
    return found

def check(value, faults):
    if value:
        raise UserError(f"{value}: no such file")
    faults.append("give --a or --b, not both")
    console().print("a line of words", "x")
    option("Say more.", "-v", default="no word of it")
    return "an explanation of it"
'''


def test_every_kind_of_text_is_found_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "made_up.py").write_text(SOURCE)
    found = {(m.line, m.kind, m.text) for m in messages.messages(tmp_path)}
    assert found == {
        (3, "note", "the time limit ended the search"),
        (6, "help", "Make a plan."),
        (12, "note", "{name}: was left out of it"),
        (17, "error", "{value}: no such file"),
        (18, "error", "give --a or --b, not both"),
        (19, "line", "a line of words"),
        (20, "help", "Say more."),
        (21, "note", "an explanation of it"),
    }


def test_messages_of_the_package_are_found() -> None:
    texts = {message.text for message in messages.messages(messages.ROOT / "llmpq")}
    assert "give --max-quality-loss or --theta, not both" in texts
    assert "Write the plan here." in texts
    assert "{path}: no such file" in texts
