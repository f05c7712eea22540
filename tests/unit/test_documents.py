"""Documents name only what exists: links, headings, files, and options of commands."""

import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import get_args

import click
import pytest

from llmpq.planner import baselines
from llmpq.planning_methods import PlanningMethod

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "notebooks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
MAX_README_LINES = 150
COMMANDS = ("plan", "run", "profile", "eval", "export")
# Options that documents mention and that are other programs', or scripts' of this project.
OTHERS = {"help", "nproc-per-node", "max-restarts", "master-addr", "node-rank", "standalone"}
OTHERS |= {"local-addr", "rdzv-endpoint"}  # of torchrun
OTHERS |= {"part", "rigs", "only", "write"}  # of scripts
# Of vLLM, in what an export writes.
OTHERS |= {"max-model-len", "pipeline-parallel-size", "tensor-parallel-size", "max-num-seqs"}
OTHERS |= {"max-num-batched-tokens", "block-size", "kv-cache-memory-bytes"}
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(
    r"`([A-Za-z_0-9.-]+(?:/[A-Za-z_0-9.*-]+)*(?:\.(?:py|md|yaml|json|jsonl|sh|txt)|/))`"
)
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]+)")
# Folders in which a file may be named without its path, and what is written by commands.
HOMES = ("", "llmpq", "llmpq/assets", "docs", "tests/unit", "notebooks", "scripts/bench")
WRITTEN = re.compile(
    r"(plan|report|profile|trace|workload|cluster|config|prompts|links)\.(json|jsonl|yaml)"
    r"|(profiles|bench-out)/|(run|ray)\.sh|batch\.py|(export|engine)\.json"
)


def links(path: Path) -> Iterator[tuple[Path, str]]:
    """The file and the heading of every relative link of a document."""
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            name, _, heading = target.partition("#")
            yield (path.parent / name if name else path), heading


def anchors(path: Path) -> set[str]:
    """The headings of a document as links name them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@cache
def known_options() -> set[str]:
    """The long options of every command, without dashes."""
    found: set[str] = set()

    def add(command: click.Command) -> None:
        for parameter in command.params:
            for name in [*parameter.opts, *parameter.secondary_opts]:
                found.add(name.removeprefix("--"))
        for inner in command.commands.values() if isinstance(command, click.Group) else ():
            add(inner)

    for name in COMMANDS:
        add(import_module(f"llmpq.cli.{name}").main)
    return found


def unknown_options(text: str) -> set[str]:
    """The options in a text that no command has."""
    return set(OPTION.findall(text)) - known_options() - OTHERS


def missing_files(text: str) -> list[str]:
    """The files and folders in a text that do not exist, but for those that commands write."""
    named = [name for name in FILE.findall(text) if "*" not in name]
    named = [name for name in named if not WRITTEN.fullmatch(name)]
    return [name for name in named if not any((ROOT / home / name).exists() for home in HOMES)]


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_README_LINES


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for path, heading in links(ROOT / name):
        assert path.exists(), f"{name}: no {path}"
        assert not heading or heading in anchors(path), f"{name}: no '{heading}' in {path.name}"


@pytest.mark.parametrize("name", NAMES)
def test_options_exist(name: str) -> None:
    assert unknown_options((ROOT / name).read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("name", NAMES)
def test_files_exist(name: str) -> None:
    assert missing_files((ROOT / name).read_text(encoding="utf-8")) == []


def test_every_document_is_linked() -> None:
    linked = {path.resolve() for name in NAMES for path, _ in links(ROOT / name)}
    assert {p for p in DOCUMENTS if p.parent == ROOT / "docs"} <= linked


def test_every_planning_method_is_described() -> None:
    text = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    assert [method for method in get_args(PlanningMethod) if f"`{method}`" not in text] == []
    about = baselines.__doc__ or ""
    assert [method for method in baselines.BASELINES if f"{method}: " not in about] == []


def test_the_checks_see_faults(tmp_path: Path) -> None:
    assert unknown_options("`--modle x`, `--model`") == {"modle"}
    assert missing_files("`llmpq/nothing.py` and `llmpq/plan_data.py`") == ["llmpq/nothing.py"]
    page = tmp_path / "page.md"
    page.write_text("# Two words\n```\n# no heading\n```\n[a](gone.md) [b](#two-words)\n")
    assert [path.exists() for path, _ in links(page)] == [False, True]
    assert anchors(page) == {"two-words"}


def test_the_readme_runs_the_example_of_the_folder() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    shared = (ROOT / "examples" / "plan.py").read_text(encoding="utf-8").partition("for stage")[0]
    assert len(code) == 1 and code[0].startswith(shared)
