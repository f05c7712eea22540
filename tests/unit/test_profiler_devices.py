"""What `llmpq-profile devices` lists and writes, and which cards `layers` measures."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from llmpq.artifact import read_json
from llmpq.cli import plan, profile, profile_layers
from llmpq.cluster import load_cluster
from llmpq.cluster_draft import FoundDevice, cluster_text
from llmpq.device_names import type_of_card, type_of_cpu
from llmpq.errors import UserError
from llmpq.model_lookup import load_model_spec
from llmpq.placement import FoundCard, PlannedDevice, match_cards
from llmpq.profile_data import Profile
from llmpq.profiler import host

CPU = FoundDevice(kind="cpu", name="a CPU", memory_gib=16.0, free_gib=10.0)
T4 = FoundDevice(
    kind="cuda",
    name="Tesla T4",
    memory_gib=14.7,
    free_gib=14.56,
    compute_capability="7.5",
    bandwidth_gbs=240.0,
    type="t4-16g",
)
OTHER = {"name": "NVIDIA Q9", "type": None, "memory_gib": 33.0, "bandwidth_gbs": 880.0}
UNKNOWN = T4.model_copy(update=OTHER)


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(profile.main, [str(a) for a in arguments])


def written(monkeypatch: pytest.MonkeyPatch, path: Path, here: list[FoundDevice]) -> Any:
    """The result of `devices --cluster-out` on a machine with these devices."""
    monkeypatch.setattr(host, "devices_here", lambda: here)
    return call("devices", "--cluster-out", path)


def test_cards_become_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    result = written(monkeypatch, path, [CPU, T4, T4, UNKNOWN])
    assert result.exit_code == 0, result.stderr
    types = [device.type for device in load_cluster(path).devices()]
    assert types == ["t4-16g", "t4-16g", "v100-32g"]  # the nearest to what is not known
    assert "llmpq-profile links" in path.read_text()
    assert "not in the library" in path.read_text() and "Q9" in result.stdout
    assert load_cluster(path).nodes[0].devices[0].memory_gib == 14.5


def test_a_type_that_stands_for_a_card_has_the_cards_capability(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run on that very card must not be refused as another card's."""
    path, card = (
        tmp_path / "cluster.yaml",
        UNKNOWN.model_copy(update={"compute_capability": "13.0"}),
    )
    assert written(monkeypatch, path, [CPU, card]).exit_code == 0
    cluster = load_cluster(path)
    group = cluster.nodes[0].devices[0]
    device = PlannedDevice(0, group.type, group.memory_gib or 0, cluster.capability_of(group.type))
    here = FoundCard(0, card.name, int(card.memory_gib * 2**30), "13.0")
    assert match_cards([here], [device]) == [here]


def test_a_cluster_file_is_not_overwritten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("name: mine\n")
    result = written(monkeypatch, path, [CPU, T4])
    assert result.exit_code == 2 and "--force" in result.stderr
    assert path.read_text() == "name: mine\n"
    assert call("devices", "--cluster-out", path, "--force").exit_code == 0
    assert load_cluster(path).devices()


def test_without_a_card_the_cluster_is_rehearsed_and_can_be_planned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "cluster.yaml"
    assert written(monkeypatch, path, [CPU]).exit_code == 0
    assert [device.type for device in load_cluster(path).devices()] == ["fast", "slow"]
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "cpu.json").write_text(json.dumps(cpu_profile()))
    workload = tmp_path / "workload.yaml"
    workload.write_text("prompt_tokens: 16\nnew_tokens: 8\nnum_requests: 8\nbatch: 4\n")
    files = ("--cluster", path, "--workload", workload, "--profiles", tmp_path / "profiles")
    command: click.Command = plan.main
    words = [str(w) for w in (*files, "-q", "-o", tmp_path / "plan.json")]
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 0, result.stderr


def cpu_profile() -> dict[str, Any]:
    """Made-up times of one thread for the shipped model."""
    key = load_model_spec("tiny-tales").model_key
    rows = [
        {
            "model_key": key, "precision": p, "phase": phase, "micro_batch": b,
            "prompt_tokens": n if phase == "prefill" else 0,
            "past_tokens": n if phase == "decode" else 0,
            "time_ms": 0.1 * b * n, "time_ms_p10": 0.1 * b, "time_ms_p90": 0.1 * b * n,
            "num_samples": 9,
        }
        for p in ("16", "4") for phase in ("prefill", "decode") for b in (1, 4) for n in (8, 32)
    ]  # fmt: skip
    device = {"name": "a CPU", "type": "cpu", "memory_bytes": 1 << 34, "num_threads": 1}
    return {"schema_version": 1, "kind": "profile", "device": device, "rows": rows}


