"""`scripts/structure.py`: what it counts, on sources made up here."""

import ast

import click
import structure


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
