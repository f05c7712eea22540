"""What comes from outside has no power: code in models, texts for terminals, files of others."""

import ast
import io
import json
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from rich.table import Table

pytest.importorskip("torch")

from llmpq.artifact import write_json
from llmpq.cli import eval as eval_module
from llmpq.cli import export, main, plan, profile, run
from llmpq.cli.plain_console import PlainConsole
from llmpq.cli.progress import progress
from llmpq.model_spec import ASSETS, load_model_spec
from llmpq.plain import one_line, plain
from llmpq.plan import Plan
from llmpq.planner.report import styled

PACKAGE = Path(plan.__file__).parents[1]
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
HOSTILE = "[red]q[/red] \x1b[31m\x07a\rb\x9b1m\u202e\u2066:smile:"
SHOWN = r"[red]q[/red] \x1b[31m\x07a\x0db\x9b1m\u202e\u2066:smile:"
IN_PATHS = HOSTILE.replace("/", "|")  # a name of a file has no slash, so this lies in a folder [


# ---- texts for a terminal


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b\tc\nd", "a b\tc\nd"),
        ("naïve 模型 👩‍💻", "naïve 模型 👩‍💻"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x7f\x80\x9f\xa0", r"\x7f\x80\x9f" + "\xa0"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("bad \udc9b name", r"bad \udc9b name"),
    ],
)
def test_what_would_steer_a_terminal_is_spelled_out(text, shown):
    assert plain(text) == shown
    assert plain(shown) == shown


def test_a_text_from_elsewhere_cannot_begin_a_line():
    assert one_line("gpu0\nerror: all is lost\t!\x1b") == r"gpu0\x0aerror: all is lost\x09!\x1b"


