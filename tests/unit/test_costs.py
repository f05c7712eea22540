"""Costs: latency from profiles and spec sheets, memory by hand, quality."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmpq.cluster import Cluster, Link
from llmpq.costs import links, memory
from llmpq.costs.device_speed import efficiency
from llmpq.costs.fits import fit
from llmpq.costs.latency import LayerTimes, device_times, measured_times, spec_sheet_times
from llmpq.costs.memory import RunSizes, stage_memory
from llmpq.costs.quality import measured_quality, prior_quality
from llmpq.costs.shards import WithExchange, tensor_parallel_times
from llmpq.costs.spec_sheet import Roofline
from llmpq.devices import device_library
from llmpq.errors import UserError
from llmpq.job import LaneShape
from llmpq.kernel import (
    GRAPH_BYTES,
    HEAD_LAUNCHES,
    LAYER_LAUNCHES,
    STAGE_CALL_S,
    START_S,
    graph_lengths,
)
from llmpq.machine import TORCH_CARD, cpu
from llmpq.model_lookup import spec_from_config
from llmpq.model_spec import ModelSpec
from llmpq.profile_data import Phase, Profile, ProfiledDevice, ProfileRow, Sensitivity

H, F, HEADS, KV, DIM, VOCAB, LAYERS = 64, 160, 4, 2, 16, 100, 3
CONFIG: dict[str, Any] = {
    "hidden_size": H,
    "intermediate_size": F,
    "ffn_dim": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 50,
    "tie_word_embeddings": False,
}


ALL_HEADS = ("opt", "bloom", "gpt_neox")  # families without grouped-query attention


def make_spec(model_type: str = "llama", **changes: Any) -> ModelSpec:
    config = CONFIG | {"model_type": model_type} | changes
    if model_type in ALL_HEADS:
        del config["num_key_value_heads"]
    return spec_from_config(config, name=model_type)


SPEC = make_spec()


def row(phase: Phase, batch: int, length: int, ms: float, precision: str = "16") -> ProfileRow:
    decode = phase in ("decode", "stage_decode")
    return ProfileRow(
        model_key=SPEC.model_key,
        precision=precision,
        phase=phase,
        micro_batch=batch,
        prompt_tokens=0 if decode else length,
        past_tokens=length if decode else 0,
        time_ms=ms,
        time_ms_p10=ms,
        time_ms_p90=ms,
        num_samples=3,
    )


def plane_ms(p: float, s: float) -> float:
    return 1 + 0.5 * p + 0.01 * s + 0.02 * p * s + 1e-4 * p * s * s


def decode_plane_ms(q: float, past: float) -> float:
    return 0.5 + 0.01 * q * (past + 1) + 0.1 * q + 0.001 * past


def profile_rows() -> list[ProfileRow]:
    sizes, lengths = (1, 2, 4, 8), (8, 16, 64)
    rows = [row("prefill", p, s, plane_ms(p, s)) for p in sizes for s in lengths]
    rows += [row("decode", q, t, decode_plane_ms(q, t)) for q in sizes for t in lengths]
    rows += [row("embedding", p, s, 0.1 + 0.001 * p * s) for p in (1, 4) for s in lengths]
    return rows + [row("head", q, 0, 0.2 + 0.05 * q) for q in sizes]


def make_profile(device_type: str, threads: int | None = 1) -> Profile:
    device = ProfiledDevice(name="test", type=device_type, memory_bytes=1, num_threads=threads)
    return Profile(device=device, rows=profile_rows())


def rehearsal() -> Cluster:
    nodes = [{"name": "n", "devices": [{"type": "slow"}]}]
    return Cluster.model_validate(
        {"nodes": nodes, "rehearse": {"slow": {"slowdown": 3, "memory_mib": 9}}}
    )


# ---- latency


def test_regression_recovers_the_plane_at_batches_that_were_not_measured() -> None:
    times = measured_times(profile_rows(), "test")
    assert float(times.prefill_s("16", 3, 40)) == pytest.approx(plane_ms(3, 40) / 1e3, rel=1e-6)
    assert float(times.decode_s("16", 6, 100)) == pytest.approx(
        decode_plane_ms(6, 100) / 1e3, rel=1e-6
    )
    assert float(times.head_s(3)) == pytest.approx(0.35e-3)
    assert float(times.embedding_s(3, 10)) == pytest.approx(0.13e-3)
    assert "unseen points within 0.0 % on average" in times.provenance


def test_a_measured_batch_is_interpolated_between_its_own_lengths() -> None:
    """A kernel that switches at batch 8 is followed there, whatever the plane says."""
    rows = profile_rows() + [row("prefill", 16, s, 1.0 + s) for s in (10, 20, 40)]
    times = measured_times(rows, "test")
    wanted = {10: 11.0, 15: 16.0, 30: 31.0, 60: 61.0}
    for length, ms in wanted.items():
        assert float(times.prefill_s("16", 16, length)) == pytest.approx(ms / 1e3)
    many = times.prefill_s("16", 16, np.array(list(wanted)))
    assert many == pytest.approx(np.array(list(wanted.values())) / 1e3)


def test_equal_measurements_are_averaged_and_noise_never_goes_below_the_floor() -> None:
    fitted = fit([row("decode", 1, 10, 4), row("decode", 1, 10, 6)])
    assert float(fitted.seconds(1, 10)) == pytest.approx(5e-3)
    rows = [row("decode", q, past, 1 + q) for q in (2, 4) for past in (8, 16)]
    assert float(fit(rows).seconds(1, 0)) >= 1.5e-3  # half of the shortest
    wild = fit([row("decode", 1, 10, 5), row("decode", 1, 20, 1), row("decode", 2, 20, 9)])
    assert wild.mean_error > 0.1


def test_a_single_row_is_enough_for_a_fit() -> None:
    assert float(fit([row("head", 4, 0, 2)]).seconds(4, 0)) == pytest.approx(2e-3)


def test_phases_without_rows_cost_nothing_and_are_named() -> None:
    rows = [r for r in profile_rows() if r.phase in ("prefill", "decode")]
    times = measured_times(rows, "test")
    assert float(times.head_s(4)) == 0.0 and float(times.stage_prefill_s(1, 9)) == 0.0
    assert "no embedding or head rows" in times.provenance


def test_scaled_multiplies_every_phase() -> None:
    times = measured_times(profile_rows(), "test")
    slow = times.scaled(2).scaled(1.5)
    assert float(slow.head_s(4)) == pytest.approx(3 * float(times.head_s(4)))
    assert float(slow.decode_s("16", 4, 9)) == pytest.approx(3 * float(times.decode_s("16", 4, 9)))


def test_w8a8_is_offered_only_where_it_was_profiled() -> None:
    library = device_library()["a100-40g"]
    assert spec_sheet_times(library, SPEC).precisions == ("16", "8", "4", "3")
    more = [row(phase, 1, 8, 1, "8-w8a8") for phase in ("prefill", "decode")]  # type: ignore[arg-type]
    assert measured_times(profile_rows() + more, "test").precisions == ("16", "8-w8a8")
    assert measured_times(profile_rows() + more[:1], "test").precisions == ("16",)


def test_the_spec_sheet_is_a_roofline() -> None:
    spec = make_spec(hidden_size=4096, head_dim=128, num_attention_heads=32, num_key_value_heads=32)
    device = device_library()["v100-32g"]
    times = spec_sheet_times(device, spec)
    weights = sum(op.out_features * op.in_features for op in spec.linears)
    compute = 2 * weights * 16 * 1024 / (0.7 * device.fp16_tflops * 1e12)
    assert float(times.prefill_s("16", 16, 1024)) > compute
    assert float(times.prefill_s("16", 16, 1024)) < 2.0 * compute
    read = 2 * weights / (0.8 * device.bandwidth_gbs * 1e9)
    starts_s = (LAYER_LAUNCHES + len(spec.linears)) * START_S
    assert float(times.decode_s("16", 1, 0)) - starts_s == pytest.approx(read, rel=0.1)
    assert times.decode_s("4", 1, 0) < times.decode_s("8", 1, 0) < times.decode_s("16", 1, 0)
    assert times.provenance.startswith("spec sheet, not measured") and not times.measured


def test_device_times_prefers_own_profile_then_rehearsal_then_spec_sheet() -> None:
    cluster = rehearsal()
    own = device_times(cluster, "slow", SPEC, [make_profile("slow"), make_profile("cpu")])
    assert own.factor == 1 and "slowdown" not in own.provenance
    simulated = device_times(cluster, "slow", SPEC, [make_profile("cpu")])
    assert simulated.factor == 3 and "x3 slowdown" in simulated.provenance
    sheet = device_times(cluster, "t4-16g", SPEC, [make_profile("cpu")])
    assert sheet.provenance.startswith("spec sheet, not measured")


def test_a_rehearsal_uses_one_device_the_cpu_before_cuda() -> None:
    cpu, cuda = make_profile("cpu"), make_profile("cuda")
    both = device_times(rehearsal(), "slow", SPEC, [cuda, cpu])
    alone = device_times(rehearsal(), "slow", SPEC, [cpu])
    assert both.provenance == alone.provenance and "(one CPU thread)" in both.provenance
    assert "(CUDA)" in device_times(rehearsal(), "slow", SPEC, [cuda]).provenance


def test_a_profile_of_another_model_falls_back_and_says_so() -> None:
    other = make_spec(hidden_size=128)
    times = device_times(rehearsal(), "t4-16g", other, [make_profile("t4-16g", None)])
    assert not times.measured and f"holds no rows of {other.model_key}" in times.provenance


@pytest.mark.parametrize("profiles", [[], [make_profile("cpu", threads=4)]])
def test_a_rehearsal_without_a_one_thread_profile_says_what_to_run(profiles: list[Profile]) -> None:
    with pytest.raises(UserError, match="llmpq-profile layers --model llama --threads 1 -o"):
        device_times(rehearsal(), "slow", SPEC, profiles)


# ---- several devices per stage

NODE_LINK = Link(bandwidth_gbs=10, latency_us=5)
WIDE = make_spec(
    hidden_size=4096,
    intermediate_size=16384,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    vocab_size=50000,
)


def v100s() -> Cluster:
    device = {"type": "v100-32g", "count": 8}
    node = {"name": "n", "devices": [device], "link": NODE_LINK.model_dump()}
    return Cluster.model_validate({"nodes": [node], "link": {"bandwidth_gbs": 1, "latency_us": 99}})


def shared_times(spec: ModelSpec, degree: int, profiles: list[Profile]) -> LayerTimes:
    return tensor_parallel_times(v100s(), "v100-32g", "n", spec, degree, profiles)


def layer_exchange_s(spec: ModelSpec, degree: int, num_tokens: int) -> float:
    """Two all-reduces of 16-bit hidden states, by hand."""
    num_bytes = num_tokens * spec.hidden_size * 2
    messages = 2 * (degree - 1)
    return 2 * (messages * 5e-6 + messages / degree * num_bytes / 10e9)


def test_all_reduce_in_a_ring() -> None:
    assert links.all_reduce_s(NODE_LINK, 4, 8e9) == pytest.approx(6 * 5e-6 + 1.5 * 8e9 / 10e9)
    assert links.all_reduce_s(NODE_LINK, 1, 8e9) == 0
    many = links.all_reduce_s(NODE_LINK, 2, np.array([0.0, 10e9]))
    assert many == pytest.approx(np.array([1e-5, 1.00001]))


def test_one_device_a_stage_is_that_device() -> None:
    own = make_profile("v100-32g")
    for spec, profiles in ((SPEC, [own]), (WIDE, [])):
        alone = device_times(v100s(), "v100-32g", spec, profiles)
        one = shared_times(spec, 1, profiles)
        assert one.provenance == alone.provenance
        assert float(one.prefill_s("16", 2, 20)) == float(alone.prefill_s("16", 2, 20))


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_a_shard_of_the_spec_sheet_is_a_part_of_it_and_two_all_reduces(degree: int) -> None:
    """Norms are each device's own: they read and write 16 hidden states a token."""
    one, shared = shared_times(WIDE, 1, []), shared_times(WIDE, degree, [])
    norm_bandwidth = 900e9 * efficiency().coefficients["eager_bandwidth"]
    for precision, phase, sizes, tokens in (
        ("16", "prefill", (8, 512), 8 * 512),
        ("4", "decode", (16, 600), 16),
    ):
        whole, part = one.models[precision, phase], shared.models[precision, phase]
        assert isinstance(whole, Roofline) and isinstance(part, WithExchange)
        assert isinstance(part.compute, Roofline)
        exchange = float(part.seconds(*sizes) - part.compute.seconds(*sizes))
        assert exchange == pytest.approx(layer_exchange_s(WIDE, degree, tokens))
        norms = 16 * WIDE.hidden_size * tokens / norm_bandwidth
        divided = (float(whole.busy_s(*sizes)) - norms) / degree
        assert float(part.compute.busy_s(*sizes)) == pytest.approx(divided + norms, rel=0.05)
    assert f"; {degree} devices per stage, all-reduce over the link of n" in shared.provenance


