"""The files in `configs/` are valid, and the model shapes are those of the published models."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmpq.cluster import GIB, Cluster, load_cluster
from llmpq.devices import LIBRARY_PATH, device_library
from llmpq.model_lookup import DEFAULT_MODEL, load_model_spec
from llmpq.model_spec import ModelSpec
from llmpq.workload import load_workload, request_lengths

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# Numbers of parameters of the published checkpoints (model cards and weight files).
PUBLISHED = {
    "bloom-176b": 176_247_271_424,
    "llama-2-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "opt-1.3b": 1_315_758_080,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
}
# Those with experts, or with latent attention, in billions, from their model cards; counted on
# transformers' own modules. Cards of Gemma 3 and Llama 4 count the vision parts as well.
COUNTED = {
    "gpt-oss-120b": 116.8,
    "qwen3-235b-a22b": 235,
    "glm-4.5-air": 106,
    "deepseek-v3": 671,
    "llama-4-scout": 109,
}
# Its card says 27 billion, with the vision part.
TEXT_OF = {"gemma-3-27b": 27.0}
MODELS = [*PUBLISHED, *COUNTED, *TEXT_OF]
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
# Clusters in the manner of SplitQuant's.
SPLITQUANT_CLUSTERS = {
    "s01-qwen7b-1xv100": {"v100-32g": 1},
    "s02-llama13b-1xa100": {"a100-40g": 1},
    "s03-qwen14b-1xa100": {"a100-40g": 1},
    "s04-qwen14b-2xv100-1xa100": {"v100-32g": 2, "a100-40g": 1},
    "s05-qwen32b-1xv100-1xa100": {"v100-32g": 1, "a100-40g": 1},
    "s06-qwen32b-3xv100-1xa100": {"v100-32g": 3, "a100-40g": 1},
    "s07-llama70b-4xa100": {"a100-40g": 4},
    "s08-llama70b-4xv100": {"v100-32g": 4},
    "s09-llama70b-4xv100-4xa100": {"v100-32g": 4, "a100-40g": 4},
    "s10-qwen32b-2x3090-1x4090-1xl4": {"rtx3090-24g": 2, "rtx4090-24g": 1, "l4-24g": 1},
}
# GB/s each way between two cards of a node that has NVLink; other nodes have the cards' own link.
NVLINK = {"v100-32g": 25, "a100-40g": 100}


def stems(folder: str, suffix: str) -> set[str]:
    return {path.stem for path in (CONFIGS / folder).glob(f"*{suffix}")}


def test_every_file_is_checked_below() -> None:
    assert {path.name.removesuffix(".json") for path in CONFIGS.glob("models/*")} == set(MODELS)
    assert stems("clusters", ".yaml") == {
        *CLUSTERS,
        *SPLITQUANT_CLUSTERS,
        "64-gpus-4-types",
        "rehearsal-3",
    }
    workloads = {"paper-512-100", "paper-128-200", "cnn-dailymail", "loogle", "quickstart"}
    assert stems("workloads", ".yaml") == workloads
    others = {path.name for path in CONFIGS.glob("*.yaml")}
    assert others == {"devices.yaml", "planner-benchmark.yaml"}


def total_params(spec: ModelSpec) -> int:
    layers = sum(spec.kind_specs[kind].layer_params for kind in spec.kind_of_layers)
    head = 0 if spec.tied else spec.head_params
    return layers + spec.embedding_params + spec.final_params + head


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_has_the_published_number_of_parameters(name: str) -> None:
    spec = load_model_spec(str(CONFIGS / "models" / f"{name}.json"))
    assert total_params(spec) == PUBLISHED[name]
    assert not spec.guessed
    assert spec.num_heads * spec.head_dim == spec.hidden_size


@pytest.mark.parametrize("name", TEXT_OF)
def test_text_model_has_about_the_published_number_of_parameters(name: str) -> None:
    spec = load_model_spec(str(CONFIGS / "models" / f"{name}.json"))
    assert total_params(spec) == pytest.approx(1e9 * TEXT_OF[name], rel=0.015)
    assert not spec.guessed


@pytest.mark.parametrize("name", COUNTED)
def test_counted_model_has_the_published_number_of_parameters(name: str) -> None:
    pytest.importorskip("transformers")
    from llmpq.models.count_model import count_params

    spec = count_params(CONFIGS / "models" / f"{name}.json").without_windows()
    assert total_params(spec) == pytest.approx(1e9 * COUNTED[name], rel=0.015)
    sparse = [kind for kind in spec.kind_specs if kind.experts is not None]
    assert len(sparse) == 1
    of_experts = sparse[0].experts.params * spec.kind_of_layers.count(len(spec.kind_specs) - 1)
    assert of_experts > 0.85 * total_params(spec)


@pytest.mark.parametrize("name", MODELS)
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


def device_counts(cluster: Cluster) -> dict[str, int]:
    return dict(Counter(device.type for device in cluster.devices()))


def check_links(cluster: Cluster) -> None:
    """Links are the cards' own, or NVLink where a node has several cards of a kind."""
    for node in cluster.nodes:
        kind, count = node.devices[0].type, sum(group.count for group in node.devices)
        own = device_library()[kind].link_gbs
        assert node.link.bandwidth_gbs == (NVLINK.get(kind, own) if count > 1 else own), node.name


