"""Streaming a model layer by layer: the numbers of the whole model, in the memory of one layer."""

import json
from contextlib import contextmanager

import pytest
import torch
from families import CPU
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, kl_div

from llmpq.checkpoint.checkpoint import Checkpoint, RandomWeights
from llmpq.checkpoint.loader import load_stage
from llmpq.evaluation.perplexity import evaluate
from llmpq.evaluation.streaming import stream
from llmpq.models.family import PartOfLayer
from llmpq.models.live_tensors import PeakMemory
from llmpq.models.stage_model import LayerRange, StageModel, load_config
from llmpq.quant import PlainLinear, quantize

FP32 = torch.float32
# Untied and tied heads, learned positions, a norm and a projection of the embedding, layers that
# see a window, scales of the embedding and of the logits.
FAMILIES = ["llama", "opt-projected", "bloom", "qwen2", "gpt_neox", "gemma2", "granite"]
SIXTEEN = ["16"] * 4
MIXED = ["4", "16", "8", "3"]
LATE = ["16", "16", "16", "3"]


@pytest.fixture
def checkpoint(family_model):
    """family -> the folder of a tiny model of 4 layers."""
    return lambda family: family_model(family).folder


def text(num_windows=5, window=16):
    return torch.randint(3, 97, (num_windows, window), generator=torch.Generator().manual_seed(4))


def streamed(folder, variants, windows, **more):
    return stream(load_config(folder), Checkpoint(folder), variants, windows, FP32, CPU, **more)


def whole(folder, precisions, **more):
    config = load_config(folder)
    layers = LayerRange(0, config.num_hidden_layers, config.num_hidden_layers)
    return load_stage(config, Checkpoint(folder), layers, precisions, FP32, CPU, **more)


