"""Times from spec sheets: monotone, within the sheet's limits, fewer bits faster, and labelled."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from llmpq.costs.device_speed import efficiency, reached_peak, rounded_maximum
from llmpq.costs.latency import device_machine, spec_sheet_times
from llmpq.costs.spec_sheet import error, provenance, rooflines
from llmpq.devices import device_library
from llmpq.kernel import EAGER_LAUNCH_S, LAYER_LAUNCHES, START_S
from llmpq.kernel_table import kernels_of
from llmpq.machine import HUMMING, LIBRARIES
from llmpq.model_lookup import load_model_spec
from llmpq.precision import PRECISIONS, STANDARD

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = device_library()
LLAMA = load_model_spec(str(ROOT / "configs" / "models" / "llama-3.1-8b.json"))
OPT = load_model_spec(str(ROOT / "configs" / "models" / "opt-30b.json"))
CARDS = {name for name, device in LIBRARY.items() if device.kind == "gpu"}
# Those for which there are kernels that read packed weights: NVIDIA's from capability 7.0 on.
WITH_KERNELS = {name for name in CARDS if set(LIBRARIES) & device_machine(LIBRARY[name]).libraries}
WEIGHT_ONLY = [name for name in STANDARD if PRECISIONS[name].weight_only]


# CPU kernels were timed with AVX-512: elsewhere the int8 kernel may cost more than what follows it.
TIMED = [name for name in LIBRARY if name in CARDS or device_machine(LIBRARY[name]).features]


@pytest.mark.parametrize("name", TIMED)
def test_times_grow_with_size(name: str) -> None:
    times = spec_sheet_times(LIBRARY[name], LLAMA)
    lengths = np.array([1.0, 16, 100, 512, 4096])
    for precision in WEIGHT_ONLY:
        for phase in (times.prefill_s, times.decode_s):
            grid = np.array([phase(precision, size, lengths) for size in (1, 2, 8, 64)])
            assert (np.diff(grid, axis=0) >= 0).all() and (np.diff(grid, axis=1) >= 0).all()
            assert grid[-1, -1] > grid[0, -1] and grid[-1, -1] > grid[-1, 0]


@pytest.mark.parametrize("name", LIBRARY)
def test_never_beyond_peak_or_bandwidth(name: str) -> None:
    device = LIBRARY[name]
    peak, bandwidth = device.fp16_tflops * 1e12, device.bandwidth_gbs * 1e9
    for spec in (LLAMA, OPT):
        lines = rooflines(device, spec, WEIGHT_ONLY, device_machine(device))
        weights = sum(op.out_features * op.in_features for op in spec.linears)
        for precision in WEIGHT_ONLY:
            stored = sum(
                PRECISIONS[precision].weight_bytes(op.out_features, op.in_features)
                for op in spec.linears
            )
            for tokens in (1, 64, 1024, 16384):
                seconds = float(lines[precision, "prefill"].busy_s(1, tokens))
                assert seconds >= max(2 * weights * tokens / peak, stored / bandwidth)
            cached = 2 * spec.kv_values_per_token * 64 * 1000
            seconds = float(lines[precision, "decode"].busy_s(64, 999))
            assert seconds >= max(2 * weights * 64 / peak, (stored + cached) / bandwidth)
        assert float(lines["", "head"].busy_s(8, 0)) >= 2 * spec.head_params / bandwidth


@pytest.mark.parametrize("name", sorted(WITH_KERNELS))
def test_fewer_bits_decode_faster_one_request(name: str) -> None:
    """Where layers are large; on a B200 the launches of small ones cost more than bytes do."""
    times = spec_sheet_times(LIBRARY[name], OPT)
    seconds = [float(times.decode_s(precision, 1, 512)) for precision in ("16", "8", "4", "3")]
    assert seconds == sorted(seconds, reverse=True) and len(set(seconds)) == 4


@pytest.mark.parametrize("name", sorted(CARDS - WITH_KERNELS))
def test_fewer_bits_are_slower_where_torch_unpacks_them(name: str) -> None:
    times = spec_sheet_times(LIBRARY[name], LLAMA)
    for size in (1, 8, 64):
        assert all(times.decode_s(p, size, 512) > times.decode_s("16", size, 512) for p in "843")


@pytest.mark.parametrize(
    ("faster", "slower"),
    [
        ("v100-32g", "t4-16g"),
        ("a100-40g", "v100-32g"),
        ("h100-80g", "a100-80g"),
        ("b200-180g", "h200-141g"),
        ("rtx4090-24g", "rtx3090-24g"),
        ("a10-24g", "l4-24g"),
    ],
)
def test_faster_cards_are_faster(faster: str, slower: str) -> None:
    fast, slow = (spec_sheet_times(LIBRARY[name], LLAMA) for name in (faster, slower))
    alike = fast.machine.libraries == slow.machine.libraries  # a V100 has no humming, a T4 has
    for precision in WEIGHT_ONLY if alike else ["16"]:
        assert fast.prefill_s(precision, 4, 512) < slow.prefill_s(precision, 4, 512)
        assert fast.decode_s(precision, 8, 512) < slow.decode_s(precision, 8, 512)


def test_what_the_power_of_a_board_and_half_rate_do() -> None:
    c = efficiency().coefficients
    big, small = LIBRARY["a100-80g"], LIBRARY["l4-24g"]
    assert reached_peak(small, c) < 0.6 * reached_peak(big, c)
    assert reached_peak(LIBRARY["rtx3090-24g"], c) > reached_peak(LIBRARY["a6000-48g"], c)
    assert all(0.2 < reached_peak(device, c) <= 1 for device in LIBRARY.values())
    unknown = big.model_copy(update={"board_watts": None})
    usual = big.model_copy(update={"board_watts": 300.0})
    assert reached_peak(unknown, c) == reached_peak(usual, c)


def test_8_bit_products_use_the_integer_rate() -> None:
    """Where they are served: on CPUs with VNNI, and nowhere else."""
    key = ("8-w8a8", "prefill")
    cpu = LIBRARY["xeon-8480-512g"]
    lines = rooflines(cpu, LLAMA, ["16", "8", "8-w8a8"], device_machine(cpu))
    assert lines[key].busy_s(4, 1024) < lines["16", "prefill"].busy_s(4, 1024)
    for name in ("epyc-7742-256g", "a100-80g"):
        device = LIBRARY[name]
        assert key not in rooflines(device, LLAMA, ["16", "8-w8a8"], device_machine(device))


def test_a_rounded_maximum_stays_near_the_larger() -> None:
    one, other = np.array([0.0, 1.0, 1.0, 3.0]), np.array([2.0, 0.0, 1.0, 1e-9])
    found = rounded_maximum(one, other, 2.0)
    assert found == pytest.approx(np.array([2.0, 1.0, 2**0.5, 3.0]))
    assert rounded_maximum(0.0, 0.0, 2.0) == 0


def test_launches_come_between_kernels_or_beside_them() -> None:
    """A decode step is a graph; a short prefill takes as long as the host needs to launch it."""
    device = LIBRARY["t4-16g"]
    launches = LAYER_LAUNCHES + len(LLAMA.linears)
    decode, prefill = (
        rooflines(device, LLAMA, ["16"], device_machine(device))["16", phase]
        for phase in ("decode", "prefill")
    )
    assert float(decode.seconds(1, 0)) == float(decode.busy_s(1, 0)) + launches * START_S
    assert float(prefill.seconds(1, 1)) > launches * EAGER_LAUNCH_S
    started = float(prefill.busy_s(64, 512)) + launches * START_S
    assert float(prefill.seconds(64, 512)) == pytest.approx(started, rel=1e-3)
    eager = replace(device_machine(device), graphs=False)
    line = rooflines(device, LLAMA, ["16"], eager)["16", "decode"]
    assert float(line.seconds(1, 0)) > launches * EAGER_LAUNCH_S


def test_a_cpu_launches_nothing() -> None:
    device = LIBRARY["epyc-9654-768g"]
    lines = rooflines(device, LLAMA, ["16"], device_machine(device))
    for phase in ("prefill", "decode"):
        line = lines["16", phase]
        assert float(line.seconds(4, 64)) == pytest.approx(float(line.busy_s(4, 64)) + 200e-6)


def test_the_fit_says_how_far_off_it_may_be() -> None:
    held = efficiency()
    assert held.sources and held.num_gpus >= 10
    shares = [value for name, value in held.coefficients.items() if name.endswith("bandwidth")]
    assert len(shares) == 4 and all(0 < share < 1 for share in shares)
    known, unseen = device_library()["t4-16g"], ("mi300x-192g", "m3-ultra-512g", "p100-16g")
    errors = [error(known, phase) for phase in ("prefill", "decode")]
    assert all(e is not None and 0.01 < e <= 0.15 for e in errors)
    assert f"{100 * errors[1]:.0f} % in decode" in provenance(known)
    for name in unseen:
        assert error(device_library()[name], "prefill") is None
        assert "not known" in provenance(device_library()[name])
    line = rooflines(known, LLAMA, ["16"], device_machine(known))["16", "decode"]
    assert line.accuracy(1, 100).error == errors[1]


def test_the_error_of_a_kernel_is_known_where_it_was_measured() -> None:
    """humming was timed on an H100; what it does on a T4 nobody has seen."""
    for name, is_known in (("h100-80g", True), ("h200-141g", True), ("t4-16g", False)):
        device = LIBRARY[name]
        machine = device_machine(device)
        humming = [k for k in kernels_of(machine, "4") if k.library == HUMMING]
        found = error(device, "decode", humming)
        assert (found is not None) == is_known
        assert found is None or found > error(device, "decode")
        line = rooflines(device, LLAMA, ["4"], machine)["4", "decode"]
        assert line.accuracy(1, 100).error == found


def fit_script() -> ModuleType:
    pytest.importorskip("pandas")
    spec = importlib.util.spec_from_file_location(
        "fit_efficiency", ROOT / "scripts" / "fit_efficiency.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fit_efficiency"] = module
    spec.loader.exec_module(module)
    return module


def test_the_shipped_coefficients_are_what_the_tables_give(shared: Path) -> None:
    fit = fit_script()
    rows = fit.observations(shared / "gpu")
    assert len({one.left_out_with for one in rows}) == efficiency().num_gpus
    assert all(one.time_s > 0 for one in rows)
    found = fit.fit(rows, fit.SHIPPED)
    for name, value in efficiency().coefficients.items():
        assert found[name] == pytest.approx(value, rel=0.02), name


def test_an_unseen_card_is_predicted_and_far_better_than_by_two_constants(shared: Path) -> None:
    fit = fit_script()
    rows = [one for one in fit.observations(shared / "gpu") if one.source != "aiconfigurator"]
    errors = {}
    for candidate in (fit.CANDIDATES[0], fit.SHIPPED):
        others = [one for one in rows if one.left_out_with != "v100"]
        own = [one for one in rows if one.left_out_with == "v100" and one.phase == "prefill"]
        predicted = fit.tabulate(own).predict(fit.fit(others, candidate))
        measured = np.array([one.time_s for one in own])
        errors[candidate.name] = float(np.median(np.abs(predicted / measured - 1)))
    constants, shipped = errors.values()
    assert shipped < 0.15 < constants
