"""A dry run compares the cards of its machine with the plan."""

import pytest
from test_placement import T4, V100, found
from test_seats import make_plan

from llmpq.runtime import cards
from llmpq.runtime.cards_here import devices_of, lines_of, stage_cards


def test_a_line_for_each_stage():
    devices = devices_of(make_plan(("a", "t4-16g"), ("a", "v100-32g"), ("a", "t4-16g")), "x")
    lines = lines_of(tuple(found(V100, T4, T4)), devices, ())
    assert lines[1] == (
        "stage 1 (v100-32g) takes cuda:0 Tesla V100-SXM2-32GB (31.7 GiB, v100-32g) here"
    )
    assert [line.split(" takes ")[1][:6] for line in lines] == ["cuda:1", "cuda:0", "cuda:2"]


def test_only_the_node_of_this_machines_name():
    plan = make_plan(("a", "t4-16g"), ("b", "v100-32g"))
    assert [device.type for device in devices_of(plan, "b.lab")] == ["v100-32g"]
    assert devices_of(plan, "c") == []


def test_what_would_be_refused():
    devices = devices_of(make_plan(("a", "v100-32g")), "x")
    (line,) = lines_of(tuple(found(T4)), devices, tuple(found(T4, V100)))
    assert line.startswith("on this machine a run would be refused: planned: stage 0 v100-32g")
    assert line.endswith("start with CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=1")


@pytest.mark.parametrize("device, expected", [("auto", {0: 1, 1: 0, 2: 2}), ("cpu", {})])
def test_each_stage_is_shown_with_its_own_card(monkeypatch, device, expected):
    """CUDA lists the fastest card first; kernels and sizes are of the one that a stage takes."""
    monkeypatch.setattr(cards, "visible_cards", lambda: tuple(found(V100, T4, T4)))
    plan = make_plan(("a", "t4-16g"), ("a", "v100-32g"), ("a", "t4-16g"))
    taken = stage_cards(plan, device)
    assert {stage: card.index for stage, card in taken.items()} == expected


def test_no_stage_has_a_card_where_a_run_is_refused(monkeypatch):
    monkeypatch.setattr(cards, "visible_cards", lambda: tuple(found(V100)))
    plan = make_plan(("a", "t4-16g"), ("a", "v100-32g"))
    assert stage_cards(plan, "auto") == {}
