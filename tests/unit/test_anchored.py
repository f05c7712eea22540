"""Small profiles: what they measured is kept, what they cannot tell is the spec sheet's."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llmpq.cluster import Cluster
from llmpq.costs.fits import BEYOND, SHEET, fit
from llmpq.costs.latency import LayerTimes, device_times
from llmpq.costs.peak import activations_of
from llmpq.costs.shards import tensor_parallel_times
from llmpq.costs.spec_sheet import Roofline, error, rooflines
from llmpq.devices import device_library
from llmpq.kernel import STAGE_CALL_S
from llmpq.machine import card
from llmpq.model_lookup import load_model_spec
from llmpq.profile_data import DECODES, Phase, Profile, ProfiledDevice, ProfileRow

CONFIGS = Path(__file__).parents[2] / "configs" / "models"
SPEC = load_model_spec(str(CONFIGS / "llama-3.1-8b.json"))
V100 = device_library()["v100-32g"]
SIZES = {"prefill": (1, 2, 8), "decode": (1, 8, 64)}


def row(
    phase: Phase, batch: int, length: int, ms: float, precision: str = "4", spread: float = 0.0
) -> ProfileRow:
    """One measured cell, most of whose samples lie within `spread` of its time."""
    decode = phase in DECODES
    return ProfileRow(
        model_key=SPEC.model_key,
        precision=precision,
        phase=phase,
        micro_batch=batch,
        prompt_tokens=0 if decode else length,
        past_tokens=length if decode else 0,
        time_ms=ms,
        time_ms_p10=ms * (1 - spread),
        time_ms_p90=ms * (1 + spread),
        num_samples=9,
    )


def sheet(phase: str, name: str = "v100-32g") -> Roofline:
    """The formula for one layer at 4 bits."""
    device = device_library()[name]
    return rooflines(device, SPEC, ["4"], card(device.compute_capability))["4", phase]


def slower_ms(phase: str, batch: int, length: int) -> float:
    """A card whose products are 1.4 times slower than its sheet says; its attention is not."""
    truth = sheet(phase)
    free = truth.without_attention_s(batch, length)
    return 1e3 * float(1.4 * free + (truth.seconds(batch, length) - free))


def rows_of_one_length(phase: Phase, length: int) -> list[ProfileRow]:
    return [row(phase, p, length, slower_ms(phase, p, length), spread=0.01) for p in SIZES[phase]]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_rows_of_one_length_tell_the_rest_with_the_sheets_attention(phase: Phase) -> None:
    found = fit(rows_of_one_length(phase, 512), sheet=sheet(phase))
    for batch, length in ((1, 128), (2, 1024), (8, 4096), (4, 512)):
        exact = slower_ms(phase, batch, length)
        assert 1e3 * float(found.seconds(batch, length)) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_longer_prompts_and_pasts_cost_more_and_are_labelled(phase: Phase) -> None:
    """A profile of one length must say that the length is beyond it, and be no surer than that."""
    found = fit(rows_of_one_length(phase, 512), sheet=sheet(phase))
    times = [float(found.seconds(8, length)) for length in (128, 512, 1024, 4096)]
    assert times == sorted(times) and len(set(times)) == 4
    beyond = found.accuracy(8, 1024)
    of_sheet = error(V100, phase)
    assert of_sheet is not None and beyond.source == BEYOND
    assert sheet(phase).error is None or (beyond.error or 0) >= of_sheet
    measured = found.accuracy(8, 512)
    assert measured.source == "measured" and (measured.error or 0) <= 0.01


def test_where_nothing_tells_how_far_off_a_slope_is_no_error_is_made_up() -> None:
    """Kernels of 4 bits were never measured on a V100: their sheet's error is not known."""
    found = fit(rows_of_one_length("prefill", 512), sheet=sheet("prefill"))
    assert sheet("prefill").error is None
    assert found.accuracy(8, 1024).error is None and found.name == SHEET
    h100 = fit(rows_of_one_length("prefill", 512), sheet=sheet("prefill", "h100-80g"))
    assert (h100.accuracy(8, 1024).error or 0) > 0.05


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_small_profiles_are_reproduced(count: int) -> None:
    """Whatever was measured, with a spread or without, and however far from the sheet."""
    cells = [(1, 512, 3.0), (8, 512, 9.0), (1, 2048, 11.0), (8, 2048, 160.0)][:count]
    for figures in (sheet("prefill"), None):
        found = fit([row("prefill", *cell) for cell in cells], sheet=figures)
        for batch, length, ms in cells:
            assert 1e3 * float(found.seconds(batch, length)) == pytest.approx(ms, rel=1e-6)


def test_a_measured_cell_costs_what_was_measured_to_its_spread() -> None:
    """Kernels jump where no model does; a noisy cell binds no more than it says."""
    grid = [(p, s) for p in (1, 2, 4, 8) for s in (64, 256, 1024)]
    rows = [row("prefill", p, s, slower_ms("prefill", p, s), spread=0.02) for p, s in grid]
    jump = 1.5 * rows[5].time_ms
    rows[5] = row("prefill", *grid[5], jump, spread=0.02)
    found = fit(rows)
    assert 1e3 * float(found.seconds(*grid[5])) >= jump * 0.979
    for cell, measured in zip(grid, rows, strict=True):
        off = 1e3 * float(found.seconds(*cell)) / measured.time_ms - 1
        assert abs(off) < 0.021 + 1e-9


