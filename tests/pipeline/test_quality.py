"""Perplexity of the stages that serve: against transformers, and across precisions."""

import math
from functools import cache

import pytest
import torch
from families import CPU
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.evaluation.perplexity import evaluate, load_stages, text_windows
from llmpq.models.stage_model import load_config
from llmpq.prompts.tokenizer import load_tokenizer

WINDOW, NUM_WINDOWS = 256, 24
SUBJECTS = [
    ("tale-llama-11m", "wikitext2.test.txt"),
    ("tale-llama-11m", "ptb.test.txt"),
    ("stories-260k", "tinystories.eval.txt"),
]
every_subject = pytest.mark.parametrize(("model", "text"), SUBJECTS)


@pytest.fixture(scope="module")
def perplexity(shared):
    """(model, text, precision, cuts) -> perplexity in bf16."""

    @cache
    def measure(model, text, precision, cuts=None):
        folder = shared / "models" / model
        if not folder.is_dir():
            pytest.skip(f"the data folder holds no models/{model}")
        config = load_config(folder)
        last = config.num_hidden_layers
        precisions = [precision] * last
        stages = load_stages(
            config, Checkpoint(folder), cuts or [(0, last)], precisions, torch.bfloat16, CPU
        )
        return evaluate(stages, windows(shared, model, text)).perplexity

    return measure


def windows(shared, model, text):
    tokenizer = load_tokenizer(shared / "models" / model)
    return text_windows(shared / "text" / text, tokenizer, WINDOW, NUM_WINDOWS)


@every_subject
def test_sixteen_bits_is_what_transformers_computes(shared, perplexity, model, text):
    ours = perplexity(model, text, "16")
    whole = AutoModelForCausalLM.from_pretrained(
        shared / "models" / model, dtype=torch.bfloat16
    ).eval()
    token_ids = windows(shared, model, text)
    losses = []
    with torch.inference_mode():
        for part in token_ids.split(8):
            logits = whole(part).logits[:, :-1].float()
            losses.append(cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()))
    theirs = math.exp(torch.stack(losses).mean())
    assert ours == pytest.approx(theirs, rel=0.001)


@every_subject
def test_fewer_bits_are_worse(perplexity, model, text):
    at = {p: perplexity(model, text, p) for p in ("16", "8", "4", "3")}
    assert at["8"] == pytest.approx(at["16"], rel=0.005)
    assert at["16"] <= at["8"] * 1.001
    assert at["8"] < at["4"] < at["3"]


@every_subject
def test_three_stages_evaluate_exactly_as_one(perplexity, model, text):
    last = 12 if model == "tale-llama-11m" else 5
    cuts = ((0, 1), (1, 3), (3, last))
    assert perplexity(model, text, "4", cuts) == perplexity(model, text, "4")
