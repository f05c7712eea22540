"""prompts.jsonl in, out.jsonl out: one line a request, checked before anything is loaded."""

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmpq.artifact import read_text
from llmpq.errors import UserError
from llmpq.runtime.batching import Request

KEYS = {"id", "prompt", "prompt_token_ids", "max_new_tokens"}


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Text to token ids."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """Token ids to text."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask of the model."""

    new_tokens: int  # where a line gives no max_new_tokens
    max_positions: int
    vocab_size: int


def read_requests(path: Path, tokenizer: Tokenizer | None, limits: Limits) -> list[Request]:
    """All requests of a file; every broken line in one `UserError`."""
    requests: list[Request] = []
    faults: list[str] = []
    seen: dict[str | int, int] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):  # other breaks may be in texts
        if not line.strip():
            continue
        try:
            request = _request(line, len(requests), tokenizer, limits)
            if request.id in seen:
                raise ValueError(f"id {request.id!r} was used on line {seen[request.id]}")
        except ValueError as error:
            faults.append(f"{path}:{number}: {error}")
            continue
        seen[request.id] = number
        requests.append(request)
    if faults:
        more = [f"{path}: and {len(faults) - 20} more lines like these"] if faults[20:] else []
        raise UserError("\n".join(faults[:20] + more))
    if not requests:
        raise UserError(f"{path}: holds no prompts")
    return requests


def _request(line: str, number: int, tokenizer: Tokenizer | None, limits: Limits) -> Request:
    data = _parse(line)
    token_ids = _token_ids(data, tokenizer, limits.vocab_size)
    new_tokens = data.get("max_new_tokens", limits.new_tokens)
    if not _is_int(new_tokens) or new_tokens < 1:
        raise ValueError(f"'max_new_tokens' must be a positive integer, found {new_tokens!r}")
    total = len(token_ids) + new_tokens
    if total > limits.max_positions:
        raise ValueError(
            f"{len(token_ids)} prompt + {new_tokens} new tokens are more than "
            f"the {limits.max_positions} positions of the model"
        )
    return Request(data["id"], number, tuple(token_ids), new_tokens)


def _parse(line: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError('expected {"id": ..., "prompt": ...}')
    unknown = sorted(set(data) - KEYS)
    if unknown:
        raise ValueError(f"unknown key '{unknown[0]}'; known: {', '.join(sorted(KEYS))}")
    if not (_is_int(data.get("id")) or isinstance(data.get("id"), str)):
        raise ValueError("'id' must be a text or an integer")
    if not _is_encodable(str(data["id"])):
        raise ValueError("'id' holds half a character (a lone surrogate)")
    return data


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _token_ids(data: dict[str, Any], tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    if ("prompt" in data) == ("prompt_token_ids" in data):
        raise ValueError("give either 'prompt' or 'prompt_token_ids'")
    if "prompt" in data:
        if not isinstance(data["prompt"], str):
            raise ValueError("'prompt' must be a text")
        if tokenizer is None:
            raise ValueError("the model has no tokenizer; give 'prompt_token_ids'")
        token_ids = tokenizer.encode(data["prompt"])
    else:
        token_ids = data["prompt_token_ids"]
    if not isinstance(token_ids, list) or not token_ids or not all(map(_is_int, token_ids)):
        raise ValueError("the prompt must hold at least one token")
    outside = [t for t in token_ids if not 0 <= t < vocab_size]
    if outside:
        raise ValueError(f"token {outside[0]} is outside the vocabulary of {vocab_size}")
    return token_ids


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class ResultFile:
    """out.jsonl, appended to as requests end. Opened for resuming, it drops a torn last line."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self.finished: set[str | int] = set()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another run is writing to it") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        if resume:
            self._keep_whole_lines()
        else:
            self._file.truncate(0)

    def write(self, request: Request, token_ids: list[int], stopped: bool, text: str) -> None:
        """One finished request."""
        line = {
            "id": request.id,
            "text": text,
            "token_ids": token_ids,
            "num_prompt_tokens": len(request.prompt),
            "num_new_tokens": len(token_ids),
            "finish_reason": "stop" if stopped else "length",
        }
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Everything to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _keep_whole_lines(self) -> None:
        """Reads finished ids; cuts off a last line that was not written to its end."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        torn = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        for number, line in enumerate(lines, 1):
            self.finished.add(_finished_id(line, f"{self.path}:{number}"))
        if torn:
            with self.path.open("rb+") as file:
                file.truncate(sum(map(len, lines)))


def _finished_id(line: bytes, where: str) -> str | int:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        data = None
    found: Any = data.get("id") if isinstance(data, dict) else None
    if not (_is_int(found) or isinstance(found, str)):
        raise UserError(f"{where}: not a result of llmpq-run, so --resume cannot go on from here")
    return found  # type: ignore[no-any-return]