def test_embedding_and_head_of_a_shared_stage() -> None:
    one, four = shared_times(WIDE, 1, []), shared_times(WIDE, 4, [])
    looked_up = float(one.embedding_s(2, 100))  # every device writes all hidden states
    exchange = layer_exchange_s(WIDE, 4, 200) / 2
    assert float(four.embedding_s(2, 100)) == pytest.approx(looked_up + exchange)
    best = 3 * (5e-6 + 16 * 12 / 10e9)
    launches_s = HEAD_LAUNCHES * START_S
    part = (float(one.head_s(16)) - launches_s) / 4 + launches_s
    assert float(four.head_s(16)) == pytest.approx(part + best)
    assert float(four.stage_prefill_s(2, 9)) == STAGE_CALL_S  # every device is called


def test_a_shared_stage_takes_arrays_everywhere() -> None:
    lengths = np.array([1.0, 100.0])
    for spec, profiles in ((WIDE, []), (SPEC, [make_profile("v100-32g")])):
        times = shared_times(spec, 2, profiles)
        for phase in ("prefill_s", "decode_s"):
            many = getattr(times, phase)("16", 4, lengths)
            single = [float(getattr(times, phase)("16", 4, length)) for length in (1, 100)]
            assert many == pytest.approx(np.array(single))
        for phase in ("embedding_s", "stage_prefill_s", "stage_decode_s"):
            assert getattr(times, phase)(4, lengths).shape == (2,)


