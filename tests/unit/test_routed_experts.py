"""What layers with routed experts, and layers of several kinds, hold and take by spec sheets."""

import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llmpq.costs import memory
from llmpq.costs.latency import device_machine, spec_sheet_times
from llmpq.costs.layer_kernels import expert_groups
from llmpq.costs.memory import RunSizes, stage_memory
from llmpq.costs.recalibrate import StageCalls, stage_calls
from llmpq.costs.routing import Routing, balanced, fitted
from llmpq.costs.spec_sheet import rooflines
from llmpq.devices import device_library
from llmpq.errors import UserError
from llmpq.expert_kernels import GROUPED_MULTIPLY, expert_choices, most_tokens
from llmpq.job import LaneShape
from llmpq.kernel_table import choices
from llmpq.machine import card, cpu
from llmpq.model_lookup import load_model_spec
from llmpq.model_spec import Experts, LayerKind, LinearShape, ModelSpec, experts_in
from llmpq.precision import PRECISIONS, in_order, layer_precision, with_fewer_for_experts
from llmpq.serving import matrices_of, serving
from llmpq.workload import Workload

ROOT = Path(__file__).resolve().parents[2]
LLAMA = load_model_spec(str(ROOT / "configs" / "models" / "llama-3.1-8b.json"))
LIBRARY = device_library()
SIZES = RunSizes((LaneShape(8, 128),), 4, 96, 96, num_stages=2)
H = LLAMA.hidden_size


def shape(name: str, out: int, cols: int) -> LinearShape:
    return LinearShape(name=name, out_features=out, in_features=cols)


def ffn(width: int) -> tuple[LinearShape, ...]:
    return (
        shape("gate_proj", width, H),
        shape("up_proj", width, H),
        shape("down_proj", H, width),
    )


ATTENTION = LLAMA.linears[:4]
EXPERTS = Experts(count=64, per_token=8, linears=ffn(1024), other_params=5)
SPARSE = LLAMA.model_copy(
    update={"model_type": "sparse", "linears": ATTENTION, "ffn_size": 1024, "experts": EXPERTS}
)


def kind_of(spec: ModelSpec, name: str) -> LayerKind:
    sizes = {field: getattr(spec, field) for field in LayerKind.model_fields if field != "name"}
    return LayerKind(name=name, **sizes)


def mixed() -> ModelSpec:
    """Three dense layers, then experts, as DeepSeek-V3."""
    kinds = kind_of(LLAMA, "dense"), kind_of(SPARSE, "experts")
    layers = (0,) * 3 + (1,) * (LLAMA.num_layers - 3)
    return LLAMA.model_copy(update={"kinds": kinds, "layer_kinds": layers})


# ---- names of precisions


def test_experts_may_have_fewer_bits_than_the_rest() -> None:
    found = with_fewer_for_experts(["16", "8", "4"])
    assert found == ("16", "16+experts@8", "16+experts@4", "8", "8+experts@4", "4")
    assert in_order(["4", "8+experts@4", "8", "8+experts@3"]) == (
        "8",
        "8+experts@4",
        "8+experts@3",
        "4",
    )
    assert memory.is_packed("16+experts@4") and not memory.is_packed("16")


# ---- memory


@pytest.mark.parametrize("precision", with_fewer_for_experts(["16", "8", "4", "3"]))
def test_a_layer_holds_its_experts_at_their_precision(precision: str) -> None:
    rest, experts = layer_precision(precision)
    own = sum(PRECISIONS[rest].weight_bytes(op.out_features, op.in_features) for op in ATTENTION)
    one = sum(PRECISIONS[experts].weight_bytes(op.out_features, op.in_features) for op in ffn(1024))
    other = 2 * (SPARSE.layer_other_params + 64 * 5)
    assert memory.layer_weight_bytes(SPARSE, precision) == own + 64 * one + other
    assert memory.layer_weight_bytes(LLAMA, precision) == memory.layer_weight_bytes(LLAMA, rest)


@pytest.mark.parametrize("machine", [cpu(()), card("9.0"), card("7.5", [])])
def test_fewer_bits_for_experts_never_hold_more(machine) -> None:
    for rest in ("16", "8", "4"):
        names = [rest, *(f"{rest}+experts@{bits}" for bits in ("8", "4", "3"))]
        names = in_order(name for name in names if name in with_fewer_for_experts(PRECISIONS))
        held = [memory.layer_weight_bytes(SPARSE, name, machine) for name in names]
        assert held == sorted(held, reverse=True) and len(set(held)) == len(held)


