"""`llmpq-run --dry-run`: says what a run would do, and does none of it."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner

from llmpq.cli.run import main
from llmpq.cli.run_work import say_kernels
from llmpq.cluster import Cluster
from llmpq.dry_run import memory_of
from llmpq.model_lookup import load_model_spec
from llmpq.model_spec import ASSETS
from llmpq.plan_data import Plan, Predicted, PredictedStage, Stage
from llmpq.render.dry_run_view import layer_counts
from llmpq.workload import Workload

TINY_TALES = ASSETS / "tiny-tales"
LINEARS = 7  # of a layer
NEW_TOKENS = 4
MIB = 1024**2


def cluster(memory_mib: float = 64) -> Cluster:
    devices = [{"type": "small", "count": 2}]
    node = {"name": "here", "devices": devices, "link": {"bandwidth_gbs": 1, "latency_us": 1}}
    rehearse = {"small": {"slowdown": 1, "memory_mib": memory_mib}}
    return Cluster.model_validate({"name": "lab", "nodes": [node], "rehearse": rehearse})


PRECISIONS = [["8", "8", "4"], ["4", "3", "16", "16", "3"]]


def make_plan(predicted: bool = True, memory_mib: float = 64, model: str = "tiny-tales") -> Plan:
    stages = [(0, 3), (3, 8)]
    times = [
        PredictedStage(
            prefill_s=0.25 + rank,
            decode_step_s=0.125,
            peak_memory_bytes=1,
            memory_capacity_bytes=int(memory_mib * MIB),
            provenance="invented",
        )
        for rank in range(2)
    ]
    expected = Predicted(
        total_s=2.0,
        prefill_s=0.5,
        decode_s=1.5,
        tokens_per_s=12.5,
        quality_loss_percent=0.1,
        sum_sensitivity=0.1,
        objective=2.0,
        lower_bound=0.0,
        gap=1.0,
        planning_s=0.0,
        stages=times,
    )
    return Plan(
        model=load_model_spec("tiny-tales").model_copy(update={"name": model}),
        workload=Workload(prompt_tokens=8, new_tokens=NEW_TOKENS, num_requests=6, batch=4),
        cluster=cluster(memory_mib),
        method="ilp",
        batch=4,
        prefill_micro_batch=2,
        decode_micro_batch=2,
        stages=[
            Stage(
                rank=rank,
                node="here",
                devices=["small"],
                first_layer=first,
                end_layer=end,
                precisions=PRECISIONS[rank],
            )
            for rank, (first, end) in enumerate(stages)
        ],
        predicted=expected if predicted else None,
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs `llmpq-run` on files in a folder of its own; gives the result and what --json wrote."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def refuse(*arguments, **named):
        raise AssertionError("a dry run loads nothing and starts no worker")

    for name in ("llmpq.runtime.engine.load_stage", "llmpq.runtime.process.start_workers"):
        monkeypatch.setattr(name, refuse)
    monkeypatch.setattr("llmpq.runtime.process.connect", refuse)
    prompts = [{"id": i, "prompt_token_ids": list(range(5, 8 + i))} for i in range(3)]
    write_prompts(tmp_path, prompts)

    def call(plan, *arguments):
        (tmp_path / "plan.json").write_text(plan.model_dump_json())
        files = ["--plan", "plan.json", "--prompts", "in.jsonl", "--output", "out.jsonl"]
        result = CliRunner().invoke(main, [*files, "--dry-run", "--json", "dry.json", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        assert not (tmp_path / "out.jsonl").exists()
        path = tmp_path / "dry.json"
        return result, json.loads(path.read_text()) if path.exists() else None

    monkeypatch.chdir(tmp_path)
    return call


def write_prompts(folder, lines):
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_stage_has_its_place_memory_files_and_times(run):
    plan = make_plan()
    result, found = run(plan)
    assert result.exit_code == 0, result.output
    assert found["kind"] == "dry_run" and found["schema_version"] == 1
    for rank, stage in enumerate(found["stages"]):
        memory = memory_of(plan, rank)
        parts = ("weights_bytes", "cache_bytes", "activation_bytes", "buffer_bytes")
        assert stage["rank"] == rank and stage["precisions"] == PRECISIONS[rank]
        assert (stage["node"], stage["devices"]) == ("here", ["small"])
        assert sum(stage[part] for part in parts) == stage["total_bytes"] == memory.total > 0
        assert stage["memory_capacity_bytes"] == 64 * MIB
        assert stage["prefill_s"] == 0.25 + rank and stage["decode_step_s"] == 0.125
        quantized = sum(p != "16" for p in PRECISIONS[rank])
        assert stage["num_quantized_weights"] == LINEARS * quantized
        assert stage["num_packed_weights"] == stage["packed_read_bytes"] == 0
    assert found["prompts"] == {
        "num_requests": 3,
        "num_prompt_tokens": 3 + 4 + 5,
        "num_new_tokens": 3 * NEW_TOKENS,
        "longest_prompt_tokens": 5,
        "longest_tokens": 5 + NEW_TOKENS,
        "longest_planned_tokens": 8 + NEW_TOKENS,
    }
    assert found["predicted"]["tokens_per_s"] == 12.5
    assert not found["notes"]


def counting_on(kernels):
    """The plan, whose prediction names these kernels for every stage."""
    plan = make_plan()
    stages = [stage.model_copy(update={"kernels": kernels}) for stage in plan.predicted.stages]
    predicted = plan.predicted.model_copy(update={"stages": stages})
    return plan.model_copy(update={"predicted": predicted})


def test_a_run_says_once_which_kernels_serve(capsys):
    """The first worker says all; others what the plan did not count on."""
    place = torch.device("cpu"), torch.bfloat16
    plan = counting_on({"16": ["cuBLAS"]})
    say_kernels(plan, 1, *place, leads=True, quiet=False)
    told = capsys.readouterr()
    assert not told.out and told.err.count("kernels of small at ") == 3
    say_kernels(plan, 1, *place, leads=False, quiet=False)
    expected = "kernels of small at 16: linear; the plan counts on cuBLAS\n"
    assert capsys.readouterr().err == expected
    say_kernels(plan, 1, *place, leads=True, quiet=True)
    assert not capsys.readouterr().err


def test_the_kernels_of_every_precision_are_named(run):
    """Rehearsed: this CPU's. Where the plan counts on others, that is said."""
    result, found = run(counting_on({"16": ["cuBLAS"], "4": ["humming"]}))
    lines = found["kernels"]
    assert [line.split(": ")[0] for line in lines] == [
        f"kernels of small at {precision}" for precision in ("8", "4", "3", "16")
    ]
    assert "kernels of small at 16: linear; the plan counts on cuBLAS" in lines
    assert all(line in result.output for line in lines)
    assert "counts on" not in lines[0], "nothing was said of 8 bits"


