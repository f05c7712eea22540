"""One prompt, and the result of its request."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Reason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Request:
    """One prompt. `number` is its position in the prompts file.

    `checksum` covers the prompt and the request's own settings; a resumed run recognizes the
    request by it. The answer to a chat (`is_chat`) is a message. `drawn` holds sampling settings
    that differ from the run's. The answer ends before the first of the texts `stops`.
    """

    id: str | int
    number: int
    prompt: tuple[int, ...]
    new_tokens: int
    checksum: int | None = field(default=None, compare=False)
    is_chat: bool = field(default=False, compare=False)
    drawn: Mapping[str, float] = field(default_factory=dict, compare=False)
    stops: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Finished:
    """The new tokens of a request; `error` says why it failed, where `reason` is "error".

    A `refused` request was not computed, as it cannot be served as it was asked.
    """

    request: Request
    token_ids: tuple[int, ...]
    reason: Reason
    error: str | None = None
    refused: bool = False
