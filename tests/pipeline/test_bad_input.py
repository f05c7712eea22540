"""Bad input to every command: the exit code, and one message that names the file, no traceback."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from families import TINY_TALES, hand_made_plan
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmpq.artifact import write_json
from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.loader import load_stage
from llmpq.cli.eval import main as eval_command
from llmpq.cli.plan import main as plan_command
from llmpq.cli.profile import main as profile_command
from llmpq.cli.run import main as run_command
from llmpq.model_lookup import load_model_spec
from llmpq.models.stage_model import LayerRange, load_config
from llmpq.profile_data import CalibrationText, LayerSensitivity, QualityFit, Sensitivity

WEIGHTS = "model.safetensors"
A_LINEAR = "model.layers.2.mlp.up_proj.weight"
PROMPT = {"id": "a", "prompt_token_ids": [5, 6, 7]}


def call(command, *arguments) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments])


def check(result: Result, code: int, *parts: object) -> None:
    """The exit code, and one message in which all `parts` occur."""
    message = result.stderr
    assert result.exit_code == code, (message, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception  # no other error escaped
    assert "Traceback" not in message
    lines = [line for line in message.splitlines() if line.lower().startswith("error: ")]
    assert len(lines) == 1, message
    for part in parts:
        assert str(part) in lines[0], message


# ---- llmpq-run


class Job:
    """A folder with a copy of the shipped model, a plan of one stage, and a prompt."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / "model"
        shutil.copytree(TINY_TALES, self.model)
        self.weights = self.model / WEIGHTS
        self.plan, self.prompts = folder / "plan.json", folder / "in.jsonl"
        self.output = folder / "out.jsonl"
        self.write_plan()
        self.write_prompts(json.dumps(PROMPT))

    def write_plan(self, precisions="16") -> None:
        plan = hand_made_plan(
            load_model_spec(str(TINY_TALES)), [8], precisions, batch=2, p=1, q=2, prompt=4, new=3
        )
        write_json(self.plan, plan)

    def change_plan(self, change) -> None:
        data = json.loads(self.plan.read_text())
        change(data)
        self.plan.write_text(json.dumps(data, indent=1))

    def write_prompts(self, *lines: str) -> None:
        self.prompts.write_text("\n".join(lines) + "\n")

    def change_weights(self, change) -> None:
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights, {"format": "pt"})

    def run(self, *more) -> Result:
        names = ("plan", "prompts", "output", "model")
        files = [part for name in names for part in (f"--{name}", getattr(self, name))]
        return call(run_command, *files, "-q", *more)

    def tokens(self) -> list[int]:
        result = self.run()
        assert result.exit_code == 0, result.stderr
        return json.loads(self.output.read_text())["token_ids"]


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


def test_a_plan_that_is_not_there(job):
    job.plan.unlink()
    check(job.run(), 2, job.plan, "no such file")


def test_a_plan_that_is_not_json(job):
    job.plan.write_text('{"schema_version": 1,\n "kind": plan}')
    check(job.run(), 2, f"{job.plan}:2", "not valid JSON")


def test_a_plan_whose_layers_do_not_add_up(job):
    def shorten(plan):
        plan["stages"][0] |= {"end_layer": 6, "precisions": ["16"] * 6}

    job.change_plan(shorten)
    check(job.run(), 2, job.plan, "stages end at layer 6, the model has 8")


def test_a_plan_with_an_unknown_key(job):
    job.change_plan(lambda plan: plan["stages"][0].update(colour="red"))
    check(job.run(), 2, f"{job.plan}:", "stages.0.colour")


def test_a_plan_with_an_unknown_precision(job):
    job.change_plan(lambda plan: plan["stages"][0].update(precisions=["5"] * 8))
    check(job.run(), 2, f"{job.plan}:", "unknown precision '5'")


def test_the_quality_of_a_stage_of_several_devices_is_not_measured(job):
    def share(plan):
        plan["stages"][0] |= {"tensor_parallel": 2, "devices": ["t4-16g"] * 2}
        plan["model"]["num_kv_heads"] = 6  # the shipped model has 3, which no two devices share

    job.change_plan(share)
    words = (job.plan, "stage 0 (2 devices)", "evaluate a plan with the same precisions")
    check(job.run("--check-quality"), 2, *words)
    check(call(eval_command, job.plan), 2, *words)


