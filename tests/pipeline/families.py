"""Tiny models of every family with random weights, and plans made by hand.

`TinyModel.expected` is what transformers itself generates, each prompt alone, greedily.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from llmpq.families import SHARED, has_sizes
from llmpq.model_lookup import load_model_spec
from llmpq.model_spec import ASSETS, ModelSpec
from llmpq.models.count_model import count_model
from llmpq.plan_data import Plan
from llmpq.prompts.request import Request
from llmpq.prompts.tokenizer import load_tokenizer
from llmpq.runtime.local import LocalStages

TINY_TALES = ASSETS / "tiny-tales"
NUM_REQUESTS, MAX_PROMPT, MAX_NEW = 16, 24, 12
CPU = torch.device("cpu")

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = _SIZES | {"num_key_value_heads": 2}
_LATENT = GROUPED | {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "first_k_dense_replace": 100,  # no layer has experts
    "n_routed_experts": 1,
}
_BLOOM = {"vocab_size": 97, "hidden_size": 32, "n_layer": 4, "n_head": 4, "pad_token_id": 0}

_ROUTED = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
_EXPERTS = GROUPED | {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
_GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}
_FALCON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_MPT = {"vocab_size": 97, "d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 128}

# Family -> (prefix of transformers' classes, configuration)
FAMILIES = {
    "opt": ("OPT", _SIZES | {"ffn_dim": 64}),
    "opt-projected": ("OPT", _SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 16}),
    "bloom": ("Bloom", _BLOOM),
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 8}),
    "qwen2": ("Qwen2", GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 16}),
    "gpt_neox": ("GPTNeoX", _SIZES),
    "gemma2": ("Gemma2", GROUPED | {"head_dim": 8, "sliding_window": 8}),
    "granite": ("Granite", GROUPED | {"embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "gemma3": ("Gemma3", GROUPED | {"head_dim": 8, "sliding_window": 8}),
    "gpt2": ("GPT2", _GPT2),
    "falcon": ("Falcon", _FALCON),
    "falcon-new": ("Falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": (
        "Falcon",
        _FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "mpt": ("Mpt", _MPT),
    "phi": ("Phi", _SIZES | {"qk_layernorm": True}),
    "smollm3": ("SmolLM3", GROUPED | {"no_rope_layer_interval": 2}),
    "deepseek_v2": ("DeepseekV2", _LATENT),
    "deepseek_v3": ("DeepseekV3", _LATENT),
    "deepseek_v3-q_proj": ("DeepseekV3", _LATENT | {"q_lora_rank": None}),
    "deepseek_v2-experts": (
        "DeepseekV2",
        _LATENT | _ROUTED | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5},
    ),
    "deepseek_v3-experts": (
        "DeepseekV3",
        _LATENT | _ROUTED | {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5},
    ),
    "mixtral": ("Mixtral", _EXPERTS | {"num_local_experts": 4, "sliding_window": 8}),
    "qwen2_moe": (
        "Qwen2Moe",
        _EXPERTS
        | {"num_experts": 6, "shared_expert_intermediate_size": 32, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": ("Qwen3Moe", _EXPERTS | {"num_experts": 8, "head_dim": 16}),
    "olmoe": ("Olmoe", _EXPERTS | {"num_experts": 5, "norm_topk_prob": True}),
    "glm4_moe": (
        "Glm4Moe",
        _EXPERTS
        | {
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "head_dim": 16,
            "use_qk_norm": True,
            "routed_scaling_factor": 1.5,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        _EXPERTS | {"moe_num_experts": 6, "moe_k": 3, "moe_num_shared_experts": 1},
    ),
    "granitemoe": (
        "GraniteMoe",
        _EXPERTS | {"num_local_experts": 4, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    ),
    "granitemoeshared": (
        "GraniteMoeShared",
        _EXPERTS | {"num_local_experts": 4, "shared_intermediate_size": 32},
    ),
    "llama4": (
        "Llama4",
        _EXPERTS
        | {
            "num_local_experts": 4,
            "head_dim": 16,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
            "no_rope_layers": [1, 1, 0, 1],
            "floor_scale": 8,
        },
    ),
    "gpt_oss": ("GptOss", _EXPERTS | {"num_local_experts": 4, "head_dim": 16, "sliding_window": 8}),
}
# Those with experts can have a precision for these alone.
WITH_EXPERTS = [name for name, (_, sizes) in FAMILIES.items() if "moe_intermediate_size" in sizes]


@cache
def spec_of(folder: Path) -> ModelSpec:
    """As `load_model_spec` finds it, without a process of its own for families without sizes."""
    path = folder / "config.json"
    counted = has_sizes(json.loads(path.read_text())["model_type"])
    return load_model_spec(str(folder)) if counted else count_model(path)


@dataclass
class TinyModel:
    """A checkpoint on disk, requests for it, and transformers' own answers."""

    folder: Path
    requests: list[Request]
    eos_ids: frozenset[int]
    expected: dict[int, list[int]] = field(default_factory=dict)

    @property
    def spec(self) -> ModelSpec:
        return spec_of(self.folder)

    @property
    def num_layers(self) -> int:
        return self.spec.num_layers

    def plan(self, ends, precisions="16", batch=8, p=3, q=5, **more) -> Plan:
        """A plan whose stages end at the layers `ends`."""
        return hand_made_plan(self.spec, ends, precisions, batch, p, q, **more)

    def generate(
        self, ends, precisions="16", dtype=torch.float32, sampling=None, how=None, **sizes
    ):
        """Tokens by id from the pipeline with all stages in this process."""
        plan = self.plan(ends, precisions, **sizes)
        more = (how or {}) | ({"sampling": sampling} if sampling else {})
        return generate_locally(
            plan, self.folder, self.requests, dtype, eos_ids=self.eos_ids, **more
        )