def test_a_profile_of_the_shard_is_what_counts() -> None:
    shard = SPEC.shard(2)
    rows = [r.model_copy(update={"model_key": shard.model_key}) for r in profile_rows()]
    both = make_profile("v100-32g")
    both = both.model_copy(update={"rows": [*both.rows, *rows]})
    times = shared_times(SPEC, 2, [both])
    wanted = plane_ms(4, 16) / 1e3 + layer_exchange_s(SPEC, 2, 64)
    assert float(times.prefill_s("16", 4, 16)) == pytest.approx(wanted)
    assert times.measured and times.provenance.startswith("measured on test; fitted")


def slow_profile(excess_ms: dict[str, float]) -> Profile:
    """Of WIDE on a v100: its roofline, and a constant by precision."""
    sheet = shared_times(WIDE, 1, []).models
    rows = []
    for precision, excess in excess_ms.items():
        for batch, tokens in ((1, 16), (1, 64), (8, 16), (8, 512)):
            for phase in ("prefill", "decode"):
                roofline = sheet[precision, phase]
                assert isinstance(roofline, Roofline)
                ms = 1e3 * float(roofline.busy_s(batch, tokens)) + excess
                made = row(phase, batch, tokens, ms, precision)  # type: ignore[arg-type]
                rows.append(made.model_copy(update={"model_key": WIDE.model_key}))
    device = ProfiledDevice(name="test", type="v100-32g", memory_bytes=1)
    return Profile(device=device, rows=rows)


