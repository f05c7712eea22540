"""Cluster, workload, plan, profile and sensitivity: what is valid, and what a bad file says.

Every bad input below gives one `UserError` whose lines name the file, the line and the fault.
"""

import copy
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmpq.cluster import GIB, GPU_CONTEXT_BYTES, MIB, Cluster, Link, load_cluster
from llmpq.costs.latency import machine_of
from llmpq.devices import DeviceLibrary, device_library
from llmpq.errors import InfeasibleError, LlmpqError, UserError, WorkerError
from llmpq.machine import card
from llmpq.model_lookup import config_path, load_model_spec, spec_from_config
from llmpq.plan_data import Plan, Stage, load_plan, refuse_shared_stages
from llmpq.precision import PRECISIONS, group_size
from llmpq.profile_data import Profile, load_profiles, load_sensitivity
from llmpq.workload import Workload, load_workload, request_lengths

MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}
CLUSTER = """\
name: lab
nodes:
  - name: node0
    devices: [{type: t4-16g, count: 3}, {type: v100-32g, memory_gib: 30.0}]
    link: {bandwidth_gbs: 12.0, latency_us: 20}
  - name: node1
    devices: [{type: laptop}]
link: {bandwidth_gbs: 1.25, latency_us: 50}
rehearse:
  laptop: {slowdown: 3.0, memory_mib: 300}
"""
WORKLOAD = """\
name: job
prompt_tokens: 512
new_tokens: {min: 10, max: 20}
num_requests: 100
batch: auto
"""
TINY = Cluster.model_validate(
    {"nodes": [{"name": "n", "devices": [{"type": "t4-16g", "count": 2}]}]}
)


def plan_data() -> dict[str, Any]:
    """A valid plan: four layers over two devices."""
    plan = Plan(
        model=spec_from_config(MODEL, name="m"),
        workload=Workload(prompt_tokens=8, new_tokens=4, num_requests=4),
        cluster=TINY,
        method="manual",
        batch=4,
        prefill_micro_batch=2,
        decode_micro_batch=4,
        stages=[stage(0, 0, 1, ["8"]), stage(1, 1, 4, ["16", "4", "3"])],
    )
    return json.loads(plan.model_dump_json())


def stage(rank: int, first: int, end: int, precisions: list[str]) -> Stage:
    return Stage(
        rank=rank,
        node="n",
        devices=["t4-16g"],
        first_layer=first,
        end_layer=end,
        precisions=precisions,
    )


ROW = {
    "model_key": "k",
    "precision": "8",
    "phase": "decode",
    "micro_batch": 4,
    "past_tokens": 64,
    "time_ms": 1.0,
    "time_ms_p10": 0.9,
    "time_ms_p90": 1.2,
    "num_samples": 10,
}
PROFILE = {
    "schema_version": 1,
    "kind": "profile",
    "device": {"name": "NVIDIA T4", "type": "t4-16g", "memory_bytes": 16 * GIB},
    "rows": [ROW, {**ROW, "phase": "head"}],
}
SENSITIVITY = {
    "schema_version": 1,
    "kind": "sensitivity",
    "model": "m",
    "num_layers": 2,
    "indicator": "variance",
    "layers": [
        {"layer": 0, "precision": "4", "sensitivity": 0.5},
        {"layer": 1, "precision": "4", "sensitivity": 0.0},
        {"layer": 0, "precision": "3", "sensitivity": 0.7},
    ],
    "calibration": {"source": "text", "num_tokens": 100},
    "fit": {"scale": 1.0, "mean_abs_error_percent": 0.1, "num_plans": 3},
}


def message(load: Callable[[Path], Any], path: Path, text: str) -> str:
    """What loading a file with this text complains of."""
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(str(path)) for line in lines), "every line names the file"
    return str(caught.value).replace(str(path), path.name)


# -- cluster ------------------------------------------------------------------------------------


