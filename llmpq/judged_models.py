"""Specs of published models that ship with llmpq, so that planning them needs no torch.

They are what `llmpq.evaluation.judge` finds for the configurations in configs/models of families
without sizes of their own (`python scripts/judge_models.py` writes them). A model is recognized by
its settings; those that no layer reads do not count.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from llmpq.model_spec import ASSETS, ModelSpec

FILE = ASSETS / "judged_models.json"
# Settings that say nothing about sizes of layers.
IGNORED = (
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    *("quantization_config", "use_cache", "bos_token_id", "eos_token_id"),
)


def settings_key(config: Mapping[str, Any]) -> str:
    """Equal for configurations that differ in ignored settings alone."""
    counted = {name: value for name, value in config.items() if name not in IGNORED}
    text = json.dumps(counted, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def shipped_spec(config: Mapping[str, Any]) -> ModelSpec | None:
    """The spec of a model whose settings are those of one that ships; None for others."""
    found = _shipped().get(settings_key(config))
    return None if found is None else ModelSpec.model_validate(found)


@lru_cache(maxsize=1)
def _shipped() -> Mapping[str, Any]:
    data: Mapping[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return data