def test_the_overhead_of_a_whole_layer_stays_with_every_shard() -> None:
    """A constant millisecond a layer is not divided, what the roofline explains is."""
    profile = slow_profile({"16": 1.0})
    whole, four = shared_times(WIDE, 1, [profile]), shared_times(WIDE, 4, [profile])
    norm_s = 16 * WIDE.hidden_size / (900e9 * efficiency().coefficients["eager_bandwidth"])
    for phase, size, tokens, sent in (("prefill_s", 8, 512, 8 * 512), ("decode_s", 8, 16, 8)):
        before = float(getattr(whole, phase)("16", size, tokens))
        after = float(getattr(four, phase)("16", size, tokens))
        computed, kept = after - layer_exchange_s(WIDE, 4, sent), 1e-3 + norm_s * sent
        assert computed == pytest.approx(kept + (before - kept) / 4, rel=0.05)
    assert "whole layers measured on test" in four.provenance
    assert "no shard was measured; 4 devices per stage" in four.provenance


def test_slow_unpacking_is_divided_and_no_overhead() -> None:
    """What every precision takes is overhead; what 4 bits take beyond that is work."""
    profile = slow_profile({"16": 0.1, "4": 2.0})
    whole, four = shared_times(WIDE, 1, [profile]), shared_times(WIDE, 4, [profile])
    before, after = (float(times.decode_s("4", 8, 16)) for times in (whole, four))
    computed = after - layer_exchange_s(WIDE, 4, 8)
    assert computed == pytest.approx(0.1e-3 + (before - 0.1e-3) / 4, rel=0.05)