def test_cluster(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CLUSTER)
    cluster = load_cluster(tmp_path / "c.yaml")
    devices = cluster.devices()
    assert [d.type for d in devices] == ["t4-16g"] * 3 + ["v100-32g", "laptop"]
    assert [d.node for d in devices] == ["node0"] * 4 + ["node1"]
    assert devices[0].memory_bytes == 16 * GIB - GPU_CONTEXT_BYTES
    assert devices[3].memory_bytes == 30 * GIB - GPU_CONTEXT_BYTES
    assert devices[4].memory_bytes == 300 * MIB
    assert cluster.link_between("node0", "node0").bandwidth_gbs == 12.0
    assert cluster.link_between("node0", "node1").bandwidth_gbs == 1.25


def test_link_seconds() -> None:
    assert Link(bandwidth_gbs=2.0, latency_us=100).seconds(2e9) == pytest.approx(1.0001)


def test_memory_is_never_negative() -> None:
    group = {"type": "t4-16g", "memory_gib": 0.5}
    cluster = Cluster.model_validate({"nodes": [{"name": "n", "devices": [group]}]})
    assert cluster.devices()[0].memory_bytes == 0


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "type: t4-16g",
            "type: t4-16gb",
            "c.yaml:1: the file: unknown device type 't4-16gb'; did you",
        ),
        (
            "count: 3",
            "count: 0",
            "c.yaml:4: nodes.0.devices.0.count: input should be greater than 0",
        ),
        (
            "count: 3",
            "count: 2.5",
            "c.yaml:4: nodes.0.devices.0.count: input should be a valid integer",
        ),
        ("count: 3", "count: 1000000", "c.yaml:4: nodes.0.devices.0.count: input should be less"),
        ("count: 3", "number: 3", "c.yaml:4: unknown key 'nodes.0.devices.0.number'"),
        ("memory_gib: 30.0", "memory_gib: 1.0e308", "c.yaml:4: nodes.0.devices.1.memory_gib"),
        ("memory_gib: 30.0", "memory_gib: .inf", "c.yaml:4: nodes.0.devices.1.memory_gib"),
        ("memory_gib: 30.0", "memory_gib: .nan", "c.yaml:4: nodes.0.devices.1.memory_gib"),
        ("bandwidth_gbs: 12.0", "bandwidth_gbs: 0", "c.yaml:5: nodes.0.link.bandwidth_gbs"),
        ("bandwidth_gbs: 12.0, ", "", "c.yaml:5: 'nodes.0.link.bandwidth_gbs' is missing"),
        ("latency_us: 50", "latency_us: -1", "c.yaml:8: link.latency_us: input should be greater"),
        ("name: node1", "name: node0", "node names must differ"),
        ("slowdown: 3.0", "slowdown: 0.5", "c.yaml:10: rehearse.laptop.slowdown"),
        ("type: laptop", "type: laptop, memory_gib: 2", "give rehearse.laptop.memory_mib"),
        ("memory_mib: 300", "memory_mib: big", "c.yaml:10: rehearse.laptop.memory_mib"),
        ("[{type: laptop}]", "[]", "c.yaml:7: nodes.1.devices: list should have at least 1 item"),
        ("[{type: laptop}]", "laptop", "c.yaml:7: nodes.1.devices: input should be a valid list"),
        ("name: lab", "nam: lab", "c.yaml:1: unknown key 'nam'; known here: name, nodes, link"),
        ("nodes:", "machines:", "c.yaml:1: 'nodes' is missing"),
    ],
)
def test_bad_clusters(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in CLUSTER
    assert expected in message(load_cluster, tmp_path / "c.yaml", CLUSTER.replace(old, new))


def with_kernels(**kernels: Any) -> Cluster:
    """One node: a t4, a v100, and another t4, each with the kernels of its name."""
    names = {"t4": "t4-16g", "v100": "v100-32g", "more": "t4-16g"}
    groups = [
        {"type": kind, **({"kernels": kernels[name]} if name in kernels else {})}
        for name, kind in names.items()
    ]
    return Cluster.model_validate({"nodes": [{"name": "n", "devices": groups}]})


def test_the_kernels_that_a_cluster_has() -> None:
    """Without the key, what llmpq[gpu] installs; an empty list is a list."""
    said = with_kernels(t4=["triton"], more=["triton"], v100=[])
    assert (said.kernels_of("t4-16g"), said.kernels_of("v100-32g")) == (["triton"], [])
    assert machine_of(said, "t4-16g") == card("7.5", ["triton"])
    assert machine_of(said, "v100-32g") == card("7.0", [])
    assert said.kernels_of("a100-40g") is None and with_kernels().kernels_of("t4-16g") is None
    assert machine_of(with_kernels(), "t4-16g") == card("7.5", ["humming", "triton"])
    assert Cluster.model_validate_json(said.model_dump_json()) == said


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        (
            {"t4": ["marlin"], "more": ["marlin"]},
            "t4-16g: kernels names 'marlin', which is not a kernel library; use [humming, triton]",
        ),
        (
            {"v100": ["humming"]},
            "v100-32g: kernels names 'humming', which needs compute capability 7.5 (this device: "
            "7.0); use [triton]",
        ),
        ({"t4": ["triton"]}, "t4-16g: its groups name different kernels"),
        ({"t4": ["triton"], "more": []}, "give each of its groups the same list"),
    ],
)
def test_bad_kernels(kernels: dict[str, list[str]], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        with_kernels(**kernels)


def test_a_rehearsed_type_has_no_kernels_of_a_card() -> None:
    node = {"name": "n", "devices": [{"type": "slow", "kernels": []}]}
    rehearse = {"slow": {"slowdown": 2, "memory_mib": 9}}
    with pytest.raises(ValueError, match="slow is rehearsed on a CPU: kernels does not apply"):
        Cluster.model_validate({"nodes": [node], "rehearse": rehearse})


def test_all_faults_of_a_cluster_at_once(tmp_path: Path) -> None:
    text = CLUSTER.replace("count: 3", "count: x").replace("slowdown: 3.0", "slowdown: 0")
    text = text.replace("latency_us: 20", "latency: 20")
    found = message(load_cluster, tmp_path / "c.yaml", text)
    for expected in ("c.yaml:4: ", "c.yaml:5: ", "c.yaml:10: "):
        assert expected in found
    text = CLUSTER.replace("t4-16g", "t4x").replace("v100-32g", "v100x").replace("node1", "node0")
    found = message(load_cluster, tmp_path / "c.yaml", text)
    assert "'t4x'" in found and "'v100x'" in found and "node names must differ" in found


def test_device_library() -> None:
    assert {"t4-16g", "v100-32g", "p100-12g", "a100-40g", "a100-80g"} <= set(device_library())
    assert DeviceLibrary(devices=device_library()).devices == device_library()


# -- workload -----------------------------------------------------------------------------------


def test_workload(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(WORKLOAD)
    workload = load_workload(tmp_path / "w.yaml")
    lengths = request_lengths(workload)
    assert len(lengths) == 100 and lengths == request_lengths(workload)
    assert {prompt for prompt, _ in lengths} == {512}
    assert {new for _, new in lengths} == set(range(10, 21))
    assert Workload.model_validate_json(workload.model_dump_json()) == workload


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("512", "0", "w.yaml:2: prompt_tokens: input should be greater than 0"),
        ("512", "2.5", "w.yaml:2: prompt_tokens: input should be a valid integer"),
        (
            "512",
            "many",
            "w.yaml:2: prompt_tokens: expected a number, {min, max}, {trace, column} or a list",
        ),
        ("512", "yes", "w.yaml:2: prompt_tokens: expected a number"),
        ("512", "{trace: absent.csv, column: x}", "absent.csv: no such trace file"),
        ("512", "{trace: absent.csv}", "w.yaml:2: 'prompt_tokens.column' is missing"),
        ("min: 10", "min: 30", "w.yaml:3: new_tokens: min 30 is above max 20"),
        ("min: 10, ", "", "w.yaml:3: 'new_tokens.min' is missing"),
        ("min: 10", "min: 10, mean: 15", "w.yaml:3: unknown key 'new_tokens.mean'"),
        ("num_requests: 100", "num_requests: 1e30", "w.yaml:4: num_requests"),
        ("num_requests: 100", "num_requests: 99999999", "w.yaml:4: num_requests: input should be"),
        ("batch: auto", "batch: automatic", "w.yaml:5: batch: "),
        ("batch: auto", "batch: 0", "w.yaml:5: batch: "),
        ("batch: auto", "bacth: 8", "w.yaml:5: unknown key 'bacth'"),
    ],
)
def test_bad_workloads(tmp_path: Path, old: str, new: str, expected: str) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(WORKLOAD.replace(old, new))
    with pytest.raises(UserError) as caught:
        load_workload(path)
    assert expected in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_all_faults_of_a_workload_at_once(tmp_path: Path) -> None:
    found = message(load_workload, tmp_path / "w.yaml", "prompt_tokens: x\nnew_tokens: -1\n")
    assert len(found.splitlines()) == 3, "two wrong values and one missing"


