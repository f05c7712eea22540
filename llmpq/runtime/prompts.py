"""prompts.jsonl in: checked whole before anything is loaded, then streamed, request by request.

The file is read twice. The first pass validates every line and keeps ids, lengths and a checksum
of each line, but no prompt. The second makes one request at a time, as the engine asks for them,
so tens of thousands of long prompts never lie in memory together. A line that changed in between
ends the run with a message; lines that were added behind the last one wait for the next run.

A line holds a text, token ids or, with `chat`, messages. The model's own chat template turns
messages into tokens; it is rendered in transformers' sandbox and runs no code of its own.
"""

import json
import reprlib
import stat
from array import array
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from zlib import crc32

from llmpq.artifact import MAX_FAULTS
from llmpq.errors import UserError
from llmpq.runtime.request import Request

KEYS = {"id", "prompt", "prompt_token_ids", "max_new_tokens"}
WAYS = ("prompt", "prompt_token_ids", "messages")  # to give the prompt, one a line
MAX_LINE_BYTES = 1 << 26  # a longer line is no prompt; and all of it would have to be in memory


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    chat_template: Any

    def encode(self, text: str) -> list[int]:
        """Text to token ids."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """Token ids to text."""

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        add_generation_prompt: bool,
        tokenize: bool,
        return_dict: bool,
    ) -> list[int]:
        """Messages to token ids."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask of the model."""

    new_tokens: int  # where a line gives no max_new_tokens
    max_positions: int
    vocab_size: int


class PromptFile:
    """A file of prompts that was checked: the ids and lengths of its requests, not their tokens."""

    def __init__(self, path: Path, rules: "_Rules") -> None:
        self.path = path
        self.ids: list[str | int] = []
        self.lengths: list[tuple[int, int]] = []  # (prompt tokens, new tokens), like the ids
        self._rules = rules
        self._checksums, self._line_numbers = array("I"), array("Q")
        self._offsets = array("Q")

    def __len__(self) -> int:
        return len(self.ids)

    def request(self, number: int) -> Request:
        """The request at this position, read from the file now.

        Raises `UserError` where its line is not the one that was checked.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._offsets[number])
                line = file.readline(MAX_LINE_BYTES).rstrip(b"\r\n")
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        if crc32(line) != self._checksums[number]:
            raise self._changed(f"{self.path}:{self._line_numbers[number]}")
        return self._rules.request(line, number)

    def stream(self, done: Container[str | int] = ()) -> Iterator[Request]:
        """The requests whose ids are not in `done`, in the file's order, made one by one."""
        for number, name in enumerate(self.ids):
            if name not in done:
                yield self.request(number)

    def _add(self, request: Request, line: "_Line") -> None:
        self.ids.append(request.id)
        self.lengths.append((len(request.prompt), request.new_tokens))
        self._checksums.append(crc32(line.text))
        self._offsets.append(line.offset)
        self._line_numbers.append(line.number)

    def _changed(self, where: str) -> UserError:
        return UserError(
            f"{where}: changed after it was checked, when the run started; finished requests are "
            "safe, --resume goes on with the file as it is now"
        )


