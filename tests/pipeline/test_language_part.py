"""Models of text and images, given text alone: the tokens of transformers' own whole model."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from families import GROUPED, TinyModel, own_tokens, random_requests
from safetensors.torch import load_file, save_file

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.inventory import check_checkpoint
from llmpq.errors import UserError
from llmpq.language_part import LANGUAGE_PARTS
from llmpq.model_lookup import load_model_spec
from llmpq.models.stage_model import load_config

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "patch_size": 4}
QWEN2_VISION = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 16}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
TEXT = GROUPED | {"head_dim": 8}
# Model type -> settings of the text, of the vision, and of the whole
MODELS = {
    "gemma3": (
        TEXT | {"sliding_window": 8},
        VISION | {"num_hidden_layers": 1, "image_size": 16},
        {"mm_tokens_per_image": 4, "image_token_index": 96},
    ),
    "llama4": (
        TEXT
        | {"moe_layers": [], "num_local_experts": 1, "intermediate_size_mlp": 64}
        | {"attention_chunk_size": 8, "floor_scale": 4, "no_rope_layers": [1, 0, 1, 0]},
        VISION
        | {"num_hidden_layers": 1, "image_size": 16, "vision_output_dim": 16}
        | {"projector_input_dim": 16, "projector_output_dim": 16},
        {"image_token_index": 96},
    ),
    "mistral3": (
        TEXT,
        VISION | {"num_hidden_layers": 1, "image_size": 16, "head_dim": 8},
        {"image_token_index": 96, "tie_word_embeddings": False},
    ),
    "qwen2_vl": (
        GROUPED | {"rope_parameters": MROPE},
        QWEN2_VISION,
        {"tie_word_embeddings": True},
    ),
    "qwen2_5_vl": (
        GROUPED | {"rope_parameters": MROPE},
        QWEN_VISION | {"out_hidden_size": 32},
        {},
    ),
    "qwen3_vl": (
        TEXT | {"rope_parameters": MROPE | {"mrope_interleaved": True}},
        QWEN_VISION | {"deepstack_visual_indexes": [0], "out_hidden_size": 32},
        {},
    ),
}
# Prefixes in files: as transformers 5 saves them, and as older files have them.
NEW, OLD = "model.language_model.", "language_model.model."


@pytest.fixture(scope="module", params=MODELS)
def whole(request, tmp_path_factory):
    """A checkpoint of the whole model, and what transformers generates from text."""
    text, vision, more = MODELS[request.param]
    config = transformers.AutoConfig.for_model(
        request.param, text_config=text, vision_config=vision, **more
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    requests = random_requests(90)
    tiny = TinyModel(folder, requests, frozenset())
    tiny.expected = {one.id: own_tokens(model, one, frozenset()) for one in requests}
    return tiny


def test_every_model_that_is_listed_is_tested():
    assert set(MODELS) == set(LANGUAGE_PARTS)


def test_tokens_are_those_of_the_whole_model(whole):
    for ends in ([4], [1, 4]):
        assert whole.generate(ends) == whole.expected


@pytest.mark.parametrize("prefix", [NEW, OLD, "model."])
def test_files_may_have_any_of_the_prefixes(whole, prefix, tmp_path):
    renamed(whole.folder, tmp_path, prefix)
    [note] = check_checkpoint(load_config(tmp_path), Checkpoint(tmp_path))
    assert "images are not served" in note
    if prefix == OLD:  # the files of the other ones hold no other tensors
        moved = TinyModel(tmp_path, whole.requests, frozenset(), whole.expected)
        assert moved.generate([2, 4]) == whole.expected


def renamed(source: Path, target: Path, prefix: str) -> None:
    """Copies a checkpoint, and puts this prefix before its language model's tensors."""
    tensors = load_file(source / "model.safetensors")
    found = next(old for old in (NEW, OLD, "model.") if any(n.startswith(old) for n in tensors))
    head = "language_model.lm_head.weight" if prefix == OLD else "lm_head.weight"
    new = {
        prefix + n.removeprefix(found) if n.startswith(found) else n: t for n, t in tensors.items()
    }
    new = {head if n.endswith("lm_head.weight") else n: t for n, t in new.items()}
    save_file(new, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())


def test_older_configurations_have_all_settings_at_the_top(whole, tmp_path):
    config = json.loads((whole.folder / "config.json").read_text())
    if not config["model_type"].startswith("qwen2"):
        pytest.skip("only the first Qwen-VL models have them there")
    text = config.pop("text_config") | {"model_type": config["model_type"]}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(text | config))
    flat, nested = (load_model_spec(str(folder)) for folder in (tmp_path, whole.folder))
    assert flat.model_copy(update={"name": nested.name}) == nested
    assert flat.has_other_parts


def test_tensors_that_are_not_known_are_refused_still(whole, tmp_path):
    renamed(whole.folder, tmp_path, NEW)
    tensors = load_file(tmp_path / "model.safetensors") | {
        "model.language_model.more": torch.ones(1)
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="'model.language_model.more' is not part of this model"):
        check_checkpoint(load_config(tmp_path), Checkpoint(tmp_path))
