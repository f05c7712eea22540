"""Messages of a chat, as chat templates expect them: every content is one text.

Parts of a message that are texts are joined by line breaks, and arguments of tool calls are read
as JSON, both as vLLM does. A part that is no text, such as an image, makes the request `Refused`.
Other keys go to the template unchanged. Faults raise `ValueError`.
"""

import json

ChatMessage = dict[str, object]

TEXT_PARTS = ("text", "input_text", "output_text")


class Refused(Exception):
    """This request cannot be served; the others of the file can."""


def messages_of(found: object) -> list[ChatMessage]:
    """The checked messages of a request, each with one text as its content."""
    if not isinstance(found, list) or not found:
        raise ValueError("'messages' must be a list with at least one message")
    return [_message(message) for message in found]


def _message(found: object) -> ChatMessage:
    if not isinstance(found, dict) or "role" not in found:
        raise ValueError('a message must be {"role": ..., "content": ...}')
    text_of("'role' of a message", found["role"])
    content, calls = found.get("content"), found.get("tool_calls")
    if content is None and not calls:
        raise ValueError('a message must be {"role": ..., "content": ...}')
    message = found | {"content": _content(content)}
    if not calls:
        return message
    if not isinstance(calls, list):
        raise ValueError("'tool_calls' must be a list")
    return message | {"tool_calls": [_tool_call(call) for call in calls]}


def _content(found: object) -> str:
    if found is None:
        return ""
    if isinstance(found, list):
        return "\n".join(_part(part) for part in found)
    return text_of("'content' of a message", found)


def _part(part: object) -> str:
    """The text of a part of a message."""
    if isinstance(part, str):
        return text_of("a part of a message", part)
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise ValueError(
            '\'content\' of a message must be a string or parts: {"type": "text", ...}'
        )
    if kind not in TEXT_PARTS:
        raise Refused(f"a message has a part of type '{kind[:40]}'; this model reads only text")
    return text_of("'text' of a part of a message", part.get("text"))


def _tool_call(call: object) -> ChatMessage:
    """A tool call with its arguments as an object, as chat templates expect them."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise ValueError("a tool call must have a 'function'")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise Refused("the arguments of a tool call are not valid JSON") from None
    return call | {"function": function | {"arguments": arguments}}


def text_of(name: str, found: object) -> str:
    """The text of a value; raises `ValueError`, which calls the value `name`, for others."""
    if not isinstance(found, str):
        raise ValueError(f"{name} must be a string")
    refuse_half_characters(name, found)
    return found


def refuse_half_characters(name: str, text: str) -> None:
    """Raises `ValueError` for a lone surrogate, which no tokenizer and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} contains a lone surrogate (half a character)") from None
