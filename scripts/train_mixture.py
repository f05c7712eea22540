"""Train a small mixture of experts, on which precisions of experts can be compared.

A Qwen3-MoE decoder of about 17 M parameters: 6 layers of 8 experts, 2 of them for each token. Nine
tenths of a layer are experts, as in models that people run. The texts are whatever `--text` names;
the tokenizer is that of `--tokenizer`, a Hugging Face folder. Nothing of it ships with llmpq.

    python scripts/train_mixture.py --tokenizer tale-llama-11m --text wiki.txt stories.txt \
        --eval wikitext2.test.txt --output build/mixture
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from train_tiny_tales import evaluate, learning_rate, make_optimizer, save, windows
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

BALANCE = 0.01  # weight of the loss that keeps routing balanced, as in Switch Transformers


def build_model(vocab_size: int) -> Qwen3MoeForCausalLM:
    """The untrained model."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=384,
            moe_intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            router_aux_loss_coef=BALANCE,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def read_stream(paths: list[Path], tokenizer) -> torch.Tensor:
    """All texts, one after the other, as token ids."""
    ids: list[int] = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        ids += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids)


def train(model: Qwen3MoeForCausalLM, stream: torch.Tensor, args: argparse.Namespace) -> None:
    """Runs `--steps` steps of `--batch` windows."""
    source = windows(stream, args.window, torch.Generator().manual_seed(args.seed))
    optimizer, start = make_optimizer(model, args), time.time()
    average = 0.0
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, step / args.steps, args)
        batch = torch.stack([next(source) for _ in range(args.batch)])
        output = model(batch, use_cache=False, output_router_logits=True)
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        (loss + BALANCE * output.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average = loss.item() if step == 0 else 0.95 * average + 0.05 * loss.item()
        if step % 20 == 0:
            print(f"step {step}: loss {average:.3f}, {time.time() - start:.0f} s", flush=True)


def main() -> None:
    """Trains, saves and evaluates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--eval", type=Path)
    parser.add_argument("--output", type=Path, default=Path("build/mixture"))
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=40)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    stream = read_stream(args.text, tokenizer)
    model = build_model(len(tokenizer))
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.1f} M parameters, {len(stream) / 1e6:.2f} M tokens of text")
    train(model, stream, args)
    save(model, tokenizer, args.output)
    if args.eval:
        perplexity, bits = evaluate(args.output, args.eval.read_text("utf-8"), 256)
        print(f"{args.eval.name}: perplexity {perplexity:.1f}, {bits:.3f} bits a byte")
        assert math.isfinite(perplexity)


if __name__ == "__main__":
    main()