def test_a_shard_never_computes_longer_than_the_layer_nor_shorter_than_its_part() -> None:
    times = {degree: shared_times(SPEC, degree, [make_profile("v100-32g")]) for degree in (1, 2)}
    for size, tokens in ((1, 1), (1, 8), (8, 64), (64, 1000)):
        whole = float(times[1].decode_s("16", size, tokens))
        part = float(times[2].decode_s("16", size, tokens)) - layer_exchange_s(SPEC, 2, size)
        assert whole / 2 - 1e-12 <= part <= whole + 1e-12


def test_a_rehearsed_stage_of_several_devices_has_no_price() -> None:
    with pytest.raises(UserError, match="'slow' is rehearsed: a stage of 2 such devices"):
        tensor_parallel_times(rehearsal(), "slow", "n", SPEC, 2, [make_profile("cpu")])


# ---- memory

EAGER_CARD = replace(TORCH_CARD, graphs=False)
# Weights of the linears, and of norms and biases, of one layer; norm after the last layer.
GATED = H * 64 + 2 * (32 * H) + 64 * H + 3 * H * F
FUSED = 3 * H * H + H * H
HAND_COUNTS = {
    "llama": (GATED, 2 * H, VOCAB * H, H),
    "mistral": (GATED, 2 * H, VOCAB * H, H),
    "qwen2": (GATED, 2 * H + (64 + 32 + 32), VOCAB * H, H),
    "qwen3": (GATED, 2 * H + 2 * DIM, VOCAB * H, H),
    "gemma2": (GATED, 4 * H, VOCAB * H, H),
    "gemma3_text": (GATED, 4 * H + 2 * DIM, VOCAB * H, H),
    "opt": (4 * H * H + 2 * H * F, 4 * H + 4 * H + F + H, VOCAB * H + 52 * H, 2 * H),
    "bloom": (FUSED + 2 * H * F, 4 * H + 4 * H + F + H, VOCAB * H + 2 * H, 2 * H),
    "gpt_neox": (FUSED + 2 * H * F, 4 * H + 4 * H + F + H, VOCAB * H, 2 * H),
}
SIZES = RunSizes(
    lanes=(LaneShape(4, 40), LaneShape(4, 20)),
    prefill_micro_batch=2,
    prompt_tokens=30,
    chunk_tokens=30,
    num_stages=3,
)


@pytest.mark.parametrize("family", HAND_COUNTS)
def test_weights_and_cache_of_every_family_by_hand(family: str) -> None:
    linears, other, embedding, final = HAND_COUNTS[family]
    spec = make_spec(family).within(SIZES.largest.tokens)
    middle = stage_memory(spec, ["16"] * 2, first=False, last=False, sizes=SIZES)
    assert middle.weights == 2 * 2 * (linears + other)
    first = stage_memory(spec, ["16"], first=True, last=False, sizes=SIZES)
    assert first.weights == 2 * (linears + other + embedding)
    last = stage_memory(spec, ["16"], first=False, last=True, sizes=SIZES)
    assert last.weights == 2 * (linears + other + final + VOCAB * H)
    heads = HEADS if family in ALL_HEADS else KV
    # layers, requests x tokens, K V, half
    assert middle.cache == 2 * (4 * 40 + 4 * 20) * (2 * heads * DIM) * 2


