"""Cards for planned devices: right types, refusals that name both sides, lines that fix them."""

import pytest

from llmpq.placement import (
    GIB,
    FoundCard,
    PlannedDevice,
    Refusal,
    match_cards,
    matching,
    visible_line,
)

T4 = ("Tesla T4", 14.7, "7.5")
V100 = ("Tesla V100-SXM2-32GB", 31.7, "7.0")
V100_16 = ("Tesla V100-SXM2-16GB", 15.8, "7.0")
A100 = ("NVIDIA A100-SXM4-80GB", 79.2, "8.0")
A100_PCIE = ("NVIDIA A100 80GB PCIe", 79.3, "8.0")
H100 = ("NVIDIA H100 80GB HBM3", 79.1, "9.0")
MIG = ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 39.5, "8.0")
RTX5090 = ("NVIDIA GeForce RTX 5090", 31.8, "12.0")
RTX5070TI = ("NVIDIA GeForce RTX 5070 Ti", 15.9, "12.0")
NEW = ("NVIDIA Q9", 24.0, "13.0")


def found(*kinds: tuple[str, float, str]) -> list[FoundCard]:
    return [
        FoundCard(index, name, int(gib * GIB), capability, f"GPU-{index}")
        for index, (name, gib, capability) in enumerate(kinds)
    ]


def planned(*types: str, **more: object) -> list[PlannedDevice]:
    sizes = {"t4-16g": (16, "7.5"), "v100-32g": (32, "7.0"), "v100-16g": (16, "7.0")}
    sizes |= {"a100-80g": (80, "8.0"), "a100-pcie-80g": (80, "8.0"), "a100-40g": (40, "8.0")}
    sizes |= {"rtx5090-32g": (32, "12.0"), "rtx5070ti-16g": (14, "12.0"), "h100-80g": (80, "9.0")}
    return [
        PlannedDevice(stage, name, *sizes[name], **more)  # type: ignore[arg-type]
        for stage, name in enumerate(types)
    ]


def own(name: str, gib: float, capability: str = "") -> PlannedDevice:
    """A device of a type that the library does not have."""
    return PlannedDevice(0, name, gib, capability, is_known=False)


def indices(cards: list[FoundCard], devices: list[PlannedDevice]) -> list[int | None]:
    matched = match_cards(cards, devices)
    assert not isinstance(matched, Refusal), matched.reason
    return [None if card is None else card.index for card in matched]


def reason(cards: list[FoundCard], devices: list[PlannedDevice]) -> str:
    matched = match_cards(cards, devices)
    assert isinstance(matched, Refusal)
    return matched.reason


@pytest.mark.parametrize(
    "cards, types, expected",
    [
        ((V100, T4, T4, T4), ("t4-16g", "t4-16g", "v100-32g", "t4-16g"), [1, 2, 0, 3]),
        ((RTX5090, RTX5070TI), ("rtx5070ti-16g", "rtx5090-32g"), [1, 0]),
        ((T4, T4), ("t4-16g", "t4-16g"), [0, 1]),
        ((T4, T4, V100), ("v100-32g",), [2]),  # more cards than planned
        ((V100, V100_16), ("v100-16g", "v100-32g"), [1, 0]),
        ((V100, V100_16), ("v100-16g",), [1]),  # its own type before a larger one
        ((A100_PCIE, A100), ("a100-80g", "a100-pcie-80g"), [1, 0]),
    ],
)
def test_each_device_gets_a_card_of_its_type(cards, types, expected):
    assert indices(found(*cards), planned(*types)) == expected


@pytest.mark.parametrize("card, planned_type", [(A100_PCIE, "a100-80g"), (A100, "a100-pcie-80g")])
def test_the_other_model_of_a_number_will_do(card, planned_type):
    assert indices(found(T4, card), planned(planned_type)) == [1]


def test_a_larger_card_of_the_same_kind_will_do_and_a_smaller_one_will_not():
    assert indices(found(V100), planned("v100-16g")) == [0]
    assert "no card is left for stage 0 (v100-32g)" in reason(found(V100_16), planned("v100-32g"))


@pytest.mark.parametrize(
    "cards, types, missing",
    [
        ((T4, T4, T4, T4), ("t4-16g", "t4-16g", "t4-16g", "v100-32g"), "stage 3 (v100-32g)"),
        ((T4,), ("t4-16g", "t4-16g"), "stage 1 (t4-16g)"),  # fewer cards than planned
        ((H100,), ("t4-16g",), "stage 0 (t4-16g)"),  # larger, but not what was planned
        ((), ("t4-16g",), "stage 0 (t4-16g)"),
        ((NEW,), ("v100-16g",), "stage 0 (v100-16g)"),  # unknown, of another capability
    ],
)
def test_a_refusal_names_both_sides_and_who_goes_without(cards, types, missing):
    text = reason(found(*cards), planned(*types))
    assert text.endswith(f"no card is left for {missing}")
    for number, name in enumerate(types):
        assert f"stage {number} {name} (" in text
    for index, (name, gib, _) in enumerate(cards):
        assert f"cuda:{index} {name} ({gib:.1f} GiB" in text
    assert cards or "found: no card" in text


def test_a_slice_of_a_card_is_no_whole_card():
    assert "MIG slice" in reason(found(MIG), planned("a100-40g"))
    assert indices(found(MIG), [own("a100-half", 39.5, "8.0")]) == [0]
    assert indices(found(MIG, A100), planned("a100-80g")) == [1]


def test_types_of_the_users_own():
    p40 = ("Tesla P40", 23.9, "6.1")
    assert indices(found(T4, p40), [own("p40-24g", 24)]) == [1]  # by its words
    assert indices(found(T4, NEW), [own("shop-card", 24)]) == [1]  # the one nobody knows
    assert indices(found(T4), [own("t-four", 14.7, "7.5")]) == [0]  # profiled under a name
    assert "shop-card" in reason(found(T4), [own("shop-card", 14.7)])
    assert "shop-card" in reason(found(T4), [own("shop-card", 14.7, "8.9")])


def test_a_card_of_no_known_type_stands_for_a_type_of_its_capability():
    unknown = ("NVIDIA H100 NVL", 93.6, "9.0")
    assert indices(found(unknown), planned("h100-80g")) == [0]
    assert indices(found(unknown, H100), planned("h100-80g")) == [1]


def test_cpus_need_no_card():
    devices = [*planned("t4-16g"), *planned("v100-32g", is_card=False)]
    assert indices(found(T4), devices) == [0, None]


def test_pairs_are_changed_where_that_seats_more():
    ranks = {("a", 0): 0, ("a", 1): 1, ("b", 0): 1}
    assert matching("ab", [0, 1], lambda *pair: ranks.get(pair)) == {"a": 1, "b": 0}
    assert matching("ab", [0], lambda *pair: ranks.get(pair)) == {"a": 0}


def test_the_line_shows_the_cards_that_are_needed():
    everywhere = found(T4, V100, T4)
    devices = planned("v100-32g", "t4-16g")
    line = "CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=1,0"
    assert visible_line(everywhere, devices) == line
    assert visible_line(found(T4), devices) is None
