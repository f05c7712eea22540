"""Train `tiny-tales`, the small LLaMA checkpoint that ships with the package.

The script makes every file of the checkpoint from two public sources:

* synthetic stories, sampled from the public TinyStories LLaMA of 260 k parameters (MIT licence;
  `--teacher`, a Hugging Face folder) and kept in `--corpus`, so that a second run skips this step;
* real TinyStories text (`--text`, licence CDLA-Sharing-1.0), repeated `--text-repeats` times.

It trains a byte-level BPE tokenizer and a LlamaForCausalLM of 2.95 M parameters on the CPU, and
writes `config.json`, `generation_config.json`, `model.safetensors` (bf16), `tokenizer.json` and
`tokenizer_config.json` to `--output`. Each training story stands between `<s>` and `</s>`; the
saved tokenizer therefore puts `<s>` in front of a prompt by default.

`--eval` names a text that neither model was fitted to here; with it, the perplexity per token and
the bits per byte of the new model and of the teacher are printed at the end.

    python scripts/train_tiny_tales.py --teacher stories-260k --text tinystories.txt \
        --corpus build/tales.jsonl --eval tinystories.eval.txt
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
VOCAB_SIZE = 1536
STORY_START = re.compile(r"\n\n(?=Once (?:upon|there)\b)")
MIS_DECODED = {"\u00e2\u20ac\u0153": '"', "\u00e2\u20ac\u2122": "'", "\u00e2\u20ac": '"'}


class TeacherSampler:
    """Sample token sequences from a small LLaMA in large batches, with a fixed-size KV cache."""

    def __init__(self, model: LlamaForCausalLM, temperature: float) -> None:
        self.model, self.config, self.temperature = model, model.config, temperature
        self.inv_freq = model.model.rotary_emb.inv_freq.float()
        self.eps = model.config.rms_norm_eps

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    @staticmethod
    def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def _attend(self, layer, x, pos: int, cache) -> torch.Tensor:
        attn, rows = layer.self_attn, x.shape[0]
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        angle = self.inv_freq * pos
        cos, sin = angle.cos(), angle.sin()
        q = self._rotate(attn.q_proj(x).view(rows, heads, -1), cos, sin)
        cache[0][:, :, pos] = self._rotate(attn.k_proj(x).view(rows, kv_heads, -1), cos, sin)
        cache[1][:, :, pos] = attn.v_proj(x).view(rows, kv_heads, -1)
        q = q.view(rows, kv_heads, heads // kv_heads, -1)  # the query heads of one KV head: a group
        keys, values = cache[:, :, :, : pos + 1]
        return attn.o_proj(F.scaled_dot_product_attention(q, keys, values).reshape(rows, -1))

    def _logits(self, ids: torch.Tensor, pos: int, caches: list[torch.Tensor]) -> torch.Tensor:
        x = self.model.model.embed_tokens(ids)
        for layer, cache in zip(self.model.model.layers, caches, strict=True):
            x = x + self._attend(layer, self._norm(x, layer.input_layernorm.weight), pos, cache)
            x = x + layer.mlp(self._norm(x, layer.post_attention_layernorm.weight))
        return self.model.lm_head(self._norm(x, self.model.model.norm.weight))

    @torch.inference_mode()
    def sample(self, batch: int) -> list[tuple[list[int], bool]]:
        """Return `batch` pairs (tokens without BOS and EOS, whether the story came to its end)."""
        cfg, length = self.config, self.config.max_position_embeddings
        shape = (2, batch, cfg.num_key_value_heads, length, cfg.head_dim)
        caches = [torch.zeros(shape) for _ in range(cfg.num_hidden_layers)]
        out = torch.zeros((batch, length), dtype=torch.long)
        alive, ids = torch.arange(batch), torch.full((batch,), cfg.bos_token_id)
        ends = torch.full((batch,), -1)
        for pos in range(length):
            probs = torch.softmax(self._logits(ids, pos, caches) / self.temperature, -1)
            ids = torch.multinomial(probs, 1)[:, 0]
            out[alive, pos] = ids
            going = (ids != cfg.eos_token_id) & (ids != cfg.bos_token_id)
            if not going.all():
                ends[alive[~going]] = pos
                alive, ids = alive[going], ids[going]
                caches = [cache[:, going] for cache in caches]
            if not len(alive):
                break
        return [(row[:end].tolist(), end >= 0) for row, end in zip(out, ends.tolist(), strict=True)]


def cut_to_sentence(text: str) -> str:
    """Drop the unfinished sentence at the end of a story that ran into the length limit."""
    return text[: max(text.rfind(mark) for mark in ('." ', ". ", "! ", ".\n", "!\n")) + 1]


def sample_corpus(args: argparse.Namespace) -> None:
    """Write `--corpus`: one JSON object per story, until the size or the time limit is reached."""
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).eval()
    sampler = TeacherSampler(teacher, args.temperature)
    torch.set_num_threads(1)  # its tensors are too small to share between threads
    start, size = time.time(), 0
    args.corpus.parent.mkdir(parents=True, exist_ok=True)
    partial = args.corpus.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as out:
        while size < args.corpus_mb * 1e6 and time.time() - start < args.corpus_minutes * 60:
            for ids, whole in sampler.sample(args.sample_batch):
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                text = text if whole else cut_to_sentence(text)
                size += len(text)
                out.write(json.dumps({"text": text, "whole": whole}) + "\n")
            print(f"corpus: {size / 1e6:.2f} MB after {time.time() - start:.0f} s", flush=True)
    partial.replace(args.corpus)
    torch.set_num_threads(args.threads)


def read_corpus(path: Path) -> list[tuple[str, bool]]:
    """Return the distinct sampled stories as pairs (text, whether it came to its end)."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    stories = dict.fromkeys((row["text"], row["whole"]) for row in rows)
    return [story for story in stories if len(story[0]) > 100]


