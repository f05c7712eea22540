"""Turns a line of a prompts file into a request, and decides what happens to lines that cannot.

A line is llmpq's own ({"id", "prompt" | "prompt_token_ids" | "messages", "max_new_tokens"}) or one
of OpenAI's batch files ({"custom_id", "method", "url", "body": {...}}); a file may have both.
There are three kinds of faults. A line that is no request at all (not JSON, no id, an invalid
number of tokens) is a `ValueError`, and the file is not run. A request that only this model or this
run cannot do (too long, an image, an odd chat, several answers) fails alone: `CheckedLine.refusal`
says why. Keys that change no answer are ignored and counted: `CheckedLine.left_out` names them.

Messages become tokens by the model's own chat template, which transformers renders in a sandbox.
"""

import json
from array import array
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from zlib import crc32

from llmpq.artifact import FETCH_LFS, is_lfs_pointer, no_repeated_keys, show_value
from llmpq.errors import MOST_LISTED, one_line
from llmpq.prompts.chat_messages import (
    ChatMessage,
    Refused,
    messages_of,
    refuse_half_characters,
    text_of,
)
from llmpq.prompts.own_settings import (
    BODY_KNOWN,
    OWN_KNOWN,
    drawn_by,
    refuse_unmet,
    stops_of,
    with_settings,
)
from llmpq.prompts.request import Request

TooLong = Literal["error", "truncate", "fail"]

LENGTH_KEYS = ("max_new_tokens", "max_tokens", "max_completion_tokens")  # all mean the same
WAYS = ("prompt", "prompt_token_ids", "messages")  # a line gives its prompt under one of them
OWN_KEYS = {"id", "custom_id", "tools", "text", *WAYS, *LENGTH_KEYS, *OWN_KNOWN}
BATCH_KEYS = {"id", "custom_id", "method", "url", "body"}
BODY_KEYS = {"model", "messages", "prompt", "prompt_token_ids", "tools", *LENGTH_KEYS, *BODY_KNOWN}
CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"
# What jinja2 raises for a template that is wrong whatever it is given.
BROKEN_TEMPLATE = {"TemplateSyntaxError", "SecurityError", "TemplateAssertionError"}


