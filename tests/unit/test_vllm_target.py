"""Plans for stock vLLM: precisions, labels, and what is refused."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from exports import EPYC, plan_of

import llmpq
from llmpq.cli.plan import main
from llmpq.cluster import Cluster
from llmpq.errors import UserError
from llmpq.planner.vllm_target import for_vllm
from llmpq.workload import Workload

WORKLOAD = Workload(prompt_tokens=32, new_tokens=16, num_requests=8, batch=4)


def cluster(device: str, memory_gib: float = 1.006) -> Cluster:
    """Two devices with room for the model at fewer than 16 bits alone."""
    group = {"type": device, "count": 2, "memory_gib": memory_gib}
    return Cluster.model_validate({"nodes": [{"name": "a", "devices": [group]}]})


def planned(device: str, target: str, **more) -> set[str]:
    model = llmpq.load_model("tiny-tales")
    plan = llmpq.plan(model, cluster(device), WORKLOAD, target=target, max_quality_loss=100, **more)
    assert plan.target == target
    return set(plan.precisions)


def test_plans_use_the_precisions_that_vllm_runs_on_their_devices():
    assert planned(EPYC, "vllm", time_limit_s=5) <= {"16", "8-w8a8", "4"}
    with pytest.raises(UserError, match="no device type has times"):
        planned(EPYC, "vllm", precisions=["3"])
    assert planned(EPYC, "llmpq", precisions=["3"], time_limit_s=5) == {"3"}


def test_cards_that_are_too_old_are_named():
    with pytest.raises(UserError, match="'v100-32g' has compute capability 7.0, and vLLM 0.32"):
        planned("v100-32g", "vllm")


def test_a_stage_that_is_short_of_memory_in_vllm_is_noted():
    plan, notes = for_vllm(plan_of(["16"] * 8, device=EPYC, memory_gib=1.001))
    assert plan.target == "vllm" and notes[0].startswith("stage 0 needs")
    assert not for_vllm(plan_of(["16"] * 8, device=EPYC))[1]


def test_the_command_labels_the_plan(tmp_path: Path):
    (tmp_path / "cluster.yaml").write_text(cluster("a100-80g", 8).model_dump_json())
    (tmp_path / "workload.yaml").write_text(WORKLOAD.model_dump_json())
    words = ["--cluster", str(tmp_path / "cluster.yaml"), "--target", "vllm", "--no-compare"]
    words += ["--workload", str(tmp_path / "workload.yaml"), "--no-what-if", "--time-limit", "3"]
    result = CliRunner().invoke(main, [*words, "-o", str(tmp_path / "plan.json")])
    assert result.exit_code == 0, result.output
    assert "planned for vLLM" in result.output
    assert json.loads((tmp_path / "plan.json").read_text())["target"] == "vllm"
    refused = CliRunner().invoke(main, [*words, "--tensor-parallel", "2"])
    assert refused.exit_code == 2 and "--target vllm" in refused.output
