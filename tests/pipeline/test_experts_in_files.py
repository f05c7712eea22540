"""Checkpoints of models with experts, whole: what is missing is said, MXFP4 gives its values."""

import json

import pytest
import torch
from families import MAX_NEW, build, generate_locally, hand_made_plan, own_tokens, random_requests
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.inventory import check_checkpoint
from llmpq.errors import UserError
from llmpq.model_lookup import load_model_spec
from llmpq.models.stage_model import load_config

MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}


def rewrite(folder, change=lambda tensors: tensors, **settings):
    """Saves a checkpoint as `change` returns its tensors, and changes settings of config.json."""
    path, config = folder / "model.safetensors", folder / "config.json"
    tensors = change(load_file(path))
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))


def faults(folder) -> str:
    with pytest.raises(UserError) as caught:
        check_checkpoint(load_config(folder), Checkpoint(folder))
    return str(caught.value)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
def test_an_expert_that_is_missing_is_named(tmp_path, family):
    build(family).save_pretrained(tmp_path)
    gone = {"mixtral": "experts.2.w2.", "qwen3_moe": "experts.2.down_proj."}
    part = gone.get(family, "output_linear.")

    def without(tensors):
        return {n: t for n, t in tensors.items() if not ("layers.1." in n and part in n)}

    rewrite(tmp_path, without)
    first = 2 if family in gone else 0
    block = "mlp" if family in gone else "block_sparse_moe"
    name = f"model.layers.1.{block}.experts.{first}.down_proj.weight"
    assert f"the checkpoint has no tensor '{name}'" in faults(tmp_path)


def test_experts_that_would_be_left_out_are_refused(tmp_path):
    build("granitemoe").save_pretrained(tmp_path)

    def fewer_routes(tensors):
        return {n: t[:3] if "router" in n else t for n, t in tensors.items()}

    rewrite(tmp_path, fewer_routes, num_local_experts=3)
    assert "holds 4 experts, but config.json says 3: the others would" in faults(tmp_path)


def as_mxfp4(tensors, model):
    """The experts' matrices as random MXFP4; the model gets their values."""
    generator = torch.Generator().manual_seed(5)
    kept = dict(tensors)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = kept.pop(name).shape
        sizes = experts, outputs, inputs // 32
        blocks = torch.randint(256, (*sizes, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 126, sizes, generator=generator, dtype=torch.uint8)
        kept |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        model.get_parameter(name).data.copy_(values)
    return kept


def test_mxfp4_experts_give_the_tokens_of_their_values(tmp_path):
    model = build("gpt_oss")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: as_mxfp4(tensors, model))
    assert "MXFP4 weights that config.json does not describe" in faults(tmp_path)
    rewrite(tmp_path, **MXFP4)
    weights = Checkpoint(tmp_path)
    assert check_checkpoint(load_config(tmp_path), weights) == []
    assert "experts are MXFP4; they are converted to 16 bits" in weights.note({"16"})
    requests = random_requests(model.config.vocab_size)[:4]
    plan = hand_made_plan(load_model_spec(str(tmp_path)), [1, 4], new=MAX_NEW)
    expected = {r.id: own_tokens(model, r, frozenset()) for r in requests}
    assert generate_locally(plan, tmp_path, requests) == expected
