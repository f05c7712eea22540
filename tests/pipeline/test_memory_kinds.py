"""What stages of layers with experts, or of several kinds, hold is what the memory model says."""

import random
from types import SimpleNamespace

import pytest
import torch
from families import CPU, hand_made_plan
from test_memory import accounts, predictions
from transformers import AutoConfig, AutoModelForCausalLM

from llmpq.models.count_model import count_model
from llmpq.plan_data import Plan
from llmpq.precision import with_fewer_for_experts
from llmpq.quant import available_precisions

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
SLIDING, FULL = "sliding_attention", "full_attention"
MODELS = {
    "mixtral": {"num_local_experts": 4, "sliding_window": 8},
    "qwen3_moe": {"num_experts": 8, "mlp_only_layers": [1], "head_dim": 16},
    "glm4_moe": {"n_routed_experts": 8, "first_k_dense_replace": 2, "head_dim": 16},
    "deepseek_v3": LATENT
    | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 2},
    "gemma3_text": {"sliding_window": 16, "layer_types": [SLIDING, SLIDING, FULL, SLIDING]},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16, "sliding_window": 16},
}
NUM_PLANS = 10
WEIGHTS_AND_CACHE, TOTAL = 0.01, 0.05


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """A checkpoint with random weights, and its spec."""
    folder = tmp_path_factory.mktemp(request.param)
    config = AutoConfig.for_model(request.param, **SIZES | MODELS[request.param])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return SimpleNamespace(folder=folder, spec=count_model(folder / "config.json"))


def random_plans(spec, seed):
    draw = random.Random(seed)
    offered = [p for p in ("16", "8", "4", "3") if p in available_precisions(CPU, torch.bfloat16)]
    has_experts = any(kind.experts for kind in spec.kind_specs)
    names = with_fewer_for_experts(offered) if has_experts else offered
    for _ in range(NUM_PLANS):
        inner = sorted(draw.sample(range(1, spec.num_layers), draw.randint(0, 3)))
        precisions = [draw.choice(names) for _ in range(spec.num_layers)]
        batch = draw.choice([4, 8, 12])
        sizes = {"batch": batch, "p": draw.randint(1, 4), "q": draw.choice([2, 4])}
        lengths = {"prompt": draw.choice([10, 24, 60]), "new": draw.choice([4, 12, 30])}
        yield hand_made_plan(spec, [*inner, spec.num_layers], precisions, **sizes, **lengths)


def check(model, plan):
    """Never more than predicted, and hardly less."""
    for held, predicted in accounts(model, plan):
        assert abs(held.weights / predicted.weights - 1) <= WEIGHTS_AND_CACHE
        assert 1 - WEIGHTS_AND_CACHE <= held.cache / predicted.cache <= 1
        total = held.weights + held.cache + held.activations
        expected = predicted.total - predicted.buffers  # messages are tested in a run
        assert 1 - TOTAL <= total / expected <= 1, (plan.stages, held, predicted)


def test_memory_of_random_plans(model):
    for plan in random_plans(model.spec, seed=1):
        check(model, plan)


def test_memory_of_chunks_and_lanes_of_unequal_lengths(model):
    if not any(model.spec.windows):
        pytest.skip("no layer of this model has a window")
    lanes = [{"rows": 4, "tokens": 40}, {"rows": 2, "tokens": 120}, {"rows": 2, "tokens": 12}]
    for ends in ([4], [1, 3, 4]):
        plan = hand_made_plan(model.spec, ends, "16", batch=8, p=2, q=4, prompt=100, new=20)
        check(model, Plan.model_validate(plan.model_dump() | {"chunk_tokens": 24, "lanes": lanes}))


def test_memory_of_chunks_that_expand_latents(model):
    """Chunks of a prompt that is much longer: they expand the latents of all tokens before them."""
    if model.spec.kv_values is None:
        pytest.skip("this model keeps keys and values")
    for chunk, prompt in ((24, 60), (24, 200), (60, 200)):
        plan = hand_made_plan(model.spec, [1, 4], "16", batch=4, p=1, q=2, prompt=prompt, new=20)
        cut = Plan.model_validate(plan.model_dump() | {"chunk_tokens": chunk})
        check(model, cut)
        for held, predicted in accounts(model, cut):
            assert 0.85 <= held.activations / predicted.activations <= 1


def test_windows_bound_what_a_stage_keeps(model):
    """Of texts of 250 tokens: a window of 16 keeps 17."""
    if not any(model.spec.windows):
        pytest.skip("no layer of this model has a window")
    plan = hand_made_plan(model.spec, [4], "16", batch=4, p=1, q=2, prompt=240, new=10)
    (predicted,) = predictions(plan)
    spec, whole = model.spec, model.spec.without_windows()
    token = [spec.kind_specs[kind].kv_values_per_token for kind in spec.kind_of_layers]
    kept = [250 if window is None else window + 1 for window in spec.windows]
    assert predicted.cache == 2 * 4 * sum(v * n for v, n in zip(token, kept, strict=True))
    (full,) = predictions(plan.model_copy(update={"model": whole}))
    assert full.cache == 2 * 4 * 250 * sum(token)
    check(model, plan)
