"""The files in `configs/` are valid, and the model shapes are those of the published models."""

import json
from pathlib import Path

import pytest

from llmpq.cluster import GIB, load_cluster
from llmpq.devices import LIBRARY_PATH, device_library
from llmpq.model_spec import DEFAULT_MODEL, load_model_spec
from llmpq.workload import load_workload, request_lengths

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# Numbers of parameters of the published checkpoints (model cards and weight files).
PUBLISHED = {
    "bloom-176b": 176_247_271_424,
    "llama-2-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
}
# (devices by type, model) of the paper's eleven clusters.
CLUSTERS = {
    "01-opt13b-1xv100": {"v100-32g": 1},
    "02-opt13b-1xa100": {"a100-40g": 1},
    "03-opt30b-3xt4-1xv100": {"t4-16g": 3, "v100-32g": 1},
    "04-opt30b-3xp100-1xv100": {"p100-12g": 3, "v100-32g": 1},
    "05-opt66b-4xt4-2xv100": {"t4-16g": 4, "v100-32g": 2},
    "06-opt66b-2xv100-2xa100": {"v100-32g": 2, "a100-40g": 2},
    "07-bloom176b-4xv100-4xa100": {"v100-32g": 4, "a100-40g": 4},
    "08-bloom176b-4xv100-2xa100": {"v100-32g": 4, "a100-80g": 2},
    "09-opt30b-4xt4": {"t4-16g": 4},
    "10-opt66b-4xv100": {"v100-32g": 4},
    "11-bloom176b-4xa100": {"a100-80g": 4},
}


def stems(folder: str, suffix: str) -> set[str]:
    return {path.stem for path in (CONFIGS / folder).glob(f"*{suffix}")}


def test_every_file_is_checked_below() -> None:
    assert {path.name.removesuffix(".json") for path in CONFIGS.glob("models/*")} == set(PUBLISHED)
    assert stems("clusters", ".yaml") == {*CLUSTERS, "rehearsal-3"}
    assert stems("workloads", ".yaml") == {"paper-512-100", "paper-128-200", "quickstart"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_has_the_published_number_of_parameters(name: str) -> None:
    spec = load_model_spec(str(CONFIGS / "models" / f"{name}.json"))
    head = 0 if spec.tied else spec.head_params
    total = spec.num_layers * spec.layer_params + spec.embedding_params + spec.final_params + head
    assert total == PUBLISHED[name]
    assert not spec.guessed
    assert spec.num_heads * spec.head_dim == spec.hidden_size


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_config_is_what_transformers_reads(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = (CONFIGS / "models" / f"{name}.json").read_text()
    (tmp_path / "config.json").write_text(text)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == json.loads(text)["model_type"]
    assert [config.architectures[0]] == json.loads(text)["architectures"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster(name: str) -> None:
    cluster = load_cluster(CONFIGS / "clusters" / f"{name}.yaml")
    assert cluster.name == name
    types = [device.type for device in cluster.devices()]
    assert {kind: types.count(kind) for kind in types} == CLUSTERS[name]
    assert len(cluster.nodes) == len(CLUSTERS[name]), "devices of one type share a node"
    for device in cluster.devices():
        assert device.memory_bytes < device_library()[device.type].memory_gib * GIB
    for node in cluster.nodes:
        kind = node.devices[0].type
        assert node.link.bandwidth_gbs == device_library()[kind].link_gbs
    assert cluster.link.bandwidth_gbs == 1.25


def test_rehearsal_cluster_needs_the_plan_to_choose() -> None:
    """Devices differ in speed and memory, and no one of them holds the model at 16 bits."""
    cluster = load_cluster(CONFIGS / "clusters" / "rehearsal-3.yaml")
    devices = cluster.devices()
    assert len({device.memory_bytes for device in devices}) == len(devices) == 3
    assert {device.type for device in devices} == set(cluster.rehearse)
    assert len({r.slowdown for r in cluster.rehearse.values()}) == 3


def test_workloads() -> None:
    lengths = {}
    for path in CONFIGS.glob("workloads/*.yaml"):
        workload = load_workload(path)
        lengths[path.stem] = request_lengths(workload)
        assert len(lengths[path.stem]) == workload.num_requests
    assert set(lengths["paper-512-100"]) == {(512, 100)} and len(lengths["paper-512-100"]) == 32
    assert set(lengths["paper-128-200"]) == {(128, 200)} and len(lengths["paper-128-200"]) == 32
    prompts = [prompt for prompt, _ in lengths["quickstart"]]
    assert (min(prompts), max(prompts)) == (6, 114)


def test_devices_are_the_packaged_library() -> None:
    link = CONFIGS / "devices.yaml"
    assert link.is_symlink() and link.resolve() == LIBRARY_PATH.resolve()


def test_shipped_model() -> None:
    config = LIBRARY_PATH.parent / DEFAULT_MODEL / "config.json"
    if not config.is_file():
        pytest.skip("the shipped model is not in this checkout")
    assert not load_model_spec(DEFAULT_MODEL).guessed