class Tokenizer(Protocol):
    """The methods of a Hugging Face tokenizer that are used here."""

    chat_template: Any

    def encode(self, text: str) -> list[int]:
        """Encodes a text as token ids."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """Decodes token ids to a text."""

    def apply_chat_template(
        self,
        conversation: list[ChatMessage],
        *,
        add_generation_prompt: bool,
        tokenize: bool,
        return_dict: bool,
        **more: Any,
    ) -> list[int]:
        """Messages to token ids."""


@dataclass(frozen=True)
class Limits:
    """The limits that the model and the run set for a request.

    `cache_tokens` is what the plan reserves for all requests at once; None sets no limit.
    `switches_at` is the length beyond which the model encodes positions in another way, so that the
    cache of a text that grows past it would be wrong (`llmpq.models.rope`).
    """

    new_tokens: int  # the number for lines that give none
    max_positions: int
    vocab_size: int
    cache_tokens: int | None = None
    too_long: TooLong = "fail"
    switches_at: int | None = None

    def excess(self, prompt: int, new: int) -> str | None:
        """Why such a request is too long; None where it is not."""
        if prompt + new > self.max_positions:
            most = f"the {self.max_positions} positions of the model"
        elif self.cache_tokens is not None and prompt + new > self.cache_tokens:
            most = f"the {self.cache_tokens} tokens of KV cache that the plan reserves in all"
        else:
            return None
        return f"{prompt} prompt + {new} new tokens exceed {most}"

    def crossing(self, prompt: int, new: int) -> str | None:
        """Why such a request grows past where positions change; None where it does not."""
        limit = self.switches_at
        if limit is None or not prompt <= limit < prompt + new - 1:  # the last one is only chosen
            return None
        return (
            f"{prompt} prompt + {new} new tokens grow past {limit} (the model's "
            "original_max_position_embeddings), where its positions change; ask for fewer new "
            "tokens or give a longer prompt"
        )

    @property
    def most(self) -> int:
        """The most tokens of a request, prompt and new ones together."""
        return min(self.max_positions, self.cache_tokens or self.max_positions)


@dataclass(frozen=True)
class CheckedLine:
    """The request of a line. A refused request has as many tokens as are known of it."""

    request: Request
    is_openai: bool = False
    refusal: str | None = None
    left_out: tuple[str, ...] = ()  # keys that are ignored
    model: str | None = None  # the model that the line names
    num_cut: int = 0  # tokens that were cut from the beginning of the prompt


@dataclass
class _LineFields:
    """The keys of a line of either form."""

    id: str | int
    data: dict[str, object]
    is_openai: bool = False
    url: str | None = None
    method: object = None
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rules:
    """Turns lines into requests; every fault of a line is a `ValueError`.

    With `chat`, a prompt that is a text is the message of a user.
    """

    tokenizer: Tokenizer | None
    limits: Limits
    chat: bool

    def request(self, line: bytes, number: int) -> Request:
        """The request of a line that was checked and not refused."""
        return self.asked(line, number).request

    def asked(self, line: bytes, number: int) -> CheckedLine:
        """The request of a line, with all that was checked."""
        fields = self._fields(line)
        data, left_out = fields.data, fields.left_out
        ways = [name for name in WAYS if data.get(name) is not None]
        if len(ways) != 1:
            raise _not_one_prompt(fields, ways)
        said = _new_tokens(data)
        new_tokens = self.limits.new_tokens if said is None else said
        is_chat = ways[0] == "messages" or fields.url == CHAT_URL
        tokens: list[int] = []
        num_cut, refusal = 0, None
        drawn: dict[str, float] = {}
        stops: tuple[str, ...] = ()
        try:
            _check_meaning(fields, ways[0], is_chat or self.chat)
            drawn, stops = drawn_by(data), self._stops(data)
            tokens = self._tokens(data, ways[0])
            tokens, num_cut = self._fitting(tokens, new_tokens)
            if crossing := self.limits.crossing(len(tokens), new_tokens):
                raise Refused(crossing)
        except Refused as error:
            refusal = str(error)
        # A number of new tokens that the line does not give is no part of the checksum.
        own = crc32(array("q", tokens).tobytes(), said or 0)
        checksum = with_settings(own, drawn, stops)
        checksum = checksum if refusal is None else crc32(line)
        request = Request(
            fields.id, number, tuple(tokens), new_tokens, checksum, is_chat, drawn, stops
        )
        model = data.get("model") if fields.is_openai else None
        shown = None if model is None else text_of("'model'", model)
        return CheckedLine(request, fields.is_openai, refusal, tuple(left_out), shown, num_cut)

    def _fields(self, line: bytes) -> _LineFields:
        data = _json(line)
        if not isinstance(data, dict):
            raise ValueError('expected {"id": ..., "prompt": ...}')
        name = _id(data)
        if "body" in data:
            return self._batch_fields(name, data)
        if data.get("prompt") is None and "text" in data:
            data["prompt"] = data.pop("text")
        known = OWN_KEYS - ({"text"} if data.get("prompt") is not None else set())
        return _LineFields(name, data, left_out=sorted(set(data) - known))

    def _batch_fields(self, name: str | int, data: dict[str, object]) -> _LineFields:
        """The fields of a line of OpenAI's batch files."""
        body, url = data["body"], data.get("url")
        if not isinstance(body, dict):
            raise ValueError("'body' must be an object")
        if url is not None and not isinstance(url, str):
            raise ValueError("'url' must be a string")
        outside = sorted(set(data) - BATCH_KEYS)
        unknown = sorted(set(body) - BODY_KEYS)
        inside = [k for k in unknown if body[k] is not None and (k, body[k]) != ("stream", False)]
        method = data.get("method")
        return _LineFields(
            name, body, True, url, method, [*outside, *(f"body.{key}" for key in inside)]
        )

    # ---- tokens

    def _stops(self, data: dict[str, object]) -> tuple[str, ...]:
        stops = stops_of(data)
        if stops and self.tokenizer is None:
            raise Refused("'stop' needs a tokenizer, which the model does not have")
        return stops

    def _tokens(self, data: dict[str, object], way: str) -> list[int]:
        given = data[way]
        if way == "prompt" and isinstance(given, list):  # OpenAI's completions allow this
            way, given = _listed_prompt(given)
        if way == "prompt_token_ids":
            token_ids = given
        elif way == "prompt":
            token_ids = self._encode(text_of("'prompt'", given), data)
        else:
            token_ids = self._render(messages_of(given), data)
        if not isinstance(token_ids, list) or not token_ids:
            raise ValueError("the prompt must hold at least one token")
        if (odd := next((t for t in token_ids if not is_int(t)), None)) is not None:
            raise ValueError(f"token ids must be integers, found {show_value(odd)}")
        outside = next((t for t in token_ids if not 0 <= t < self.limits.vocab_size), None)
        if outside is not None:
            size = self.limits.vocab_size
            raise ValueError(f"token {show_value(outside)} is outside the vocabulary of {size}")
        return token_ids

    def _encode(self, text: str, data: dict[str, object]) -> list[int]:
        if self.chat:
            return self._render([{"role": "user", "content": text}], data)
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer; give 'prompt_token_ids'")
        try:
            return self.tokenizer.encode(text)
        except Exception as error:  # tokenizers raise plain exceptions
            raise Refused(
                f"the model's tokenizer fails ({one_line(error, with_kind=True)})"
            ) from None

    def _render(self, messages: list[ChatMessage], data: dict[str, object]) -> list[int]:
        template = str(getattr(self.tokenizer, "chat_template", None) or "")
        if self.tokenizer is None or not template:
            raise ValueError(
                "'messages' need a chat template, which the model's tokenizer does not have; use a "
                "chat model, or give whole prompts"
            )
        more = {}
        if data.get("tools"):
            if "tools" not in template:
                raise Refused("the model's chat template does not support 'tools'")
            more["tools"] = data["tools"]
        if "tool_calls" not in template and any(m.get("tool_calls") for m in messages):
            raise Refused("the model's chat template does not support tool calls")
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False, **more
            )
        except Exception as error:  # a template raises whatever its expressions raise
            raise _template_fault(error) from None

    def _fitting(self, tokens: list[int], new_tokens: int) -> tuple[list[int], int]:
        """The tokens, or the end of them where truncation is asked for; and how many were cut."""
        excess = self.limits.excess(len(tokens), new_tokens)
        if excess is None:
            return tokens, 0
        if self.limits.too_long == "fail":
            raise ValueError(excess)
        room = self.limits.most - new_tokens
        if self.limits.too_long == "truncate" and room > 0:
            return tokens[-room:], len(tokens) - room
        raise Refused(excess)


