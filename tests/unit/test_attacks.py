"""What comes from outside has no power: code in models, texts for terminals, files of others."""

import ast
import io
import json
import logging
import os
import re
import shutil
from dataclasses import asdict
from functools import cache
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner, Result
from rich.table import Table

pytest.importorskip("torch")

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save
from test_packed_cache import CPU, assert_equal, load, packed_files

from llmpq.artifact import write_json, write_text
from llmpq.checkpoint.calibration_file import write_calibration
from llmpq.checkpoint.packed_cache import PackedCache, _about
from llmpq.cli import eval as eval_module
from llmpq.cli import export, main, plan, profile, run
from llmpq.cli.common import Command
from llmpq.errors import UserError, WorkerError
from llmpq.model_lookup import load_model_spec
from llmpq.model_spec import ASSETS
from llmpq.placement import FoundCard
from llmpq.plain import plain, plain_line
from llmpq.plan_data import Plan
from llmpq.quant import available_precisions
from llmpq.quant.humming_jit import keep_kernels_in
from llmpq.reliability.append_file import AppendFile
from llmpq.reliability.monitor import (
    MOST_BYTES,
    MOST_CHARACTERS,
    Board,
    Verdict,
    WorkerIdentity,
)
from llmpq.render.console import PlainConsole
from llmpq.render.plan_report import styled
from llmpq.render.progress import progress
from llmpq.runtime import process
from llmpq.runtime.cards import read_process
from llmpq.seats import Process

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
    assert plain_line("gpu0\nerror: all is lost\t!\x1b") == r"gpu0\x0aerror: all is lost\x09!\x1b"


def test_the_console_takes_texts_as_they_are(monkeypatch):
    monkeypatch.setattr("llmpq.render.progress.SILENT_S", -1.0)
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


def test_what_libraries_log_is_plain(caplog):
    @click.command(cls=Command)
    def noisy():
        logging.getLogger("a.library").warning("%s cannot be read", HOSTILE)

    assert CliRunner().invoke(noisy, []).exit_code == 0
    assert caplog.messages == [f"{SHOWN} cannot be read"]
    assert logging.getLogRecordFactory() is logging.LogRecord


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
    told = result.stdout + result.stderr
    assert not STEERS.search(told)
    assert r"\x1b[31m" in told or "--cache-dir" in words  # a run that names nothing


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
        assert "M/tokenizer_config.json: the tokenizer needs Python code" in line


def test_a_model_of_a_type_of_its_own_is_refused(with_code):
    change(with_code / "config.json", model_type="evil")
    for command, words in READS_MODELS[:2]:
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


# ---- files of others


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask):
    made = tmp_path / "made"
    before = os.umask(umask)
    try:
        write_text(made / "a.json", "{}")
        AppendFile(made / "b.jsonl").close()
        write_calibration(made / "c.safetensors", {"k": torch.eye(8)[None]}, {"w": "k"}, {})
        load(ASSETS / "tiny-tales", tmp_path / "cache")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in made.iterdir()}
    assert modes == dict.fromkeys(["a.json", "b.jsonl", "c.safetensors"], 0o666 & ~umask)
    assert made.stat().st_mode & 0o777 == 0o777 & ~umask
    kept = {path.stat().st_mode & 0o777 for path in (tmp_path / "cache").iterdir()}
    assert kept == {0o644 & ~umask}  # what is trusted later is open to no group
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o755 & ~umask


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    path = tmp_path / "a.json"
    path.touch(0o600)
    write_text(path, "{}")
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


@pytest.fixture
def cache(tmp_path) -> Path:
    """Kept weights of the shipped model, and a folder as that of compiled kernels."""
    folder = tmp_path / "cache"
    load(ASSETS / "tiny-tales", folder)
    (folder / "humming").mkdir()
    (folder / "humming" / "kernel.cubin").touch(0o644)
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o022)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        PackedCache(folder, "", "rtn", print)
    return str(caught.value)


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
@pytest.mark.parametrize("place", [".", "humming"])
def test_a_cache_that_others_can_write_to_is_refused(cache, place, mode):
    (cache / place).chmod(mode)
    message = refusal(cache)
    assert message.startswith(f"{cache / place}: has mode {mode:04o} and belongs to ")
    assert f"chmod -R go-w {cache}" in message and "--cache-dir DIR" in message
    link = cache.with_name("link")
    link.symlink_to(cache)
    assert refusal(link).startswith(str(link / place))


@pytest.mark.parametrize("name", ["*.safetensors", "*.sha256", "humming/kernel.cubin"])
def test_a_kept_file_that_others_can_write_to_is_refused(cache, name):
    path = sorted(cache.glob(name))[-1]
    path.chmod(0o664)
    assert refusal(cache).startswith(f"{path}: has mode 0664")