def test_attention_is_never_more_than_what_was_measured() -> None:
    """A card that is faster than its sheet, in whatever it computes."""
    truth = sheet("prefill")
    rows = [row("prefill", p, 4096, 0.5e3 * float(truth.seconds(p, 4096))) for p in (1, 4)]
    found = fit(rows, sheet=truth)
    short = 1e3 * float(found.seconds(1, 512))
    assert 0 < short == pytest.approx(0.5e3 * float(truth.seconds(1, 512)), rel=0.05)


def test_rows_of_one_batch_tell_their_own_attention() -> None:
    """One request at many lengths says nothing of more requests, but all of its attention."""
    truth = sheet("decode")

    def exact(past: int) -> float:
        free = truth.without_attention_s(1, past)
        return 1e3 * float(free + 4 * (truth.seconds(1, past) - free))

    found = fit([row("decode", 1, past, exact(past)) for past in (512, 4096, 16384)], sheet=truth)
    for past in (1500, 9000, 40000):
        assert 1e3 * float(found.seconds(1, past)) == pytest.approx(exact(past), rel=0.03)


def profile_of(device: ProfiledDevice, rows: Sequence[ProfileRow]) -> Profile:
    return Profile(device=device, rows=list(rows))


def times_on(device_type: str, device: ProfiledDevice, **figures: float) -> LayerTimes:
    """From one length of both phases, as `llmpq-plan` has them, memory counted beside."""
    group = {"type": device_type, **figures}
    cluster = Cluster.model_validate({"nodes": [{"name": "n", "devices": [group]}]})
    rows = rows_of_one_length("prefill", 512) + rows_of_one_length("decode", 512)
    counted = SPEC.model_copy(update={"activations": activations_of(SPEC)})
    return device_times(cluster, device_type, counted, [profile_of(device, rows)])


def test_a_plans_times_have_attention_whatever_the_device() -> None:
    """By its own sheet, or in the proportions of one that is alike."""
    v100 = ProfiledDevice(name="V100", type="v100-32g", memory_bytes=1)
    other = ProfiledDevice(name="X", type="shop-24g", memory_bytes=1, bandwidth_gbs=800)
    cpu = ProfiledDevice(name="CPU", type="shop-cpu", memory_bytes=1, num_threads=4)
    for times in (
        times_on("v100-32g", v100),
        times_on("shop-24g", other, memory_gib=24),
        times_on("shop-cpu", cpu, memory_gib=24),
    ):
        short, there, long = (float(times.prefill_s("4", 1, s)) for s in (128, 512, 4096))
        assert short < there < long
        assert 1e3 * there == pytest.approx(slower_ms("prefill", 1, 512), rel=1e-6)
        assert float(times.decode_s("4", 64, 8192)) > 1.05 * float(times.decode_s("4", 64, 512))


def test_an_embedding_and_a_head_without_rows_are_the_spec_sheets() -> None:
    """Of the device itself: of one that is only alike, they are not known and count as 0."""
    v100 = ProfiledDevice(name="V100", type="v100-32g", memory_bytes=1)
    times = times_on("v100-32g", v100)
    ends = rooflines(V100, SPEC, (), card("7.0"))
    assert float(times.head_s(8)) == float(ends["", "head"].seconds(8, 0)) > 1e-4
    assert float(times.embedding_s(2, 512)) == float(ends["", "embedding"].seconds(2, 512))
    assert "no embedding or head rows, taken from the spec sheet" in times.provenance
    other = ProfiledDevice(name="X", type="shop-24g", memory_bytes=1, bandwidth_gbs=800)
    unknown = times_on("shop-24g", other, memory_gib=24)
    assert float(unknown.head_s(8)) == 0 and "counted as 0" in unknown.provenance


def test_devices_that_share_a_stage_share_such_a_head_too() -> None:
    v100 = ProfiledDevice(name="V100", type="v100-32g", memory_bytes=1)
    group = {"type": "v100-32g", "count": 2}
    cluster = Cluster.model_validate({"nodes": [{"name": "n", "devices": [group]}]})
    rows = rows_of_one_length("prefill", 512) + rows_of_one_length("decode", 512)
    two = tensor_parallel_times(cluster, "v100-32g", "n", SPEC, 2, [profile_of(v100, rows)])
    whole = times_on("v100-32g", v100)
    assert 0 < float(two.head_s(8)) < float(whole.head_s(8))
    assert float(two.prefill_s("4", 8, 1024)) < float(whole.prefill_s("4", 8, 1024))
    assert two.assumed_call_s == STAGE_CALL_S


def test_a_stages_call_that_was_not_measured_has_a_default() -> None:
    v100 = ProfiledDevice(name="V100", type="v100-32g", memory_bytes=1)
    times = times_on("v100-32g", v100)
    assert times.assumed_call_s == STAGE_CALL_S
    assert times.stage_decode_s(8, np.array([1, 900])) == pytest.approx(STAGE_CALL_S)
    cluster = Cluster.model_validate({"nodes": [{"name": "n", "devices": [{"type": "v100-32g"}]}]})
    calls: list[Phase] = ["stage_prefill", "stage_decode"]
    rows = rows_of_one_length("prefill", 512) + rows_of_one_length("decode", 512)
    rows += [row(phase, 1, 512, 15.0) for phase in calls]
    measured = device_times(cluster, "v100-32g", SPEC, [profile_of(v100, rows)])
    assert measured.assumed_call_s == 0
    for batch, past in ((1, 512), (8, 4096)):
        assert float(measured.stage_decode_s(batch, past)) == pytest.approx(15e-3)
