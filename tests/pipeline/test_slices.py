"""A stage is the model's own slice, whatever of a layer depends on where it stands."""

import json
from pathlib import Path

import pytest
import torch
from families import GROUPED, TinyModel, generate_locally, hand_made_plan, own_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from llmpq.errors import UserError
from llmpq.evaluation.verify import small_copy, verify
from llmpq.models.count_model import count_model
from llmpq.models.rope import switches_at
from llmpq.models.stage_model import LayerRange, StageModel, load_config
from llmpq.prompts.prompt_rules import Limits
from llmpq.prompts.request import Request

SIZES = GROUPED | {"num_hidden_layers": 5}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 5.0, 9.0],
}
OPT_350M = {
    "ffn_dim": 64,
    "word_embed_proj_dim": 16,
    "do_layer_norm_before": False,
}
CASES = {
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 0]},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]}
    | {"sliding_window": 6},
    "opt": OPT_350M,
    "phi": {},
    "phi3": {"original_max_position_embeddings": 16, "rope_parameters": LONG},
}
FIVE = {"nodes": [{"name": "node0", "devices": [{"type": "t4-16g", "count": 5}]}]}
# Of unequal length; with the new tokens, none grows past 16.
LENGTHS, NEW = (10, 3, 30, 7, 1, 17, 12, 5), 4


def make(model_type: str, folder: Path) -> TinyModel:
    """A tiny model with random weights, and what transformers gives for each prompt alone."""
    config = AutoConfig.for_model(model_type, **SIZES | CASES[model_type])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    drawn = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 97, (n,), generator=drawn).tolist() for n in LENGTHS]
    requests = [Request(i, i, tuple(prompt), NEW) for i, prompt in enumerate(prompts)]
    expected = {r.id: own_tokens(model, r, frozenset()) for r in requests}
    return TinyModel(folder, requests, frozenset(), expected)


@pytest.mark.parametrize("model_type", CASES)
def test_tokens_are_those_of_transformers_however_it_is_cut(
    model_type: str, tmp_path: Path
) -> None:
    tiny = make(model_type, tmp_path)
    spec = count_model(tmp_path / "config.json")
    for ends in ([5], [2, 5], [1, 2, 3, 4, 5]):
        plan = hand_made_plan(spec, ends, prompt=30, new=NEW, cluster=FIVE)
        for chunk in (None, 4):
            found = generate_locally(plan, tiny.folder, tiny.requests, chunk=chunk)
            assert found == tiny.expected, (ends, chunk)


def test_a_text_that_grows_past_where_positions_change_is_refused() -> None:
    config = AutoConfig.for_model("phi3", **SIZES | CASES["phi3"])
    assert switches_at(config) == 16
    limits = Limits(new_tokens=4, max_positions=128, vocab_size=97, switches_at=16)
    assert limits.crossing(13, 4) is None and limits.crossing(17, 40) is None
    assert "grow past 16" in (limits.crossing(13, 5) or "")
    plain = AutoConfig.for_model("llama", **SIZES)
    assert switches_at(plain) is None and Limits(4, 128, 97).crossing(13, 50) is None


def test_stages_know_their_layers_by_the_models_own_indices() -> None:
    config = AutoConfig.for_model("smollm3", **SIZES | CASES["smollm3"])
    stage = StageModel(
        config, LayerRange(2, 4, 5), ["16", "16"], torch.float32, torch.device("cpu")
    )
    own = [layer.self_attn for layer in stage.own_layers]
    assert [(each.layer_idx, each.use_rope) for each in own] == [(2, 0), (3, 1)]
    names = {raw.name for raw in stage.parameters_to_load()}
    assert names and all(name.split(".")[2] in "23" for name in names)


def test_a_small_copy_keeps_the_kinds_of_layers() -> None:
    config = AutoConfig.for_model(
        "smollm3", **SIZES | {"num_hidden_layers": 36, "no_rope_layer_interval": 4}
    )
    copy = small_copy(config)
    assert copy.num_hidden_layers == 5 and list(copy.no_rope_layers) == [1, 1, 1, 0, 1]
    assert copy.num_attention_heads == 2 * copy.num_key_value_heads
    verify(config)


def test_positions_that_change_by_length_are_tried_on_both_sides() -> None:
    verify(AutoConfig.for_model("phi3", **SIZES | CASES["phi3"]))


def test_a_pipeline_that_gives_other_logits_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model("smollm3", **SIZES | CASES["smollm3"])
    run = StageModel.run

    def wrong(self, hidden, *args, **more):  # type: ignore[no-untyped-def]
        return run(self, hidden * 1.02, *args, **more)

    monkeypatch.setattr(StageModel, "run", wrong)
    with pytest.raises(UserError, match="differ from those of transformers"):
        verify(config)


def test_infinity_in_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", **SIZES, "limit": {"__float__": "-Infinity"}})
    )
    assert load_config(tmp_path).limit == -float("inf")