def test_what_others_cannot_reach_is_not_theirs(cache):
    (cache / "humming" / "kernel.cubin").chmod(0o666)
    (cache / "humming").chmod(0o700)
    PackedCache(cache, "", "rtn", print)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", [".", "*.safetensors"])
def test_a_cache_of_another_user_is_refused(cache, name):
    path = cache if name == "." else sorted(cache.glob(name))[0]
    os.chown(path, 54321, -1)
    message = refusal(cache)
    assert str(path) in message and "user 54321" in message and "chmod" not in message


def test_compiled_kernels_lie_where_nobody_else_comes(tmp_path, monkeypatch):
    for name in ("HUMMING_CACHE_DIR", "HUMMING_TMP_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    keep_kernels_in(tmp_path)
    assert (tmp_path / "humming").stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("HUMMING_CACHE_DIR")
    (tmp_path / "humming").chmod(0o777)
    with pytest.raises(UserError, match="has mode 0777"):
        keep_kernels_in(tmp_path)
    (tmp_path / "humming").rmdir()
    (tmp_path / "humming").touch()
    with pytest.raises(UserError, match="kernels cannot be kept here"):
        keep_kernels_in(tmp_path)


def test_a_run_refuses_such_a_cache_with_one_message(with_code, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    words = "--plan plan.json --prompts in.jsonl --output out.jsonl --model M --cache-dir cache"
    result = CliRunner().invoke(run.main, words.split())
    assert result.exit_code == 2, (result.stderr, result.exception)
    (line,) = [one for one in result.stderr.splitlines() if one.startswith("error:")]
    assert line.startswith("error: cache: has mode 0777 and belongs to ")


def renamed(state):
    return {f"{name}x": tensor for name, tensor in state.items()}


def longer(state):
    return {name: torch.cat([tensor, tensor]) for name, tensor in state.items()}


def of_other_types(state):
    return {name: tensor.to(torch.float64) for name, tensor in state.items()}


def with_more(state):
    return state | {"more": torch.zeros(3)}


def with_none(state):
    return {}


@pytest.mark.parametrize("change", [renamed, longer, of_other_types, with_more, with_none])
@pytest.mark.parametrize("precisions", [("4", "3"), ("8", "8-w8a8")])
def test_kept_tensors_that_do_not_fit_are_made_anew(tmp_path, change, precisions):
    """Though the file's own sums are right."""
    model, folder = ASSETS / "tiny-tales", tmp_path / "cache"
    if not set(precisions) <= set(available_precisions(CPU, torch.bfloat16)):
        pytest.skip("these precisions are not available here")
    first, _, _ = load(model, folder, precisions)
    for path in packed_files(folder):
        with safe_open(path, framework="pt") as file:
            recipe = json.loads(file.metadata()["about"])
        recipe.pop("packed_sha256")
        state = change(load_file(path))
        path.write_bytes(save(state, _about(recipe, state)))
    second, _, said = load(model, folder, precisions)
    assert len(said) == len(packed_files(folder))
    assert all("its tensors are not those of this layer" in line for line in said)
    assert_equal(first, second)
    assert load(model, folder, precisions)[2] == []


def test_a_link_among_kept_weights_is_not_followed(cache, tmp_path):
    first, _, _ = load(ASSETS / "tiny-tales", cache)
    path, elsewhere = packed_files(cache)[0], tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    second, _, said = load(ASSETS / "tiny-tales", cache)
    assert [line for line in said if "it is not a regular file" in line] == said != []
    assert_equal(first, second)
    assert not path.is_symlink() and elsewhere.read_bytes() == before


# ---- what others write to the store


class Store:
    """A store in which anyone may have written; `text` is under every key."""

    def __init__(self, text: str | bytes) -> None:
        self.text = text if isinstance(text, bytes) else text.encode()

    def check(self, keys):
        return True

    def get(self, key):
        return self.text

    def compare_set(self, key, expected, desired):
        return self.text


WHO = {"rank": 1, "name": "t4", "host": "box", "pid": 4711, "machine": "m", "started": 5}
GUILTY = {"ranks": [1], "how": "was lost", "bad_input": False, "device_lost": False}
DAMAGED = ["", "{", "null", "[]", "7", '"x"', b"\xff\xfe", '{"rank": 1}', "[" * 100_000]


def changed(value: dict[str, object], **parts: object) -> str:
    return json.dumps(value | parts)


@pytest.mark.parametrize(
    "text",
    [
        *DAMAGED,
        changed(WHO, rank=0),
        changed(WHO, rank="1"),
        changed(WHO, pid=-1),
        changed(WHO, pid="4711"),
        changed(WHO, pid=1.5),
        changed(WHO, name=None),
        changed(WHO, host=["box"]),
        changed(WHO, started=True),
        changed(WHO, name="x" * MOST_BYTES),
    ],
)
def test_a_worker_that_is_not_described_as_workers_are_is_not_there(text):
    assert Board(Store(text), 2).who(1) is None


@pytest.mark.parametrize(
    "text",
    [
        *DAMAGED,
        changed(GUILTY, ranks=[]),
        changed(GUILTY, ranks=[2]),
        changed(GUILTY, ranks=[-1]),
        changed(GUILTY, ranks=["1"]),
        changed(GUILTY, ranks=1),
        changed(GUILTY, how=7),
        changed(GUILTY, bad_input="yes"),
        changed(GUILTY, how="x" * MOST_BYTES),
    ],
)
def test_a_verdict_that_is_none_keeps_nobody_from_a_verdict(text):
    board, own = Board(Store(text), 2), Verdict((1,), "was lost")
    assert board.verdict() is None
    assert board.conclude(own) == own


def test_texts_of_the_store_are_short_and_in_one_line():
    board = Board(Store(changed(WHO, name=f"{HOSTILE}\nerror: no", host="h" * 9999)), 2)
    text = str(board.who(1))
    assert not STEERS.search(text) and "\n" not in text and SHOWN in text
    assert len(text) < MOST_CHARACTERS + 200
    verdict = Board(Store(changed(GUILTY, how="\x1b[2J\n" * 999)), 2).verdict()
    assert verdict is not None and verdict.how.startswith(r"\x1b[2J\x0a\x1b")
    assert "\n" not in verdict.how
    assert Board(Store(changed(WHO)), 2).who(1) == WorkerIdentity(**WHO)


def test_what_workers_tell_is_read_as_it_was(monkeypatch):
    board, who = Board(dist.HashStore(), 2), WorkerIdentity.here(1, "t4-16g on node0")
    board.join(who)
    board.conclude(Verdict((0, 1), "was lost", True, True))
    assert board.who(1) == who and board.who(0) is None
    assert board.verdict() == Verdict((0, 1), "was lost", True, True)


def test_a_parent_whose_store_breaks_says_so(monkeypatch):
    """As it does when others write what is no number where a beat should be."""

    def broken(crew):
        raise dist.DistNetworkError("the connection was closed")

    monkeypatch.setattr(process._WorkerProcesses, "watch", broken)
    with pytest.raises(WorkerError, match="store failed: the connection was closed; redo"):
        process.start_workers([], ["a"], "this", "redo")


PROCESS = {"rank": 1, "group": 0, "host": "box", "cards": [], "everywhere": []}
CARD = {"index": 0, "name": "T4", "memory_bytes": 1, "compute_capability": "7.5", "uuid": "u"}


@pytest.mark.parametrize(
    "text",
    [
        *DAMAGED,
        changed(PROCESS, rank=0),
        changed(PROCESS, group="0"),
        changed(PROCESS, host="\x1b[2J"),
        changed(PROCESS, host="box\nerror: no"),
        changed(PROCESS, cards=None),
        changed(PROCESS, cards=[CARD | {"memory_bytes": "much"}]),
        changed(PROCESS, cards=[CARD | {"name": "\u202eT4"}]),
        changed(PROCESS, everywhere=[CARD | {"uuid": "a\rb"}]),
    ],
)
def test_a_process_that_does_not_describe_itself_ends_the_run_in_order(text):
    with pytest.raises(WorkerError, match="rank 1: the description of its host"):
        read_process(text if isinstance(text, bytes) else text.encode(), 1)


def test_a_process_is_read_as_it_was():
    card = FoundCard(**CARD)
    one = Process(1, 0, "box", (card,), (card, card))
    assert read_process(json.dumps(asdict(one)).encode(), 1) == one


# ---- one way out


def test_there_is_one_way_to_print():
    """What is printed by another call does not pass `plain`."""
    places = {name: {where for where, _ in calls(name)} for name in ("Console", "Text", "echo")}
    places["print"] = {w for w, c in calls("print") if isinstance(c.func, ast.Name)}
    assert places == {
        "Console": set(),
        "Text": set(),
        "echo": {"cli/common.py"},
        # of counts; for a parent that reads it
        "print": {"models/count_families.py", "evaluation/judge.py", "export/batch.py"},
    }
    marked = [c for _, c in calls("print", "TextColumn") for k in c.keywords if k.arg == "markup"]
    assert all(ast.unparse(call).endswith("markup=False)") for call in marked)
