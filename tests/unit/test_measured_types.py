"""Device types that the library does not have: figures in the cluster file, or a profile."""

from typing import Any

import pytest

from llmpq.cluster import Cluster
from llmpq.costs.latency import device_times, machine_of
from llmpq.costs.measured_types import unused_profiles, with_measured_types
from llmpq.errors import UserError
from llmpq.model_lookup import load_model_spec
from llmpq.profile_data import Profile

SPEC = load_model_spec("tiny-tales")


def cluster(*groups: dict[str, Any], **more: Any) -> Cluster:
    return Cluster.model_validate({"nodes": [{"name": "n", "devices": list(groups)}], **more})


def profile(
    name: str, key: str = SPEC.model_key, phases=("prefill", "decode"), **device
) -> Profile:
    """Rows at 16 bits that grow with the batch and with the tokens."""
    rows = [
        {
            "model_key": key,
            "precision": "16",
            "phase": phase,
            "micro_batch": batch,
            "prompt_tokens": tokens if phase == "prefill" else 0,
            "past_tokens": tokens if phase == "decode" else 0,
            "num_samples": 3,
        }
        | dict.fromkeys(("time_ms", "time_ms_p10", "time_ms_p90"), 0.1 + batch * tokens / 1e4)
        for phase in phases
        for batch in (1, 2, 4)
        for tokens in (32, 64, 128)
    ]
    device = {"name": f"Card {name}", "type": name, "memory_bytes": 2**34, **device}
    return Profile.model_validate({"device": device, "rows": rows})


OWN = {"type": "shop-24g", "memory_gib": 24}
FIGURES = {"bandwidth_gbs": 500, "tflops": 40}


def test_figures_in_the_cluster_file_make_a_type_usable():
    lab = cluster({**OWN, **FIGURES, "compute_capability": "8.9"})
    times = device_times(lab, "shop-24g", SPEC, [])
    assert not times.measured and times.seconds("16", "decode", 1, 100) > 0
    assert machine_of(lab, "shop-24g").capability == (8, 9)
    faster = cluster({**OWN, "bandwidth_gbs": 5000, "tflops": 400, "compute_capability": "8.9"})
    assert device_times(faster, "shop-24g", SPEC, []).seconds("16", "prefill", 8, 512) < (
        times.seconds("16", "prefill", 8, 512)
    )
    assert Cluster.model_validate_json(lab.model_dump_json()) == lab


def test_without_a_capability_no_kernels_are_counted_on():
    machine = machine_of(cluster({**OWN, **FIGURES}), "shop-24g")
    assert machine.libraries == {"bitsandbytes"} and machine.is_card


def test_a_profile_and_memory_make_a_type_usable():
    measured = profile("shop-24g", compute_capability="6.1")
    lab = with_measured_types(cluster(OWN), [measured])
    times = device_times(lab, "shop-24g", SPEC, [measured])
    assert times.measured and times.machine.capability == (6, 1)
    assert lab.capability_of("shop-24g") == "6.1" and lab.kind_of("shop-24g") == "gpu"
    assert machine_of(lab, "shop-24g").capability == (6, 1)  # as a run without profiles sees it


def test_a_cpu_is_a_device_by_its_profile_or_by_the_file():
    measured = profile("cpu", num_threads=8)
    lab = with_measured_types(cluster({"type": "cpu", "memory_gib": 64}), [measured])
    assert lab.kind_of("cpu") == "cpu" and device_times(lab, "cpu", SPEC, [measured]).measured
    said = cluster({**OWN, **FIGURES, "kind": "cpu"})
    assert not machine_of(said, "shop-24g").is_card
    assert device_times(said, "shop-24g", SPEC, []).precisions


def test_the_library_and_the_file_are_not_overruled_by_a_profile():
    measured = profile("t4-16g", num_threads=1)
    lab = with_measured_types(cluster({"type": "t4-16g"}), [measured])
    assert lab.kind_of("t4-16g") == "gpu" and lab.capability_of("t4-16g") == "7.5"
    said = cluster({**OWN, "compute_capability": "9.9", "kind": "gpu"})
    found = with_measured_types(said, [profile("shop-24g", compute_capability="6.1")])
    assert found == said


