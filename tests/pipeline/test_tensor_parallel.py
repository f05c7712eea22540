"""Stages whose devices share every layer generate the tokens of one device."""

import json
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
import torch
from families import SHAREABLE, generate_locally
from jobs import PATIENCE_S, wait_until

from llmpq.artifact import write_json
from llmpq.errors import UserError
from llmpq.plan_data import Plan
from llmpq.runtime.sampler import Sampling

MIXED = ["16", "8", "4", "3"]


def shared_plan(plan: Plan, degrees: list[int]) -> Plan:
    """The same stages, each on so many devices."""
    data = plan.model_dump()
    for stage, degree in zip(data["stages"], degrees, strict=True):
        stage |= {"devices": stage["devices"] * degree, "tensor_parallel": degree}
    data["cluster"]["nodes"][0]["devices"][0]["count"] = 8
    return Plan.model_validate(data)


def generate(model, ends, degrees, precisions="16", how=None, **more):
    """Tokens by id, every worker a thread."""
    plan = shared_plan(model.plan(ends, precisions), degrees)
    return generate_locally(
        plan, model.folder, model.requests, eos_ids=model.eos_ids, **(how or {}), **more
    )


@pytest.mark.parametrize("family", SHAREABLE)
def test_two_stages_of_two_devices_generate_what_transformers_does(family_model, family):
    model = family_model(family)
    assert generate(model, [1, 4], [2, 2]) == model.expected


@pytest.mark.parametrize(
    "family, precisions",
    [("llama", "8"), ("llama", "4"), ("llama", "3")]
    + [(family, MIXED) for family in ("opt", "bloom", "llama", "qwen2", "gpt_neox")],
)
def test_quantized_stages_generate_the_tokens_of_one_device(family_model, family, precisions):
    model = family_model(family)
    alone = model.generate([4], precisions)
    assert generate(model, [2, 4], [2, 2], precisions) == alone


@pytest.mark.parametrize(
    "ends, degrees", [([4], [4]), ([1, 4], [1, 2]), ([3, 4], [4, 1]), ([1, 2, 4], [1, 2, 1])]
)
def test_some_stages_are_shared_and_others_not(family_model, ends, degrees):
    model = family_model("llama")
    assert generate(model, ends, degrees) == model.expected


@pytest.mark.parametrize("how", [{"refill": False}, {"chunk": 16}])
def test_shards_keep_their_cache_alike(family_model, how):
    model = family_model("mistral")
    assert generate(model, [1, 4], [2, 2], how=how) == model.expected


def test_shards_sample_the_same_tokens(family_model):
    model = family_model("llama")
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=20, seed=3)
    alone = model.generate([4], sampling=sampling)
    assert generate(model, [2, 4], [2, 2], sampling=sampling) == alone


def test_a_family_that_cannot_be_cut_ends_all_workers(family_model, tmp_path):
    model = family_model("llama")
    shutil.copytree(model.folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "cohere"}))
    plan = shared_plan(model.plan([2, 4]), [1, 2])
    with pytest.raises(UserError, match="share the layers of 'cohere' models among 2 devices"):
        generate_locally(plan, tmp_path, model.requests)


def test_bf16_runs(family_model):
    """Sums are rounded before they are added up, so tokens may differ from one device's."""
    model = family_model("llama")
    tokens = generate(model, [2, 4], [2, 2], dtype=torch.bfloat16)
    assert tokens.keys() == model.expected.keys() and all(tokens.values())


# ---- real processes


class Run:
    """A model with its prompts and files in one folder, run by processes of their own."""

    def __init__(self, folder, model):
        self.folder, self.model, self.output = folder, model, folder / "out.jsonl"
        shutil.copytree(model.folder, folder / "model")
        ends = json.dumps({"eos_token_id": sorted(model.eos_ids)})
        (folder / "model" / "generation_config.json").write_text(ends)
        lines = [
            {"id": r.id, "prompt_token_ids": list(r.prompt), "max_new_tokens": r.new_tokens}
            for r in model.requests
        ]
        (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def start(self, ends, degrees, slowdown, *more):
        """A process for every device."""
        rehearse = {"t4-16g": {"slowdown": slowdown, "memory_mib": 1000}}
        plan = self.model.plan(ends, batch=4, p=2, q=2, cluster={"rehearse": rehearse})
        write_json(self.folder / "plan.json", shared_plan(plan, degrees))
        names = {
            "plan": "plan.json",
            "model": "model",
            "prompts": "in.jsonl",
            "output": "out.jsonl",
        }
        files = [a for name, file in names.items() for a in (f"--{name}", str(self.folder / file))]
        command = [sys.executable, "-m", "llmpq.run", *files, "--dtype", "float32", *more]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def results(self):
        """Tokens by id."""
        rows = map(json.loads, self.output.read_text().splitlines())
        return {row["id"]: row["token_ids"] for row in rows}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_processes_share_stages_and_a_lost_one_is_named(family_model, tmp_path):
    model = family_model("llama")
    run = Run(tmp_path, model)
    process = run.start([2, 4], [1, 2], 12.0)
    wait_until(lambda: run.output.exists() and run.output.read_text().count("\n"), process)
    workers = {
        worker.environ()["RANK"]: worker for worker in psutil.Process(process.pid).children()
    }
    assert set(workers) == {"0", "1", "2"}
    workers["2"].send_signal(signal.SIGKILL)  # of the last stage, the one that hands nothing on
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 4, errors
    assert "worker 2 (" in errors and "SIGKILL" in errors and "Traceback" not in errors
    assert not any(worker.is_running() for worker in workers.values())
    assert 1 <= len(run.results()) < len(model.expected)

    again = run.start([4], [2], 1.0, "--resume")
    _, errors = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, errors
    assert run.results() == model.expected