def _not_one_prompt(fields: _LineFields, ways: list[str]) -> ValueError:
    """The error for a line without a prompt or with several; it names the keys it has."""
    url, where = fields.url, "'body'" if fields.is_openai else "the line"
    if url is not None and not _is_served(url):
        return ValueError(f"url {show_value(url)}: only {CHAT_URL} and {TEXT_URL} are supported")
    found = ways or sorted(fields.data)
    names = ", ".join(show_value(name) for name in found[:MOST_LISTED])
    return ValueError(
        "give either 'prompt' or 'prompt_token_ids' or 'messages'; "
        f"{where} has {names or 'nothing'}{', ...' if len(found) > MOST_LISTED else ''}"
    )


def _template_fault(error: Exception) -> Exception:
    """A refusal of this chat, or an error where the template fails for every chat."""
    message = f"the model's chat template fails ({one_line(error, with_kind=True)})"
    broken = BROKEN_TEMPLATE & {kind.__name__ for kind in type(error).__mro__}
    return ValueError(message) if broken else Refused(message)


def _id(data: dict[str, object]) -> str | int:
    """The request's id, under either key."""
    name = data.get("id") if data.get("id") is not None else data.get("custom_id")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise ValueError("'id' must be a string or an integer")
    refuse_half_characters("'id'", str(name))
    if data.get("id") is not None and data.get("custom_id", name) != name:
        raise ValueError("'id' and 'custom_id' differ; give one of them")
    return name


