"""Whatever lies under the name of an input, every command ends at once, with 2 and one message."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

pytest.importorskip("torch")

from safetensors.torch import load_file

from llmpq.artifact import write_json
from llmpq.cli import eval as eval_module
from llmpq.cli import plan, profile, run
from llmpq.model_lookup import load_model_spec
from llmpq.model_spec import ASSETS
from llmpq.plan_data import Plan

CLUSTER = {"name": "lab", "nodes": [{"name": "node0", "devices": [{"type": "t4-16g", "count": 2}]}]}
WORKLOAD = {"prompt_tokens": 32, "new_tokens": 8, "num_requests": 16, "batch": 4}
STAGE = {"rank": 0, "node": "node0", "devices": ["t4-16g"], "first_layer": 0, "end_layer": 8}

PLAN = "--cluster cluster.yaml --workload workload.yaml --no-compare --no-what-if"
RUN = "--plan plan.json --prompts in.jsonl --model model --device cpu --output out.jsonl"
INPUTS = [
    *((plan.main, f"{PLAN} --{name} ODD") for name in ("cluster", "workload", "sensitivity")),
    *((plan.main, f"{PLAN} --{name} ODD") for name in ("model", "profiles")),
    (plan.main, "--evaluate ODD"),
    (plan.main, "--compare-clusters cluster.yaml ODD --workload workload.yaml --model model"),
    *((run.main, f"{RUN} --{name} ODD") for name in ("plan", "prompts", "model", "moments")),
    (run.main, f"{RUN} --check-quality --check-text ODD"),
    *((run.main, f"{RUN} --dry-run --{name} ODD") for name in ("plan", "prompts")),
    (eval_module.main, "ODD --model model"),
    (eval_module.main, "plan.json --model ODD"),
    (eval_module.main, "plan.json --model model --text ODD"),
    (eval_module.main, "--model model --precisions 8 --quantizer gptq --moments ODD"),
    (eval_module.main, "--model model --dataset ptb --data ODD"),
    (profile.main, "layers --model ODD -o p.json"),
    (profile.main, "layers --model model --extend -o ODD --budget-s 1"),
    (profile.main, "sensitivity --model ODD"),
    (profile.main, "sensitivity --model model --text ODD"),
    (profile.main, "sensitivity --model model --moments ODD"),
    (profile.main, "links --cluster ODD --write-cluster new.yaml"),
    (profile.main, "recalibrate --report ODD -o new"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that the commands read."""
    monkeypatch.chdir(tmp_path)
    Path("cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    Path("workload.yaml").write_text(yaml.safe_dump(WORKLOAD))
    Path("in.jsonl").write_text('{"id": 1, "prompt_token_ids": [5, 6]}\n')
    shutil.copytree(ASSETS / "tiny-tales", "model")
    spec = load_model_spec("model")
    made = {"model": spec.model_dump(), "workload": WORKLOAD, "cluster": CLUSTER, "method": "hand"}
    made |= {"batch": 2, "prefill_micro_batch": 1, "decode_micro_batch": 2}
    made |= {"stages": [STAGE | {"precisions": ["16"] * 8}]}
    write_json(Path("plan.json"), Plan.model_validate(made))
    return tmp_path


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def huge(path: Path) -> None:
    """A hole: nothing of it is on the disk."""
    with path.open("wb") as file:
        file.truncate(1 << 42)


def folder_of_nothing(path: Path) -> None:
    path.mkdir()


def end(command: click.Command, words: str) -> str:
    """The one message of a command that must end with 2."""
    result = CliRunner().invoke(command, words.split())
    assert isinstance(result.exception, SystemExit), (words, result.exception)
    assert result.exit_code == 2, (words, result.stderr)
    assert "Traceback" not in result.stderr
    return result.stderr


def odd_places() -> list[tuple[click.Command, str, Callable[[Path], None]]]:
    """Every input with every odd thing in its place; a folder where none is asked for."""
    wants_folder = ("--profiles", "--data ", "-o ODD")
    makes = (pipe, device, loop, folder_of_nothing)
    return [
        (command, words, make)
        for command, words in INPUTS
        for make in makes
        if make is not folder_of_nothing or not any(word in words for word in wants_folder)
    ]


@pytest.mark.parametrize(("command", "words", "make"), odd_places())
def test_what_is_no_regular_file(folder, command, words, make):
    make(folder / "ODD")
    message = end(command, words)
    assert "ODD" in message, message
    assert not list(folder.glob("out.jsonl*"))


@pytest.mark.parametrize(
    ("command", "words"),
    [(c, w) for c, w in INPUTS if "ODD" in w and "--prompts ODD" not in w and "moments" not in w],
    ids=[w for _, w in INPUTS if "--prompts ODD" not in w and "moments" not in w],
)
def test_what_is_far_too_large(folder, command, words):
    huge(folder / "ODD")
    assert "ODD" in end(command, words)


def test_a_text_in_place_of_a_name(folder):
    """Longer than a name of a file may be."""
    message = end(plan.main, f"{PLAN} --model {'x' * 3000}")
    assert "xxx" in message and "too long" in message and len(message) < 300


# ---- values of the wrong sort, in every file


def odd_files() -> list[tuple[str, str, str, str]]:
    """File, what is replaced in it, by what, and the line of that."""
    return [
        ("cluster.yaml", "count: 2", "count: '2'", "4"),
        ("cluster.yaml", "count: 2", "count: true", "4"),
        ("cluster.yaml", "count: 2", "count: 2\n    count: 3", "5"),
        ("cluster.yaml", "name: lab", "name: lab\nname: other", ""),
        ("workload.yaml", "batch: 4", "batch: '4'", "1"),
        ("workload.yaml", "batch: 4", f"batch: {10**30}", "1"),
        ("workload.yaml", "new_tokens: 8", "new_tokens: true", "2"),
        ("workload.yaml", "new_tokens: 8", "new_tokens: 8\nnew_tokens: 9", "3"),
        ("workload.yaml", "prompt_tokens: 32", "prompt_tokens: {min: '1', max: 3}", "4"),
        ("workload.yaml", "prompt_tokens: 32", "prompt_tokens: [1, '2']", "4"),
        ("plan.json", '"batch": 2,', '"batch": "2",', ""),
        ("plan.json", '"batch": 2,', '"batch": 2, "batch": 3,', ""),
        ("plan.json", '"tensor_parallel": 1,', '"tensor_parallel": true,', ""),
    ]


@pytest.mark.parametrize(("name", "old", "new", "line"), odd_files())
def test_a_value_of_the_wrong_sort_is_named_with_its_line(folder, name, old, new, line):
    text = Path(name).read_text()
    assert text.count(old) == 1
    Path(name).write_text(text.replace(old, new))
    command, words = (run.main, RUN) if name == "plan.json" else (plan.main, PLAN)
    message = end(command, words)
    found = message.partition(f"{name}:")[2].partition(":")[0]
    assert found.isdigit() and (not line or found == line), message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", "8"),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 2**62),
        ("vocab_size", 2**31),
        ("vocab_size", 1536.5),
        ("tie_word_embeddings", "false"),
        ("tie_word_embeddings", 1),
        ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", -1e-5),
        ("initializer_range", float("nan")),
        ("rope_theta", 0),
    ],
)
def test_a_configuration_with_values_of_the_wrong_sort(folder, key, value):
    path = Path("model/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert f"'{key}'" in end(plan.main, f"{PLAN} --model model")


@pytest.mark.parametrize("value", ["2", [1, "2"], 2.5, True, {"a": 1}])
def test_odd_end_tokens_of_a_model(folder, value):
    Path("model/generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert "eos_token_id" in end(run.main, RUN)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\0\0"])
