"""Checkpoints as transformers writes them, of every family, pass the inventory, whole or bare."""

import pytest
import torch
from families import FAMILIES, build
from safetensors.torch import load_file, save_file

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.inventory import check_checkpoint
from llmpq.models.stage_model import load_config


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_served_whole(tmp_path, family):
    model = build(family)
    model.save_pretrained(tmp_path)
    assert check_checkpoint(load_config(tmp_path), Checkpoint(tmp_path)) == []

    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # tied matrices under both names
    if family != "gpt_neox":  # whose head has another name in files
        assert check_checkpoint(load_config(tmp_path), Checkpoint(tmp_path)) == []

    prefix = f"{model.base_model_prefix}."  # as the bare decoder is written
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    save_file(bare, path, {"format": "pt"})
    assert len(check_checkpoint(load_config(tmp_path), Checkpoint(tmp_path))) == 1  # the .bin file