def read_stories(path: Path) -> list[tuple[str, bool]]:
    """Return the stories of a TinyStories text, split at their usual openings."""
    text = path.read_text(encoding="utf-8")
    for wrong, right in MIS_DECODED.items():
        text = text.replace(wrong, right)
    return [(story.strip(), True) for story in STORY_START.split(text) if story.strip()]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer; a prompt gets `<s>` in front of it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, bpe.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model; `o_proj` and `down_proj` start smaller, as in GPT-2."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.num_hidden_layers))
    return model


def pack(stories: list[tuple[str, bool]], tokenizer, generator: torch.Generator) -> torch.Tensor:
    """Return one stream of tokens: `<s> story </s> <s> story </s> ...` in random order."""
    order = torch.randperm(len(stories), generator=generator).tolist()
    texts = [stories[i][0] for i in order]
    rows = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    stream: list[int] = []
    for i, row in zip(order, rows, strict=True):
        stream.append(tokenizer.bos_token_id)
        stream.extend(row)
        if stories[i][1]:
            stream.append(tokenizer.eos_token_id)
    return torch.tensor(stream)


def windows(stream: torch.Tensor, length: int, generator: torch.Generator):
    """Yield windows of the stream without end: each epoch has its own offset and order."""
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        cut = stream[offset : offset + (len(stream) - offset) // length * length].view(-1, length)
        yield from cut[torch.randperm(len(cut), generator=generator)]


def make_optimizer(model: LlamaForCausalLM, args: argparse.Namespace) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, progress: float, args: argparse.Namespace) -> float:
    """Linear warm-up in steps, then a cosine over `progress` in 0..1 down to 2 %."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def precision(bf16: bool):
    return torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext()


def train_step(model, batch: torch.Tensor, optimizer, bf16: bool) -> float:
    """One optimiser step on a batch of windows; return the loss."""
    with precision(bf16):
        logits = model(batch, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def faster_in_bf16(model: LlamaForCausalLM, batch: torch.Tensor, steps: int = 4) -> bool:
    """Time a few steps of both precisions on a copy of the model."""
    seconds = {}
    for bf16 in (False, True):
        trial = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(trial.parameters(), lr=0.0)
        train_step(trial, batch, optimizer, bf16)
        start = time.time()
        for _ in range(steps):
            train_step(trial, batch, optimizer, bf16)
        seconds[bf16] = (time.time() - start) / steps
    print(f"seconds per step: fp32 {seconds[False]:.2f}, bf16 autocast {seconds[True]:.2f}")
    return seconds[True] < seconds[False]


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the checkpoint in bf16; the tied head is stored once, as the embedding."""
    cfg = model.config
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.generation_config = GenerationConfig(
        bos_token_id=cfg.bos_token_id,
        eos_token_id=cfg.eos_token_id,
        pad_token_id=cfg.pad_token_id,
        do_sample=False,
    )
    half.save_pretrained(output)
    tokenizer.save_pretrained(output)
    for path in output.iterdir():
        path.chmod(0o644)


