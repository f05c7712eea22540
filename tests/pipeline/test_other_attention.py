"""Attention that few families have, on small models: sinks, chunks, scaled queries, latents."""

import pytest
import torch
from families import GROUPED, build_from, saved
from transformers import AutoConfig

from llmpq.errors import UserError
from llmpq.evaluation.verify import verify
from llmpq.models import attention

SINKS = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
LLAMA4 = {
    "head_dim": 8,
    "num_local_experts": 1,
    "moe_layers": [],
    "intermediate_size_mlp": 64,
    "attention_chunk_size": 8,
    "floor_scale": 4,
    "no_rope_layers": [1, 0, 1, 0],
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "first_k_dense_replace": 100,
}
MODELS = {
    "gpt_oss": SINKS,
    "llama4_text": LLAMA4,
    "minicpm3": LATENT,
    "youtu": LATENT,
    "glm4_moe_lite": LATENT | {"mlp_layer_types": ["dense"] * 4},
}


@pytest.mark.parametrize("model_type", MODELS)
def test_logits_are_those_of_transformers(model_type):
    verify(AutoConfig.for_model(model_type, **GROUPED | MODELS[model_type]))


@pytest.mark.parametrize(
    "ignored, model_type", [("s_aux", "gpt_oss"), ("query_scales", "llama4_text")]
)
def test_what_is_left_out_is_found(ignored, model_type, monkeypatch):
    attend = attention.attend

    def without(*args, **kwargs):
        return attend(*args, **kwargs | {ignored: None})

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.DISPATCHED, without)
    with pytest.raises(UserError, match="differ from those of transformers"):
        verify(AutoConfig.for_model(model_type, **GROUPED | MODELS[model_type]))


@pytest.fixture(scope="module")
def llama4(tmp_path_factory):
    """Llama 4 without experts."""
    model = build_from(AutoConfig.for_model("llama4_text", **GROUPED | LLAMA4))
    return saved(model, tmp_path_factory.mktemp("llama4"))


@pytest.mark.parametrize("how", [{}, {"refill": False}, {"chunk": 16}, {"chunk": 5}], ids=str)
@pytest.mark.parametrize("ends", [[4], [1, 4], [1, 2, 3, 4]], ids=str)
def test_llama4_generates_what_transformers_does(llama4, ends, how):
    assert llama4.generate(ends, batch=6, p=3, q=2, how=how) == llama4.expected


def test_llama4_in_bf16_gives_the_same_tokens_in_any_number_of_stages(llama4):
    how = {"refill": False}
    one, two = (llama4.generate(ends, dtype=torch.bfloat16, how=how) for ends in ([4], [2, 4]))
    assert one == two
