"""The files that start vLLM for a plan: their options, their quoting, and the batch script."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from exports import EPYC, T4, plan_of

from llmpq.export import batch
from llmpq.export.launch_scripts import (
    card_numbers,
    engine_json,
    next_steps,
    ray_bundles,
    ray_script,
    run_script,
)
from llmpq.vllm_settings import graph_bytes, vllm_settings
from llmpq.vllm_support import CPU, VllmDevice

ODD = 'a "node" $(touch broken) `x`'


def script(folder: Path, text: str, stub: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a folder where the command `stub` prints its words and what it is told."""
    (folder / "bin").mkdir(exist_ok=True)
    tool = folder / "bin" / stub
    tool.write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n'
        'echo "PARTITION=${VLLM_PP_LAYER_PARTITION-} CARDS=${CUDA_VISIBLE_DEVICES-}'
        ' CORES=${VLLM_CPU_OMP_THREADS_BIND-}"\n'
    )
    tool.chmod(0o755)
    (folder / "start.sh").write_text(text)
    (folder / "batch.py").write_bytes(Path(batch.__file__).read_bytes())
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    unset = ("CUDA_VISIBLE_DEVICES", "VLLM_CPU_OMP_THREADS_BIND")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    return subprocess.run(
        ["bash", str(folder / "start.sh"), *words],
        env=environment | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


# Options


def test_the_options_are_those_of_the_plan():
    plan = plan_of(["16"] * 3, ["4"] * 5)
    settings = vllm_settings(plan)
    assert settings.environment() == {"VLLM_PP_LAYER_PARTITION": "3,5"}
    assert settings.engine() == {
        "dtype": "bfloat16",
        "max_model_len": 64,
        "pipeline_parallel_size": 2,
        "tensor_parallel_size": 1,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 2 * 48,
        "block_size": 16,
        # an empty block and 4 requests of 64 tokens; 2 x 3 heads of 32 in 5 layers, 16 bits each
        "kv_cache_memory_bytes": (1 + 4 * 4) * 16 * 5 * (2 * 3 * 32) * 2,
    }


def test_old_cards_compute_in_float16_and_cpus_have_long_blocks():
    assert vllm_settings(plan_of(["16"] * 8, device=T4)).dtype == "float16"
    settings = vllm_settings(plan_of(["16"] * 8, device=EPYC))
    assert settings.on_cpu and settings.block_size == 128
    assert settings.kv_cache_bytes == (1 + 4) * 128 * 8 * (2 * 3 * 32) * 2
    assert settings.environment() == {}


def test_graphs_take_memory_on_cards_alone():
    card = VllmDevice("cuda", (8, 0))
    assert graph_bytes(4, 16, CPU) == 0
    assert graph_bytes(4, 16, card) == 4 * 6 * 2**20  # of 1, 2, 4 and 8 rows
    assert graph_bytes(1000, 16, card) == graph_bytes(256, 16, card)


def test_cards_are_numbered_as_the_cluster_lists_them():
    plan = plan_of(["16"] * 2, ["16"] * 2, ["16"] * 2, ["16"] * 2)
    first, *rest = plan.stages
    group = plan.cluster.nodes[0].devices[0]
    mixed = [
        group.model_copy(update={"type": T4, "count": 3}),
        group.model_copy(update={"count": 1}),
    ]
    node = plan.cluster.nodes[0].model_copy(update={"devices": mixed})
    t4s = [stage.model_copy(update={"devices": [T4]}) for stage in rest]
    plan = plan.model_copy(
        update={
            "cluster": plan.cluster.model_copy(update={"nodes": [node]}),
            "stages": [first, *t4s],
        }
    )
    assert card_numbers(plan) == [3, 0, 1, 2]


# Scripts


def test_one_machine_serves_with_these_options(tmp_path):
    plan = plan_of(["16"] * 3, ["4"] * 5, nodes=[ODD, ODD])
    result = script(tmp_path, run_script(plan, vllm_settings(plan)), "vllm", "--port", "8001")
    words = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr
    assert words[:2] == ["serve", str(tmp_path)] and words[-3:-1] == ["--port", "8001"]
    assert words[words.index("--pipeline-parallel-size") + 1] == "2"
    assert words[-1] == "PARTITION=3,5 CARDS=0,1 CORES="


def test_stages_on_a_cpu_have_cores_of_their_own(tmp_path):
    plan = plan_of(["16"] * 3, ["4"] * 5, device=EPYC)
    result = script(tmp_path, run_script(plan, vllm_settings(plan)), "vllm")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith(f"CORES={batch.cores_of_workers(2)}")


def test_cores_are_dealt_out_once_each():
    parts = batch.cores_of_workers(2).split("|")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        dealt = [int(core) for part in parts for core in part.split(",")]
        assert len(parts) == 2 and dealt == cores[: len(dealt)] and len(set(dealt)) == len(dealt)


@pytest.mark.parametrize("other", ["node1", ODD])
def test_several_machines_meet_in_ray(tmp_path, other):
    plan = plan_of(["16"] * 3, ["4"] * 3, ["4"] * 2, nodes=["node0", other, other])
    text = ray_script(plan, vllm_settings(plan))
    head = script(tmp_path, text, "ray", "head")
    assert head.returncode == 0, head.stderr
    assert head.stdout.splitlines()[:4] == ["start", "--head", "--port", "6379"]
    worker = script(tmp_path, text, "ray", "worker", other, "10.0.0.1").stdout.splitlines()
    assert worker[1:3] == ["--address", "10.0.0.1:6379"]
    assert worker[worker.index("--num-gpus") + 1] == "2"
    resources = json.loads(worker[worker.index("--resources") + 1])
    bundles = ray_bundles(plan)
    assert [set(one) - {"GPU"} for one in bundles[1:]] == [set(resources)] * 2
    assert worker[-1].startswith("PARTITION=3,3,2 ")
    for words in ((), ("worker", other), ("worker", "unknown", "10.0.0.1"), ("what",)):
        refused = script(tmp_path, text, "ray", *words)
        assert refused.returncode == 2 and "on each other node" in refused.stderr
        assert not refused.stdout
    assert not list(tmp_path.rglob("broken"))


def test_nodes_with_similar_names_are_told_apart():
    plan = plan_of(["16"] * 4, ["4"] * 4, nodes=["a-1", "a_1"])
    first, second = ray_bundles(plan)
    assert set(first) != set(second)


def test_the_next_steps_name_every_node():
    one, two = plan_of(["16"] * 8), plan_of(["16"] * 4, ["4"] * 4, nodes=["a", "b c"])
    assert (
        next_steps(one, "my out")[1] == "a batch: python 'my out/batch.py' prompts.jsonl out.jsonl"
    )
    steps = next_steps(two, "out")
    assert steps[1:] == [
        "on a: bash out/ray.sh head",
        "on b c: bash out/ray.sh worker 'b c' ADDRESS",
        "then on a: bash out/ray.sh batch prompts.jsonl out.jsonl",
    ]


# The batch script, against an engine that counts


MOST_TOKENS = 20


class Engine:
    """Answers a request after as many steps as it asks for tokens, with the ids 1, 2, 3..."""

    def __init__(self, dies_after: int = 10**9) -> None:
        self.asked: list[str] = []
        self.left: list[tuple[str, Any, int]] = []
        self.dies_after = dies_after

    def add_request(self, request_id: str, prompt: Any, settings: Any) -> None:
        if prompt == "too long":
            raise ValueError("longer than 64 tokens")
        self.asked.append(request_id)
        self.left.append((request_id, prompt, settings.max_tokens))

    def step(self) -> list[Any]:
        if len(self.asked) - len(self.left) >= self.dies_after:
            raise KeyboardInterrupt
        request_id, prompt, count = self.left.pop()
        ids = prompt["prompt_token_ids"] if isinstance(prompt, dict) else prompt.split()
        count = min(count, MOST_TOKENS)  # as vLLM cuts what is longer than it was started for
        answer = SimpleNamespace(text="é", token_ids=[*range(count)], finish_reason="length")
        return [
            SimpleNamespace(
                finished=True, request_id=request_id, outputs=[answer], prompt_token_ids=ids
            )
        ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with an export's files for the batch script, and a vLLM that is not there."""
    plan = plan_of(["16"] * 3, ["4"] * 5)
    (tmp_path / "engine.json").write_text(engine_json(plan, vllm_settings(plan)))
    lines = [{"id": n, "prompt": "a b", "max_new_tokens": 3} for n in range(6)]
    lines.append({"id": "1", "prompt_token_ids": [5, 6, 7]})
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    module = ModuleType("vllm")
    vars(module).update(
        SamplingParams=SimpleNamespace,
        EngineArgs=SimpleNamespace,
        LLMEngine=SimpleNamespace(from_engine_args=lambda given: module.engine),
        engine=Engine(),
    )
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,5")
    return tmp_path


def run(folder: Path, **engine: Any) -> tuple[int, Engine]:
    """Runs the requests on a new engine; returns the exit code and the engine."""
    sys.modules["vllm"].engine = Engine(**engine)
    given = SimpleNamespace(
        prompts=folder / "prompts.jsonl",
        output=folder / "out.jsonl",
        new_tokens=4,
        ignore_eos=False,
        ray=False,
    )
    return batch.run(folder, given), sys.modules["vllm"].engine


def ids(folder: Path) -> list[str | int]:
    return [json.loads(line)["id"] for line in (folder / "out.jsonl").read_text().splitlines()]


def test_results_have_the_keys_of_llmpq_run(folder):
    assert run(folder)[0] == 0
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert {json.dumps(line["id"]) for line in lines} == {*map(str, range(6)), '"1"'}
    of_ids = next(line for line in lines if line["id"] == "1")
    assert of_ids == {
        "id": "1",
        "text": "é",
        "token_ids": [0, 1, 2, 3],
        "num_prompt_tokens": 3,
        "num_new_tokens": 4,
        "finish_reason": "length",
    }


def test_a_run_that_died_is_continued_with_each_id_once(folder):
    with pytest.raises(KeyboardInterrupt):
        run(folder, dies_after=3)
    assert len(ids(folder)) == 3
    with (folder / "out.jsonl").open("ab") as file:
        file.write(b'{"id": 0, "text": "ha')  # the line that was being written
    code, engine = run(folder)
    assert code == 0 and len(engine.asked) == 4
    assert len(ids(folder)) == 7 == len(set(map(json.dumps, ids(folder))))
    code, engine = run(folder)
    assert code == 0 and not engine.asked


def test_refused_requests_have_a_line_and_an_exit_code(folder):
    with (folder / "prompts.jsonl").open("a") as file:
        file.write('{"id": "long", "prompt": "too long"}\n')
    assert run(folder)[0] == batch.FAILED
    line = next(x for x in (folder / "out.jsonl").read_text().splitlines() if '"long"' in x)
    assert json.loads(line)["error"] == "longer than 64 tokens"


def test_what_failed_is_tried_again_and_ids_stay_unique(folder):
    with (folder / "prompts.jsonl").open("a") as file:
        file.write('{"id": "long", "prompt": "too long"}\n')
        file.write('{"id": "cut", "prompt": "a", "max_tokens": 50, "stop": null}\n')
    for asked in (8, 1):  # of those whose requests the engine takes
        code, engine = run(folder)
        assert code == batch.FAILED and len(engine.asked) == asked
    assert len(ids(folder)) == 9 == len(set(map(json.dumps, ids(folder))))
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    [cut] = [line for line in lines if line["id"] == "cut"]
    assert cut["finish_reason"] == "error" and "longer than the requests" in cut["error"]


def test_settings_of_a_request_reach_the_engine(folder, monkeypatch):
    given = []
    monkeypatch.setattr(
        sys.modules["vllm"],
        "SamplingParams",
        lambda **own: given.append(own) or SimpleNamespace(**own),
    )
    line = {"id": 1, "prompt": "a\u2028b", "max_tokens": 2, "seed": 3, "stop": ["x"], "top_p": None}
    (folder / "prompts.jsonl").write_text(json.dumps(line, ensure_ascii=False), encoding="utf-8")
    assert run(folder)[0] == 0
    settings = {"temperature": 0.0, "seed": 3, "stop": ["x"], "max_tokens": 2}
    assert given == [settings | {"ignore_eos": False}]


@pytest.mark.parametrize("text", ["notes without an end", "[]\n", '{"id": 1}\n'])
def test_files_that_hold_other_things_are_left_alone(folder, text):
    (folder / "out.jsonl").write_text(text)
    with pytest.raises(ValueError, match="name a new file"):
        run(folder)
    assert (folder / "out.jsonl").read_text() == text


def test_prompts_are_not_overwritten(folder):
    (folder / "out.jsonl").hardlink_to(folder / "prompts.jsonl")
    before = (folder / "prompts.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds the prompts"):
        run(folder)
    assert (folder / "prompts.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ('{"id": 9, "prompt": ["a"]}', "must be a text"),
        ('{"id": 9, "prompt": null}', "either 'prompt' or"),
        ('{"id": 9, "prompt_token_ids": ["a"]}', "a list of token ids"),
        ('{"id": 9, "prompt": "x", "max_new_tokens": 0}', "1 or more"),
        ('{"id": 9, "prompt": "x", "n": 2}', "'n' is not known"),
        ('{"id": 1, "prompt": "again"}', "occurs twice"),
        ('{"prompt": "no id"}', "an 'id'"),
        ('{"id": true, "prompt": "x"}', "an 'id'"),
        ('{"id": 9}', "either 'prompt' or"),
        ('{"id": 9, "prompt": "x", "prompt_token_ids": [1]}', "either 'prompt' or"),
    ],
)
def test_odd_lines_are_named(folder, line, message):
    with (folder / "prompts.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=f"prompts.jsonl:8: .*{message}"):
        batch.read_requests(folder / "prompts.jsonl")
