"""What is written is neither read nor written as something else, by whatever name it goes."""

import json
import os
import shutil
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from llmpq.artifact import write_json
from llmpq.cli import eval as eval_module
from llmpq.cli import plan, profile, run
from llmpq.cli.options import FiniteRange
from llmpq.cli.paths import check_files, model_files
from llmpq.errors import UserError
from llmpq.model_lookup import load_model_spec
from llmpq.model_spec import ASSETS
from llmpq.plan_data import Plan

CLUSTER = {"name": "lab", "nodes": [{"name": "node0", "devices": [{"type": "t4-16g", "count": 2}]}]}
WORKLOAD = {"prompt_tokens": 32, "new_tokens": 8, "num_requests": 16, "batch": 4}
STAGE = {"rank": 0, "node": "node0", "devices": ["t4-16g"], "first_layer": 0, "end_layer": 8}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that the commands read."""
    monkeypatch.chdir(tmp_path)
    Path("cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    Path("workload.yaml").write_text(yaml.safe_dump(WORKLOAD))
    Path("text.txt").write_text("Once upon a time. " * 500)
    Path("in.jsonl").write_text('{"id": 1, "prompt_token_ids": [5, 6]}\n')
    shutil.copytree(ASSETS / "tiny-tales", "model")
    spec = load_model_spec("model")
    made = {"model": spec.model_dump(), "workload": WORKLOAD, "cluster": CLUSTER, "method": "hand"}
    made |= {"batch": 2, "prefill_micro_batch": 1, "decode_micro_batch": 2}
    write_json(
        Path("plan.json"),
        Plan.model_validate(made | {"stages": [STAGE | {"precisions": ["16"] * 8}]}),
    )
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def call(command: click.Command, words: str) -> Result:
    return CliRunner().invoke(command, words.split())


# ---- one file by several names


def same(folder: Path, first: str, second: str) -> bool:
    try:
        check_files([("--in", folder / first)], [("--out", folder / second)])
    except UserError as error:
        assert "--out" in str(error) and "--in" in str(error)
        with pytest.raises(UserError, match="named twice"):
            check_files([], [("-a", folder / first), ("-b", folder / second)])
        return True
    check_files([], [("-a", folder / first), ("-b", folder / second)])
    return False


def test_a_file_is_known_by_all_its_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "link").symlink_to("a.json")
    (tmp_path / "far").symlink_to(tmp_path / "sub")
    (tmp_path / "dangling").symlink_to("new.json")
    os.link(tmp_path / "a.json", tmp_path / "hard.json")
    for name in ("a.json", "link", "hard.json", "sub/../a.json", "far/../a.json", "./a.json"):
        assert same(tmp_path, "a.json", name), name
    assert same(tmp_path, "new.json", "dangling")
    assert same(tmp_path, "new.json", "sub/../new.json")
    assert same(tmp_path, "sub/x.json", "far/x.json")
    assert same(tmp_path, "new.json", "NEW.json")  # one file where the disk knows no case
    assert same(tmp_path, "caf\u00e9.json", "cafe\u0301.json")
    assert not same(tmp_path, "a.json", "other.json")
    assert not same(tmp_path, "a.json", "new.json")
    (tmp_path / "A.json").write_text("a file of its own")
    assert same(tmp_path, "a.json", "A.json") == os.path.samefile(
        tmp_path / "a.json", tmp_path / "A.json"
    )


def test_devices_take_several_outputs_and_standard_output_one(tmp_path):
    check_files([], [("-a", Path("/dev/null")), ("-b", Path("/dev/null")), ("-c", None)])
    check_files([("--in", tmp_path / "-")], [("-a", Path("-")), ("-b", tmp_path / "b")])
    with pytest.raises(UserError, match="named twice"):
        check_files([], [("--json", Path("-")), ("--output", Path("-"))])


def test_what_a_model_is_made_of(folder):
    names = {Path(str(path)).name for _, path in model_files("model")}
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    assert wanted <= names and "README.md" not in names
    assert [*model_files("model/config.json")] == [("--model", Path("model/config.json"))]
    assert [*model_files("owner/name")] == [*model_files(None)] == []


def test_an_output_without_a_place(folder):
    loop = folder / "loop"
    loop.symlink_to(loop)
    places = [None, Path("-"), folder / "new" / "a.json", folder / "plan.json"]
    check_files([], [("--out", path) for path in places])
    for path in (folder, folder / "plan.json" / "x", loop / "x"):
        with pytest.raises(UserError, match="cannot be written"):
            check_files([], [("--out", path)])


# ---- every command

QUESTION = "--cluster cluster.yaml --workload workload.yaml"
PLAN = f"{QUESTION} --no-compare --no-what-if"
RUN = "--plan plan.json --prompts in.jsonl --model model --device cpu"
CASES = [
    (plan.main, f"{PLAN} -o cluster.yaml"),
    (plan.main, f"{PLAN} -o p.json --json ./p.json"),
    (plan.main, f"{PLAN} --json workload.yaml"),
    (plan.main, f"{PLAN} --model model -o model/config.json"),
    (plan.main, f"{PLAN} --trace t.json -o T.json"),
    (plan.main, "--evaluate plan.json --json plan.json"),
    (plan.main, f"{PLAN} --profiles profiles -o profiles/t4.json"),
    (plan.main, "--cluster cluster.yaml --workload traced.yaml -o trace.csv"),
    (
        plan.main,
        "--cluster cluster.yaml --workload workload.yaml --baseline-plans . -o uniform.json",
    ),
    (run.main, f"{RUN} --output in.jsonl"),
    (run.main, f"{RUN} --output out.jsonl --report out.jsonl"),
    (run.main, f"{RUN} --output out.jsonl --report plan.json"),
    (run.main, f"{RUN} --output out.jsonl --trace out.jsonl.journal"),
    (run.main, f"{RUN} --output out.jsonl --json out.jsonl.old"),
    (run.main, f"{RUN} --output out.jsonl --report out.jsonl.broken"),
    (run.main, f"{RUN} --output out.jsonl --report out.jsonl.aside"),
    (run.main, f"{RUN} --output out.jsonl --report r.json --trace r.json"),
    (run.main, f"{RUN} --output model/model.safetensors"),
    (run.main, f"{RUN} --output out.jsonl --report model/tokenizer.json"),
    (run.main, f"{RUN} --output linked"),
    (run.main, f"{RUN} --output hard"),
    (run.main, f"{RUN} --output sub/../in.jsonl"),
    (run.main, f"{RUN} --output IN.jsonl"),
    (run.main, f"{RUN} --output out.jsonl --check-quality --check-text text.txt --json text.txt"),
    (run.main, "--plan plan.json --model model --prompts x.journal --output x"),
    (run.main, "--plan plan.json --model model --prompts x.old --output x"),
    (eval_module.main, "plan.json --model model --text text.txt --json plan.json"),
    (eval_module.main, "--model model --text text.txt --json text.txt"),
    (profile.main, "layers --model model -o model/config.json"),
    (profile.main, "layers --model model -o p.json --json p.json.partial"),
    (profile.main, "links --cluster cluster.yaml --write-cluster cluster.yaml"),
    (profile.main, "links -o l.json --json l.json"),
    (profile.main, "sensitivity --model model --text text.txt -o text.txt"),
    (profile.main, "sensitivity --model model -o s.json --moments s.json"),
    (profile.main, "sensitivity --model model -o s.json --json s.moments.safetensors"),
    (profile.main, "devices --cluster-out c.yaml --json c.yaml"),
]


@pytest.mark.parametrize(("command", "words"), CASES, ids=[words for _, words in CASES])
def test_nothing_is_written_over_what_is_read_or_written(folder, command, words):
    Path("linked").symlink_to("in.jsonl")
    os.link("in.jsonl", "hard")
    Path("sub").mkdir()
    for name in ("x.journal", "x.old"):
        shutil.copy("in.jsonl", name)
    Path("profiles").mkdir()
    Path("profiles/t4.json").write_text('{"kind": "profile"}')
    Path("trace.csv").write_text("tokens\n5\n")
    traced = WORKLOAD | {"prompt_tokens": {"trace": "trace.csv", "column": "tokens"}}
    Path("traced.yaml").write_text(yaml.safe_dump(traced))
    before = contents(folder)
    result = call(command, words)
    assert result.exit_code == 2, (result.stderr, result.exception)
    assert "would be overwritten" in result.stderr or "named twice" in result.stderr, result.stderr
    assert contents(folder) == before


def test_a_plan_may_lie_beside_profiles(folder):
    Path("profiles").mkdir()
    Path("profiles/plan.json").write_text(json.dumps({"kind": "plan"}))
    result = call(plan.main, f"{PLAN} --profiles profiles -o profiles/plan.json")
    assert "would be overwritten" not in result.stderr


# ---- numbers that are none


def options_of(command: click.Command) -> list[tuple[str, click.Parameter]]:
    if isinstance(command, click.Group):
        return [pair for one in command.commands.values() for pair in options_of(one)]
    return [(str(command.name), parameter) for parameter in command.params]


EVERY = [
    pair
    for main in (plan.main, run.main, eval_module.main, profile.main)
    for pair in options_of(main)
]
FLOATS = [(name, p) for name, p in EVERY if isinstance(p.type, click.types.FloatParamType)]


def test_there_are_numbers_to_test():
    assert len(FLOATS) >= 9


@pytest.mark.parametrize(
    ("name", "parameter"), FLOATS, ids=[f"{name} {p.name}" for name, p in FLOATS]
)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "NaN", "1e999"])
def test_no_option_takes_what_is_no_finite_number(name, parameter, value):
    assert isinstance(parameter.type, FiniteRange)
    with pytest.raises(click.BadParameter):
        parameter.type.convert(value, parameter, None)


@pytest.mark.parametrize("words", ["--temperature nan", "--temperature inf", "--top-p nan"])
def test_odd_numbers_end_with_2(folder, words):
    result = call(run.main, f"{RUN} --output out.jsonl {words}")
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    assert not Path("out.jsonl").exists()


# ---- a launcher that is none


@pytest.mark.parametrize("variables", [{"RANK": "abc"}, {"RANK": "5"}, {"WORLD_SIZE": "many"}, {}])
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (run.main, f"{RUN} --output out.jsonl"),
        (run.main, f"{RUN} --output out.jsonl --dry-run"),
        (eval_module.main, "plan.json --model model --max-windows 1"),
        (profile.main, "links --device cpu"),
    ],
)
def test_odd_variables_of_a_launcher_end_with_2(folder, monkeypatch, variables, command, words):
    for name, value in ({"RANK": "0", "WORLD_SIZE": "2"} | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    result = call(command, words)
    if not variables and "--dry-run" in words:
        assert result.exit_code == 0, result.stderr  # which starts nothing
        return
    assert result.exit_code == 2, (result.stderr, result.exception)
    assert "Traceback" not in result.stderr and "error: " in result.stderr
