"""Latent attention: what the cache holds, and that absorbed products equal expanded ones."""

import pytest
import torch
import transformers

from llmpq.job import LaneShape
from llmpq.models.adapt import adapt
from llmpq.models.attention import attend, make_mask
from llmpq.models.lanes import LaneCache
from llmpq.models.latent import LatentMatrix, attend_to_latents, expanded, keeps_latents
from llmpq.models.stage_memory import MicroBatchShape, run_on_meta
from llmpq.models.stage_model import LayerRange, StageModel

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 97,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "pad_token_id": 0,
}
META = torch.device("meta")


@pytest.fixture(scope="module", params=["deepseek_v2", "deepseek_v3", "minicpm3", "youtu"])
def config(request):
    return transformers.AutoConfig.for_model(request.param, **SIZES)


def attention_of(config):
    """A module of transformers with weights, before and after it is adapted."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    module = model.model.layers[0].self_attn
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, module


def test_absorbed_products_are_those_of_expanded_keys_and_values(config):
    model, module = attention_of(config)
    latent, rotated = torch.randn(3, 1, 7, 24), torch.randn(3, 1, 7, 8)
    query = torch.randn(3, 4, 1, 24)
    mask = make_mask(3, 1, 7, torch.tensor([6, 0, 3]), mask_function=lambda b, h, q, k: k <= q)
    keys, values = module.expand_kv(latent, rotated)
    wanted, _ = attend(module, query, keys, values, mask, 0.2)
    adapt(model)
    ours, _ = attend(module, query, latent, rotated, mask, 0.2)
    assert ours.shape == wanted.shape == (3, 1, 4, 12)
    assert torch.allclose(ours, wanted, atol=1e-5)
    assert torch.equal(
        ours.transpose(1, 2), attend_to_latents(module, query, latent, rotated, mask, 0.2)
    )
    assert all(map(torch.equal, expanded(module, latent, rotated), (keys, values)))


def test_a_prefill_expands(config):
    model, module = attention_of(config)
    latent, rotated, query = (
        torch.randn(2, 1, 5, 24),
        torch.randn(2, 1, 5, 8),
        torch.randn(2, 4, 5, 24),
    )
    wanted, _ = attend(module, query, *module.expand_kv(latent, rotated), None, 0.2)
    adapt(model)
    assert torch.equal(attend(module, query, latent, rotated, None, 0.2)[0], wanted)


def test_the_cache_holds_a_latent_and_one_key_of_each_token(config):
    stage = StageModel(config, LayerRange(0, 2, 2), ["16", "16"], torch.bfloat16, META)
    cache = LaneCache(2, [LaneShape(3, 10)])
    with torch.inference_mode():
        run_on_meta(stage, cache, MicroBatchShape(2, 6, 6))
        run_on_meta(stage, cache, MicroBatchShape(2, 1, 7))
    assert cache.num_bytes == 2 * 30 * (24 + 8) * 2


def test_the_matrix_that_expands_keeps_16_bits(config):
    stage = StageModel(config, LayerRange(0, 2, 2), ["4", "8"], torch.bfloat16, META)
    attention = stage.own_layers[0].self_attn
    assert keeps_latents(attention) and isinstance(attention.kv_b_proj, LatentMatrix)
    assert not any("kv_b_proj" in name for name in stage.linears())
    wanted = {raw.name: raw.shape for raw in stage.parameters_to_load()}
    assert wanted["model.layers.1.self_attn.kv_b_proj.weight"] == (4 * 28, 24)