def test_people_read_one_row_a_stage(run):
    result, _ = run(make_plan())
    lines = result.output.splitlines()
    rows = [line for line in lines if "small" in line and "│" in line]
    assert len(rows) == 2
    assert "2x8,1x4" in rows[0] and "0-2" in rows[0]
    assert "1x4,1x3,2x16,1x3" in rows[1] and "3-7" in rows[1]
    assert "3 requests, 12 tokens" in result.output and "12.5 tokens/s" in result.output
    assert "250.00" in result.output and "1250.00" in result.output


def test_stages_read_the_whole_file_between_them_and_the_tied_matrix_twice(run):
    """The last stage's head is the embedding's matrix."""
    _, found = run(make_plan())
    read = sum(stage["checkpoint_read_bytes"] for stage in found["stages"])
    header, size = header_of(TINY_TALES / "model.safetensors")
    spec = load_model_spec("tiny-tales")
    tied = 2 * spec.head_params if spec.tied else 0
    assert header["model.embed_tokens.weight"]["dtype"] in ("BF16", "F16")
    assert read == size + tied


def header_of(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), len(content) - 8 - length


def test_what_the_cache_holds_is_not_read_from_the_checkpoint(run, tmp_path, monkeypatch):
    import torch

    from llmpq.checkpoint.checkpoint import Checkpoint
    from llmpq.checkpoint.loader import load_stage
    from llmpq.checkpoint.packed_cache import PackedCache
    from llmpq.models.stage_model import LayerRange, load_config

    plan = make_plan()
    cache = ["--cache-dir", "cache", "--dtype", "float32"]
    _, before = run(plan, *cache)
    weights = Checkpoint(TINY_TALES)
    kept = PackedCache(tmp_path / "cache", weights.stamp, "rtn", print)
    cpu, config, layers = torch.device("cpu"), load_config(TINY_TALES), LayerRange(0, 3, 8)
    load_stage(config, weights, layers, PRECISIONS[0], torch.float32, cpu, cache=kept)
    result, after = run(plan, *cache)
    first, second = after["stages"]
    assert second == before["stages"][1]
    assert first["num_packed_weights"] == first["num_quantized_weights"] == 3 * LINEARS
    files = list((tmp_path / "cache").glob("*.safetensors"))
    assert first["packed_read_bytes"] == sum(path.stat().st_size for path in files)
    assert 0 < first["checkpoint_read_bytes"] < before["stages"][0]["checkpoint_read_bytes"]
    assert f"{3 * LINEARS} of {3 * LINEARS}" in result.output
    _, other = run(plan, "--cache-dir", "cache", "--dtype", "bfloat16")
    assert other["stages"][0]["num_packed_weights"] < 3 * LINEARS  # tiles, or as many in 8 bits


def test_a_plan_without_predictions_says_so(run):
    result, found = run(make_plan(predicted=False))
    assert result.exit_code == 0
    assert found["predicted"] is None and found["stages"][0]["prefill_s"] is None
    assert any("no predictions" in note for note in found["notes"])


