"""Loading a stage: what it holds afterwards, and how little more it takes on the way."""

import json

import pytest
import torch
from safetensors.torch import save_file

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.loader import load_stage
from llmpq.costs.memory import end_weight_bytes, layer_weight_bytes
from llmpq.model_lookup import load_model_spec
from llmpq.model_spec import ASSETS
from llmpq.models.stage_model import LayerRange, load_config
from llmpq.quant import available_precisions

CPU = torch.device("cpu")
TINY_TALES = ASSETS / "tiny-tales"
MIB = 1024**2
NUM_LAYERS, HIDDEN, FFN = 6, 2048, 6144
LARGEST_BYTES = 2 * HIDDEN * FFN  # in bf16: 24 MiB
# Beyond weights and raw tensors: fp32 temporaries of rounding (a few MiB), modules of six layers,
# what the allocator keeps of small blocks, and threads' first buffers.
SLACK_BYTES = 12 * MIB

# Loads layers 1 to 6 of 8 and prints [held, peak above the start]: all resident memory, so pages
# of the file that stay mapped count too.
MEASURE = """
import gc, json, sys, threading, time, torch
from pathlib import Path
from llmpq.models.stage_model import LayerRange, load_config
from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.loader import load_stage

def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return 1024 * int(line.split()[1])

def load(folder):
    config, layers = load_config(folder), LayerRange(1, 7, 8)
    config.num_hidden_layers = 8
    weights = Checkpoint(folder)
    return load_stage(config, weights, layers, [sys.argv[3]] * 6, torch.bfloat16, CPU)

CPU = torch.device("cpu")
torch.set_num_threads(1)
load(Path(sys.argv[2]))  # a small model first: code, kernels and their buffers
gc.collect()
before = peak = resident()
running = True

def watch():
    global peak
    while running:
        peak = max(peak, resident())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
stage = load(Path(sys.argv[1]))
running = False
thread.join()
print(json.dumps([stage.weight_bytes(), peak - before]))
"""


def write_checkpoint(folder, hidden: int, ffn: int):
    """A LLaMA's layers 1 to 6 in bf16, as safetensors; no other tensor is read."""
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    }
    (folder / "config.json").write_text(json.dumps(config))
    key_value = hidden // 4
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    one = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}
    tensors = {
        f"model.layers.{layer}.{name}.weight": tensor.clone()
        for layer in range(1, 1 + NUM_LAYERS)
        for name, tensor in one.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("cut", [(0, 8), (0, 3), (3, 5), (5, 8), (7, 8)])
@pytest.mark.parametrize("precision", ["16", "8", "8-w8a8", "4", "3"])
def test_a_loaded_stage_holds_what_the_planner_counts(precision, cut):
    if precision not in available_precisions(CPU, torch.bfloat16):
        pytest.skip(f"{precision} is not available on this CPU")
    first, end = cut
    config, spec = load_config(TINY_TALES), load_model_spec("tiny-tales")
    layers = LayerRange(first, end, 8)
    precisions = [precision] * (end - first)
    stage = load_stage(config, Checkpoint(TINY_TALES), layers, precisions, torch.bfloat16, CPU)
    ends = end_weight_bytes(spec, first=layers.is_first, last=layers.is_last)
    wanted = (end - first) * layer_weight_bytes(spec, precision) + ends
    assert stage.weight_bytes() == wanted


def test_mixed_precisions_add_up_layer_by_layer():
    config, spec = load_config(TINY_TALES), load_model_spec("tiny-tales")
    precisions = ["16", "3", "8", "4"]
    layers = LayerRange(2, 6, 8)
    stage = load_stage(config, Checkpoint(TINY_TALES), layers, precisions, torch.bfloat16, CPU)
    assert stage.weight_bytes() == sum(layer_weight_bytes(spec, p) for p in precisions)


def test_no_tensor_stays_unloaded():
    config = load_config(TINY_TALES)
    for first, end in ((0, 8), (0, 2), (2, 6), (6, 8)):
        layers = LayerRange(first, end, 8)
        mixed = ["16", "8", "4", "3"] * 2
        stage = load_stage(
            config, Checkpoint(TINY_TALES), layers, mixed[first:end], torch.bfloat16, CPU
        )
        tensors = [*stage.named_parameters(), *stage.named_buffers()]
        assert not [name for name, tensor in tensors if tensor.is_meta]
