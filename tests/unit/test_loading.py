"""What loading shows, and that a stage reads its own tensors and no others."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmpq.artifact import parse_json, write_text
from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.loader import load_stage
from llmpq.checkpoint.packed_cache import NO_CACHE
from llmpq.model_spec import ASSETS
from llmpq.models.stage_model import LayerRange, load_config
from llmpq.render.loading import shown_loading
from llmpq.runtime.run_inputs import RunFiles, open_cache
from llmpq.runtime.weights_hash import weights_hash

CPU = torch.device("cpu")
TINY_TALES = ASSETS / "tiny-tales"


def load(weights, first, end, cache=NO_CACHE):
    layers, config = LayerRange(first, end, 8), load_config(TINY_TALES)
    precisions = ["4", "16", "8", "3"] * 2
    return load_stage(
        config, weights, layers, precisions[first:end], torch.float32, CPU, cache=cache
    )


class Watched(Checkpoint):
    """Remembers which files it opened, and what for."""

    def __init__(self, folder):
        super().__init__(folder)
        self.opened: list[tuple[str, str]] = []

    def _read(self, path, name, part=None):
        self.opened.append((path.name, name))
        return super()._read(path, name, part)


@pytest.fixture
def shards(tmp_path):
    """The model in one file a layer, and one for all else, with their index."""
    import json
    import shutil

    shutil.copy(TINY_TALES / "config.json", tmp_path)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(TINY_TALES / "model.safetensors").items():
        layer = next((part for part in name.split(".") if part.isdigit()), "rest")
        files.setdefault(f"model-{layer}.safetensors", {})[name] = tensor
    for file, tensors in files.items():
        save_file(tensors, tmp_path / file)
    places = {name: file for file, tensors in files.items() for name in tensors}
    index = tmp_path / "model.safetensors.index.json"
    write_text(index, json.dumps({"metadata": {}, "weight_map": places}))
    return tmp_path


def test_a_stage_reads_its_own_tensors_once_and_opens_no_other_file(shards):
    places = parse_json(shards / "model.safetensors.index.json")["weight_map"]
    config, seen = load_config(TINY_TALES), []
    for first, end in ((0, 3), (3, 5), (5, 8)):
        weights = Watched(shards)
        load(weights, first, end)
        names = [name for _, name in weights.opened]
        assert len(set(names)) == len(names)
        assert all(places[name] == file for file, name in weights.opened)
        wanted = {f"model-{layer}.safetensors" for layer in range(first, end)}
        assert {file for file, _ in weights.opened} - {"model-rest.safetensors"} == wanted
        seen += names
    twice = {"model.embed_tokens.weight"} if config.tie_word_embeddings else set()
    assert set(seen) == set(places)
    assert {name for name in seen if seen.count(name) > 1} == twice


def test_shards_load_as_one_file_does(shards):
    one, many = load(Checkpoint(TINY_TALES), 2, 6), load(Checkpoint(shards), 2, 6)
    assert weights_hash(one) == weights_hash(many)


@pytest.mark.parametrize("stages", [1, 2])
def test_loading_shows_layers_of_the_stage_as_they_come(monkeypatch, stages):
    said, named = [], []

    class Shown:
        def __init__(self, out, what, total):
            named.append((what, total))

        def update(self, done, detail=""):
            said.append((done, detail))

        def close(self):
            pass

    monkeypatch.setattr("llmpq.render.progress.ProgressBar", Shown)
    cut = 8 // stages
    plan = SimpleNamespace(
        stages=[SimpleNamespace(first_layer=i * cut, num_layers=cut) for i in range(stages)]
    )
    rank, first = stages - 1, 8 - cut
    with shown_loading(plan, rank, False, NO_CACHE) as cache:
        shown = load(Checkpoint(TINY_TALES), first, 8, cache)
    assert named == [("stage 1: loading, layers" if stages > 1 else "loading, layers", cut)]
    assert [done for done, _ in said] == sorted(done for done, _ in said)
    assert {done for done, _ in said} == set(range(cut))
    assert (0, f"model.layers.{first}.mlp.up_proj.weight") in said
    assert weights_hash(shown) == weights_hash(load(Checkpoint(TINY_TALES), first, 8))


def test_without_a_folder_nothing_is_kept():
    files = RunFiles(plan=Path("p"), prompts=Path("q"))
    assert open_cache(SimpleNamespace(), files, SimpleNamespace(), print) is None


def test_what_is_wrong_with_the_folder_is_told(tmp_path):
    from llmpq.quantizer import Quantizer

    files, told = RunFiles(plan=Path("p"), prompts=Path("q"), cache=tmp_path), []
    plan = SimpleNamespace(quantizer=Quantizer())
    for _ in range(2):
        cache = open_cache(plan, files, Checkpoint(TINY_TALES), told.append)
        load(Checkpoint(TINY_TALES), 0, 1, cache)
        for path in tmp_path.glob("*.safetensors"):
            path.write_bytes(b"")
    assert len(told) == 7 and all(str(tmp_path) in line for line in told)