def generate_locally(plan, folder, requests, dtype=torch.float32, eos_ids=frozenset(), **how):
    """The new tokens of every request, by its id, from stages in this process."""
    finished = LocalStages(plan, folder, dtype, eos_ids).generate(requests, **how)
    return {one.request.id: list(one.token_ids) for one in finished}


def hand_made_plan(
    spec, ends, precisions="16", batch=8, p=3, q=5, prompt=MAX_PROMPT, new=MAX_NEW, cluster=None
) -> Plan:
    """A plan for t4s. `precisions`: one for all layers, or a list with one a layer."""
    if isinstance(precisions, str):
        precisions = [precisions] * spec.num_layers
    starts = [0, *ends[:-1]]
    stages = [
        {
            "rank": rank,
            "node": "node0",
            "devices": ["t4-16g"],
            "first_layer": first,
            "end_layer": end,
            "precisions": precisions[first:end],
        }
        for rank, (first, end) in enumerate(zip(starts, ends, strict=True))
    ]
    nodes = [{"name": "node0", "devices": [{"type": "t4-16g", "count": 4}]}]
    return Plan.model_validate(
        {
            "model": spec.model_dump(),
            "workload": {"prompt_tokens": prompt, "new_tokens": new, "num_requests": 16},
            "cluster": {"nodes": nodes} | (cluster or {}),
            "method": "hand",
            "batch": batch,
            "prefill_micro_batch": p,
            "decode_micro_batch": q,
            "stages": stages,
        }
    )


def config_of(family: str) -> transformers.PretrainedConfig:
    """transformers' configuration of a family."""
    prefix, sizes = FAMILIES[family]
    text = "Text" if prefix in ("Gemma3", "Llama4") else ""
    return getattr(transformers, f"{prefix}{text}Config")(**sizes)


SHAREABLE = [family for family in FAMILIES if config_of(family).model_type in SHARED]


def build(family: str) -> torch.nn.Module:
    """transformers' model of a family with random weights, spread enough to tell tokens apart."""
    return build_from(config_of(family))


def build_from(config: transformers.PretrainedConfig) -> torch.nn.Module:
    """The same of any configuration."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


def save(family: str, folder: Path) -> TinyModel:
    """Writes the family's checkpoint and asks transformers for the expected tokens."""
    return saved(build(family), folder)


def saved(model: torch.nn.Module, folder: Path) -> TinyModel:
    """Writes a model's checkpoint and asks transformers for the expected tokens."""
    model.save_pretrained(folder)
    requests = random_requests(model.config.vocab_size)
    # A token that the first request meets soon serves as the end of text.
    eos = own_tokens(model, requests[0], frozenset())[3]
    tiny = TinyModel(folder, requests, frozenset({eos}))
    tiny.expected = {r.id: own_tokens(model, r, tiny.eos_ids) for r in requests}
    return tiny


def trained(folder: Path, texts: list[str], new_tokens: int = 20) -> TinyModel:
    """A trained checkpoint, prompts from texts, and transformers' own answers in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    requests = [
        Request(i, i, tuple(tokenizer.encode(text)[:MAX_PROMPT]), new_tokens - i % 5)
        for i, text in enumerate(texts)
    ]
    tiny = TinyModel(folder, requests, frozenset({model.config.eos_token_id}))
    tiny.expected = {r.id: own_tokens(model, r, tiny.eos_ids) for r in requests}
    return tiny


def random_requests(vocab_size: int) -> list[Request]:
    """Prompts of unequal length that ask for unequal numbers of tokens."""
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    lengths = draw(1, MAX_PROMPT + 1, NUM_REQUESTS)
    return [
        Request(i, i, tuple(draw(3, vocab_size, length)), MAX_NEW - i % 4)
        for i, length in enumerate(lengths)
    ]


def own_tokens(model, request: Request, eos_ids: frozenset[int]) -> list[int]:
    """What transformers' own `generate` adds to one prompt."""
    prompt = torch.tensor([request.prompt])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=request.new_tokens,
        do_sample=False,
        eos_token_id=list(eos_ids) or -1,
        pad_token_id=0,
    )
    return output[0, len(request.prompt) :].tolist()