def test_the_console_takes_texts_as_they_are(monkeypatch):
    monkeypatch.setattr("llmpq.cli.progress.SILENT_S", -1.0)
    file = io.StringIO()
    console = PlainConsole(file=file, width=200, force_terminal=True, color_system=None)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    for one in (HOSTILE, table, styled((HOSTILE, "bold"), HOSTILE), "[/b]"):
        console.print(one)
    with progress(console, HOSTILE, 3) as shown:
        shown.update(1, HOSTILE)
    ours = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", file.getvalue())  # rich's own, for the bar
    assert not STEERS.search(ours)
    assert ours.count(SHOWN) >= 8 and "[/b]" in ours


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """All that commands read, in a folder and with contents whose names would steer a terminal."""
    folder = tmp_path_factory.mktemp("x") / "d[" / f"b] {IN_PATHS}"
    folder.mkdir(parents=True)
    node = {"name": f"n{HOSTILE}", "devices": [{"type": "t4-16g", "count": 2}]}
    cluster = {"name": f"c{HOSTILE}", "nodes": [node]}
    work = {"prompt_tokens": 32, "new_tokens": 8, "num_requests": 16, "batch": 4}
    work["name"] = f"w{HOSTILE}"
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    (folder / "workload.yaml").write_text(yaml.safe_dump(work))
    (folder / "bad.yaml").write_text(yaml.safe_dump({f"k{HOSTILE}": 1, "name": [HOSTILE]}))
    prompts = [{"id": f"i{HOSTILE}", "prompt_token_ids": [5, 6], "max_new_tokens": 2}]
    (folder / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts))
    (folder / "bad.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts * 2))
    (folder / "bad.csv").write_text(f"id,{HOSTILE}\n1,2\n")
    (folder / "text.txt").write_text("Once upon a time. " * 100)
    shutil.copytree(ASSETS / "tiny-tales", folder / "model")
    spec = load_model_spec(str(folder / "model"))
    stage = {"rank": 0, "node": node["name"], "devices": ["t4-16g"], "first_layer": 0}
    stage |= {"end_layer": 8, "precisions": ["16"] * 8}
    made = {"model": spec.model_dump(), "workload": work, "cluster": cluster, "method": "hand"}
    made |= {"batch": 2, "prefill_micro_batch": 1, "decode_micro_batch": 2, "stages": [stage]}
    write_json(folder / "plan.json", Plan.model_validate(made))
    return folder


ASKED = "--workload D/workload.yaml --model D/model --time-limit 2"
PLAN = f"--cluster D/cluster.yaml {ASKED}"
RUN = "--plan D/plan.json --model D/model --device cpu --output D/out.jsonl"
WORK = [
    (plan.main, f"{PLAN} --no-what-if -o D/new.json --trace D/trace.json"),
    (plan.main, f"--compare-clusters D/cluster.yaml D/cluster.yaml {ASKED}"),
    (plan.main, f"{PLAN} --method flexgen"),
    (plan.main, "--evaluate D/plan.json"),
    (run.main, f"{RUN} --prompts D/in.jsonl --dry-run"),
    (run.main, f"{RUN} --prompts D/in.jsonl -v --report D/report.json --cache-dir D/cache"),
    (eval_module.main, "D/plan.json --model D/model --text D/text.txt --max-windows 1"),
    (profile.main, "devices --cluster-out D/new.yaml --force"),
    (
        profile.main,
        "layers --model D/model --device cpu --budget-s 1 --precisions 16 --type X -o D/p.json",
    ),
]
FAIL = [
    (plan.main, "--cluster D/bad.yaml --workload D/workload.yaml"),
    (plan.main, "--cluster D/none.yaml --workload D/workload.yaml"),
    (plan.main, f"{PLAN} --precisions X"),
    (plan.main, f"{PLAN} --profiles D/none"),
    (plan.main, "--method X"),
    (plan.main, "--X"),
    (run.main, f"{RUN} --prompts D/bad.jsonl"),
    (run.main, f"{RUN} --prompts D/bad.csv"),
    (run.main, f"{RUN} --prompts D/none"),
    (run.main, "--plan D/bad.yaml --prompts D/in.jsonl --output D/out.jsonl"),
    (run.main, "--seed X"),
    (eval_module.main, "D/none"),
    (eval_module.main, "--dataset X"),
    (eval_module.main, "--model X"),
    (profile.main, "layers --device X"),
    (profile.main, "sensitivity --model D/none"),
    (profile.main, "recalibrate --report D/bad.yaml -o D/new"),
    (profile.main, "links --cluster D/bad.yaml --write-cluster D/new.yaml"),
    (profile.main, "devices X"),
    (export.main, "X"),
    (main.main, "X"),
    (main.main, "plan --method X"),
]


def call(command, words: str, folder: Path) -> Result:
    values = {"D": str(folder), "X": HOSTILE}
    words = [re.sub("^(--)?([DX])(?=/|$)", lambda m: f"{m[1] or ''}{values[m[2]]}", word)
             for word in words.split()]  # fmt: skip
    return CliRunner().invoke(command, words)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("command", "words"), WORK)
def test_names_that_steer_a_terminal_do_not_hinder(hostile, command, words):
    result = call(command, words, hostile)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert not STEERS.search(result.stderr)
    assert r"\x1b[31m" in result.stderr or "--cache-dir" in words  # a run that names nothing


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("command", "words"), FAIL)
def test_names_that_steer_a_terminal_are_spelled_out_in_errors(hostile, command, words):
    result = call(command, words, hostile)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, result.stderr
    assert not STEERS.search(result.stderr)
    assert command is export.main or r"\x1b[31m" in result.stderr


@cache
def every_call() -> list[tuple[str, ast.Call]]:
    """All calls in the package, each with its module's path."""
    return [
        (str(path.relative_to(PACKAGE)), node)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]


def calls(*names: str) -> list[tuple[str, ast.Call]]:
    """Where the package calls what ends with one of these names."""
    return [(where, call) for where, call in every_call() if name_of(call) in names]