def test_figures_correct_those_of_the_library():
    lab = cluster({"type": "t4-16g", "bandwidth_gbs": 250})
    figures = lab.figures_of("t4-16g")
    assert figures is not None
    assert (figures.bandwidth_gbs, figures.fp16_tflops) == (250, 65)


@pytest.mark.parametrize(
    "groups, expected",
    [
        ([{"type": "shop-24g"}], "unknown device type 'shop-24g'"),
        ([{"type": "shop-24g"}], "give memory_gib with bandwidth_gbs and tflops"),
        ([{**OWN, "bandwidth_gbs": 500}], "shop-24g: is not in the library and has no tflops"),
        ([{**OWN, "tflops": 5}], "has no bandwidth_gbs"),
        ([{**OWN, **FIGURES}, OWN], "shop-24g: its groups have different bandwidth_gbs"),
        ([{**OWN, **FIGURES, "tflops": -1}], "greater than 0"),
        ([{"type": "t4x"}, OWN], "unknown device type 'shop-24g'"),  # all faults at once
    ],
)
def test_bad_figures(groups, expected):
    with pytest.raises(ValueError, match=expected):
        cluster(*groups)


def test_figures_of_a_rehearsed_type():
    with pytest.raises(ValueError, match="shop-24g is rehearsed on a CPU: bandwidth_gbs, tflops"):
        cluster(
            {"type": "shop-24g", **FIGURES},
            rehearse={"shop-24g": {"slowdown": 1, "memory_mib": 9}},
        )


def test_memory_alone_does_not_tell_times():
    with pytest.raises(UserError, match="unknown device type 'shop-24g'.*--type shop-24g"):
        device_times(cluster(OWN), "shop-24g", SPEC, [])
    other = profile("shop-24g", key="another-model")
    with pytest.raises(UserError, match="its profile holds no rows of"):
        device_times(cluster(OWN), "shop-24g", SPEC, [other])


@pytest.mark.parametrize(
    "given, expected",
    [
        (profile("t4-16g"), ""),
        (profile("a100-80g"), "no device of the cluster is of this type, it has t4-16g"),
        (profile("t4-16g", key="another-model"), "it is for another model (another-model; "),
        (profile("t4-16g", phases=("decode",)), "it has decode rows only"),
        (profile("t4-16g", phases=("prefill",)), "it has prefill rows only"),
    ],
)
def test_unused_profiles_are_named_with_the_reason(given, expected):
    notes = unused_profiles(cluster({"type": "t4-16g"}), SPEC, [given])
    assert len(notes) == bool(expected)
    assert all(expected in note and given.device.name in note for note in notes)


def test_two_files_of_one_type_complete_each_other():
    halves = [profile("t4-16g", phases=(phase,)) for phase in ("prefill", "decode")]
    assert unused_profiles(cluster({"type": "t4-16g"}), SPEC, halves) == []


def test_rehearsals_use_one_thread():
    lab = cluster({"type": "slow"}, rehearse={"slow": {"slowdown": 2, "memory_mib": 99}})
    assert unused_profiles(lab, SPEC, [profile("cpu", num_threads=1)]) == []
    (note,) = unused_profiles(lab, SPEC, [profile("cpu", num_threads=8)])
    assert "--threads 1" in note


def test_what_helps_with_unknown_cards_is_said_once():
    """However many there are, and whatever their names: the message stays short."""
    with pytest.raises(ValueError, match="and 26 more") as caught:
        cluster(*({"type": f"{number:02} {'x' * 200}"} for number in range(30)))
    (fault,) = caught.value.errors()
    assert fault["msg"].count("memory_gib with bandwidth_gbs") == 1
    assert len(fault["msg"]) < 1000