def _new_tokens(data: dict[str, object]) -> int | None:
    """The number of new tokens that a line asks for, under any of its names; None: none."""
    said = {key: _whole(data[key]) for key in LENGTH_KEYS if data.get(key) is not None}
    for key, value in said.items():
        if not is_int(value) or value < 1:
            raise ValueError(f"'{key}' must be a positive integer, found {show_value(value)}")
    if len(set(said.values())) > 1:
        both = " and ".join(f"'{key}' is {value}" for key, value in said.items())
        raise ValueError(f"{both}, though they mean the same; give one of them")
    return next(iter(said.values()), None)


def _whole(value: Any) -> Any:
    """An integer for a number such as 16.0, which tables with empty cells have for 16."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_meaning(fields: _LineFields, way: str, is_chat: bool) -> None:
    """Raises `Refused` where a line asks for something that llmpq does not do."""
    refuse_unmet(fields.data, fields.is_openai)
    if fields.data.get("tools") and not is_chat:
        raise Refused("'tools' need 'messages', which the model's chat template renders")
    if fields.method is not None and fields.method != "POST":
        raise Refused(f"method {show_value(fields.method)}: only POST is supported")
    if fields.url is not None:
        _check_url(fields.url, way)


def _check_url(url: str, way: str) -> None:
    """Raises `Refused` for URLs that are no request of a completion."""
    if not _is_served(url):
        raise Refused(f"url {show_value(url)}: only {CHAT_URL} and {TEXT_URL} are supported")
    if (_path_of(url) == CHAT_URL) != (way == "messages"):
        raise Refused(f"url {show_value(url)} does not take '{way}'")


def _path_of(url: str) -> str:
    path = "/" + url.split("://")[-1].partition("/")[2] if "://" in url else url
    return path.rstrip("/")


def _is_served(url: str) -> bool:
    return _path_of(url) in (CHAT_URL, TEXT_URL)


def _listed_prompt(given: list[object]) -> tuple[str, object]:
    """The kind and value of a prompt given as a list: token ids, or a list of one prompt."""
    if given and all(map(is_int, given)):
        return "prompt_token_ids", given
    if len(given) != 1:
        raise Refused(f"{len(given)} prompts in one request; give each a line of its own")
    return ("prompt_token_ids" if isinstance(given[0], list) else "prompt"), given[0]


def _json(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), object_pairs_hook=no_repeated_keys)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(_not_json(line, error)) from None


def _not_json(line: bytes, error: Exception) -> str:
    """The message for a line that is not JSON; it may be of another kind of file."""
    if is_lfs_pointer(line):
        return f"not valid JSON: {FETCH_LFS}"
    if line.lstrip()[:1] != b"{":  # plain text, a web page, a list
        return 'not valid JSON: expected a line such as {"id": "1", "prompt": "..."}'
    return f"not valid JSON: {one_line(error)}"


def show(text: str) -> str:
    """Any text in a form that every terminal can print."""
    return f"'{text}'" if text.isprintable() else ascii(text)


def is_int(value: object) -> bool:
    """Whether a value is an integer; JSON's true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)