def check_prompts(
    path: Path,
    tokenizer: Tokenizer | None,
    limits: Limits,
    chat: bool = False,
    on_line: Callable[[int], None] | None = None,
) -> PromptFile:
    """Checks every line of a file; `on_line` is called with the number of lines read so far.

    Raises one `UserError` that lists every broken line (the first 20, and how many more).
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{path}: --chat: the model's tokenizer has no chat template; "
            "use a chat model, or give whole prompts without --chat"
        )
    found = PromptFile(path, _Rules(tokenizer, limits, chat))
    faults: list[str] = []
    num_faults = 0
    for number, fault in _check(found, on_line):
        num_faults += 1
        if num_faults <= MAX_FAULTS:
            faults.append(f"{path}:{number}: {fault}")
    if num_faults > MAX_FAULTS:
        faults.append(f"{path}: and {num_faults - MAX_FAULTS} more lines like these")
    if faults:
        raise UserError("\n".join(faults))
    if not found:
        raise UserError(f"{path}: holds no prompts")
    return found


def _check(found: PromptFile, on_line: Callable[[int], None] | None) -> Iterator[tuple[int, str]]:
    """Adds every good line to `found`; the number and the fault of every other one."""
    seen: dict[str | int, int] = {}
    for line in _lines(found.path):
        try:
            request = found._rules.request(line.text, len(found))
            if request.id in seen:
                raise ValueError(f"id {request.id!r} was used on line {seen[request.id]}")
            seen[request.id] = line.number
            found._add(request, line)
        except ValueError as error:
            yield line.number, str(error)
        if on_line is not None:
            on_line(line.number)


class _Line(NamedTuple):
    """A line without its break; `number` counts from 1, `offset` in bytes."""

    number: int
    offset: int
    text: bytes


def _lines(path: Path) -> Iterator[_Line]:
    """Lines that are not blank.

    Only line feeds end a line: other breaks may be in texts. Raises `UserError` for a file that
    cannot be read (twice) or holds no lines.
    """
    try:
        _refuse_unless_regular(path)
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
                if len(line) == MAX_LINE_BYTES:
                    raise UserError(
                        f"{path}:{number}: more than {MAX_LINE_BYTES >> 20} MiB without a line "
                        "break; prompts.jsonl has one request a line"
                    )
                if line.strip():
                    yield _Line(number, offset, line.rstrip(b"\r\n"))
                offset += len(line)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _refuse_unless_regular(path: Path) -> None:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a directory, expected a file")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: is no regular file; prompts are read twice, so save them to one")


@dataclass(frozen=True)
class _Rules:
    """How a line becomes a request; every fault of the line is a `ValueError`."""

    tokenizer: Tokenizer | None
    limits: Limits
    chat: bool

    def request(self, line: bytes, number: int) -> Request:
        data = self._parse(line)
        token_ids = self._token_ids(data)
        new_tokens = data.get("max_new_tokens", self.limits.new_tokens)
        if not _is_int(new_tokens) or new_tokens < 1:
            raise ValueError(
                f"'max_new_tokens' must be a positive integer, found {reprlib.repr(new_tokens)}"
            )
        most = self.limits.max_positions
        if len(token_ids) + new_tokens > most:
            raise ValueError(
                f"{len(token_ids)} prompt + {new_tokens} new tokens are more than "
                f"the {most} positions of the model"
            )
        return Request(data["id"], number, tuple(token_ids), new_tokens)

    def _parse(self, line: bytes) -> dict[str, Any]:
        data = _json(line)
        if not isinstance(data, dict):
            raise ValueError('expected {"id": ..., "prompt": ...}')
        if "messages" in data and not self.chat:
            raise ValueError("'messages' are for chat models: add --chat")
        known = KEYS | {"messages"} if self.chat else KEYS
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"unknown key {_show(unknown[0])}; known: {', '.join(sorted(known))}")
        if not (_is_int(data.get("id")) or isinstance(data.get("id"), str)):
            raise ValueError("'id' must be a text or an integer")
        _refuse_half_characters("'id'", str(data["id"]))
        return data

    def _token_ids(self, data: dict[str, Any]) -> list[int]:
        ways = [name for name in WAYS if name in data]
        if len(ways) != 1:
            more = " or 'messages'" if self.chat else ""
            raise ValueError(f"give either 'prompt' or 'prompt_token_ids'{more}")
        given = data[ways[0]]
        if ways[0] == "prompt_token_ids":
            token_ids = given
        elif ways[0] == "prompt":
            token_ids = self._encode(_checked_text("'prompt'", given))
        else:
            token_ids = self._render(_checked_messages(given))
        if not isinstance(token_ids, list) or not token_ids or not all(map(_is_int, token_ids)):
            raise ValueError("the prompt must hold at least one token")
        outside = next((t for t in token_ids if not 0 <= t < self.limits.vocab_size), None)
        if outside is not None:
            size = self.limits.vocab_size
            raise ValueError(f"token {outside} is outside the vocabulary of {size}")
        return token_ids

    def _encode(self, text: str) -> list[int]:
        if self.chat:
            return self._render([{"role": "user", "content": text}])
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer; give 'prompt_token_ids'")
        return self.tokenizer.encode(text)

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        assert self.tokenizer is not None
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # a template raises whatever its expressions raise
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"the model's chat template fails ({what})") from None


def _json(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None


def _checked_messages(found: Any) -> list[dict[str, str]]:
    if not isinstance(found, list) or not found:
        raise ValueError("'messages' must be a list with at least one message")
    for message in found:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError('a message must be {"role": ..., "content": ...}')
        for name, text in message.items():
            _checked_text(f"'{name}' of a message", text)
    return found


def _checked_text(name: str, found: Any) -> str:
    if not isinstance(found, str):
        raise ValueError(f"{name} must be a text")
    _refuse_half_characters(name, found)
    return found


def _refuse_half_characters(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half a character (a lone surrogate)") from None


def _show(text: str) -> str:
    """Any text in a form that every terminal prints."""
    return f"'{text}'" if text.isprintable() else ascii(text)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