@pytest.mark.parametrize("family", HAND_COUNTS)
def test_a_tied_matrix_counts_once_on_one_stage_and_twice_on_two(family: str) -> None:
    tied = make_spec(family, tie_word_embeddings=True)
    loose = make_spec(family)
    both = {"first": True, "last": True}
    matrix = 2 * VOCAB * H
    assert memory.end_weight_bytes(loose, **both) - memory.end_weight_bytes(tied, **both) == matrix
    ends = [{"first": True, "last": False}, {"first": False, "last": True}]
    apart = [sum(memory.end_weight_bytes(s, **end) for end in ends) for s in (tied, loose)]
    assert apart[0] == apart[1]


def test_layer_bytes_fall_with_the_precision_and_hold_scales() -> None:
    sizes = [memory.layer_weight_bytes(SPEC, p) for p in ("16", "8", "4", "3")]
    assert sizes == sorted(sizes, reverse=True)
    codes = sum(op.out_features * op.in_features for op in SPEC.linears)
    assert sizes[1] == codes + 4 * sum(op.out_features for op in SPEC.linears) + 2 * 2 * H


def act(spec: ModelSpec, precisions: list[str], **changes: Any) -> int:
    """Activations of a stage in the middle; `changes` of its sizes, or of where it is."""
    sizes = {name: changes.pop(name) for name in set(changes) & set(RunSizes.__dataclass_fields__)}
    where = {"first": False, "last": False, "sizes": replace(SIZES, **sizes)}
    where |= {"machine": EAGER_CARD, **changes}
    return stage_memory(spec, precisions, **where).activations


# A stage of LLaMA's layers in prefill, b requests of s tokens: positions, and where each token is
# stored, in 64-bit numbers; a column for each request; cosines and sines in 16 bits.
NUMBERS = 2 * 30 * (8 + 3 * 8) + 2 * 8 + 2 * 30 * DIM * 2 * 2
# What decode steps of 4 rows keep, 8 of them in the cache: five numbers of a row, a chosen token,
# its last token, states that come in and go out.
KEPT = 4 * (5 * 8 + 4) + 8 * 8 + 2 * 4 * H * 2


def test_activations_by_hand() -> None:
    """The peak of two layers is where a norm works in 32 bits, or where gate and up meet."""
    tokens = 2 * 30
    norm = tokens * (8 + 14 * H)  # stage input, residual, input: 16 bits; 32 bits twice; mean
    gated = tokens * (8 * H + 3 * 2 * F)
    assert act(SPEC, ["16"] * 2) == KEPT + NUMBERS + max(norm, gated)
    assert act(SPEC, ["16"]) == KEPT + NUMBERS + max(norm, gated) - tokens * 2 * H


def test_activations_hold_the_logits_and_what_is_unpacked() -> None:
    large = spec_from_config(CONFIG | {"model_type": "llama", "vocab_size": 10**6}, name="m")
    more = act(large, ["16"], last=True) - 4 * 10**6 * 2 * 2
    assert 0 < more < act(large, ["16"]), "scaled logits beside the head's"
    wide = spec_from_config(CONFIG | {"model_type": "llama", "intermediate_size": 2**16}, name="m")
    sizes = {"prompt_tokens": 2, "chunk_tokens": 2, "prefill_micro_batch": 1}
    sizes["lanes"] = (LaneShape(4, 4),)
    plain, packed = act(wide, ["16"], **sizes), act(wide, ["16", "4"], **sizes)
    assert packed - plain > 2 * 2**16 * H
    assert act(wide, ["16", "4"], **sizes, machine=cpu(())) < packed, "smaller parts on a CPU"


def test_eager_scores_are_held() -> None:
    long = {"prompt_tokens": 3000, "chunk_tokens": 3000}
    scores = 2 * HEADS * 3000 * 3000
    assert act(make_spec("bloom"), ["16"], **long) > 8 * scores > act(SPEC, ["16"], **long)