def name_of(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


# ---- code in models


EVIL = """
from pathlib import Path
Path({marker!r}).write_text("has run")
class Config: ...
class Model: ...
class Tokenizer: ...
"""
READS_MODELS = [
    (plan.main, "--cluster cluster.yaml --workload workload.yaml --no-what-if --model M"),
    (run.main, "--plan plan.json --prompts in.jsonl --output out.jsonl --model M"),
    (run.main, "--plan plan.json --prompts in.jsonl --output out.jsonl --model M --dry-run"),
    (eval_module.main, "plan.json --model M --text text.txt --max-windows 1"),
    (eval_module.main, "--precisions 8 --model M --text text.txt --max-windows 1 --stream"),
    (profile.main, "sensitivity --model M --text text.txt --precisions 8 --max-windows 1"),
    (profile.main, "layers --model M --device cpu --budget-s 1 --precisions 16 -o p.json"),
]


@pytest.fixture
def with_code(hostile, tmp_path, monkeypatch) -> Path:
    """A folder with a model whose files name code beside them, which leaves a mark when it runs."""
    monkeypatch.chdir(tmp_path)
    for path in hostile.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    model = tmp_path / "M"
    shutil.copytree(ASSETS / "tiny-tales", model)
    (model / "evil.py").write_text(EVIL.format(marker=str(tmp_path / "marker")))
    change(model / "config.json", auto_map={
        "AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"
    }, attn_implementation="evil/kernels")  # fmt: skip
    return model


def change(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("names_tokenizer", [False, True])
@pytest.mark.parametrize(("command", "words"), READS_MODELS)
def test_the_code_of_a_model_never_runs(with_code, command, words, names_tokenizer):
    """Nor is anybody asked; where nothing else is needed the command works without."""
    if names_tokenizer:
        names = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
        change(with_code / "tokenizer_config.json", auto_map=names, tokenizer_class="Evil")
    result = CliRunner().invoke(command, words.split(), input="y\n" * 9)
    assert not (with_code.parent / "marker").exists()
    assert "[y/N]" not in result.output
    if result.exit_code:
        assert names_tokenizer and result.exit_code == 2, (result.stderr, result.exception)
        (line,) = [one for one in result.stderr.splitlines() if one.startswith("error:")]
        assert "M/tokenizer_config.json: the tokenizer asks for Python code" in line


def test_a_model_of_a_type_of_its_own_is_refused(with_code):
    change(with_code / "config.json", model_type="evil")
    for command, words in READS_MODELS:
        result = CliRunner().invoke(command, words.split(), input="y\n" * 9)
        assert result.exit_code == 2, (words, result.stderr, result.exception)
        assert "evil" in result.stderr and "[y/N]" not in result.output
    assert not (with_code.parent / "marker").exists()


# What can run code of models or data sets unless it is told not to; a longer list does no harm.
TOLD = {
    "from_pretrained",
    "from_config",
    "load_dataset",
    "load_dataset_builder",
    "get_dataset_config_names",
    "HFLM",
}


def untold(code: str) -> list[str]:
    """Uses of those names that do not say `trust_remote_code=False`, by line."""
    tree = ast.parse(code)
    uses = [n for n in ast.walk(tree) if getattr(n, "attr", getattr(n, "id", "")) in TOLD]
    told = {
        id(part)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and any(ast.unparse(k) == "trust_remote_code=False" for k in call.keywords)
        for part in (call.func, *(call.args if name_of(call) == "partial" else ()))
    }
    return [f"{use.lineno}: {ast.unparse(use)}" for use in uses if id(use) not in told]


def test_every_library_is_told_not_to_run_code():
    for path in PACKAGE.rglob("*.py"):
        assert untold(path.read_text(encoding="utf-8")) == [], path
    for code in ("A.from_pretrained(p)", "load_dataset(n, trust_remote_code=x)", "f = load_dataset",
                 "partial(load_dataset, 1)", "HFLM(trust_remote_code=None)"):  # fmt: skip
        assert untold(code), code
    assert not untold("partial(load_dataset, trust_remote_code=False)")


# ---- one way out


def test_there_is_one_way_to_print():
    """What is printed by another call does not pass `plain`."""
    places = {name: {where for where, _ in calls(name)} for name in ("Console", "Text", "echo")}
    places["print"] = {w for w, c in calls("print") if isinstance(c.func, ast.Name)}
    assert places == {
        "Console": set(),
        "Text": set(),
        "echo": {"cli/common.py"},
        "print": {"models/count.py", "runtime/judge.py"},  # of counts; for a parent that reads it
    }
    marked = [c for _, c in calls("print", "TextColumn") for k in c.keywords if k.arg == "markup"]
    assert all(ast.unparse(call).endswith("markup=False)") for call in marked)
