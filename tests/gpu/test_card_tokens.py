"""On one NVIDIA card: tokens of one process, of several that share it, with and without graphs."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from _kernels_place import Place, find_place  # noqa: E402
from _kernels_tokens import MIXED, tokens_of, tokens_of_transformers  # noqa: E402

pytestmark = pytest.mark.gpu


def test_one_stage_gives_the_tokens_of_transformers(tmp_path, device) -> None:
    place = Place(device, torch.float32)
    assert tokens_of(tmp_path, place, ["16"] * 8) == tokens_of_transformers(place)


def test_stages_that_share_the_card_give_the_tokens_of_one(tmp_path, device) -> None:
    place = find_place(device.type)
    alone = tokens_of(tmp_path, place, MIXED)
    assert tokens_of(tmp_path, place, MIXED, stages=3) == alone


@pytest.mark.parametrize("precisions", [("16",) * 8, MIXED], ids=["16", "mixed"])
def test_graphs_give_the_tokens_of_single_launches(tmp_path, device, precisions) -> None:
    place = find_place(device.type)
    captured = tokens_of(tmp_path, place, precisions)
    assert tokens_of(tmp_path, place, precisions, "--no-graphs") == captured