@pytest.mark.parametrize("name", SPLITQUANT_CLUSTERS)
def test_splitquant_cluster(name: str) -> None:
    cluster = load_cluster(CONFIGS / "clusters" / f"{name}.yaml")
    assert cluster.name == name
    assert device_counts(cluster) == SPLITQUANT_CLUSTERS[name]
    assert cluster.link.bandwidth_gbs == 1.25
    assert cluster.price_per_hour() is None, "prices change; the files give none"
    check_links(cluster)


def test_the_large_cluster() -> None:
    cluster = load_cluster(CONFIGS / "clusters" / "64-gpus-4-types.yaml")
    assert cluster.name == "64-gpus-4-types"
    assert sorted(device_counts(cluster).values()) == [16] * 4
    assert [sum(group.count for group in node.devices) for node in cluster.nodes] == [4] * 16
    assert cluster.link.bandwidth_gbs == 12.5, "100 Gb/s"
    check_links(cluster)


CASES = yaml.safe_load((CONFIGS / "planner-benchmark.yaml").read_text())


def test_every_cluster_has_one_case() -> None:
    assert [case["cluster"] for case in CASES] == [*CLUSTERS, *SPLITQUANT_CLUSTERS]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["cluster"])
def test_planner_benchmark(case: dict[str, Any]) -> None:
    """Files exist, prompts are within the model's positions, 3 bits for all layers would fit."""
    assert set(case) == {"cluster", "model", "workload", "thetas"}
    cluster = load_cluster(CONFIGS / "clusters" / f"{case['cluster']}.yaml")
    spec = load_model_spec(str(CONFIGS / "models" / f"{case['model']}.json"))
    workload = load_workload(CONFIGS / "workloads" / f"{case['workload']}.yaml")
    longest = max(prompt + new for prompt, new in request_lengths(workload))
    assert longest <= spec.max_positions
    bytes_at_3_bits = spec.num_layers * spec.layer_params * 3 / 8
    assert bytes_at_3_bits < sum(device.memory_bytes for device in cluster.devices())
    small, middle, large = case["thetas"]
    assert 0 < small < middle < large


# -- prices -------------------------------------------------------------------------------------


def priced(*nodes: tuple[float | None, list[tuple[int, float | None]]]) -> Cluster:
    """A cluster of nodes, each (its price, [(devices, price of each)])."""
    data = [
        {
            "name": f"n{index}",
            "price_per_hour": price,
            "devices": [
                {"type": "t4-16g", "count": count, "price_per_hour": each} for count, each in groups
            ],
        }
        for index, (price, groups) in enumerate(nodes)
    ]
    return Cluster.model_validate({"nodes": data})


@pytest.mark.parametrize(
    ("cluster", "total"),
    [
        (priced((None, [(3, 0.5)])), 1.5),
        (priced((2.0, [(4, None)])), 2.0),
        (priced((2.0, [(4, None), (2, 0.5)])), 3.0),
        (priced((2.0, [(1, None)]), (None, [(2, 0.25)])), 2.5),
        (priced((None, [(1, None)])), None),
        (priced((None, [(2, 0.5), (1, None)])), None),
        (priced((2.0, [(1, None)]), (None, [(1, None)])), None),
    ],
)
def test_price_of_a_cluster(cluster: Cluster, total: float | None) -> None:
    assert cluster.price_per_hour() == total


@pytest.mark.parametrize("price", [0, -1.0, float("inf"), float("nan"), "dear"])
def test_prices_are_positive_numbers(price: object) -> None:
    device = {"type": "t4-16g"}
    for node in (
        {"name": "n", "devices": [device], "price_per_hour": price},
        {"name": "n", "devices": [{**device, "price_per_hour": price}]},
    ):
        with pytest.raises(ValueError, match="price_per_hour"):
            Cluster.model_validate({"nodes": [node]})


def test_rehearsal_cluster_needs_the_plan_to_choose() -> None:
    """Devices differ in speed and memory, and no one of them holds the model at 16 bits."""
    cluster = load_cluster(CONFIGS / "clusters" / "rehearsal-3.yaml")
    devices = cluster.devices()
    assert len({device.memory_bytes for device in devices}) == len(devices) == 3
    assert {device.type for device in devices} == set(cluster.rehearse)
    assert len({r.slowdown for r in cluster.rehearse.values()}) == 3


def spans(lengths: list[tuple[int, int]]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(shortest, longest) prompt and output."""
    prompts, outputs = zip(*lengths, strict=True)
    return (min(prompts), max(prompts)), (min(outputs), max(outputs))


def test_workloads() -> None:
    lengths = {}
    for path in CONFIGS.glob("workloads/*.yaml"):
        workload = load_workload(path)
        lengths[path.stem] = request_lengths(workload)
        assert len(lengths[path.stem]) == workload.num_requests
    assert set(lengths["paper-512-100"]) == {(512, 100)} and len(lengths["paper-512-100"]) == 32
    assert set(lengths["paper-128-200"]) == {(128, 200)} and len(lengths["paper-128-200"]) == 32
    assert spans(lengths["cnn-dailymail"]) == ((200, 1600), (40, 100))
    assert spans(lengths["loogle"]) == ((4000, 16000), (10, 60))
    assert len(lengths["cnn-dailymail"]) == 512 and len(lengths["loogle"]) == 16
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