def test_a_plan_for_another_number_of_layers(job):
    config = job.model / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 8', '"num_hidden_layers": 7')
    )
    check(job.run(), 2, job.model, "7 layers of", "planned were 8 of")


def test_prompts_that_are_not_there(job):
    job.prompts.unlink()
    check(job.run(), 2, job.prompts, "no such file")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b", "prompt": ', "not valid JSON"),
        (json.dumps(PROMPT), "id 'a' was already used on line 1"),
        ('{"id": "b", "prompt_token_ids": []}', "at least one token"),
        ('{"id": "b", "prompt_token_ids": [9999]}', "outside the vocabulary"),
        (json.dumps({"id": "b", "prompt_token_ids": [5] * 510}), "512 positions"),
    ],
)
def test_a_bad_prompt_is_named_by_its_line(job, line, message):
    job.write_prompts(json.dumps(PROMPT), line)
    check(job.run("--too-long", "fail"), 2, f"{job.prompts}:2", message)


def test_a_prompt_that_no_reserved_cache_holds(job):
    job.write_prompts(json.dumps({"id": "long", "prompt_token_ids": [5] * 100}))
    needs = "100 prompt + 3 new tokens"
    check(job.run("--too-long", "fail"), 2, f"{job.prompts}:1", needs, "14 tokens of KV cache")


def test_an_empty_prompts_file(job):
    job.write_prompts("")
    check(job.run(), 2, job.prompts, "holds no prompts")


def test_a_model_directory_that_is_not_there(job):
    shutil.rmtree(job.model)
    check(job.run(), 2, job.model, "no such model")


def test_a_model_directory_without_weights(job):
    job.weights.unlink()
    check(job.run(), 2, job.model, "no weights here")


@pytest.mark.parametrize("content", [b"", b"\x05", b"garbage, not a header" * 50])
def test_weights_with_a_broken_header(job, content):
    job.weights.write_bytes(content)
    check(job.run(), 2, job.weights, "not a readable safetensors file")


@pytest.mark.parametrize("size", [100, 1_000_000])
def test_truncated_weights(job, size):
    job.weights.write_bytes(job.weights.read_bytes()[:size])
    check(job.run(), 2, job.weights, "not a readable safetensors file")


@pytest.fixture
def index(job) -> Path:
    """Where the index of shards is looked for; `shard.safetensors` holds all tensors."""
    job.weights.rename(job.model / "shard.safetensors")
    return job.model / f"{WEIGHTS}.index.json"