def test_a_stage_holds_what_its_kinds_of_layers_hold() -> None:
    spec, precisions = mixed(), ["8", "8", "8+experts@4", "8+experts@4", "16"]
    kinds = spec.kind_of_layers[1:6]
    assert kinds == (0, 0, 1, 1, 1)
    where = {"first": False, "last": False, "sizes": SIZES}
    whole = stage_memory(spec, precisions, kinds=kinds, **where)
    dense = stage_memory(LLAMA, precisions[:2], **where)
    sparse = stage_memory(SPARSE, precisions[2:], **where)
    assert whole.weights == dense.weights + sparse.weights
    assert whole.cache == dense.cache + sparse.cache
    assert whole.buffers == dense.buffers == sparse.buffers
    with pytest.raises(AssertionError):
        stage_memory(spec, precisions, **where)


def test_a_stage_holds_the_cache_of_each_kind() -> None:
    narrow = SPARSE.model_copy(update={"kv_values": 576})
    spec = LLAMA.model_copy(
        update={
            "kinds": (kind_of(LLAMA, "full"), kind_of(narrow, "latent")),
            "layer_kinds": (0, 1) * (LLAMA.num_layers // 2),
        }
    )
    held = stage_memory(spec, ["16"] * 3, kinds=(1, 0, 1), first=False, last=False, sizes=SIZES)
    assert held.cache == 8 * 128 * 2 * (2 * 576 + LLAMA.kv_values_per_token)


def test_activations_are_of_the_kinds_that_a_stage_holds() -> None:
    """Dense layers are wider than experts: a stage of experts alone needs less."""
    where = {"first": False, "last": False, "machine": cpu(())}
    wide, narrow, both, any_kind = (
        memory.prefill_bytes(mixed(), 4, 96, kinds=kinds, **where)
        for kinds in ({0}, {1}, {0, 1}, None)
    )
    assert narrow < wide == both == any_kind


def test_a_smaller_micro_batch_may_need_more_than_one_that_is_too_large_for_at_once() -> None:
    where = {"first": False, "last": False, "machine": card("7.5"), "precisions": ["4"]}
    sizes = [memory.prefill_bytes(SPARSE, 1, tokens, **where) for tokens in (8, 64, 65, 640)]
    assert sizes == sorted(sizes)


def test_a_kept_spec_of_kinds_is_not_that_of_a_changed_model() -> None:
    spec = LLAMA.model_copy()
    assert spec.kind_specs == (spec,)
    assert spec.shard(2).kind_specs[0].ffn_size == spec.ffn_size // 2


@pytest.mark.parametrize(
    ("machine", "has_graphs"),
    [(card("9.0"), True), (card("7.5"), True), (card("9.0", []), False)],
)
def test_graphs_hold_experts_that_are_multiplied_at_once(machine, has_graphs: bool) -> None:
    """Otherwise what a decode step computes in is shared with prefills."""
    where = {"first": False, "last": False}
    sparse = [
        memory.activation_bytes(SPARSE, SIZES, machine=one, **where)
        for one in (machine, replace(machine, graphs=False))
    ]
    assert (sparse[0] > sparse[1]) == has_graphs
    own = {"machine": machine, "precisions": ["16"]}
    assert memory.stage_machine(SPARSE, None, rows=64, **own).graphs == has_graphs
    is_new = machine.capability >= (8, 0)
    assert memory.stage_machine(SPARSE, None, rows=65, **own).graphs == (has_graphs and is_new)


def test_experts_at_once_have_a_row_for_each_expert_of_a_token() -> None:
    where = {"first": False, "last": False, "kinds": {1}}
    one_by_one, at_once = (
        memory.prefill_bytes(mixed(), 4, 96, machine=machine, **where)
        for machine in (card("9.0", []), card("9.0"))
    )
    pairs, inner = 4 * 96 * 8, 1024
    outputs = 2 * pairs * (2 + 8) * inner  # of gate and up, with the activation of biased ones
    assert outputs < at_once < outputs + one_by_one


def test_kernels_of_layers_are_by_the_precisions_of_their_matrices() -> None:
    found = matrices_of(mixed(), ["8+experts@4"])
    assert set(found) == {"8", "4"}
    assert (14336, 4096, False) in found["8"]
    assert set(found["4"]) == {(1024, H, True), (H, 1024, True)}
    assert serving(card("9.0"), found)["4"].text == GROUPED_MULTIPLY
    kernels = serving(card("7.0"), found)["4"].kernels
    assert kernels[0] == f"{GROUPED_MULTIPLY} up to 64 tokens" and len(kernels) > 1
    both = matrices_of(mixed(), ["8"])
    assert serving(card("9.0"), both)["8"].text == f"humming; experts: {GROUPED_MULTIPLY}"
    assert GROUPED_MULTIPLY not in serving(cpu(()), found)["4"].kernels


def test_runs_of_layers_of_several_kinds_correct_no_profile() -> None:
    """Windows make kinds of layers only on texts that are longer."""
    workload = Workload(prompt_tokens=90, new_tokens=10, num_requests=1)

    def calls(model: ModelSpec) -> list[StageCalls]:
        plan = SimpleNamespace(model=model, workload=workload)
        return stage_calls([(SimpleNamespace(stages=[]), plan)])

    def with_windows(window: int) -> ModelSpec:
        dense, _ = mixed().kinds
        kinds = dense.model_copy(update={"window": window}), dense
        return mixed().model_copy(update={"kinds": kinds})

    for several in (mixed(), with_windows(50)):
        with pytest.raises(UserError, match="several kinds, which runs do not time apart"):
            calls(several)
    assert calls(SPARSE) == calls(with_windows(99)) == []


def test_the_key_of_a_layer_names_its_experts_and_an_odd_cache() -> None:
    assert experts_in(SPARSE.model_key) == (64, 8) and experts_in(LLAMA.model_key) is None
    latent = SPARSE.model_copy(update={"kv_values": 576})
    assert experts_in(latent.model_key) == (64, 8)
    assert len({spec.model_key for spec in (LLAMA, SPARSE, latent)}) == 3


# ---- routing


def test_the_expected_experts_are_those_of_random_draws() -> None:
    draw = random.Random(1)
    for count, per_token, rows in ((8, 2, 1), (8, 2, 5), (64, 8, 4), (64, 8, 16), (16, 1, 20)):
        trials = [
            len({e for _ in range(rows) for e in draw.sample(range(count), per_token)})
            for _ in range(3000)
        ]
        error = 4 * float(np.std(trials)) / len(trials) ** 0.5
        routing = Routing(count, per_token)
        assert float(routing.used(rows)) == pytest.approx(float(np.mean(trials)), abs=error + 1e-9)


def test_experts_in_use_grow_from_those_of_a_token_to_all() -> None:
    routing = balanced(EXPERTS)
    rows = np.array([1, 2, 4, 16, 64, 4096])
    used = routing.used(rows)
    assert used[0] == pytest.approx(8) and used[-1] == pytest.approx(64)
    assert (np.diff(used) > 0).all() and (used <= 64).all()
    assert routing.rows_each(rows) * used == pytest.approx(8 * rows)
    assert Routing(4, 4).used(rows) == pytest.approx(np.full(6, 4.0))


def test_an_effective_number_is_found_in_what_was_used() -> None:
    rows = [1, 4, 16, 64, 256]
    uneven = Routing(37.0, 8)
    whole = balanced(EXPERTS)
    found = fitted(whole, rows, list(uneven.used(rows)))
    assert found.count == pytest.approx(37.0, rel=0.02) and found.per_token == 8
    assert fitted(whole, rows, list(whole.used(rows))).count == pytest.approx(64)
    assert fitted(whole, [], []) == whole


# ---- the spec sheet

OFFERED = with_fewer_for_experts(["16", "8", "4", "3"])


@pytest.mark.parametrize("name", ["t4-16g", "a100-80g", "h100-80g", "rtx3090-24g"])
def test_more_rows_are_never_faster(name: str) -> None:
    lines = rooflines(LIBRARY[name], SPARSE, OFFERED, device_machine(LIBRARY[name]))
    lengths = np.array([1.0, 16, 100, 512, 4096])
    for precision in OFFERED:
        for phase in ("prefill", "decode"):
            line = lines[precision, phase]
            grid = np.array([line.seconds(size, lengths) for size in (1, 2, 3, 8, 16, 64, 256)])
            assert (np.diff(grid, axis=0) >= 0).all() and (np.diff(grid, axis=1) >= 0).all()


def test_a_decode_step_reads_the_experts_that_it_uses() -> None:
    device = LIBRARY["h100-80g"]
    line = rooflines(device, SPARSE, ["16"], device_machine(device))["16", "decode"]
    dense_s = float(
        rooflines(
            device,
            SPARSE.model_copy(update={"experts": None}),
            ["16"],
            device_machine(device),
        )["16", "decode"].busy_s(1, 0)
    )
    one = 2 * 3 * 1024 * H / (device.bandwidth_gbs * 1e9)  # at all of its bandwidth
    for rows, least, most in ((1, 8, 8), (4, 26, 27), (64, 63.9, 64)):
        experts_s = float(line.busy_s(rows, 0)) - dense_s
        assert least * one < experts_s < 1.6 * most * one, rows


def test_uneven_routing_is_faster_with_few_rows() -> None:
    device = LIBRARY["a100-80g"]
    machine = device_machine(device)
    even = rooflines(device, SPARSE, ["16"], machine)["16", "decode"]
    uneven = rooflines(device, SPARSE, ["16"], machine, Routing(16, 8))["16", "decode"]
    assert float(uneven.busy_s(16, 9)) < 0.5 * float(even.busy_s(16, 9))
    assert float(uneven.seconds(16, 9)) < float(even.seconds(16, 9))


def test_fewer_bits_for_experts_take_less_where_bytes_are_the_limit() -> None:
    device = LIBRARY["h100-80g"]
    lines = rooflines(device, SPARSE, OFFERED, device_machine(device))
    names = ["16", "16+experts@8", "16+experts@4"]
    taken = [float(lines[name, "decode"].busy_s(8, 512)) for name in names]
    assert taken == sorted(taken, reverse=True) and len(set(taken)) == 3


def test_experts_that_are_launched_one_by_one_are_in_no_graph() -> None:
    device = LIBRARY["h100-80g"]
    for libraries, is_eager in ((None, False), ((), True)):
        machine = card("9.0", libraries)
        for spec in (LLAMA, SPARSE):
            seconds = [
                float(rooflines(device, spec, ["16"], one)["16", "decode"].seconds(1, 9))
                for one in (machine, replace(machine, graphs=False))
            ]
            assert (seconds[0] == seconds[1]) == (is_eager and spec is SPARSE)


def test_launches_of_experts_at_once_depend_on_no_routing() -> None:
    device = LIBRARY["h100-80g"]
    for libraries, grows in ((None, False), ((), True)):
        line = rooflines(device, SPARSE, ["4"], card("9.0", libraries))["4", "decode"]
        gaps = [float(line.seconds(q, 9) - line.busy_s(q, 9)) for q in (1, 16)]
        assert (gaps[1] > 2 * gaps[0]) == grows


def test_old_cards_run_experts_at_once_up_to_a_number_of_tokens() -> None:
    device, machine = LIBRARY["t4-16g"], card("7.5")
    assert [most_tokens(machine, SPARSE, name) for name in ("16", "4")] == [64, 64]
    line = rooflines(device, SPARSE, ["4"], machine)["4", "decode"]
    assert float(line.seconds(65, 9)) > float(line.seconds(64, 9)) + 0.01
    groups = expert_groups(machine, SPARSE, "4")
    names = [kernel.name for kernel in groups.kernels]
    assert names[0] == GROUPED_MULTIPLY and "Triton unpacking + cuBLAS" in names


def test_many_tokens_of_large_experts_run_one_after_the_other() -> None:
    for out, cols, most in ((1536, 4096, math.inf), (14336, 4096, 2048), (2048, 7168, math.inf)):
        for name in ("16", "8", "4", "3"):
            assert expert_choices(card("9.0"), name, out, cols).most_tokens == most


def test_what_is_not_measured_has_no_error() -> None:
    device = LIBRARY["h100-80g"]
    lines = rooflines(device, SPARSE, ["16"], device_machine(device))
    assert lines["16", "decode"].error is None
    assert rooflines(device, LLAMA, ["16"], device_machine(device))["16", "decode"].error


def test_experts_are_held_as_the_kernel_for_all_of_them_reads_them() -> None:
    found = expert_choices(card("9.0"), "4", 1024, 4096)
    assert {kernel.layout for kernel in (found.grouped, *found.single)} == {"grouped"}
    assert choices(card("9.0"), "4", 1024, 4096, 128)[0].layout == "humming"
    for machine in (cpu(()), card("9.0", []), replace(card("9.0"), dtype="float32")):
        assert most_tokens(machine, SPARSE, "4") == 0
    assert most_tokens(cpu(()), LLAMA, "4") == math.inf


def test_latents_are_read_and_multiplied_by_every_head() -> None:
    """512 + 64 values a token for 32 heads, as in DeepSeek's attention."""
    device = LIBRARY["h100-80g"]
    latent = LLAMA.model_copy(update={"kv_values": 576})
    machine = device_machine(device)
    plain, new = (
        rooflines(device, spec, ["16"], machine)["16", "decode"] for spec in (LLAMA, latent)
    )
    taken = [float(line.busy_s(8, 4000) - line.busy_s(8, 0)) for line in (plain, new)]
    assert taken[1] < taken[0]
    least = max(2 * 576 / (device.bandwidth_gbs * 1e9), 4 * 32 * 576 / (device.fp16_tflops * 1e12))
    assert taken[1] > 8 * 4000 * least


def test_experts_are_offered_with_fewer_bits() -> None:
    times = spec_sheet_times(LIBRARY["h100-80g"], SPARSE)
    assert times.precisions == OFFERED
    assert spec_sheet_times(LIBRARY["h100-80g"], LLAMA).precisions == ("16", "8", "4", "3")
