"""On one NVIDIA card: tokens, quantised linears, profiles, and processes that share the card."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.gpu

ASSETS = Path(__file__).resolve().parents[2] / "llmpq" / "assets"
MODEL = ASSETS / "tiny-tales"
PROMPTS = [[1, 40, 50], [1, 9, 8, 7, 6, 5, 4], [1, 300, 20, 10], [1, 77]]


def plan_of(precisions: list[str], cuts: list[int]) -> Any:
    """A hand-written plan for the shipped model; `cuts` are the ends of its stages."""
    from llmpq.model_spec import load_model_spec
    from llmpq.plan import Plan

    starts = [0, *cuts[:-1]]
    stages = [
        {
            "rank": rank,
            "node": "here",
            "devices": ["h200-141g"],
            "first_layer": start,
            "end_layer": end,
            "precisions": precisions[start:end],
        }
        for rank, (start, end) in enumerate(zip(starts, cuts, strict=True))
    ]
    return Plan.model_validate(
        {
            "model": load_model_spec(str(MODEL)).model_dump(),
            "workload": {"prompt_tokens": 8, "new_tokens": 12, "num_requests": len(PROMPTS)},
            "cluster": {
                "nodes": [{"name": "here", "devices": [{"type": "h200-141g", "count": len(cuts)}]}]
            },
            "method": "by hand",
            "batch": 4,
            "prefill_micro_batch": 2,
            "decode_micro_batch": 2,
            "stages": stages,
        }
    )


def generate(folder: Path, plan: Any, dtype: str) -> dict[str, list[int]]:
    """Tokens of `llmpq-run --device cuda` for the plan, by request."""
    from llmpq.artifact import write_json

    write_json(folder / "plan.json", plan)
    lines = [{"id": str(i), "prompt_token_ids": ids} for i, ids in enumerate(PROMPTS)]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    files = ["--plan", "plan.json", "--prompts", "in.jsonl", "--output", "out.jsonl"]
    how = ["--device", "cuda", "--dtype", dtype, "--ignore-eos"]
    if dtype != "float32":  # there, tokens may depend on which requests share a micro-batch
        how.append("--no-refill")
    command = [sys.executable, "-m", "llmpq.run", *files, *how]
    subprocess.run(command, cwd=folder, check=True, timeout=240)
    rows = map(json.loads, (folder / "out.jsonl").read_text().splitlines())
    return {row["id"]: row["token_ids"] for row in rows}


def test_one_stage_gives_the_tokens_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).cuda().eval()
    expected = {
        str(i): model.generate(
            torch.tensor([ids]).cuda(), max_new_tokens=12, do_sample=False, eos_token_id=None
        )[0, len(ids) :].tolist()
        for i, ids in enumerate(PROMPTS)
    }
    assert generate(tmp_path, plan_of(["16"] * 8, [8]), "float32") == expected


@pytest.mark.parametrize("precisions", [["16"] * 8, ["16", "8", "4", "3"] * 2])
def test_stages_that_share_the_card_give_the_tokens_of_one(
    tmp_path: Path, precisions: list[str]
) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    one.mkdir(), three.mkdir()
    alone = generate(one, plan_of(precisions, [8]), "bfloat16")
    assert generate(three, plan_of(precisions, [2, 5, 8]), "bfloat16") == alone


@pytest.mark.parametrize("precision", ["8", "4", "3"])
@pytest.mark.parametrize("rows", [1, 16, 200])
def test_quantised_linears_multiply_by_what_they_hold(precision: str, rows: int) -> None:
    from llmpq.quant import make_linear

    device = torch.device("cuda")
    linear = make_linear(precision, 256, 192, bias=True, dtype=torch.bfloat16, device=device)
    linear.swallow("weight", torch.randn(192, 256))
    linear.swallow("bias", torch.randn(192))
    x = torch.randn(rows, 256, device=device, dtype=torch.bfloat16)
    weight = linear.dequantized_weight().double()
    expected = x.double() @ weight.t() + linear.bias.double()
    error = (linear(x).double() - expected).norm() / expected.norm()
    assert error < 0.01


def test_profile_holds_every_precision_of_the_card(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from llmpq.cli.profile import main
    from llmpq.profile_data import Profile

    path = tmp_path / "profile.json"
    grid = ["--prefill-micro-batches", "1,2", "--decode-micro-batches", "1,4"]
    lengths = ["--prompt-tokens", "16", "--past-tokens", "16"]
    words = ["layers", "--device", "cuda", "--budget-s", "5", *grid, *lengths, "-o", str(path)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    profile = Profile.model_validate_json(path.read_text())
    assert {row.precision for row in profile.rows} >= {"16", "8", "4", "3"}
    assert profile.device.type == "cuda"
    assert profile.device.context_bytes is not None and profile.device.context_bytes > 50 * 2**20
    assert {row.what for row in profile.memory} == {"layer_weights", "cache", "activations"}
    assert any(note.startswith("card before: ") for note in profile.notes)


def test_the_card_is_listed_and_its_cluster_can_be_read(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from llmpq.cli.profile import main
    from llmpq.cluster import load_cluster

    path = tmp_path / "cluster.yaml"
    result = CliRunner().invoke(main, ["devices", "--cluster-out", str(path), "--json", "-"])
    assert result.exit_code == 0, result.output
    (card, *_) = json.loads(result.stdout)["here"][1:]
    assert card["bandwidth_gbs"] > 100 and 0 < card["free_gib"] <= card["memory_gib"]
    assert len(load_cluster(path).devices()) == torch.cuda.device_count()