def traced(tmp_path: Path, content: bytes, name: str = "t.csv") -> list[tuple[int, int]]:
    """The lengths of three requests whose prompts come from a trace with this content."""
    (tmp_path / name).write_bytes(content)
    trace = f"{{trace: {name}, column: tokens}}"
    (tmp_path / "w.yaml").write_text(f"prompt_tokens: {trace}\nnew_tokens: 1\nnum_requests: 3\n")
    return request_lengths(load_workload(tmp_path / "w.yaml"))


def test_trace(tmp_path: Path) -> None:
    content = b"time,tokens\n0.0,5\n0.5,0\n"
    expected = [(5, 1), (1, 1), (5, 1)]  # repeated to three; never below one token
    assert traced(tmp_path, content) == expected
    assert traced(tmp_path, gzip.compress(content), "t.csv.gz") == expected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_trace_as_spreadsheets_write_it(tmp_path, encoding, delimiter, pack) -> None:
    text = "tokens,time\r\n5,0.0\r\n0,0.5\r\n".replace(",", delimiter)
    name = "t.csv" if pack is bytes else "t.csv.gz"
    assert traced(tmp_path, pack(text.encode(encoding)), name) == [(5, 1), (1, 1), (5, 1)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a readable CSV file"),
        (b"\xff\xfe\x00", "t.csv: "),
        (b"a,b\n1,2\n", "no column 'tokens'; it has a, b"),
        (b"tokens\n", "t.csv:1: column 'tokens' is not a length"),
        (b"tokens\n3\nx\n", "t.csv:3: column 'tokens' is not a length"),
        (b"tokens\n3\n-4\n", "t.csv:3: column 'tokens' is not a length"),
        (b"tokens\n3\ninf\n", "t.csv:3: column 'tokens' is not a length"),
        (b"tokens\n3\n1e30\n", "t.csv:3: column 'tokens' is not a length"),
        (b"tokens\n3\n" + b"9" * 40 + b"\n", "t.csv:3: column 'tokens' is not a length"),
        (b"tokens\n3\n4.5\n", "t.csv:3: column 'tokens' is not a length"),
        (b"tokens\ntrue\nfalse\n", "t.csv:2: column 'tokens' is not a length"),
        (b"tokens\n3\n\n4,5,6\n", "not a readable CSV file"),
    ],
)
def test_bad_traces(tmp_path: Path, content: bytes, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        traced(tmp_path, content)
    assert expected in str(caught.value)


def test_damaged_compressed_trace(tmp_path: Path) -> None:
    whole = gzip.compress(b"tokens\n" + b"\n".join(b"%d" % i for i in range(1, 500)))
    for damaged in (b"not gzip", whole[: len(whole) // 2], whole[:40] + b"\xff" * 40 + whole[80:]):
        with pytest.raises(UserError, match="not a readable CSV file"):
            traced(tmp_path, damaged, "t.csv.gz")


# -- plan ---------------------------------------------------------------------------------------


def test_plan_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_data()))
    plan = load_plan(path)
    assert json.loads(plan.model_dump_json()) == plan_data()
    assert plan.precisions == ["8", "16", "4", "3"]
    assert [stage.num_layers for stage in plan.stages] == [1, 3]


def change(data: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    """A copy of `data` with the value at a dotted place replaced, or dropped if it is `...`."""
    data = copy.deepcopy(data)
    *parents, last = [int(key) if key.isdigit() else key for key in where.split(".")]
    inner: Any = data
    for key in parents:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return data


@pytest.mark.parametrize(
    ("where", "value", "expected"),
    [
        ("schema_version", 2, "schema_version: input should be 1 (found 2)"),
        ("kind", "profile", "kind: input should be 'plan'"),
        ("stages", [], "stages: list should have at least 1 item"),
        ("stages.0.end_layer", 2, "stage 0 has 2 layers but 1 precisions"),
        ("stages.0.end_layer", 0, "stage 0 holds no layer: 0..0"),
        ("stages.0.rank", 5, "stage 0 says rank 5; ranks count from 0 in order"),
        ("stages.1.first_layer", 2, "stage 1 has 2 layers but 3 precisions"),
        ("stages.1", ..., "stages end at layer 1, the model has 4"),
        ("stages.0.precisions", ["5"], "unknown precision '5'; known: 16, 8, 8-w8a8, 4, 3"),
        ("stages.0.precisions", ["8+experts@4"], "precision '8+experts@4' names experts, but no"),
        ("stages.0.devices", ["a100-80g"], "stage 0 asks for a a100-80g on n, which has none"),
        ("stages.0.node", "other", "stage 0 asks for a t4-16g on other, which has none (left)"),
        ("cluster.nodes.0.devices.0.count", 1, "stage 1 asks for a t4-16g on n, which has none"),
        ("cluster.nodes.0.devices.0.memory_gib", 1e308, "memory_gib: input should be less"),
        ("stages.0.tensor_parallel", 2, "stage 0: tensor_parallel is 2 but devices names 1"),
        ("stages.0.tensor_parallel", 3, "stage 0: tensor_parallel 3 is not a power of two"),
        ("stages.0.devices", ["t4-16g"] * 2, "stage 0: tensor_parallel is 1 but devices names 2"),
        (
            "stages.0.devices",
            ["t4-16g", "a100-80g"],
            "stage 0: the devices of a stage must be of one type, found a100-80g, t4-16g",
        ),
        ("prefill_micro_batch", 8, "prefill_micro_batch 8 is above batch 4"),
        ("batch", 0, "batch: input should be greater than 0"),
        ("kv_precision", "8", "kv_precision: input should be '16'"),
        ("model.linears.0.in_features", 0, "model.linears.0.in_features: input should be greater"),
        ("model.linears", 7, "model.linears: input should be a valid tuple"),
        ("model.layer_other_params", -1, "model.layer_other_params: input should be greater"),
        ("chunk_tokens", 0, "chunk_tokens: input should be greater than 0"),
        ("chunk_tokens", 8.5, "chunk_tokens: input should be a valid integer"),
        ("lanes", [], "lanes: list should have at least 1 item"),
        ("lanes", [{"rows": 3, "tokens": 12}], "lanes have 3 rows in all, but batch is 4; without"),
        ("lanes", [{"rows": 5, "tokens": 12}], "a lane has 5 rows, which is above decode_micro"),
        ("lanes", [{"rows": 4, "tokens": 0}], "lanes.0.tokens: input should be greater than 0"),
        ("lanes", [{"rows": 4}], "'lanes.0.tokens' is missing"),
        ("method", ..., "'method' is missing"),
        ("speed", 1, "unknown key 'speed'; known here: schema_version, kind, model"),
    ],
)
def test_bad_plans(tmp_path: Path, where: str, value: Any, expected: str) -> None:
    text = json.dumps(change(plan_data(), where, value), indent=1)
    assert expected in message(load_plan, tmp_path / "plan.json", text)


def shared_plan() -> dict[str, Any]:
    """A valid plan: one stage on two devices that share every layer."""
    whole = {"end_layer": 4, "precisions": ["8"] * 4}
    data = change(plan_data(), "stages.1", ...)
    data["stages"][0] |= {"devices": ["t4-16g"] * 2, "tensor_parallel": 2} | whole
    return data


def test_a_stage_of_several_devices(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_data()))
    refuse_shared_stages(load_plan(path), path)  # each stage has a device of its own
    path.write_text(json.dumps(shared_plan()))
    plan = load_plan(path)
    assert plan.stages[0].tensor_parallel == 2 and plan.precisions == ["8"] * 4
    with pytest.raises(UserError, match=r"stage 0 \(2 devices\); their weights"):
        refuse_shared_stages(plan, path)


@pytest.mark.parametrize(
    ("where", "value", "expected"),
    [
        ("model.num_heads", 5, "stage 0: attention heads 5 cannot be cut into 2 equal parts"),
        ("model.linears.0.name", "mixer", "stage 0: how to cut the matrix 'mixer' is not known"),
        ("cluster.nodes.0.devices.0.count", 1, "stage 0 asks for a t4-16g on n, which has none"),
    ],
)
def test_bad_stages_of_several_devices(
    tmp_path: Path, where: str, value: Any, expected: str
) -> None:
    text = json.dumps(change(shared_plan(), where, value), indent=1)
    assert expected in message(load_plan, tmp_path / "plan.json", text)


def test_the_line_of_a_fault(tmp_path: Path) -> None:
    text = json.dumps(change(plan_data(), "stages.1.precisions.2", "7"), indent=1)
    line = next(i for i, row in enumerate(text.splitlines(), 1) if '"rank": 1' in row)
    found = message(load_plan, tmp_path / "plan.json", text)
    assert int(found.split(":")[1]) in (line, line - 1)


def test_all_faults_of_a_plan_at_once(tmp_path: Path) -> None:
    data = change(change(plan_data(), "batch", 1), "stages.1.rank", 4)
    found = message(load_plan, tmp_path / "plan.json", json.dumps(data, indent=1))
    for expected in ("stage 1 says rank 4", "prefill_micro_batch 2", "decode_micro_batch 4"):
        assert expected in found


# -- profile and sensitivity --------------------------------------------------------------------


def test_profiles(tmp_path: Path) -> None:
    (tmp_path / "t4.json").write_text(json.dumps(PROFILE))
    assert load_profiles(tmp_path) == [Profile.model_validate(PROFILE)]


@pytest.mark.parametrize(
    ("where", "value", "expected"),
    [
        ("kind", "profil", "kind: input should be 'profile'"),
        ("rows", [], "rows: list should have at least 1 item"),
        ("rows.1.phase", "warm-up", "rows.1.phase: input should be 'prefill', 'decode'"),
        ("rows.1.time_ms", 0, "rows.1.time_ms: input should be greater than 0"),
        ("rows.0.time_ms", -1.5, "rows.0.time_ms: input should be greater than 0"),
        ("rows.0.time_ms", float("inf"), "rows.0.time_ms: input should be a finite number"),
        ("rows.0.past_tokens", -1, "rows.0.past_tokens: input should be greater"),
        ("rows.0.model_key", ..., "'rows.0.model_key' is missing"),
        ("rows.0.time_s", 1.0, "unknown key 'rows.0.time_s'"),
        ("device.memory_bytes", "16 GiB", "device.memory_bytes: input should be a valid integer"),
    ],
)
def test_bad_profiles(tmp_path: Path, where: str, value: Any, expected: str) -> None:
    text = json.dumps(change(PROFILE, where, value), indent=1)
    found = message(lambda path: load_profiles(path.parent), tmp_path / "p.json", text)
    assert expected in found and found.split(":")[1].isdigit(), "file and line"


def test_bad_profile_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder of profiles"):
        load_profiles(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no profile"):
        load_profiles(tmp_path)
    (tmp_path / "s.json").write_text(json.dumps(SENSITIVITY))
    with pytest.raises(UserError, match="holds no profile"):
        load_profiles(tmp_path)
    (tmp_path / "t4.json").write_text(json.dumps(PROFILE))
    assert len(load_profiles(tmp_path)) == 1, "other kinds are passed over"
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_profiles(tmp_path)


def test_sensitivity_table(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(SENSITIVITY))
    table = load_sensitivity(tmp_path / "s.json").table()
    assert table == {"16": [0.0, 0.0], "4": [0.5, 0.0]}, "3 bits lack a layer"


@pytest.mark.parametrize(
    ("where", "value", "expected"),
    [
        ("indicator", "guess", "indicator: input should be 'variance', 'hessian'"),
        ("num_layers", 0, "num_layers: input should be greater than 0"),
        ("layers.1.sensitivity", float("nan"), "layers.1.sensitivity: input should be a finite"),
        ("layers.1.sensitivity", -0.1, "layers.1.sensitivity: input should be greater"),
        ("layers.1.precision", "5", "layers.1.precision: unknown precision; known: 16, 8"),
        ("layers.1.layer", -1, "layers.1.layer: input should be greater"),
        ("layers.1.layer", 2, "layers: row 1: no layer 2, the model has 2 (0 to 1)"),
        ("layers.1.layer", 0, "layers: row 1: layer 0 at precision 4, as row 0"),
        ("fit.scale", -1, "fit.scale: input should be greater"),
        ("fit", ..., "'fit' is missing"),
    ],
)
def test_bad_sensitivities(tmp_path: Path, where: str, value: Any, expected: str) -> None:
    text = json.dumps(change(SENSITIVITY, where, value), indent=1)
    found = message(load_sensitivity, tmp_path / "s.json", text)
    assert expected in found and found.split(":")[1].isdigit(), "file and line"


# -- model files, precisions, errors ------------------------------------------------------------


def test_model_from_a_file_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    by_file = load_model_spec(str(tmp_path / "config.json"))
    by_folder = load_model_spec(str(tmp_path))
    assert by_file.model_copy(update={"name": by_folder.name}) == by_folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", "expected a model configuration, found list"),
        ("{", "not valid JSON"),
        ('{"model_type": "llama"}', "'hidden_size' is missing"),
        ('{"model_type": "llama", "text_config": [1]}', "'text_config' must be an object"),
    ],
)
def test_bad_model_files(tmp_path: Path, text: str, expected: str) -> None:
    found = message(lambda path: load_model_spec(str(path)), tmp_path / "config.json", text)
    assert expected in found


