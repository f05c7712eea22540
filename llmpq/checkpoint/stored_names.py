"""Where files hold the tensors of a stage: under which name, and which part of a stacked tensor.

A stage names every expert's matrix apart, as most checkpoints do ("mlp.experts.7.gate_proj").
Others have names of their own, or hold all experts of a layer in one tensor:

    Mixtral, PhiMoE  block_sparse_moe.experts.7.w1 (gate), w3 (up), w2 (down); block_sparse_moe.gate
    transformers     experts.gate_up_proj [E, 2I, H], experts.down_proj [E, H, I]
    Llama 4          the same, transposed
    gpt-oss          the same, transposed, gate and up interleaved, with biases; or as MXFP4
    Granite MoE      input_linear.weight [E, 2I, H], output_linear.weight [E, H, I]

The names are those that transformers' `conversion_mapping` (5.23) maps to its own; the family's row
says how its stacked tensors are laid out.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llmpq.artifact import parse_json
from llmpq.families import StackedExperts, family_for

EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(gate|up|down)_proj(?:\.(weight|bias))?$")
OF_EXPERT = re.compile(r"\.experts\.(\d+)\.(gate|up|down)_proj\b")
SHORT = {"gate": "w1", "up": "w3", "down": "w2"}
RENAMED = (
    (re.compile(r"\.mlp\.gate\.moe_statics\."), ".mlp.moe_statics."),  # ERNIE
    (re.compile(r"\.mlp\.(gate|router)\."), ".block_sparse_moe.gate."),  # Mixtral, PhiMoE
    (re.compile(r"\.router\.weight$"), ".router.layer.weight"),  # Granite MoE
)
HALVES = {"gate": 0, "up": 1}


class Place(NamedTuple):
    """All of the tensor `stored`, or the part of one expert of a stacked tensor.

    `half` is 0 for the gate's half of a tensor that holds gate and up, 1 for the other.
    """

    stored: str
    expert: int | None = None
    half: int | None = None


Index = tuple[int | slice, ...]


def places(name: str) -> Iterator[Place]:
    """Where files may hold the tensor that a stage calls `name`, the usual place first."""
    yield Place(name)
    if OF_EXPERT.search(name):
        short = OF_EXPERT.sub(lambda found: f".experts.{found[1]}.{SHORT[found[2]]}", name)
        renamed = short.replace(".mlp.experts.", ".block_sparse_moe.experts.")
        yield from map(Place, dict.fromkeys((short, renamed)))
        yield from _stacked(name)
    else:
        yield from (Place(old.sub(new, name)) for old, new in RENAMED if old.search(name))


def stacked_name(linear: str) -> tuple[str, int, int | None] | None:
    """The stacked tensor, expert and half of an expert's linear; None for other linears."""
    found = EXPERT.match(linear)
    if found is None:
        return None
    half = HALVES.get(found[3])
    stacked = "down_proj" if half is None else "gate_up_proj"
    return f"{found[1]}.experts.{stacked}", int(found[2]), half


def _stacked(name: str) -> Iterator[Place]:
    """Where stacked tensors may hold an expert's weight or bias."""
    found, stacked = EXPERT.match(name), stacked_name(name)
    if found is None or stacked is None or found[4] is None:
        return
    path, expert, half = stacked
    if found[4] == "bias":
        yield Place(f"{path}_bias", expert, half)
        return
    yield Place(path, expert, half)
    if half == HALVES["up"]:  # experts without a gate
        yield Place(f"{found[1]}.experts.up_proj", expert)
    granite = "output_linear" if half is None else "input_linear"
    yield Place(f"{found[1]}.{granite}.weight", expert, half)


def stacked_experts(folder: Path) -> StackedExperts:
    """How the family of the model in a directory stacks its experts, by its config.json."""
    path = folder / "config.json"
    config = parse_json(path) if path.is_file() else None
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    model_type = config.get("model_type") if isinstance(config, dict) else None
    return family_for(model_type if isinstance(model_type, str) else "").stacked


def expert_index(place: Place, shape: tuple[int, ...], layout: StackedExperts) -> Index:
    """The index of an expert's part in a stacked tensor of this shape, before it is transposed."""
    assert place.expert is not None
    index: list[int | slice] = [place.expert, *[slice(None)] * (len(shape) - 1)]
    if place.half is not None:
        outputs = -1 if layout.transposed or len(shape) == 2 else 1
        size = shape[outputs] // 2
        start = place.half * size
        apart = slice(place.half, None, 2) if layout.interleaved else slice(start, start + size)
        index[outputs] = apart
    return tuple(index)


def expert_shape(place: Place, shape: tuple[int, ...], layout: StackedExperts) -> tuple[int, ...]:
    """The shape `[out, in]` or `[out]` of the part of a stacked tensor of this shape."""
    inner = shape[1:]
    if layout.transposed and len(inner) == 2:
        inner = inner[::-1]
    return inner if place.half is None else (inner[0] // 2, *inner[1:])
