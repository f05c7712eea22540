"""The model's tokenizer and end-of-text tokens, from its own directory."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from llmpq.errors import UserError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer, or None where the directory has none (token ids can still be given)."""
    if not any((folder / name).is_file() for name in FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raise their own and plain exceptions alike
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {error}") from None


def end_tokens(folder: Path, config: Any) -> frozenset[int]:
    """Token ids that end a request, from generation_config.json or config.json."""
    path = folder / "generation_config.json"
    value = config.eos_token_id
    if path.is_file():
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id", value)
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: not valid JSON: {error}") from None
    if value is None:
        return frozenset()
    return frozenset(value if isinstance(value, list) else [value])