@pytest.mark.parametrize(("degree", "kv_heads"), [(2, 1), (4, 1)])
def test_one_device_of_a_shared_stage_by_hand(degree: int, kv_heads: int) -> None:
    """Weights, cache, feed-forward states and logits are cut; hidden states and norms are not."""
    shard = SPEC.shard(degree)
    heads, ffn, vocab = HEADS // degree, F // degree, VOCAB // degree
    linears = 2 * heads * DIM * H + 2 * kv_heads * DIM * H + 3 * H * ffn
    last = stage_memory(shard, ["16"] * 2, first=False, last=True, sizes=SIZES)
    assert last.weights == 2 * (2 * (linears + 2 * H) + H + vocab * H)
    assert last.cache == 2 * (4 * 40 + 4 * 20) * (2 * kv_heads * DIM) * 2
    assert act(shard, ["16"] * 2) <= act(SPEC, ["16"] * 2)
    first = stage_memory(shard, ["4"], first=True, last=False, sizes=SIZES)
    assert first.weights == memory.layer_weight_bytes(shard, "4") + 2 * vocab * H
    opt = make_spec("opt")
    ends = memory.end_weight_bytes(opt.shard(2), first=True, last=False)
    assert ends == 2 * (VOCAB // 2 * H + 52 * H)


def test_activations_are_of_the_larger_phase() -> None:
    short = {"prompt_tokens": 1, "chunk_tokens": 1, "prefill_micro_batch": 1}
    short["lanes"] = (LaneShape(8, 40),)
    where = {"first": True, "last": False}
    decode = memory.decode_bytes(SPEC, 8, 40, **where)
    kept = memory.step_bytes(SPEC, short["lanes"], first=True, last=False)
    assert act(SPEC, ["16"] * 2, **short, first=True) == kept + decode
    assert decode > memory.prefill_bytes(SPEC, 1, 1, **where)


def test_graphs_keep_what_decode_steps_compute_in() -> None:
    """Both phases lie beside each other, with what a graph of each shape and length holds."""
    decode = memory.decode_bytes(SPEC, 4, 40, first=False, last=False)
    eager, graphs = act(SPEC, ["16"] * 2), act(SPEC, ["16"] * 2, machine=TORCH_CARD)
    assert graphs == eager + decode + 2 * GRAPH_BYTES
    long = {"lanes": (LaneShape(4, 1000), LaneShape(4, 1000), LaneShape(2, 1000))}
    assert graph_lengths(1000) == (256, 384, 512, 768, 1000)
    assert memory.graph_bytes(long["lanes"], TORCH_CARD) == 3 * 5 * GRAPH_BYTES
    assert memory.graph_bytes(long["lanes"], cpu(())) == 0


def test_messages_by_hand() -> None:
    """Three stages: four prefills of two prompts, and two lanes' steps; 16 bytes of header each.

    One prefill more for what is computed, or sent on top of what is kept.
    """
    prompt, step = 16 + 2 * 30 * H * 2, 16 + 4 * H * 2
    waiting = 4 * prompt + 2 * step
    for first, last, held in (
        (True, True, 0),
        (True, False, waiting + prompt),
        (False, False, 2 * waiting + prompt),
        (False, True, waiting + prompt),
    ):
        assert memory.buffer_bytes(SPEC, SIZES, first=first, last=last) == held
    few = replace(SIZES, lanes=(LaneShape(4, 40),))  # of four prompts two each are under way
    coming, going = 4 * 16 + 4 * 30 * H * 2 + step, 4 * prompt + step
    assert memory.buffer_bytes(SPEC, few, first=False, last=True) == coming + prompt
    assert memory.buffer_bytes(SPEC, few, first=False, last=False) == coming + going + prompt
    chunks = replace(few, prompt_tokens=300)
    assert memory.buffer_bytes(SPEC, chunks, first=False, last=True) == going + prompt
    wide = replace(SIZES, lanes=(LaneShape(99, 40),), chunk_tokens=1, prompt_tokens=1)
    assert memory.buffer_bytes(SPEC, wide, first=True, last=False) == (
        4 * (16 + 2 * H * 2) + 2 * (16 + 99 * H * 2)
    )
    stage = stage_memory(SPEC, ["16"], first=False, last=True, sizes=SIZES, context=99)
    assert (stage.buffers, stage.context) == (waiting + prompt, 99)
    assert stage.total == stage.weights + stage.cache + stage.activations + stage.buffers


def test_the_end_of_a_long_prompt_attends_to_all_of_it() -> None:
    """Two prompts of 30, or the last 30 tokens of one of 3,000."""
    bloom, longer = make_spec("bloom"), {"prompt_tokens": 3000}
    scores = 2 * HEADS * 30 * 3000
    assert act(bloom, ["16"], **longer) - act(bloom, ["16"]) > 2 * scores
    assert act(bloom, ["16"], **longer) < act(bloom, ["16"], **longer, chunk_tokens=3000) / 50


# ---- links and quality


def test_links_inside_and_between_nodes() -> None:
    nodes = [
        {"name": n, "devices": [{"type": "t4-16g"}], "link": {"bandwidth_gbs": 2, "latency_us": 1}}
        for n in ("a", "b")
    ]
    cluster = Cluster.model_validate(
        {"nodes": nodes, "link": {"bandwidth_gbs": 1, "latency_us": 10}}
    )
    header = 8 * (16 + 6 * 4)  # goes before the states
    num_bytes = 4 * 30 * H * 2 + header
    assert links.prefill_s(cluster, "a", "a", SPEC, 4, 30) == pytest.approx(1e-6 + num_bytes / 2e9)
    assert links.prefill_s(cluster, "a", "b", SPEC, 4, 30) == pytest.approx(1e-5 + num_bytes / 1e9)
    assert links.decode_s(cluster, "a", "b", SPEC, 4) == pytest.approx(
        1e-5 + (4 * H * 2 + header) / 1e9
    )
    assert links.tokens_back_s(cluster, "b", "a", 4) == pytest.approx(1e-5 + 32 / 1e9)


def test_an_absurd_sensitivity_still_has_a_percentage() -> None:
    assert math.isfinite(prior_quality(1).percent(1e300))


def test_budget_and_percent_are_inverse() -> None:
    quality = prior_quality(10)
    assert quality.percent(quality.budget(2.5)) == pytest.approx(2.5)
    assert quality.budget(0) == 0
    assert quality.sum_omega(["4"] * 10) == pytest.approx(0.05)
    assert quality.sum_omega(["16"] * 9 + ["3"]) == pytest.approx(0.025)
    assert "not measured" in quality.source


def sensitivity(num_layers: int, scale: float = 2.0) -> Sensitivity:
    layers = [{"layer": i, "precision": "4", "sensitivity": 0.1 * i} for i in range(num_layers)]
    return Sensitivity.model_validate(
        {
            "model": "m",
            "num_layers": num_layers,
            "indicator": "measured",
            "layers": layers,
            "calibration": {"source": "x", "num_tokens": 1},
            "fit": {"scale": scale, "mean_abs_error_percent": 0, "num_plans": 1},
        }
    )


def test_measured_quality_uses_the_table_and_the_fit() -> None:
    quality = measured_quality(sensitivity(LAYERS), SPEC, "s.json")
    assert quality.sum_omega(["16", "4", "4"]) == pytest.approx(0.3)
    assert quality.percent(0.3) == pytest.approx(100 * (math.exp(0.6) - 1))
    assert set(quality.omega) == {"16", "4"}
    assert measured_quality(sensitivity(LAYERS, 0), SPEC, "s.json").budget(1) == math.inf
    with pytest.raises(UserError, match="4 layers, llama has 3"):
        measured_quality(sensitivity(4), SPEC, "s.json")


def test_layer_times_take_arrays_everywhere() -> None:
    times: LayerTimes = spec_sheet_times(device_library()["t4-16g"], SPEC)
    lengths = np.array([1.0, 10.0, 100.0])
    for value in (times.prefill_s("4", 2, lengths), times.decode_s("4", 2, lengths)):
        assert value.shape == (3,) and (np.diff(value) >= 0).all()
    assert times.embedding_s(2, lengths).shape == (3,)