def test_what_does_not_fit_or_was_not_foreseen_is_said(run, tmp_path):
    write_prompts(tmp_path, [{"id": 1, "prompt_token_ids": [5] * 20, "max_new_tokens": 3}])
    result, found = run(make_plan(memory_mib=1))
    assert result.exit_code == 0
    short = [note for note in found["notes"] if "more than its device has" in note]
    assert len(short) == 2 and "stage 0 (small on here)" in short[0]
    assert any("takes 23 tokens" in note and "12" in note for note in found["notes"])


def drop_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.4.mlp.up_proj.weight"))


def misshape(folder):
    name = "model.layers.4.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def add_scale(folder):
    name = "model.layers.4.mlp.up_proj.weight_scale_inv"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(1, 1)}))


@pytest.mark.parametrize("damage", [drop_tensor, misshape, add_scale])
def test_a_tensor_that_is_missing_misshapen_or_left_out_is_found(run, tmp_path, damage):
    folder = shutil.copytree(TINY_TALES, tmp_path / "model")
    damage(folder)
    result, found = run(make_plan(model=str(folder)))
    assert result.exit_code == 2 and found is None
    assert "model.layers.4.mlp.up_proj.weight" in result.output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "in.jsonl:1"),
        ('{"id": 1, "prompt_token_ids": [999999]}', "outside the vocabulary"),
        ("", "holds no prompts"),
    ],
)
def test_bad_prompts_end_with_2(run, tmp_path, line, message):
    (tmp_path / "in.jsonl").write_text(line)
    result, found = run(make_plan())
    assert result.exit_code == 2 and found is None
    assert message in result.output


def test_a_cache_folder_that_cannot_be_written_ends_with_2(run, tmp_path):
    (tmp_path / "file").write_text("")
    result, _ = run(make_plan(), "--cache-dir", "file")
    assert result.exit_code == 2 and "--cache-dir DIR" in result.output


def test_under_torchrun_only_the_first_worker_speaks(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result, found = run(make_plan())
    assert (result.exit_code, result.output, found) == (0, "", None)
    monkeypatch.setenv("RANK", "0")
    result, found = run(make_plan())
    assert result.exit_code == 0 and len(found["stages"]) == 2


@pytest.mark.parametrize("precision", ["16", "4"])
def test_devices_that_share_a_stage_read_a_part_each(run, shared, precision):
    """Both read norms; and at 4 bits down_proj, whose 11 groups of a row do not fall into halves.

    This model has no biases, and its head is not tied.
    """
    folder = shared / "models" / "tale-llama-11m"
    spec = load_model_spec(str(folder))
    node = {"name": "a", "devices": [{"type": "t4-16g", "count": 2}]}
    stage = {"rank": 0, "node": "a", "devices": ["t4-16g"] * 2, "tensor_parallel": 2}
    layers = {"first_layer": 0, "end_layer": 12, "precisions": [precision] * 12}
    plan = make_plan(predicted=False).model_dump()
    plan |= {"model": spec, "cluster": {"nodes": [node]}, "stages": [stage | layers]}
    result, found = run(Plan.model_validate(plan), "--model", str(folder), "--dtype", "float32")
    assert result.exit_code == 0, result.output
    header, size = header_of(folder / "model.safetensors")
    norms = sum(2 * t["shape"][0] for t in header.values() if len(t.get("shape", [])) == 1)
    down = 0 if precision == "16" else 12 * 2 * spec.hidden_size * spec.ffn_size
    [stage] = found["stages"]
    assert stage["checkpoint_read_bytes"] == size + norms + down
    assert stage["num_quantized_weights"] == (0 if precision == "16" else 2 * 12 * LINEARS)
    assert "2 x t4-16g" in result.output


def test_memory_is_what_the_planner_counts(tmp_path):
    """On cards, whose memory the spec sheet knows: the plan file's own figures."""
    from llmpq.cli.plan import main as plan_main

    node = "{name: a, devices: [{type: t4-16g, count: 4}]}"
    (tmp_path / "c.yaml").write_text(f"nodes: [{node}]\n")
    (tmp_path / "w.yaml").write_text("{prompt_tokens: 64, new_tokens: 8, num_requests: 9}\n")
    path = tmp_path / "plan.json"
    files = ["--cluster", tmp_path / "c.yaml", "--workload", tmp_path / "w.yaml", "-o", path]
    opt = ["--model", str(ASSETS.parents[1] / "configs" / "models" / "opt-30b.json")]
    result = CliRunner().invoke(plan_main, [*opt, *map(str, files), "--method", "uniform"])
    assert result.exit_code == 0, result.output
    plan = Plan.model_validate_json(path.read_text())
    assert len(plan.stages) > 1
    for rank, stage in enumerate(plan.predicted.stages):
        assert memory_of(plan, rank).total == stage.peak_memory_bytes


def test_runs_of_precisions_are_counted():
    assert layer_counts(["8", "8", "4", "8"]) == "2x8,1x4,1x8"
    assert layer_counts(["8-w8a8"]) == "1x8-w8a8"