@pytest.mark.parametrize("model", ["absent", "./absent", "/absent/config.json", "a/b/c", "x.json"])
def test_models_that_are_nowhere(model: str) -> None:
    with pytest.raises(UserError, match="no such model; give a directory, a config.json"):
        config_path(model)


def test_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a model directory needs a config.json"):
        config_path(str(tmp_path))


def test_weight_bytes_of_a_matrix() -> None:
    """Packed codes, and a scale and a zero a group, counted by hand."""
    expected = {
        "16": 2 * 512 * 256,
        "8": 512 * (256 + 4),
        "8-w8a8": 512 * (256 + 4),
        "4": 512 * (128 + 2 * 4),
        "3": 512 * (96 + 2 * 4),
        "nf4": 512 * (128 + 4 * 4),
        "8-bnb": 512 * (256 + 4),
    }
    assert {name: p.weight_bytes(512, 256) for name, p in PRECISIONS.items()} == expected


def test_fewer_bits_take_fewer_bytes() -> None:
    for shape in [(64, 64), (96, 172), (8192, 28672), (10, 7)]:
        sizes = [PRECISIONS[name].weight_bytes(*shape) for name in ("16", "8", "4", "3")]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("bits", "in_features", "size"),
    [(4, 256, 128), (3, 256, 128), (4, 192, 64), (3, 100, 100), (8, 256, 256)],
)
def test_group_size(bits: int, in_features: int, size: int) -> None:
    assert group_size(bits, in_features) == size


def test_exit_codes() -> None:
    codes = {kind.__name__: kind.exit_code for kind in (UserError, InfeasibleError, WorkerError)}
    assert codes == {"UserError": 2, "InfeasibleError": 3, "WorkerError": 4}
    assert all(issubclass(kind, LlmpqError) for kind in (UserError, InfeasibleError, WorkerError))