def test_a_missing_shard_is_named_with_its_index(job, index):
    index.write_text(json.dumps({"weight_map": {A_LINEAR: "model-1-of-2.safetensors"}}))
    check(job.run(), 2, job.model / "model-1-of-2.safetensors", index, "missing")


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": {"a": 1}}', "{"])
def test_a_broken_index(job, index, content):
    index.write_text(content)
    check(job.run(), 2, index)


def test_names_come_from_the_shards_and_not_from_their_index(job, index):
    index.write_text(json.dumps({"weight_map": {"model.layers.0.more": "shard.safetensors"}}))
    assert len(job.tokens()) == 3


@pytest.mark.parametrize("command", ["run", "eval", "sensitivity"])
def test_a_tensor_that_would_be_left_out(job, command):
    extra = "model.layers.2.mlp.up_proj.weight_scale"
    job.change_weights(lambda tensors: tensors.update({extra: torch.ones(1)}))
    results = {
        "run": job.run,
        "eval": lambda: call(eval_command, job.plan, "--model", job.model),
        "sensitivity": lambda: call(
            profile_command, "sensitivity", "--model", job.model, "-o", job.output
        ),
    }
    check(results[command](), 2, job.weights, extra, "scales that llmpq cannot apply")


def test_a_tensor_of_the_wrong_shape(job):
    job.change_weights(lambda tensors: tensors.update({A_LINEAR: torch.zeros(384, 191)}))
    check(job.run(), 2, job.weights, A_LINEAR, "[384, 191]", "[384, 192]")


def test_a_missing_tensor(job):
    job.change_weights(lambda tensors: tensors.pop(A_LINEAR))
    check(job.run(), 2, job.model, A_LINEAR)


@pytest.mark.parametrize("precision", ["8", "4", "3"])
def test_a_weight_that_is_not_finite_cannot_be_quantized(job, precision):
    def poison(tensors):
        tensors[A_LINEAR][5, 7] = float("nan")

    job.change_weights(poison)
    job.write_plan(precision)
    check(job.run(), 2, A_LINEAR, "finite")


class Touch:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_objects_are_refused_and_never_run(job, tmp_path, legacy):
    job.weights.unlink()
    trap, path = tmp_path / "ran", job.model / "pytorch_model.bin"
    if legacy:
        path.write_bytes(pickle.dumps(Touch(trap)))
    else:
        torch.save({A_LINEAR: Touch(trap)}, path)
    check(job.run(), 2, path, "convert the model to safetensors")
    assert not trap.exists()


def test_a_bin_that_holds_no_mapping_of_tensors_is_refused(job):
    job.weights.unlink()
    path = job.model / "pytorch_model.bin"
    torch.save([torch.zeros(3)], path)
    check(job.run(), 2, path)
    torch.save(dict.fromkeys(load_file(TINY_TALES / WEIGHTS), "text"), path)
    check(job.run(), 2, path)


def test_a_broken_configuration(job):
    config = job.model / "config.json"
    config.write_text('{"model_type": "llama", "num_attention_heads": "many"}')
    check(job.run(), 2, config)
    config.write_text('{"model_type": "nonsense"}')
    check(job.run(), 2, config)


def test_plain_bin_and_shards_give_the_same_tokens(job):
    expected = job.tokens()
    assert len(expected) == 3

    tensors = load_file(job.weights)
    job.weights.unlink()
    torch.save(tensors, job.model / "pytorch_model.bin")
    assert job.tokens() == expected

    (job.model / "pytorch_model.bin").unlink()
    model = AutoModelForCausalLM.from_pretrained(TINY_TALES)
    model.save_pretrained(job.model, max_shard_size="1MB")
    assert len(list(job.model.glob("model-*.safetensors"))) > 3
    assert job.tokens() == expected


def test_a_stage_reads_only_its_own_tensors(monkeypatch):
    names = []
    read = Checkpoint.read

    def spy(self, name, shape):
        names.append(name)
        return read(self, name, shape)

    monkeypatch.setattr(Checkpoint, "read", spy)
    config, weights = load_config(TINY_TALES), Checkpoint(TINY_TALES)
    cpu = torch.device("cpu")
    read_by = {}
    for first, end in ((0, 3), (3, 5), (5, 8)):
        names.clear()
        layers = LayerRange(first, end, 8)
        load_stage(config, weights, layers, ["8"] * (end - first), torch.bfloat16, cpu)
        assert len(set(names)) == len(names), "a tensor was read twice"
        read_by[first] = set(names)
    every = set(load_file(TINY_TALES / WEIGHTS))
    assert set.union(*read_by.values()) == every
    # The embedding is tied to the head, so both ends read it; nothing else is read by two stages.
    assert read_by[0] & read_by[5] == {"model.embed_tokens.weight"}
    assert not read_by[3] & (read_by[0] | read_by[5])
    assert all(name.startswith(("model.layers.3.", "model.layers.4.")) for name in read_by[3])


# ---- llmpq-plan


CLUSTER = {"name": "lab", "nodes": [{"name": "node0", "devices": [{"type": "t4-16g", "count": 2}]}]}
WORKLOAD = {"prompt_tokens": 32, "new_tokens": 8, "num_requests": 16, "batch": 4}


class Question:
    """The files of llmpq-plan."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster, self.workload = folder / "cluster.yaml", folder / "workload.yaml"
        self.cluster.write_text(yaml.safe_dump(CLUSTER, sort_keys=False))
        self.workload.write_text(yaml.safe_dump(WORKLOAD, sort_keys=False))

    def ask(self, *more) -> Result:
        files = ("--cluster", self.cluster, "--workload", self.workload)
        return call(plan_command, *files, "--no-compare", *more)

    def replace(self, old: str, new: str) -> None:
        text = self.cluster.read_text()
        assert old in text
        self.cluster.write_text(text.replace(old, new))


@pytest.fixture
def question(tmp_path) -> Question:
    return Question(tmp_path)


def test_the_question_itself_is_fine(question):
    assert question.ask("-o", question.folder / "p.json").exit_code == 0


def test_an_unknown_device_type_gets_a_suggestion(question):
    question.replace("t4-16g", "t4-16gb")
    check(question.ask(), 2, question.cluster, "'t4-16gb'", "did you mean t4-16g")


def test_negative_memory(question):
    question.replace("count: 2", "count: 2\n    memory_gib: -3")
    check(question.ask(), 2, f"{question.cluster}:7", "memory_gib", "-3")


def test_a_missing_file(question):
    question.workload.unlink()
    check(question.ask(), 2, question.workload, "no such file")


def test_a_yaml_syntax_error(question):
    question.cluster.write_text("name: lab\nnodes: [a: {\n")
    check(question.ask(), 2, f"{question.cluster}:", "not valid YAML")


def test_an_unknown_key(question):
    question.replace("name: lab", "name: lab\ncolour: red")
    check(question.ask(), 2, f"{question.cluster}:2", "unknown key 'colour'")


def test_a_missing_model(question):
    check(question.ask("--model", question.folder / "nowhere"), 2, "nowhere", "no such model")


def test_a_sensitivity_of_another_number_of_layers(question):
    path = question.folder / "sensitivity.json"
    rows = [LayerSensitivity(layer=i, precision="8", sensitivity=0.1) for i in range(3)]
    value = Sensitivity(
        model="other",
        num_layers=3,
        indicator="measured",
        layers=rows,
        calibration=CalibrationText(source="x", num_tokens=9),
        fit=QualityFit(scale=1, mean_abs_error_percent=0, num_plans=1),
    )
    write_json(path, value)
    check(question.ask("--sensitivity", path), 2, path, "3 layers", "8")


def test_an_unknown_precision(question):
    check(question.ask("--precisions", "16,5"), 2, "unknown precision '5'")


def test_a_model_that_cannot_fit(question, repo_root):
    model = repo_root / "configs" / "models" / "bloom-176b.json"
    result = question.ask("--model", model)
    assert result.exit_code == 3, result.stderr
    assert "Traceback" not in result.stderr
    assert "error: " in result.stderr and "short" in result.stderr and "GiB" in result.stderr


# ---- llmpq-eval and llmpq-profile


@pytest.mark.parametrize(
    ("command", "start"), [(eval_command, ()), (profile_command, ("sensitivity",))]
)
def test_texts_that_are_missing_or_too_short(command, start, tmp_path):
    path = tmp_path / "text.txt"
    check(call(command, *start, "--text", path), 2, path, "no such file")
    path.write_text("Once upon a time.")
    check(call(command, *start, "--text", path), 2, path, "fewer than one window of")


@pytest.mark.parametrize(
    ("command", "start"),
    [(eval_command, ()), (profile_command, ()), (profile_command, ("layers",))],
)
def test_unknown_precisions(command, start):
    check(call(command, *start, "--precisions", "16,5"), 2, "unknown precision '5'")


def test_lengths_beyond_the_model(tmp_path):
    result = call(profile_command, "--prompt-tokens", "512", "-o", tmp_path / "p.json")
    check(result, 2, "--prompt-tokens 512", "512 positions")


def test_evaluating_plans_of_different_models(job, tmp_path):
    other = tmp_path / "other.json"
    job.change_plan(lambda plan: plan["model"].update(name="another"))
    other.write_text(job.plan.read_text())
    job.write_plan()
    check(call(eval_command, job.plan, other), 2, "different models", "another")
