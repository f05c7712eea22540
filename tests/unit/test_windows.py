"""What planning knows of windows of attention: which layers have them, what they keep and read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_brute_force import check_search, random_problem
from test_layer_kinds import kind_of, problem_with, with_kinds

from llmpq.cluster import Cluster
from llmpq.costs.latency import device_times
from llmpq.costs.memory import layer_cache_bytes
from llmpq.costs.profile_rows import keys_of, rows_of
from llmpq.errors import UserError
from llmpq.job import LaneShape
from llmpq.model_lookup import check_model, load_model_spec, spec_from_config
from llmpq.model_spec import LayerKind, ModelSpec, shard_faults
from llmpq.plan_data import reserve_of
from llmpq.planner.inputs import Wishes, inputs_of, make_problem
from llmpq.planner.planning import Options, replan
from llmpq.planner.problem import Problem
from llmpq.profile_data import Phase, Profile, ProfiledDevice, ProfileRow
from llmpq.windows import configured_windows
from llmpq.workload import Workload, lanes_for

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 120,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
}
SLIDING, FULL = "sliding_attention", "full_attention"
LISTED = [FULL, SLIDING, FULL, SLIDING, FULL, FULL, FULL, SLIDING]
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"sliding_window": 9}),
    ("mistral", {}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 512}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 77}),
    ("qwen2", {"use_sliding_window": True}),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}),
    ("qwen3", {"use_sliding_window": True, "layer_types": LISTED}),
    ("gemma2", {}),
    ("gemma2", {"sliding_window": 128, "layer_types": LISTED}),
    ("gemma3_text", {}),
    ("gemma3_text", {"sliding_window": 1024, "sliding_window_pattern": 3}),
    ("gemma3_text", {"layer_types": LISTED}),
    ("smollm3", {}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 64}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 64, "no_rope_layer_interval": 2}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 5, "no_rope_layers": [1, 0] * 4}),
]


def spec_of(model_type: str, **settings: Any) -> ModelSpec:
    return spec_from_config(SIZES | {"model_type": model_type} | settings, "tiny")


@pytest.mark.parametrize(("model_type", "settings"), SETTINGS, ids=str)
def test_windows_are_those_of_transformers_configuration(model_type, settings):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, **SIZES | settings)
    assert spec_of(model_type, **settings).windows == configured_windows(config)


def test_kinds_are_those_of_the_windows():
    spec = spec_of("gemma3_text", sliding_window=100)
    assert [kind.window for kind in spec.kinds] == [100, None]
    assert spec.layer_kinds == (0, 0, 0, 0, 0, 1, 0, 0)
    keys = [kind.model_key for kind in spec.kind_specs]
    assert keys == [f"{spec.without_windows().model_key}-w100", spec.without_windows().model_key]
    alone = spec_of("mistral", sliding_window=100)
    assert not alone.kinds and alone.window == 100 and alone.model_key.endswith("-w100")


def test_a_shipped_model_keeps_a_quarter_of_long_texts():
    """Gemma 3 27B, 32 requests of 8192 tokens: 10 layers keep all, 52 keep 1025 each."""
    path = Path(__file__).parents[2] / "configs" / "models" / "gemma-3-27b.json"
    spec, lanes = load_model_spec(str(path)), [LaneShape(32, 8192)]
    token = 2 * 16 * 128 * 2  # keys and values of 16 heads in 16 bits
    kept = sum(layer_cache_bytes(spec.kind_specs[kind], lanes) for kind in spec.kind_of_layers)
    assert kept == 32 * token * (10 * 8192 + 52 * 1025)


@pytest.mark.parametrize(("tokens", "several"), [(100, False), (101, False), (102, True)])
def test_kinds_that_do_not_differ_on_short_texts_are_one(tokens, several):
    """The last of 101 tokens is chosen, and never computed with."""
    spec = spec_of("gemma2", sliding_window=100)
    short = spec.within(tokens)
    assert bool(short.kinds) == several
    if not several:
        assert short == spec.without_windows()
    lanes = [LaneShape(3, tokens)]
    each = [layer_cache_bytes(kind, lanes) for kind in spec.kind_specs]
    assert (len(set(each)) > 1) == several


def test_the_widest_of_windows_that_hide_nothing_stays():
    kinds = [
        LayerKind.model_validate(kind.model_dump() | {"window": window, "name": str(window)})
        for window, kind in zip((50, 400, 70), spec_of("gemma2").kinds * 2, strict=False)
    ]
    spec = with_kinds(spec_of("gemma2"), kinds, [0, 1, 2, 0])
    assert spec.within(60).windows == (50, 400, 400, 50)
    assert spec.within(51).windows == (400,) * 4 and not spec.within(51).kinds
    assert spec.within(1000) is spec


def test_shards_of_layers_with_windows_have_parts_of_both_kinds():
    spec = spec_of("gemma2", sliding_window=100)
    assert shard_faults(spec, 2) == []
    half = spec.shard(2)
    assert [kind.num_kv_heads for kind in half.kind_specs] == [1, 1]
    assert [kind.window for kind in half.kind_specs] == [100, None]


# ---- times


def cluster_of(**more: Any) -> Cluster:
    nodes = [{"name": "n", "devices": [{"type": "t4-16g", "count": 2}]}]
    return Cluster.model_validate({"nodes": nodes} | more)


def test_a_step_reads_no_more_than_the_window():
    spec = spec_of("gemma2", sliding_window=100)
    times = device_times(cluster_of(), "t4-16g", spec, [])
    bound, full = times.of_kind(0), times.of_kind(1)
    past = np.array([10, 99, 100, 4000])
    found, all_of_it = bound.decode_s("16", 8, past), full.decode_s("16", 8, past)
    assert found[:2].tolist() == all_of_it[:2].tolist()
    assert found[1] == found[2] == found[3] < all_of_it[2] < all_of_it[3]


def row(model_key: str, phase: Phase, micro_batch: int, tokens: int, time_ms: float) -> ProfileRow:
    lengths = {"prompt_tokens": tokens} if phase == "prefill" else {"past_tokens": tokens}
    times = {"time_ms": time_ms, "time_ms_p10": time_ms, "time_ms_p90": time_ms}
    names = {"model_key": model_key, "precision": "16", "phase": phase, "num_samples": 3}
    sizes = {"micro_batch": micro_batch, "prompt_tokens": 0, "past_tokens": 0}
    return ProfileRow.model_validate(names | sizes | lengths | times)


def profile_of(model_key: str, window: int | None) -> Profile:
    """Of layers whose steps take a microsecond for each request and token that they attend to."""

    def step_ms(size: int, past: int) -> float:
        return 0.001 * size * (min(past + 1, window or past + 1) + 100)

    rows = [
        row(model_key, "decode", q, n, step_ms(q, n)) for q in (1, 4) for n in (9, 63, 127, 511)
    ]
    rows += [row(model_key, "prefill", p, n, 0.01 * p * n) for p in (1, 2) for n in (16, 64, 256)]
    device = ProfiledDevice(name="card", type="t4-16g", memory_bytes=2**34)
    return Profile(device=device, rows=rows)


@pytest.mark.parametrize("own", [True, False], ids=["its own rows", "rows without windows"])
def test_profiles_time_layers_with_windows(own):
    """Older profiles have rows of layers that attend to all tokens."""
    spec = spec_of("mistral", sliding_window=128)
    key, other = keys_of(spec)
    profile = profile_of(key, 128) if own else profile_of(other, None)
    assert {found.model_key for found in rows_of([profile], spec)} == {key if own else other}
    times = device_times(cluster_of(), "t4-16g", spec, [profile])
    steps = times.decode_s("16", 4, np.array([9, 127, 511, 5000]))
    assert steps == pytest.approx([4e-6 * (n + 100) for n in (10, 128, 128, 128)], rel=0.05)


def test_rows_of_layers_with_windows_time_no_others():
    spec = spec_of("mistral", sliding_window=None)
    windowed = spec_of("mistral", sliding_window=128)
    assert rows_of([profile_of(windowed.model_key, 128)], spec) == []


# ---- plans


def planned(new_tokens: int, **settings: Any) -> Problem:
    workload = {"prompt_tokens": 300, "new_tokens": new_tokens, "num_requests": 8}
    spec = spec_of("gemma2", **settings)
    inputs = inputs_of(spec, cluster_of(), Workload.model_validate(workload))
    return make_problem(inputs, Wishes())[0]


def test_windows_that_hide_nothing_of_a_workload_make_no_kinds():
    """The plan still names the model as it is, for runs and plans of other workloads."""
    problem = planned(100, sliding_window=399)
    assert not problem.spec.kinds and problem.model == spec_of("gemma2", sliding_window=399)
    plan = replan(problem, Options(compare=False))
    assert plan.model.windows == (399, None) * 4
    without = planned(100, sliding_window=None)
    other = replan(without, Options(compare=False))
    assert plan.predicted is not None and other.predicted is not None
    assert plan.stages == other.stages and plan.predicted.total_s == other.predicted.total_s


def test_windows_of_long_texts_make_plans_smaller_and_faster():
    bound = replan(planned(100, sliding_window=50), Options(compare=False)).predicted
    full = replan(planned(100, sliding_window=None), Options(compare=False)).predicted
    assert bound is not None and full is not None
    assert bound.decode_s < full.decode_s
    assert sum(s.peak_memory_bytes for s in bound.stages) < sum(
        s.peak_memory_bytes for s in full.stages
    )


def random_windows(seed: int) -> Problem:
    """As `random_problem`, with layers that differ in nothing but their windows."""
    problem, rng = random_problem(seed), np.random.default_rng(3000 + seed)
    longest = max(map(sum, problem.lengths))
    windows = [max(1, longest // int(rng.integers(2, 9))), None]
    kinds = [
        kind_of(problem.spec, f"window {window}", 1.0).model_copy(update={"window": window})
        for window in windows
    ]
    order = [int(kind) for kind in rng.integers(0, 2, min(problem.spec.num_layers, 4))]
    return problem_with(problem, with_kinds(problem.spec, kinds, order), seed)


@pytest.mark.parametrize("tens", range(4))
def test_the_search_finds_the_least_objective_of_all_assignments(tens):
    for seed in range(10 * tens, 10 * tens + 10):
        check_search(random_windows(seed), seed)


# ---- runs


def test_lanes_for_longer_texts_keep_the_windows_reserve_too():
    """Short slots keep as much as long ones where a window bounds both."""
    lanes = (LaneShape(1, 4000), LaneShape(20, 50))
    lengths = [(4500, 10)] + [(300, 30)] * 20
    wide = lanes_for(lengths, lanes, 12, 4)
    bound = lanes_for(lengths, lanes, 12, 4, (200,))
    tokens = [
        sum(rows * min(tokens, 201) for rows, tokens in some) for some in (lanes, wide, bound)
    ]
    assert tokens[2] <= tokens[0] and sum(lane.rows for lane in bound) >= 1
    assert max(lane.tokens for lane in bound) >= 4510


def test_models_with_other_windows_than_planned_are_refused(tmp_path):
    config = SIZES | {"model_type": "mistral", "sliding_window": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = load_model_spec(str(tmp_path))
    check_model(tmp_path, spec, "the plan")
    check_model(tmp_path, spec.without_windows(), "the plan")  # of a version without windows
    with pytest.raises(UserError, match="attend to other windows of tokens than those of the plan"):
        check_model(tmp_path, spec.model_copy(update={"window": 50}), "the plan")


def test_plans_without_windows_reserve_full_slots():
    plan = replan(planned(100, sliding_window=50), Options(compare=False))
    old = plan.model_copy(update={"model": plan.model.without_windows()})
    assert reserve_of(old) == reserve_of(plan)
