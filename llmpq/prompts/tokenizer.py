"""The model's tokenizer and end-of-text tokens, from its own directory.

transformers reads tokenizers, but no byte-order marks: it is given copies without marks of files
that have one. Every fault of a file is a `UserError` before anything is loaded.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from llmpq.artifact import BYTE_ORDER_MARKS, parse_json, read_text, show_value
from llmpq.errors import UserError

CONFIG = "tokenizer_config.json"
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", CONFIG)
TEXTS = (".json", ".txt", ".jinja")  # the suffixes of text files
PROBE = "Once"  # a text that every tokenizer must be able to encode and decode
NEEDS_CODE = (
    "the tokenizer needs Python code of its own ('auto_map'), which llmpq never runs; if the "
    "model has a tokenizer.json, use a copy of its folder without that entry"
)
MOST_SHOWN = 300  # characters of a message, with the library's own message


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer, or None where the directory has none (token ids can still be given)."""
    if not any((folder / name).is_file() for name in FILES):
        return None
    with _without_marks(folder) as plain, _as_user_error(folder):
        tokenizer = AutoTokenizer.from_pretrained(plain, trust_remote_code=False)
        ids = tokenizer.encode(PROBE)
        if not isinstance(ids, list) or not all(isinstance(one, int) for one in ids):
            raise TypeError(f"it encodes text as {ids!r}, expected token ids")
        tokenizer.decode(ids, skip_special_tokens=True)
    return tokenizer


def end_tokens(folder: Path, config: Any) -> frozenset[int]:
    """Token ids that end a request, from generation_config.json or config.json."""
    path = folder / "generation_config.json"
    source, value = folder / "config.json", config.eos_token_id
    if path.is_file():
        data = parse_json(path)
        if not isinstance(data, dict):
            raise UserError(f"{path}: expected keys and values, found {str(data)[:60]}")
        if "eos_token_id" in data:
            source, value = path, data["eos_token_id"]
    found = value if isinstance(value, list) else [] if value is None else [value]
    for one in found:
        if not isinstance(one, int) or isinstance(one, bool):
            raise UserError(
                f"{source}: 'eos_token_id' must be a token id or a list of them, found "
                f"{repr(value)[:60]}"
            )
        if not 0 <= one < config.vocab_size:
            raise UserError(
                f"{source}: 'eos_token_id' {show_value(one)} is outside the vocabulary of "
                f"{config.vocab_size}, so that no text would end there; if that is meant, give "
                "--ignore-eos"
            )
    return frozenset(found)


@contextmanager
def _without_marks(folder: Path) -> Iterator[Path]:
    """The folder, or one with copies without byte-order marks where text files have marks."""
    marked = [path for path in folder.iterdir() if path.suffix in TEXTS and _has_mark(path)]
    if not marked:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="llmpq-") as name:
        plain = Path(name)
        for path in folder.iterdir():
            if path in marked:
                (plain / path.name).write_text(read_text(path), encoding="utf-8")
            elif path.is_file():
                (plain / path.name).symlink_to(path.resolve())
        yield plain


def _has_mark(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(4).startswith(tuple(BYTE_ORDER_MARKS))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


@contextmanager
def _as_user_error(folder: Path) -> Iterator[None]:
    """Turns all errors of a tokenizer into a `UserError`."""
    try:
        yield
    except BaseException as error:  # a panic of the Rust library is no `Exception`
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            raise UserError(f"{folder / CONFIG}: {NEEDS_CODE}") from None
        said = " ".join(f"{type(error).__name__}: {error}".split())
        message = f"{folder}: its tokenizer cannot be loaded: "
        raise UserError(message + said[: max(120, MOST_SHOWN - len(message))]) from None
