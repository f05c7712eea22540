#!/usr/bin/env python3
"""Prints measures of the package's structure: sizes, names, options, and who imports whom.

    python scripts/structure.py

Everything is read from the source, except the options of the commands, which are counted on the
commands themselves. The layers are those that tests/unit/test_layering.py declares and enforces.
A name counts as used wherever it is written as a name, an attribute or a string of its own, but
not where it is only imported; two functions of one name are therefore not told apart.
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llmpq"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]
import test_layering as layers  # noqa: E402

# What is written for GPUs alone: kernels and how they are compiled and launched.
GPU_KERNELS = re.compile(r"(quant/(triton|humming)|models/(triton_attention|attention_source))")
COMMANDS = ["profile", "plan", "run", "eval", "export"]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file: its path in the repository, its text and its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def num_lines(self) -> int:
        """All lines of the file, comments and blank lines included."""
        return self.text.count("\n")


@dataclass(frozen=True)
class Sized:
    """A function or class and its number of lines, decorators left out."""

    num_lines: int
    name: str
    path: str

    def __str__(self) -> str:
        return f"{self.num_lines} ({self.path}: {self.name})"


def read_modules() -> list[Module]:
    """Every module of the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found.append(Module(str(path.relative_to(ROOT)), text, ast.parse(text)))
    return found


def definitions(modules: Iterable[Module], kinds: type | tuple[type, ...]) -> list[Sized]:
    """All functions or classes, methods and nested ones included."""
    return [
        Sized((node.end_lineno or 0) - node.lineno + 1, node.name, module.path)
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, kinds)
    ]


def uses(modules: Iterable[Module]) -> Counter[str]:
    """How often each name is written, its definition left out."""
    return Counter(name for module in modules for name in _written(module.tree))


def _written(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def used_once(modules: list[Module]) -> int:
    """Functions (not methods) that one place alone uses, which might as well hold their body."""
    count = uses(modules)
    return sum(
        count[node.name] == 1
        for module in modules
        for node in module.tree.body
        if isinstance(node, Function)
    )


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, in order."""
    return sorted(name for name, times in Counter(names).items() if times > 1)


def num_options(command: click.Command) -> int:
    """The options that a command takes, those of its subcommands included, `--help` left out."""
    own = sum(isinstance(p, click.Option) for p in command.params)
    inner = command.commands.values() if isinstance(command, click.Group) else []
    return own + sum(num_options(c) for c in inner)


def options() -> str:
    """The number of options of every command; of a subcommand where a command has any."""
    counted = []
    for name in COMMANDS:
        command = import_module(f"llmpq.cli.{name}").main
        inner = command.commands if isinstance(command, click.Group) else {"": command}
        counted += [f"{name} {n}".strip() + f" {num_options(c)}" for n, c in inner.items()]
    return ", ".join(counted)


def package_graph() -> dict[str, set[str]]:
    """Which layer imports which other, as the layering test names them."""
    known = layers.modules()
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        own = layers.part_of(name) or name
        inside = (i.module for i in layers.imports(name, path, known) if i.module in known)
        targets = {layers.part_of(module) for module in inside}
        graph.setdefault(own, set()).update(t for t in targets if t and t != own)
    return graph


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest chain of imports in a graph without cycles, importers first."""

    @cache
    def chain(name: str) -> tuple[str, ...]:
        return (name, *max((chain(t) for t in sorted(graph.get(name, ()))), key=len, default=()))

    return list(max((chain(name) for name in sorted(graph)), key=len))


def measures() -> Iterator[tuple[str, object]]:
    """Every measure and its value, in the order they are printed."""
    modules = read_modules()
    longest = max(modules, key=lambda m: m.num_lines)
    classes = definitions(modules, ast.ClassDef)
    stems = [Path(m.path).stem for m in modules]
    modules_by_name = layers.modules()
    plain = (m.num_lines for m in modules if not GPU_KERNELS.search(m.path))
    yield "lines", sum(m.num_lines for m in modules)
    yield "lines without GPU kernels", sum(plain)
    yield "files", len(modules)
    yield "longest file", f"{longest.num_lines} ({longest.path})"
    yield "files over 400 lines", sum(m.num_lines > 400 for m in modules)
    functions = definitions(modules, (ast.FunctionDef, ast.AsyncFunctionDef))
    yield "longest function", max(functions, key=lambda f: f.num_lines)
    yield "longest class", max(classes, key=lambda c: c.num_lines)
    yield "functions used once", used_once(modules)
    yield "class names used twice", ", ".join(repeated(c.name for c in classes)) or "none"
    yield "file names used twice", ", ".join(repeated(s for s in stems if s[0] != "_")) or "none"
    yield "dict[str, Any]", sum(m.text.count("dict[str, Any]") for m in modules)
    yield "options per command", options()
    chain = longest_chain(package_graph())
    yield "import depth", f"{len(chain)} ({' > '.join(chain)})"
    yield "upward imports", len(layers.import_faults(modules_by_name))
    yield "import cycles", len(layers.cycles(modules_by_name))


if __name__ == "__main__":
    for label, value in measures():
        print(f"{label:<26} {value}")