def test_odd_files_of_a_model(folder, name, content):
    Path("model", name).write_text(content)
    assert "model" in end(run.main, RUN)


SIZES = "--device cpu --window 16 --max-windows 1"
TIMES = "--device cpu --threads 1 --budget-s 1 --precisions 16 --prompt-tokens 8 --past-tokens 8"
TIMES += " --prefill-micro-batches 1 --decode-micro-batches 1"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (run.main, f"{RUN} --check-quality --check-windows 1"),
        (eval_module.main, f"--model model --precisions 8 {SIZES}"),
        (eval_module.main, f"plan.json --model model --stream {SIZES}"),
        (profile.main, f"layers --model model {TIMES} -o p.json"),
        (
            profile.main,
            f"sensitivity --model model --precisions 16,8 --quantizer rtn {SIZES} -o s.json",
        ),
    ],
    ids=["run", "eval", "eval --stream", "layers", "sensitivity"],
)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_in_every_file_of_a_model(folder, monkeypatch, command, words, encoding):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    weights = folder / "model/model.safetensors"
    names = load_file(weights)
    weights.rename(folder / "model/one.safetensors")
    index = {"weight_map": dict.fromkeys(names, "one.safetensors")}
    (folder / "model/model.safetensors.index.json").write_text(json.dumps(index))
    for path in folder.glob("model/*.json"):
        path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    result = CliRunner().invoke(command, words.split())
    assert result.exit_code == 0, (result.stderr, result.exception)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_in_every_input(folder, encoding):
    names = ["cluster.yaml", "workload.yaml", "plan.json", "in.jsonl"]
    names += ["model/generation_config.json", "model/tokenizer_config.json", "model/tokenizer.json"]
    for name in names:
        Path(name).write_bytes(Path(name).read_text().encode(encoding))
    for command, words in ((plan.main, PLAN), (run.main, RUN)):
        result = CliRunner().invoke(command, words.split())
        assert result.exit_code == 0, (result.stderr, result.exception)
    assert json.loads(Path("out.jsonl").read_text())["id"] == 1
    assert CliRunner().invoke(plan.main, ["--evaluate", "plan.json"]).exit_code == 0
    config = Path("model/config.json")
    config.write_bytes(config.read_text().encode(encoding))
    result = CliRunner().invoke(plan.main, [*PLAN.split(), "--model", "model"])
    assert result.exit_code == 0, result.stderr
