"""What a checkpoint stores is served: buffers, and a head of its own beside a tied flag.

Tokens are compared with those of transformers' own model, loaded from the same files.
"""

import json

import pytest
import torch
from families import GROUPED, TinyModel, generate_locally, own_tokens, random_requests
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.loader import load_stage
from llmpq.errors import UserError
from llmpq.models.stage_model import LayerRange, load_config

CPU = torch.device("cpu")
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def write(folder, model_type, change=lambda tensors: None, **more):
    """A random checkpoint, changed after it was saved."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **GROUPED, **more)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def expected(folder) -> TinyModel:
    """What transformers makes of these files."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    requests = random_requests(GROUPED["vocab_size"])[:6]
    tiny = TinyModel(folder, requests, frozenset())
    tiny.expected = {r.id: own_tokens(model, r, frozenset()) for r in requests}
    return tiny


def other_buffers(tensors):
    """Each layer's own, none as transformers would compute it."""
    for name in tensors:
        if name.endswith(("act_fn.beta", "act_fn.eps")):
            layer = int(name.split(".")[2])
            tensors[name] = torch.tensor(0.3 + layer if name.endswith("beta") else -0.1 * layer)
        if name.endswith("layer_scalar"):
            tensors[name] = torch.tensor([0.5 + 0.2 * int(name.split(".")[2])])


# Families of which transformers stores buffers, and a configuration that llmpq serves.
BUFFERED = {
    "apertus": PLAIN_ROPE,
    "gemma4_unified_text": {"head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 0}
    | {"hidden_size_per_layer_input": 0},
}


@pytest.mark.parametrize("family", BUFFERED)
def test_stored_buffers_are_served_on_every_stage(tmp_path, family):
    model = expected(write(tmp_path, family, other_buffers, **BUFFERED[family]))
    for ends in ([4], [1, 4]):
        assert model.generate(ends) == model.expected


def test_a_stored_buffer_that_is_missing_is_named(tmp_path):
    write(tmp_path, "apertus", lambda t: t.pop("model.layers.2.mlp.act_fn.beta"), **PLAIN_ROPE)
    with pytest.raises(UserError, match=r"no tensor 'model\.layers\.2\.mlp\.act_fn\.beta'"):
        load_stage(
            load_config(tmp_path),
            Checkpoint(tmp_path),
            LayerRange(2, 3, 4),
            ["16"],
            torch.float32,
            CPU,
        )


def own_head(tensors):
    tensors["lm_head.weight"] = torch.randn(97, 32) * 0.15


def equal_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def head_only(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


@pytest.mark.parametrize("change", [own_head, equal_head, head_only])
@pytest.mark.parametrize("ends", [[4], [1, 4]])
def test_a_stored_head_counts_more_than_a_tied_flag(tmp_path, change, ends):
    model = expected(write(tmp_path, "llama", change, tie_word_embeddings=True))
    assert model.generate(ends) == model.expected


@pytest.mark.parametrize("change", [own_head, equal_head])
def test_devices_that_share_a_stage_cut_the_stored_head(tmp_path, change):
    model = expected(write(tmp_path, "llama", change, tie_word_embeddings=True))
    plan = model.plan([4])
    shared = plan.stages[0].model_copy(update={"devices": ["t4-16g"] * 2, "tensor_parallel": 2})
    plan = plan.model_copy(update={"stages": [shared]})
    assert generate_locally(plan, tmp_path, model.requests) == model.expected


def test_a_head_that_equals_the_embedding_is_held_once(tmp_path):
    def held(change):
        write(tmp_path, "llama", change, tie_word_embeddings=True)
        whole = LayerRange(0, 4, 4), ["16"] * 4, torch.float32, CPU
        return load_stage(load_config(tmp_path), Checkpoint(tmp_path), *whole).weight_bytes()

    assert held(equal_head) == held(lambda tensors: None) == held(own_head) - 4 * 97 * 32


@pytest.mark.parametrize("named", [False, True])
def test_files_are_chosen_as_transformers_does(tmp_path, named):
    """An old index beside a new model.safetensors; config.json may name other files."""
    write(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    other = {name: torch.randn_like(t) * 0.15 for name, t in tensors.items()}
    save_file(other, tmp_path / "old.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "old.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    if named:
        config = json.loads((tmp_path / "config.json").read_text())
        config["transformers_weights"] = "model.safetensors.index.json"
        (tmp_path / "config.json").write_text(json.dumps(config))
    model = expected(tmp_path)
    assert model.generate([2, 4]) == model.expected
    wanted = other if named else tensors
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(Checkpoint(tmp_path).read(name, (64, 32)), wanted[name])
