"""One process against a pipeline of processes, and our lm-eval model class against lm-eval's own.

A plan of four stages with all four precisions, unevenly cut, is evaluated by `llmpq-eval` in one
process and through real stage processes. At 16 bits in fp32, log-likelihoods by lm-eval's own
Hugging Face class, which runs transformers' model, are compared with ours over the same stages.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _common import Check
from _quality_common import DTYPE, Settings, Subject, hand_plan, llmpq

from llmpq.artifact import read_text, write_json
from llmpq.evaluation.harness import harness_model
from llmpq.evaluation.scorer import Scorer
from llmpq.prompts.tokenizer import load_tokenizer
from llmpq.quantizer import Quantizer

MAX_RELATIVE = 1e-4
MAX_HARNESS_PERCENT = 0.1
ROLLING_TEXTS, ROLLING_CHARACTERS = 8, 2000
PAIR_WORDS = 12  # of a continuation


def run(settings: Settings) -> tuple[list[Check], list[dict[str, Any]]]:
    """A row for each comparison."""
    subjects = settings.subjects()[:2]
    rows = [pipeline_row(settings, subject) for subject in subjects]
    checks = [pipeline_check(row) for row in rows]
    if find_spec("lm_eval") is None:
        name, why = "log-likelihoods, ours against lm-eval's class", "lm-eval is not installed"
        target = f"<= {MAX_HARNESS_PERCENT:g}"
        return [*checks, Check(name, None, "%", target, None, 0, why)], rows
    compared = [harness_row(subject) for subject in subjects]
    return [*checks, *map(harness_check, compared)], [*rows, *compared]


# ---- pipeline


def pipeline_row(settings: Settings, subject: Subject) -> dict[str, Any]:
    """Perplexity of one plan by both ways."""
    plan = settings.folder / f"{subject.name}-pipeline.json"
    write_json(plan, hand_plan(subject, Quantizer()))
    alone, together = (perplexity(settings, subject, plan, more) for more in ([], ["--processes"]))
    return {
        "model": subject.name,
        "precisions": " ".join(hand_plan(subject, Quantizer()).precisions),
        "one_process": alone,
        "four_processes": together,
        "relative_difference": abs(together / alone - 1),
    }


def perplexity(settings: Settings, subject: Subject, plan: Path, more: list[str]) -> float:
    """As `llmpq-eval` has it."""
    out = settings.folder / "evaluation.json"
    words = ["--model", subject.model, "--text", subject.evaluation[0], "--window", "256"]
    words += ["--max-windows", settings.num_windows, "--dtype", "float32", "--device", "cpu"]
    llmpq("eval", "-q", plan, *words, *more, "--json", out)
    return float(json.loads(out.read_text())["rows"][0]["perplexity"])


def pipeline_check(row: dict[str, Any]) -> Check:
    """Equal but for the last bits."""
    value = row["relative_difference"]
    name = f"{row['model']}: perplexity through 4 processes against 1, relative difference"
    return Check(name, value, "", f"<= {MAX_RELATIVE:g}", value <= MAX_RELATIVE, 1)


# ---- lm-eval


def harness_row(subject: Subject) -> dict[str, Any]:
    """Summed log-likelihoods by both classes: of whole texts, and of continuations."""
    ours, theirs = our_class(subject), their_class(subject)
    texts, pairs = requests(subject)
    row: dict[str, Any] = {"model": subject.name, "texts": len(texts), "pairs": len(pairs)}
    for name, model in (("ours", ours), ("lm_eval", theirs)):
        row[f"{name}_rolling"] = [float(value) for value in rolling(model, texts)]
        row[f"{name}_pairs"] = [float(value) for value in scored(model, pairs)]
    return row


def our_class(subject: Subject) -> Any:
    """Over our stages at 16 bits."""
    scorer = Scorer([subject.stage("16")], subject.spec.max_positions)
    return harness_model(scorer, load_tokenizer(subject.folder))


def their_class(subject: Subject) -> Any:
    """Over transformers' model."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(subject.folder, dtype=DTYPE)
    tokenizer = load_tokenizer(subject.folder)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")


def requests(subject: Subject) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces of the held-out text, and (context, continuation) pairs cut out of them."""
    text = read_text(subject.evaluation[0])
    starts = range(0, len(text) - ROLLING_CHARACTERS, ROLLING_CHARACTERS)
    texts = [text[start : start + ROLLING_CHARACTERS] for start in starts][:ROLLING_TEXTS]
    pieces = [piece.split()[: 4 * PAIR_WORDS] for piece in texts]
    pairs = [(" ".join(p[:-PAIR_WORDS]), " " + " ".join(p[-PAIR_WORDS:])) for p in pieces]
    return texts, pairs


def rolling(model: Any, texts: list[str]) -> list[float]:
    """Log-likelihood of whole texts."""
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    return list(model.loglikelihood_rolling(asked, disable_tqdm=True))


def scored(model: Any, pairs: list[tuple[str, str]]) -> list[float]:
    """Log-likelihood of continuations."""
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return [score for score, _ in model.loglikelihood(asked, disable_tqdm=True)]


def harness_check(row: dict[str, Any]) -> Check:
    """The largest relative difference of one log-likelihood."""
    pairs = [
        (ours, theirs)
        for kind in ("rolling", "pairs")
        for ours, theirs in zip(row[f"ours_{kind}"], row[f"lm_eval_{kind}"], strict=True)
    ]
    worst = max(100 * abs(ours / theirs - 1) for ours, theirs in pairs)
    name = f"{row['model']}: log-likelihoods, ours against lm-eval's class, worst difference"
    holds = worst <= MAX_HARNESS_PERCENT
    return Check(name, worst, "%", f"<= {MAX_HARNESS_PERCENT:g}", holds, len(pairs))