@pytest.mark.parametrize(
    ("name", "memory_gib", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80g"),
        ("Tesla V100-SXM2-16GB", 15.8, "v100-16g"),
        ("Tesla V100-SXM2-32GB", 31.7, "v100-32g"),
        ("NVIDIA A100-SXM4-80GB", 79.1, "a100-80g"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090-24g"),
        ("NVIDIA L40S", 44.4, "l40s-48g"),
        ("NVIDIA L4", 22.0, "l4-24g"),
        ("NVIDIA GeForce RTX 4090", 47.5, None),  # a name alone is not enough
        ("NVIDIA Q9", 24.0, None),
    ],
)
def test_types_of_cards_by_name_and_memory(name: str, memory_gib: float, expected: Any) -> None:
    assert type_of_card(name, memory_gib) == expected


@pytest.mark.parametrize(
    "name, memory_gib, expected",
    [
        ("NVIDIA A100 80GB PCIe", 79.3, "a100-pcie-80g"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80g"),
        ("NVIDIA GeForce RTX 3080 Ti", 11.7, None),  # not a 3080
        ("NVIDIA GeForce RTX 4080 SUPER", 15.7, None),
        ("NVIDIA GeForce RTX 5080 Laptop GPU", 15.5, None),
        ("NVIDIA H100 NVL", 93.6, None),
        ("NVIDIA GeForce RTX 2080 Ti", 10.8, "rtx2080ti-11g"),
        ("NVIDIA RTX 6000 Ada Generation", 47.5, "rtx6000ada-48g"),
    ],
)
def test_other_products_of_a_number_are_other_types(
    name: str, memory_gib: float, expected: str | None
) -> None:
    assert type_of_card(name, memory_gib) == expected


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Intel(R) Xeon(R) Platinum 8380 CPU @ 2.30GHz", "xeon-8380-256g"),
        ("Intel(R) Xeon(R) Platinum 8480+", "xeon-8480-512g"),
        ("AMD EPYC 7742 64-Core Processor", "epyc-7742-256g"),
        ("AMD Ryzen 9 7950X 16-Core Processor", "ryzen-7950x-64g"),
        ("13th Gen Intel(R) Core(TM) i9-13900K", "core-i9-13900k-64g"),
        ("NVIDIA L4", None),
    ],
)
def test_types_of_cpus_by_name(name: str, expected: str | None) -> None:
    assert type_of_cpu(name) == expected


@pytest.mark.parametrize("host", ["my: host [1]", "123456789012", "on", "0.5"])
def test_cluster_names_can_be_read_whatever_the_host_is_called(host: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(cluster_text([CPU, T4], host))
    assert load_cluster(path).nodes[0].name == host.replace(": ", "-").replace(" [1]", "-1-")


# ---- which cards are measured


def targets(monkeypatch: pytest.MonkeyPatch, names: list[str], **flags: Any) -> Any:
    """What `layers` would measure on a machine with these cards of 16 GiB."""
    torch = pytest.importorskip("torch")
    from llmpq.profiler import device_probe as found
    from llmpq.runtime import process

    cards = [found.Card(i, name, 16 << 30, 15 << 30, "7.5") for i, name in enumerate(names)]
    monkeypatch.setattr(found, "cards", lambda: cards)
    monkeypatch.setattr(process, "choose_device", lambda name, role: torch.device("cuda", 0))
    monkeypatch.setattr(process, "choose_dtype", lambda name, device: torch.float16)
    usual = {"device": "cuda", "output": "p.json", "quiet": True}
    return profile_layers.choose_targets(profile_layers.LayersOptions(**usual | flags))


def test_identical_cards_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (only,) = targets(monkeypatch, ["Tesla T4"] * 3, device_type="t4-16g")
    assert (only.device.index, only.type, str(only.output)) == (0, "t4-16g", "p.json")


def test_each_kind_of_card_has_its_own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["Tesla T4", "Tesla V100-SXM2-16GB", "Tesla T4", "NVIDIA Q9"]
    found = targets(monkeypatch, names, output="out/")
    assert [(t.device.index, t.output.name) for t in found] == [
        (0, "t4-16g.json"),
        (1, "v100-16g.json"),
        (3, "nvidia-q9.json"),
    ]
    with pytest.raises(UserError, match="DIR/"):
        targets(monkeypatch, names)
    (named,) = targets(monkeypatch, names, device="cuda:1")
    assert named.device.index == 1
    for wrong, message in (("cuda:7", "4 cards"), ("tpu", "expected auto")):
        with pytest.raises(UserError, match=message):
            targets(monkeypatch, names, device=wrong)


# ---- the command


def test_an_adaptive_profile_holds_all_phases_and_memory(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "cpu.json"
    words = ("--model", "tiny-tales", "--device", "cpu", "--threads", 1, "--precisions", "16")
    result = call("layers", *words, "--budget-s", 4, "-o", path, "-q")
    assert result.exit_code == 0, (result.stderr, result.exception)
    measured = read_json(path, Profile)
    assert {row.phase for row in measured.rows} == {
        *("prefill", "decode", "embedding", "head", "stage_prefill", "stage_decode")
    }
    assert {row.what for row in measured.memory} == {"layer_weights", "cache", "activations"}
    assert measured.device.context_bytes and measured.device.bandwidth_gbs
    assert [file.name for file in tmp_path.iterdir()] == ["cpu.json"]
    other = path.read_text().replace('"micro_batch": 1,', '"micro_batch": 77,', 1)
    path.write_text(other)
    again = call("layers", *words, "--budget-s", 1, "--extend", "-o", path, "-q")
    assert again.exit_code == 0, (again.stderr, again.exception)
    assert 77 in {row.micro_batch for row in read_json(path, Profile).rows}
    path.write_text(other.replace('"num_threads": 1', '"num_threads": 3'))
    refused = call("layers", *words, "--budget-s", 1, "--extend", "-o", path, "-q")
    assert refused.exit_code == 2 and "--extend" in refused.stderr
