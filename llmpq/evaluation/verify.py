"""Checks on a small copy of a model that its pipelines give the logits of transformers.

The copy has the kinds of layers, heads and settings of the model, random weights and small sizes.
It is written as a checkpoint and loaded by the runtime's own loader into one stage, two stages and
stages of one layer, which serve prompts of unequal length in one batch and alone, a prefill and a
few decode steps. Their logits must be those of transformers' `generate`, each prompt alone, in fp32
on the CPU. The check takes a second or two.

Shapes: b prompts, V vocabulary. Not covered: faults that need large sizes or long texts.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.errors import UserError
from llmpq.evaluation.perplexity import load_stages
from llmpq.evaluation.scorer import Scorer
from llmpq.model_known import NUM_EXPERTS, num_experts
from llmpq.models.count import ROPES, with_layers
from llmpq.models.count_model import layer_kinds
from llmpq.models.rope import switches_at
from llmpq.models.stage_model import StageModel

CPU = torch.device("cpu")
LENGTHS, NEW_TOKENS = (13, 7, 5, 1), 4
VOCABULARY = 120
WINDOW = 5  # the attention window is shorter than most of the prompts
SWITCH = 10  # the length at which positions change: some prompts are longer, none cross it
LEAST_LAYERS, MOST_LAYERS = 4, 12
MOST_PARAMETERS = 30_000_000
# Settings of experts, and the most that a small copy has of each.
MOST_OF_EXPERTS = (
    (NUM_EXPERTS, 4),
    (r"(num_)?experts_per_tok(en)?|moe_(k|topk|top_k)", 2),
    (r"n_group", 2),
    (r"topk_group", 1),
    (r"(moe_)?(num|n)_shared_experts", 1),
)
INNER_WIDTHS = r"(moe|shared|shared_expert|expert)_intermediate_size|intermediate_size_mlp"
INNER_WIDTH = 32
LATENT_WIDTHS = r"(q|kv)_lora_rank|qk_(nope|rope)_head_dim|v_head_dim"
LATENT_WIDTH = 16
# Settings that say at which layer experts begin, and those that list layers of a kind.
FIRST_LAYERS = ("first_k_dense_replace", "moe_layer_start_index")
LISTS_OF_LAYERS = ("mlp_only_layers", "moe_layers")
TOLERANCE = 2e-3  # relative to the logits' spread; sums in another order differ by 1e-5


def verify(config: Any) -> None:
    """Raises `UserError` where pipelines of such a model give other logits than transformers."""
    with TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        small = small_copy(config)
        if len(layer_kinds(small)[0]) < len(layer_kinds(config)[0]):
            raise UserError("no small copy of the model has all its kinds of layers to check it")
        model = _written(small, Path(folder))
        prompts = _prompts()
        expected = [_own_logits(model, prompt) for prompt in prompts]
        for ends in _cuts(model.config.num_hidden_layers):
            precisions = ["16"] * ends[-1]
            cuts = list(zip([0, *ends], ends, strict=False))
            weights = Checkpoint(Path(folder))
            stages = load_stages(model.config, weights, cuts, precisions, torch.float32, CPU)
            for some in (prompts, *([prompt] for prompt in prompts)):
                wanted = [expected[prompts.index(prompt)] for prompt in some]
                _compare(_logits(stages, some), wanted, len(ends), len(some))


def small_copy(config: Any) -> Any:
    """The configuration of a model of the same kind with few layers, heads and tokens."""
    total = min(config.num_hidden_layers, max(LEAST_LAYERS, _period(config)))
    data = with_layers(config, total).to_dict()
    heads, kv_heads = _few_heads(config)
    whole = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // whole
    hidden = (heads + (config.hidden_size != whole * size)) * size
    projected = data.get("word_embed_proj_dim") != config.hidden_size
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_kv_heads": kv_heads,
        "hidden_size": hidden,
        "intermediate_size": INNER_WIDTH if num_experts(data) > 1 else 2 * hidden,
        "ffn_dim": 2 * hidden,
        "ffn_hidden_size": 2 * hidden,
        "word_embed_proj_dim": size if projected else hidden,
        "vocab_size": VOCABULARY,
        "sliding_window": WINDOW,
        "attention_chunk_size": WINDOW,
    }
    for name, value in sizes.items():
        own = config.attribute_map.get(name, name)
        if data.get(own) is not None:
            data[own] = value
    data |= _few_experts(data) | _early_kinds(data, total)
    for name in ("head_dim", "qk_head_dim") if data.get("kv_lora_rank") else ():
        data.pop(name, None)  # they follow from the sizes of latent attention
    data |= {key: 1 for key in data if key.endswith("_token_id") and data[key] is not None}
    _switch_early(data, config)
    data.pop("model_type")
    return type(config)(**data)


def _few_experts(data: Mapping[str, Any]) -> dict[str, int]:
    """The settings of few narrow experts, in few groups, and of narrow latents."""
    changed = {}
    for key, value in data.items():
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            most = next((m for names, m in MOST_OF_EXPERTS if re.fullmatch(names, key)), None)
            if most is not None:
                changed[key] = min(value, most)
            elif re.fullmatch(INNER_WIDTHS, key):
                changed[key] = INNER_WIDTH
            elif re.fullmatch(LATENT_WIDTHS, key):
                changed[key] = min(value, LATENT_WIDTH)
    return changed


def _early_kinds(data: Mapping[str, Any], total: int) -> dict[str, Any]:
    """The settings by which layers of all kinds are among the first `total`."""
    changed: dict[str, Any] = {
        key: min(data[key], 1) for key in FIRST_LAYERS if isinstance(data.get(key), int)
    }
    for key in LISTS_OF_LAYERS:
        if listed := data.get(key):
            changed[key] = [layer for layer in listed if layer < total] or [total - 1]
    return changed


def _few_heads(config: Any) -> tuple[int, int]:
    """Few query and key-value heads, grouped alike."""
    heads = config.num_attention_heads
    names = ("num_key_value_heads", "num_kv_heads")
    kv_heads = next((own for name in names if (own := getattr(config, name, None))), heads)
    few = 1 if kv_heads == 1 and heads > 1 else 2
    return few * min(heads // kv_heads, 3), few


def _period(config: Any) -> int:
    """The layers needed to have every kind of layer: by lists of layers, or by an interval."""
    own, found = config.num_hidden_layers, [0]
    for name, value in config.to_dict().items():
        if name in (*ROPES, *LISTS_OF_LAYERS):
            continue
        if isinstance(value, list | tuple) and len(value) == own:
            kinds = {str(each) for each in value}
            found.append(next(n for n in range(1, own + 1) if {str(v) for v in value[:n]} == kinds))
        elif isinstance(value, int) and re.search("interval|pattern|period|every|freq|step", name):
            found.append(value + 1)
    return min(MOST_LAYERS, max(found))


def _switch_early(data: dict[str, object], config: Any) -> None:
    """Makes positions that change with length change within the length of the prompts."""
    if switches_at(config) is None:
        return
    for settings in (data, data.get("rope_parameters"), data.get("rope_scaling")):
        if isinstance(settings, dict) and settings.get("original_max_position_embeddings"):
            settings["original_max_position_embeddings"] = SWITCH


def _written(config: Any, folder: Path) -> Any:
    """Makes transformers' model with random weights, and saves it as a checkpoint."""
    torch.manual_seed(0)
    config._experts_implementation = "eager"  # torch's grouped product takes not all sizes
    with torch.device("meta"):
        sketch = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if sketch.num_parameters() > MOST_PARAMETERS:
        raise UserError("no small copy of the model can be made to check it")
    model = AutoModelForCausalLM.from_config(
        config, trust_remote_code=False, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def _cuts(total: int) -> Iterator[list[int]]:
    """The layers at which stages end, for each pipeline that is tried."""
    yield [total]
    if total > 2:
        yield [total // 2, total]
    if total > 1:
        yield list(range(1, total + 1))


def _own_logits(model: Any, prompt: list[int]) -> Tensor:
    """The logits `[new tokens, V]` of transformers' `generate`."""
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None  # nothing ends a text early
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.cat(output.logits)


def _logits(stages: Sequence[StageModel], prompts: Sequence[list[int]]) -> Tensor:
    """The logits `[b, new tokens, V]` of all prompts in one micro-batch."""
    last, seen = stages[-1], []
    head = last.head

    def kept(hidden: Tensor) -> Tensor:
        seen.append(head(hidden))
        return seen[-1]

    last.head = kept  # type: ignore[method-assign]
    try:
        Scorer(stages, sum(LENGTHS)).generate(prompts, NEW_TOKENS)
    finally:
        last.head = head  # type: ignore[method-assign]
    return torch.stack(seen, dim=1)


def _compare(found: Tensor, expected: Sequence[Tensor], stages: int, prompts: int) -> None:
    for own, wanted in zip(found, expected, strict=True):
        difference = float((own - wanted).abs().max() / wanted.std())
        if not difference <= TOLERANCE:  # NaN too
            raise UserError(
                f"the logits of a small copy of it, with {stages} stage(s) and a batch of {prompts}"
                f", differ from those of transformers (by {difference:.2g} standard deviations)"
            )
