#!/usr/bin/env python3
"""Lists the texts that users read: errors, notes, warnings, report lines and help, with file:line.

    python scripts/messages.py [--kind error|note|line|help] [FOLDER]

Everything is found in the syntax tree, so that a text that is put together from pieces is shown
whole, with {...} where a value stands. A text counts as an error where it is raised as one of
`llmpq.errors`, is added to a list of faults or returned by a function that names faults or
refusals; as a note where it is added to notes or warnings or returned by a function that names
them; as a line where it is printed, a title or a heading; as help where it describes an option or
a command. Docstrings of other functions are not listed.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("error", "note", "line", "help")
ERRORS = re.compile(r"\w*(Error|Refused|Refusal|FailedRequests|NoNumber)$|^fail$|^end_process$")
PRINTS = {"print", "echo", "add_row", "add_column", "Table", "empty_table", "styled", "say", "warn"}
FAULTS = re.compile(r"fault|refus|reason|why|unavailable|error", re.I)
NOTES = re.compile(r"note|warn|advice|doubt|overflow|text$|line|words|title|summary|hint", re.I)
LETTERS = re.compile(r"[A-Za-z]{2}.* .*[A-Za-z]{2}|^[A-Z][a-z]+ ")


@dataclass(frozen=True, order=True)
class Message:
    """A text that users read. `path` is relative to the repository."""

    path: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: {self.text}"


def text_of(node: ast.AST | None) -> str | None:
    """The text that an expression makes, with {...} for values; None where it makes none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (
            part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
            for part in node.values
            if isinstance(part, ast.Constant | ast.FormattedValue)
        )
        return "".join(map(str, parts))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left), text_of(node.right)
        if left is None and right is None:
            return None
        return (left or f"{{{ast.unparse(node.left)}}}") + (
            right or f"{{{ast.unparse(node.right)}}}"
        )
    return None


def texts_in(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Every whole text below a node, with its line."""
    text = text_of(node)
    if text is not None:
        yield getattr(node, "lineno", 0), text
        return
    for child in ast.iter_child_nodes(node):
        yield from texts_in(child)


def name_of(node: ast.AST) -> str:
    """The last part of the name of what is called or assigned to; empty for anything else."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


class Finder(ast.NodeVisitor):
    """Collects the messages of one file."""

    def __init__(self, path: str) -> None:
        self.path, self.found, self.functions = path, set[Message](), list[str]()

    def add(self, kind: str, node: ast.AST, always: bool = False) -> None:
        """Notes every text below a node that has words."""
        for line, text in texts_in(node):
            if always or LETTERS.search(text):
                self.found.add(Message(self.path, line, kind, " ".join(text.split())))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:  # noqa: N802
        decorators = {
            name_of(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list
        }
        if decorators & {"command", "group"} and (help_text := ast.get_docstring(node)):
            self.found.add(Message(self.path, node.lineno, "help", " ".join(help_text.split())))
        self.functions.append(node.name)
        self.generic_visit(node)
        self.functions.pop()

    def visit_Call(self, node: ast.Call) -> None:  # noqa: N802
        name = name_of(node.func)
        owner = name_of(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if name in ("option", "required"):
            self.add("help", node.args[0] if node.args else node, always=True)
        elif ERRORS.match(name):
            self.add("error", node)
        elif name in PRINTS:
            self.add("line", node)
        elif name in ("append", "extend", "setdefault", "add"):
            self._add_named(owner, node)
        self.generic_visit(node)

    def _add_named(self, name: str, node: ast.AST) -> None:
        if FAULTS.search(name):
            self.add("error", node)
        elif NOTES.search(name) or name in ("found", "lines"):
            self.add("note", node)

    def visit_Assign(self, node: ast.Assign) -> None:  # noqa: N802
        for target in node.targets:
            name = name_of(target)
            if name.isupper():  # a constant that other modules show
                self.add("note", node.value)
            else:
                self._add_named(name, node.value)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:  # noqa: N802
        self._add_named(name_of(node.target), node.value)
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:  # noqa: N802
        if node.value is not None and self.functions:
            kind = "error" if FAULTS.search(self.functions[-1]) else "note"
            self.add(kind, node.value)

    def visit_Expr(self, node: ast.Expr) -> None:  # noqa: N802
        if isinstance(node.value, ast.Yield) and node.value.value is not None:
            self.add("note", node.value.value)
        elif not isinstance(node.value, ast.Constant):  # docstrings
            self.generic_visit(node)


def messages(folder: Path) -> list[Message]:
    """All messages of the Python files in a folder, in the order of files and lines."""
    found: set[Message] = set()
    for path in sorted(folder.rglob("*.py")):
        name = str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
        finder = Finder(name)
        finder.visit(ast.parse(path.read_text(encoding="utf-8")))
        found |= finder.found
    return sorted(found)


def main() -> int:
    """Prints the list."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "llmpq")
    parser.add_argument("--kind", choices=KINDS, help="only messages of this kind")
    words = parser.parse_args()
    for message in messages(words.folder):
        if words.kind in (None, message.kind):
            print(message)
    return 0


if __name__ == "__main__":
    sys.exit(main())
