"""The device library: every figure sourced, positive, and in keeping with its neighbours."""

import re
from pathlib import Path

import pytest
import yaml

from llmpq.artifact import read_yaml
from llmpq.cluster import Cluster, load_cluster
from llmpq.device_names import type_of_card, type_of_cpu
from llmpq.devices import LIBRARY_PATH, DeviceLibrary, DeviceType, device_library

CLUSTERS = Path(__file__).resolve().parents[2] / "configs" / "clusters"
LIBRARY = device_library()
GPUS = {name: device for name, device in LIBRARY.items() if device.kind == "gpu"}
CPUS = {name: device for name, device in LIBRARY.items() if device.kind == "cpu"}
BETTER = (  # faster in arithmetic and in bandwidth
    ("t4-16g", "a2-16g"),
    ("a10-24g", "t4-16g"),
    ("v100-32g", "v100-pcie-32g"),
    ("a100-40g", "v100-32g"),
    ("h100-pcie-80g", "a100-pcie-80g"),
    ("h100-80g", "h100-pcie-80g"),
    ("b200-180g", "h200-141g"),
    ("mi300x-192g", "mi210-64g"),
    ("rtx3090-24g", "rtx3080-10g"),
    ("rtx4090-24g", "rtx4080-16g"),
    ("rtx5090-32g", "rtx5080-16g"),
    ("m3-ultra-512g", "m3-max-128g"),
    ("epyc-9755-768g", "epyc-9654-768g"),
)


def test_it_is_large_enough() -> None:
    assert len(GPUS) >= 30
    assert len(CPUS) >= 5
    assert LIBRARY.keys() == GPUS.keys() | CPUS.keys()


def test_every_source_is_spelled_out_and_used() -> None:
    sources = read_yaml(LIBRARY_PATH, DeviceLibrary).sources
    assert {device.source for device in LIBRARY.values()} == sources.keys()
    assert all(re.search(r"20\d\d|WP-|Apple|ARK|AMD", text) for text in sources.values())


@pytest.mark.parametrize("name", LIBRARY)
def test_figures_agree_with_each_other(name: str) -> None:
    device = LIBRARY[name]
    assert 1 <= device.memory_gib <= 1024
    read_all_s = device.memory_gib * 1.074 / device.bandwidth_gbs
    assert 0.005 <= read_all_s <= (2.0 if device.kind == "cpu" else 0.6)
    assert device.link_gbs < device.bandwidth_gbs
    assert device.peer_gbs is None or device.peer_gbs > device.link_gbs
    assert device.fp32_tflops is not None and device.fp32_tflops <= device.fp16_tflops
    assert (device.price_per_hour is None) == (device.price_source == "")
    assert device.link and device.compute_capability and device.source


@pytest.mark.parametrize("name", LIBRARY)
def test_fewer_bits_are_not_slower(name: str) -> None:
    device = LIBRARY[name]
    assert (device.int8_tops or 1e9) >= device.fp16_tflops
    assert (device.fp8_tflops or 1e9) >= device.fp16_tflops
    if device.fp4_tflops:
        assert device.fp8_tflops is not None and device.fp4_tflops >= device.fp8_tflops
    if device.fp16_accumulate_tflops:  # halved for fp32 sums
        assert device.fp16_accumulate_tflops / device.fp16_tflops == pytest.approx(2, rel=0.01)
        assert "GeForce" in device.name


@pytest.mark.parametrize("name", sorted(LIBRARY.keys() - {"strix-halo-128g"}))
def test_a_device_is_recognized_by_its_own_name(name: str) -> None:
    """The words of the key stand in the driver's name, which strix-halo-128g is not known by."""
    device = LIBRARY[name]
    by_name = type_of_cpu(device.name)
    found = by_name if device.kind == "cpu" else type_of_card(device.name, device.memory_gib)
    assert found == name, "llmpq/device_names.py says how a key must be written"


@pytest.mark.parametrize(("better", "worse"), BETTER)
def test_relations_that_everybody_knows(better: str, worse: str) -> None:
    assert LIBRARY[better].fp16_tflops > LIBRARY[worse].fp16_tflops
    assert LIBRARY[better].bandwidth_gbs >= LIBRARY[worse].bandwidth_gbs


@pytest.mark.parametrize("name", [n for n in GPUS if n.startswith("rtx") and "ada" not in n])
def test_geforce_cards_say_what_they_halve(name: str) -> None:
    assert (LIBRARY[name].fp16_accumulate_tflops is not None) == ("GeForce" in LIBRARY[name].name)


def test_nvidia_cards_have_the_power_that_the_curves_need() -> None:
    nvidia = [device for device in GPUS.values() if device.name.startswith("NVIDIA")]
    assert len(nvidia) >= 30
    assert all(50 <= (device.board_watts or 0) <= 1200 for device in nvidia)
    assert all(re.fullmatch(r"\d+\.\d", device.compute_capability) for device in nvidia)


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_clusters_name_types_of_the_library(path: Path) -> None:
    cluster = load_cluster(path)
    assert {device.type for device in cluster.devices()} <= LIBRARY.keys() | cluster.rehearse.keys()


def test_a_price_of_the_library_is_not_a_price_of_the_cluster() -> None:
    assert LIBRARY["t4-16g"].price_per_hour is not None
    cluster = Cluster.model_validate({"nodes": [{"name": "n", "devices": [{"type": "t4-16g"}]}]})
    assert cluster.price_per_hour() is None


def test_a_figure_must_be_positive() -> None:
    text = yaml.safe_load(LIBRARY_PATH.read_text())["devices"]["t4-16g"]
    assert DeviceType.model_validate(text) == LIBRARY["t4-16g"]
    with pytest.raises(ValueError, match="int8_tops"):
        DeviceType.model_validate(text | {"int8_tops": 0})