@torch.inference_mode()
def log_probabilities(stage, windows):
    hidden = stage.run(stage.embed(windows))
    return stage.head(hidden[:, :-1]).float().log_softmax(-1).flatten(0, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_whole_model(checkpoint, family):
    folder, windows = checkpoint(family), text()
    variants = [SIXTEEN, MIXED, LATE]
    for variant, found in zip(variants, streamed(folder, variants, windows), strict=True):
        expected = evaluate([whole(folder, variant)], windows)
        assert found.loss.num_tokens == expected.num_tokens
        assert found.loss.total == pytest.approx(expected.total, rel=1e-5)


def test_divergence_is_from_the_sixteen_bit_model(checkpoint):
    folder, windows = checkpoint("llama"), text()
    base = log_probabilities(whole(folder, SIXTEEN), windows)
    found = streamed(folder, [MIXED, LATE, SIXTEEN], windows)
    for variant, one in zip((MIXED, LATE), found, strict=False):
        own = log_probabilities(whole(folder, variant), windows)
        expected = kl_div(own, base, log_target=True, reduction="batchmean")
        assert one.divergence == pytest.approx(float(expected), rel=1e-4)
        assert one.divergence > 0
    assert found[2].divergence == 0


def test_pieces_of_windows_and_chunks_of_tokens_change_nothing(checkpoint, monkeypatch):
    folder, windows = checkpoint("llama"), text()
    at_once = streamed(folder, [MIXED], windows)[0]
    monkeypatch.setattr("llmpq.evaluation.streaming.TOKENS_AT_ONCE", 32)
    monkeypatch.setattr("llmpq.evaluation.streaming.LOGITS_AT_ONCE", 7 * 97)
    in_pieces = streamed(folder, [MIXED], windows)[0]
    assert in_pieces.loss.total == pytest.approx(at_once.loss.total, rel=1e-6)
    assert in_pieces.divergence == pytest.approx(at_once.divergence, rel=1e-4)


def test_without_divergence_the_sixteen_bit_model_is_not_run(checkpoint):
    folder, windows = checkpoint("llama"), text()
    loaded = []
    weights = Checkpoint(folder)
    read = weights.read
    weights.read = lambda name, shape: loaded.append(name) or read(name, shape)
    [found] = stream(load_config(folder), weights, [MIXED], windows, FP32, CPU, divergence=False)
    assert found.divergence is None
    assert found.loss.total == pytest.approx(streamed(folder, [MIXED], windows)[0].loss.total)
    assert len(loaded) == len(set(loaded))  # every layer at one precision only


def test_a_part_of_a_layer_may_be_low(checkpoint):
    folder, windows = checkpoint("llama"), text()
    low = {part: PartOfLayer("3", part) for part in ("attention", "ffn")}
    variants = [["16", low[part], "16", "16"] for part in low]
    attention, ffn = streamed(folder, variants, windows)
    names = {"attention": ("self_attn",), "ffn": ("mlp",)}
    for part, one in (("attention", attention), ("ffn", ffn)):
        stage = whole(folder, SIXTEEN)
        for raw in stage.parameters_to_load():
            in_part = any(f"layers.1.{word}" in raw.name for word in names[part])
            if in_part and isinstance(raw.module, PlainLinear):
                low_rows(raw.module)
        expected = cross_entropy(
            log_probabilities(stage, windows), windows[:, 1:].flatten(), reduction="sum"
        )
        assert one.loss.total == pytest.approx(float(expected), rel=1e-4)
    assert attention.loss.total != ffn.loss.total


def low_rows(linear):
    """3 bits and back, in place: the rows of these tiny models are one group."""
    codes, scales, zeros = quantize(linear.weight, 3, linear.in_features)
    linear.weight.copy_((codes - zeros.float()) * scales.float())


def test_the_watch_sees_every_layer_at_sixteen_bits_before_it_is_rounded(checkpoint):
    folder, windows = checkpoint("llama"), text()
    events = []

    @contextmanager
    def watch(stage):
        events.append(("enter", stage.layers.first))
        yield
        events.append(("leave", stage.layers.first))

    class Recorded:
        def of(self, name):
            def rounding(weight, bits, group, centre_up_to=1.0):
                events.append(("round", int(name.split(".")[2])))
                return quantize(weight, bits, group, centre_up_to)

            return rounding

    streamed(folder, [["3"] * 4], windows, watch=watch, roundings=Recorded())
    assert [e for e in dict.fromkeys(events)] == [
        (what, layer) for layer in range(4) for what in ("enter", "leave", "round")
    ]


def test_roundings_reach_the_weights(checkpoint):
    folder, windows = checkpoint("llama"), text()

    class Halved:
        def of(self, name):
            return lambda weight, *rest: quantize(weight / 2, *rest)

    plain, halved = (
        streamed(folder, [["8"] * 4], windows, **more)[0] for more in ({}, {"roundings": Halved()})
    )
    assert halved.divergence > 10 * plain.divergence


def peak_bytes(folder, num_variants, num_windows) -> int:
    total = load_config(folder).num_hidden_layers
    draw = torch.Generator().manual_seed(0)
    variants = [
        [("16", "4", "3")[i] for i in torch.randint(3, (total,), generator=draw).tolist()]
        for _ in range(num_variants)
    ]
    windows = text(num_windows, 1024)
    with PeakMemory() as counter:
        streamed(folder, variants, windows)
    return counter.peak


def test_memory_grows_with_neither_variants_nor_windows_nor_layers(tmp_path):
    small, deep = write_llama(tmp_path / "small", 2), write_llama(tmp_path / "deep", 6)
    least = peak_bytes(small, 1, 2)
    layer_bytes = 4 * (4 * 64 * 64 + 3 * 64 * 256)
    state_bytes = 4 * 64 * 1024
    most = max(peak_bytes(small, 8, 2), peak_bytes(small, 1, 10), peak_bytes(deep, 4, 2))
    assert most - least < min(layer_bytes, state_bytes) / 2


def write_llama(folder, num_layers):
    """A LLaMA of `num_layers` small layers, random, in fp32."""
    folder.mkdir()
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    config = sizes | {"model_type": "llama", "num_hidden_layers": num_layers, "vocab_size": 97}
    (folder / "config.json").write_text(json.dumps(config))
    layers = LayerRange(0, num_layers, num_layers)
    stage = StageModel(load_config(folder), layers, ["16"] * num_layers, FP32, CPU)
    weights = RandomWeights(scale=0.1)
    tensors = {raw.name: weights.read(raw.name, raw.shape) for raw in stage.parameters_to_load()}
    save_file(tensors, folder / "model.safetensors")
    return folder
