"""The pure parts of scripts/bench/engine.py: lengths, pieces of texts, plans, figures."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch")

from llmpq.model_spec import ASSETS
from llmpq.prompts.request import Request

TINY = ASSETS / "tiny-tales"


@pytest.fixture
def bench(monkeypatch):
    """name -> a module of scripts/bench."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name == "engine" or name.startswith(("_engine", "_common")):
            del sys.modules[name]


@pytest.fixture
def common(bench) -> ModuleType:
    return bench("_engine_common")


def requests(*lengths: tuple[int, int]) -> list[Request]:
    return [Request(i, i, tuple(range(3, 3 + p)), n) for i, (p, n) in enumerate(lengths)]


def test_lengths_that_fit_stay_as_they_are(common):
    assert common.scaled([(3, 5), (90, 10)], 100) == [(3, 5), (90, 10)]


def test_longer_ones_shrink_by_one_factor_and_keep_their_pairs(common):
    lengths = [(150, 50), (10, 40), (1, 1)]
    assert common.scaled(lengths, 100) == [(75, 25), (5, 20), (1, 1)]
    assert all(sum(pair) <= 100 for pair in common.scaled(lengths, 100))


def test_draws_and_cuts_are_the_same_for_the_same_seed(common):
    lengths = [(i, i + 1) for i in range(50)]
    assert common.draw(lengths, 9) == common.draw(lengths, 9) != common.draw(lengths, 9, seed=1)
    text = list(range(1000))
    pieces = common.cut(text, [1, 7, 30])
    assert [len(piece) for piece in pieces] == [1, 7, 30]
    assert all(list(piece) == text[piece[0] : piece[0] + len(piece)] for piece in pieces)
    assert pieces == common.cut(text, [1, 7, 30])


def test_trace_files_are_read_in_pairs(common, tmp_path):
    import gzip

    path = tmp_path / "trace.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write("input_tokens,output_tokens\n29,202\n14,58\n")
    assert common.read_lengths(path) == [(29, 202), (14, 58)]


def test_plans_by_hand_cover_the_model_and_reserve_what_is_asked(common):
    wanted = requests((5, 9), (3, 30))
    sizes = common.Sizes(stages=3, batch=2, prefill=1, decode=2)
    plan = common.hand_plan(TINY, wanted, sizes, memory_mib=[10, 20, 30])
    assert [stage.end_layer for stage in plan.stages] == [2, 5, 8]
    assert list(plan.workload.prompt_tokens) == [5, 3]
    assert list(plan.workload.new_tokens) == [9, 30]
    assert [device.memory_bytes >> 20 for device in plan.cluster.devices()] == [10, 20, 30]


def test_plans_by_hand_may_mix_precisions(common):
    sizes = common.Sizes(stages=2, batch=2, prefill=1, decode=2)
    mixed = ["16", "8", "4", "3"] * 2
    assert common.hand_plan(TINY, requests((5, 9)) * 2, sizes, mixed).precisions == mixed


def test_prompts_files_hold_ids_tokens_and_limits(common, tmp_path):
    path = common.write_prompts(tmp_path / "p.jsonl", requests((2, 7)))
    assert json.loads(path.read_text()) == {
        "id": 0,
        "prompt_token_ids": [3, 4],
        "max_new_tokens": 7,
    }


def test_a_commands_last_words_are_its_last_paragraph(common):
    assert common.last_words("one\n\nerror: two\n  lines\n") == "error: two lines"
    with pytest.raises(common.CommandError, match="no such file"):
        common.llmpq("run", "--plan", "absent.json", "--prompts", "p", "--output", "o")


@pytest.mark.parametrize(
    "a, b, place", [([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([4, 2], [5, 2], 0)]
)
def test_first_difference(bench, a, b, place):
    assert bench("_engine_tokens").first_difference(a, b) == place


def test_static_batches_hold_every_request_once_and_pad_left(bench):
    static = bench("_engine_static")
    wanted = requests((1, 9), (4, 2), (2, 5))
    for order in static.ORDERS.values():
        batches = static.static_batches(wanted, order, 2)
        assert [len(batch) for batch in batches] == [2, 1]
        assert {r.number for batch in batches for r in batch} == {0, 1, 2}
    ids, mask = static.padded(wanted[1:])
    assert ids.tolist() == [[3, 4, 5, 6], [0, 0, 3, 4]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_growth_leaves_the_first_tenth_out(bench):
    growth = bench("_engine_memory").growth_percent
    assert growth([1.0] * 10 + [100.0] * 90) == 0
    assert growth([100.0] * 90 + [102.0] * 10) == pytest.approx(2)


def test_busy_checks_come_from_medians(bench):
    speed = bench("_engine_speed")

    def report(tokens_per_s: float, share: float) -> dict[str, object]:
        stages = [{"busy_share": share}, {"busy_share": 0.1}]
        return {
            "tokens_per_s": tokens_per_s,
            "stages": stages,
            "predicted": {"tokens_per_s": 100.0},
        }

    pairs = [(True, report(90, 0.8)), (True, report(99, 0.95)), (True, report(150, 0.99))]
    found = speed.checks([*pairs, (False, report(60, 0.5))])
    assert [check.value for check in found] == pytest.approx([95, 1.65, 0.99])
    assert [check.holds for check in found] == [True, True, True]
    slow = speed.checks([(True, report(80, 0.5)), (False, report(60, 0.5))])
    assert [check.holds for check in slow] == [False, False, False]


@pytest.mark.parametrize("text", ["", "9", "1,x", "0", "1,,2", "1,1"])
def test_wrong_parts_are_refused(bench, text):
    with pytest.raises(argparse.ArgumentTypeError):
        bench("engine").numbers(text)


def test_without_data_checks_are_null_with_a_reason(bench, tmp_path):
    engine, common = bench("engine"), bench("_engine_common")
    benchmark = bench("_common").Benchmark("engine", {})
    settings = common.Settings(True, tmp_path, 1.0, data=None)
    for number in (1, 2, 3, 6, 8):
        assert engine.run_part(number, settings, benchmark, late=False)
    assert [check.holds for check in benchmark.checks] == [None] * 8
    assert all(check.why == engine.NO_DATA for check in benchmark.checks)


def test_a_part_that_crashes_is_told(bench, tmp_path, monkeypatch):
    engine, common, static = (bench(n) for n in ("engine", "_engine_common", "_engine_static"))

    def broken(_: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(static, "PART", common.Part(static.PART.targets, broken))
    benchmark = bench("_common").Benchmark("engine", {})
    settings = common.Settings(True, Path(tmp_path), 1.0, data=None)
    assert not engine.run_part(3, settings, benchmark, late=False)
    assert "no luck" in benchmark.checks[0].why
