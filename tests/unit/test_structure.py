"""`scripts/structure.py`: what it counts, on sources made up here; and the package's own limits."""

import ast
from pathlib import Path

import click
import pytest
import structure

MOST_LINES, MOST_OF_FUNCTION, MOST_OF_CLASS = 400, 60, 250
MOST_UNTYPED = 20  # of dict[str, Any]
MOST_OF_COMMANDS = 3300  # lines of llmpq/cli


def module(text: str) -> structure.Module:
    return structure.Module("made_up.py", text, ast.parse(text))


def test_functions_used_once_are_counted_without_their_definition():
    text = "def a():\n  b()\n  c()\ndef b():\n  c()\ndef c():\n  pass\n"
    assert structure.used_once([module(text)]) == 1  # b; nobody calls a, and two call c
    importing = module("from made_up import b\nb()")
    assert structure.used_once([module(text), importing]) == 0


def test_sizes_of_definitions():
    found = structure.definitions(
        [module("class A:\n  def f(self):\n    return 1\n")], ast.ClassDef
    )
    assert [str(size) for size in found] == ["3 (made_up.py: A)"]


def test_the_longest_chain_of_imports():
    graph = {"cli": {"nouns", "planner"}, "planner": {"costs"}, "costs": {"nouns"}, "nouns": set()}
    assert structure.longest_chain(graph) == ["cli", "planner", "costs", "nouns"]


def test_layers_of_the_package_stand_on_the_nouns():
    chain = structure.longest_chain(structure.package_graph())
    assert chain[-1] == "nouns" and {"cli", "runtime"} < set(chain)


def test_options_of_subcommands_count_too():
    inner = click.Command("inner", params=[click.Option(["--one"]), click.Argument(["file"])])
    group = click.Group("group", {"inner": inner}, params=[click.Option(["--two"])])
    assert structure.num_options(group) == 2


def test_names_that_occur_twice():
    assert structure.repeated(["a", "b", "a"]) == ["a"]


# ---- what the package keeps to


@pytest.fixture(scope="module")
def package() -> list[structure.Module]:
    return structure.read_modules()


def test_files_functions_and_classes_are_short(package):
    functions = structure.definitions(package, (ast.FunctionDef, ast.AsyncFunctionDef))
    classes = structure.definitions(package, ast.ClassDef)
    assert [m.path for m in package if m.num_lines > MOST_LINES] == []
    assert [str(one) for one in functions if one.num_lines > MOST_OF_FUNCTION] == []
    assert [str(one) for one in classes if one.num_lines > MOST_OF_CLASS] == []


def test_a_name_stands_for_one_thing(package):
    classes = structure.definitions(package, ast.ClassDef)
    assert structure.repeated(one.name for one in classes) == []
    stems = (Path(module.path).stem for module in package)
    assert structure.repeated(stem for stem in stems if not stem.startswith("_")) == []


def test_values_have_types(package):
    untyped = {m.path: n for m in package if (n := m.text.count("dict[str, Any]"))}
    assert sum(untyped.values()) <= MOST_UNTYPED, untyped


def test_the_commands_stay_thin(package):
    lines = sum(m.num_lines for m in package if m.path.startswith("llmpq/cli/"))
    assert lines <= MOST_OF_COMMANDS