def train(model, stream: torch.Tensor, tokenizer, args: argparse.Namespace) -> None:
    """Train until `--steps` or `--minutes`, whichever comes first; the cosine follows both."""
    generator = torch.Generator().manual_seed(args.seed)
    source = windows(stream, args.window, generator)
    bf16 = faster_in_bf16(model, torch.stack([next(source) for _ in range(args.batch)]))
    optimizer, start, average = make_optimizer(model, args), time.time(), 0.0
    for step in range(args.steps):
        progress = max(step / args.steps, (time.time() - start) / (args.minutes * 60))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress, args)
        batch = torch.stack([next(source) for _ in range(args.batch)])
        loss = train_step(model, batch, optimizer, bf16)
        average = loss if step == 0 else 0.98 * average + 0.02 * loss
        if step % args.log_every == 0:
            print(f"step {step}: loss {average:.3f}, {time.time() - start:.0f} s", flush=True)
        if step and step % args.save_every == 0:
            save(model, tokenizer, args.output)
    print(f"trained {step + 1} steps in {time.time() - start:.0f} s, loss {average:.3f}")


@torch.inference_mode()
def evaluate(folder: Path, text: str, window: int) -> tuple[float, float]:
    """Return the perplexity per token and the bits per byte over consecutive windows of a text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    rows = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
    total = 0.0
    for batch in rows.split(16):
        logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
    nats = total / (len(rows) * (window - 1))
    bits_per_byte = nats / math.log(2) * len(ids) / len(text.encode("utf-8"))
    return math.exp(nats), bits_per_byte


def report(args: argparse.Namespace) -> None:
    """Print perplexity and bits per byte on `--eval`, and one greedy continuation."""
    if args.eval:
        text = args.eval.read_text(encoding="utf-8")
        for folder in (args.output, args.teacher):
            ppl, bits = evaluate(folder, text, args.window)
            print(f"{folder.name}: perplexity {ppl:.3f} per token, {bits:.4f} bits per byte")
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    model = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    prompt = tokenizer("Once upon a time, a little frog", return_tensors="pt").input_ids
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=160)
    print(tokenizer.decode(out[0], skip_special_tokens=True))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="folder of the TinyStories LLaMA, 260 k")
    add("--text", type=Path, required=True, help="real TinyStories text to train on")
    add("--text-repeats", type=int, default=3)
    add("--eval", type=Path, help="held-out text, only measured on")
    add("--corpus", type=Path, required=True, help="cache of the sampled stories (JSON lines)")
    add("--corpus-mb", type=float, default=10.0)
    add("--corpus-minutes", type=float, default=8.0)
    add("--sample-batch", type=int, default=96)
    add("--temperature", type=float, default=0.7)
    add("--output", type=Path, default=Path("llmpq/assets/tiny-tales"))
    add("--steps", type=int, default=2000)
    add("--minutes", type=float, default=120.0, help="time limit of the training")
    add("--batch", type=int, default=16)
    add("--window", type=int, default=256)
    add("--lr", type=float, default=2.5e-3)
    add("--warmup", type=int, default=100)
    add("--weight-decay", type=float, default=0.1)
    add("--save-every", type=int, default=250)
    add("--log-every", type=int, default=25)
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if not args.corpus.exists():
        sample_corpus(args)
    stories = read_corpus(args.corpus) + read_stories(args.text) * args.text_repeats
    tokenizer = train_tokenizer([text for text, _ in stories])
    stream = pack(stories, tokenizer, torch.Generator().manual_seed(args.seed))
    torch.manual_seed(args.seed)
    model = build_model(tokenizer)
    count = sum(p.numel() for p in model.parameters())
    print(f"{len(stories)} stories, {len(stream)} tokens, {count} parameters", flush=True)
    train(model, stream, tokenizer, args)
    save(model, tokenizer, args.output)
    report(args)


if __name__ == "__main__":
    main()
