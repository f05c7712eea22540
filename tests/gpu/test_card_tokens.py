"""On one NVIDIA card: tokens of one process, of several that share it, with and without graphs."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from _kernels_place import Place, find_place  # noqa: E402
from _kernels_serving import TINY  # noqa: E402
from _kernels_tokens import MIXED, NEW_TOKENS, REQUESTS, has_graphs, tokens_of  # noqa: E402

pytestmark = pytest.mark.gpu


def test_one_stage_gives_the_tokens_of_transformers(tmp_path, device) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY.model, dtype=torch.float32).to(device).eval()
    expected = {}
    for request in REQUESTS:
        ids = torch.tensor([request.prompt], device=device)
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        expected[request.id] = tokens[0, len(request.prompt) :].tolist()
    assert tokens_of(tmp_path, Place(device, torch.float32), ["16"] * 8) == expected


def test_stages_that_share_the_card_give_the_tokens_of_one(tmp_path, device) -> None:
    place = find_place(device.type)
    alone = tokens_of(tmp_path, place, MIXED)
    assert tokens_of(tmp_path, place, MIXED, stages=3) == alone


@pytest.mark.parametrize("precisions", [("16",) * 8, MIXED], ids=["16", "mixed"])
def test_graphs_give_the_tokens_of_single_launches(tmp_path, device, precisions) -> None:
    if not has_graphs():
        pytest.skip("this llmpq-run captures no graphs")
    place = find_place(device.type)
    captured = tokens_of(tmp_path, place, precisions)
    assert tokens_of(tmp_path, place, precisions, "--no-graphs") == captured
