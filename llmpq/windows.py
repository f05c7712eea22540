"""Which layers of a model attend to a window of recent tokens alone, from its settings.

A window of W tokens holds a token and the W - 1 before it ("sliding_attention" in the settings of
transformers). Chunked attention (Llama 4) cuts a text into chunks of W tokens, and a token attends
to those before it in its chunk; what must be kept is the same. Planning and running both call
`windows_of`: planning with the settings of a `config.json`, whose families fill in what it leaves
out (`llmpq.family_sizes`), running with transformers' own configuration.

Not covered: models that hide tokens in other ways than by these settings; their layers keep all.
"""

from collections.abc import Sequence
from typing import Any

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
# Model types whose settings list no kinds of layers: all have the window, where one is set. Read
# from the classes of transformers 5.23, which otherwise make a mask for each kind of layer.
ALL_SLIDING = ("mistral", "mixtral", "phi3", "phimoe", "qwen3_moe", "starcoder2")


def windows_of(
    layer_types: Sequence[str], sliding: int | None, chunk: int | None = None
) -> tuple[int | None, ...]:
    """Of every layer the most tokens that it attends to; None where there is no limit.

    `sliding`: tokens of a sliding window; `chunk`: of a chunk of attention.
    """
    sizes = {SLIDING: sliding or None, CHUNKED: chunk or None}
    return tuple(sizes.get(kind) for kind in layer_types)


def configured_windows(config: Any) -> tuple[int | None, ...]:
    """`windows_of` the layers of transformers' configuration `config`."""
    sliding = getattr(config, "sliding_window", None)
    if config.model_type in ALL_SLIDING:
        kinds = [SLIDING] * config.num_hidden_layers
    else:
        kinds = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    return windows_of(kinds, sliding, getattr(config, "attention_chunk_size", None))
