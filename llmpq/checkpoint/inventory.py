"""Checks by the headers of a checkpoint's files that all of its tensors are served.

Every stored tensor must be read by some stage, or be known to be redundant (rotary frequencies that
follow from config.json, masks, biases of zeros, tensors that the model's class in transformers
ignores, layers that predict further tokens). Formats of quantized weights that cannot be read are
refused by name. Any other tensor is refused too, since leaving it out would change the model's
answers. So are tensors that are missing, have another shape, or have a type that is no weight.

Not covered: values, which are read when weights are loaded, except for one quantized weight.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch

from llmpq.checkpoint.checkpoint import Checkpoint
from llmpq.checkpoint.checkpoint_files import StoredTensor, unread
from llmpq.errors import UserError
from llmpq.language_part import OTHER_PARTS
from llmpq.models.raw_tensors import RawTensor
from llmpq.models.stage_model import LayerRange, StageModel

SUPPORTED = (
    "supported are plain weights, and gptq, compressed-tensors, fp8 or mxfp4 weights that "
    "config.json describes"
)
# Name endings of tensors that only quantized weights or adapters have.
FORMATS = (
    (r"\.weight_scale_inv$", "weights with scales by block that llmpq cannot apply"),
    (r"\.(weight_scale_2|weight_global_scale)$", "4-bit floats (NVFP4)"),
    (r"\.weight_packed$", "compressed-tensors weights that config.json does not describe"),
    (r"\.(weight_scale|input_scale|act_scale)$", "weights with scales that llmpq cannot apply"),
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ weights that config.json does not describe"),
    (r"\.(absmax|quant_map|nested_absmax|quant_state\.[\w]+)$", "bitsandbytes 4-bit weights"),
    (r"\.(SCB|weight_format)$", "bitsandbytes 8-bit weights"),
    (r"\.(W_q|weight\.W_q)$", "HQQ weights"),
    (r"_blocks$|_scales$", "MXFP4 weights that config.json does not describe"),
    (r"\.(codes|codebooks)$", "AQLM weights"),
    (r"\.(weight\._data|weight\._scale)$", "Quanto weights"),
    (r"\.(Qidxs|SU|SV|trellis|q_weight|q_scale)$", "QuIP or EXL weights"),
    (r"\.lora_(A|B|embedding_A|embedding_B)\b|\.base_layer\.", "a LoRA adapter; merge it first"),
)
CACHE_SCALE = r"attn\.(k|v|kv|q|prob)_scale$|\.[kv]_proj\.output_scale$"  # scales of an 8-bit cache
REDUNDANT = (
    r"rotary_emb\.(\w+_)?inv_freq$",
    r"rotary_emb\.(cos|sin)_cached$",
    r"\.masked_bias$",
    r"(^|\.)position_ids$",
    CACHE_SCALE,
    r"^v_head\.",  # the value head of reinforcement learning
)
PREFIXES = {
    "module.": "as saved by data-parallel training; save model.module instead",
    "_orig_mod.": "as saved from a compiled model; save model._orig_mod instead",
    "_fsdp_wrapped_module.": "as saved by sharded training; gather the full state and save that",
    "language_model.": "as in a multimodal model; save its text model alone",
    "base_model.model.": "as in a PEFT model; merge its adapter first (merge_and_unload)",
}


def check_checkpoint(config: Any, weights: Checkpoint) -> list[str]:
    """Notes on redundant tensors and files that are not read.

    Raises `UserError` with one message where a tensor is missing, unfit or would be left out.
    """
    stage = _whole_model(config)
    wanted = {raw.name: raw for raw in stage.parameters_to_load()}
    if stage.head_is_tied:
        _tie_names(wanted, stage, weights)
    consumed = {source for name in wanted for source in weights.sources(name)}
    unread_names = [name for name in weights.stored if name not in consumed]
    left = [name for name in unread_names if not _is_of_other_part(weights, name)]
    _refuse_formats(weights, left)
    _refuse_missing(weights, wanted, left)
    for raw in wanted.values():
        _check_tensor(stage, weights, raw)
    _refuse_more_experts(weights, wanted)
    _try_one(weights, wanted.values())
    unknown = _unknown(stage, weights, left)
    later = _later_layers(stage, weights, unknown)
    _refuse_rest(stage, weights, [name for name in unknown if name not in later])
    notes = [
        unread(weights.folder),
        _note_on(later),
        _note_on_head(stage, weights),
        _note_on_other_parts(weights, len(unread_names) - len(left)),
    ]
    return [f"{weights.folder}: {note}" for note in notes if note]


def _whole_model(config: Any) -> StageModel:
    """The whole model on the meta device."""
    total = config.num_hidden_layers
    layers, device = LayerRange(0, total, total), torch.device("meta")
    return StageModel(config, layers, ["16"] * total, torch.bfloat16, device)


def _tie_names(wanted: dict[str, RawTensor], stage: StageModel, weights: Checkpoint) -> None:
    """Removes the tied name that is not stored, where the other one is."""
    both = stage.head_name, stage.embedding_name
    absent = [name for name in both if not weights.stores(name)]
    if absent:
        wanted.pop(absent[0], None)


def _refuse_formats(weights: Checkpoint, left: Sequence[str]) -> None:
    for pattern, what in FORMATS:
        found = [n for n in left if re.search(pattern, n) and not re.search(CACHE_SCALE, n)]
        if found:
            path = weights.stored[found[0]].path
            what = f"{what} (float8)" if any(map(_is_float8, weights.stored.values())) else what
            raise UserError(f"{path}: tensor '{found[0]}' belongs to {what}; {SUPPORTED}")


def _is_float8(stored: StoredTensor) -> bool:
    return stored.dtype.startswith("F8")


def _refuse_missing(weights: Checkpoint, wanted: dict[str, RawTensor], left: Sequence[str]) -> None:
    missing = [name for name in wanted if not weights.stores(name)]
    if not missing:
        return
    prefix = _prefix(missing, left)
    if prefix is not None:
        whys = [why for part, why in PREFIXES.items() if f".{prefix}".endswith(f".{part}")]
        why = whys[0] if whys else "which this type of model does not have; remove that prefix"
        raise UserError(f"{weights.folder}: names of tensors start with '{prefix}', {why}")
    more = f" (and {len(missing) - 1} more are missing)" if len(missing) > 1 else ""
    if missing == ["lm_head.weight"]:
        more = "; if its head is the embedding, config.json must say tie_word_embeddings: true"
    raise UserError(f"{weights.folder}: the checkpoint has no tensor '{missing[0]}'{more}")


def _prefix(missing: Iterable[str], left: Sequence[str]) -> str | None:
    """The prefix of stored names before a missing name, or before its last parts."""
    of_layers = [name for name in missing if any(part.isdigit() for part in name.split("."))]
    for name in of_layers[:10]:
        for ending in (name, name.partition(".")[2]):
            found = next((stored for stored in left if stored.endswith(f".{ending}")), None)
            if found is not None:
                return found.removesuffix(ending)
    return None


def _refuse_more_experts(weights: Checkpoint, wanted: Iterable[str]) -> None:
    """Raises `UserError` where a stacked tensor holds experts that the model would leave out."""
    used = Counter[str]()
    for place in map(weights.place, wanted):
        if place is not None and place.expert is not None:
            used[place.stored] = max(used[place.stored], place.expert + 1)
    for name, count in used.items():
        stored = weights.stored[name]
        if stored.shape[0] > count:
            raise UserError(
                f"{stored.path}: tensor '{name}' holds {stored.shape[0]} experts, but config.json "
                f"says {count}: the others would be left out"
            )


def _check_tensor(stage: StageModel, weights: Checkpoint, raw: RawTensor) -> None:
    """Checks the shape of a tensor, and that its values are floats without scales."""
    if not weights.is_packed(raw.name) and not weights.is_small_float(raw.name):
        _check_plain(stage, weights, raw)
    elif raw.name in weights and raw.name not in weights.sources(raw.name):
        raise weights.fault(raw.name, "is stored beside its codes; remove the outdated one")
    weights.stored_bytes(raw.name, raw.shape)


def _try_one(weights: Checkpoint, wanted: Iterable[RawTensor]) -> None:
    """Reads the first quantized weight, which finds settings that do not fit the tensors."""
    held = (
        raw for raw in wanted if weights.is_packed(raw.name) or weights.is_small_float(raw.name)
    )
    for raw in islice(held, 1):
        weights.read(raw.name, raw.shape)


def _check_plain(stage: StageModel, weights: Checkpoint, raw: RawTensor) -> None:
    names = weights.sources(raw.name)
    if len(names) > 1:
        raise UserError(
            f"{weights.folder}: holds both '{names[0]}' and '{names[1]}', which are the same tensor"
        )
    stored = weights.stored[names[0]]
    if not stored.is_plain_float and not raw.is_buffer:
        what = "float8 without scales" if _is_float8(stored) else "not a float of 16 bits or more"
        raise weights.fault(raw.name, f"is {stored.dtype}, {what}; {SUPPORTED}")
    is_vocabulary = raw.name in (stage.embedding_name, stage.head_name)
    if is_vocabulary and len(stored.shape) == 2 and stored.shape[1:] == raw.shape[1:]:
        rows, vocabulary = stored.shape[0], raw.shape[0]
        if rows != vocabulary:
            raise weights.fault(
                raw.name,
                f"has {rows} rows, but vocab_size of config.json is {vocabulary}; set it to {rows} "
                "if the rows were padded, or save the model anew",
            )


def _later_layers(stage: StageModel, weights: Checkpoint, left: Sequence[str]) -> dict[str, int]:
    """Tensors of layers beyond the last one (which predict further tokens, MTP), and the layer."""
    inner = f"{stage.family.decoder}.{stage.family.layers}".partition(".")[2]
    total = stage.layers.total
    more = getattr(stage.config, "num_nextn_predict_layers", None) or 0
    found = {name: _layer(name, inner) for name in left}
    beyond = {name: n for name, n in found.items() if n is not None and n >= total}
    last = max(beyond.values(), default=0)
    if beyond and last >= total + more:
        raise UserError(
            f"{weights.folder}: has tensors of layer {last}, but num_hidden_layers of config.json "
            f"is {total}: those would be left out; set it to {last + 1}, or remove them"
        )
    return beyond


def _note_on(later: dict[str, int]) -> str | None:
    if not later:
        return None
    return f"{len(later)} tensors of multi-token prediction (MTP) layers are not used"


def _is_of_other_part(weights: Checkpoint, name: str) -> bool:
    """Whether a tensor belongs to a part of the model that is not served."""
    return weights.has_other_parts and re.search(OTHER_PARTS, name) is not None


def _note_on_other_parts(weights: Checkpoint, count: int) -> str | None:
    if not weights.has_other_parts:
        return None
    return f"the {count} tensors beside the language model are not read: images are not served"


def _note_on_head(stage: StageModel, weights: Checkpoint) -> str | None:
    head, embedding = stage.head_name, stage.embedding_name
    if not stage.head_is_tied or not weights.stores(head) or not weights.stores(embedding):
        return None
    shape = weights.stored[weights.sources(embedding)[0]].shape
    if weights.equal(head, embedding, shape):
        return None
    return (
        f"'{head}' differs from the embedding and is used, though config.json says "
        "tie_word_embeddings; a stage with both takes that much more memory than planned"
    )


def _layer(name: str, inner: str) -> int | None:
    found = re.match(rf"(?:\w+\.)?{re.escape(inner)}\.(\d+)\.", name)
    return int(found[1]) if found else None


def _unknown(stage: StageModel, weights: Checkpoint, left: Sequence[str]) -> list[str]:
    """The names that are not known to be redundant."""
    ignored = getattr(stage.model, "_keys_to_ignore_on_load_unexpected", None) or ()
    known = [re.compile(pattern) for pattern in (*REDUNDANT, *ignored)]
    unknown = [name for name in left if not any(pattern.search(name) for pattern in known)]
    # AutoGPTQ writes biases of zeros for linears without a bias.
    return [n for n in unknown if not n.endswith(".bias") or weights.tensor(n).any()]


def _refuse_rest(stage: StageModel, weights: Checkpoint, rest: Sequence[str]) -> None:
    if rest:
        more = f" (and {len(rest) - 1} more)" if len(rest) > 1 else ""
        raise UserError(
            f"{weights.stored[rest[0]].path}: tensor '{rest[0]}'{more} is not part of this model "
            f"according to config.json ('{stage.config.model_type}') and would be left out"
        )
