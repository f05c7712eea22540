"""Counts the table of activations that ships (assets/activations.json) on small models.

`python -m llmpq.models.count_families` prints it: for every family whose row has sizes
(`llmpq.families`), the allocation snapshots of all its variants, with grouped key-value heads and
without.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig

from llmpq.families import FAMILIES
from llmpq.model_spec import ALL_HEADS, Activations
from llmpq.models.count import NUM_LAYERS, count_activations

KV_HEADS, HEADS, HEAD_DIM = 13, 13 * 7, 8 * 17
NAMED = {
    "hidden": 2 * 1009 * HEADS,
    "ffn": 2 * 1013,
    "heads": HEADS,
    "kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab": 2 * 1019,
    "positions": 65537,
}
# The sizes for families whose heads fill the hidden size.
WHOLE = NAMED | {"hidden": HEADS * HEAD_DIM}


def count_families() -> dict[str, Activations]:
    """The snapshots of each family."""
    counted = {}
    for family, row in FAMILIES.items():
        if row.sizes is None:
            continue
        if row.heads_fill_hidden:
            counted[family] = count_family(family, WHOLE)
        else:
            counted[family] = count_family(family, NAMED)
            counted[f"{family}, {ALL_HEADS}"] = count_family(family, NAMED | {"kv_heads": HEADS})
    return counted


def count_family(family: str, sizes: dict[str, int]) -> Activations:
    """The snapshots of all variants of one family at these sizes."""
    row, settings = FAMILIES[family], _configuration(sizes)
    if row.heads_fill_hidden:
        del settings["head_dim"]
    configs = [AutoConfig.for_model(family, **settings | dict(variant)) for variant in row.variants]
    named = dict(sizes)
    if sizes["kv_heads"] == sizes["heads"]:
        del named["kv_heads"]
    return count_activations(configs, named)


def _configuration(sizes: Mapping[str, int]) -> dict[str, Any]:
    """The settings of a configuration of any family, which uses the keys that it knows."""
    return {
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        "ffn_dim": sizes["ffn"],
        "n_inner": sizes["ffn"],
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": sizes["heads"],
        "n_head": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "head_dim": sizes["head_dim"],
        "vocab_size": sizes["vocab"],
        "word_embed_proj_dim": sizes["hidden"],
        "max_position_embeddings": 10**6,
        "max_seq_len": sizes["positions"],
        "pad_token_id": 0,
    }


def main() -> int:
    """Prints the table of all families as JSON."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    print(families_text(count_families()))
    return 0


def families_text(counted: Mapping[str, Activations]) -> str:
    """The table as JSON, with one snapshot a line."""
    blocks = []
    for name, activations in counted.items():
        phases = activations.model_dump(mode="json", exclude_defaults=True)
        lines = [
            f' "{phase}": [\n' + ",\n".join(f"  {json.dumps(m)}" for m in some) + "\n ]"
            for phase, some in phases.items()
        ]
        blocks.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(blocks) + "\n}"


if __name__ == "__main__":
    sys.exit(main())
