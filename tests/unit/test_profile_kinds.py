"""A profile of a model with layers of two kinds, one of them with experts."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoConfig  # noqa: E402

from llmpq.cluster import Cluster  # noqa: E402
from llmpq.costs.latency import device_times  # noqa: E402
from llmpq.costs.memory import layer_weight_bytes  # noqa: E402
from llmpq.model_lookup import spec_from_config  # noqa: E402
from llmpq.models.count_model import count_params  # noqa: E402
from llmpq.profile_data import Candidate  # noqa: E402
from llmpq.profiler.grid import farthest  # noqa: E402
from llmpq.profiler.layer_profile import (  # noqa: E402
    LayerProfile,
    LayerRequest,
    Target,
    profile_device,  # noqa: E402
)
from llmpq.profiler.stacks import Bench, stacked_layers  # noqa: E402
from llmpq.quant import machine_here  # noqa: E402

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
}
LISTS = {
    "prefill_micro_batches": (1,),
    "decode_micro_batches": (1, 16),
    "prompt_tokens": (8,),
    "past_tokens": (8,),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[LayerRequest, LayerProfile]:
    folder = tmp_path_factory.mktemp("model")
    config = AutoConfig.for_model("glm4_moe", **SIZES)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    spec = count_params(folder / "config.json")
    request = LayerRequest(str(folder), spec, LISTS, False, ("16", "8+experts@4"), budget_s=4.0)
    target = Target(CPU, torch.bfloat16, "cpu", folder / "profile.json")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return request, profile_device(target, request, farthest, lambda _: None, lambda _: None)
    finally:
        torch.set_num_threads(threads)


def test_each_kind_has_rows_of_its_own(found: tuple[LayerRequest, LayerProfile]) -> None:
    request, result = found
    dense, sparse = request.spec.kind_specs
    kept = {
        (row.model_key, row.precision)
        for row in result.profile.rows
        if row.phase in ("prefill", "decode")
    }
    assert kept == {
        (dense.model_key, "16"),
        (dense.model_key, "8"),
        (sparse.model_key, "16"),
        (sparse.model_key, "8+experts@4"),
    }
    assert [kind.spec for kind in result.kinds] == [dense, sparse]


def test_used_experts_are_about_what_is_expected(found: tuple[LayerRequest, LayerProfile]) -> None:
    request, result = found
    sparse = request.spec.kind_specs[1].model_key
    used = {
        row.micro_batch: row.experts_used
        for row in result.profile.rows
        if (row.model_key, row.phase) == (sparse, "decode")
    }
    assert used[1] == 2
    assert used[16] is not None and 6.5 < used[16] <= 8
    assert all(row.experts_used is None for row in result.profile.rows if row.model_key != sparse)


def test_weights_are_what_the_planner_counts(found: tuple[LayerRequest, LayerProfile]) -> None:
    request, result = found
    machine = machine_here(CPU, torch.bfloat16)
    rows = [row for row in result.profile.memory if row.what == "layer_weights"]
    for kind in request.spec.kind_specs:
        own = [row for row in rows if row.model_key == kind.model_key]
        assert len(own) == 2
        for row in own:
            assert row.num_bytes == layer_weight_bytes(kind, row.precision, machine)


def test_times_are_those_of_each_kind(found: tuple[LayerRequest, LayerProfile]) -> None:
    """Dense layers have times by all names that say how experts are held."""
    request, result = found
    nodes = [{"name": "n", "devices": [{"type": "slow"}]}]
    rehearsed = {"slow": {"slowdown": 1, "memory_mib": 100}}
    cluster = Cluster.model_validate({"nodes": nodes, "rehearse": rehearsed})
    times = device_times(cluster, "slow", request.spec, [result.profile])
    assert times.precisions == ("16", "8+experts@4")
    dense, sparse = times.of_kind(0), times.of_kind(1)
    for kind in (dense, sparse):
        assert float(kind.decode_s("8+experts@4", 1, 8)) > 0
    assert float(dense.decode_s("8+experts@4", 1, 8)) == float(dense.decode_s("8", 1, 8))


def test_a_head_that_reads_projected_states_is_measured() -> None:
    """OPT-350M's embedding is narrower than its layers."""
    sizes = {"hidden_size": 64, "ffn_dim": 96, "num_attention_heads": 4, "vocab_size": 97}
    config = AutoConfig.for_model("opt", **sizes, num_hidden_layers=4, word_embed_proj_dim=32)
    layers = stacked_layers((0,) * 4, 0, 1)
    bench = Bench(config, ("16",), layers, torch.bfloat16, CPU, 8)
    with torch.inference_mode():
        for cell in (Candidate("16", "head", 3, 0), Candidate("16", "embedding", 2, 8)):
            probe = bench.open(cell)
            probe.warm_up(0)
            assert probe.experts_used() is None


@pytest.mark.parametrize(("past", "keys"), [(8, ["v97"]), (40, ["v97-w16", "v97"])])
def test_layers_with_windows_have_rows_of_their_own_where_texts_are_longer(
    past: int, keys: list[str], tmp_path: Path
) -> None:
    sizes = {name: size for name, size in SIZES.items() if "expert" not in name}
    settings = sizes | {"model_type": "gemma2", "sliding_window": 16}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    spec = spec_from_config(settings, "tiny")
    lists = LISTS | {"past_tokens": (past,)}
    request = LayerRequest(str(tmp_path), spec, lists, False, ("16",), budget_s=1.0)
    target = Target(CPU, torch.bfloat16, "cpu", tmp_path / "profile.json")
    found = profile_device(target, request, farthest, lambda _: None, lambda _: None)
    measured = dict.fromkeys(row.model_key.split("-d16-")[1] for row in found.profile.rows)
    assert list(measured) == keys
