"""On one NVIDIA card: what the profiling commands find."""

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from click.testing import CliRunner  # noqa: E402

from llmpq.cli.profile import main  # noqa: E402
from llmpq.cluster import load_cluster  # noqa: E402
from llmpq.profile_data import Profile  # noqa: E402

pytestmark = pytest.mark.gpu

GRID = [
    *("--prefill-micro-batches", "2", "--decode-micro-batches", "4"),
    *("--prompt-tokens", "16", "--past-tokens", "16"),
]
ON_A_BUSY_CPU = ["--threads", "1", "--precisions", "16,4"]


def test_profile_holds_every_precision(tmp_path, device) -> None:
    path = tmp_path / "profile.json"
    on_card = device.type == "cuda"
    words = ["layers", "--device", device.type, "--budget-s", "8", *GRID, "-o", str(path)]
    words += [] if on_card else ON_A_BUSY_CPU
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    profile = Profile.model_validate_json(path.read_text())
    wanted = {"16", "8", "4", "3"} if on_card else {"16", "4"}
    assert {row.precision for row in profile.rows} >= wanted
    assert profile.device.type == device.type
    assert {row.what for row in profile.memory} == {"layer_weights", "cache", "activations"}
    if on_card:
        assert profile.device.context_bytes is not None
        assert profile.device.context_bytes > 50 * 2**20
        assert any(note.startswith("card before: ") for note in profile.notes)


def test_the_card_is_listed_and_its_cluster_can_be_read(tmp_path, card) -> None:
    path = tmp_path / "cluster.yaml"
    result = CliRunner().invoke(main, ["devices", "--cluster-out", str(path), "--json", "-"])
    assert result.exit_code == 0, result.output
    (found, *_) = json.loads(result.stdout)["here"][1:]
    assert found["bandwidth_gbs"] > 100 and 0 < found["free_gib"] <= found["memory_gib"]
    assert len(load_cluster(path).devices()) == torch.cuda.device_count()
