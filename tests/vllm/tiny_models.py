"""Small models for tests on vLLM: trained for a minute at most, so that their answers are clear.

Of a model with random weights the two most probable tokens are often equal at 16 bits.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llmpq.model_spec import ASSETS
from llmpq.prompts.tokenizer import load_tokenizer

TINY_TALES = ASSETS / "tiny-tales"
TEXT = (ASSETS / "calibration.txt").read_text()
STEPS, ROWS, WINDOW = 120, 8, 64
VLLM_HEAD = 32  # the smallest head for which vLLM has attention on a CPU
SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "torch_dtype": "bfloat16",
}
LLAMA_LIKE = {"intermediate_size": 256, "num_key_value_heads": 2}
OWN = {
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE | {"head_dim": 32},
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128},
}


def trained(model_type: str, folder: Path) -> Path:
    """A small model of this type, trained a little on the shipped text, saved at bf16."""
    tokenizer = load_tokenizer(TINY_TALES)
    ids = torch.tensor(tokenizer.encode(TEXT))
    own = json.loads((TINY_TALES / "config.json").read_text())
    names = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: own[name] for name in names if name in own}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **OWN[model_type], **tokens)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - WINDOW, (ROWS,)).tolist()
        rows = torch.stack([ids[start : start + WINDOW] for start in starts])
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
    copy_tokenizer(TINY_TALES, folder)
    return folder


def copy_tokenizer(source: Path, folder: Path) -> None:
    for path in source.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)


def widened(source: Path, folder: Path) -> Path:
    """The same LLaMA model with heads of `VLLM_HEAD` values, most of them zero.

    The value i of a rotated half goes to a place with the same frequency; queries are scaled by
    what the square root of the size of a head divides scores by.
    """
    config = json.loads((source / "config.json").read_text())
    old = config["hidden_size"] // config["num_attention_heads"]
    step, half = VLLM_HEAD // old, VLLM_HEAD // 2
    places = [*range(0, half, step), *range(half, VLLM_HEAD, step)]
    tensors = load_file(source / "model.safetensors")
    for name, weight in tensors.items():
        if any(f"{one}_proj" in name for one in ("q", "k", "v")) and "self_attn" in name:
            heads = weight.unflatten(0, (-1, old))
            wide = heads.new_zeros(len(heads), VLLM_HEAD, weight.shape[1])
            wide[:, places] = heads * (step**0.5 if "q_proj" in name else 1)
            tensors[name] = wide.flatten(0, 1).contiguous()
        elif "self_attn.o_proj" in name:
            wide = weight.new_zeros(len(weight), config["num_attention_heads"], VLLM_HEAD)
            wide[:, :, places] = weight.unflatten(1, (-1, old))
            tensors[name] = wide.flatten(1).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"head_dim": VLLM_HEAD}))
    copy_tokenizer(source, folder)
    return folder
