"""Writes finished requests as lines of the output, and reads such lines.

There are two forms. llmpq's own has the token ids, and a failed request has "finish_reason":
"error" with the reason beside it. "openai" is the output of OpenAI's batch interface
(https://platform.openai.com/docs/guides/batch): the answer is the body of a response with a status
code, 200 where the request was served, 400 where it cannot be served as it was asked, 500 where it
failed while it was computed.

A result is recognized by keys that only results have, so that another file is never taken for an
output.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from llmpq.prompts.request import Finished, Reason

Id = str | int
Form = Literal["llmpq", "openai"]

DONE, REFUSED, FAILED = 200, 400, 500  # HTTP's status codes
OWN_START = b'{"id": '  # the beginning of a line of either form, also of an incomplete one


class ParsedResult(NamedTuple):
    """The id of a line's request, the form of the line, and whether the request failed."""

    id: Id
    form: Form
    failed: bool


@dataclass(frozen=True)
class ResultWriter:
    """Makes the lines of one output. `model` is the name that OpenAI's form gives the model."""

    form: Form = "llmpq"
    model: str = ""

    def line(self, finished: Finished, text: str) -> bytes:
        """The line without its break; `text` is the decoded text of the new tokens."""
        if self.form == "openai":
            return json_bytes(_openai(finished, text, self.model))
        return json_bytes(_own(finished, text))


def read_result(line: bytes) -> ParsedResult | None:
    """Parses a whole line; None where it is no result."""
    data = parse_object(line)
    if data is None:
        return None
    return _read_openai(data) if "custom_id" in data else _read_own(data)


def parse_object(line: bytes) -> dict[str, object] | None:
    """Parses a JSON object; None for anything else."""
    with suppress(ValueError, RecursionError):
        data = json.loads(line.decode())
        return data if isinstance(data, dict) else None
    return None


def json_bytes(data: dict[str, object]) -> bytes:
    """JSON on one line; half a character (a lone surrogate) becomes its escape, \\udXXX."""
    return json.dumps(data, ensure_ascii=False, default=str).encode(errors="backslashreplace")


def _own(finished: Finished, text: str) -> dict[str, object]:
    line: dict[str, object] = {
        "id": finished.request.id,
        "text": text,
        "token_ids": finished.token_ids,
        "num_prompt_tokens": len(finished.request.prompt),
        "num_new_tokens": len(finished.token_ids),
        "finish_reason": finished.reason,
    }
    return line | ({} if finished.error is None else {"error": finished.error})


def _openai(finished: Finished, text: str, model: str) -> dict[str, object]:
    name = finished.request.id
    digest = hashlib.sha256(f"{type(name).__name__} {name}".encode(errors="replace")).hexdigest()
    status, error = DONE, None
    body = _answer(finished, text, model, digest)
    if finished.reason == "error":
        status = REFUSED if finished.refused else FAILED
        kind = "invalid_request_error" if finished.refused else "server_error"
        error = {"code": kind, "message": finished.error}
        body = {"error": {"message": finished.error, "type": kind, "param": None, "code": None}}
    response = {"status_code": status, "request_id": f"req-{digest[:24]}", "body": body}
    return {
        "id": f"batch_req_{digest[:24]}",
        "custom_id": name,
        "response": response,
        "error": error,
    }


def _answer(finished: Finished, text: str, model: str, digest: str) -> dict[str, object]:
    is_chat = finished.request.is_chat
    said: dict[str, object] = {"text": text}
    if is_chat:
        said = {"message": {"role": "assistant", "content": text}}
    prompt, new = len(finished.request.prompt), len(finished.token_ids)
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{digest[:24]}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": finished.reason}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new},
    }


def _read_own(data: Mapping[str, object]) -> ParsedResult | None:
    reason = data.get("finish_reason")
    if reason not in get_args(Reason):
        return None
    if not isinstance(data.get("token_ids"), list) or not isinstance(data.get("text"), str):
        return None
    return _parsed(data.get("id"), "llmpq", reason == "error")


def _read_openai(data: Mapping[str, object]) -> ParsedResult | None:
    response, error = data.get("response"), data.get("error")
    if isinstance(response, dict) and isinstance(response.get("status_code"), int):
        failed = response["status_code"] != DONE or error is not None
        return _parsed(data["custom_id"], "openai", failed)
    if response is None and isinstance(error, dict):
        return _parsed(data["custom_id"], "openai", failed=True)
    return None


def _parsed(name: object, form: Form, failed: bool) -> ParsedResult | None:
    if isinstance(name, str | int) and not isinstance(name, bool):
        return ParsedResult(name, form, failed)
    return None
